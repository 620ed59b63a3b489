//! The epoch that a follower has accepted, and those of its streams that stand under older ones.
//!
//! Who leads under an epoch was chosen by what nodes had when they accepted it. A node that has accepted one therefore
//! says nothing more to a leader of an older one, on whichever of its streams: what such a leader is told then could be
//! missing in the new leader's log. The fence is raised before the epoch is written down, and each stream looks at it
//! before it sends anything; then streams under older epochs end, and begin anew with whoever leads now. A request to
//! follow counts at its leader like an acknowledgement: none is made under an older epoch than the fence's, so where
//! that is not written down yet, it is first.
//!
//! An acknowledgement that is on its way while the fence is raised is of what the log had before: whoever looks at the
//! log after the epoch was accepted finds it there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, RefusalCode, Result};
use crate::shutdown::ShutdownSignal;
use crate::types::Epoch;

/// What a follower has accepted. Raised by whoever accepts an epoch; a stream of each shard stands here.
pub(crate) struct EpochFence {
    accepted: AtomicU64,
    streams: Mutex<Vec<Arc<Standing>>>,
}

struct Standing {
    /// Of the leader, or newer if that goes on under a newer one. Raised by the stream's receiver.
    epoch: AtomicU64,
    over: ShutdownSignal,
}

/// A stream, for as long as it may speak.
pub(crate) struct StreamUnder {
    fence: Arc<EpochFence>,
    standing: Arc<Standing>,
}

impl EpochFence {
    pub(crate) fn new(accepted: Epoch) -> Arc<EpochFence> {
        Arc::new(EpochFence { accepted: AtomicU64::new(accepted.0), streams: Mutex::default() })
    }

    /// The epoch of the fence, written down or not.
    pub(crate) fn accepted(&self) -> Epoch {
        Epoch(self.accepted.load(Ordering::SeqCst))
    }

    /// Has `accept` write an epoch down. From before that on no stream under an older one says anything, and if it
    /// succeeds they end.
    pub(crate) fn accept(&self, epoch: Epoch, accept: impl FnOnce() -> Result<()>) -> Result<()> {
        self.accepted.fetch_max(epoch.0, Ordering::SeqCst);
        accept()?;
        let streams = self.streams.lock();
        let is_older = |stream: &&Arc<Standing>| stream.epoch.load(Ordering::SeqCst) < epoch.0;
        streams.iter().filter(is_older).for_each(|stream| stream.over.shutdown());
        Ok(())
    }

    /// A stream begins under an epoch; `over` ends it.
    pub(crate) fn enter(self: &Arc<Self>, epoch: Epoch, over: &ShutdownSignal) -> StreamUnder {
        let standing = Arc::new(Standing { epoch: AtomicU64::new(epoch.0), over: over.clone() });
        self.streams.lock().push(Arc::clone(&standing));
        StreamUnder { fence: Arc::clone(self), standing }
    }
}

impl StreamUnder {
    /// The leader goes on under a newer epoch.
    pub(crate) fn goes_on_under(&self, epoch: Epoch) {
        self.standing.epoch.fetch_max(epoch.0, Ordering::SeqCst);
    }

    /// The epoch that it stands under.
    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.standing.epoch.load(Ordering::SeqCst))
    }

    /// Whether anything may still be said.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], which another stream can mend, if a newer epoch has been accepted.
    #[inline]
    pub(crate) fn check(&self) -> Result<()> {
        let (own, accepted) = (self.epoch(), self.fence.accepted());
        if own >= accepted { Ok(()) } else { Err(self.refusal(own, accepted)) }
    }

    #[cold]
    fn refusal(&self, own: Epoch, accepted: Epoch) -> Error {
        Error::Refused {
            peer: "this node".to_owned(),
            code: RefusalCode::StaleEpoch,
            reason: format!("the stream's leader leads under epoch {own}, and {accepted} has been accepted since"),
        }
    }
}

impl Drop for StreamUnder {
    fn drop(&mut self) {
        self.fence.streams.lock().retain(|standing| !Arc::ptr_eq(standing, &self.standing));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_under_older_epochs_say_nothing_more_and_end() {
        let fence = EpochFence::new(Epoch(1));
        let overs = [1, 1, 2].map(|epoch| (Epoch(epoch), ShutdownSignal::new()));
        let [old, moving, new] = overs.each_ref().map(|(epoch, over)| fence.enter(*epoch, over));
        assert!(old.check().is_ok() && moving.check().is_ok() && new.check().is_ok());
        moving.goes_on_under(Epoch(2));
        let mut was_silent = false;
        let accepted = fence.accept(Epoch(2), || {
            was_silent = old.check().is_err();
            Ok(())
        });
        assert!(accepted.is_ok() && was_silent, "before it is written down");
        assert!(moving.check().is_ok() && new.check().is_ok());
        assert_eq!(overs.each_ref().map(|(_, over)| over.is_shutdown()), [true, false, false]);
        let Err(error) = old.check() else { panic!("it may speak") };
        assert!(!error.is_permanent() && error.to_string().contains("2 has been accepted"), "{error}");
        assert!(fence.enter(Epoch(1), &ShutdownSignal::new()).check().is_err(), "nor one that comes late");
        // An older one changes nothing; one that cannot be written down silences all the same, and ends nothing.
        fence.accept(Epoch(1), || Ok(())).unwrap();
        assert!(new.check().is_ok());
        assert!(fence.accept(Epoch(3), || Err(Error::ShutDown)).is_err());
        assert!(new.check().is_err() && !overs[2].1.is_shutdown());
        drop((old, moving, new));
        assert!(fence.streams.lock().is_empty());
    }
}
