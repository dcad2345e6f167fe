//! Every metric: its name, unit, help text and labels. Handles are passed in; there is no global.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::gauges::Gauges;
use super::labels::{CAUSES, REDIS_FAILURES, SHADOW_REASONS};
use super::process::Process;
use super::striped::{StripedCounter, StripedHistogram};
use crate::domain::decision::Tier;
use crate::domain::denial::Denial;

pub use super::labels::{
    BuildLabels, CacheKind, CacheLabels, CacheResult, CheckLabels, Door, DoorLabels, FailureLabels,
    ReloadLabels, ShadowLabels, TierLabels,
};

/// The handles. Cloning shares them.
///
/// What every check counts is looked up once, when the handles are made: a family's look-up takes a lock and hashes its
/// labels. It also means that those series are there, at zero, from the start.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// `keyward_checks_total`
    checks: Family<CheckLabels, StripedCounter>,
    /// The most frequent one of them.
    checks_allowed: StripedCounter,
    /// `keyward_check_duration_seconds`
    check_duration: Family<TierLabels, StripedHistogram, fn() -> StripedHistogram>,
    check_durations: ByTier<StripedHistogram>,
    /// For checks that looked up no record.
    check_duration_without_tier: StripedHistogram,
    /// `keyward_cache_requests_total`
    cache_requests: Family<CacheLabels, StripedCounter>,
    record_requests: ByTier<ByResult>,
    verdict_requests: ByTier<ByResult>,
    /// `keyward_shadow_denials_total`
    shadow_denials: Family<ShadowLabels, Counter>,
    /// `keyward_bcrypt_duration_seconds`
    pub bcrypt_duration: Histogram,
    /// Comparisons so far: the histogram's count, for `/stats`.
    pub bcrypt_computed: Counter,
    /// `keyward_bcrypt_queue_depth`
    pub bcrypt_queue_depth: Gauge,
    /// `keyward_bcrypt_queue_limit`
    pub bcrypt_queue_limit: Gauge,
    /// `keyward_bcrypt_rejected_total`
    pub bcrypt_rejected: Counter,
    /// `keyward_bcrypt_threads`
    pub bcrypt_threads: Gauge,
    /// `keyward_bcrypt_busy_threads`
    pub bcrypt_busy_threads: Gauge,
    /// `keyward_store_query_duration_seconds`
    pub store_query_duration: Histogram,
    /// `keyward_redis_breaker_open`
    pub redis_breaker_open: Gauge,
    /// `keyward_redis_duration_seconds`
    pub redis_duration: Histogram,
    /// `keyward_redis_failures_total`
    pub redis_failures: Family<FailureLabels, Counter>,
    /// `keyward_invalid_rows_total`
    pub invalid_rows: Counter,
    /// `keyward_last_used_writes_total`
    pub last_used_writes: Counter,
    /// `keyward_last_used_dropped_total`
    pub last_used_dropped: Counter,
    /// `keyward_change_feed_up`
    pub change_feed_up: Gauge,
    /// `keyward_change_feed_lost_total`
    pub change_feed_lost: Counter,
    /// `keyward_changes_total`
    pub changes: Counter,
    /// `keyward_revocation_seconds`
    pub revocation: Histogram,
    /// `keyward_activation_seconds`
    pub activation: Histogram,
    /// `keyward_bound_violations_total`
    pub bound_violations: Counter,
    /// `keyward_lease_age_seconds`, set when it is asked for.
    pub lease_age: Gauge<f64, AtomicU64>,
    /// `keyward_deny_list_entries`
    pub deny_list_entries: Gauge,
    /// `keyward_deny_list_reload_failed`
    pub deny_list_reload_failed: Gauge,
    /// What is set when it is asked for.
    pub gauges: Gauges,
    /// `keyward_decision_log_dropped_total`
    pub decision_log_dropped: Counter,
    /// `keyward_reloads_total`
    reloads: Family<ReloadLabels, Counter>,
    /// `keyward_tls_reload_failed`
    tls_reload_failed: Family<DoorLabels, Gauge>,
    /// `keyward_tls_handshakes_failed_total`
    tls_handshakes_failed: Family<DoorLabels, Counter>,
    build_info: Family<BuildLabels, Gauge<i64, AtomicI64>>,
}

#[derive(Debug, Clone)]
struct ByTier<T> {
    memory: T,
    redis: T,
    store: T,
}

impl<T> ByTier<T> {
    fn new(make: impl Fn(Tier) -> T) -> Self {
        Self { memory: make(Tier::Memory), redis: make(Tier::Redis), store: make(Tier::Store) }
    }

    fn of(&self, tier: Tier) -> &T {
        match tier {
            Tier::Memory => &self.memory,
            Tier::Redis => &self.redis,
            Tier::Store => &self.store,
        }
    }
}

#[derive(Debug, Clone)]
struct ByResult {
    hit: StripedCounter,
    miss: StripedCounter,
    absent: StripedCounter,
    rejected: StripedCounter,
    error: StripedCounter,
}

impl ByResult {
    fn new(make: impl Fn(CacheResult) -> StripedCounter) -> Self {
        Self {
            hit: make(CacheResult::Hit),
            miss: make(CacheResult::Miss),
            absent: make(CacheResult::Absent),
            rejected: make(CacheResult::Rejected),
            error: make(CacheResult::Error),
        }
    }

    fn of(&self, result: CacheResult) -> &StripedCounter {
        match result {
            CacheResult::Hit => &self.hit,
            CacheResult::Miss => &self.miss,
            CacheResult::Absent => &self.absent,
            CacheResult::Rejected => &self.rejected,
            CacheResult::Error => &self.error,
        }
    }
}

/// 50 µs to 1.6 s: the steps double.
fn check_bounds() -> impl Iterator<Item = f64> {
    exponential_buckets(0.000_05, 2.0, 16)
}

fn check_buckets() -> StripedHistogram {
    StripedHistogram::new(check_bounds())
}

/// For what checks wait for.
fn backend_buckets() -> Histogram {
    Histogram::new(check_bounds())
}

fn toggle_buckets() -> Histogram {
    // 1 ms to 32 s: up to lease and grace.
    Histogram::new(exponential_buckets(0.001, 2.0, 16))
}

impl Metrics {
    /// New handles, all at zero.
    pub fn new() -> Self {
        let checks = Family::<CheckLabels, StripedCounter>::default();
        let checks_allowed = checks.get_or_create_owned(&CheckLabels { decision: "allow", reason: "ok" });
        // From the start and at zero: a rate can't see the first event of a series that comes with it.
        let denials = Denial::ALL.map(|denial| CheckLabels { decision: "deny", reason: denial.code() });
        let causes = CAUSES.map(|cause| CheckLabels { decision: "unavailable", reason: cause.as_str() });
        let anonymous = CheckLabels { decision: "allow", reason: "anonymous" };
        for labels in denials.iter().chain(&causes).chain([&anonymous]) {
            let _ = checks.get_or_create(labels);
        }
        let check_duration: Family<TierLabels, StripedHistogram, fn() -> StripedHistogram> =
            Family::new_with_constructor(check_buckets);
        let duration = |tier| check_duration.get_or_create_owned(&TierLabels { tier });
        let cache_requests = Family::<CacheLabels, StripedCounter>::default();
        let requests = |cache| {
            ByTier::new(|tier| {
                ByResult::new(|result| {
                    cache_requests.get_or_create_owned(&CacheLabels { cache, tier, result })
                })
            })
        };
        let shadow_denials = Family::<ShadowLabels, Counter>::default();
        for reason in SHADOW_REASONS {
            let _ = shadow_denials.get_or_create(&ShadowLabels { reason });
        }
        let redis_failures = Family::<FailureLabels, Counter>::default();
        for kind in REDIS_FAILURES {
            let _ = redis_failures.get_or_create(&FailureLabels { kind });
        }
        let reloads = Family::<ReloadLabels, Counter>::default();
        for result in ["ok", "failed"] {
            let _ = reloads.get_or_create(&ReloadLabels { result });
        }
        let tls_reload_failed = Family::<DoorLabels, Gauge>::default();
        let tls_handshakes_failed = Family::<DoorLabels, Counter>::default();
        for door in Door::ALL {
            let _ = tls_reload_failed.get_or_create(&DoorLabels { door });
            let _ = tls_handshakes_failed.get_or_create(&DoorLabels { door });
        }
        let build_info = Family::<BuildLabels, Gauge<i64, AtomicI64>>::default();
        build_info.get_or_create(&BuildLabels { version: env!("CARGO_PKG_VERSION") }).set(1);
        Self {
            checks_allowed,
            check_durations: ByTier::new(|tier| duration(tier.as_str())),
            check_duration_without_tier: duration("none"),
            record_requests: requests(CacheKind::Record),
            verdict_requests: requests(CacheKind::Verdict),
            checks,
            check_duration,
            cache_requests,
            shadow_denials,
            bcrypt_duration: Histogram::new(exponential_buckets(0.001, 2.0, 12)),
            bcrypt_computed: Counter::default(),
            bcrypt_queue_depth: Gauge::default(),
            bcrypt_queue_limit: Gauge::default(),
            bcrypt_rejected: Counter::default(),
            bcrypt_threads: Gauge::default(),
            bcrypt_busy_threads: Gauge::default(),
            store_query_duration: backend_buckets(),
            redis_breaker_open: Gauge::default(),
            redis_duration: backend_buckets(),
            redis_failures,
            invalid_rows: Counter::default(),
            last_used_writes: Counter::default(),
            last_used_dropped: Counter::default(),
            change_feed_up: Gauge::default(),
            change_feed_lost: Counter::default(),
            changes: Counter::default(),
            revocation: toggle_buckets(),
            activation: toggle_buckets(),
            bound_violations: Counter::default(),
            lease_age: Gauge::default(),
            deny_list_entries: Gauge::default(),
            deny_list_reload_failed: Gauge::default(),
            gauges: Gauges::new(),
            decision_log_dropped: Counter::default(),
            reloads,
            tls_reload_failed,
            tls_handshakes_failed,
            build_info,
        }
    }

    /// 1 while this door's certificate files can't be used.
    pub fn tls_reload_failed(&self, door: Door) -> Gauge {
        self.tls_reload_failed.get_or_create_owned(&DoorLabels { door })
    }

    /// Handshakes that came to nothing at this door.
    pub fn tls_handshakes_failed(&self, door: Door) -> Counter {
        self.tls_handshakes_failed.get_or_create_owned(&DoorLabels { door })
    }

    /// Counts one check that was allowed with a key.
    pub fn count_allowed(&self, tier: Option<Tier>, elapsed: Duration) {
        self.checks_allowed.inc();
        self.observe_check(tier, elapsed);
    }

    /// Counts one check that ended otherwise.
    pub fn count_check(&self, labels: &CheckLabels, tier: Option<Tier>, elapsed: Duration) {
        self.checks.get_or_create(labels).inc();
        self.observe_check(tier, elapsed);
    }

    fn observe_check(&self, tier: Option<Tier>, elapsed: Duration) {
        let duration = tier.map_or(&self.check_duration_without_tier, |tier| self.check_durations.of(tier));
        duration.observe(elapsed);
    }

    /// Counts one request that a rule in shadow mode would have denied.
    pub fn count_shadow_denial(&self, reason: &'static str) {
        self.shadow_denials.get_or_create(&ShadowLabels { reason }).inc();
    }

    /// Counts one reload (SIGHUP).
    pub fn count_reload(&self, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        self.reloads.get_or_create(&ReloadLabels { result }).inc();
    }

    /// Counts one look-up.
    pub fn count_cache(&self, cache: CacheKind, tier: Tier, result: CacheResult) {
        self.cache_counter(cache, tier, result).inc();
    }

    /// How often a look-up ended this way.
    pub fn cache_count(&self, cache: CacheKind, tier: Tier, result: CacheResult) -> u64 {
        self.cache_counter(cache, tier, result).get()
    }

    fn cache_counter(&self, cache: CacheKind, tier: Tier, result: CacheResult) -> &StripedCounter {
        let requests = match cache {
            CacheKind::Record => &self.record_requests,
            CacheKind::Verdict => &self.verdict_requests,
        };
        requests.of(tier).of(result)
    }

    /// The registry that `/metrics` prints. Names carry their unit; counters get `_total` from the encoder.
    pub fn registry(&self) -> Registry {
        let mut root = Registry::default();
        // Under the names that everybody's dashboards know.
        root.register_collector(Box::new(Process::new()));
        let registry = root.sub_registry_with_prefix("keyward");
        registry.register("checks", "Checks by decision and reason", self.checks.clone());
        registry.register(
            "check_duration_seconds",
            "Time to decide, by the tier that the record came from",
            self.check_duration.clone(),
        );
        registry.register(
            "cache_requests",
            "Look-ups by cache, tier and result",
            self.cache_requests.clone(),
        );
        registry.register(
            "shadow_denials",
            "Allowed requests that a rule in shadow mode would have denied, by reason",
            self.shadow_denials.clone(),
        );
        self.register_backends(registry);
        registry.register(
            "invalid_rows",
            "Key rows read with a hash or a restriction that can't be used",
            self.invalid_rows.clone(),
        );
        registry.register(
            "last_used_writes",
            "Keys whose last_used_at was written",
            self.last_used_writes.clone(),
        );
        registry.register(
            "last_used_dropped",
            "Uses that were not written because the queue was full or the store refused",
            self.last_used_dropped.clone(),
        );
        registry.register("change_feed_up", "1 while row changes are received", self.change_feed_up.clone());
        registry.register(
            "change_feed_lost",
            "Sessions of the change feed that ended after they had proven something",
            self.change_feed_lost.clone(),
        );
        registry.register("changes", "Changes that the feed has told of", self.changes.clone());
        registry.register(
            "lease_age_seconds",
            "Time since the feed last proved that no change was missed; -1 where it never has",
            self.lease_age.clone(),
        );
        registry.register(
            "revocation_seconds",
            "Time from switching the canary's key off to its refusal",
            self.revocation.clone(),
        );
        registry.register(
            "activation_seconds",
            "Time from switching the canary's key on to its being allowed",
            self.activation.clone(),
        );
        registry.register(
            "bound_violations",
            "Changes of the canary's key that took effect later than the bound says",
            self.bound_violations.clone(),
        );
        registry.register(
            "deny_list_entries",
            "Entries of the emergency deny list",
            self.deny_list_entries.clone(),
        );
        registry.register(
            "deny_list_reload_failed",
            "1 while the deny file can't be used and its last good version is in force",
            self.deny_list_reload_failed.clone(),
        );
        registry.register(
            "decision_log_dropped",
            "Lines of the decision log that were not written",
            self.decision_log_dropped.clone(),
        );
        registry.register(
            "reloads",
            "Reloads by SIGHUP, and changes of the cache secret's file, by result",
            self.reloads.clone(),
        );
        registry.register(
            "tls_reload_failed",
            "1 while the TLS files of a door can't be used and their last good version is in force",
            self.tls_reload_failed.clone(),
        );
        registry.register(
            "tls_handshakes_failed",
            "TLS handshakes that failed or took too long, by door",
            self.tls_handshakes_failed.clone(),
        );
        registry.register("build_info", "The running version", self.build_info.clone());
        self.gauges.register(registry);
        root
    }

    /// What a check may wait for.
    fn register_backends(&self, registry: &mut Registry) {
        registry.register(
            "bcrypt_duration_seconds",
            "Time of one bcrypt comparison",
            self.bcrypt_duration.clone(),
        );
        registry.register(
            "bcrypt_queue_depth",
            "Verifications that wait for a thread",
            self.bcrypt_queue_depth.clone(),
        );
        registry.register(
            "bcrypt_queue_limit",
            "Verifications that may wait; one more is answered with unavailable",
            self.bcrypt_queue_limit.clone(),
        );
        registry.register(
            "bcrypt_rejected",
            "Verifications that were not begun because too many waited",
            self.bcrypt_rejected.clone(),
        );
        registry.register(
            "bcrypt_threads",
            "Threads that compute bcrypt (--verify-threads)",
            self.bcrypt_threads.clone(),
        );
        registry.register(
            "bcrypt_busy_threads",
            "Threads that are computing bcrypt now",
            self.bcrypt_busy_threads.clone(),
        );
        registry.register(
            "store_query_duration_seconds",
            "Time of one look-up in the store, waiting for a session included, failures too",
            self.store_query_duration.clone(),
        );
        registry.register(
            "redis_breaker_open",
            "1 while Redis is left alone",
            self.redis_breaker_open.clone(),
        );
        registry.register(
            "redis_duration_seconds",
            "Time of one round trip to Redis, waiting for a connection included, failures too",
            self.redis_duration.clone(),
        );
        registry.register(
            "redis_failures",
            "Round trips to Redis that failed, by kind",
            self.redis_failures.clone(),
        );
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
