//! Where each key is: from keys to slots, in memory, rebuilt whenever a store is opened.

use std::collections::HashMap;

use parking_lot::RwLock;

use crate::target::router::hash;

/// Stripes, each with a lock of its own that is held for one look-up or one change.
const STRIPES: usize = 64;

type Stripe = RwLock<HashMap<Box<[u8]>, u64>>;

/// Keys and their slots. One thread changes it; any number look things up.
pub(super) struct KeyIndex {
    stripes: [Stripe; STRIPES],
}

impl KeyIndex {
    pub(super) fn new() -> KeyIndex {
        KeyIndex { stripes: std::array::from_fn(|_| Stripe::default()) }
    }

    #[inline]
    pub(super) fn get(&self, key: &[u8]) -> Option<u64> {
        self.stripe(key).read().get(key).copied()
    }

    pub(super) fn insert(&self, key: &[u8], slot: u64) {
        self.stripe(key).write().insert(key.into(), slot);
    }

    pub(super) fn remove(&self, key: &[u8]) {
        self.stripe(key).write().remove(key);
    }

    pub(super) fn clear(&self) {
        for stripe in &self.stripes {
            *stripe.write() = HashMap::new();
        }
    }

    /// Takes what another one has found for what is here.
    pub(super) fn replace_by(&self, other: KeyIndex) {
        for (stripe, found) in self.stripes.iter().zip(other.stripes) {
            *stripe.write() = found.into_inner();
        }
    }

    /// Every key with its slot, in order.
    pub(super) fn entries(&self) -> std::collections::BTreeMap<Box<[u8]>, u64> {
        let of = |stripe: &Stripe| stripe.read().iter().map(|(key, slot)| (key.clone(), *slot)).collect::<Vec<_>>();
        self.stripes.iter().flat_map(of).collect()
    }

    /// Routing uses the upper bits of the hash, so the lower ones still differ within a shard.
    #[inline]
    fn stripe(&self, key: &[u8]) -> &Stripe {
        #[allow(clippy::cast_possible_truncation, reason = "the remainder is all that counts")]
        &self.stripes[hash(key) as usize % STRIPES]
    }
}
