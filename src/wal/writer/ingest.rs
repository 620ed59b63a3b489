//! The follower's side of a writer: the leader's bytes as they arrive, checked and published.

use std::sync::Arc;

use super::{BULK_ENDS, LogWriter, STAGE_FROM, STAGE_MOST};
use crate::error::{Error, Result};
use crate::limits::{self, SEGMENT_HEADER_LEN};
use crate::types::{Epoch, Lsn, WalSegmentId};
use crate::wal::batch::{self, BatchError, Expected};
use crate::wal::segment::{HEADER_PAGE, SegmentHeader};

impl LogWriter {
    /// Memory for the next bytes of the leader's log, as many as `len` or fewer (never none): they are bytes from
    /// `offset` on of the segment that begins with LSN `segment`. Fill a beginning of it, then say how much with
    /// [`ingest_filled`](Self::ingest_filled). Where a segment begins, this waits for its file.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if these are not the bytes that come next; also what can go wrong with opening a segment.
    pub fn ingest_window(&mut self, segment: Lsn, offset: u64, len: u64) -> Result<&mut [u8]> {
        self.log.check_writable()?;
        // A new stream may begin with the header page of a segment that the old one opened and left without batches.
        let again = offset == 0 && self.ingest_position() == (segment, SEGMENT_HEADER_LEN);
        self.header_due |= self.open.is_none() || again;
        // A header page too tells how much comes: before the segment is opened for it.
        let is_long = self.note_length(len);
        let due = self.ingest_position();
        if (segment, offset) != due {
            return Err(Error::invalid(format!(
                "bytes from {offset} on of the segment that begins with LSN {segment} arrived, where {} of {} are due",
                due.1, due.0
            )));
        }
        if self.open.is_none() && self.reserved.is_none() {
            // Now, and not when the page has been checked: that is done under a lock that acknowledgements need. Behind
            // an empty segment the page is most often that one's again.
            self.log.spares().set_long(false);
            self.reserved = Some(self.log.spares().take()?);
        }
        let Some(open) = self.open.as_mut().filter(|_| !self.header_due) else {
            // The header page arrives beside the segment: what it says must be checked before there is a segment.
            self.header_page.resize(HEADER_PAGE, 0);
            let rest = self.header_page.get_mut(usize::try_from(self.arrived).unwrap_or(usize::MAX)..);
            let rest = rest.ok_or_else(|| Error::invalid("a header page is 4096 bytes"))?;
            let len = rest.len().min(usize::try_from(len).unwrap_or(usize::MAX));
            self.window = len as u64;
            return Ok(&mut rest[..len]);
        };
        let to = open.room().min(self.arrived.saturating_add(len));
        if to == self.arrived {
            return Err(Error::invalid(format!("the segment that begins with LSN {segment} has no room for more")));
        }
        self.window = to - self.arrived;
        if self.arrived == 0 {
            self.is_staged = is_long || !open.takes_stores();
        } else if self.is_staged && self.arrived > STAGE_MOST {
            if !open.takes_stores() {
                open.fill().map_err(Error::io("fill", open.segment().path()))?;
            }
            let staged = self.staging.get(..limits::index(self.arrived)).unwrap_or_default();
            open.unpublished(0..self.arrived).copy_from_slice(staged);
            self.is_staged = false;
            self.in_file = 0;
        }
        if !self.is_staged {
            return Ok(open.unpublished(self.arrived..to));
        }
        if self.staging.len() < limits::index(to) {
            self.staging.resize(limits::index(to), 0);
        }
        Ok(&mut self.staging[limits::index(self.arrived)..limits::index(to)])
    }

    /// Takes note of how much comes at a time: whether this follower is receiving in bulk. Returns whether this much is
    /// to go in through the file.
    fn note_length(&mut self, len: u64) -> bool {
        let is_long = self.stages && len >= STAGE_FROM;
        if is_long && self.short_windows > 0 {
            self.short_windows = 0;
            self.log.spares().set_bulk(true);
        } else if !is_long && self.short_windows < BULK_ENDS {
            self.short_windows += 1;
            self.log.spares().set_bulk(self.short_windows < BULK_ENDS);
        }
        is_long
    }

    /// The segment (by its first LSN) and the offset in it of the next byte to come from the leader.
    #[must_use]
    pub fn ingest_position(&self) -> (Lsn, u64) {
        match &self.open {
            Some(open) if !self.header_due => (open.segment().id().first_lsn, open.end() + self.arrived),
            _ => (self.next_lsn, self.arrived),
        }
    }

    /// Takes in the first `len` bytes of the last [window](Self::ingest_window): every batch that is whole now is
    /// checked against the chain and published. Returns the head after it.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the bytes do not continue this log; nothing of them is kept, and the log stays what it
    /// was. Also what can go wrong with opening a segment.
    pub fn ingest_filled(&mut self, len: u64) -> Result<Lsn> {
        let result = self.ingest_quietly(len);
        self.log.wake_readers();
        result
    }

    /// [`ingest_filled`](Self::ingest_filled), but those who wait for the log to grow are not woken: the caller does
    /// that, with [`Log::wake_readers`](crate::wal::Log::wake_readers).
    pub(crate) fn ingest_quietly(&mut self, len: u64) -> Result<Lsn> {
        if len > self.window {
            return Err(Error::invalid(format!("{len} bytes of a window of {}", self.window)));
        }
        self.window = 0;
        self.arrived += len;
        let result = if self.header_due { self.ingest_header() } else { self.ingest_batches() };
        if result.is_err() {
            self.discard_partial();
        }
        result.map(|()| self.next_lsn.previous())
    }

    /// Forgets the beginning of a batch that will not be completed by the stream it came from, and leaves zeros.
    pub fn discard_partial(&mut self) {
        // Also what was handed out and may have been filled without anybody saying so.
        let arrived = std::mem::take(&mut self.arrived) + std::mem::take(&mut self.window);
        self.header_page.clear();
        let (is_staged, in_file) = (std::mem::take(&mut self.is_staged), std::mem::take(&mut self.in_file));
        if std::mem::take(&mut self.header_due) {
            return;
        }
        let Some(open) = &mut self.open else { return };
        open.clear_unpublished(if is_staged { in_file } else { arrived });
    }

    /// Opens the segment that a complete header page describes.
    fn ingest_header(&mut self) -> Result<()> {
        if self.arrived < SEGMENT_HEADER_LEN {
            return Ok(());
        }
        let identity = *self.log.identity();
        let page: &[u8; HEADER_PAGE] =
            self.header_page.first_chunk().ok_or_else(|| Error::invalid("a header page is 4096 bytes"))?;
        let header = SegmentHeader::decode(page).map_err(|reason| {
            let is_newer = SegmentHeader::newer_version(page).is_some();
            let what = if is_newer {
                "a segment arrived that this program is too old for"
            } else {
                "the header of a segment arrived damaged"
            };
            Error::invalid(format!("{what}: {reason}"))
        })?;
        if self.open.as_ref().is_some_and(|open| header == *open.segment().header()) {
            self.arrived = 0;
            self.header_due = false;
            return Ok(());
        }
        let (epoch, chain_before) = match self.trusted_epoch {
            Some(newest) => (header.epoch.clamp(Epoch::FIRST, newest.max(Epoch::FIRST)), header.chain_before),
            None => (header.epoch.max(self.written_epoch()), self.chain),
        };
        let due = SegmentHeader {
            id: WalSegmentId { region: identity.region, shard: identity.shard, first_lsn: self.next_lsn },
            cluster: identity.cluster,
            epoch,
            chain_before,
            segment_size: identity.segment_size,
            version: header.version,
        };
        if header != due {
            return Err(Error::invalid(format!(
                "a segment arrived that does not continue the log: {header:?}, due {due:?}"
            )));
        }
        let prepared = self.take_spare()?;
        // A segment without batches is no history: its leader may have replaced it under a newer epoch, and another
        // leader, of whose epoch it is not, may never have had it.
        self.begin_segment(prepared, header)?;
        self.epoch = header.epoch;
        self.chain = header.chain_before;
        self.trusted_epoch = None;
        self.arrived = 0;
        self.header_due = false;
        // Segments are opened now and then only, and the page would be kept in between.
        self.header_page = Vec::new();
        Ok(())
    }

    /// The epoch of the newest segment with batches: what a next one must be at least.
    fn written_epoch(&self) -> Epoch {
        let is_empty = self.open.as_ref().is_some_and(|open| open.end() == SEGMENT_HEADER_LEN);
        if !is_empty {
            return self.epoch;
        }
        self.log.segments().iter().rev().nth(1).map_or(Epoch::ZERO, |segment| segment.header().epoch)
    }

    /// Checks and publishes every batch that has arrived as a whole.
    fn ingest_batches(&mut self) -> Result<()> {
        let Some(open) = self.open.as_mut().filter(|_| self.arrived > 0) else { return Ok(()) };
        let (room, end) = (open.room(), open.end());
        let segment = Arc::clone(open.segment());
        let arrived: &mut [u8] = if self.is_staged {
            self.staging.get_mut(..limits::index(self.arrived)).unwrap_or_default()
        } else {
            open.unpublished(0..self.arrived)
        };
        let mut expected = Expected { first_lsn: self.next_lsn, chain: self.chain, epoch: self.epoch };
        let mut whole = 0usize;
        let mut sealed = false;
        while !sealed && whole < arrived.len() {
            // In memory only: this changes bytes for a moment, and those in the file are always as they came.
            // Only the first of a run can be the first of its segment, and if any is too far from there, the last is.
            if self.is_staged
                && let Some((len, last)) =
                    batch::verify_compact_run(&mut arrived[whole..], room - whole as u64, expected)
                && segment.header().find_misplaced(end + whole as u64, &last).is_none()
            {
                whole += len;
                expected = Expected { first_lsn: last.first_lsn.next(), chain: last.crc, ..expected };
                self.timestamp = last.timestamp;
                continue;
            }
            match batch::verify(&arrived[whole..], room - whole as u64, expected) {
                Ok(header) => {
                    if let Some(reason) = segment.header().find_misplaced(end + whole as u64, &header) {
                        return Err(Error::invalid(format!(
                            "what arrived for LSN {} cannot stand there: {reason}",
                            expected.first_lsn
                        )));
                    }
                    whole += usize::try_from(header.total_len()).unwrap_or(usize::MAX);
                    expected.first_lsn = header.last_lsn().next();
                    expected.chain = header.crc;
                    self.timestamp = header.timestamp;
                    sealed = header.is_sealing();
                }
                Err(BatchError::Incomplete { .. }) => break,
                Err(error) => {
                    return Err(Error::invalid(format!(
                        "what arrived for LSN {} is not valid: {error}",
                        expected.first_lsn
                    )));
                }
            }
        }
        if sealed && whole < arrived.len() {
            return Err(Error::invalid("bytes arrived behind the end of a sealed segment"));
        }
        if whole == 0 {
            return Ok(());
        }
        if self.is_staged {
            // The beginning of the next batch too: the windows of a long stretch end where the system's own pieces of a
            // file do, and batches do not.
            let from = std::mem::replace(&mut self.in_file, self.arrived);
            let rest = &self.staging[limits::index(from)..limits::index(self.arrived)];
            open.write_unpublished(from, rest).map_err(Error::io("write", open.segment().path()))?;
            self.in_file -= whole as u64;
            self.staging.copy_within(whole..limits::index(self.arrived), 0);
        }
        open.publish(whole as u64);
        self.arrived -= whole as u64;
        self.chain = expected.chain;
        let moved = expected.first_lsn != self.next_lsn;
        self.next_lsn = expected.first_lsn;
        if !self.is_staged && open.end() >= self.populate_at {
            self.populate_at = self.log.populate_behind(open.segment(), open.end());
        }
        let landmark_due = open.end() >= self.landmark_at;
        if sealed && let Some(open) = self.open.take() {
            open.seal(self.next_lsn.previous());
        } else if landmark_due {
            self.note_landmark();
        }
        if moved {
            self.log.publish_written_quietly(self.next_lsn.previous());
        }
        Ok(())
    }
}
