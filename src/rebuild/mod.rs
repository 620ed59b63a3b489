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
//! | after the mark | a target that serves nothing, and some log | it says `base_incomplete`: another rebuild, to at least where this one was to come (`owed.rs`) |
//! | after it was saved how far the base has come | the same, and blocks that can be kept | the rebuild goes on |
//! | after completion, before it was accepted | a whole target and a whole log | catch-up |
//!
//! The checkpoint forgets the shard before the old log is removed, so recovery never looks for records that went with
//! it.
//!
//! # Going on with an interrupted rebuild
//!
//! While the base comes, the follower makes everything durable now and then, and then notes (`interrupted.rs`): blocks
//! below *n* are here, with the log up to LSN *a* in them, under epoch *e*. When a stream was lost or a side has
//! crashed, the next session goes on from there:
//!
//! ```text
//! follower                                                     leader
//!    │ SyncRequest (base_incomplete, rebuild_kept, end of log) ▶ │  is it a beginning of this log?
//!    │ ◀── ShardInfo (start = the LSN after that)                │
//!    │ ◀── SessionControl Start (base_lsn, log_start = start)    │  base opened anew, log held from start on
//!    │ keep blocks below n, apply the local log: marks blocks    │  log lane, and no block yet
//!    │ SessionAck accepted (blocks = n) ───────────────────────▶ │
//!    │ ◀── BaseData from block n on …                            │
//! ```
//!
//! The log is applied again from the lower one of *a* and the new base LSN, before the first block comes. Then
//!
//! - blocks below *n* stand at *a* or later, and everything after *a* is in the local log or in the log lane;
//! - blocks from *n* on stand at the new base LSN or later, and so is everything after that;
//! - the bitmap covers each block that a record of the local log has touched, as if it had just come.
//!
//! So it is only done where the local log reaches back to both and the leader still has what follows it, with the same
//! chain; where the target can do it ([`resume_base`](crate::target::ReplicationTarget::resume_base)); and under the
//! same epoch, since blocks may be newer than the local log, and only that term is known to have their records.
//! Otherwise the rebuild begins anew, and the log output says why.

pub(crate) mod base_lane;
pub mod bitmap;
pub(crate) mod intake;
pub(crate) mod interrupted;
pub(crate) mod owed;
pub(crate) mod places;
pub mod session;

pub use bitmap::BlockBitmap;
pub use session::{RebuildContract, RebuildPhase, RebuildProgress, RebuildSession};
