//! The side of one rebuild that serves it, a leader's or that of a follower that feeds others: the base, sent run by
//! run between the bytes of the log.
//!
//! The shipper owns it and asks for one run at a time, after it has sent everything published: so the log has priority,
//! however large the base is.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::host::{Host, OpenBase, StreamKey};
use crate::limits::{BASE_RUN_LEN, MAX_BASE_DATA_LEN};
use crate::rebuild::places::{Place, Places};
use crate::target::{BaseInfo, BaseSource, BlockId, ReplicationTarget};
use crate::transport::{Body, FrameSender};
use crate::types::{Epoch, Lsn, SessionId, ShardId};
use crate::wal::LogPosition;
use crate::watermark::{Until, Watermark};
use crate::wire::{BaseComplete, BaseDataHeader, FrameKind, Message, SessionAction, SessionControl, SessionKind};

const BEGUN: Lsn = Lsn(1);
const ACCEPTED: Lsn = Lsn(1);

/// A rebuild that has been issued and not begun.
pub(crate) struct IssuedRebuild {
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    /// Frozen when it was issued.
    pub(crate) target: Lsn,
    pub(crate) shard: ShardId,
    /// Where the log goes on with that of an interrupted rebuild, if it can.
    pub(crate) log_goes_on: Option<LogPosition>,
    pub(crate) store: Arc<dyn ReplicationTarget>,
    pub(crate) places: Arc<Places>,
    pub(crate) agreement: Arc<Agreement>,
    /// Who decides about it, and the stream that it has there.
    pub(crate) host: Arc<Host>,
    pub(crate) stream: StreamKey,
}

/// What the thread that ships and the thread that reads acknowledgements agree on.
#[derive(Default)]
pub(crate) struct Agreement {
    /// The whole base has been sent. Set by the shipper.
    base_sent: AtomicBool,
    runs: Mutex<Runs>,
    /// 1 once the follower has taken the session on. Moved by whoever reads acknowledgements.
    begun: Watermark,
    /// 1 once what the follower achieved has been accepted. Moved by whoever reads acknowledgements.
    accepted: Watermark,
}

/// The base as it is on its way.
#[derive(Default)]
struct Runs {
    /// Blocks of each run that has been sent and not been taken yet.
    sent: VecDeque<u32>,
    /// Blocks that the follower has taken or skipped.
    taken: u64,
    /// The first block that it wants; none before it has taken the session on.
    first: Option<BlockId>,
}

impl Agreement {
    /// The follower has taken the session on, and wants the blocks from `first` on.
    pub(crate) fn begin(&self, first: BlockId) {
        self.runs.lock().first.get_or_insert(first);
        self.begun.advance(BEGUN);
    }

    /// The follower has taken one more run, or all. Gives how many blocks it has taken; `None` if no more was sent.
    pub(crate) fn take_run(&self, all: bool) -> Option<u64> {
        let mut runs = self.runs.lock();
        let count = if all { runs.sent.len() } else { 1 };
        for _ in 0..count {
            let blocks = runs.sent.pop_front()?;
            runs.taken += u64::from(blocks);
        }
        Some(runs.taken)
    }

    pub(crate) fn is_base_sent(&self) -> bool {
        self.base_sent.load(Ordering::Acquire)
    }

    pub(crate) fn accept(&self) {
        self.accepted.advance(ACCEPTED);
    }
}

impl IssuedRebuild {
    /// The message that does `action` to it.
    pub(crate) fn control(&self, action: SessionAction) -> SessionControl {
        SessionControl {
            session: self.session,
            epoch: self.epoch,
            action,
            kind: SessionKind::Rebuild,
            base_lsn: Lsn::ZERO,
            target: self.target,
            log_start: Lsn::ZERO,
            block_len: 0,
            block_count: 0,
        }
    }

    /// Opens the base: the target makes a flushed boundary. The place is kept until the base has been sent.
    pub(crate) fn open(self, place: Place, open: OpenBase) -> Result<BaseLane> {
        let source = self.store.open_base(self.shard)?;
        let info = source.info();
        let len = info.block_len.max(BASE_RUN_LEN);
        if len > MAX_BASE_DATA_LEN {
            return Err(Error::invalid(format!(
                "blocks of {} bytes cannot be sent: at most {MAX_BASE_DATA_LEN}",
                info.block_len
            )));
        }
        Ok(BaseLane {
            issued: self,
            source,
            _open: open,
            info,
            place: Some(place),
            is_open: false,
            buffer: vec![0; usize::try_from(len).unwrap_or_default()],
            blocks: 0,
            checksum: crc32fast::Hasher::new(),
        })
    }
}

/// A base on its way.
pub(crate) struct BaseLane {
    issued: IssuedRebuild,
    source: Box<dyn BaseSource>,
    /// Dropped once the source has been.
    _open: OpenBase,
    info: BaseInfo,
    /// Given up once the base has been sent.
    place: Option<Place>,
    /// The follower has taken the session on, and the source stands at the first block that it wants.
    is_open: bool,
    buffer: Vec<u8>,
    blocks: u64,
    checksum: crc32fast::Hasher,
}

impl BaseLane {
    /// What the base is.
    pub(crate) fn info(&self) -> BaseInfo {
        self.info
    }

    /// The message that starts the session, with a log lane that begins with `log_start`.
    pub(crate) fn start(&self, log_start: Lsn) -> SessionControl {
        SessionControl {
            base_lsn: self.info.base_lsn,
            log_start,
            block_len: self.info.block_len,
            block_count: self.info.block_count,
            ..self.issued.control(SessionAction::Start)
        }
    }

    /// Sends the next run, or the end of the base. Returns whether there was anything to send: nothing before the
    /// follower has taken the session on, for only then its bitmap covers what its log has.
    pub(crate) fn send_next(&mut self, sender: &mut dyn FrameSender) -> Result<bool> {
        if self.place.is_none() {
            return Ok(false);
        }
        if !self.is_open {
            let Some(first) = self.issued.agreement.runs.lock().first else { return Ok(false) };
            self.source.skip_to(first);
            self.is_open = true;
        }
        let Some(run) = self.source.next_run(&mut self.buffer)? else {
            self.agree_base_sent(sender)?;
            return Ok(true);
        };
        let bytes = self.buffer.get(..run.len).ok_or_else(|| {
            Error::invalid(format!("a run of {} bytes in a buffer of {}", run.len, self.buffer.len()))
        })?;
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(bytes);
        self.checksum.combine(&checksum);
        let header = BaseDataHeader {
            session: self.issued.session,
            epoch: self.issued.epoch,
            block: run.first.0,
            length: u32::try_from(run.len).unwrap_or(u32::MAX),
            checksum: checksum.finalize(),
        };
        self.blocks += u64::from(run.count);
        // Before the blocks: the word that they have been taken can be here at once.
        self.issued.agreement.runs.lock().sent.push_back(run.count);
        sender.send(FrameKind::BaseData, 0, &header.to_bytes(), Body::Bytes(bytes))?;
        Ok(true)
    }

    fn agree_base_sent(&mut self, sender: &mut dyn FrameSender) -> Result<()> {
        // Before the message: the answer to it can be here at once.
        self.issued.agreement.base_sent.store(true, Ordering::Release);
        self.place = None;
        self.buffer = Vec::new();
        sender.send_message(&Message::BaseComplete(BaseComplete {
            session: self.issued.session,
            epoch: self.issued.epoch,
            base_lsn: self.info.base_lsn,
            blocks: self.blocks,
            checksum: self.checksum.clone().finalize(),
        }))
    }

    /// Whether the follower's achieved LSN has been accepted.
    pub(crate) fn is_accepted(&self) -> bool {
        self.issued.agreement.accepted.until(ACCEPTED).holds()
    }

    /// The condition that there is more to do: the follower has taken the session on, or what it achieved has been
    /// accepted.
    pub(crate) fn until_more(&self) -> Until<'_> {
        let Agreement { begun, accepted, .. } = self.issued.agreement.as_ref();
        if self.is_open { accepted.until(ACCEPTED) } else { begun.until(BEGUN) }
    }

    /// Once the follower has taken the session on.
    pub(crate) fn until_begun(&self) -> Until<'_> {
        self.issued.agreement.begun.until(BEGUN)
    }

    /// The message that says so.
    pub(crate) fn accept(&self) -> SessionControl {
        SessionControl { base_lsn: self.info.base_lsn, ..self.issued.control(SessionAction::Accept) }
    }
}
