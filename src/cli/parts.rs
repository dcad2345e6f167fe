//! What is behind the doors of `keyward serve`, and behind `keyward check`: the one place that puts all parts together.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use super::failure::Failure;
use super::secret::{HashForm, NewSecret};
use crate::authorizer::Authorizer;
use crate::authorizer::admin::CacheAdmin;
use crate::authorizer::attempts::Attempts;
use crate::authorizer::background::Background;
use crate::authorizer::bcrypt_pool::BcryptPool;
use crate::authorizer::canary::{self, Canary};
use crate::authorizer::candidates::{Candidates, CandidatesParts};
use crate::authorizer::deny::DenyControl;
use crate::authorizer::feed::FeedFollower;
use crate::authorizer::freshness::{Freshness, FreshnessSettings};
use crate::authorizer::lookups::Lookups;
use crate::authorizer::outage::Outage;
use crate::authorizer::proof::Prover;
use crate::authorizer::uses::{self, UseWriter};
use crate::cache::records::RecordCache;
use crate::cache::redis::{RedisCache, RedisOptions};
use crate::cache::redis_url::RedisUrl;
use crate::cache::secrets::CacheSecrets;
use crate::cache::verdict_name::VerdictNamer;
use crate::cache::verdicts::VerdictCache;
use crate::config::Settings;
use crate::domain::key::{PrefixLength, PresentedKey};
use crate::domain::key_format::KeyForm;
use crate::domain::rules::PolicyRules;
use crate::store::admin::{KeySettings, NewKey, UserRef};
use crate::store::{CLI_QUERY_TIMEOUT, SERVE_QUERY_TIMEOUT, Store, StoreOptions, StoreUrl};
use crate::telemetry::metrics::Metrics;

/// Pooled connections to each backend: a look-up holds one for about a millisecond.
const STORE_CONNECTIONS: usize = 8;
const REDIS_CONNECTIONS: usize = 8;
/// What Redis may cost a cold key (guarantee 6).
const REDIS_TIMEOUT: Duration = Duration::from_millis(20);

/// What is behind the doors, put together from the settings.
pub(super) struct Parts {
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) caches: CacheAdmin,
    pub(super) redis: Option<Arc<RedisCache>>,
    pub(super) deny: Arc<DenyControl>,
    pub(super) store: Store,
    pub(super) freshness: Arc<Freshness>,
    pub(super) outage: Arc<Outage>,
    pub(super) feed: FeedFollower,
    pub(super) uses: UseWriter,
    pub(super) background: Background,
    pub(super) canary: Option<Canary>,
}

/// What the parts are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The sidecar.
    Serve,
    /// One answer by the store alone: nothing is created, nothing is written, Redis is not asked.
    CheckOnce,
}

impl Parts {
    pub(super) async fn build(
        settings: &Settings,
        metrics: &Metrics,
        purpose: Purpose,
    ) -> Result<Self, Failure> {
        let serves = purpose == Purpose::Serve;
        let deny = DenyControl::open(settings.deny_file.clone(), settings.key_prefix_length, metrics.clone())
            .map_err(|error| Failure::usage(error.into()))?;
        let store = Store::open(StoreOptions {
            url: StoreUrl::parse(settings.store.expose_secret())
                .context("read --store")
                .map_err(Failure::usage)?,
            connections: if serves { STORE_CONNECTIONS } else { 1 },
            query_timeout: if serves { SERVE_QUERY_TIMEOUT } else { CLI_QUERY_TIMEOUT },
            create_if_missing: serves,
            actor: None,
        })
        .await?;
        let redis = if serves { open_redis(settings, metrics).map_err(Failure::usage)? } else { None };
        let max_entries = settings.cache_max_entries;
        let background = Background::new();
        let pool = BcryptPool::start(settings.verify_threads, metrics.clone())
            .context("start the bcrypt threads")?;
        let namer = VerdictNamer::random().context("draw a random key")?;
        let prover = Prover::new(
            VerdictCache::new(namer, max_entries),
            redis.clone(),
            pool,
            background.clone(),
            metrics.clone(),
            settings.cache_verdict_ttl,
        );
        let freshness = Arc::new(Freshness::new(FreshnessSettings {
            lease: settings.lease,
            outage_grace: settings.outage_grace,
            without_feed: settings.record_ttl_without_feed,
            record_ttl: settings.cache_record_ttl,
        }));
        let outage = Arc::new(Outage::default());
        let candidates = Candidates::new(CandidatesParts {
            memory: RecordCache::new(max_entries),
            redis: redis.clone(),
            store: store.clone(),
            prover: Arc::clone(&prover),
            freshness: Arc::clone(&freshness),
            outage: Arc::clone(&outage),
            lookups: Lookups::new(settings.lookups_per_second),
            background: background.clone(),
            metrics: metrics.clone(),
            absent_lifetime: settings.cache_negative_ttl,
        });
        let feed = FeedFollower {
            store: store.clone(),
            candidates: Arc::clone(&candidates),
            freshness: Arc::clone(&freshness),
            outage: Arc::clone(&outage),
            metrics: metrics.clone(),
        };
        let interval = settings.last_used_interval;
        let (recorder, uses) =
            uses::channel(store.clone(), redis.clone(), interval, max_entries, metrics.clone());
        let authorizer = Arc::new(Authorizer::new(
            Arc::clone(&candidates),
            Arc::clone(&prover),
            Arc::clone(&deny),
            Attempts::new(settings.attempts_per_minute),
            PolicyRules {
                model_paths: settings.model_paths.clone(),
                scope_paths: settings.scope_paths.clone(),
                shadow: settings.shadow,
            },
            recorder,
            KeyForm { prefix_length: settings.key_prefix_length, beginning: settings.new_key_prefix.clone() },
        ));
        let caches = CacheAdmin {
            candidates,
            prover,
            redis: redis.clone(),
            store: store.clone(),
            freshness: Arc::clone(&freshness),
            outage: Arc::clone(&outage),
            metrics: metrics.clone(),
        };
        metrics.gauges.canary_enabled.set(i64::from(settings.canary && serves));
        let canary = if settings.canary && serves {
            let (new_key, presented) = canary_key(settings.key_prefix_length).map_err(Failure::usage)?;
            Some(Canary {
                store: store.clone(),
                authorizer: Arc::clone(&authorizer),
                freshness: Arc::clone(&freshness),
                metrics: metrics.clone(),
                new_key,
                presented,
            })
        } else {
            None
        };
        Ok(Self { authorizer, caches, redis, deny, store, freshness, outage, feed, uses, background, canary })
    }
}

fn open_redis(settings: &Settings, metrics: &Metrics) -> anyhow::Result<Option<Arc<RedisCache>>> {
    let (Some(url), Some(secret_file)) = (&settings.redis, &settings.cache_secret_file) else {
        return Ok(None);
    };
    let options = RedisOptions {
        url: RedisUrl::parse(url.expose_secret()).context("read --redis")?,
        secrets: CacheSecrets::read(secret_file).context("read --cache-secret-file")?,
        timeout: REDIS_TIMEOUT,
        connections: REDIS_CONNECTIONS,
    };
    Ok(Some(Arc::new(RedisCache::open(options, metrics.clone())?)))
}

/// A key that is good for one path that nobody serves.
fn canary_key(length: PrefixLength) -> anyhow::Result<(NewKey, PresentedKey)> {
    const RANDOM_IN_PREFIX: usize = 5;
    let beginning: String =
        "kwcanary".chars().cycle().take(length.get().saturating_sub(RANDOM_IN_PREFIX)).collect();
    let secret = NewSecret::generate(&beginning, length).context("make a key for --canary")?;
    let presented = PresentedKey::parse(secret.text.as_bytes()).context("make a key for --canary")?;
    let new_key = NewKey {
        user: UserRef::Username(canary::USERNAME.to_owned()),
        name: "canary of one replica".to_owned(),
        prefix: secret.prefix.clone(),
        hash: secret.hash(HashForm::Sha256)?,
        is_active: true,
        settings: KeySettings {
            description: Some("Measures how long a change takes; removed when its replica stops.".to_owned()),
            allowed_endpoints: vec![canary::PATH.to_owned()],
            ..KeySettings::default()
        },
    };
    Ok((new_key, presented))
}
