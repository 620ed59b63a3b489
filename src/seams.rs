//! Ways into what is private, for the fuzzing and the simulation of this repository. Not part of the interface: anything
//! here may change or go at any time.

use std::path::Path;

use crate::error::Result;

/// Reads the content of a node's list of followers, and gives it as it would be written again.
///
/// # Errors
///
/// As when a node opens it.
pub fn decode_registry(bytes: &[u8], shards: u16) -> Result<Vec<u8>> {
    crate::registry::decode_and_encode(bytes, Path::new("followers"), shards)
}

/// Reads the header page of a fixed store's shard, and gives the valid copy as it would be written again.
///
/// # Errors
///
/// What is wrong with it, as half a sentence.
pub fn decode_store_header(page: &[u8]) -> Result<Vec<u8>, String> {
    crate::target::fixed_store::decode_header(page)
}

/// Reads a slot of a fixed store for keys and values of up to these lengths, and gives it as it would be written again.
///
/// # Errors
///
/// What is wrong with it, as half a sentence.
pub fn decode_store_slot((key_len, value_len): (u32, u32), slot: u64, bytes: &[u8]) -> Result<Vec<u8>, String> {
    crate::target::fixed_store::decode_slot((key_len, value_len), slot, bytes)
}

/// Reads a record of a fixed store for keys and values of up to these lengths, and gives it as it would be written again.
///
/// # Errors
///
/// What is wrong with it, as half a sentence.
pub fn decode_store_record((key_len, value_len): (u32, u32), bytes: &[u8]) -> Result<Vec<u8>, String> {
    crate::target::fixed_store::decode_record((key_len, value_len), bytes)
}
