//! Where two logs part: the exchange by which a leader learns it of a follower whose log is no beginning of its own.
//!
//! The *leader* here is whoever is followed, a follower that feeds others too. It happens in the handshake, and only
//! then: after an epoch has ended with records that never reached the next leader, the node that has them follows, and
//! its log must be [cut](crate::wal::cut) at the common point or given up. The leader tells where the epochs of its log
//! end ([`EpochHistory`]), the follower names the newest point that its own log shares with that ([`CommonPoint`]), and
//! the leader looks the point up in its log: by LSN and chain, so that it is proven on both sides. What then happens is
//! the [decision](crate::protocol::decide) of the protocol engine.
//!
//! The follower looks after itself all the same. It cuts only at the point that it has named, only for a leader of a
//! newer epoch than its own newest record, and never what its target may hold: after a power cut that can be more than
//! it knows to have applied, where it overwrites in place.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::receiver::refusal;
use crate::transport::{FrameReceiver, FrameSender};
use crate::types::{Chain, Epoch, Lsn};
use crate::wal::{Log, LogPosition};
use crate::wire::{CommonPoint, EpochEnd, EpochHistory, Message, SessionKind, ShardInfo, SyncRequest};

/// A log, as far as it is compared with another.
pub trait History {
    /// The newest LSN.
    fn head(&self) -> Lsn;

    /// The oldest LSN that is there.
    fn tail(&self) -> Lsn;

    /// Where the records of each epoch end, the newest first, and behind them where the log begins.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    fn epoch_ends(&self) -> Result<Vec<LogPosition>>;

    /// The place at which a log with the same history goes on that ends with this LSN and chain, if it can end there.
    fn position_after(&self, lsn: Lsn, chain: Chain) -> Option<LogPosition>;
}

impl History for Log {
    fn head(&self) -> Lsn {
        self.head()
    }

    fn tail(&self) -> Lsn {
        self.tail()
    }

    fn epoch_ends(&self) -> Result<Vec<LogPosition>> {
        self.epoch_ends()
    }

    fn position_after(&self, lsn: Lsn, chain: Chain) -> Option<LogPosition> {
        self.position_after(lsn, chain).ok().flatten()
    }
}

/// Where a follower's log parts from the leader's, as both have found.
#[derive(Clone, Copy, Debug)]
pub struct Parting {
    /// The epoch of the follower's newest record.
    pub tail_epoch: Epoch,
    /// The newest place known to be in both logs.
    pub common: Option<LogPosition>,
    /// Nothing behind it can be in the follower's base.
    pub cut_possible: bool,
}

// The leader's side --------------------------------------------------------------------------------------------------

/// Asks a follower where its log parts from `log`, if it is not a beginning of it.
/// Logs that no longer reach each other are not compared.
///
/// # Errors
///
/// What ended the stream, or a follower that answers something else.
pub(crate) fn ask_where_logs_part(
    log: &Log,
    request: &SyncRequest,
    version: u16,
    sender: &mut dyn FrameSender,
    receiver: &mut dyn FrameReceiver,
) -> Result<Option<Parting>> {
    if is_beginning_of(log, request) {
        return Ok(None);
    }
    sender.send_message(&Message::EpochHistory(question(log, version)?))?;
    let answer = match receiver.receive_message()? {
        Message::CommonPoint(answer) => answer,
        other => return Err(refusal(receiver.peer(), other)),
    };
    let parting = check_answer(log, request, &answer);
    log::info!(
        "node {}, shard {}: its log ends with LSN {} of epoch {}, and parts from this one behind LSN {}",
        request.node,
        request.shard,
        request.received,
        answer.tail_epoch,
        parting.common.map_or_else(|| "(none that is known)".to_owned(), |place| place.lsn.to_string())
    );
    Ok(Some(parting))
}

/// Where the epochs of a leader's log end, for a follower that is asked where its own parts from it.
pub(crate) fn question(log: &impl History, version: u16) -> Result<EpochHistory> {
    let end = |place: LogPosition| EpochEnd { epoch: place.epoch, lsn: place.lsn, chain: place.chain };
    let mut ends: Vec<_> = log.epoch_ends()?.into_iter().map(end).collect();
    if let Some(beginning) = ends.last_mut() {
        beginning.epoch = Epoch::ZERO;
    }
    Ok(EpochHistory::new(version, ends))
}

/// Looks the point that a follower has named up in the leader's log.
pub(crate) fn check_answer(log: &impl History, request: &SyncRequest, answer: &CommonPoint) -> Parting {
    let named = answer.flags & CommonPoint::FOUND != 0 && answer.lsn <= request.received;
    let common = if named { log.position_after(answer.lsn, answer.chain) } else { None };
    Parting {
        tail_epoch: answer.tail_epoch,
        common,
        cut_possible: common.is_some() && answer.flags & CommonPoint::CUT_POSSIBLE != 0,
    }
}

/// Whether what the follower has is a beginning of this log, or can no longer be compared with it.
pub(crate) fn is_beginning_of(
    log: &impl History,
    SyncRequest { received, durable, applied, chain, .. }: &SyncRequest,
) -> bool {
    if *received.max(durable).max(applied) > log.head() {
        return false;
    }
    // Looked up before the tail is: what is released meanwhile can no longer be compared.
    let is_place = log.position_after(*received, *chain).is_some();
    is_place || *received == Lsn::ZERO || *received < log.tail()
}

// The follower's side ------------------------------------------------------------------------------------------------

/// What a follower has, for the leader that asks where logs part.
pub(crate) struct OwnHistory<'a, H> {
    pub(crate) log: &'a H,
    /// Up to where the target may hold something that cannot be taken back.
    pub(crate) touched: Lsn,
}

/// What a follower has told of its history in a handshake.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// The epoch of its newest record.
    tail_epoch: Epoch,
    /// The point that it has named: a place in its own log.
    common: Option<LogPosition>,
    touched: Lsn,
}

/// Sends a request to follow and takes the answer: `ShardInfo`, or a refusal. On the way there the leader may ask where
/// the logs part.
///
/// # Errors
///
/// The refusal, or what ended the stream.
pub(crate) fn exchange(
    (sender, receiver): (&mut dyn FrameSender, &mut dyn FrameReceiver),
    request: SyncRequest,
    timeout: Duration,
    own: &OwnHistory<'_, impl History>,
) -> Result<(ShardInfo, Option<Told>)> {
    receiver.set_timeout(Some(timeout))?;
    sender.send_message(&Message::SyncRequest(request))?;
    let mut told = None;
    loop {
        match receiver.receive_message()? {
            Message::ShardInfo(info) => return Ok((info, told)),
            Message::EpochHistory(history) if told.is_none() => {
                let (answer, point) = own.answer(&history)?;
                sender.send_message(&Message::CommonPoint(answer))?;
                told = Some(point);
            }
            other => return Err(refusal(receiver.peer(), other)),
        }
    }
}

impl<H: History> OwnHistory<'_, H> {
    pub(crate) fn answer(&self, history: &EpochHistory) -> Result<(CommonPoint, Told)> {
        let ends = self.log.epoch_ends()?;
        let newest = ends.first().filter(|_| self.log.head() > Lsn::ZERO);
        let tail_epoch = newest.map_or(Epoch::ZERO, |end| end.epoch);
        let common = history.ends.iter().find_map(|end| self.shared_at(&ends, end));
        let mut flags = 0;
        if let Some(place) = common {
            flags |= CommonPoint::FOUND;
            // A log that begins past LSN 1 and keeps nothing would not know its chain.
            let keeps_some = place.lsn == Lsn::ZERO || place.segment > self.log.tail() || place.offset > 0;
            if self.touched <= place.lsn && keeps_some {
                flags |= CommonPoint::CUT_POSSIBLE;
            }
        }
        let answer = CommonPoint {
            tail_epoch,
            lsn: common.map_or(Lsn::ZERO, |place| place.lsn),
            chain: common.map_or_else(Default::default, |place| place.chain),
            flags,
        };
        Ok((answer, Told { tail_epoch, common, touched: self.touched }))
    }

    /// The place in the own log that the leader's history allows for at the end of one of its epochs.
    fn shared_at(&self, own: &[LogPosition], end: &EpochEnd) -> Option<LogPosition> {
        let of_epoch = |place: &&LogPosition| place.epoch == end.epoch && end.epoch > Epoch::ZERO;
        match own.iter().find(of_epoch) {
            // All that this log has of the epoch, which the leader has too: one node alone wrote under it.
            Some(place) if place.lsn <= end.lsn => Some(*place),
            _ => self.log.position_after(end.lsn, end.chain),
        }
    }
}

impl Told {
    /// Where this log, with this head and the place `due` for the next byte, is to be cut before what `info` announces
    /// can follow, if it is. The place decides, not the LSN alone: a log that ends with another batch sealing its
    /// segment than the leader's is cut before that, and loses no record.
    ///
    /// # Errors
    ///
    /// [`Error::Protocol`] if it would cut what must not be cut.
    pub fn cut_asked(
        &self,
        peer: &str,
        info: &ShardInfo,
        (head, due): (Lsn, (Lsn, u64)),
    ) -> Result<Option<LogPosition>> {
        let offered = (info.start_segment, info.start_offset);
        let continues = info.start > head && (offered == due || offered == (due.0, 0));
        if info.session_kind != SessionKind::CatchUp || continues {
            return Ok(None);
        }
        let here = self.common.filter(|place| {
            place.lsn.next() == info.start && (place.segment, place.offset) == (info.start_segment, info.start_offset)
        });
        match here {
            Some(place) if self.gives_way_to(info.epoch) && self.touched <= place.lsn => Ok(Some(place)),
            _ => Err(Error::protocol(
                peer,
                format!(
                    "under epoch {} it would send from LSN {} on, where this log has records of epoch {} up to LSN {head}, \
                     up to {} of them perhaps applied, and no point to cut it was agreed on",
                    info.epoch, info.start, self.tail_epoch, self.touched
                ),
            )),
        }
    }

    /// Whether what this node has beyond the leader's history may be given up for a leader of this epoch: its records
    /// are of an older one, and both logs have been shown to have been one.
    pub(crate) fn gives_way_to(&self, epoch: Epoch) -> bool {
        epoch > self.tail_epoch && self.common.is_some()
    }
}
