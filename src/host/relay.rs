//! The relay: a follower that feeds further followers (a cascade).
//!
//! A follower's log is a beginning of its leader's, byte for byte, so those who follow it are served as a leader serves
//! its own: the same engine decides about them, by what this node has. What they acknowledge holds log for them here
//! and is told in the status; it is not passed on, and counts for no commit of the leader's.
//!
//! # When it feeds
//!
//! | the log | the target | followers are |
//! |---|---|---|
//! | has not been agreed on with a leader of the epoch in force, or has not reached where that one was then | | asked to come again |
//! | has | waits for a rebuild, or is being rebuilt | asked to come again |
//! | has | is whole | fed |
//!
//! Once the log has reached where its leader was, it holds every record of older epochs that the leader's does: no
//! other will be written. So whoever has records of an older epoch that are missing here has diverged, and is decided
//! about as the leader would. Of the epoch in force a follower may have more than this node, if it was fed by another
//! before: it comes again.
//!
//! A leader that goes away changes nothing: those who follow get what is there. A new epoch does, and so does another
//! log in the place of this one: everybody's stream ends, before this node's log is cut or its target emptied.

use std::time::Instant;

use super::{Host, State};
use crate::error::RefusalCode;
use crate::protocol::{FailureReason, Role};
use crate::shutdown::ShutdownSignal;
use crate::types::{Epoch, NodeId};
use crate::watermark::{Until, WaitStrategy, Waited, wait_any};
use crate::wire::SyncRequest;

use super::Declined;

/// Whether a follower can feed others.
#[derive(Clone, Copy, Default)]
pub(super) struct Relay {
    /// The log has been agreed on with a leader of the epoch in force, or with whoever stands for it, and reaches where
    /// that one was then.
    is_caught_up: bool,
    /// The target is not being rebuilt.
    is_whole: bool,
    /// Whom the node follows, since it first met somebody.
    upstream: Option<NodeId>,
}

/// A base that is read to be sent. Dropped when that is over.
pub(crate) struct OpenBase(ShutdownSignal);

impl Drop for OpenBase {
    fn drop(&mut self) {
        self.0.shutdown();
    }
}

impl Host {
    /// On a follower: its log has reached where the leader of this epoch was when they agreed, and its target is whole,
    /// or is being rebuilt.
    pub(crate) fn set_caught_up(&self, epoch: Epoch, is_whole: bool) {
        let mut state = self.state.lock();
        // Another stream may have met a newer leader, with which this log has not been agreed on.
        if epoch == state.assignment.epoch {
            state.relay.is_caught_up = true;
            // A rebuild may have completed since the caller looked.
            state.relay.is_whole |= is_whole;
            self.tell_feeding(&state);
        }
    }

    /// On a follower: it follows that node.
    pub(crate) fn set_upstream(&self, node: NodeId) {
        self.state.lock().relay.upstream = Some(node);
    }

    /// On a follower: the rebuild of its target is complete.
    pub(crate) fn set_whole(&self) {
        let mut state = self.state.lock();
        state.relay.is_whole = true;
        self.tell_feeding(&state);
    }

    /// On a follower: feeds nobody any more, until it has caught up again. On return nobody reads a base from its
    /// target.
    pub(crate) fn withdraw(&self) {
        let mut state = self.state.lock();
        self.stop_feeding(&mut state);
        let bases = std::mem::take(&mut state.bases);
        drop(state);
        self.settle();
        // Their streams are over: what they wait for is what they do themselves.
        bases.iter().for_each(ShutdownSignal::wait);
    }

    /// Ends every stream, under the lock.
    pub(super) fn stop_feeding(&self, state: &mut State) {
        state.relay = Relay { upstream: state.relay.upstream, ..Relay::default() };
        for index in 0..state.members.len() {
            let Some(member) = state.members.get(index) else { break };
            let (node, stream) = (member.known.node(), member.stream.as_ref().map(|open| open.signals.over.clone()));
            if let Some(over) = stream {
                self.fail_session(state, node, FailureReason::Cancelled);
                over.shutdown();
            }
        }
    }

    /// Waits until this node feeds whoever follows it, as a leader always does, or until one of `ends`.
    pub(crate) fn wait_until_feeding(&self, deadline: Option<Instant>, ends: [Until<'_>; 2]) -> Result<(), Declined> {
        loop {
            let seen = self.fed.load();
            if self.state.lock().feeds() {
                return Ok(());
            }
            let conditions = [self.fed.until(seen.next()), ends[0], ends[1]];
            if wait_any(&conditions, WaitStrategy::Park, deadline) != Waited::Reached(0) {
                return Err(self.feeds_nobody());
            }
        }
    }

    pub(super) fn feeds_nobody(&self) -> Declined {
        Declined(
            RefusalCode::NotReady,
            format!(
                "this node is a follower, and has yet to catch up with its own leader in shard {}; ask again",
                self.shard
            ),
        )
    }

    /// A node that this one follows is not fed by it: the two would wait for each other for ever.
    pub(super) fn check_ring(&self, state: &State, node: NodeId) -> Result<(), Declined> {
        if state.is_relay() && state.relay.upstream == Some(node) {
            let text =
                format!("this node is a follower of node {node} itself: one of the two must follow somebody else");
            return Err(Declined(RefusalCode::NotReady, text));
        }
        Ok(())
    }

    /// Whoever has met a newer leader, or has led under the epoch in force, is fed under a newer one only. Decided by
    /// what the shard feeds under: the node may have accepted a newer epoch already, of which each shard hears a moment
    /// later.
    pub(super) fn check_has_met(&self, state: &State, request: &SyncRequest) -> Result<(), Declined> {
        let epoch = state.assignment.epoch;
        let has_led = request.flags & SyncRequest::HAS_LED != 0;
        if !state.is_relay() || request.epoch < epoch || request.epoch == epoch && !has_led {
            return Ok(());
        }
        let done = if has_led { "led under" } else { "accepted" };
        let text = format!(
            "you have {done} epoch {}, and this node, a follower itself, has met epoch {epoch} so far; ask again",
            request.epoch
        );
        Err(Declined(RefusalCode::NotReady, text))
    }

    fn tell_feeding(&self, state: &State) {
        if state.feeds() {
            self.fed.advance(self.fed.load().next());
        }
    }
}

impl State {
    /// Whether followers are served.
    pub(super) fn feeds(&self) -> bool {
        self.assignment.role == Role::Leader || self.relay.is_caught_up && self.relay.is_whole
    }

    /// Notes that a base is about to be read.
    pub(super) fn opens_base(&mut self) -> OpenBase {
        let over = ShutdownSignal::new();
        self.bases.retain(|base| !base.is_shutdown());
        self.bases.push(over.clone());
        OpenBase(over)
    }
}
