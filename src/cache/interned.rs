//! One copy of what many records say alike: most keys of a platform have one of a few sets of rights.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

use quick_cache::sync::Cache;

/// Values that were met before, bounded; those that are met again stay.
pub struct Interned<T> {
    /// By the hash of the value. Two values with one hash merely have a copy each.
    known: Cache<u64, Arc<T>>,
    hasher: RandomState,
}

impl<T: Hash + Eq> Interned<T> {
    /// Knows at most so many.
    pub fn new(max_entries: usize) -> Self {
        Self { known: Cache::new(max_entries), hasher: RandomState::new() }
    }

    /// The copy of this value that others have, or this one, for others to have.
    pub fn share(&self, value: Arc<T>) -> Arc<T> {
        let hash = self.hasher.hash_one(&*value);
        if let Some(known) = self.known.get(&hash)
            && *known == *value
        {
            return known;
        }
        self.known.insert(hash, Arc::clone(&value));
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_become_one_and_others_do_not() {
        let interned = Interned::new(10);
        let share = |text: &str| interned.share(Arc::new(text.to_owned()));
        let (first, same, other) = (share("a"), share("a"), share("b"));
        assert!(Arc::ptr_eq(&first, &same));
        assert_eq!(*other, "b");
    }

    #[test]
    fn it_is_bounded() {
        let interned = Interned::new(100);
        for number in 0..10_000 {
            interned.share(Arc::new(number));
        }
        assert!(interned.known.len() <= 110, "{}", interned.known.len());
    }
}
