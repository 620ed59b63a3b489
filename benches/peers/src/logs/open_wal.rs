//! open-wal 0.2: one writer that gathers in memory and commits with one write and one sync. Nothing reaches the file
//! without that, so there is no append without a sync; threads share it behind a lock.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use open_wal::{Lsn, NullObserver, Wal, WalConfig};

use super::Peer;
use crate::{Result, load};

pub(super) const PEER: Peer = Peer {
    name: "open-wal",
    append: None,
    sync: Some(|directory, record, count| {
        let mut log = open(directory)?;
        load::latencies(count, || {
            log.append(record)?;
            log.commit()?;
            Ok(())
        })
    }),
    group: Some(|directory, record, threads, each| {
        let log = Mutex::new(open(directory)?);
        let lock = || log.lock().unwrap_or_else(PoisonError::into_inner);
        load::threads(threads, each, |_| {
            let mine = lock().append(record)?;
            // Whoever comes first commits for all that have appended by then.
            let mut log = lock();
            if log.durable_lsn() < mine {
                log.commit()?;
            }
            Ok(())
        })
    }),
    recover: Some((
        |directory, record, count| {
            let mut log = open(directory)?;
            for number in 1..=count {
                log.append(record)?;
                if number % 256 == 0 {
                    log.commit()?;
                }
            }
            log.commit()?;
            Ok(())
        },
        |directory, _| {
            let log = open(directory)?;
            let mut reader = log.reader_from(Lsn(1))?;
            let mut found = 0;
            while let Some(record) = reader.next() {
                record?;
                found += 1;
            }
            Ok(found)
        },
    )),
};

fn open(directory: &Path) -> Result<Wal<NullObserver>> {
    let place = directory.join("log");
    std::fs::create_dir_all(&place)?;
    Ok(Wal::open(&place, WalConfig::default())?.0)
}
