//! Proof: does the presented key match one of the candidates?
//!
//! Verdicts are asked of memory, then of Redis, then computed. Every candidate is tried. A candidate whose verdict
//! can't be had leaves the question open, unless another one matches: then the answer is known.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;

use super::attempts::{Attempt, Charge};
use super::background::Background;
use super::bcrypt_pool::BcryptPool;
use super::flight::{FlightError, Flights};
use crate::cache::records::Records;
use crate::cache::redis::{RedisCache, StoredProof};
use crate::cache::verdict_name::VerdictName;
use crate::cache::verdicts::{Recall, VerdictCache};
use crate::clock;
use crate::domain::decision::{Cause, Tier};
use crate::domain::hash::KeyHash;
use crate::domain::key::PresentedKey;
use crate::domain::proof::{Proven, Verdict};
use crate::domain::record::Candidate;
use crate::domain::time::Now;
use crate::domain::turns::Place;
use crate::telemetry::metrics::{CacheKind, CacheResult, Metrics};
use crate::telemetry::traces;

/// Keys that may be under verification at once; each holds a small task.
const MAX_FLIGHTS: usize = 1024;

/// Why no candidate is proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProofError {
    /// Every candidate was compared and none matches.
    NoMatch,
    /// None matches so far, and at least one could not be compared.
    Undecided(Cause),
    /// This client has sent so many wrong secrets that no more are compared for as long as this.
    TooManyAttempts(Duration),
}

/// Whether Redis was already asked for the verdict on this very key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedisVerdict {
    /// It did not come with the record.
    Asked,
    /// It came with the record and was taken over.
    Matched,
    /// Not yet.
    NotAsked,
}

/// Where the answer to "does the key match" came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// Verdicts that were remembered; and what needs no memory: SHA-256, and hashes that match nothing.
    Memory,
    /// A proof that Redis kept.
    Redis,
    /// At least one comparison was made or waited for.
    Computed,
}

/// Makes proofs.
pub struct Prover {
    verdicts: VerdictCache,
    redis: Option<Arc<RedisCache>>,
    pool: Arc<BcryptPool>,
    /// Verifications under way: one for each key and hash.
    flights: Arc<Flights<VerdictName, Result<Verdict, Cause>>>,
    background: Background,
    metrics: Metrics,
    verdict_ttl: Duration,
}

impl Prover {
    /// Puts the parts together.
    pub fn new(
        verdicts: VerdictCache,
        redis: Option<Arc<RedisCache>>,
        pool: BcryptPool,
        background: Background,
        metrics: Metrics,
        verdict_ttl: Duration,
    ) -> Arc<Self> {
        let flights = Flights::new(MAX_FLIGHTS);
        Arc::new(Self { verdicts, redis, pool: Arc::new(pool), flights, background, metrics, verdict_ttl })
    }

    /// The memory of verdicts, for the admin port.
    pub fn verdicts(&self) -> &VerdictCache {
        &self.verdicts
    }

    /// What memory says; `None` where something has to be asked or computed.
    pub fn recall(
        &self,
        key: &PresentedKey,
        records: &Records,
        now: Now,
    ) -> Option<Result<Proven, ProofError>> {
        let mut open = false;
        for candidate in &records.candidates {
            match self.known_verdict(key, candidate, now) {
                Some(verdict) => {
                    if let Some(proven) = Proven::from_verdict(candidate, verdict) {
                        self.count(Tier::Memory, CacheResult::Hit);
                        return Some(Ok(proven));
                    }
                }
                None => open = true,
            }
        }
        if open {
            self.count(Tier::Memory, CacheResult::Miss);
            return None;
        }
        self.count(Tier::Memory, CacheResult::Hit);
        Some(Err(ProofError::NoMatch))
    }

    /// What Redis and, if need be, bcrypt say.
    pub async fn prove(
        self: &Arc<Self>,
        key: &PresentedKey,
        records: &Records,
        redis_verdict: RedisVerdict,
        attempt: &mut Attempt<'_>,
    ) -> (Result<Proven, ProofError>, Evidence) {
        if let Some(answer) = self.recall(key, records, clock::now()) {
            let came_along = answer.is_ok() && redis_verdict == RedisVerdict::Matched;
            return (answer, if came_along { Evidence::Redis } else { Evidence::Memory });
        }
        if let (Some(redis), RedisVerdict::NotAsked) = (&self.redis, redis_verdict) {
            let proof = redis
                .fetch(None, Some(key), clock::wall(), |_| None::<()>)
                .instrument(traces::redis())
                .await
                .proof;
            if let Some(proven) = proof.and_then(|proof| self.adopt(key, records, &proof)) {
                return (Ok(proven), Evidence::Redis);
            }
        }
        (self.compare(key, records, attempt).await, Evidence::Computed)
    }

    /// Takes over a proof that Redis kept, if it is of this key and of the hash of one of these candidates.
    pub fn adopt(&self, key: &PresentedKey, records: &Records, proof: &StoredProof) -> Option<Proven> {
        let now = clock::now();
        // The lifetime goes on from the comparison; it does not start anew with each tier.
        let left = self.verdict_ttl.checked_sub(now.wall.saturating_since(proof.proven_at()))?;
        records.candidates.iter().find_map(|candidate| {
            let hash = candidate.key.hash.as_ref().ok()?;
            if hash.bcrypt_cost().is_none() || !proof.proves(key, hash) {
                return None;
            }
            self.verdicts.keep_match(key, hash, now.instant.saturating_add(left));
            Proven::from_verdict(candidate, Verdict::Match)
        })
    }

    /// Tries each candidate in turn. What is shared with others who ask is the verdict on one key and one hash, which
    /// never changes; the candidate that is proven is the caller's own, as fresh as they read it.
    ///
    /// Whoever has sent too many wrong secrets is told so before anything is computed. Whoever joins a comparison of the
    /// same key adds no work, so that the first burst of a good key is one attempt.
    async fn compare(
        self: &Arc<Self>,
        key: &PresentedKey,
        records: &Records,
        attempt: &mut Attempt<'_>,
    ) -> Result<Proven, ProofError> {
        let is_under_way = |candidate: &Arc<Candidate>| {
            let hash = candidate.key.hash.as_ref();
            hash.is_ok_and(|hash| self.flights.is_under_way(&self.verdicts.name(key, hash)))
        };
        if !records.candidates.iter().any(is_under_way) {
            attempt.charge().map_err(ProofError::TooManyAttempts)?;
        }
        let mut failure = None;
        for candidate in &records.candidates {
            match self.verdict(key, candidate, attempt).await {
                Ok(verdict) => {
                    if let Some(proven) = Proven::from_verdict(candidate, verdict) {
                        attempt.give_back();
                        return Ok(proven);
                    }
                }
                Err(cause) => failure = Some(cause),
            }
        }
        Err(failure.map_or(ProofError::NoMatch, |cause| {
            attempt.give_back();
            ProofError::Undecided(cause)
        }))
    }

    /// The verdict on one candidate: known, or computed once for all who ask, and kept even if they give up.
    async fn verdict(
        self: &Arc<Self>,
        key: &PresentedKey,
        candidate: &Arc<Candidate>,
        attempt: &Attempt<'_>,
    ) -> Result<Verdict, Cause> {
        if let Some(verdict) = self.known_verdict(key, candidate, clock::now()) {
            return Ok(verdict);
        }
        let Ok(hash) = &candidate.key.hash else {
            return Ok(Verdict::Mismatch);
        };
        let place = attempt.place().ok_or(Cause::Verification)?;
        let work = || {
            let (prover, key, candidate) = (Arc::clone(self), key.clone(), Arc::clone(candidate));
            let charge = attempt.shared_charge();
            async move { prover.compute(key, candidate, place, charge).await }
        };
        match self.flights.join(self.verdicts.name(key, hash), work).await {
            Ok(verdict) => verdict,
            Err(FlightError::Full) => Err(Cause::Overload),
            Err(FlightError::Lost) => Err(Cause::Verification),
        }
    }

    /// The charge is given back here too, as whoever asked may be gone when the verdict comes.
    async fn compute(
        &self,
        key: PresentedKey,
        candidate: Arc<Candidate>,
        place: Place,
        charge: Option<Arc<Charge>>,
    ) -> Result<Verdict, Cause> {
        let compared =
            self.pool.verify(place, key.clone(), Arc::clone(&candidate)).instrument(traces::bcrypt()).await;
        if compared != Ok(Verdict::Mismatch)
            && let Some(charge) = charge
        {
            charge.give_back();
        }
        let verdict = compared?;
        if let Ok(hash) = &candidate.key.hash {
            match verdict {
                Verdict::Match => self.keep_match(&key, hash, &candidate),
                Verdict::Mismatch => self.verdicts.keep_mismatch(&key, hash, clock::instant()),
            }
        }
        Ok(verdict)
    }

    fn keep_match(&self, key: &PresentedKey, hash: &KeyHash, candidate: &Arc<Candidate>) {
        let now = clock::now();
        self.verdicts.keep_match(key, hash, now.instant.saturating_add(self.verdict_ttl));
        if let Some(redis) = self.redis.clone() {
            let (key, candidate, lifetime) = (key.clone(), Arc::clone(candidate), self.verdict_ttl);
            self.background.run(async move {
                if let Ok(hash) = &candidate.key.hash {
                    redis.keep_proof(&key, hash, now.wall, lifetime).await;
                }
            });
        }
    }

    /// A verdict that needs no waiting: remembered, cheap to compute, or on a hash that matches nothing.
    fn known_verdict(&self, key: &PresentedKey, candidate: &Candidate, now: Now) -> Option<Verdict> {
        let Ok(hash) = &candidate.key.hash else {
            return Some(Verdict::Mismatch);
        };
        if let Some(matches) = hash.matches_sha256(key) {
            return Some(if matches { Verdict::Match } else { Verdict::Mismatch });
        }
        match self.verdicts.recall(key, hash, now.instant) {
            Recall::Known(verdict) => Some(verdict),
            Recall::Unknown => None,
        }
    }

    fn count(&self, tier: Tier, result: CacheResult) {
        self.metrics.count_cache(CacheKind::Verdict, tier, result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::verdict_name::VerdictNamer;
    use crate::domain::freshness::coverage::Known;
    use crate::domain::row::CandidateRow;

    const SECRET: &str = "kw_0123456789";

    fn prover() -> Arc<Prover> {
        let metrics = Metrics::new();
        let verdicts = VerdictCache::new(VerdictNamer::random().unwrap(), 100);
        let pool = BcryptPool::start(1, metrics.clone()).unwrap();
        Prover::new(verdicts, None, pool, Background::new(), metrics, Duration::from_hours(1))
    }

    fn uncounted() -> Attempt<'static> {
        Attempt::new(None, "kw_01234", None)
    }

    fn records(candidates: &[&Arc<Candidate>]) -> Records {
        let candidates = candidates.iter().copied().map(Arc::clone).collect();
        Records { candidates, known: Known::uncovered(clock::instant()), read_again_at: clock::instant() }
    }

    fn candidate(hash: &str, is_active: bool) -> Arc<Candidate> {
        let mut row = CandidateRow::sample(hash);
        row.is_active = Some(is_active);
        Arc::new(Candidate::from_row(&row))
    }

    /// Two checks of one key share a comparison, not a record: the one that has read that the key is switched off must
    /// not be answered from the other's older record.
    #[tokio::test]
    async fn whoever_joins_a_comparison_is_proven_on_their_own_record() {
        let (prover, key) = (prover(), PresentedKey::parse(SECRET.as_bytes()).unwrap());
        let hash = bcrypt::hash(SECRET, 4).unwrap();
        let (stale, fresh) = (candidate(&hash, true), candidate(&hash, false));
        let (first, second) = (records(&[&stale]), records(&[&fresh]));
        let (mut one, mut another) = (uncounted(), uncounted());
        let (first, second) = tokio::join!(
            prover.prove(&key, &first, RedisVerdict::NotAsked, &mut one),
            prover.prove(&key, &second, RedisVerdict::NotAsked, &mut another)
        );
        assert!(Arc::ptr_eq(first.0.unwrap().candidate(), &stale));
        assert!(Arc::ptr_eq(second.0.unwrap().candidate(), &fresh));
        assert_eq!(prover.metrics.bcrypt_computed.get(), 1);
    }

    /// A comparison that began before a second key came to the prefix says nothing about that key.
    #[tokio::test]
    async fn whoever_joins_a_comparison_has_all_their_own_candidates_tried() {
        let (prover, key) = (prover(), PresentedKey::parse(SECRET.as_bytes()).unwrap());
        let other = candidate(&bcrypt::hash("kw_01234-other", 4).unwrap(), true);
        let own = candidate(&bcrypt::hash(SECRET, 4).unwrap(), true);
        let (first, second) = (records(&[&other]), records(&[&other, &own]));
        let (mut one, mut another) = (uncounted(), uncounted());
        let (first, second) = tokio::join!(
            prover.prove(&key, &first, RedisVerdict::NotAsked, &mut one),
            prover.prove(&key, &second, RedisVerdict::NotAsked, &mut another)
        );
        assert!(matches!(first, (Err(ProofError::NoMatch), Evidence::Computed)));
        assert!(Arc::ptr_eq(second.0.unwrap().candidate(), &own));
        assert_eq!(prover.metrics.bcrypt_computed.get(), 2);
    }
}
