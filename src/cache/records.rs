//! The memory tier for records: prefix to candidates, and prefixes known to be absent.
//!
//! An entry carries what proves it ([`Known`]), counted from the moment its query *started*; use never extends it.
//! Absent prefixes live in a map of their own, so that a flood of made-up prefixes evicts other made-up prefixes and no
//! real key. A fill that began before an invalidation can't undo it: see [`RecordCache::begin_fill`].

use std::collections::HashSet;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quick_cache::sync::Cache;

use crate::domain::freshness::coverage::{Known, Standing, View};
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
    /// Since when and by what they are known to be true.
    pub known: Known,
    /// From then on they have to be read again, whatever is proven.
    pub read_again_at: Instant,
}

/// What memory knows of a prefix.
#[derive(Debug)]
pub enum Remembered {
    /// To be used as they are.
    Fresh(Arc<Records>),
    /// To be read again; where that can't be done, they may still allow.
    Suspect(Arc<Records>),
    /// The store has none.
    Absent,
    /// Nothing that may be used.
    Unknown,
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

/// Taken before a query starts; a fill with it is dropped if its prefix was invalidated since. Two tickets of a prefix
/// are equal if nothing was invalidated between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

    /// What is known of a prefix at this moment. The view has to be older than this call.
    pub fn get(&self, prefix: &str, view: &View, now: Instant) -> Remembered {
        if let Some(records) = self.present.get(prefix) {
            match view.standing(&records.known, now) {
                Standing::Fresh if now < records.read_again_at => return Remembered::Fresh(records),
                Standing::Fresh | Standing::Suspect => return Remembered::Suspect(records),
                Standing::Expired => {}
            }
        }
        match self.absent.get(prefix) {
            Some(until) if now < until => Remembered::Absent,
            _ => Remembered::Unknown,
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

    /// Forgets every prefix that has a key of one of these users among its candidates.
    pub fn invalidate_users(&self, ids: &HashSet<UserId>) {
        // A key whose owner was missing may have one of them now.
        self.invalidate_where(|candidate| candidate.owner.id.is_none_or(|id| ids.contains(&id)));
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

    /// Most prefixes remembered of each kind.
    pub fn max_entries(&self) -> u64 {
        self.present.capacity()
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
    use crate::domain::freshness::coverage::{Coverage, Limits};
    use crate::domain::row::CandidateRow;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn prefix(text: &str) -> KeyPrefix {
        KeyPrefix::new(text).unwrap()
    }

    const LIMITS: Limits = Limits { window: Duration::from_secs(20), outage: Duration::from_secs(50) };

    /// Read at the start of time.
    fn records(read_again_at: u64) -> Arc<Records> {
        let candidate = Arc::new(Candidate::from_row(&CandidateRow::sample("sha256:00")));
        let known = Known::uncovered(at(0));
        Arc::new(Records { candidates: vec![candidate], known, read_again_at: at(read_again_at) })
    }

    fn get(cache: &RecordCache, name: &str, now: Instant) -> Remembered {
        cache.get(name, &Coverage::new(1).view(LIMITS), now)
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
            assert!(matches!(get(&cache, "kw_aaaaa", at(second)), Remembered::Fresh(_)));
        }
        assert!(matches!(get(&cache, "kw_aaaaa", at(10)), Remembered::Suspect(_)));
    }

    #[test]
    fn an_entry_that_nothing_proves_is_suspect_and_then_gone() {
        let cache = RecordCache::new(100);
        filled(&cache, "kw_aaaaa", 300);
        assert!(matches!(get(&cache, "kw_aaaaa", at(20)), Remembered::Fresh(_)));
        assert!(matches!(get(&cache, "kw_aaaaa", at(21)), Remembered::Suspect(_)));
        assert!(matches!(get(&cache, "kw_aaaaa", at(50)), Remembered::Suspect(_)));
        assert!(matches!(get(&cache, "kw_aaaaa", at(51)), Remembered::Unknown));
    }

    #[test]
    fn absent_is_not_miss_and_ends_too() {
        let cache = RecordCache::new(100);
        let ticket = cache.begin_fill(&prefix("kw_aaaaa"));
        cache.fill_absent(prefix("kw_aaaaa"), &ticket, at(2));
        assert!(matches!(get(&cache, "kw_aaaaa", at(1)), Remembered::Absent));
        assert!(matches!(get(&cache, "kw_aaaaa", at(2)), Remembered::Unknown));
        assert!(matches!(get(&cache, "kw_bbbbb", at(1)), Remembered::Unknown));
    }

    #[test]
    fn a_fill_that_began_before_an_invalidation_is_dropped() {
        type Invalidate = fn(&RecordCache);
        let ways: [Invalidate; 4] = [
            |cache| cache.invalidate(&prefix("kw_aaaaa")),
            |cache| cache.invalidate_key(KeyId::new(7)),
            |cache| cache.invalidate_users(&HashSet::from([UserId::new(3)])),
            RecordCache::clear,
        ];
        for invalidate in ways {
            let cache = RecordCache::new(100);
            let ticket = cache.begin_fill(&prefix("kw_aaaaa"));
            invalidate(&cache);
            cache.fill(prefix("kw_aaaaa"), &ticket, records(10));
            cache.fill_absent(prefix("kw_aaaaa"), &ticket, at(10));
            assert!(matches!(get(&cache, "kw_aaaaa", at(1)), Remembered::Unknown));
        }
    }

    #[test]
    fn invalidation_by_key_and_user_finds_the_prefix() {
        let cache = RecordCache::new(100);
        filled(&cache, "kw_aaaaa", 10);
        cache.invalidate_key(KeyId::new(8));
        cache.invalidate_users(&HashSet::from([UserId::new(4)]));
        assert!(matches!(get(&cache, "kw_aaaaa", at(1)), Remembered::Fresh(_)));
        cache.invalidate_users(&HashSet::from([UserId::new(3)]));
        assert!(matches!(get(&cache, "kw_aaaaa", at(1)), Remembered::Unknown));
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
        assert!(matches!(get(&cache, "kw_aaaaa", at(1)), Remembered::Fresh(_)));
    }

    /// Alert rules compare the two.
    #[test]
    fn a_full_cache_can_be_told_by_its_size() {
        let cache = RecordCache::new(5000);
        for number in 0..50_000 {
            let prefix = prefix(&format!("kw_{number:05}"));
            let ticket = cache.begin_fill(&prefix);
            cache.fill(prefix, &ticket, records(10));
        }
        let (present, _) = cache.len();
        let limit = usize::try_from(cache.max_entries()).unwrap();
        assert!((4500..=5500).contains(&limit), "{limit}");
        assert!(present <= limit && present * 100 > limit * 97, "{present} of {limit}");
    }
}
