//! Silent divergence, made impossible to miss: on each stream, what a follower acknowledges is compared with the
//! leader's log by the chain.
//!
//! The handshake compares the chains once, and every batch that arrives continues the follower's. What is left are logs
//! that became different while a stream stood: a defect, memory or a middle that changes bytes, a peer that lies. So
//! every acknowledgement carries the chain at the LSN that it names, and counts only if the leader's log has the same
//! chain there. Heartbeats carry the chain that was last found to be the same, and the follower compares it with its
//! own.
//!
//! The *leader* here is whoever is followed, a follower that feeds others too. Whoever finds a difference tells the
//! other with an `Error` frame ([`RefusalCode::ChainMismatch`]) and ends the stream. The follower then stops for good;
//! on the leader it counts for no commit, and the status says why.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::commit::FollowerMarks;
use crate::error::{Error, RefusalCode, Result};
use crate::shutdown::ShutdownSignal;
use crate::transport::FrameReceiver;
use crate::types::{Chain, Lsn, NodeId, ShardId};
use crate::wal::{ChainCursor, Compared};
use crate::watermark::{Until, WaitStrategy, Watermark, wait_any};
use crate::wire::{ErrorMessage, Message};

const DONE: Lsn = Lsn(1);

/// What the two threads of a stream on the leader's side know of the follower's history. The one that reads
/// acknowledgements compares; the one that ships tells the follower, for the sender is its own.
pub(crate) struct HistoryCheck {
    cursor: Mutex<ChainCursor>,
    refusal: OnceLock<ErrorMessage>,
    /// 1 once there is something to be told. Moved by whoever reads acknowledgements.
    refused: Watermark,
    /// 1 once the follower has been told. Moved by the shipper.
    told: Watermark,
}

impl HistoryCheck {
    pub(crate) fn new(cursor: ChainCursor) -> HistoryCheck {
        HistoryCheck {
            cursor: Mutex::new(cursor),
            refusal: OnceLock::new(),
            refused: Watermark::default(),
            told: Watermark::default(),
        }
    }

    /// The follower's log will begin with some segment of this one, whatever it was before.
    pub(crate) fn begin_anew(&self) {
        self.cursor.lock().unplace();
    }

    /// Compares what a follower says that it has.
    ///
    /// # Errors
    ///
    /// [`Error::ChainMismatch`]; [`Error::NotRetained`] if there is nothing to compare with any more.
    pub(crate) fn compare(&self, (node, peer, shard): (NodeId, &str, ShardId), lsn: Lsn, chain: Chain) -> Result<()> {
        match self.cursor.lock().compare(lsn, chain)? {
            Compared::Same | Compared::NothingYet => Ok(()),
            Compared::Differs { own } => {
                Err(Error::ChainMismatch { peer: format!("node {node} ({peer})"), shard, lsn, own, theirs: chain })
            }
        }
    }

    /// Where `error`, which ended the stream, says that the histories differ, by this node's finding or by the
    /// follower's word: nothing of the follower counts from now on, and both sides know why.
    pub(crate) fn end_for(
        &self,
        error: &Error,
        (shard, follower): (ShardId, &FollowerMarks),
        over: &ShutdownSignal,
        receiver: &mut dyn FrameReceiver,
        timeout: Duration,
    ) {
        let refusal = refusal_for(error);
        let is_told = matches!(error, Error::Refused { code: RefusalCode::ChainMismatch, .. });
        // Once a newer stream has taken over, what is left of this one decides nothing.
        if over.is_shutdown() || (refusal.is_none() && !is_told) {
            return;
        }
        follower.set_counts(false);
        follower.set_divergence(Some(error.to_string()));
        log::error!("node {}, shard {shard}: {error}", follower.node());
        if let Some(refusal) = refusal {
            self.refuse(refusal, over, timeout);
            let_hang_up(receiver, timeout);
        }
    }

    /// Up to where both logs were last found to be the same.
    pub(crate) fn agreed(&self) -> Lsn {
        self.cursor.lock().agreed().map_or(Lsn::ZERO, |(lsn, _)| lsn)
    }

    /// The chain at `head`, if that is where both logs were last found to be the same; else the chain that says
    /// nothing.
    pub(crate) fn chain_for_heartbeat(&self, head: Lsn) -> Chain {
        let agreed = self.cursor.lock().agreed();
        agreed.filter(|(lsn, _)| *lsn == head).map(|(_, chain)| chain).unwrap_or_default()
    }

    /// Has the follower told why the stream ends, and waits until that has been done, or cannot be done in time.
    fn refuse(&self, refusal: ErrorMessage, over: &ShutdownSignal, timeout: Duration) {
        let _ = self.refusal.set(refusal);
        self.refused.advance(DONE);
        let told = Until { mark: &self.told, at_least: DONE };
        wait_any(&[told, over.until()], WaitStrategy::Park, Instant::now().checked_add(timeout));
    }

    pub(crate) fn until_refused(&self) -> Until<'_> {
        Until { mark: &self.refused, at_least: DONE }
    }

    /// What the follower is to be told.
    pub(crate) fn refusal(&self) -> Option<Message> {
        self.refusal.get().cloned().map(Message::Error)
    }

    pub(crate) fn set_told(&self) {
        self.told.advance(DONE);
    }
}

/// What the other side is told of a difference in history; `None` for every other error.
pub(crate) fn refusal_for(error: &Error) -> Option<ErrorMessage> {
    matches!(error, Error::ChainMismatch { .. })
        .then(|| ErrorMessage::new(RefusalCode::ChainMismatch, error.to_string()))
}

/// Reads on until the peer has hung up, so that what it was told last reaches it, but no longer than `timeout`.
fn let_hang_up(receiver: &mut dyn FrameReceiver, timeout: Duration) {
    let deadline = Instant::now().checked_add(timeout);
    if receiver.set_timeout(Some(timeout)).is_err() || receiver.set_deadline(deadline).is_err() {
        return;
    }
    while deadline.is_some_and(|deadline| Instant::now() < deadline) && receiver.receive_message().is_ok() {}
}
