//! What the admin port asks of the caches: statistics, invalidation, flush.

use std::collections::HashSet;
use std::sync::Arc;

use serde_json::{Value, json};
use thiserror::Error;

use super::candidates::Candidates;
use super::freshness::{Freshness, Mode};
use super::proof::Prover;
use crate::cache::redis::RedisCache;
use crate::clock;
use crate::domain::decision::Tier;
use crate::store::Store;
use crate::store::admin::KeySelector;
use crate::telemetry::metrics::{CacheKind, CacheResult, Metrics};

/// All tiers, as an operator sees them.
pub struct CacheAdmin {
    /// Records.
    pub candidates: Arc<Candidates>,
    /// Verdicts.
    pub prover: Arc<Prover>,
    /// The shared tier.
    pub redis: Option<Arc<RedisCache>>,
    /// Knows which prefixes a key or user has.
    pub store: Store,
    /// What the change feed has proven.
    pub freshness: Arc<Freshness>,
    /// The counters.
    pub metrics: Metrics,
}

/// Memory was cleared, but not everything else.
#[derive(Debug, Error)]
pub enum AdminError {
    /// Redis did not take the deletion.
    #[error("memory was cleared, but redis could not be: entries there live on until they end by themselves")]
    Redis,
    /// The store could not name the prefixes.
    #[error("memory was cleared, but the store could not be asked which prefixes redis may hold")]
    Store,
}

impl CacheAdmin {
    /// Forgets the records of a prefix, key or user here and in Redis.
    pub async fn invalidate(&self, selector: &KeySelector) -> Result<Value, AdminError> {
        let memory = self.candidates.memory();
        let invalidate_memory = || match selector {
            KeySelector::Prefix(prefix) => memory.invalidate(prefix),
            KeySelector::Key(id) => memory.invalidate_key(*id),
            KeySelector::User(id) => memory.invalidate_users(&HashSet::from([*id])),
        };
        invalidate_memory();
        if let Some(redis) = &self.redis {
            let prefixes = self.store.prefixes(selector).await.map_err(|_| AdminError::Store)?;
            redis.forget(&prefixes).await.map_err(|_| AdminError::Redis)?;
            // A check may have taken the old record from Redis between the two.
            invalidate_memory();
        }
        Ok(json!({ "invalidated": true }))
    }

    /// Forgets everything here and everything of ours in Redis.
    pub async fn flush(&self) -> Result<Value, AdminError> {
        let flush_memory = || {
            self.candidates.memory().clear();
            self.prover.verdicts().clear();
        };
        flush_memory();
        let mut removed = 0;
        if let Some(redis) = &self.redis {
            removed = redis.flush().await.map_err(|_| AdminError::Redis)?;
            flush_memory();
        }
        Ok(json!({ "flushed": true, "redis_entries_removed": removed }))
    }

    fn feed(&self) -> Value {
        let (mode, reason) = match self.freshness.mode() {
            Mode::Starting => ("starting", None),
            Mode::Feed => ("feed", None),
            Mode::Ttl(reason) => ("ttl", Some(reason)),
        };
        json!({
            "mode": mode,
            "reason": reason,
            "up": self.metrics.change_feed_up.get() == 1,
            "lease_age_seconds": self.freshness.lease_age(clock::instant()).map(|age| age.as_secs_f64()),
            "changes": self.metrics.changes.get(),
        })
    }

    /// Sets what is not counted as it happens.
    pub fn refresh_metrics(&self) {
        let age = self.freshness.lease_age(clock::instant());
        self.metrics.lease_age.set(age.map_or(-1.0, |age| age.as_secs_f64()));
    }

    /// Hits, misses and sizes by cache and tier, and the state of the backends.
    pub fn stats(&self) -> Value {
        let counts = |cache, tier| {
            let count = |result| self.metrics.cache_count(cache, tier, result);
            json!({
                "hits": count(CacheResult::Hit),
                "misses": count(CacheResult::Miss),
                "absent": count(CacheResult::Absent),
                "rejected": count(CacheResult::Rejected),
                "errors": count(CacheResult::Error),
            })
        };
        let (present, absent) = self.candidates.memory().len();
        let (matches, mismatches) = self.prover.verdicts().len();
        let redis = self.redis.as_ref().map(|redis| redis.status());
        json!({
            "records": {
                "memory": counts(CacheKind::Record, Tier::Memory),
                "redis": counts(CacheKind::Record, Tier::Redis),
                "store": counts(CacheKind::Record, Tier::Store),
                "entries": present,
                "absent_entries": absent,
            },
            "verdicts": {
                "memory": counts(CacheKind::Verdict, Tier::Memory),
                "redis": counts(CacheKind::Verdict, Tier::Redis),
                "entries": matches,
                "mismatch_entries": mismatches,
            },
            "bcrypt": {
                "computed": self.metrics.bcrypt_computed.get(),
                "queue_depth": self.metrics.bcrypt_queue_depth.get(),
            },
            "store": { "kind": self.store.kind() },
            "redis": redis.map_or(json!({ "enabled": false }), |status| json!({
                "enabled": true,
                "breaker": status.breaker,
                "last_error": status.last_error,
            })),
            "feed": self.feed(),
        })
    }
}
