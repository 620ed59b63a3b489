use super::*;
use crate::commit::Commit;
use crate::transport::{FrameSender, InProcessTransport, Transport};
use crate::types::{Chain, ClusterId, NodeId, RegionId, ShardId};
use crate::wal::{ChainCursor, LogIdentity, LogWriter, Wal, WalOptions};
use crate::wire::Heartbeat;

const IDENTITY: LogIdentity =
    LogIdentity { cluster: ClusterId(7), region: RegionId(1), shard: ShardId(2), segment_size: 1 << 20 };
const SESSION: SessionId = SessionId(9);
const EPOCH: Epoch = Epoch(3);
const BEAT: Heartbeat =
    Heartbeat { epoch: EPOCH, head: Lsn::ZERO, committed: Lsn::ZERO, chain: Chain(0), sent_unix_ms: 0 };
const RECEIVED: AckLevel = AckLevel::Received;

/// A reader, and the follower at the other end of its stream.
struct Scene {
    reader: Arc<AckReader>,
    commits: Arc<Commits>,
    writer: LogWriter,
    follower: Option<Box<dyn FrameSender>>,
    over: ShutdownSignal,
    _wal: Wal,
    _directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        Scene::lending_for(Duration::from_secs(60))
    }

    fn lending_for(lent_for: Duration) -> Scene {
        let directory = tempfile::tempdir().unwrap();
        let (wal, mut writer) = Wal::open(directory.path(), IDENTITY, WalOptions::default()).unwrap();
        writer.set_epoch(EPOCH).unwrap();
        let log = Arc::clone(wal.log());
        let commits = Arc::new(Commits::new(Arc::clone(&log), Commit::SYNCED));
        let over = ShutdownSignal::new();
        let marks = commits.acknowledged().follower(NodeId(1), &over).unwrap();
        commits.acknowledged().stream_begins(&marks, 1, false, [Lsn::ZERO; 3], 0);
        let transport = InProcessTransport::new();
        let listener = transport.listen("leader").unwrap();
        let follower = transport.connect("leader", Duration::from_secs(1)).unwrap().sender;
        let here = listener.accept().unwrap();
        let of = AckStream {
            peer: "the follower".to_owned(),
            session: SESSION,
            epoch: EPOCH,
            number: 1,
            follower: marks,
            log: Arc::clone(&log),
            commits: Arc::clone(&commits),
            history: Arc::new(HistoryCheck::new(ChainCursor::unplaced(log))),
            over: over.clone(),
            superseded: ShutdownSignal::new(),
            patience: Duration::from_secs(10),
            timeout: Duration::from_secs(60),
            lent_for,
        };
        let reader = Arc::new(AckReader::new(of, here.receiver));
        Scene { reader, commits, writer, follower: Some(follower), over, _wal: wal, _directory: directory }
    }

    /// Appends a record, and gives the acknowledgement of it.
    fn append(&mut self) -> Ack {
        let lsn = self.writer.append(b"a record").unwrap();
        let chain = self.writer.end().chain;
        Ack { received: lsn, durable: Lsn::ZERO, applied: Lsn::ZERO, chain, epoch: EPOCH, session: SESSION }
    }

    fn send(&mut self, message: &Message) {
        self.follower.as_mut().unwrap().send_message(message).unwrap();
    }

    /// Has the stream's thread lend the lane, for something that somebody has asked for.
    fn lend<'a>(&mut self, lane: &mut MutexGuard<'a, Lane>) -> (Lent, Ack) {
        let ack = self.append();
        self.reader.ask(&self.commits.waits().begin(), RECEIVED, ack.received);
        let lent = self.reader.lends_after(lane, &ack).expect("it is not lent");
        self.reader.take_in(&ack).unwrap();
        (lent, ack)
    }

    /// What is done while the lane is lent, and then what the stream's thread was told, and what it reads next.
    fn while_lent(&mut self, meanwhile: impl FnOnce(&mut Scene) + Send) -> (Vec<Ack>, Result<FrameHeader>) {
        let reader = Arc::clone(&self.reader);
        let mut lane = reader.lane();
        let (lent, first) = self.lend(&mut lane);
        let mut told = Vec::new();
        let mut lane = std::thread::scope(|scope| {
            // Not the thread that holds the lane.
            let doing = scope.spawn(|| {
                drop(reader.lane());
                meanwhile(self);
            });
            let tell = |ack| {
                // What the host calls may wait for who reads meanwhile.
                assert!(reader.untold.try_lock_for(Duration::from_secs(10)).is_some(), "told under a lock");
                told.push(ack);
            };
            let lane = reader.leave(lane, &lent, first, tell);
            drop(lane);
            doing.join().unwrap();
            reader.lane()
        });
        assert_eq!(told.remove(0), first);
        if let Some(receiver) = &mut lane.receiver {
            receiver.set_timeout(Some(Duration::from_millis(1))).unwrap();
        }
        (told, lane.header())
    }

    /// Borrows until the follower has received `lsn`.
    fn borrow(&self, lsn: Lsn, deadline: Option<Instant>) -> bool {
        let wait = self.commits.waits().begin();
        assert!(wait.is_alone);
        self.reader.borrow(|| self.reader.has(RECEIVED, lsn), WaitStrategy::Park, deadline)
    }
}

#[test]
fn the_lane_is_lent_for_what_who_waits_alone_has_asked_for() {
    let mut scene = Scene::new();
    let reader = Arc::clone(&scene.reader);
    let mut lane = reader.lane();
    let [first, second, third] = [scene.append(), scene.append(), scene.append()];
    let mut lends = |ack: &Ack| reader.lends_after(&mut lane, ack).is_some();
    assert!(!lends(&first), "nobody has asked");
    let waits = scene.commits.waits();
    let wait = waits.begin();
    assert!(wait.is_alone && !waits.begin().is_alone);
    // That one has come and gone; who asked before it is not known to be alone.
    reader.ask(&wait, RECEIVED, second.received);
    assert!(!lends(&second));
    drop(wait);
    reader.ask(&waits.begin(), RECEIVED, second.received);
    assert!(!lends(&first), "it waits for more");
    assert!(!lends(&Ack { durable: second.received, ..first }));
    assert_eq!(lends(&second), cfg!(unix));
    assert!(!lends(&third), "asked once, lent once");
    assert_eq!(reader.is_lent.load(Ordering::SeqCst), cfg!(unix));
    reader.recall_if_lent();
    assert_eq!(reader.recalled.load(), Lsn(u64::from(cfg!(unix))));
    drop(lane);
    assert!(reader.close().is_some() && reader.close().is_none());
    reader.recall_if_lent();
    assert_eq!(reader.recalled.load(), Lsn(u64::from(cfg!(unix))), "nothing to be recalled");
}

#[cfg(unix)]
#[test]
fn a_borrower_reads_until_it_has_what_it_waits_for() {
    let mut scene = Scene::new();
    let (mut told, mut expected) = (Vec::new(), Vec::new());
    for strategy in [WaitStrategy::Park, WaitStrategy::SpinThenPark { spins: 1000 }, WaitStrategy::Spin] {
        let (more, next) = scene.while_lent(|scene| {
            for _ in 0..3 {
                let [first, second] = [scene.append(), scene.append()];
                scene.send(&Message::Ack(first));
                scene.send(&Message::Ack(second));
                let has_second = || scene.reader.has(RECEIVED, second.received);
                assert!(scene.reader.borrow(has_second, strategy, None), "{strategy:?}");
                expected.push(second.received);
            }
            assert!(scene.reader.is_lent.load(Ordering::SeqCst), "it stays lent");
            scene.reader.recall_if_lent();
        });
        told.extend(more);
        assert!(next.unwrap_err().is_timeout(), "nothing is left");
    }
    // The newest, each time that the stream's thread wakes up.
    assert!(!told.is_empty() && told.iter().all(|ack| expected.contains(&ack.received)));
    assert_eq!(told.last().map(|ack| ack.received), expected.last().copied());
}

#[cfg(unix)]
#[test]
fn what_is_not_for_borrowers_is_left_to_the_streams_thread() {
    let mut scene = Scene::new();
    // Another word than an acknowledgement.
    let (told, next) = scene.while_lent(|scene| {
        let ack = scene.append();
        scene.send(&Message::Heartbeat(BEAT));
        scene.send(&Message::Ack(ack));
        assert!(!scene.borrow(ack.received, None));
    });
    assert!(told.is_empty() && next.unwrap().kind == FrameKind::Heartbeat);
    let reader = Arc::clone(&scene.reader);
    let receive = || reader.lane().receiver().unwrap().receive_message();
    assert!(matches!(receive().unwrap(), Message::Heartbeat(_)));
    assert!(matches!(receive().unwrap(), Message::Ack(_)));
    // Nothing at all; and no time.
    let (_, next) = scene.while_lent(|scene| assert!(!scene.borrow(Lsn(1000), None)));
    assert!(next.unwrap_err().is_timeout());
    let (_, next) = scene.while_lent(|scene| {
        let ack = scene.append();
        scene.send(&Message::Ack(ack));
        assert!(!scene.borrow(ack.received, Some(Instant::now() + LEAST_TIME / 2)));
    });
    assert_eq!(next.unwrap().kind, FrameKind::Ack);
    receive().unwrap();
    // An acknowledgement that cannot be.
    let (_, next) = scene.while_lent(|scene| {
        let ack = scene.append();
        scene.send(&Message::Ack(Ack { session: SessionId(1), ..ack }));
        assert!(!scene.borrow(ack.received, None));
    });
    assert!(next.unwrap_err().to_string().contains("session 1"));
    // The end.
    let (_, next) = scene.while_lent(|scene| {
        scene.follower = None;
        assert!(!scene.borrow(Lsn(1000), None));
    });
    assert!(crate::transport::is_closed_by_peer(&next.unwrap_err()));
}

#[cfg(unix)]
#[test]
fn the_lane_comes_back_by_itself_and_when_the_stream_is_over() {
    let mut scene = Scene::lending_for(Duration::from_millis(1));
    let (told, _) = scene.while_lent(|_| {});
    assert!(told.is_empty(), "nobody used it");
    assert!(!scene.reader.is_lent.load(Ordering::SeqCst));
    assert!(!scene.borrow(Lsn(1000), None), "it is not lent");
    // Used all the time, and back all the same.
    let (_, next) = scene.while_lent(|scene| {
        scene.over.shutdown();
        while scene.reader.is_lent.load(Ordering::SeqCst) {
            scene.reader.is_used.store(true, Ordering::Relaxed);
            std::thread::yield_now();
        }
    });
    assert!(next.unwrap_err().is_timeout());
    scene.reader.close();
    scene.reader.is_lent.store(true, Ordering::SeqCst);
    assert!(!scene.borrow(Lsn(1000), None), "there is nothing to read from any more");
}

#[cfg(unix)]
#[test]
fn an_acknowledgement_ahead_of_the_log_is_left_to_the_streams_thread() {
    let mut scene = Scene::new();
    let began = Instant::now();
    let (_, next) = scene.while_lent(|scene| {
        let ack = scene.append();
        scene.send(&Message::Ack(Ack { received: ack.received.next(), ..ack }));
        // The record before has not been acknowledged, and it may be this thread that appends the next.
        assert!(!scene.borrow(ack.received, None));
    });
    assert!(next.unwrap_err().is_timeout());
    assert!(began.elapsed() < scene.reader.of.patience / 2, "it waited for what it appends itself");
}

#[test]
fn of_those_who_wait_at_once_only_the_first_is_alone() {
    let waits = Waits { counts: AtomicU64::new(u64::MAX / BEGUN * BEGUN) };
    let (first, second) = (waits.begin(), waits.begin());
    assert!(first.is_alone && !second.is_alone);
    assert!((first.number, second.number) == (0, 1) && waits.begun() == 1, "also where the count starts again");
    drop(first);
    assert!(!waits.begin().is_alone);
    drop(second);
    assert!(waits.begin().is_alone && waits.begun() == 3);
}

#[cfg(unix)]
#[test]
fn who_finds_there_what_it_waits_for_does_not_keep_the_lane() {
    let mut scene = Scene::new();
    let (_, next) = scene.while_lent(|scene| {
        scene.reader.is_used.store(false, Ordering::Relaxed);
        // Of two followers it is the other one, say, that has not got it.
        assert!(scene.borrow(scene.writer.end().head, None));
        assert!(!scene.reader.is_used.load(Ordering::Relaxed));
        scene.reader.recall_if_lent();
    });
    assert!(next.unwrap_err().is_timeout());
}

#[test]
fn nothing_is_lent_while_the_follower_does_not_count() {
    let mut scene = Scene::new();
    let reader = Arc::clone(&scene.reader);
    let ack = scene.append();
    scene.reader.follower().set_counts(false);
    reader.ask(&scene.commits.waits().begin(), RECEIVED, ack.received);
    assert!(reader.lends_after(&mut reader.lane(), &ack).is_none());
}
