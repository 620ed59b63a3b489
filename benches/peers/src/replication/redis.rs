//! Redis, in memory, with one replica: values appended to a list; `commit` is `WAIT 1`, a replica that has it in
//! memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{Peer, Server, free_port, is_installed, until};
use crate::{Result, load};

pub(super) const PEER: Peer = Peer {
    name: "redis",
    ship: |directory, record, count| {
        let mut pair = Pair::start(directory)?;
        load::megabytes(count * record.len() as u64, || {
            // As many at a time as fill a socket's buffer, about.
            let together = (64 << 10) / record.len() as u64 + 1;
            let mut left = count;
            while left > 0 {
                let now = left.min(together);
                (0..now).try_for_each(|_| pair.client.send(&[b"RPUSH", b"log", record]))?;
                (0..now).try_for_each(|_| pair.client.answer().map(drop))?;
                left -= now;
            }
            pair.wait()
        })
    },
    commit: |directory, record, count| {
        let mut pair = Pair::start(directory)?;
        load::latencies(count, || {
            pair.client.send(&[b"RPUSH", b"log", record])?;
            pair.client.send(&[b"WAIT", b"1", b"0"])?;
            pair.client.answer()?;
            pair.client.expect_one()
        })
    },
    missing: || (!is_installed("redis-server")).then(|| "there is no redis-server".to_owned()),
};

struct Pair {
    client: Client,
    _follower: Server,
    _leader: Server,
}

impl Pair {
    fn start(directory: &Path) -> Result<Pair> {
        let server = |name: &str, more: &[&str]| -> Result<(Server, u16)> {
            let (place, port) = (directory.join(name), free_port()?);
            std::fs::create_dir_all(&place)?;
            let child = Command::new("redis-server")
                .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0"])
                .args(["--port", &port.to_string()])
                .args(more)
                .current_dir(place)
                .stdout(Stdio::null())
                .spawn()?;
            Ok((Server(child), port))
        };
        let (leader, port) = server("leader", &[])?;
        let stream = until("redis", || TcpStream::connect(("127.0.0.1", port)).ok())?;
        stream.set_nodelay(true)?;
        let client = Client { answers: BufReader::new(stream.try_clone()?), stream };
        let (follower, _) = server("follower", &["--replicaof", &format!("127.0.0.1 {port}")])?;
        let mut pair = Pair { client, _follower: follower, _leader: leader };
        pair.client.send(&[b"RPUSH", b"log", b"the first"])?;
        pair.client.answer()?;
        pair.wait()?;
        Ok(pair)
    }

    /// Until the replica has everything.
    fn wait(&mut self) -> Result<()> {
        self.client.send(&[b"WAIT", b"1", b"60000"])?;
        self.client.expect_one()
    }
}

struct Client {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Client {
    fn send(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut request = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            request.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            request.extend_from_slice(word);
            request.extend_from_slice(b"\r\n");
        }
        Ok(self.stream.write_all(&request)?)
    }

    /// One line: a number, or a refusal.
    fn answer(&mut self) -> Result<u64> {
        let mut line = String::new();
        self.answers.by_ref().take(4096).read_line(&mut line)?;
        match line.trim_end().strip_prefix(':') {
            Some(number) => Ok(number.parse()?),
            None => Err(format!("redis answered {line:?}").into()),
        }
    }

    fn expect_one(&mut self) -> Result<()> {
        if self.answer()? == 1 { Ok(()) } else { Err("the replica has not got it".into()) }
    }
}
