//! What can go wrong, kept apart by whose fault it is: the disk is damaged, I/O failed, the peer misbehaved, the peer
//! refused, the target failed, the caller is wrong, the node is stopping.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::types::{Chain, Epoch, Lsn, ShardId};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done. Every variant but `ShutDown` names the thing it is about, and prints as one plain
/// sentence. What one failure ends can be told to everybody who asks: clones share what the operating system, or a
/// target, said.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A file system operation failed.
    Io {
        /// What was being done, as in "write".
        action: &'static str,
        /// To which file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// A network operation failed, or the peer went away.
    Network {
        /// What was being done, as in "connect to".
        action: &'static str,
        /// The peer's address or name.
        peer: String,
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// Data on disk is damaged. Nothing was changed.
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// Where in the file the damage begins, in bytes.
        offset: u64,
        /// The first LSN that cannot be read because of it, where that is known.
        lsn: Option<Lsn>,
        /// What was found.
        reason: Cow<'static, str>,
    },
    /// The peer sent something that the protocol does not allow. The stream is closed.
    Protocol {
        /// The peer's address or name.
        peer: String,
        /// What it sent.
        reason: Cow<'static, str>,
    },
    /// The peer answered with a refusal.
    Refused {
        /// The peer's address or name.
        peer: String,
        /// Why, as a code that programs can read.
        code: RefusalCode,
        /// Why, as a sentence that says what to do.
        reason: String,
    },
    /// The directory is in use: by another process, or by something of this one that has not been dropped yet, such as
    /// a [`LogWriter`](crate::wal::LogWriter) that outlives its [`Leader`](crate::Leader).
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The data directory is not what the caller takes it for: other shard count, other cluster, other version.
    Mismatch {
        /// The file that says so.
        path: PathBuf,
        /// What differs, and what to do.
        reason: Cow<'static, str>,
    },
    /// A record cannot fit in a segment.
    RecordTooLarge {
        /// Its length in bytes.
        len: u64,
        /// The largest length that fits, in bytes.
        max: u64,
    },
    /// A shard's target failed: it took no more records, or did not sync. Made by [`Error::target`].
    Target {
        /// The shard.
        shard: ShardId,
        /// What the target said.
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// Code that this crate calls and others wrote panicked on a thread of this crate: a target, a transport.
    Panicked {
        /// Whose code, as in "the target of shard 3".
        whose: String,
        /// What it panicked with.
        message: String,
    },
    /// The caller asked for something that has no meaning.
    Invalid {
        /// What, and what would be right.
        reason: Cow<'static, str>,
    },
    /// An LSN is no longer (or not yet) in the log.
    NotRetained {
        /// The shard.
        shard: ShardId,
        /// The LSN asked for.
        lsn: Lsn,
        /// The oldest LSN that the log still holds.
        tail: Lsn,
        /// The newest LSN of the log.
        head: Lsn,
    },
    /// An earlier failure, usually to sync, made the shard read-only: what it holds may not be on stable storage.
    Poisoned {
        /// The shard.
        shard: ShardId,
        /// The failure.
        reason: String,
    },
    /// An epoch is over: a peer's, one that was asked for, or the one that this node led under before it was deposed.
    StaleEpoch {
        /// The epoch that is over.
        offered: Epoch,
        /// The newer or present one, accepted or led under.
        accepted: Epoch,
    },
    /// The peer's log has another history than this node's: nothing that it says of its log counts any more.
    ChainMismatch {
        /// The peer's address or name.
        peer: String,
        /// The shard.
        shard: ShardId,
        /// Where the chains were compared.
        lsn: Lsn,
        /// The chain there by this node's log; `None` if no batch of it ends there.
        own: Option<Chain>,
        /// The chain there by the peer's word.
        theirs: Chain,
    },
    /// Nothing arrived within the time allowed.
    TimedOut {
        /// What was waited for.
        what: Cow<'static, str>,
    },
    /// The node, log or stream is shutting down.
    ShutDown,
}

/// Why a peer refused, in a number that is stable on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u16)]
pub enum RefusalCode {
    /// The peer speaks no protocol version that this node speaks, or none that goes with what it asks for.
    UnsupportedVersion = 1,
    /// The peer belongs to another cluster.
    WrongCluster = 2,
    /// Shard count, segment size, region or another fixed property differs.
    WrongTopology = 3,
    /// There is no such shard.
    UnknownShard = 4,
    /// The peer's epoch is older than the accepted one.
    StaleEpoch = 5,
    /// The next record that the follower needs is no longer retained.
    NotRetained = 6,
    /// The follower's history differs from the leader's.
    Diverged = 7,
    /// The follower holds records that the leader does not have under the same epoch: the leader lost data.
    LeaderBehind = 8,
    /// The node does not serve this kind of request in its present role.
    WrongRole = 9,
    /// The node has as many connections as it allows.
    TooManyConnections = 10,
    /// The peer broke the protocol.
    ProtocolViolation = 11,
    /// The node is shutting down.
    ShuttingDown = 12,
    /// A newer connection of the same follower took over, or what was agreed on no longer holds: asking again settles
    /// it.
    Superseded = 13,
    /// Something failed on the other side that is not the asker's fault.
    Internal = 14,
    /// Both have a record of the same LSN, and their chains there differ: one of the two logs is wrong.
    ChainMismatch = 15,
    /// The node is a follower that feeds others, and has yet to catch up with its own leader: asking again settles it.
    NotReady = 16,
}

impl RefusalCode {
    /// The code for a number from the wire; `None` for one that this version does not know.
    #[must_use]
    pub const fn from_wire(number: u16) -> Option<RefusalCode> {
        use RefusalCode as C;
        Some(match number {
            1 => C::UnsupportedVersion,
            2 => C::WrongCluster,
            3 => C::WrongTopology,
            4 => C::UnknownShard,
            5 => C::StaleEpoch,
            6 => C::NotRetained,
            7 => C::Diverged,
            8 => C::LeaderBehind,
            9 => C::WrongRole,
            10 => C::TooManyConnections,
            11 => C::ProtocolViolation,
            12 => C::ShuttingDown,
            13 => C::Superseded,
            14 => C::Internal,
            15 => C::ChainMismatch,
            16 => C::NotReady,
            _ => return None,
        })
    }

    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u16 {
        self as u16
    }

    /// Whether asking again without changing anything can never succeed.
    #[must_use]
    pub const fn is_permanent(self) -> bool {
        use RefusalCode as C;
        matches!(
            self,
            C::UnsupportedVersion
                | C::WrongCluster
                | C::WrongTopology
                | C::UnknownShard
                | C::NotRetained
                | C::Diverged
                | C::LeaderBehind
                | C::WrongRole
                | C::ChainMismatch
        )
    }
}

impl Error {
    /// What a [`ReplicationTarget`](crate::target::ReplicationTarget) says of its own failure, be it an error of the
    /// storage engine behind it or a sentence.
    ///
    /// ```
    /// use towline::{Error, ShardId};
    ///
    /// let error = Error::target(ShardId(3), "the index is full");
    /// assert_eq!(error.to_string(), "the target of shard 3 failed: the index is full");
    /// let error = Error::target(ShardId(3), std::fmt::Error);
    /// assert!(std::error::Error::source(&error).unwrap().is::<std::fmt::Error>());
    /// ```
    #[must_use]
    pub fn target(shard: ShardId, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Target { shard, source: Arc::from(source.into()) }
    }

    /// For `map_err`: whatever a target said, with the shard that it said it of.
    pub(crate) fn of_target(shard: ShardId) -> impl Fn(Error) -> Error {
        move |error| match error {
            Error::Target { .. } | Error::Panicked { .. } | Error::Poisoned { .. } | Error::ShutDown => error,
            other => Error::target(shard, other),
        }
    }

    /// What it is about: where a target said it with an error of this crate, that.
    pub(crate) fn cause(&self) -> &Error {
        match self {
            Error::Target { source, .. } => source.downcast_ref::<Error>().map_or(self, Error::cause),
            other => other,
        }
    }

    /// For `map_err`: a failed file system operation.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { action, path, source: source.into() }
    }

    /// For `map_err`: a failed network operation.
    pub(crate) fn network(action: &'static str, peer: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let peer = peer.into();
        move |source| Error::Network { action, peer, source: source.into() }
    }

    /// The caller asked for something that has no meaning.
    pub(crate) fn invalid(reason: impl Into<Cow<'static, str>>) -> Error {
        Error::Invalid { reason: reason.into() }
    }

    /// Damage on disk.
    pub(crate) fn corrupt(
        path: impl AsRef<Path>,
        offset: u64,
        lsn: Option<Lsn>,
        reason: impl Into<Cow<'static, str>>,
    ) -> Error {
        Error::Corrupt { path: path.as_ref().to_owned(), offset, lsn, reason: reason.into() }
    }

    /// A peer that breaks the protocol.
    pub(crate) fn protocol(peer: impl Into<String>, reason: impl Into<Cow<'static, str>>) -> Error {
        Error::Protocol { peer: peer.into(), reason: reason.into() }
    }

    /// Whether this is damage on disk.
    #[must_use]
    pub fn is_corruption(&self) -> bool {
        matches!(self.cause(), Error::Corrupt { .. })
    }

    /// Whether something took longer than allowed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match self.cause() {
            Error::TimedOut { .. } => true,
            Error::Network { source, .. } => {
                matches!(source.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock)
            }
            _ => false,
        }
    }

    /// Whether the file system is full. Appends go on once there is room.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        matches!(self.cause(), Error::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }

    /// Whether everything is stopping, rather than failing.
    #[must_use]
    pub const fn is_shutdown(&self) -> bool {
        matches!(self, Error::ShutDown)
    }

    /// Whether a name did not resolve: most likely a mistake when it is met for the first time, and most likely a
    /// failure that passes once the peer has been reached.
    #[must_use]
    pub fn is_unresolved(&self) -> bool {
        matches!(self, Error::Network { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether trying again without changing anything can never succeed. What a target says in words of its own is
    /// taken for that: nobody here can tell.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self.cause() {
            Error::Refused { code, .. } => code.is_permanent(),
            Error::Corrupt { .. }
            | Error::Mismatch { .. }
            | Error::Poisoned { .. }
            | Error::Target { .. }
            | Error::Panicked { .. }
            | Error::Invalid { .. }
            | Error::RecordTooLarge { .. }
            | Error::StaleEpoch { .. }
            | Error::ChainMismatch { .. } => true,
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { action, path, source } => write!(f, "cannot {action} {}: {source}", path.display()),
            Error::Network { action, peer, source } => write!(f, "cannot {action} {peer}: {source}"),
            Error::Corrupt { path, offset, lsn, reason } => {
                write!(f, "{} is damaged at offset {offset}", path.display())?;
                if let Some(lsn) = lsn {
                    write!(f, " (LSN {lsn})")?;
                }
                write!(f, ": {reason}")
            }
            Error::Protocol { peer, reason } => write!(f, "{peer} broke the protocol: {reason}"),
            Error::Refused { peer, reason, .. } => write!(f, "{peer} refused: {reason}"),
            Error::InUse { path } => {
                write!(
                    f,
                    "{} is in use, by another process or by a leader, follower, log writer or store of this one; stop it or \
                     choose another directory",
                    path.display()
                )
            }
            Error::Mismatch { path, reason } => write!(f, "{}: {reason}", path.display()),
            Error::RecordTooLarge { len, max } => write!(
                f,
                "a record of {len} bytes does not fit in a segment (at most {max} bytes); split it or use larger segments"
            ),
            Error::Target { shard, source } => write!(f, "the target of shard {shard} failed: {source}"),
            Error::Panicked { whose, message } => write!(f, "{whose} panicked: {message}"),
            Error::Invalid { reason } => f.write_str(reason),
            Error::NotRetained { shard, lsn, tail, head } => {
                write!(f, "LSN {lsn} of shard {shard} is not in the log, which holds LSN {tail} to {head}")
            }
            Error::Poisoned { shard, reason } => {
                write!(f, "shard {shard} is read-only since a failure: {reason}; restart the node once that is mended")
            }
            Error::StaleEpoch { offered, accepted } => {
                write!(f, "epoch {offered} is over: epoch {accepted} has been accepted")
            }
            Error::ChainMismatch { peer, shard, lsn, own, theirs } => {
                write!(
                    f,
                    "the history of shard {shard} is not that of {peer}: at LSN {lsn} the chain there is {:08x}",
                    theirs.0
                )?;
                match own {
                    Some(own) => write!(f, ", here {:08x}", own.0)?,
                    None => f.write_str(", and here no batch ends there")?,
                }
                f.write_str(
                    "; one of the two logs is wrong: verify both, and start the wrong one with an empty directory",
                )
            }
            Error::TimedOut { what } => write!(f, "timed out: {what}"),
            Error::ShutDown => f.write_str("shutting down"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } | Error::Network { source, .. } => Some(source.as_ref()),
            Error::Target { source, .. } => Some(source.as_ref()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_codes_survive_the_wire() {
        let last = RefusalCode::NotReady.to_wire();
        for number in 0..=u16::MAX {
            let code = RefusalCode::from_wire(number);
            assert_eq!(code.map(RefusalCode::to_wire), (1..=last).contains(&number).then_some(number));
        }
    }

    #[test]
    fn sentences_name_their_thing() {
        let error = Error::corrupt("a/b.wal", 4096, Some(Lsn(17)), "checksum differs");
        assert_eq!(error.to_string(), "a/b.wal is damaged at offset 4096 (LSN 17): checksum differs");
        assert!(error.is_corruption() && error.is_permanent());
        let (lsn, shard, own) = (Lsn(41), ShardId(3), Some(Chain(0xaabb_ccdd)));
        let error = Error::ChainMismatch { peer: "node 7".to_owned(), shard, lsn, own, theirs: Chain(1) };
        for words in ["node 7", "shard 3", "LSN 41", "00000001", "aabbccdd"] {
            assert!(error.to_string().contains(words), "{error}");
        }
        assert!(error.is_permanent() && !error.is_corruption());
    }

    #[test]
    fn a_targets_failure_names_the_shard_and_is_judged_by_what_the_target_said() {
        let said = Error::target(ShardId(3), "the index is full");
        assert!(said.is_permanent() && !said.is_corruption() && !said.is_out_of_space());
        let full = || Error::io("write", "a/slots")(io::ErrorKind::StorageFull.into());
        let wrapped = Error::of_target(ShardId(3))(full());
        assert!(wrapped.is_out_of_space() && !wrapped.is_permanent());
        assert_eq!(wrapped.to_string(), format!("the target of shard 3 failed: {}", full()));
        let damaged = Error::of_target(ShardId(3))(Error::corrupt("a/slots", 0, None, "checksum differs"));
        assert!(damaged.is_corruption() && damaged.is_permanent());
        // One that says so already says it once.
        assert_eq!(Error::of_target(ShardId(3))(said.clone()).to_string(), said.to_string());
        let source = std::error::Error::source(&wrapped).and_then(|source| source.downcast_ref::<Error>());
        assert!(matches!(source, Some(Error::Io { .. })));
    }
}
