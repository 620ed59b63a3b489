//! Bringing a follower back whose log cannot help it any more: a base image and the log after it, at the same time.
//!
//! ```text
//! follower                                                   leader
//!    │ SyncRequest (its next record is gone, or base_incomplete) ▶ │
//!    │ ◀── ShardInfo (kind rebuild, session, target = head)        │
//!    │ ◀── SessionControl Wait, Heartbeat …                        │  while as many others are served as allowed
//!    │ ◀── SessionControl Start (base_lsn, blocks, log_start)      │  base opened, log held from there on
//!    │ mark, empty log at log_start                                │
//!    │ SessionAck accepted ──────────────────────────────────────▶ │
//!    │ ◀── WalData from log_start on, whatever is published        │  before each run of blocks
//!    │ ◀── BaseData, BaseData … BaseComplete                       │
//!    │ SessionAck completed (achieved) ──────────────────────────▶ │
//!    │ ◀── SessionControl Accept                                   │  counts for commit from here on
//!    │ ◀── WalData …                                               │  the stream goes on as any other
//! ```
//!
//! # Where the log lane begins
//!
//! At the beginning of the segment that holds `base_lsn + 1`, or of the newest segment if no record came after
//! `base_lsn`. The follower's log is then byte for byte the leader's, header pages included, from a segment boundary
//! on, without the leader having to seal a segment for it: a segment is only sealed together with opening the next, by
//! the one writer, and a leader to which nobody appends would keep its follower waiting. The records from there to
//! `base_lsn` come once more, and applying them is a no-op.
//!
//! # What a crash leaves
//!
//! | the crash is | the follower has | at its next start |
//! |---|---|---|
//! | before the target's mark | its old state and log | the leader decides as before |
//! | after the mark | a target that serves nothing, and some log | it says `base_incomplete`: another rebuild |
//! | after completion, before it was accepted | a whole target and a whole log | catch-up |
//!
//! Another rebuild begins from scratch: nothing of an interrupted one is relied on, so there are no marks of blocks to
//! be restored. The checkpoint forgets the shard before the old log is removed, so recovery never looks for records
//! that went with it.

pub(crate) mod base_lane;
pub mod bitmap;
pub(crate) mod intake;
pub(crate) mod interrupted;
pub(crate) mod places;
pub mod session;

pub use bitmap::BlockBitmap;
pub use session::{RebuildContract, RebuildPhase, RebuildProgress, RebuildSession};
