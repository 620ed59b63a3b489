//! The decision: how a follower recovers, from its facts and the leader's alone.
//!
//! With *position* = applied, or durable when nothing was applied, and *end* = the highest of the follower's marks, the
//! first row that fits decides:
//!
//! | # | facts | decision |
//! |---:|---|---|
//! | 1 | the follower's newest epoch is newer than the leader's | refuse: `newer_epoch` |
//! | 2 | the follower knows more to be committed than the leader has | refuse: `leader_behind`; of a relay, `relay_behind` |
//! | 3 | the leader is a relay, end past the head or common = `received` where histories differ, same epoch or no log that tells one | refuse: `relay_behind` |
//! | 4 | the leader is a relay with an empty log, the follower's base is incomplete | refuse: `relay_behind` |
//! | 5 | end = 0 = head, the follower's base is whole | keep-up |
//! | 6 | the leader's log is empty | refuse: `leader_behind` |
//! | 7 | end past the head or histories differ at `received`, same epoch | refuse: `leader_behind` |
//! | 8 | the follower's base is incomplete, or its log is empty although it has state up to the head | rebuild |
//! | 9 | end past the head or histories differ at `received`, older epoch | *diverged*, below |
//! | 10 | `received` + 1 < tail, or = tail > 1 with another chain than the leader's: its log ends before the leader's begins | rebuild |
//! | 11 | position = head | keep-up |
//! | 12 | position + 1 >= tail | catch-up from position |
//! | 13 | | rebuild |
//!
//! Histories are compared where the leader's log still reaches back to `received`; where it does not, row 10 applies.
//! One before the tail it knows a single chain, the one behind the batch that sealed the segment it has given up. A log
//! that ends before that batch has another chain there and the same history: that it differs proves nothing. A fresh
//! follower (end = 0) has no history to differ. State without a log has one that nobody can compare.
//!
//! Diverged, with *common* = the newest LSN proven to be the same in both logs:
//!
//! | # | facts | decision |
//! |---:|---|---|
//! | a | common is known, and below what the follower knows to be committed | refuse: `diverged` |
//! | b | common is known, nothing above it was applied to the base, common + 1 >= tail, and the cut leaves records or the follower is no longer than the leader | catch-up from common, cutting there |
//! | c | common is known and above 0 | rebuild |
//! | d | no common point was found, the leader's log does not reach back to LSN 1, and the follower is no longer than the leader | rebuild |
//! | e | no common point was found, and the leader is a relay | refuse: `relay_behind` |
//! | f | | refuse: `diverged` |
//!
//! Row f is why an empty or shortened leader, or one that began anew, never wipes a follower: a follower's log is given
//! up only against proof that both logs once were one, or when the leader holds more than the follower and what they
//! once shared may have been retired.
//!
//! A *relay* is a follower that feeds others. It decides only while it has every record of older epochs that its leader
//! has ([`LeaderFacts::is_relay`](super::LeaderFacts::is_relay)), so about those it knows as much as the leader; of
//! this epoch it may be behind a follower that was fed by somebody else before. That one asks again (rows 3 and 4), and
//! keeps what it has. So does one whose history a relay cannot compare, because either was rebuilt and has a short log
//! (row e): the relay may come to where row d holds, and the leader itself may know more.

use super::event::SyncAck;
use super::words::Refusal;
use crate::types::Lsn;

/// What the leader does about a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It has everything: ship to it live.
    KeepUp,
    /// Replay retained log.
    CatchUp {
        /// What lies after this LSN is needed.
        start: Lsn,
        /// The follower first cuts its log after this LSN.
        cut: Option<Lsn>,
    },
    /// Base image plus log.
    Rebuild,
    /// No session: each would destroy what may be the only copy.
    Refuse(Refusal),
}

/// Decides by the [table](self), from one event's facts alone, which are
/// [consistent](SyncAck::is_consistent).
///
/// ```
/// # use towline::protocol::{Decision, FollowerFacts, LeaderFacts, SyncAck, decide};
/// # use towline::{Chain, Epoch, Lsn};
/// let mut ack = SyncAck {
///     epoch: Epoch(1),
///     follower: FollowerFacts {
///         received: Lsn(7), durable: Lsn(7), applied: Lsn(7),
///         chain: Chain(70), tail_epoch: Epoch(1), ..FollowerFacts::default()
///     },
///     leader: LeaderFacts {
///         tail: Lsn(8), head: Lsn(10), chain_at_received: Some(Chain(70)), ..LeaderFacts::default()
///     },
///     ..SyncAck::default()
/// };
/// assert_eq!(decide(&ack), Decision::CatchUp { start: Lsn(7), cut: None });
/// ack.leader.tail = Lsn(9); // LSN 8, which it needs next, is gone
/// assert_eq!(decide(&ack), Decision::Rebuild);
/// ```
#[must_use]
pub fn decide(ack: &SyncAck) -> Decision {
    let (follower, leader) = (&ack.follower, &ack.leader);
    let (position, end) = (follower.position(), follower.end());
    if follower.tail_epoch > ack.epoch {
        return Decision::Refuse(Refusal::NewerEpoch);
    }
    if follower.committed > leader.head {
        return Decision::Refuse(if leader.is_relay { Refusal::RelayBehind } else { Refusal::LeaderBehind });
    }
    if leader.is_relay && may_be_ahead_of_relay(ack) {
        return Decision::Refuse(Refusal::RelayBehind);
    }
    if leader.head == Lsn::ZERO {
        let nothing_to_do = end == Lsn::ZERO && !follower.base_incomplete;
        return if nothing_to_do { Decision::KeepUp } else { Decision::Refuse(Refusal::LeaderBehind) };
    }
    let not_a_prefix = end > leader.head || histories_differ(ack);
    if not_a_prefix && follower.tail_epoch == ack.epoch {
        return Decision::Refuse(Refusal::LeaderBehind);
    }
    let state_without_log = follower.received == Lsn::ZERO && end > Lsn::ZERO && end <= leader.head;
    if follower.base_incomplete || state_without_log {
        return Decision::Rebuild;
    }
    if not_a_prefix {
        return decide_diverged(ack);
    }
    if ends_before_tail(ack) {
        Decision::Rebuild
    } else if position == leader.head {
        Decision::KeepUp
    } else if position.next() >= leader.tail {
        Decision::CatchUp { start: position, cut: None }
    } else {
        Decision::Rebuild
    }
}

/// Whether the follower's log is known to be no prefix of the leader's.
fn histories_differ(ack: &SyncAck) -> bool {
    let received = ack.follower.received;
    let comparable = received > Lsn::ZERO && received >= ack.leader.tail;
    comparable && ack.leader.chain_at_received != Some(ack.follower.chain)
}

/// Whether the follower's log ends where the leader's cannot go on with it, because what was there is given up.
fn ends_before_tail(ack: &SyncAck) -> bool {
    let (received, tail) = (ack.follower.received, ack.leader.tail);
    let differs = ack.leader.chain_at_received != Some(ack.follower.chain);
    received.next() < tail || (received > Lsn::ZERO && received.next() == tail && differs)
}

/// Whether the follower may have something of the epoch that a relay has yet to receive.
fn may_be_ahead_of_relay(ack: &SyncAck) -> bool {
    let (follower, leader) = (&ack.follower, &ack.leader);
    // State without a log tells no epoch: it may be of this one.
    let may_be_of_epoch = follower.tail_epoch == ack.epoch || follower.received == Lsn::ZERO;
    // A batch without a record, which seals a segment.
    let has_seal = histories_differ(ack) && leader.common == Some(follower.received);
    let has_more = follower.end() > leader.head || has_seal;
    has_more && may_be_of_epoch || leader.head == Lsn::ZERO && follower.base_incomplete
}

fn decide_diverged(ack: &SyncAck) -> Decision {
    let (follower, leader) = (&ack.follower, &ack.leader);
    let longer = follower.end() > leader.head;
    match leader.common {
        Some(common) if common < follower.committed => Decision::Refuse(Refusal::Diverged),
        Some(common) if leader.cut_possible && common.next() >= leader.tail && (common > Lsn::ZERO || !longer) => {
            Decision::CatchUp { start: common, cut: Some(common) }
        }
        Some(common) if common > Lsn::ZERO => Decision::Rebuild,
        None if leader.tail > Lsn::FIRST && !longer => Decision::Rebuild,
        // Its leader may have more to compare with, or have given up enough to rebuild it.
        None if leader.is_relay => Decision::Refuse(Refusal::RelayBehind),
        Some(_) | None => Decision::Refuse(Refusal::Diverged),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::event::{FollowerFacts, LeaderFacts};
    use crate::types::{Chain, Epoch};
    use proptest::prelude::*;

    const LEADER_EPOCH: Epoch = Epoch(3);

    /// A follower whose marks all stand at `position`, beside a leader with the same history.
    fn ack(position: u64, tail: u64, head: u64) -> SyncAck {
        let lsn = Lsn(position);
        SyncAck {
            epoch: LEADER_EPOCH,
            follower: FollowerFacts {
                received: lsn,
                durable: lsn,
                applied: lsn,
                chain: Chain(7),
                tail_epoch: if position == 0 { Epoch::ZERO } else { LEADER_EPOCH },
                ..FollowerFacts::default()
            },
            leader: LeaderFacts {
                tail: Lsn(tail),
                head: Lsn(head),
                chain_at_received: (position <= head && position + 1 >= tail).then_some(Chain(7)),
                ..LeaderFacts::default()
            },
            ..SyncAck::default()
        }
    }

    fn older(mut ack: SyncAck, common: Option<u64>, cut_possible: bool) -> SyncAck {
        ack.follower.tail_epoch = Epoch(2);
        ack.leader.chain_at_received = None;
        ack.leader.common = common.map(Lsn);
        ack.leader.cut_possible = cut_possible;
        ack
    }

    fn catch_up(start: u64) -> Decision {
        Decision::CatchUp { start: Lsn(start), cut: None }
    }

    fn cut(common: u64) -> Decision {
        Decision::CatchUp { start: Lsn(common), cut: Some(Lsn(common)) }
    }

    const BEHIND: Decision = Decision::Refuse(Refusal::LeaderBehind);
    const DIVERGED: Decision = Decision::Refuse(Refusal::Diverged);

    #[test]
    fn one_threshold_decides_about_sound_followers() {
        let table = [
            // (position, tail, head, decision)
            (0, 0, 0, Decision::KeepUp),
            (0, 1, 0, Decision::KeepUp),
            (0, 0, 9, catch_up(0)),
            (0, 1, 9, catch_up(0)),
            (0, 2, 9, Decision::Rebuild),
            (9, 1, 9, Decision::KeepUp),
            (9, 10, 9, Decision::KeepUp),
            (8, 9, 9, catch_up(8)),
            (7, 9, 9, Decision::Rebuild),
            (8, 10, 9, Decision::Rebuild),
            (1, 1, 9, catch_up(1)),
            (1, 2, 9, catch_up(1)),
            (1, 3, 9, Decision::Rebuild),
            (10, 1, 9, BEHIND),
            (1, 1, 0, BEHIND),
            (u64::MAX, 1, 9, BEHIND),
        ];
        for (position, tail, head, decision) in table {
            assert_eq!(decide(&ack(position, tail, head)), decision, "{position} of {tail} to {head}");
        }
    }

    #[test]
    fn a_diverged_follower_is_cut_rebuilt_or_refused() {
        let table = [
            // (position, tail, head, common, cut possible, decision)
            (12, 1, 10, Some(8), true, cut(8)),
            (12, 1, 10, Some(8), false, Decision::Rebuild),
            (12, 10, 10, Some(8), true, Decision::Rebuild),
            (9, 1, 10, Some(8), true, cut(8)),
            (9, 9, 10, Some(8), true, cut(8)),
            (9, 1, 10, Some(8), false, Decision::Rebuild),
            (9, 1, 10, Some(0), true, cut(0)),
            (9, 1, 10, Some(0), false, DIVERGED),
            (12, 1, 10, Some(0), true, DIVERGED),
            (9, 1, 10, None, true, DIVERGED),
            (9, 5, 10, None, false, Decision::Rebuild),
            (12, 5, 10, None, true, DIVERGED),
            (12, 1, 0, Some(0), true, BEHIND),
        ];
        for (position, tail, head, common, cut_possible, decision) in table {
            let facts = older(ack(position, tail, head), common, cut_possible);
            assert_eq!(decide(&facts), decision, "{position} of {tail} to {head}, {common:?} {cut_possible}");
        }
    }

    #[test]
    fn the_log_end_shows_divergence_even_when_little_was_applied() {
        let mut facts = older(ack(12, 1, 10), Some(8), true);
        facts.follower.applied = Lsn(5);
        assert_eq!(decide(&facts), cut(8), "applied 5 is below the head, but the log is past it");
    }

    #[test]
    fn the_same_epoch_cannot_have_two_histories() {
        let mut facts = ack(9, 1, 10);
        facts.leader.chain_at_received = Some(Chain(8));
        assert_eq!(decide(&facts), BEHIND);
    }

    #[test]
    fn a_log_that_lacks_only_a_seal_that_is_gone_is_rebuilt() {
        let mut facts = ack(8, 9, 10);
        facts.leader.chain_at_received = None;
        assert_eq!(decide(&facts), Decision::Rebuild, "the same epoch");
        assert_eq!(decide(&older(ack(8, 9, 10), None, false)), Decision::Rebuild, "an older epoch");
        facts.leader.tail = Lsn(8);
        assert_eq!(decide(&facts), BEHIND, "the record is there, and is another one");
    }

    #[test]
    fn one_before_the_tail_another_chain_proves_nothing() {
        let mut facts = ack(8, 9, 10);
        assert_eq!(decide(&facts), catch_up(8));
        facts.leader.chain_at_received = None;
        assert_eq!(decide(&facts), Decision::Rebuild, "its log may end before the batch that sealed the segment");
        facts.leader.head = Lsn(8);
        assert_eq!(decide(&facts), Decision::Rebuild);
        facts.follower.durable = Lsn(9);
        assert_eq!(decide(&facts), BEHIND, "it has more than the leader");
        let mut facts = ack(9, 9, 10);
        facts.leader.chain_at_received = None;
        assert_eq!(decide(&facts), BEHIND, "what the leader has it can compare");
    }

    #[test]
    fn a_relay_waits_for_what_its_leader_may_still_send() {
        const WAITS: Decision = Decision::Refuse(Refusal::RelayBehind);
        let of_relay = |mut ack: SyncAck| {
            ack.leader.is_relay = true;
            decide(&ack)
        };
        assert_eq!(of_relay(ack(10, 1, 9)), WAITS, "the follower was fed by somebody else before");
        assert_eq!(of_relay(ack(1, 1, 0)), WAITS);
        assert_eq!(of_relay(ack(9, 1, 9)), Decision::KeepUp);
        assert_eq!(of_relay(ack(0, 1, 0)), Decision::KeepUp);
        assert_eq!(of_relay(older(ack(12, 1, 10), Some(8), true)), cut(8), "of older epochs it has everything");
        assert_eq!(of_relay(older(ack(12, 5, 10), None, false)), WAITS, "nothing to compare");
        assert_eq!(of_relay(older(ack(9, 5, 10), None, false)), Decision::Rebuild);
        assert_eq!(of_relay(older(ack(12, 1, 10), None, true)), WAITS);
        assert_eq!(of_relay(older(ack(12, 1, 10), Some(0), true)), DIVERGED, "compared down to the first record");
        let mut facts = ack(9, 1, 10);
        facts.leader.chain_at_received = Some(Chain(8));
        assert_eq!(of_relay(facts), BEHIND, "two histories of one epoch");
        facts.leader.common = Some(Lsn(9));
        assert_eq!(of_relay(facts), WAITS, "it has the batch that seals the segment, too");
        let mut facts = ack(0, 1, 0);
        facts.follower.base_incomplete = true;
        assert_eq!(of_relay(facts), WAITS, "there is no base yet");
        let mut facts = ack(12, 1, 9);
        (facts.follower.received, facts.follower.tail_epoch) = (Lsn::ZERO, Epoch::ZERO);
        assert_eq!(of_relay(facts), WAITS, "state whose epoch nobody knows");
    }

    #[test]
    fn what_is_committed_stays() {
        let mut facts = ack(9, 1, 10);
        facts.follower.committed = Lsn(11);
        assert_eq!(decide(&facts), BEHIND, "the leader lacks a committed record");
        let mut facts = older(ack(9, 1, 10), Some(7), true);
        facts.follower.committed = Lsn(8);
        assert_eq!(decide(&facts), DIVERGED, "the cut would take a committed record");
    }

    #[test]
    fn half_a_base_needs_another_rebuild_whatever_the_marks_say() {
        let half = |mut ack: SyncAck| {
            ack.follower.base_incomplete = true;
            decide(&ack)
        };
        assert_eq!(half(ack(9, 1, 9)), Decision::Rebuild);
        assert_eq!(half(ack(8, 1, 9)), Decision::Rebuild);
        assert_eq!(half(older(ack(12, 1, 10), None, false)), Decision::Rebuild, "what diverged was given up before");
        assert_eq!(half(ack(0, 1, 0)), BEHIND, "the leader had a base, and has nothing now");
        assert_eq!(half(ack(12, 1, 9)), BEHIND);
    }

    #[test]
    fn state_without_a_log_proves_nothing() {
        for position in [8, 9] {
            let mut facts = ack(position, 1, 9);
            facts.follower.received = Lsn::ZERO;
            facts.follower.tail_epoch = Epoch::ZERO;
            assert_eq!(decide(&facts), Decision::Rebuild);
            facts.leader.head = Lsn(position - 1);
            assert_eq!(decide(&facts), DIVERGED, "nor does it give way to a shorter leader");
        }
    }

    #[test]
    fn a_newer_epoch_deposes_the_leader() {
        let mut facts = ack(9, 1, 10);
        facts.follower.tail_epoch = Epoch(4);
        assert_eq!(decide(&facts), Decision::Refuse(Refusal::NewerEpoch));
    }

    /// Small numbers, so that they often meet.
    fn any_facts() -> impl Strategy<Value = SyncAck> {
        let marks = (0u64..6, 0u64..6, 0u64..6, 0u64..6, 0u32..2, (0u64..5, proptest::bool::weighted(0.2)));
        let log = (0u64..7, 0u64..6, proptest::option::of(0u32..2), proptest::option::of(0u64..6), any::<bool>());
        (marks, log).prop_map(|(marks, log)| {
            let (received, durable, applied, committed, chain, (tail_epoch, base_incomplete)) = marks;
            let (tail, head, chain_at_received, common, cut_possible) = log;
            let follower = FollowerFacts {
                received: Lsn(received),
                durable: Lsn(durable),
                applied: Lsn(applied),
                committed: Lsn(committed),
                chain: Chain(chain),
                tail_epoch: Epoch(tail_epoch),
                base_incomplete,
            };
            let leader = LeaderFacts {
                tail: Lsn(tail.min(head + 1)),
                head: Lsn(head),
                chain_at_received: chain_at_received.map(Chain),
                common: common.map(|common| Lsn(common.min(head)).min(follower.received)),
                cut_possible,
                is_relay: false,
            };
            SyncAck { epoch: LEADER_EPOCH, follower, leader, ..SyncAck::default() }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// Nobody asks a follower of version 1 where the logs part, nor one whose log is a beginning of the leader's.
        /// The epoch that it has accepted then stands for that of its newest record, which is older or the same.
        #[test]
        fn an_epoch_that_is_only_a_bound_takes_nothing_from_a_follower(ack in any_facts(), accepted in 0u64..5) {
            let mut ack = ack;
            (ack.leader.common, ack.leader.cut_possible) = (None, false);
            let exact = decide(&ack);
            let mut bound = ack;
            bound.follower.tail_epoch = Epoch(accepted).max(ack.follower.tail_epoch);
            let decided = decide(&bound);
            prop_assert!(decided == exact || matches!(decided, Decision::Refuse(_)), "{:?} became {:?}", exact, decided);
            let is_cut = matches!(decided, Decision::CatchUp { cut: Some(_), .. });
            prop_assert!(!is_cut);
            // The epoch of a log that is a beginning of the leader's decides nothing.
            let is_beginning = ack.follower.end() <= ack.leader.head && !histories_differ(&ack);
            let follows = bound.follower.tail_epoch <= ack.epoch;
            prop_assert!(!(is_beginning && follows) || decided == exact);
        }

        /// A relay that may lack something waits for it, and knows as much as the leader about everything else.
        #[test]
        fn a_relay_decides_as_its_leader_does_or_waits(ack in any_facts()) {
            let mut of_relay = ack;
            of_relay.leader.is_relay = true;
            let (leaders, relays) = (decide(&ack), decide(&of_relay));
            if relays == Decision::Refuse(Refusal::RelayBehind) {
                let has_seal = histories_differ(&ack) && ack.leader.common == Some(ack.follower.received);
                let is_empty = ack.leader.head == Lsn::ZERO && ack.follower.base_incomplete;
                let is_longer = ack.follower.end() > ack.leader.head || ack.follower.committed > ack.leader.head;
                let is_unknown = histories_differ(&ack) && ack.leader.common.is_none();
                prop_assert!(is_longer || has_seal || is_empty || is_unknown);
                let cut = matches!(leaders, Decision::CatchUp { cut: Some(_), .. });
                prop_assert!(!cut || ack.follower.tail_epoch == ack.epoch || ack.follower.received == Lsn::ZERO);
            } else {
                prop_assert_eq!(leaders, relays);
                let is_ahead = ack.follower.end() > ack.leader.head && ack.follower.tail_epoch == ack.epoch;
                prop_assert!(!is_ahead, "what it is yet to receive is nobody's divergence");
            }
        }

        #[test]
        fn no_decision_takes_a_follower_below_what_is_known_to_be_safe(ack in any_facts()) {
            let (follower, leader) = (ack.follower, ack.leader);
            prop_assert!(ack.is_consistent());
            match decide(&ack) {
                Decision::KeepUp => {
                    prop_assert!(!follower.base_incomplete);
                    prop_assert_eq!(follower.position(), leader.head);
                    prop_assert_eq!(follower.end(), leader.head);
                }
                Decision::CatchUp { start, cut } => {
                    prop_assert!(!follower.base_incomplete);
                    prop_assert!(follower.received > Lsn::ZERO || follower.end() == Lsn::ZERO);
                    prop_assert!(cut.is_some() || follower.received.next() >= leader.tail);
                    prop_assert!(start <= leader.head && start.next() >= leader.tail);
                    prop_assert!(cut.is_some() || follower.end() <= leader.head);
                    prop_assert!(cut.is_none_or(|cut| cut >= follower.committed && leader.cut_possible));
                }
                Decision::Rebuild => {
                    prop_assert!(leader.head > Lsn::ZERO && leader.head >= follower.committed);
                    let proven = leader.common.is_some_and(|common| common > Lsn::ZERO) || follower.base_incomplete;
                    prop_assert!(proven || follower.end() <= leader.head, "nobody longer is wiped without proof");
                    let same_epoch = follower.tail_epoch == ack.epoch;
                    prop_assert!(!(same_epoch && follower.end() > leader.head));
                }
                Decision::Refuse(_) => prop_assert!(follower.end() > Lsn::ZERO
                    || follower.committed > Lsn::ZERO || follower.base_incomplete
                    || follower.tail_epoch > ack.epoch),
            }
        }
    }
}
