//! Bringing a follower back whose log cannot help it any more: a base image and the log after it, at the same time.

pub mod bitmap;

pub use bitmap::BlockBitmap;
