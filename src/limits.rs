//! Bounds of formats, peers and settings, each checked against the others when the crate is compiled. Those of a
//! store's files stand with their format, and what was tuned by measuring beside its use.

/// Bytes of a page: segment headers take one, so that batches begin at a page and the header's page stays clean.
pub const PAGE_LEN: u64 = 4096;
/// Bytes before the first batch of a segment.
pub const SEGMENT_HEADER_LEN: u64 = PAGE_LEN;
/// Bytes of a batch header that says everything.
pub const BATCH_HEADER_LEN: u64 = 56;
/// Bytes of the header of a compact batch.
pub const COMPACT_HEADER_LEN: u64 = 16;
/// Bytes of the longest record that a compact batch can have.
pub const MAX_COMPACT_RECORD_LEN: u64 = 4095;
/// The first LSN of a segment and that of a compact batch in it differ by less than this.
pub const COMPACT_LSNS: u64 = 1 << 26;
/// Batches begin at multiples of this many bytes.
pub const BATCH_ALIGNMENT: u64 = 8;
/// Bytes before each record: its length.
pub const RECORD_HEADER_LEN: u64 = 4;
/// Smallest segment.
pub const MIN_SEGMENT_SIZE: u64 = 64 * 1024;
/// Largest segment: every offset in one fits in 32 bits, and a 32-bit process can map it.
pub const MAX_SEGMENT_SIZE: u64 = 1024 * 1024 * 1024;
/// Segment size unless asked otherwise. An idle shard keeps three such files beside its sealed ones: the open one and
/// two spares.
pub const DEFAULT_SEGMENT_SIZE: u64 = 16 * 1024 * 1024;
/// Bytes of segments that a shard keeps at most, unless asked otherwise: enough for a follower that is away for a
/// while, small enough for a small disk.
pub const DEFAULT_MAX_WAL_BYTES: u64 = 1024 * 1024 * 1024;
/// Bytes of segments that a shard keeps although nobody needs them, unless asked otherwise: a follower that comes back
/// from a crash may have forgotten some of what it had acknowledged as applied.
pub const DEFAULT_MIN_WAL_BYTES: u64 = 128 * 1024 * 1024;
/// Threads that check a log's segments while it is opened, on as many processors.
pub const MAX_WALKING_THREADS: usize = 8;
/// Shards of one node.
pub const MAX_SHARDS: u16 = 1024;

/// Bytes of a frame header.
pub const FRAME_HEADER_LEN: usize = 16;
/// Log bytes in one `WalData` frame. Large enough to amortise a system call, small enough that heartbeats and acks
/// never wait long behind one.
pub const MAX_WAL_DATA_LEN: u32 = 1024 * 1024;
/// Where more log waits to be sent than a frame has room for, and that is more than this, the frame ends at a multiple
/// of this in its segment. Who receives it takes in as much at a time: file systems keep what is written in aligned
/// pieces, and large ones are cheaper.
pub(crate) const LOG_PIECE_LEN: u64 = 256 * 1024;
/// Base bytes in one `BaseData` frame, and so in one block: a mebibyte of value, and what a target keeps with it.
pub const MAX_BASE_DATA_LEN: u32 = 1024 * 1024 + 16 * 1024;
/// Base bytes that are sent between two looks at the log, unless one block is larger.
pub const BASE_RUN_LEN: u32 = 256 * 1024;
/// Rebuilds that a node serves at a time, unless asked otherwise.
pub const DEFAULT_REBUILDS: usize = 2;
/// Segment bytes in one `Segment` frame: a segment that is sent as a whole comes in pieces of at most this many bytes.
pub const MAX_SEGMENT_PIECE_LEN: u32 = 1024 * 1024;
/// Any frame other than log, base or segment data and status.
pub const MAX_CONTROL_LEN: u32 = 4096;
/// A `Status` reply.
pub const MAX_STATUS_LEN: u32 = 1024 * 1024;
/// Text in an `Error` frame.
pub const MAX_ERROR_TEXT_LEN: usize = 1024;
/// Bytes that a TCP receiver reads ahead: frame headers and small frames arrive through this buffer, many with one
/// system call; bodies that are larger go straight to the memory that the caller chooses.
pub const RECEIVE_BUFFER_LEN: usize = 16 * 1024;
/// The same on a stream on which little comes.
pub const QUIET_RECEIVE_BUFFER_LEN: usize = 512;
/// Epochs of a log's history that a follower is told whose log is another one: more than anybody misses.
pub const MAX_EPOCH_ENDS: usize = 50;
/// Frames that an in-process stream holds before its sender waits.
pub const MAX_IN_PROCESS_FRAMES: usize = 64;
/// Connections that wait to be accepted.
pub const MAX_PENDING_CONNECTIONS: u16 = 128;
/// How long a segment that is sent by hand waits for a connection, and then for each byte of the answer, in
/// milliseconds.
pub const SEGMENT_TIMEOUT_MS: u64 = 30_000;
/// Connections that a node keeps open at a time.
pub const MAX_CONNECTIONS: usize = 4096;
/// Connections that have not said what they want yet, at a time.
pub const MAX_HANDSHAKES: usize = 256;
/// The longest that a peer's word about its heartbeats makes this side wait for a byte, in milliseconds.
pub const MAX_PATIENCE_MS: u32 = 60 * 60 * 1000;
/// Places of damage that are remembered of an open log.
pub const MAX_FINDINGS: usize = 64;
/// Places of a log that are remembered while it is written: they reach back 256 MiB, which is how far a writer on two
/// processors gets ahead of its follower within a tenth of a second or two, and take 32 KiB.
pub const MAX_LANDMARKS: usize = 2048;
/// Followers that can be waited for.
pub const MAX_FOLLOWERS: usize = 64;

/// A small bound as an index, for constants: fails to compile where it would not fit.
#[allow(clippy::cast_possible_truncation, reason = "checked to fit in 32 bits, and no supported system has fewer")]
pub(crate) const fn index(bound: u64) -> usize {
    assert!(bound <= u32::MAX as u64);
    bound as usize
}

/// The largest record that fits in a segment of `segment_size` bytes, beside the segment header, its batch header,
/// its length and the sealing batch.
#[must_use]
pub const fn max_record_len(segment_size: u64) -> u64 {
    segment_size - SEGMENT_HEADER_LEN - 2 * BATCH_HEADER_LEN - RECORD_HEADER_LEN
}

const _: () = assert!(DEFAULT_MIN_WAL_BYTES < DEFAULT_MAX_WAL_BYTES);
const _: () = assert!(SEGMENT_HEADER_LEN.is_multiple_of(BATCH_ALIGNMENT));
const _: () = assert!(BATCH_HEADER_LEN.is_multiple_of(BATCH_ALIGNMENT));
const _: () = assert!(COMPACT_HEADER_LEN.is_multiple_of(BATCH_ALIGNMENT));
const _: () = assert!(MIN_SEGMENT_SIZE.is_multiple_of(PAGE_LEN), "segments are whole pages");
const _: () = assert!(MIN_SEGMENT_SIZE > 2 * SEGMENT_HEADER_LEN, "a segment has room for batches");
const _: () = assert!(MAX_SEGMENT_SIZE <= u32::MAX as u64, "offsets and record lengths fit in 32 bits");
const _: () = assert!(FRAME_HEADER_LEN < QUIET_RECEIVE_BUFFER_LEN, "a header is buffered whole");
const _: () = assert!(QUIET_RECEIVE_BUFFER_LEN < RECEIVE_BUFFER_LEN);
const _: () = assert!(MAX_CONTROL_LEN as usize + FRAME_HEADER_LEN <= RECEIVE_BUFFER_LEN, "a message is buffered whole");
const _: () = assert!(MAX_ERROR_TEXT_LEN + 64 < MAX_CONTROL_LEN as usize, "an error fits in a control frame");
