//! Followers that the log cannot bring back: rebuilt from a base and the log beside it, over both transports.
//!
//! What breaks: either side goes away at any moment of a rebuild, records and blocks overtake each other, the leader is
//! quiet, empty or busy, time or log run out. What prevents harm: the target's durable mark, one order of applying and
//! marking, and that nothing counts before the leader has accepted it. Nothing here is timed: tests wait for marks.

// A test may panic, also in the functions that it is made of.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod copying;
mod gates;
mod interruptions;
mod scene;
mod sessions;
mod snapshots;
