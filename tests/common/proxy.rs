//! A TCP proxy between a follower and its leader that does to each connection what a bad network would.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::random::Random;

/// What happens to a connection.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// Bytes go through as they come.
    Calm,
    /// Each piece waits for so long.
    Slow(Duration),
    /// Both sides are cut off after so many bytes of one direction, wherever in a frame that is.
    Cut(u64),
    /// After so many bytes of one direction nothing passes for so long, either way; then it goes on.
    Stall(u64, Duration),
    /// This bit is wrong in one direction: in what comes from the leader, or in what goes to it. The rest goes through.
    Flip(u64, Direction),
    /// Everything that the follower says is said to the leader a second time, on a connection of its own.
    Double,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    FromLeader,
    ToLeader,
}

/// Listens until it is dropped.
pub struct Proxy {
    pub address: String,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: String,
    random: Mutex<Random>,
    is_calm: AtomicBool,
    /// What the next connections meet, before the weather begins.
    planned: Mutex<VecDeque<Fate>>,
    is_over: AtomicBool,
    /// Of connections whose fate was anything but calm, by what it was.
    fates: [AtomicU64; 6],
    open: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// A proxy for the leader at `upstream`, which need not listen yet.
    pub fn start(upstream: &str, random: Random) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            random: Mutex::new(random),
            is_calm: AtomicBool::new(false),
            planned: Mutex::default(),
            is_over: AtomicBool::new(false),
            fates: Default::default(),
            open: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accept(&listener, &accepting));
        Proxy { address, shared }
    }

    /// What the next connections meet, one each; none of those before them is left.
    pub fn plan(&self, fates: impl IntoIterator<Item = Fate>) {
        *self.shared.planned.lock() = fates.into_iter().collect();
    }

    /// Fates that are planned and have not been met.
    pub fn planned(&self) -> usize {
        self.shared.planned.lock().len()
    }

    /// Bad weather, or none: connections that are open are cut, those to come live under the new one.
    pub fn set_calm(&self, calm: bool) {
        self.shared.is_calm.store(calm, Ordering::SeqCst);
        self.cut();
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        for stream in self.shared.open.lock().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// How many connections met each [`Fate`], in its order.
    pub fn fates(&self) -> Vec<u64> {
        self.shared.fates.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(&self.address);
    }
}

impl Shared {
    fn fate(&self) -> Fate {
        let mut random = self.random.lock();
        let bytes = match random.below(3) {
            0 => 1 + random.below(300),
            1 => 300 + random.below(10_000),
            _ => 10_000 + random.below(300_000),
        };
        let planned = self.planned.lock().pop_front();
        let fate = match random.below(10) {
            _ if planned.is_some() => planned.unwrap_or(Fate::Calm),
            _ if self.is_calm.load(Ordering::SeqCst) => Fate::Calm,
            0 => Fate::Calm,
            1 => Fate::Slow(Duration::from_millis(1 + random.below(5))),
            2..5 => Fate::Cut(bytes),
            5 | 6 => Fate::Stall(bytes, Duration::from_millis(500 + random.below(1500))),
            7 | 8 => {
                let direction = [Direction::FromLeader, Direction::ToLeader][random.index(2)];
                Fate::Flip((bytes - 1) * 8 + random.below(8), direction)
            }
            _ => Fate::Double,
        };
        let kind = match fate {
            Fate::Calm => 0,
            Fate::Slow(_) => 1,
            Fate::Cut(_) => 2,
            Fate::Stall(..) => 3,
            Fate::Flip(..) => 4,
            Fate::Double => 5,
        };
        self.fates[kind].fetch_add(1, Ordering::Relaxed);
        fate
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((follower, _)) = listener.accept() {
        if shared.is_over.load(Ordering::SeqCst) {
            return;
        }
        // A leader that is down is a connection that ends at once.
        let Ok(leader) = TcpStream::connect(&shared.upstream) else { continue };
        let fate = shared.fate();
        let double = match fate {
            Fate::Double => TcpStream::connect(&shared.upstream).ok(),
            _ => None,
        };
        let clone = |stream: &TcpStream| {
            let _ = stream.set_nodelay(true);
            stream.try_clone().ok()
        };
        let (Some(from_follower), Some(from_leader)) = (clone(&follower), clone(&leader)) else { continue };
        let mut open = shared.open.lock();
        open.retain(|stream| stream.peer_addr().is_ok());
        open.extend([follower.try_clone(), leader.try_clone()].into_iter().flatten());
        if let Some(double) = &double {
            open.extend(double.try_clone());
            // What the leader answers there is taken and forgotten.
            if let Some(answers) = clone(double) {
                std::thread::spawn(move || drain(answers));
            }
        }
        drop(open);
        let held = Arc::new(Mutex::new(()));
        let other = Arc::clone(&held);
        std::thread::spawn(move || pump(from_follower, leader, double, fate, Direction::ToLeader, &held));
        std::thread::spawn(move || pump(from_leader, follower, None, fate, Direction::FromLeader, &other));
    }
}

fn drain(mut stream: TcpStream) {
    let mut bytes = [0; 4096];
    while matches!(stream.read(&mut bytes), Ok(1..)) {}
}

/// Carries one direction. `held` is what both directions of a connection wait for while it stalls.
fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    mut double: Option<TcpStream>,
    fate: Fate,
    direction: Direction,
    held: &Mutex<()>,
) {
    let mut buffer = [0; 8192];
    let mut passed = 0;
    let mut stalled = false;
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let bytes = &mut buffer[..len];
        let end = passed + len as u64;
        drop(held.lock());
        let mut kept = len;
        match fate {
            Fate::Slow(pause) => std::thread::sleep(pause),
            Fate::Cut(after) if end > after => kept = usize::try_from(after.saturating_sub(passed)).unwrap(),
            Fate::Stall(after, pause) if end > after && direction == Direction::FromLeader && !stalled => {
                stalled = true;
                let _nothing_passes = held.lock();
                std::thread::sleep(pause);
            }
            Fate::Flip(bit, flipped) if flipped == direction && (passed..end).contains(&(bit / 8)) => {
                bytes[usize::try_from(bit / 8 - passed).unwrap()] ^= 1 << (bit % 8);
            }
            _ => {}
        }
        if to.write_all(&bytes[..kept]).is_err() || kept < len {
            break;
        }
        if let Some(other) = &mut double
            && other.write_all(bytes).is_err()
        {
            double = None;
        }
        passed = end;
    }
    for stream in [Some(from), Some(to), double].into_iter().flatten() {
        let _ = stream.shutdown(Shutdown::Both);
    }
}
