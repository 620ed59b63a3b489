//! Rebuilds that end in the middle, by either side, and what the next one makes of what is left.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use towline::rebuild::RebuildPhase;
use towline::target::{FixedStore, ReplicationTarget};
use towline::{Epoch, Error, Follower, Lsn, ShardId, Watermark};

use crate::common::until;
use crate::gates::{BROKEN, Doled, FALLS, Gate, Gated, Point, start_gated};
use crate::scene::{Load, SHARD, Scene, over_both, reach};

#[test]
fn a_follower_that_goes_down_in_a_rebuild_serves_nothing_until_another_completes() {
    over_both(|wire| {
        for (point, after) in
            [(Point::Begun, 0), (Point::Block, 0), (Point::Block, 300), (Point::Record, 5), (Point::Complete, 0)]
        {
            let scene = Scene::filled(wire);
            let load = Load::on(&scene);
            let gate = Gate::at(point, after);
            let follower = start_gated(&scene, &gate);
            assert_eq!(follower.applied(SHARD).unwrap().load(), Lsn::ZERO, "{point:?}: nothing counts yet");
            let commits = scene.leader.commits(SHARD).unwrap();
            assert!(commits.followers().iter().all(|marks| !marks.counts()), "{point:?}");
            follower.stop_signal().shutdown();
            gate.open();
            drop(follower);
            // As after a crash: the mark stands.
            let store = scene.open_store("follower");
            assert!(store.is_rebuilding(SHARD).unwrap(), "{point:?}");
            assert!(store.get(&1u64.to_be_bytes()).is_err(), "{point:?}");
            let follower = scene.follow("follower", store.clone());
            reach(follower.applied(SHARD).unwrap(), Lsn(1));
            drop(load);
            assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed, "{point:?}");
            scene.stop_and_compare(vec![("follower", follower, store)]);
        }
    });
}

#[test]
fn a_target_that_panics_in_a_rebuild_ends_following_and_is_rebuilt_by_another() {
    over_both(|wire| {
        for (point, after) in [(Point::Begun, 0), (Point::Block, 300), (Point::Record, 5), (Point::Complete, 0)] {
            let scene = Scene::filled(wire);
            let load = Load::on(&scene);
            let gate = Gate::falling(point, after);
            let target = Gated { inner: scene.open_store("follower"), gate, tells: true };
            let follower = scene.follow("follower", Arc::new(target));
            for error in [follower.wait(), follower.wait(), follower.shutdown()].map(Result::unwrap_err) {
                assert!(matches!(error, Error::Panicked { .. }), "{point:?}: {error}");
                assert!(error.to_string().ends_with("of shard 0 panicked: the gate fell"), "{point:?}: {error}");
            }
            let store = scene.open_store("follower");
            assert!(store.is_rebuilding(SHARD).unwrap(), "{point:?}");
            let follower = scene.follow("follower", store.clone());
            reach(follower.applied(SHARD).unwrap(), Lsn(1));
            drop(load);
            scene.stop_and_compare(vec![("follower", follower, store)]);
        }
    });
}

#[test]
fn a_leader_that_goes_down_in_a_rebuild_begins_another_when_it_is_back() {
    over_both(|wire| {
        for (point, after) in [(Point::Block, 200), (Point::Complete, 0)] {
            let scene = Scene::filled(wire);
            let gate = Gate::at(point, after);
            let inner = scene.open_store("follower");
            let target = Gated { inner: inner.clone(), gate: Arc::clone(&gate), tells: true };
            let follower = scene.follow("follower", Arc::new(target));
            reach(&gate.reached, Lsn(1));
            // Its records are held back at the gate too, until it is opened.
            let waiting = inner.clone();
            let gate_of_it = Arc::clone(&gate);
            let scene = scene.restart(move |builder| {
                assert!(waiting.is_rebuilding(SHARD).unwrap());
                gate_of_it.open_for_good();
                builder
            });
            scene.put(7, b"after the restart");
            reach(follower.applied(SHARD).unwrap(), scene.head());
            assert!(!inner.is_rebuilding(SHARD).unwrap());
            scene.stop_and_compare(vec![("follower", follower, inner)]);
        }
    });
}

#[test]
fn a_newer_local_base_is_refused_and_nothing_of_it_changed() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let inner = scene.open_store("follower");
        let mut lsn = 0;
        for _ in 0..scene.head().get() + 10 {
            let append = |_: ShardId, _: &[u8]| {
                lsn += 1;
                Ok(Lsn(lsn))
            };
            inner.put(b"mine", b"newer", append).unwrap();
        }
        let gate = Gate::at(Point::Block, u64::MAX);
        let follower = scene.follow("follower", Arc::new(Gated { inner: inner.clone(), gate, tells: false }));
        let error = follower.wait().unwrap_err();
        assert!(error.to_string().contains("newer than the offered base"), "{error}");
        assert!(!inner.is_rebuilding(SHARD).unwrap());
        assert_eq!(inner.get(b"mine").unwrap().as_deref(), Some(&b"newer"[..]));
    });
}

/// Keys for a base of some runs.
const MANY: u64 = 12_000;

/// A follower whose rebuild has come so far that another can go on with it, and is then held up. The leader has written
/// since: into blocks that have come, and into others.
fn half_rebuilt(scene: &Scene, allowed: &Watermark) -> (Follower, Arc<FixedStore>) {
    let store = scene.open_store("follower");
    let follower = scene.follow("follower", store.clone());
    allowed.advance(Lsn(3));
    let saved = scene.path("follower").join("rebuild-0000");
    until("it is saved how far the base has come", || saved.exists());
    let mut last = Lsn::ZERO;
    for key in (0..MANY).step_by(500) {
        scene.put(key, b"newer");
        last = scene.delete(key + 1).unwrap();
    }
    // Log comes before the next run, but only once the one that the leader is held up in has gone.
    allowed.advance(Lsn(4));
    until("the log lane is ahead", || follower.rebuild_progress(SHARD).unwrap().applied >= last);
    assert!(store.is_rebuilding(SHARD).unwrap() && store.get(&7u64.to_be_bytes()).is_err());
    (follower, store)
}

/// The rebuild has completed: some blocks stayed, and no more came than were missing.
fn assert_went_on(follower: &Follower) {
    let progress = follower.rebuild_progress(SHARD).unwrap();
    assert_eq!(progress.phase, RebuildPhase::Completed, "{progress:?}");
    assert!(progress.blocks_kept > 1000, "{progress:?}");
    assert!(progress.blocks_done > 0 && progress.blocks_done + progress.blocks_kept <= progress.blocks_total);
}

#[test]
fn a_follower_that_comes_back_goes_on_with_its_rebuild() {
    over_both(|wire| {
        let (scene, allowed) = Scene::doled(wire, MANY, |builder| builder);
        let (follower, store) = half_rebuilt(&scene, &allowed);
        let tail = follower.log(SHARD).unwrap().tail();
        follower.stop_signal().shutdown();
        drop(follower);
        drop(store);
        allowed.advance(Lsn::MAX);
        for key in 0..MANY / 10 {
            scene.put(key * 10, b"while it was away");
        }
        let store = scene.open_store("follower");
        assert!(store.is_rebuilding(SHARD).unwrap() && store.get(&7u64.to_be_bytes()).is_err());
        let follower = scene.follow("follower", store.clone());
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert_went_on(&follower);
        assert_eq!(follower.log(SHARD).unwrap().tail(), tail, "its log is the one that it had");
        let saved = scene.path("follower").join("rebuild-0000");
        assert!(!saved.exists(), "nothing is left to go on with");
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn a_follower_that_lost_its_leader_goes_on_with_its_rebuild() {
    over_both(|wire| {
        let (scene, allowed) = Scene::doled(wire, MANY, |builder| builder);
        let (follower, store) = half_rebuilt(&scene, &allowed);
        allowed.advance(BROKEN);
        let again = Doled { inner: scene.store.clone(), allowed: Arc::default() };
        let from_now_on = Arc::clone(&again.allowed);
        let scene = scene.restart(|builder| builder.target(Arc::new(again)));
        let load = Load::on(&scene);
        from_now_on.advance(Lsn::MAX);
        reach(follower.applied(SHARD).unwrap(), Lsn(1));
        drop(load);
        assert_went_on(&follower);
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn a_base_that_panics_ends_the_stream_and_is_asked_for_again() {
    over_both(|wire| {
        let (scene, allowed) = Scene::doled(wire, MANY, |builder| builder);
        let (follower, store) = half_rebuilt(&scene, &allowed);
        allowed.advance(FALLS);
        reach(&allowed, Lsn::MAX);
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert_went_on(&follower);
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

/// What breaks: the device of a target that is being rebuilt, for one sync. What would be lost: what the log had
/// written to blocks that are kept, were it not written again.
#[test]
fn a_rebuild_begins_anew_where_the_target_could_not_be_synced() {
    over_both(|wire| {
        let (scene, allowed) = Scene::doled(wire, MANY, |builder| builder);
        let inner = scene.open_store("follower");
        let gate = Gate::at(Point::Sync, u64::MAX);
        gate.open();
        let target = Gated { inner: inner.clone(), gate: Arc::clone(&gate), tells: true };
        let follower = scene.follow("follower", Arc::new(target));
        allowed.advance(Lsn(3));
        let saved = scene.path("follower").join("rebuild-0000");
        until("it is saved how far the base has come", || saved.exists());
        gate.left.store(0, Ordering::SeqCst);
        allowed.advance(BROKEN);
        reach(&gate.reached, Lsn(1));
        gate.left.store(u64::MAX, Ordering::SeqCst);
        let again = Doled { inner: scene.store.clone(), allowed: Arc::new(Watermark::new(Lsn::MAX)) };
        let scene = scene.restart(|builder| builder.target(Arc::new(again)));
        reach(follower.applied(SHARD).unwrap(), scene.head());
        let progress = follower.rebuild_progress(SHARD).unwrap();
        assert_eq!((progress.phase, progress.blocks_kept), (RebuildPhase::Completed, 0));
        scene.stop_and_compare(vec![("follower", follower, inner)]);
    });
}

#[test]
fn a_target_that_panics_where_it_is_to_go_on_is_rebuilt_from_the_beginning() {
    over_both(|wire| {
        let (scene, allowed) = Scene::doled(wire, MANY, |builder| builder);
        let (follower, store) = half_rebuilt(&scene, &allowed);
        drop(follower);
        drop(store);
        allowed.advance(Lsn::MAX);
        let inner = scene.open_store("follower");
        let follow = || {
            let gate = Gate::falling(Point::Resumed, 0);
            scene.follow("follower", Arc::new(Gated { inner: inner.clone(), gate, tells: true }))
        };
        let error = follow().wait().unwrap_err();
        assert!(matches!(error, Error::Panicked { .. }), "{error}");
        let follower = follow();
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().blocks_kept, 0);
        scene.stop_and_compare(vec![("follower", follower, inner)]);
    });
}

#[test]
fn a_rebuild_begins_anew_where_what_is_left_does_not_fit() {
    over_both(|wire| {
        for case in ["another epoch", "the log is gone", "the note is damaged", "the note is gone"] {
            let (scene, allowed) = Scene::doled(wire, MANY, |builder| builder);
            let (follower, store) = half_rebuilt(&scene, &allowed);
            drop(follower);
            drop(store);
            allowed.advance(Lsn::MAX);
            let saved = scene.path("follower").join("rebuild-0000");
            let scene = match case {
                "another epoch" => scene.restart(|builder| builder.epoch(Epoch(2))),
                "the log is gone" => {
                    for key in 0..1500 {
                        scene.put(key, &[b'z'; 90]);
                    }
                    scene.trim();
                    scene
                }
                "the note is damaged" => {
                    let mut bytes = std::fs::read(&saved).unwrap();
                    bytes[20] ^= 1;
                    std::fs::write(&saved, bytes).unwrap();
                    scene
                }
                _ => {
                    std::fs::remove_file(&saved).unwrap();
                    scene
                }
            };
            let store = scene.open_store("follower");
            let follower = scene.follow("follower", store.clone());
            reach(follower.applied(SHARD).unwrap(), scene.head());
            let progress = follower.rebuild_progress(SHARD).unwrap();
            assert_eq!((progress.phase, progress.blocks_kept), (RebuildPhase::Completed, 0), "{case}");
            scene.stop_and_compare(vec![("follower", follower, store)]);
        }
    });
}
