//! The Redis tier: records and proofs that replicas share.
//!
//! Redis is not trusted and not needed: whatever it does, the caller gets what could be opened, read and checked, and
//! nothing else; a failure is a counted miss that costs at most the time limit, and a breaker leaves a failing Redis
//! alone. Records and the proof of a cold key come in one round trip. Only proofs of *matching* keys are kept here.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use redis::{Pipeline, Value};
use serde::Serialize;
use thiserror::Error;

use super::breaker::BreakerState;
use super::calls::{Calls, Duty};
use super::entry::{decode_proof, decode_records, encode_proof, encode_records};
use super::links::{FailureKind, Links};
use super::names::{FLUSH_PATTERN, RedisName};
use super::redis_url::{RedisUrl, RedisUrlError};
use super::rejections::Rejections;
use super::seal::{MAX_SEALED_BYTES, Rejection, Sealed, open, seal};
use super::secrets::{CacheSecrets, KeySet};
use super::verdict_name::VerdictName;
use crate::clock;
use crate::domain::decision::Tier;
use crate::domain::freshness::shared::Stamp;
use crate::domain::hash::KeyHash;
use crate::domain::key::{KeyPrefix, PresentedKey};
use crate::domain::record::KeyId;
use crate::domain::row::CandidateRow;
use crate::domain::time::Timestamp;
use crate::telemetry::metrics::{CacheKind, CacheResult, Metrics};

/// Most commands sent in one round trip.
const BATCH: usize = 256;

/// Longest lifetime given to an entry: Redis refuses numbers that overflow its clock.
const MAX_LIFETIME: Duration = Duration::from_hours(365 * 24);

/// Most round trips of one flush: with 1000 names each, far more than a cache holds.
const FLUSH_ROUNDS: usize = 100_000;

/// How to reach Redis.
#[derive(Debug)]
pub struct RedisOptions {
    /// Address and login.
    pub url: RedisUrl,
    /// What seals and names the entries; the same on all replicas.
    pub secrets: CacheSecrets,
    /// Time limit of one round trip, waiting for a connection included.
    pub timeout: Duration,
    /// How many multiplexed connections, at least 1.
    pub connections: usize,
}

/// The Redis tier. Shared by `Arc`.
pub struct RedisCache {
    /// Connections, breaker and time limit.
    calls: Calls,
    /// Also held by the proofs that were fetched.
    secrets: ArcSwap<CacheSecrets>,
    metrics: Metrics,
    rejections: Rejections,
}

/// Why the Redis tier can't be set up. Redis being down is no reason.
#[derive(Debug, Error)]
pub enum RedisSetupError {
    /// The address.
    #[error(transparent)]
    Url(#[from] RedisUrlError),
}

/// Redis did not do what was asked; what was done before is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("redis could not be asked ({kind})")]
pub struct RedisUnavailable {
    /// A word for logs: `timeout`, `connect`, `breaker_open`, …
    pub kind: &'static str,
}

impl<A> Default for Fetched<A> {
    fn default() -> Self {
        Self { records: None, proof: None }
    }
}

impl From<FailureKind> for RedisUnavailable {
    fn from(kind: FailureKind) -> Self {
        Self { kind: kind.as_str() }
    }
}

/// What was found; `None` also where Redis could not be asked.
#[derive(Debug)]
pub struct Fetched<A> {
    /// The records of the prefix, with what the caller holds them to be.
    pub records: Option<(StoredRecords, A)>,
    /// A proof of the key.
    pub proof: Option<StoredProof>,
}

/// Records as a replica read them from the store.
#[derive(Debug)]
pub struct StoredRecords {
    /// The candidates of the prefix.
    pub rows: Vec<CandidateRow>,
    /// When they were read, by the clock of the replica that did.
    pub read_at: Timestamp,
    /// From which server, and what the query had seen; `None` where the store can't tell.
    pub stamp: Option<Stamp>,
}

/// That a key was proven, against a hash that only [`StoredProof::proves`] tells.
#[derive(Debug)]
pub struct StoredProof {
    name: VerdictName,
    proven_at: Timestamp,
    /// The secrets, and which of them sealed the proof.
    secrets: Arc<CacheSecrets>,
    sealed_by: usize,
}

impl StoredProof {
    /// When bcrypt was computed.
    pub fn proven_at(&self) -> Timestamp {
        self.proven_at
    }

    /// Whether it is this very key that was proven against this very hash. Compared in constant time.
    pub fn proves(&self, key: &PresentedKey, hash: &KeyHash) -> bool {
        self.secrets
            .reading()
            .get(self.sealed_by)
            .is_some_and(|keys| keys.verdicts.name(key, hash) == self.name)
    }
}

/// How the Redis tier is, for `/stats`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RedisStatus {
    /// What the breaker does with calls.
    pub breaker: BreakerState,
    /// Why the last failed call failed.
    pub last_error: Option<&'static str>,
    /// Connections that are up.
    pub connections: usize,
    /// Entries that were not believed, since the start.
    pub rejected_entries: u64,
}

impl RedisCache {
    /// Sets the tier up without connecting: Redis may be down, now and later.
    pub fn open(options: RedisOptions, metrics: Metrics) -> Result<Self, RedisSetupError> {
        let links = Links::new(options.url.client()?, options.connections);
        Ok(Self {
            calls: Calls::new(links, options.timeout, metrics.clone()),
            secrets: ArcSwap::from_pointee(options.secrets),
            metrics,
            rejections: Rejections::default(),
        })
    }

    /// Seals and opens by these from now on. What is under way ends with those that it began with.
    pub fn replace_secrets(&self, secrets: CacheSecrets) {
        self.secrets.store(Arc::new(secrets));
    }

    /// Whether these are the secrets in force.
    pub fn has_secrets(&self, secrets: &CacheSecrets) -> bool {
        self.secrets.load().is_same(secrets)
    }

    /// Fetches the records of a prefix and the proof of a key, as asked, in one round trip. Records that the
    /// caller does not accept count as not found. Never an error: what can't be had within the time limit, or not be believed, is missing, and
    /// counted. Dropping the future is harmless.
    pub async fn fetch<A>(
        &self,
        prefix: Option<&KeyPrefix>,
        key: Option<&PresentedKey>,
        now: Timestamp,
        accept: impl Fn(&StoredRecords) -> Option<A>,
    ) -> Fetched<A> {
        let secrets = self.secrets.load_full();
        let keys = secrets.reading();
        let record_names: Vec<RedisName> = prefix
            .map(|prefix| keys.iter().map(|keys| keys.record_name(prefix)).collect())
            .unwrap_or_default();
        let proof_names: Vec<RedisName> =
            key.map(|key| keys.iter().map(|keys| keys.proof_name(key)).collect()).unwrap_or_default();
        if record_names.is_empty() && proof_names.is_empty() {
            return Fetched::default();
        }
        // Not MGET: a value of another type would fail it as a whole or read as absent, and nothing would bound what
        // Redis sends.
        let mut request = Pipeline::with_capacity(record_names.len() + proof_names.len());
        for name in record_names.iter().chain(&proof_names) {
            request.cmd("GETRANGE").arg(name.as_str()).arg(0).arg(MAX_SEALED_BYTES);
        }
        let mut values = self.calls.call(&request, Duty::Read).await.unwrap_or_default();
        let proof_values = values.split_off(values.len().min(record_names.len()));

        let records = prefix.and_then(|prefix| {
            let found =
                self.read(&secrets, CacheKind::Record, &record_names, &values, |_, keys, name, value| {
                    let plaintext = open(keys, Sealed::Record, name, value)?;
                    let records = decode_records(&plaintext, prefix, now)?;
                    Ok(accept(&records).map(|accepted| (records, accepted)))
                });
            found.into_iter().max_by_key(|(records, _)| records.read_at)
        });
        let proof = key.and_then(|_| {
            let found = self.read(
                &secrets,
                CacheKind::Verdict,
                &proof_names,
                &proof_values,
                |sealed_by, keys, name, value| {
                    let (verdict, proven_at) = decode_proof(&open(keys, Sealed::Proof, name, value)?, now)?;
                    Ok(Some(StoredProof {
                        name: verdict,
                        proven_at,
                        secrets: Arc::clone(&secrets),
                        sealed_by,
                    }))
                },
            );
            found.into_iter().max_by_key(|proof| proof.proven_at)
        });
        Fetched { records, proof }
    }

    /// Keeps the records of a prefix for what is left of their lifetime. What can't be kept is not.
    pub async fn keep_records(&self, prefix: &KeyPrefix, records: &StoredRecords, lifetime: Duration) {
        let secrets = self.secrets.load_full();
        let keys = secrets.writing();
        let plaintext = encode_records(prefix, records);
        self.keep(keys, Sealed::Record, &keys.record_name(prefix), &plaintext, lifetime).await;
    }

    /// Keeps the proof that this key matches this hash, in place of an earlier proof of the key.
    pub async fn keep_proof(
        &self,
        key: &PresentedKey,
        hash: &KeyHash,
        proven_at: Timestamp,
        lifetime: Duration,
    ) {
        let secrets = self.secrets.load_full();
        let keys = secrets.writing();
        let plaintext = encode_proof(keys.verdicts.name(key, hash), proven_at);
        self.keep(keys, Sealed::Proof, &keys.proof_name(key), &plaintext, lifetime).await;
    }

    /// Removes the records of these prefixes, under every secret. On an error some of them may be left; they are no
    /// older than their lifetime.
    pub async fn forget(&self, prefixes: &[KeyPrefix]) -> Result<(), RedisUnavailable> {
        let secrets = self.secrets.load_full();
        for batch in prefixes.chunks(BATCH) {
            let mut request = Pipeline::with_capacity(batch.len());
            for prefix in batch {
                let delete = request.cmd("DEL");
                for keys in secrets.reading() {
                    delete.arg(keys.record_name(prefix).as_str());
                }
            }
            let replies = self.calls.call(&request, Duty::Write).await?;
            if replies.iter().any(|reply| !matches!(reply, Value::Int(_))) {
                return Err(FailureKind::Refused.into());
            }
        }
        Ok(())
    }

    /// Removes all records and proofs (of every secret, also of unknown ones), and nothing that is not ours. Asks Redis
    /// even where the breaker is open: an operator wants it. Returns how many were removed.
    pub async fn flush(&self) -> Result<u64, RedisUnavailable> {
        let (mut cursor, mut removed) = (0_u64, 0_u64);
        for _ in 0..FLUSH_ROUNDS {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor).arg("MATCH").arg(FLUSH_PATTERN).arg("COUNT").arg(1000);
            let (next, names): (u64, Vec<String>) = self.calls.ask(&scan).await?;
            if !names.is_empty() {
                let mut unlink = redis::cmd("UNLINK");
                unlink.arg(names);
                removed = removed.saturating_add(self.calls.ask(&unlink).await?);
            }
            if next == 0 {
                return Ok(removed);
            }
            cursor = next;
        }
        Err(FailureKind::Protocol.into())
    }

    /// Which of these keys this replica may write `last_used_at` for: those that no replica has claimed for `interval`.
    /// `None` = Redis can't tell; the caller falls back to what it remembers itself.
    pub async fn claim_uses(&self, keys: &[KeyId], interval: Duration) -> Option<Vec<bool>> {
        let Some(milliseconds) = lifetime_milliseconds(interval) else {
            return Some(vec![true; keys.len()]);
        };
        let mut claimed = Vec::with_capacity(keys.len());
        let secrets = self.secrets.load_full();
        for batch in keys.chunks(BATCH) {
            let mut request = Pipeline::with_capacity(batch.len());
            for key in batch {
                let name = secrets.writing().marker_name(*key);
                request.cmd("SET").arg(name.as_str()).arg("1").arg("NX").arg("PX").arg(milliseconds);
            }
            for reply in self.calls.call(&request, Duty::Write).await.ok()? {
                match reply {
                    Value::Okay => claimed.push(true),
                    Value::Nil => claimed.push(false),
                    _ => return None,
                }
            }
        }
        Some(claimed)
    }

    /// How it is, for `/stats`.
    pub fn status(&self) -> RedisStatus {
        RedisStatus {
            breaker: self.calls.breaker(),
            last_error: self.calls.last_error().map(FailureKind::as_str),
            connections: self.calls.connections(),
            rejected_entries: self.rejections.total(),
        }
    }

    /// Reads what was found under the names of one thing, one name per secret, and counts how the look-up ended.
    fn read<T>(
        &self,
        secrets: &CacheSecrets,
        kind: CacheKind,
        names: &[RedisName],
        values: &[Value],
        parse: impl Fn(usize, &KeySet, &RedisName, &[u8]) -> Result<Option<T>, Rejection>,
    ) -> Vec<T> {
        let mut found = Vec::new();
        // Redis that did not answer at all gives no values.
        let mut outcome = if values.len() == names.len() { CacheResult::Miss } else { CacheResult::Error };
        for (index, ((keys, name), value)) in secrets.reading().iter().zip(names).zip(values).enumerate() {
            match value {
                Value::Nil => {}
                Value::BulkString(bytes) if bytes.is_empty() => {}
                Value::BulkString(bytes) => match parse(index, keys, name, bytes) {
                    Ok(entry) => found.extend(entry),
                    Err(rejection) => {
                        self.rejections.note(kind, rejection, clock::instant());
                        outcome = CacheResult::Rejected;
                    }
                },
                _ if outcome == CacheResult::Rejected => {}
                _ => outcome = CacheResult::Error,
            }
        }
        let outcome = if found.is_empty() { outcome } else { CacheResult::Hit };
        self.metrics.count_cache(kind, Tier::Redis, outcome);
        found
    }

    async fn keep(
        &self,
        keys: &KeySet,
        purpose: Sealed,
        name: &RedisName,
        plaintext: &[u8],
        lifetime: Duration,
    ) {
        let Some(milliseconds) = lifetime_milliseconds(lifetime) else { return };
        let sealed = match seal(keys, purpose, name, plaintext) {
            Ok(sealed) => sealed,
            Err(error) => {
                tracing::debug!(%error, "cache entry was not kept in Redis");
                return;
            }
        };
        let mut request = Pipeline::with_capacity(1);
        request.cmd("SET").arg(name.as_str()).arg(sealed).arg("PX").arg(milliseconds);
        let Ok(replies) = self.calls.call(&request, Duty::Write).await else { return };
        if replies.iter().any(|reply| matches!(reply, Value::ServerError(_))) {
            self.calls.remember(FailureKind::Refused);
        }
    }
}

impl std::fmt::Debug for RedisCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisCache").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// Whole milliseconds, rounded down; `None` where none is left.
fn lifetime_milliseconds(lifetime: Duration) -> Option<u64> {
    u64::try_from(lifetime.min(MAX_LIFETIME).as_millis()).ok().filter(|milliseconds| *milliseconds > 0)
}
