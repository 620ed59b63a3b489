//! Where each key is: from keys to slots, in memory, rebuilt whenever a store is opened.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

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

    /// Puts a key into a slot, unless it is in another one that `stays` says so of: that is looked up once.
    pub(super) fn insert_unless<E>(
        &self,
        key: &[u8],
        slot: u64,
        stays: impl FnOnce(u64) -> Result<bool, E>,
    ) -> Result<(), E> {
        let mut stripe = self.stripe(key).write();
        let entry = stripe.entry(key.into());
        if let Entry::Occupied(there) = &entry
            && (*there.get() == slot || stays(*there.get())?)
        {
            return Ok(());
        }
        entry.insert_entry(slot);
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_goes_to_a_slot_unless_it_stays_in_another() {
        let index = KeyIndex::new();
        let put = |slot, stays: Result<bool, &'static str>| index.insert_unless(b"key", slot, |_| stays);
        put(3, Err("it is in no other")).unwrap();
        put(3, Err("it is in that one")).unwrap();
        assert_eq!(index.get(b"key"), Some(3));
        put(4, Ok(true)).unwrap();
        assert_eq!(index.get(b"key"), Some(3));
        assert_eq!(put(4, Err("cannot say")), Err("cannot say"));
        assert_eq!(index.get(b"key"), Some(3));
        put(4, Ok(false)).unwrap();
        assert_eq!(index.get(b"key"), Some(4));
        assert_eq!(index.entries().len(), 1);
    }
}
