//! Rebuilds that nothing interrupts.

use std::sync::Arc;
use std::time::Instant;

use towline::Lsn;
use towline::rebuild::RebuildPhase;
use towline::target::FixedStore;
use towline::transport::InProcessTransport;

use crate::scene::{Load, OPTIONS, PATIENCE, SHARD, Scene, Wire, assert_same, deadline, over_both, reach};

#[test]
fn a_quiet_leader_rebuilds_a_fresh_follower_that_then_goes_on_live_and_by_catch_up() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert_same(&scene.store, &store);
        let progress = follower.rebuild_progress(SHARD).unwrap();
        assert_eq!((progress.phase, progress.applied), (RebuildPhase::Completed, scene.head()));
        assert!(progress.blocks_done > 1000 && progress.blocks_total >= progress.blocks_done, "{progress:?}");
        // Live.
        scene.put(9999, b"live");
        scene.catch_up(&follower);
        assert_eq!(store.get(&9999u64.to_be_bytes()).unwrap().as_deref(), Some(&b"live"[..]));
        // After a restart of its own: no rebuild.
        follower.shutdown().unwrap();
        drop(store);
        for key in 0..100 {
            scene.put(key, b"while it was away");
        }
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        scene.catch_up(&follower);
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Idle);
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn a_follower_is_rebuilt_while_its_leader_puts_and_deletes_at_full_speed() {
    over_both(|wire| {
        let scene = Scene::filled(wire);
        let load = Load::on(&scene);
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        reach(follower.applied(SHARD).unwrap(), Lsn(1));
        let before = scene.head();
        reach(follower.applied(SHARD).unwrap(), before);
        drop(load);
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed);
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn a_follower_that_fell_behind_is_rebuilt_and_its_old_log_replaced() {
    over_both(|wire| {
        let scene = Scene::new(wire);
        for key in 0..10 {
            scene.put(key, b"early");
        }
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        scene.catch_up(&follower);
        follower.shutdown().unwrap();
        drop(store);
        for key in 0..2000 {
            scene.put(key, &[b'b'; 90]);
        }
        scene.trim();
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        scene.catch_up(&follower);
        assert_eq!(follower.rebuild_progress(SHARD).unwrap().phase, RebuildPhase::Completed);
        assert!(follower.log(SHARD).unwrap().tail() > Lsn(1));
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn an_empty_store_is_rebuilt() {
    over_both(|wire| {
        let scene = Scene::new(wire);
        for key in 0..1000 {
            scene.put(key, &[b'a'; 90]);
        }
        for key in 0..1000 {
            scene.delete(key);
        }
        scene.trim();
        let store = scene.open_store("follower");
        let follower = scene.follow("follower", store.clone());
        reach(follower.applied(SHARD).unwrap(), scene.head());
        assert_eq!(store.count().unwrap(), 0);
        let session = || scene.leader.status().shards[0].followers[0].session.unwrap();
        let deadline = Instant::now() + PATIENCE;
        while session().kind != towline::protocol::SessionKind::KeepUp && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(session().kind, towline::protocol::SessionKind::KeepUp, "keep-up follows on the same stream");
        scene.stop_and_compare(vec![("follower", follower, store)]);
    });
}

#[test]
fn several_followers_are_rebuilt_one_after_the_other_where_only_one_may_be() {
    over_both(|wire| {
        let filled = Scene::filled(wire);
        let Scene { directory, store, leader, writer, .. } = filled;
        drop(writer);
        leader.shutdown().unwrap();
        let scene = Scene::with(wire, directory, store, |builder| builder.max_rebuilds(1));
        let load = Load::on(&scene);
        let names = ["one", "two", "three"];
        let stores = names.map(|name| scene.open_store(name));
        let followers: Vec<_> =
            names.iter().zip(&stores).map(|(name, store)| scene.follow(name, store.clone())).collect();
        for follower in &followers {
            reach(follower.applied(SHARD).unwrap(), Lsn(1));
        }
        drop(load);
        let followers = names.into_iter().zip(followers).zip(stores);
        scene.stop_and_compare(followers.map(|((name, follower), store)| (name, follower, store)).collect());
    });
}
#[test]
fn a_leader_without_a_state_of_its_own_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let wire = Wire { transport: Some(Arc::new(InProcessTransport::new())), address: "leader" };
    let leader = wire.node(&directory.path().join("leader")).lead(wire.address).unwrap();
    let mut writer = leader.writer(SHARD).unwrap();
    for _ in 0..100 {
        writer.append(&[7; 2000]).unwrap();
    }
    leader.log(SHARD).unwrap().wait_synced(Lsn(100), deadline()).unwrap();
    assert!(leader.log(SHARD).unwrap().release_through(Lsn(100), "the test says so").unwrap() > 0);
    let store = Arc::new(FixedStore::open(directory.path().join("store"), &OPTIONS).unwrap());
    let follower = wire.node(&directory.path().join("follower")).follow("leader", store).unwrap();
    let error = follower.wait().unwrap_err();
    assert!(error.to_string().contains("no longer retained"), "{error}");
}
