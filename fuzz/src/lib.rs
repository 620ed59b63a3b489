//! The decoders of Towline as functions of arbitrary bytes: those that `tests/corpus.rs` of the crate itself runs too,
//! and which lie there, so that its tests need nothing of this crate.

#[path = "../../tests/common/decoders.rs"]
mod decoders;

pub use decoders::*;
