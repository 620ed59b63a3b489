//! What is known of a log's syncs when it is opened, and whose word counts.
//!
//! Every batch says what its *writer* had on stable storage when it wrote the batch. On the writer's disk that tells a
//! torn tail from damage. Anywhere else it says nothing: a follower takes the leader's bytes as they are, and those may
//! be on its disk before what they say was synced is. After a power cut such a follower has a sound log in which
//! records are missing up to a place that a later batch calls synced; and damage there is not to be told from that.
//!
//! So the word of a batch counts only where this node itself wrote the batch. That is known by its epoch, since one
//! node alone writes under an epoch and the manifest says whether the present one is the node's own. For all other
//! batches only the node's checkpoint counts, which is written behind the syncs here.

use crate::data_dir::Manifest;
use crate::types::{Epoch, Lsn};

/// Which batches of a log this node itself wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WrittenHere {
    /// All of them: the log was never a follower's.
    #[default]
    Everything,
    /// Those of this epoch.
    Epoch(Epoch),
    /// None, or it is not known which.
    Nothing,
}

impl WrittenHere {
    /// What the node with this manifest wrote.
    #[must_use]
    pub fn by(manifest: &Manifest) -> WrittenHere {
        if manifest.own_epoch { WrittenHere::Epoch(manifest.epoch) } else { WrittenHere::Nothing }
    }

    const fn includes(self, epoch: Epoch) -> bool {
        match self {
            WrittenHere::Everything => true,
            WrittenHere::Epoch(own) => own.0 == epoch.0,
            WrittenHere::Nothing => false,
        }
    }
}

/// What is known to be on stable storage of a log, beside what is found in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownSynced {
    /// Up to this LSN it was synced, as a checkpoint says; [`Lsn::ZERO`] if nothing does.
    pub lsn: Lsn,
    /// Whose batches tell more.
    pub written_here: WrittenHere,
}

impl KnownSynced {
    /// Takes the word of a batch of this epoch, if it counts.
    pub(crate) fn note(&mut self, epoch: Epoch, synced: Lsn) {
        if self.written_here.includes(epoch) {
            self.lsn = self.lsn.max(synced);
        }
    }
}

impl From<Lsn> for KnownSynced {
    /// For a log that was never a follower's.
    fn from(lsn: Lsn) -> KnownSynced {
        KnownSynced { lsn, ..KnownSynced::default() }
    }
}
