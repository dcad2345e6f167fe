//! The memory tier for records: prefix to candidates, and prefixes known to be absent.
//!
//! An entry carries its own end, counted from the moment its query *started*; use never extends it. Absent prefixes
//! live in a map of their own, so that a flood of made-up prefixes evicts other made-up prefixes and no real key.
//! A fill that began before an invalidation can't undo it: see [`RecordCache::begin_fill`].

use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quick_cache::sync::Cache;

use super::Lookup;
use crate::domain::key::KeyPrefix;
use crate::domain::record::{Candidate, KeyId, UserId};
use crate::domain::time::Instant;

/// Invalidations of one prefix bump one of so many epochs; prefixes that share one merely lose a fill.
const EPOCH_SHARDS: usize = 64;

/// The candidates of one prefix, parsed.
#[derive(Debug)]
pub struct Records {
    /// In the order of their ids, at least one.
    pub candidates: Vec<Arc<Candidate>>,
    /// From then on they have to be read again.
    pub usable_until: Instant,
}

/// Prefix to candidates, bounded.
pub struct RecordCache {
    /// Found in the store; at most `max_entries`.
    present: Cache<KeyPrefix, Arc<Records>>,
    /// Known not to exist, until then; at most `max_entries`.
    absent: Cache<KeyPrefix, Instant>,
    /// How often each shard was invalidated. Held while an entry goes in or out, never across an await.
    epochs: [Mutex<u64>; EPOCH_SHARDS],
    hasher: std::hash::RandomState,
}

/// Taken before a query starts; a fill with it is dropped if its prefix was invalidated since.
#[derive(Debug)]
pub struct FillTicket {
    epoch: u64,
}

impl RecordCache {
    /// Holds at most `max_entries` prefixes of each kind.
    pub fn new(max_entries: usize) -> Self {
        Self {
            present: Cache::new(max_entries),
            absent: Cache::new(max_entries),
            epochs: std::array::from_fn(|_| Mutex::new(0)),
            hasher: std::hash::RandomState::new(),
        }
    }

    /// What is known of a prefix at this moment.
    pub fn get(&self, prefix: &str, now: Instant) -> Lookup<Arc<Records>> {
        if let Some(records) = self.present.get(prefix)
            && now < records.usable_until
        {
            return Lookup::Hit(records);
        }
        match self.absent.get(prefix) {
            Some(until) if now < until => Lookup::Absent,
            _ => Lookup::Miss,
        }
    }

    /// To be called before the query that is to fill the prefix.
    pub fn begin_fill(&self, prefix: &KeyPrefix) -> FillTicket {
        FillTicket { epoch: *self.epoch(prefix) }
    }

    /// Remembers what a query found, unless the prefix was invalidated since the ticket was taken.
    pub fn fill(&self, prefix: KeyPrefix, ticket: &FillTicket, records: Arc<Records>) {
        let epoch = self.epoch(&prefix);
        if *epoch == ticket.epoch {
            self.absent.remove(&prefix);
            self.present.insert(prefix, records);
        }
    }

    /// Remembers that a query found nothing.
    pub fn fill_absent(&self, prefix: KeyPrefix, ticket: &FillTicket, until: Instant) {
        let epoch = self.epoch(&prefix);
        if *epoch == ticket.epoch {
            self.present.remove(&prefix);
            self.absent.insert(prefix, until);
        }
    }

    /// Forgets one prefix, and any fill of it that is under way.
    pub fn invalidate(&self, prefix: &KeyPrefix) {
        let mut epoch = self.epoch(prefix);
        *epoch = epoch.wrapping_add(1);
        self.present.remove(prefix);
        self.absent.remove(prefix);
    }

    /// Forgets every prefix that has this key among its candidates.
    pub fn invalidate_key(&self, id: KeyId) {
        self.invalidate_where(|candidate| candidate.key.id == id);
    }

    /// Forgets every prefix that has a key of this user among its candidates.
    pub fn invalidate_user(&self, id: UserId) {
        self.invalidate_where(|candidate| candidate.owner.id == Some(id));
    }

    /// Forgets everything, and every fill that is under way.
    pub fn clear(&self) {
        let _guards = self.bump_all();
        self.present.clear();
        self.absent.clear();
    }

    /// Prefixes remembered: present, absent.
    pub fn len(&self) -> (usize, usize) {
        (self.present.len(), self.absent.len())
    }

    fn invalidate_where(&self, affected: impl Fn(&Candidate) -> bool) {
        // A fill under way may hold such a candidate under any prefix.
        let _guards = self.bump_all();
        self.present.retain(|_, records| !records.candidates.iter().any(|candidate| affected(candidate)));
    }

    /// Locks the shards in their order, the only place that holds more than one.
    fn bump_all(&self) -> Vec<MutexGuard<'_, u64>> {
        let bump = |shard| {
            let mut epoch = lock(shard);
            *epoch = epoch.wrapping_add(1);
            epoch
        };
        self.epochs.iter().map(bump).collect()
    }

    fn epoch(&self, prefix: &KeyPrefix) -> MutexGuard<'_, u64> {
        let shards = u64::try_from(EPOCH_SHARDS).unwrap_or(1);
        let shard = usize::try_from(self.hasher.hash_one(prefix.as_str()) % shards).unwrap_or(0);
        #[allow(clippy::indexing_slicing, reason = "a remainder of the array's own length")]
        lock(&self.epochs[shard])
    }
}

/// A counter can't be left half-changed, so a panic elsewhere does not matter to it.
fn lock(epoch: &Mutex<u64>) -> MutexGuard<'_, u64> {
    epoch.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::row::CandidateRow;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn prefix(text: &str) -> KeyPrefix {
        KeyPrefix::new(text).unwrap()
    }

    fn records(until: u64) -> Arc<Records> {
        let candidate = Candidate::from_row(&CandidateRow::sample("sha256:00"));
        Arc::new(Records { candidates: vec![Arc::new(candidate)], usable_until: at(until) })
    }

    fn filled(cache: &RecordCache, name: &str, until: u64) {
        let ticket = cache.begin_fill(&prefix(name));
        cache.fill(prefix(name), &ticket, records(until));
    }

    #[test]
    fn an_entry_ends_at_its_time_however_often_it_is_used() {
        let cache = RecordCache::new(100);
        filled(&cache, "kw_aaaaa", 10);
        for second in 0..10 {
            assert!(matches!(cache.get("kw_aaaaa", at(second)), Lookup::Hit(_)));
        }
        assert!(matches!(cache.get("kw_aaaaa", at(10)), Lookup::Miss));
    }

    #[test]
    fn absent_is_not_miss_and_ends_too() {
        let cache = RecordCache::new(100);
        let ticket = cache.begin_fill(&prefix("kw_aaaaa"));
        cache.fill_absent(prefix("kw_aaaaa"), &ticket, at(2));
        assert!(matches!(cache.get("kw_aaaaa", at(1)), Lookup::Absent));
        assert!(matches!(cache.get("kw_aaaaa", at(2)), Lookup::Miss));
        assert!(matches!(cache.get("kw_bbbbb", at(1)), Lookup::Miss));
    }

    #[test]
    fn a_fill_that_began_before_an_invalidation_is_dropped() {
        type Invalidate = fn(&RecordCache);
        let ways: [Invalidate; 4] = [
            |cache| cache.invalidate(&prefix("kw_aaaaa")),
            |cache| cache.invalidate_key(KeyId::new(7)),
            |cache| cache.invalidate_user(UserId::new(3)),
            RecordCache::clear,
        ];
        for invalidate in ways {
            let cache = RecordCache::new(100);
            let ticket = cache.begin_fill(&prefix("kw_aaaaa"));
            invalidate(&cache);
            cache.fill(prefix("kw_aaaaa"), &ticket, records(10));
            cache.fill_absent(prefix("kw_aaaaa"), &ticket, at(10));
            assert!(matches!(cache.get("kw_aaaaa", at(1)), Lookup::Miss));
        }
    }

    #[test]
    fn invalidation_by_key_and_user_finds_the_prefix() {
        let cache = RecordCache::new(100);
        filled(&cache, "kw_aaaaa", 10);
        cache.invalidate_key(KeyId::new(8));
        cache.invalidate_user(UserId::new(4));
        assert!(matches!(cache.get("kw_aaaaa", at(1)), Lookup::Hit(_)));
        cache.invalidate_user(UserId::new(3));
        assert!(matches!(cache.get("kw_aaaaa", at(1)), Lookup::Miss));
    }

    #[test]
    fn junk_neither_grows_the_cache_nor_evicts_real_keys() {
        let cache = RecordCache::new(1_000);
        filled(&cache, "kw_aaaaa", 10);
        for number in 0..50_000 {
            let junk = prefix(&format!("j{number:07}"));
            let ticket = cache.begin_fill(&junk);
            cache.fill_absent(junk, &ticket, at(10));
        }
        let (present, absent) = cache.len();
        assert_eq!(present, 1);
        assert!(absent <= 1_000, "{absent}");
        assert!(matches!(cache.get("kw_aaaaa", at(1)), Lookup::Hit(_)));
    }
}
