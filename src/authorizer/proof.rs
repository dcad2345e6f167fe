//! Proof: does the presented key match one of the candidates?
//!
//! Verdicts are asked of memory, then of Redis, then computed. Every candidate is tried. A candidate whose verdict
//! can't be had leaves the question open, unless another one matches: then the answer is known.

use std::sync::Arc;
use std::time::Duration;

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
use crate::telemetry::metrics::{CacheKind, CacheResult, Metrics};

/// Keys that may be under verification at once; each holds a small task.
const MAX_FLIGHTS: usize = 1024;

/// Why no candidate is proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProofError {
    /// Every candidate was compared and none matches.
    NoMatch,
    /// None matches so far, and at least one could not be compared.
    Undecided(Cause),
}

/// What comparing a key with every open candidate comes to: the one that matches, none, or the question stays open.
type Comparison = Result<Option<Arc<Candidate>>, Cause>;

/// Whether Redis was already asked for the verdict on this very key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedisVerdict {
    /// It came, or did not, with the record.
    Asked,
    /// Not yet.
    NotAsked,
}

/// Makes proofs.
pub struct Prover {
    verdicts: VerdictCache,
    redis: Option<Arc<RedisCache>>,
    pool: Arc<BcryptPool>,
    /// Verifications under way, by the name of their first open verdict.
    flights: Arc<Flights<VerdictName, Comparison>>,
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
    ) -> Result<Proven, ProofError> {
        if let Some(answer) = self.recall(key, records, clock::now()) {
            return answer;
        }
        if let (Some(redis), RedisVerdict::NotAsked) = (&self.redis, redis_verdict) {
            let proof = redis.fetch(None, Some(key), clock::wall()).await.proof;
            if let Some(proven) = proof.and_then(|proof| self.adopt(key, records, &proof)) {
                return Ok(proven);
            }
        }
        self.compare(key, records).await
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

    /// Compares the key with every candidate whose verdict is open, once for all who ask.
    async fn compare(self: &Arc<Self>, key: &PresentedKey, records: &Records) -> Result<Proven, ProofError> {
        let now = clock::now();
        let open: Vec<Arc<Candidate>> = records
            .candidates
            .iter()
            .filter(|candidate| self.known_verdict(key, candidate, now).is_none())
            .map(Arc::clone)
            .collect();
        let Some(name) = open
            .first()
            .and_then(|first| first.key.hash.as_ref().ok())
            .map(|hash| self.verdicts.name(key, hash))
        else {
            // Somebody else's flight landed between the recall and here.
            return self.recall(key, records, now).unwrap_or(Err(ProofError::Undecided(Cause::Verification)));
        };
        let work = || {
            let (prover, key) = (Arc::clone(self), key.clone());
            async move { prover.compare_each(&key, open).await }
        };
        match self.flights.join(name, work).await {
            Ok(Ok(Some(matching))) => Proven::from_verdict(&matching, Verdict::Match)
                .ok_or(ProofError::Undecided(Cause::Verification)),
            Ok(Ok(None)) => Err(ProofError::NoMatch),
            Ok(Err(cause)) => Err(ProofError::Undecided(cause)),
            Err(FlightError::Full) => Err(ProofError::Undecided(Cause::Overload)),
            Err(FlightError::Lost) => Err(ProofError::Undecided(Cause::Verification)),
        }
    }

    /// The candidate that matches, if one does. Each verdict is kept as soon as it is known.
    async fn compare_each(&self, key: &PresentedKey, open: Vec<Arc<Candidate>>) -> Comparison {
        let mut failure = None;
        for candidate in open {
            let Ok(hash) = &candidate.key.hash else { continue };
            match self.pool.verify(key.clone(), Arc::clone(&candidate)).await {
                Ok(Verdict::Match) => {
                    self.keep_match(key, hash, &candidate);
                    return Ok(Some(candidate));
                }
                Ok(Verdict::Mismatch) => self.verdicts.keep_mismatch(key, hash, clock::instant()),
                Err(cause) => failure = Some(cause),
            }
        }
        failure.map_or(Ok(None), Err)
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
