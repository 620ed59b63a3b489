//! `towline leader`.

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use towline::wal::LogWriter;
use towline::{Commit, Epoch, Lsn, Node, NodeId, ShardId, ShutdownSignal};

use super::progress::Progress;
use super::{DONE, FAILED, Outcome};

/// Lead: append records and ship them to every follower that connects.
///
/// With --stdin each line of standard input is a record (without its line break); lines go to the shards in turn.
/// Without it the leader serves the log that its directory holds.
///
/// Example:  journalctl -f | towline leader --dir /var/lib/towline --shards 4 --stdin --commit durable:1
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct Leader {
    /// Data directory; made if it is not there
    #[arg(long)]
    dir: PathBuf,
    /// Address to listen at for followers; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:7400")]
    listen: String,
    /// Shards of a new directory [default: 1]; of an existing one it must be what it was made with
    #[arg(long)]
    shards: Option<u16>,
    /// Bytes of a segment of a new directory [default: 16777216]
    #[arg(long)]
    segment_size: Option<u64>,
    /// This node's id [default: random, kept in the directory]
    #[arg(long)]
    node_id: Option<u64>,
    /// Leadership term [default: the highest that the directory has accepted]
    #[arg(long)]
    epoch: Option<u64>,
    /// Most bytes of log that each shard keeps, whoever still needs them; 0 for no bound [default: 1073741824]
    #[arg(long, value_name = "BYTES")]
    max_wal_bytes: Option<u64>,
    /// Read records from standard input, one a line
    #[arg(long)]
    stdin: bool,
    /// What committed means: synced, received:K, durable:K, applied:K, or synced+ and one of them
    #[arg(long, default_value = "synced", value_name = "LEVEL")]
    commit: Commit,
    /// With --stdin: leave at the end of the input once every record is committed, instead of going on serving
    #[arg(long, requires = "stdin")]
    exit_on_eof: bool,
    /// With --exit-on-eof: give up waiting for the last commits after this many seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    commit_timeout: u64,
    /// Listen on an address that other machines reach, although nothing is encrypted
    #[arg(long)]
    allow_plaintext: bool,
}

/// What became of standard input.
struct Ingested {
    lines: u64,
    committed: u64,
}

impl Leader {
    pub(super) fn run(self) -> Outcome {
        let stop = super::stop_at_interrupt()?;
        let mut builder = Node::builder(&self.dir).commit(self.commit).allow_plaintext(self.allow_plaintext);
        if let Some(shards) = self.shards {
            builder = builder.shards(shards);
        }
        if let Some(bytes) = self.segment_size {
            builder = builder.segment_size(bytes);
        }
        if let Some(node) = self.node_id {
            builder = builder.node_id(NodeId(node));
        }
        if let Some(bytes) = self.max_wal_bytes {
            builder = builder.max_wal_bytes(bytes);
        }
        if let Some(epoch) = self.epoch {
            builder = builder.epoch(Epoch(epoch));
        }
        let leader = builder.lead(&self.listen)?;
        let manifest = leader.manifest();
        eprintln!(
            "leading {} with {} shards, node {}, epoch {}, at {}",
            self.dir.display(),
            manifest.shard_count,
            manifest.node,
            manifest.epoch,
            leader.local_address()
        );
        let mut code = DONE;
        if self.stdin {
            let ingested = self.ingest(&leader, &stop)?;
            println!("{} of {} records committed ({})", ingested.committed, ingested.lines, self.commit);
            if ingested.committed < ingested.lines {
                code = FAILED;
            }
        }
        if !self.exit_on_eof {
            stop.wait();
        }
        leader.shutdown()?;
        Ok(code)
    }

    /// Reads standard input on a thread of its own, so that Ctrl-C need not wait for the next line.
    fn ingest(&self, leader: &towline::Leader, stop: &ShutdownSignal) -> Result<Ingested, Box<dyn std::error::Error>> {
        let shards: Vec<_> = (0..leader.shard_count()).map(ShardId).collect();
        let before: Vec<_> =
            shards.iter().map(|&shard| leader.log(shard).map(|log| log.head())).collect::<towline::Result<_>>()?;
        let writers: Vec<_> = shards.iter().map(|&shard| leader.writer(shard)).collect::<towline::Result<_>>()?;
        let (result_to, result) = crossbeam_channel::bounded(1);
        let read = ShutdownSignal::new();
        let done = read.clone();
        std::thread::Builder::new().name("tl-stdin".to_owned()).spawn(move || {
            let mut lines = Lines::new(writers);
            let result = lines.append_all(&mut std::io::stdin().lock());
            let _ = result_to.send(result.map(|()| lines.count));
            done.shutdown();
        })?;
        towline::wait_any(&[read.until(), stop.until()], towline::WaitStrategy::Park, None);
        if let Ok(Err(error)) = result.try_recv() {
            return Err(error.into());
        }
        let deadline = Instant::now() + Duration::from_secs(self.commit_timeout);
        let mut ingested = Ingested { lines: 0, committed: 0 };
        for (&shard, &before) in shards.iter().zip(&before) {
            let head = leader.log(shard)?.head();
            ingested.lines += head.records_since(before);
            ingested.committed += self.wait_for(leader, shard, head, deadline, stop)?.records_since(before);
        }
        Ok(ingested)
    }

    /// Waits for the last record of a shard; tells up to where it is committed.
    fn wait_for(
        &self,
        leader: &towline::Leader,
        shard: ShardId,
        head: Lsn,
        deadline: Instant,
        stop: &ShutdownSignal,
    ) -> towline::Result<Lsn> {
        let commits = leader.commits(shard)?;
        // An interrupt ends the waiting, but what is committed by then is counted.
        let deadline = if self.exit_on_eof && !stop.is_shutdown() { deadline } else { Instant::now() };
        match commits.wait(head, self.commit, Some(deadline)) {
            towline::Outcome::Committed => Ok(head),
            _ => Ok(commits.committed().min(head)),
        }
    }
}

/// Splits input into lines and appends them, in turn, to the shards: as many as have arrived make one batch a shard.
struct Lines {
    writers: Vec<LogWriter>,
    count: u64,
    progress: Progress,
    bytes: u64,
}

/// Bytes read at a time.
const CHUNK: usize = 256 * 1024;

impl Lines {
    fn new(writers: Vec<LogWriter>) -> Lines {
        Lines { writers, count: 0, progress: Progress::new("appending", None), bytes: 0 }
    }

    fn append_all(&mut self, input: &mut impl Read) -> towline::Result<()> {
        let mut buffer = vec![0; CHUNK];
        let mut filled = 0;
        loop {
            if filled == buffer.len() {
                // One line longer than the buffer; how long it may get is the log's to say.
                self.check_line(filled)?;
                buffer.resize(buffer.len() * 2, 0);
            }
            let read = match input.read(&mut buffer[filled..]) {
                Ok(read) => read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    return Err(towline::Error::Io { action: "read", path: "standard input".into(), source });
                }
            };
            filled += read;
            if read == 0 {
                if filled > 0 {
                    self.append_lines(&buffer[..filled])?;
                }
                return Ok(());
            }
            if let Some(end) = buffer[..filled].iter().rposition(|&byte| byte == b'\n') {
                self.append_lines(&buffer[..end])?;
                buffer.copy_within(end + 1..filled, 0);
                filled -= end + 1;
            }
            self.bytes += read as u64;
            self.progress.set(self.bytes);
        }
    }

    /// Appends whole lines, given without the last line break.
    fn append_lines(&mut self, text: &[u8]) -> towline::Result<()> {
        let shards = self.writers.len();
        let mut batches = vec![Vec::new(); shards];
        for line in text.split(|&byte| byte == b'\n') {
            self.check_line(line.len())?;
            #[allow(clippy::cast_possible_truncation, reason = "below the number of shards")]
            batches[(self.count % shards as u64) as usize].push(line);
            self.count += 1;
        }
        for (writer, batch) in self.writers.iter_mut().zip(&batches) {
            append_in_batches(writer, batch)?;
        }
        Ok(())
    }

    fn check_line(&self, len: usize) -> towline::Result<()> {
        let max = self.writers.first().map_or(0, |writer| writer.log().max_record_len());
        if len as u64 > max {
            return Err(towline::Error::RecordTooLarge { len: len as u64, max });
        }
        Ok(())
    }
}

/// Appends lines as few batches, each small enough to leave room in its segment.
fn append_in_batches(writer: &mut LogWriter, lines: &[&[u8]]) -> towline::Result<()> {
    let most = writer.log().max_record_len() / 4;
    let mut rest = lines;
    while !rest.is_empty() {
        let mut bytes = 0;
        let count = rest.iter().take_while(|line| {
            bytes += line.len() as u64 + 4;
            bytes <= most
        });
        let (batch, later) = rest.split_at(count.count().max(1));
        writer.append_batch(batch)?;
        rest = later;
    }
    Ok(())
}
