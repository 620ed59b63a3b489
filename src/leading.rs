//! The mark of a node that leads: a small file, `leading`, in the data directory from its start to its stop in order.
//!
//! A leader ships what is in its log, on its disk or not. Where the power goes, or the system stops, before a record is
//! synced, the leader's log has lost it, and followers may have it; they may have acknowledged it as durable, and it
//! may have been told to be committed. If the leader then went on under its epoch, it would give the same LSNs to other
//! records. Two logs would have different records of one epoch, for which there is no rule but to refuse one of them,
//! and what was acknowledged might be in the one that is refused. Under a newer epoch there is one: whoever decides who
//! leads has compared the logs, and what the leader has not is cut from the others.
//!
//! So a node with this mark is refused its old epoch, if the system has stopped meanwhile and there is anybody who
//! followed it. A process that is killed loses nothing that it wrote. Whether the system has stopped is told by the id
//! that Linux gives each of its boots; elsewhere it is taken to have stopped.
//!
//! # Format, version 1
//!
//! 38 bytes, little-endian.
//!
//! | offset | size | field | meaning |
//! |---:|---:|---|---|
//! | 0 | 8 | `magic` | the bytes `TOWLLED` and a zero |
//! | 8 | 2 | `version` | 1 |
//! | 10 | 8 | `epoch` | the epoch that the node leads under |
//! | 18 | 16 | `boot` | the id of the system's boot; 0 where it has none |
//! | 34 | 4 | `crc` | CRC-32 (IEEE) of everything before it |
//!
//! It is valid exactly if its length, magic, CRC and version are right. One that is not valid is an error and never
//! taken for none.

use std::path::Path;

use crate::atomic_file;
use crate::data_dir::DataDir;
use crate::error::{Error, Result};
use crate::small_file::{forget, load, seal, unseal};
use crate::types::Epoch;

const MAGIC: [u8; 8] = *b"TOWLLED\0";
const VERSION: u16 = 1;
/// Bytes of the fields behind the version.
const LEN: usize = 24;

/// The mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leading {
    epoch: Epoch,
    boot: u128,
}

/// Refuses the present epoch, given or not, to a node that led under it when the system stopped, if there are
/// followers: they may have what its log has lost.
///
/// # Errors
///
/// [`Error::Mismatch`]; [`Error::Corrupt`] for a mark that is damaged; [`Error::Io`].
pub(crate) fn check(directory: &DataDir, epoch: Option<Epoch>, has_followers: bool) -> Result<()> {
    check_at_boot(directory, epoch, has_followers, boot_id())
}

fn check_at_boot(directory: &DataDir, epoch: Option<Epoch>, has_followers: bool, boot: u128) -> Result<()> {
    let path = directory.leading_path();
    let Some(mark) = load(&path, decode)? else { return Ok(()) };
    let is_same = epoch.is_none_or(|epoch| epoch == mark.epoch) && directory.manifest().epoch == mark.epoch;
    let has_stopped = boot != mark.boot || boot == 0;
    if !(is_same && has_stopped && has_followers) {
        return Ok(());
    }
    let (epoch, next) = (mark.epoch, mark.epoch.next());
    let reason = format!(
        "the node led under epoch {epoch} when the system stopped, so followers may have records that its log has lost; \
         have one that is behind no other lead, or, if that is this one, give it an epoch that nobody has led under, \
         {next} at least (--epoch {next})"
    );
    Err(Error::Mismatch { path, reason: reason.into() })
}

/// The node is about to lead. Durable on return.
///
/// # Errors
///
/// [`Error::Io`].
pub(crate) fn begin(directory: &DataDir) -> Result<()> {
    let mark = Leading { epoch: directory.manifest().epoch, boot: boot_id() };
    atomic_file::replace(&directory.leading_path(), &mark.encode())
}

/// It has stopped, and all of its logs are on stable storage.
///
/// # Errors
///
/// [`Error::Io`].
pub(crate) fn end(directory: &DataDir) -> Result<()> {
    forget(&directory.leading_path())
}

impl Leading {
    fn encode(self) -> Vec<u8> {
        seal(MAGIC, VERSION, &[&self.epoch.0.to_le_bytes(), &self.boot.to_le_bytes()])
    }
}

fn decode(bytes: &[u8]) -> Result<Leading, String> {
    let (version, mut fields) = unseal::<LEN>(MAGIC, bytes)?;
    if version != VERSION {
        return Err(format!("version {version}, where version {VERSION} is due"));
    }
    Ok(Leading { epoch: Epoch(fields.u64()), boot: fields.u128() })
}

/// The id of the system's present boot; 0 where it does not tell.
fn boot_id() -> u128 {
    if !cfg!(target_os = "linux") {
        return 0;
    }
    let told = std::fs::read_to_string(Path::new("/proc/sys/kernel/random/boot_id")).unwrap_or_default();
    let digits: String = told.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::commit::{AckLevel, Commit, Outcome};
    use crate::data_dir::Manifest;
    use crate::leader::Leader;
    use crate::node::Node;
    use crate::small_file::tests::assert_damage_is_found;
    use crate::target::LogOnly;
    use crate::transport::{InProcessTransport, Transport};
    use crate::types::{ClusterId, Lsn, NodeId, RegionId, ShardId};
    use crate::wal::LogWriter;

    /// These bytes are on disks: they decode for ever.
    #[test]
    fn golden_bytes() {
        let mark = Leading { epoch: Epoch(5), boot: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10 };
        let bytes = mark.encode();
        let hex = bytes[..34].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex, "544f574c4c45440001000500000000000000100f0e0d0c0b0a090807060504030201");
        assert_eq!(decode(&bytes), Ok(mark));
        assert_damage_is_found(&bytes, decode);
    }

    #[test]
    fn the_system_tells_of_its_boot() {
        assert_eq!(boot_id(), boot_id());
        assert_eq!(boot_id() != 0, Path::new("/proc/sys/kernel/random/boot_id").exists());
    }

    /// What breaks: the power of a leader goes. What would be lost: what followers have acknowledged and its log has
    /// not, if it gave the same LSNs to other records.
    #[test]
    fn the_old_epoch_is_refused_after_the_system_has_stopped_and_somebody_has_followed() {
        let parent = tempfile::tempdir().unwrap();
        let manifest = Manifest {
            cluster: ClusterId(1),
            node: NodeId(2),
            region: RegionId(0),
            shard_count: 1,
            segment_size: 1 << 20,
            epoch: Epoch(3),
            own_epoch: true,
        };
        let directory = DataDir::create(&parent.path().join("node"), manifest).unwrap();
        let refused = |epoch: Option<u64>, has_followers, boot| {
            let result = check_at_boot(&directory, epoch.map(Epoch), has_followers, boot);
            result.inspect_err(|error| {
                assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains("--epoch 4"), "{error}");
            })
        };
        assert!(refused(None, true, 0).is_ok(), "it never led, or stopped in order");
        begin(&directory).unwrap();
        for epoch in [None, Some(3)] {
            assert!(refused(epoch, true, boot_id() ^ 1).is_err());
            assert_eq!(refused(epoch, true, boot_id()).is_ok(), boot_id() != 0, "it was killed");
            assert!(refused(epoch, true, 0).is_err(), "nobody knows");
            assert!(refused(epoch, false, boot_id() ^ 1).is_ok(), "nobody can have more");
        }
        assert!(refused(Some(4), true, boot_id() ^ 1).is_ok(), "under a newer epoch the others are cut");
        end(&directory).unwrap();
        assert!(refused(None, true, boot_id() ^ 1).is_ok());
        std::fs::write(directory.leading_path(), b"damaged").unwrap();
        assert!(check(&directory, None, false).unwrap_err().is_corruption());
    }
    #[test]
    fn a_leader_has_the_mark_until_it_stops_in_order() {
        let parent = tempfile::tempdir().unwrap();
        let at = |name: &str| parent.path().join(name);
        let transport: Arc<dyn Transport> = Arc::new(InProcessTransport::new());
        let node = |name| Node::builder(at(name)).segment_size(1 << 20).transport(Arc::clone(&transport));
        let leader = node("leader").lead("leader").unwrap();
        let follower = node("follower").follow("leader", Arc::new(LogOnly)).unwrap();
        let mut writer = leader.writer(ShardId(0)).unwrap();
        let received = Commit::followers(AckLevel::Received, 1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let append = |leader: &Leader, writer: &mut LogWriter, lsn| {
            let committed = leader.append_and_wait(writer, &[b"a record"], received, Some(deadline)).unwrap();
            assert_eq!(committed, (Lsn(lsn), Outcome::Committed));
        };
        append(&leader, &mut writer, 1);
        // As the disk may be when the power goes, with nothing of the log that comes later.
        let (image, log) = (at("image"), "shard-0000");
        std::fs::create_dir_all(image.join(log)).unwrap();
        let segment = writer.log().segments()[0].path().file_name().unwrap().to_owned();
        for name in
            ["MANIFEST".as_ref(), "followers".as_ref(), "leading".as_ref(), Path::new(log).join(segment).as_path()]
        {
            std::fs::copy(at("leader").join(name), image.join(name)).unwrap();
        }
        append(&leader, &mut writer, 2);
        drop(writer);
        follower.shutdown().unwrap();
        leader.shutdown().unwrap();
        assert!(!at("leader").join("leading").exists());
        node("leader").lead("again").unwrap().shutdown().unwrap();

        let of_another_boot = Leading { epoch: Epoch(1), boot: boot_id() ^ 1 };
        std::fs::write(image.join("leading"), of_another_boot.encode()).unwrap();
        let refused = node("image").lead("image").unwrap_err().to_string();
        assert!(refused.contains("when the system stopped") && refused.contains("--epoch 2"), "{refused}");
        let leader = node("image").epoch(Epoch(2)).lead("image").unwrap();
        // The follower has more, of an older epoch, and it is cut.
        let follower = node("follower").follow("image", Arc::new(LogOnly)).unwrap();
        append(&leader, &mut leader.writer(ShardId(0)).unwrap(), 2);
        follower.shutdown().unwrap();
    }
}
