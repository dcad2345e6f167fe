//! What the admin port asks of the caches: statistics, invalidation, flush.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use super::candidates::Candidates;
use super::freshness::{Freshness, Mode};
use super::outage::Outage;
use super::proof::Prover;
use crate::cache::redis::RedisCache;
use crate::clock;
use crate::domain::decision::Tier;
use crate::store::Store;
use crate::store::admin::KeySelector;
use crate::telemetry::gauges::{CacheSizes, PoolUse};
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
    /// Whether the store is silent.
    pub outage: Arc<Outage>,
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
        let now = clock::instant();
        let seconds = |age: Option<Duration>| age.map_or(-1.0, |age| age.as_secs_f64());
        self.metrics.lease_age.set(seconds(self.freshness.lease_age(now)));
        let gauges = &self.metrics.gauges;
        gauges.set_feed_mode(match self.freshness.mode() {
            Mode::Starting => "starting",
            Mode::Feed => "feed",
            Mode::Ttl(_) => "ttl",
        });
        gauges.freshness_window.set(self.freshness.window().as_secs_f64());
        gauges.outage_limit.set(self.freshness.outage_limit().as_secs_f64());

        let answered = self.outage.last_answer();
        gauges.store_up.set(i64::from(answered.is_some() && !self.outage.is_outage(now)));
        gauges.store_answer_age.set(seconds(answered.map(|at| now.saturating_since(at))));
        let pool = self.store.sessions().map_or_else(PoolUse::default, |sessions| PoolUse {
            idle: sessions.idle,
            in_use: sessions.in_use,
            limit: sessions.limit,
            waiting: sessions.waiting,
        });
        gauges.set_pool_use(pool);
        if let Some(redis) = &self.redis {
            gauges.redis_connections.set(i64::try_from(redis.status().connections).unwrap_or(i64::MAX));
        }

        let memory = self.candidates.memory();
        let (present, absent) = memory.len();
        let (matches, mismatches) = self.prover.verdicts().len();
        let limit = memory.max_entries();
        gauges.set_cache_sizes(CacheSizes { present, absent, matches, mismatches, limit });
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
