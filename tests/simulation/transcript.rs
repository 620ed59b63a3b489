//! One line an event: kept only when somebody will read it, since most runs end well.

use std::fmt;

use super::clock::Time;

pub struct Transcript {
    is_kept: bool,
    pub lines: Vec<String>,
}

impl Transcript {
    pub fn new(is_kept: bool) -> Transcript {
        Transcript { is_kept, lines: Vec::new() }
    }

    /// A line about a node; 0 is the world around them.
    pub fn line(&mut self, now: Time, node: u64, text: fmt::Arguments<'_>) {
        if self.is_kept {
            let who = if node == 0 { "world ".to_owned() } else { format!("node {node}") };
            self.lines.push(format!("{:>9.3} {who} {text}", now as f64 / 1000.0));
        }
    }
}
