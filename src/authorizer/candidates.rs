//! Candidates: the key records behind a prefix, from memory, then Redis, then the store.
//!
//! A look-up has three answers: found, known absent, could not ask. The third is an error ([`Cause`]) and never becomes
//! the second. One flight per prefix; a record's age counts from the start of the query that read it, whichever tier
//! it passed through since.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::background::Background;
use super::flight::{FlightError, Flights};
use super::proof::{Prover, RedisVerdict};
use crate::cache::Lookup;
use crate::cache::records::{FillTicket, RecordCache, Records};
use crate::cache::redis::{Fetched, RedisCache, StoredRecords};
use crate::clock;
use crate::domain::decision::{Cause, Tier};
use crate::domain::key::{KeyPrefix, PresentedKey};
use crate::domain::limit::Budget;
use crate::domain::record::{Candidate, KeyId};
use crate::domain::row::CandidateRow;
use crate::domain::time::{Now, Timestamp};
use crate::store::{Store, StoreError};
use crate::telemetry::metrics::{CacheKind, CacheResult, Metrics};

/// Prefixes that may be looked up at once; each holds a small task and at most one place in the store's pool.
const MAX_FLIGHTS: usize = 4096;

/// Spending grows without a change of the key, so a record with a budget is read again at least this often (contract,
/// section 4).
const BUDGET_RECORD_TTL: Duration = Duration::from_secs(30);

/// Defective rows that are remembered as reported; after that many, some are reported again.
const MAX_REPORTED: usize = 10_000;

/// What a look-up found.
#[derive(Debug, Clone)]
pub enum Found {
    /// At least one candidate.
    Records(Arc<Records>, Tier),
    /// The store has none.
    Absent,
}

/// How long records are used.
#[derive(Debug, Clone, Copy)]
pub struct RecordLifetimes {
    /// Without being read again.
    pub present: Duration,
    /// How long "no such prefix" is remembered.
    pub absent: Duration,
}

/// Looks candidates up.
pub struct Candidates {
    memory: RecordCache,
    redis: Option<Arc<RedisCache>>,
    store: Store,
    /// Takes over the verdict that came with a record from Redis.
    prover: Arc<Prover>,
    flights: Arc<Flights<KeyPrefix, Result<Found, Cause>>>,
    background: Background,
    metrics: Metrics,
    lifetimes: RecordLifetimes,
    /// Keys whose rows were reported as defective, so that each is reported once.
    reported: Mutex<HashSet<KeyId>>,
}

impl Candidates {
    /// Puts the parts together.
    pub fn new(
        memory: RecordCache,
        redis: Option<Arc<RedisCache>>,
        store: Store,
        prover: Arc<Prover>,
        background: Background,
        metrics: Metrics,
        lifetimes: RecordLifetimes,
    ) -> Arc<Self> {
        let flights = Flights::new(MAX_FLIGHTS);
        let reported = Mutex::default();
        Arc::new(Self { memory, redis, store, prover, flights, background, metrics, lifetimes, reported })
    }

    /// The memory of records, for the admin port.
    pub fn memory(&self) -> &RecordCache {
        &self.memory
    }

    /// What memory knows; `None` where it does not.
    pub fn recall(&self, prefix: &str, now: Now) -> Option<Found> {
        match self.memory.get(prefix, now.instant) {
            Lookup::Hit(records) => {
                self.count(Tier::Memory, CacheResult::Hit);
                Some(Found::Records(records, Tier::Memory))
            }
            Lookup::Absent => {
                self.count(Tier::Memory, CacheResult::Absent);
                Some(Found::Absent)
            }
            Lookup::Miss => {
                self.count(Tier::Memory, CacheResult::Miss);
                None
            }
        }
    }

    /// Asks memory, Redis and the store, in this order. The key goes along so that one round trip to Redis brings both
    /// the record and the verdict on this key.
    ///
    /// The answer also says whether it did: whoever joins another key's flight still has to ask for their own verdict.
    pub async fn find(
        self: &Arc<Self>,
        prefix: &str,
        key: &PresentedKey,
    ) -> Result<(Found, RedisVerdict), Cause> {
        if let Lookup::Hit(records) = self.memory.get(prefix, clock::instant()) {
            return Ok((Found::Records(records, Tier::Memory), RedisVerdict::NotAsked));
        }
        let prefix = KeyPrefix::new(prefix).ok_or(Cause::Store)?;
        let mut asked = RedisVerdict::NotAsked;
        let work = || {
            asked = RedisVerdict::Asked;
            let (this, prefix, key) = (Arc::clone(self), prefix.clone(), key.clone());
            async move { this.fill(prefix, &key).await }
        };
        match self.flights.join(prefix.clone(), work).await {
            Ok(found) => found.map(|found| (found, asked)),
            Err(FlightError::Full) => Err(Cause::Overload),
            Err(FlightError::Lost) => Err(Cause::Store),
        }
    }

    /// Asks the store alone, for this one request, and remembers nothing.
    pub async fn read_strictly(&self, prefix: &str) -> Result<(Found, RedisVerdict), Cause> {
        let prefix = KeyPrefix::new(prefix).ok_or(Cause::Store)?;
        let read_at = clock::now();
        let rows = self.query(&prefix).await?;
        let found = match self.parse(&rows, read_at, Duration::ZERO) {
            Some(records) => Found::Records(Arc::new(records), Tier::Store),
            None => Found::Absent,
        };
        Ok((found, RedisVerdict::NotAsked))
    }

    /// The flight: Redis, then the store; what is found is kept on the way back.
    async fn fill(&self, prefix: KeyPrefix, key: &PresentedKey) -> Result<Found, Cause> {
        let ticket = self.memory.begin_fill(&prefix);
        let fetched = match &self.redis {
            Some(redis) => redis.fetch(Some(&prefix), Some(key), clock::wall()).await,
            None => Fetched::default(),
        };
        let stored = fetched.records.and_then(|stored| self.parse_stored(&stored));
        let (records, tier) = match stored {
            Some(records) => (Arc::new(records), Tier::Redis),
            None => match self.read(&prefix, &ticket).await? {
                Some(records) => (records, Tier::Store),
                None => return Ok(Found::Absent),
            },
        };
        if let Some(proof) = fetched.proof {
            self.prover.adopt(key, &records, &proof);
        }
        self.memory.fill(prefix, &ticket, Arc::clone(&records));
        Ok(Found::Records(records, tier))
    }

    /// Reads the store and hands what it says to Redis; remembers where it says "none".
    async fn read(&self, prefix: &KeyPrefix, ticket: &FillTicket) -> Result<Option<Arc<Records>>, Cause> {
        let read_at = clock::now();
        let rows = self.query(prefix).await?;
        let Some(records) = self.parse(&rows, read_at, Duration::ZERO) else {
            let until = read_at.instant.saturating_add(self.lifetimes.absent);
            self.memory.fill_absent(prefix.clone(), ticket, until);
            return Ok(None);
        };
        if let Some(redis) = self.redis.clone() {
            let (prefix, lifetime) = (prefix.clone(), self.lifetimes.present);
            self.background.run(async move {
                let left = lifetime.saturating_sub(clock::wall().saturating_since(read_at.wall));
                redis.keep_records(&prefix, &rows, read_at.wall, left).await;
            });
        }
        Ok(Some(Arc::new(records)))
    }

    async fn query(&self, prefix: &KeyPrefix) -> Result<Vec<CandidateRow>, Cause> {
        let answer = self.store.candidates(prefix).await;
        self.count(
            Tier::Store,
            match &answer {
                Ok(rows) if rows.is_empty() => CacheResult::Absent,
                Ok(_) => CacheResult::Hit,
                Err(_) => CacheResult::Error,
            },
        );
        answer.map_err(|error| match error {
            StoreError::TooManyCandidates => Cause::TooManyCandidates,
            _ => Cause::Store,
        })
    }

    /// Records from Redis, if they are still young enough here.
    fn parse_stored(&self, stored: &StoredRecords) -> Option<Records> {
        let now = clock::now();
        self.parse(&stored.rows, now, age(stored.read_at, now.wall)?)
    }

    /// Gives rows their meaning, once for as long as they are used; `None` where there are none, or where they are
    /// too old. `now` is the moment at which they have reached `age`.
    fn parse(&self, rows: &[CandidateRow], now: Now, age: Duration) -> Option<Records> {
        if rows.is_empty() {
            return None;
        }
        let candidates: Vec<Arc<Candidate>> =
            rows.iter().map(|row| Arc::new(Candidate::from_row(row))).collect();
        for candidate in &candidates {
            self.report_defects(candidate);
        }
        let has_budget = candidates.iter().any(|candidate| has_budget(candidate));
        let lifetime =
            if has_budget { self.lifetimes.present.min(BUDGET_RECORD_TTL) } else { self.lifetimes.present };
        let left = lifetime.checked_sub(age).filter(|left| !left.is_zero())?;
        Some(Records { candidates, usable_until: now.instant.saturating_add(left) })
    }

    fn report_defects(&self, candidate: &Candidate) {
        let Some(defects) = candidate.defects() else { return };
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() >= MAX_REPORTED {
            reported.clear();
        }
        if reported.insert(candidate.key.id) {
            self.metrics.invalid_rows.inc();
            tracing::warn!(key_id = %candidate.key.id, defects, "key row can't be used as it stands");
        }
    }

    fn count(&self, tier: Tier, result: CacheResult) {
        self.metrics.count_cache(CacheKind::Record, tier, result);
    }
}

/// How old a record of another replica is; `None` where its clock is ahead of ours, so that nobody can tell.
fn age(read_at: Timestamp, now: Timestamp) -> Option<Duration> {
    (read_at <= now).then(|| now.saturating_since(read_at))
}

fn has_budget(candidate: &Candidate) -> bool {
    candidate.policy.as_ref().is_ok_and(|policy| matches!(policy.budget, Budget::Limited { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_from_the_future_has_no_age() {
        let at = Timestamp::from_microseconds;
        assert_eq!(age(at(1_000), at(3_000)), Some(Duration::from_millis(2)));
        assert_eq!(age(at(1_000), at(1_000)), Some(Duration::ZERO));
        assert_eq!(age(at(1_001), at(1_000)), None);
    }
}
