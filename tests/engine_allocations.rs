//! A steady stream of acknowledgements allocates nothing: the engine sees one for every batch of every follower.
//!
//! Allocations are counted by the thread that makes them, so the threads of the test's harness do not count.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use towline::protocol::{
    Assignment, Command, Engine, Event, FollowerFacts, LeaderFacts, Millis, ReadinessObserved, ReplicaInfo, Role,
    SessionLimits, Settings, SyncAck, Verdict,
};
use towline::{Chain, Epoch, Lsn, NodeId, SessionId, ShardId};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // None while a thread ends, when nothing is counted any more.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call goes to the system's allocator as it is; counting touches a number of this thread only, and
// allocates nothing, as that is initialized by a constant and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

const EPOCH: Epoch = Epoch(1);
const FOLLOWERS: [NodeId; 3] = [NodeId(2), NodeId(3), NodeId(4)];

/// A follower that has received everything, and made `behind` records less durable and applied.
fn ack(replica: NodeId, head: u64, behind: u64) -> Event {
    Event::SyncAckReceived(SyncAck {
        epoch: EPOCH,
        replica,
        follower: FollowerFacts {
            received: Lsn(head),
            durable: Lsn(head - behind),
            applied: Lsn(head - behind),
            chain: Chain(7),
            tail_epoch: EPOCH,
            ..FollowerFacts::default()
        },
        leader: LeaderFacts {
            tail: Lsn(1),
            head: Lsn(head),
            chain_at_received: Some(Chain(7)),
            ..LeaderFacts::default()
        },
    })
}

fn engine(commands: &mut Vec<Command>) -> Engine {
    let mut engine = Engine::new(Settings {
        shard: ShardId(0),
        node: NodeId(1),
        first_session: SessionId(1),
        limits: SessionLimits::default(),
    });
    let replicas = FOLLOWERS.map(|node| ReplicaInfo { node, endpoint: "somewhere".to_owned() }).to_vec();
    let assignment = Assignment { epoch: EPOCH, role: Role::Leader, replicas, commit_followers: 2 };
    let ready = ReadinessObserved {
        epoch: EPOCH,
        role_applied: Some(true),
        receiver_ready: None,
        shipper_configured: Some(true),
        shipper_connected: Some(true),
    };
    for event in [Event::AssignmentDelivered(assignment), Event::ReadinessObserved(ready)] {
        assert_eq!(engine.apply(Millis(0), &event, commands).verdict, Verdict::Applied);
    }
    engine
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations_of(|| drop(std::hint::black_box(Box::new(1)))), 1);
    assert_eq!(allocations_of(|| ()), 0);
}

#[test]
fn acks_in_steady_state_allocate_nothing_and_give_no_commands() {
    let mut commands = Vec::new();
    let mut engine = engine(&mut commands);
    // The first ones decide about each follower's session.
    let first = allocations_of(|| {
        for follower in FOLLOWERS {
            let _ = engine.apply(Millis(1), &ack(follower, 10, 0), &mut commands);
        }
    });
    assert!(first > 0 && !commands.is_empty());
    commands.clear();
    let steady = allocations_of(|| {
        for head in 11..10_011 {
            let event = ack(FOLLOWERS[usize::try_from(head % 3).unwrap_or(0)], head, head % 2);
            assert_eq!(engine.apply(Millis(2), &event, &mut commands).verdict, Verdict::Applied);
        }
    });
    assert_eq!((steady, commands.len()), (0, 0));
    assert!(engine.projection().durable > Lsn(9_000), "{:?}", engine.projection());
}
