//! Messages about sessions and the base lane. See [`message`](super::message) for how the tables are meant.

use crate::types::{Epoch, Lsn, SessionId};
use crate::wire::codec::{choice, message};

choice! {
    /// What a session is for.
    pub enum SessionKind as "session kind" {
        /// No session: the stream carries no recovery.
        None = 0,
        /// Live shipping to a follower that has everything.
        KeepUp = 1,
        /// Replay of the retained log.
        CatchUp = 2,
        /// A base image, and the log beside it.
        Rebuild = 3,
    }
}

choice! {
    /// What the leader says about a session.
    pub enum SessionAction as "session action" {
        /// The session begins, under the terms in the message.
        Start = 1,
        /// The session is over, whatever its state.
        Cancel = 2,
        /// The leader has seen the achieved LSN and agrees: the follower counts from now on.
        Accept = 3,
        /// The session begins later: others are being served.
        Wait = 4,
    }
}

choice! {
    /// How far the follower has come with a session.
    pub enum SessionPhase as "session phase" {
        /// It has taken the session on and made that durable where it must be.
        Accepted = 1,
        /// It is receiving.
        Running = 2,
        /// It has every block of the base.
        BaseComplete = 3,
        /// It has reached the target, and everything up to `achieved` is synced.
        Completed = 4,
        /// It has given up; `reason` says why.
        Failed = 5,
        /// It has the base and the log up to the target, and is putting them on stable storage. Since version 2.
        MakingDurable = 6,
    }
}

choice! {
    /// Why a session failed.
    pub enum SessionFailure as "failure reason" {
        /// It did not fail.
        None = 0,
        /// The other side acts under another epoch.
        EpochMismatch = 1,
        /// The stream broke.
        TransportLost = 2,
        /// Nothing moved for longer than the stall budget.
        ProgressStalled = 3,
        /// The session took longer than it may.
        DeadlineExceeded = 4,
        /// The log that the session needs is no longer held.
        PinLost = 5,
        /// There is no base that can be sent or taken.
        BaseUnavailable = 6,
        /// The follower's own log is damaged.
        LocalWalCorrupt = 7,
        /// The follower's own base is damaged.
        LocalBaseCorrupt = 8,
        /// A newer session took over.
        Superseded = 9,
        /// The leader called it off.
        Cancelled = 10,
    }
}

message! {
    /// The leader's word about a session.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `session` |
    /// | 8 | 8 | `epoch` |
    /// | 16 | 1 | `action`, see [`SessionAction`] |
    /// | 17 | 1 | `kind`, see [`SessionKind`] |
    /// | 18 | 8 | `base_lsn` |
    /// | 26 | 8 | `target` |
    /// | 34 | 8 | `log_start` |
    /// | 42 | 4 | `block_len` |
    /// | 46 | 8 | `block_count` |
    pub struct SessionControl in SessionControl {
        /// Which session.
        pub session: SessionId,
        /// The leader's term.
        pub epoch: Epoch,
        /// What happens to it.
        pub action: SessionAction,
        /// What the session is for.
        pub kind: SessionKind,
        /// With [`SessionKind::Rebuild`], the LSN at or above which the base stands; else 0.
        pub base_lsn: Lsn,
        /// The LSN that the session must reach, fixed when it was issued.
        pub target: Lsn,
        /// When a rebuild starts, the first LSN of the log lane; else 0. It is
        /// [`ShardInfo::start`](super::ShardInfo::start) where the log goes on with that of an interrupted rebuild;
        /// else the lane begins with that segment, at most one past `base_lsn`.
        pub log_start: Lsn,
        /// When a rebuild starts, bytes of each block of the base, or 0 if they have no numbers; else 0.
        pub block_len: u32,
        /// When a rebuild starts, blocks of the base; else 0.
        pub block_count: u64,
    }
}

message! {
    /// The follower's word about a session.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `session` |
    /// | 8 | 8 | `epoch` |
    /// | 16 | 1 | `phase`, see [`SessionPhase`] |
    /// | 17 | 8 | `achieved` |
    /// | 25 | 1 | `reason`, see [`SessionFailure`] |
    /// | 26 | 8 | `blocks` |
    pub struct SessionAck in SessionAck {
        /// Which session.
        pub session: SessionId,
        /// The term under which it was issued.
        pub epoch: Epoch,
        /// How far it has come.
        pub phase: SessionPhase,
        /// The LSN reached so far.
        pub achieved: Lsn,
        /// Why it failed; [`SessionFailure::None`] in every other phase.
        pub reason: SessionFailure,
        /// When a rebuild is accepted that goes on with an interrupted one, the first block that is still wanted; else
        /// 0.
        pub blocks: u64,
    }
}

message! {
    /// The prefix of a `BaseData` body. The bytes of consecutive blocks follow, as many as `length` says and the frame
    /// has left; where blocks have no numbers, those of one chunk.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `session` |
    /// | 8 | 8 | `epoch` |
    /// | 16 | 8 | `block` |
    /// | 24 | 4 | `length` |
    /// | 28 | 4 | `checksum` |
    pub struct BaseDataHeader in BaseData {
        /// The session that the base belongs to.
        pub session: SessionId,
        /// The term under which it was issued.
        pub epoch: Epoch,
        /// The number of the first block, or of the chunk.
        pub block: u64,
        /// Bytes of all blocks in the frame.
        pub length: u32,
        /// CRC-32 (IEEE) of these bytes.
        pub checksum: u32,
    }
}

message! {
    /// Every block of the base has been sent.
    ///
    /// | offset | size | field |
    /// |---:|---:|---|
    /// | 0 | 8 | `session` |
    /// | 8 | 8 | `epoch` |
    /// | 16 | 8 | `base_lsn` |
    /// | 24 | 8 | `blocks` |
    /// | 32 | 4 | `checksum` |
    pub struct BaseComplete in BaseComplete {
        /// The session that the base belongs to.
        pub session: SessionId,
        /// The term under which it was issued.
        pub epoch: Epoch,
        /// The LSN at or above which every block stands.
        pub base_lsn: Lsn,
        /// How many blocks, or chunks, were sent.
        pub blocks: u64,
        /// CRC-32 (IEEE) of the bytes of all blocks, in the order in which they were sent.
        pub checksum: u32,
    }
}
