//! The `towline` command: demonstrates, leads, follows, reads, asks and checks.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
