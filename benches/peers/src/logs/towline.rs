//! Towline's own log, with default settings.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use towline::wal::{LogIdentity, LogWriter, Wal, WalOptions};
use towline::{ClusterId, Epoch, Lsn, RegionId, ShardId};

use super::Peer;
use crate::contest::OURS;
use crate::{Result, load};

const SEGMENT_SIZE: u64 = 64 << 20;

pub(super) const PEER: Peer = Peer {
    name: OURS,
    append: Some(|directory, record, count| {
        let (wal, mut writer) = open(directory, Lsn::ZERO)?;
        wal.log().wait_for_spares(None)?;
        load::rate(count, || (0..count).try_for_each(|_| Ok(writer.append(record).map(drop)?)))
    }),
    sync: Some(|directory, record, count| {
        let (wal, mut writer) = open(directory, Lsn::ZERO)?;
        wal.log().wait_synced(writer.append(record)?, None)?;
        wal.log().wait_for_spares(None)?;
        load::latencies(count, || Ok(wal.log().wait_synced(writer.append(record)?, None)?))
    }),
    group: Some(|directory, record, threads, each| {
        let (wal, mut writer) = open(directory, Lsn::ZERO)?;
        wal.log().wait_synced(writer.append(record)?, None)?;
        wal.log().wait_for_spares(None)?;
        let writer = Mutex::new(writer);
        load::threads(threads, each, |_| {
            let lsn = writer.lock().unwrap_or_else(PoisonError::into_inner).append(record)?;
            Ok(wal.log().wait_synced(lsn, None)?)
        })
    }),
    recover: Some((
        |directory, record, count| {
            let (wal, mut writer) = open(directory, Lsn::ZERO)?;
            for _ in 0..count {
                writer.append(record)?;
            }
            std::fs::write(directory.join("head"), wal.log().head().get().to_le_bytes())?;
            drop(writer);
            Ok(wal.close()?)
        },
        |directory, _| {
            // What a node's checkpoint says after a clean stop.
            let head = std::fs::read(directory.join("head"))?;
            let head = Lsn(u64::from_le_bytes(head.try_into().map_err(|_| "not a number")?));
            let (wal, _writer) = open(directory, head)?;
            Ok(wal.log().head().get())
        },
    )),
};

fn open(directory: &Path, known_synced: Lsn) -> Result<(Wal, LogWriter)> {
    let identity =
        LogIdentity { cluster: ClusterId(1), region: RegionId(0), shard: ShardId(0), segment_size: SEGMENT_SIZE };
    let options = WalOptions { known_synced: known_synced.into(), ..WalOptions::default() };
    let place = directory.join("log");
    std::fs::create_dir_all(&place)?;
    let (wal, mut writer) = Wal::open(&place, identity, options)?;
    writer.set_epoch(Epoch::FIRST)?;
    Ok((wal, writer))
}
