//! States, as opposed to events: set when `/metrics` is asked for, so that no check pays for them.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// A gauge of seconds.
pub type Seconds = Gauge<f64, AtomicU64>;

/// One kind of entry of one cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EntryLabels {
    /// `record` or `verdict`
    cache: &'static str,
    /// `present` or `absent`; `match` or `mismatch`
    kind: &'static str,
}

/// What a session with the store is doing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    /// `idle` or `in_use`
    state: &'static str,
}

/// How changes arrive.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabels {
    /// `starting`, `feed` or `ttl`
    mode: &'static str,
}

/// Entries in memory. Each kind holds at most `limit`.
#[derive(Debug, Clone, Copy, Default)]
pub struct CacheSizes {
    /// Prefixes with keys.
    pub present: usize,
    /// Prefixes known to have none.
    pub absent: usize,
    /// Keys proven to match.
    pub matches: usize,
    /// Keys proven not to.
    pub mismatches: usize,
    /// Most entries of each kind.
    pub limit: u64,
}

/// Sessions with the store; all zero where there is no pool.
#[derive(Debug, Clone, Copy, Default)]
pub struct PoolUse {
    /// Lent to nobody.
    pub idle: usize,
    /// Lent, or being set up.
    pub in_use: usize,
    /// Most sessions.
    pub limit: usize,
    /// Questions that wait for a session.
    pub waiting: usize,
}

/// The handles. Cloning shares them.
#[derive(Debug, Clone, Default)]
pub struct Gauges {
    /// `keyward_ready`
    pub ready: Gauge,
    /// `keyward_change_feed_mode`
    feed_mode: Family<ModeLabels, Gauge>,
    /// `keyward_freshness_window_seconds`
    pub freshness_window: Seconds,
    /// `keyward_outage_limit_seconds`
    pub outage_limit: Seconds,
    /// `keyward_cache_entries`
    cache_entries: Family<EntryLabels, Gauge>,
    /// `keyward_cache_max_entries`
    cache_max_entries: Gauge,
    /// `keyward_store_up`
    pub store_up: Gauge,
    /// `keyward_store_answer_age_seconds`
    pub store_answer_age: Seconds,
    /// `keyward_store_connections`
    store_connections: Family<ConnectionLabels, Gauge>,
    /// `keyward_store_max_connections`
    store_max_connections: Gauge,
    /// `keyward_store_waiting`
    store_waiting: Gauge,
    /// `keyward_redis_enabled`
    pub redis_enabled: Gauge,
    /// `keyward_redis_connections`
    pub redis_connections: Gauge,
    /// `keyward_canary_enabled`
    pub canary_enabled: Gauge,
}

impl Gauges {
    /// All at zero, and every series there.
    pub(super) fn new() -> Self {
        let gauges = Self::default();
        gauges.set_feed_mode("starting");
        gauges.set_cache_sizes(CacheSizes::default());
        gauges.set_pool_use(PoolUse::default());
        gauges
    }

    /// How changes arrive now: `starting`, `feed` or `ttl`.
    pub fn set_feed_mode(&self, now: &'static str) {
        for mode in ["starting", "feed", "ttl"] {
            self.feed_mode.get_or_create(&ModeLabels { mode }).set(i64::from(mode == now));
        }
    }

    /// What memory holds now.
    pub fn set_cache_sizes(&self, sizes: CacheSizes) {
        let set = |cache, kind, entries| {
            self.cache_entries.get_or_create(&EntryLabels { cache, kind }).set(whole(entries));
        };
        set("record", "present", sizes.present);
        set("record", "absent", sizes.absent);
        set("verdict", "match", sizes.matches);
        set("verdict", "mismatch", sizes.mismatches);
        self.cache_max_entries.set(i64::try_from(sizes.limit).unwrap_or(i64::MAX));
    }

    /// How the sessions with the store are used now.
    pub fn set_pool_use(&self, pool: PoolUse) {
        let set = |state, connections| {
            self.store_connections.get_or_create(&ConnectionLabels { state }).set(whole(connections));
        };
        set("idle", pool.idle);
        set("in_use", pool.in_use);
        self.store_max_connections.set(whole(pool.limit));
        self.store_waiting.set(whole(pool.waiting));
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("ready", "1 while /readyz says that there may be traffic", self.ready.clone());
        registry.register(
            "change_feed_mode",
            "1 for how changes arrive: by the feed, by reading again (ttl), or not known yet (starting)",
            self.feed_mode.clone(),
        );
        registry.register(
            "freshness_window_seconds",
            "Longest time from a change to its effect now, less one read, while the store answers",
            self.freshness_window.clone(),
        );
        registry.register(
            "outage_limit_seconds",
            "Longest use of a record while the store does not answer",
            self.outage_limit.clone(),
        );
        registry.register("cache_entries", "Entries in memory by cache and kind", self.cache_entries.clone());
        registry.register(
            "cache_max_entries",
            "Most entries in memory of each cache and kind",
            self.cache_max_entries.clone(),
        );
        registry.register("store_up", "1 while the store answers", self.store_up.clone());
        registry.register(
            "store_answer_age_seconds",
            "Time since the store last answered anything; -1 where it never has",
            self.store_answer_age.clone(),
        );
        registry.register(
            "store_connections",
            "Sessions with the store by what they do",
            self.store_connections.clone(),
        );
        registry.register(
            "store_max_connections",
            "Most sessions with the store; 0 where it needs none",
            self.store_max_connections.clone(),
        );
        registry.register(
            "store_waiting",
            "Questions that wait for a session with the store",
            self.store_waiting.clone(),
        );
        registry.register("redis_enabled", "1 where Redis is configured", self.redis_enabled.clone());
        registry.register(
            "redis_connections",
            "Connections to Redis that are up",
            self.redis_connections.clone(),
        );
        registry.register("canary_enabled", "1 where the canary is on", self.canary_enabled.clone());
    }
}

fn whole(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
