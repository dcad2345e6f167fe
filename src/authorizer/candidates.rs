//! Candidates: the key records behind a prefix, from memory, then Redis, then the store.
//!
//! A look-up has three answers: found, known absent, could not ask. The third is an error ([`Cause`]) and never becomes
//! the second. One flight per prefix; a record's age counts from the start of the query that read it, whichever tier
//! it passed through since, and whether it may be used is for [`crate::domain::freshness`] to say.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::background::Background;
use super::flight::{FlightError, Flights};
use super::freshness::{Freshness, Mode};
use super::lookups::Lookups;
use super::outage::Outage;
use super::proof::{Prover, RedisVerdict};
use tracing::Instrument;

use crate::cache::interned::Interned;
use crate::cache::records::{FillTicket, RecordCache, Records, Remembered};
use crate::cache::redis::{Fetched, RedisCache, StoredRecords};
use crate::clock;
use crate::domain::decision::{Cause, Tier};
use crate::domain::freshness::coverage::{Known, Standing, View};
use crate::domain::key::{KeyPrefix, PresentedKey};
use crate::domain::limit::Budget;
use crate::domain::record::{Candidate, KeyId, KeyPolicy, UserRecord};
use crate::domain::row::CandidateRow;
use crate::domain::source::Source;
use crate::domain::time::{Instant, Now};
use crate::store::{Reading, Store, StoreError};
use crate::telemetry::metrics::{CacheKind, CacheResult, Metrics};
use crate::telemetry::traces;

/// Prefixes that may be looked up at once; each holds a small task and at most one place in the store's pool.
const MAX_FLIGHTS: usize = 4096;

/// Spending grows without a change of the key, so a record with a budget is read again at least this often (contract,
/// section 4).
const BUDGET_RECORD_TTL: Duration = Duration::from_secs(30);

/// Different sets of rights that are looked for among the records.
const MAX_RIGHTS: usize = 1024;

/// Owners that are looked for among the records: their keys are often used at the same time.
const MAX_OWNERS: usize = 8192;

/// Defective rows that are remembered as reported; after that many, some are reported again.
const MAX_REPORTED: usize = 10_000;

/// What a look-up found.
#[derive(Debug, Clone)]
pub enum Found {
    /// At least one candidate.
    Records(Arc<Records>, Tier),
    /// The same, but it should have been read again and the store can't be asked. It may allow; a refusal by it could
    /// be a false one.
    Suspect(Arc<Records>, Tier),
    /// The store has none.
    Absent,
}

/// What a flight brought.
#[derive(Clone)]
struct Filled {
    found: Found,
    /// Whether Redis had the proof of the key that the flight began with.
    has_proof: bool,
}

/// How a record stands, for an operator.
#[derive(Debug)]
pub struct RecordAge {
    /// Since it left the store; `None` where that can't be told.
    pub since_store: Option<Duration>,
    /// Since the last moment at which it was known to be true: the lease or the lifetime counts from there.
    pub since_proof: Duration,
    /// Whether the session of the change feed that is in force goes on proving it.
    pub is_covered: bool,
    /// How changes arrive.
    pub mode: Mode,
}

/// Looks candidates up.
pub struct Candidates {
    memory: RecordCache,
    redis: Option<Arc<RedisCache>>,
    store: Store,
    /// Takes over the verdict that came with a record from Redis.
    prover: Arc<Prover>,
    freshness: Arc<Freshness>,
    outage: Arc<Outage>,
    /// How often the store is asked in vain.
    lookups: Lookups,
    /// By the ticket too: who comes after a change does not join a query from before it.
    flights: Arc<Flights<(KeyPrefix, FillTicket), Result<Filled, Cause>>>,
    background: Background,
    metrics: Metrics,
    /// How long "no such prefix" is remembered.
    absent_lifetime: Duration,
    /// Rights and owners that keys have in common.
    rights: Interned<KeyPolicy>,
    owners: Interned<UserRecord>,
    /// Keys whose rows were reported as defective, so that each is reported once.
    reported: Mutex<HashSet<KeyId>>,
}

/// What [`Candidates`] is put together from.
pub struct CandidatesParts {
    /// The memory of records.
    pub memory: RecordCache,
    /// The shared tier.
    pub redis: Option<Arc<RedisCache>>,
    /// The truth.
    pub store: Store,
    /// Takes over the verdict that came with a record from Redis.
    pub prover: Arc<Prover>,
    /// What the change feed has proven.
    pub freshness: Arc<Freshness>,
    /// Whether the store is known to be silent.
    pub outage: Arc<Outage>,
    /// How often the store is asked in vain.
    pub lookups: Lookups,
    /// Runs what nobody waits for.
    pub background: Background,
    /// Counters.
    pub metrics: Metrics,
    /// How long "no such prefix" is remembered.
    pub absent_lifetime: Duration,
}

impl Candidates {
    /// Puts the parts together.
    pub fn new(parts: CandidatesParts) -> Arc<Self> {
        let CandidatesParts {
            memory,
            redis,
            store,
            prover,
            freshness,
            outage,
            lookups,
            background,
            metrics,
            absent_lifetime,
        } = parts;
        let flights = Flights::new(MAX_FLIGHTS);
        let (rights, owners) = (Interned::new(MAX_RIGHTS), Interned::new(MAX_OWNERS));
        Arc::new(Self {
            memory,
            redis,
            store,
            prover,
            freshness,
            outage,
            lookups,
            flights,
            background,
            metrics,
            absent_lifetime,
            rights,
            owners,
            reported: Mutex::default(),
        })
    }

    /// The memory of records, for the change feed and the admin port.
    pub fn memory(&self) -> &RecordCache {
        &self.memory
    }

    /// What memory knows for certain; `None` where something has to be asked.
    pub fn recall(&self, prefix: &str, now: Now) -> Option<Found> {
        let view = self.freshness.view();
        match self.memory.get(prefix, &view, now.instant) {
            Remembered::Fresh(records) => {
                self.count(Tier::Memory, CacheResult::Hit);
                Some(Found::Records(records, Tier::Memory))
            }
            Remembered::Absent => {
                self.count(Tier::Memory, CacheResult::Absent);
                Some(Found::Absent)
            }
            Remembered::Suspect(_) | Remembered::Unknown => {
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
        source: Source,
    ) -> Result<(Found, RedisVerdict), Cause> {
        let now = clock::instant();
        // Also for what is judged after the read: a proof that came meanwhile may be about the record's successor.
        let view = self.freshness.view();
        let suspect = match self.memory.get(prefix, &view, now) {
            Remembered::Fresh(records) => {
                return Ok((Found::Records(records, Tier::Memory), RedisVerdict::NotAsked));
            }
            Remembered::Suspect(records) => Some(records),
            Remembered::Absent | Remembered::Unknown => None,
        };
        if let Some(records) = &suspect
            && self.outage.is_silent(now)
        {
            return Ok((Found::Suspect(Arc::clone(records), Tier::Memory), RedisVerdict::NotAsked));
        }
        let prefix = KeyPrefix::new(prefix).ok_or(Cause::Store)?;
        let ticket = self.memory.begin_fill(&prefix);
        let mut asked = RedisVerdict::NotAsked;
        let work = || {
            asked = RedisVerdict::Asked;
            let (this, prefix, key) = (Arc::clone(self), prefix.clone(), key.clone());
            async move { this.fill(prefix, ticket, &key, source).await }
        };
        match self.flights.join((prefix.clone(), ticket), work).await {
            Ok(Ok(Filled { found, has_proof })) => match asked {
                RedisVerdict::Asked if has_proof => Ok((found, RedisVerdict::Matched)),
                _ => Ok((found, asked)),
            },
            Ok(Err(Cause::Store)) => match suspect.filter(|records| may_bridge_outage(&view, records)) {
                Some(records) => Ok((Found::Suspect(records, Tier::Memory), asked)),
                None => Err(Cause::Store),
            },
            Ok(Err(cause)) => Err(cause),
            Err(FlightError::Full) => Err(Cause::Overload),
            Err(FlightError::Lost) => Err(Cause::Store),
        }
    }

    /// Asks the store alone, for this one request, and remembers nothing.
    pub async fn read_strictly(&self, prefix: &str, source: Source) -> Result<(Found, RedisVerdict), Cause> {
        let prefix = KeyPrefix::new(prefix).ok_or(Cause::Store)?;
        let now = clock::instant();
        let stored = self.query(&prefix, source).await?;
        let found = match self.parse(&stored.rows, Known::uncovered(now), now) {
            Some(records) => Found::Records(Arc::new(records), Tier::Store),
            None => Found::Absent,
        };
        Ok((found, RedisVerdict::NotAsked))
    }

    /// The flight: Redis, then the store; what is found is kept on the way back.
    async fn fill(
        &self,
        prefix: KeyPrefix,
        ticket: FillTicket,
        key: &PresentedKey,
        source: Source,
    ) -> Result<Filled, Cause> {
        let now = clock::now();
        // Before anything is accepted, and kept for what is judged later.
        let view = self.freshness.view();
        let accept = |stored: &StoredRecords| {
            self.freshness.accept(stored.stamp.as_ref(), stored.read_at, &prefix, &stored.rows, now)
        };
        let Fetched { records, proof } = match &self.redis {
            Some(redis) => {
                redis.fetch(Some(&prefix), Some(key), now.wall, accept).instrument(traces::redis()).await
            }
            None => Fetched::default(),
        };
        let shared = records
            .and_then(|(stored, known)| self.parse(&stored.rows, known, read_instant(&stored, now)))
            .map(Arc::new);
        let found = match shared.clone().filter(|records| is_fresh(&view, records)) {
            Some(records) => Ok(Found::Records(records, Tier::Redis)),
            None => match self.read(&prefix, &ticket, source).await {
                Ok(Some(records)) => Ok(Found::Records(records, Tier::Store)),
                Ok(None) => return Ok(Filled { found: Found::Absent, has_proof: false }),
                Err(Cause::Store) => shared
                    .filter(|records| may_bridge_outage(&view, records))
                    .map(|records| Found::Suspect(records, Tier::Redis))
                    .ok_or(Cause::Store),
                Err(cause) => Err(cause),
            },
        }?;
        let mut has_proof = false;
        if let Found::Records(records, _) | Found::Suspect(records, _) = &found {
            if let Some(proof) = proof {
                has_proof = self.prover.adopt(key, records, &proof).is_some();
            }
            self.memory.fill(prefix, &ticket, Arc::clone(records));
        }
        Ok(Filled { found, has_proof })
    }

    /// How a record stands now.
    pub fn age(&self, records: &Records) -> RecordAge {
        let (view, now) = (self.freshness.view(), clock::instant());
        let read_at = records.read_again_at.saturating_before(self.lifetime(&records.candidates));
        RecordAge {
            since_store: (read_at > Instant::from_boot(Duration::ZERO))
                .then(|| now.saturating_since(read_at)),
            since_proof: now.saturating_since(view.known_true_at(&records.known)),
            is_covered: view.covers(&records.known),
            mode: self.freshness.mode(),
        }
    }

    /// Reads the store and hands what it says to Redis; remembers where it says "none".
    async fn read(
        &self,
        prefix: &KeyPrefix,
        ticket: &FillTicket,
        source: Source,
    ) -> Result<Option<Arc<Records>>, Cause> {
        let read_at = clock::now();
        if !self.outage.may_ask(read_at.instant) {
            return Err(Cause::Store);
        }
        let reading = self.freshness.begin_reading(read_at.instant);
        let stored = self.query(prefix, source).await?;
        let known = reading.finish(stored.stamp.as_ref());
        let Some(records) = self.parse(&stored.rows, known, read_at.instant) else {
            let until = read_at.instant.saturating_add(self.absent_lifetime);
            self.memory.fill_absent(prefix.clone(), ticket, until);
            return Ok(None);
        };
        if let Some(redis) = self.redis.clone() {
            let (prefix, lifetime) = (prefix.clone(), self.freshness.shared_lifetime());
            let stored = StoredRecords { rows: stored.rows, read_at: read_at.wall, stamp: stored.stamp };
            self.background.run(async move {
                let left = lifetime.saturating_sub(clock::wall().saturating_since(read_at.wall));
                redis.keep_records(&prefix, &stored, left).await;
            });
        }
        Ok(Some(Arc::new(records)))
    }

    async fn query(&self, prefix: &KeyPrefix, source: Source) -> Result<Reading, Cause> {
        let began = clock::instant();
        let lookup = self.lookups.begin(source, began).ok_or(Cause::Overload)?;
        let answer = self.store.candidates(prefix).instrument(traces::store()).await;
        let took = clock::instant().saturating_since(began);
        self.metrics.store_query_duration.observe(took.as_secs_f64());
        self.count(
            Tier::Store,
            match &answer {
                Ok(stored) if stored.rows.is_empty() => CacheResult::Absent,
                Ok(_) => CacheResult::Hit,
                Err(_) => CacheResult::Error,
            },
        );
        match answer {
            Err(StoreError::TooManyCandidates) => {
                self.outage.answered(clock::instant());
                Err(Cause::TooManyCandidates)
            }
            Err(_) => {
                self.outage.failed(clock::instant());
                Err(Cause::Store)
            }
            Ok(stored) => {
                self.outage.answered(clock::instant());
                if stored.rows.is_empty() {
                    lookup.was_in_vain();
                }
                Ok(stored)
            }
        }
    }

    /// Gives rows their meaning, once for as long as they are used; `None` where there are none. `read_at` is when they
    /// left the store.
    fn parse(&self, rows: &[CandidateRow], known: Known, read_at: Instant) -> Option<Records> {
        if rows.is_empty() {
            return None;
        }
        let candidates: Vec<Arc<Candidate>> = rows.iter().map(|row| self.candidate(row)).collect();
        for candidate in &candidates {
            self.report_defects(candidate);
        }
        let read_again_at = read_at.saturating_add(self.lifetime(&candidates));
        Some(Records { candidates, known, read_again_at })
    }

    fn candidate(&self, row: &CandidateRow) -> Arc<Candidate> {
        let mut candidate = Candidate::from_row(row);
        candidate.policy = candidate.policy.map(|policy| self.rights.share(policy));
        candidate.owner = self.owners.share(candidate.owner);
        Arc::new(candidate)
    }

    /// How long after they left the store records have to be read again.
    fn lifetime(&self, candidates: &[Arc<Candidate>]) -> Duration {
        let lifetime = self.freshness.settings().record_ttl;
        let has_budget = candidates.iter().any(|candidate| has_budget(candidate));
        if has_budget { lifetime.min(BUDGET_RECORD_TTL) } else { lifetime }
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

fn is_fresh(view: &View, records: &Records) -> bool {
    let now = clock::instant();
    now < records.read_again_at && view.standing(&records.known, now) == Standing::Fresh
}

/// Whether records that should be read again may be used, as the store can't be asked. The view is that of the look into
/// memory that found them.
fn may_bridge_outage(view: &View, records: &Records) -> bool {
    view.standing(&records.known, clock::instant()) != Standing::Expired
}

/// When records of another replica left the store, by the two wall clocks. It decides when they are read again, not
/// whether they are believed; from the future, they are read again at once.
fn read_instant(stored: &StoredRecords, now: Now) -> Instant {
    if stored.read_at > now.wall {
        return Instant::from_boot(Duration::ZERO);
    }
    now.instant.saturating_before(now.wall.saturating_since(stored.read_at))
}

fn has_budget(candidate: &Candidate) -> bool {
    candidate.policy.as_ref().is_ok_and(|policy| matches!(policy.budget, Budget::Limited { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::time::Timestamp;

    #[test]
    fn records_of_another_replica_are_read_again_by_its_clock_and_from_the_future_at_once() {
        let wall = Timestamp::from_microseconds(10_000_000);
        let now = Now { wall, instant: Instant::from_boot(Duration::from_secs(100)) };
        let at = |microseconds| {
            let read_at = Timestamp::from_microseconds(microseconds);
            read_instant(&StoredRecords { rows: Vec::new(), read_at, stamp: None }, now)
        };
        assert_eq!(at(10_000_000), now.instant);
        assert_eq!(at(7_000_000), Instant::from_boot(Duration::from_secs(97)));
        assert_eq!(at(10_000_001), Instant::from_boot(Duration::ZERO));
    }
}
