//! `keyward serve`: wiring, and the life of the process. The only place that knows all parts.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use envoy_types::pb::envoy::service::auth::v3::authorization_server::AuthorizationServer;
use serde_json::{Map, Value};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpIncoming};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::failure::{Exit, Failure};
use crate::authorizer::Authorizer;
use crate::authorizer::admin::CacheAdmin;
use crate::authorizer::background::Background;
use crate::authorizer::bcrypt_pool::BcryptPool;
use crate::authorizer::candidates::{Candidates, CandidatesParts};
use crate::authorizer::feed::FeedFollower;
use crate::authorizer::freshness::{Freshness, FreshnessSettings, Mode};
use crate::authorizer::outage::Outage;
use crate::authorizer::proof::Prover;
use crate::authorizer::uses::{self, UseWriter};
use crate::cache::records::RecordCache;
use crate::cache::redis::{RedisCache, RedisOptions};
use crate::cache::redis_url::RedisUrl;
use crate::cache::secrets::CacheSecrets;
use crate::cache::verdict_name::VerdictNamer;
use crate::cache::verdicts::VerdictCache;
use crate::clock;
use crate::config::{Listen, Setting, Settings};
use crate::server::admin::{AdminState, router};
use crate::server::grpc::{CheckOptions, CheckService};
use crate::server::listen;
use crate::server::readiness::Readiness;
use crate::server::response::{Responder, ResponseOptions};
use crate::store::{SERVE_QUERY_TIMEOUT, Store, StoreOptions, StoreUrl};
use crate::telemetry::logging;
use crate::telemetry::metrics::Metrics;

/// The name under which Envoy's health check asks for this service.
const SERVICE_NAME: &str = "envoy.service.auth.v3.Authorization";
/// Pooled connections to each backend: a look-up holds one for about a millisecond.
const STORE_CONNECTIONS: usize = 8;
const REDIS_CONNECTIONS: usize = 8;
/// What Redis may cost a cold key (guarantee 6).
const REDIS_TIMEOUT: Duration = Duration::from_millis(20);
/// Pauses between attempts to reach a store that does not answer.
const RETRY_STORE: Duration = Duration::from_millis(250);
/// Pauses while the change feed is awaited.
const STARTING: Duration = Duration::from_millis(5);
/// How often a store that answers is looked at anew.
const WATCH_STORE: Duration = Duration::from_secs(10);
/// What the last answers and writes may take after the drain delay.
const FINISH_LIMIT: Duration = Duration::from_secs(5);
/// Checks that one connection may have open: Envoy opens that many.
const MAX_CONCURRENT_STREAMS: u32 = 1024;

/// Runs the sidecar until it is told to stop.
pub(super) fn run(settings: &Settings) -> Result<Exit, Failure> {
    logging::start(settings.log_format, &settings.log_level);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(settings.worker_threads)
        .thread_name("keyward")
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(serve(settings))?;
    Ok(Exit::Done)
}

async fn serve(settings: &Settings) -> Result<(), Failure> {
    let metrics = Metrics::new();
    let parts = Parts::build(settings, &metrics).await?;
    let readiness = Arc::new(Readiness::new(Arc::clone(&parts.freshness), Arc::clone(&parts.outage)));
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::NotServing).await;

    let checks =
        CheckService::new(parts.authorizer, responder(settings), check_options(settings), metrics.clone());
    let checks = AuthorizationServer::new(checks).max_decoding_message_size(settings.max_check_bytes);
    let grpc = Server::builder()
        .max_concurrent_streams(Some(MAX_CONCURRENT_STREAMS))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(health_service)
        .add_service(checks);
    let admin = router(AdminState {
        caches: parts.caches,
        registry: metrics.registry(),
        readiness: Arc::clone(&readiness),
        settings: shown(settings),
    });

    // Before anybody can be served, so that nobody is cut off by a signal that nobody listens for.
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let stop = CancellationToken::new();
    let mut doors = JoinSet::new();
    open_grpc(&mut doors, grpc, &settings.grpc_listen, stop.clone()).await.map_err(Failure::usage)?;
    let admin_listener =
        listen::tcp(settings.admin_listen).await.context("listen for admin requests (--admin-listen)");
    let admin_listener = admin_listener.map_err(Failure::usage)?;
    open_admin(&mut doors, admin, admin_listener, stop.clone());

    let stop_writing = CancellationToken::new();
    let writer = tokio::spawn(parts.uses.run(stop_writing.clone()));
    let following = tokio::spawn(parts.feed.run());
    let watch = StoreWatch {
        store: parts.store,
        freshness: parts.freshness,
        outage: parts.outage,
        readiness: Arc::clone(&readiness),
        health: health.clone(),
    };
    let watching = tokio::spawn(watch.run());

    let (delay, end) = tokio::select! {
        _ = terminate.recv() => (settings.drain_delay, Ok(())),
        // A person at the terminal is not kept waiting.
        _ = interrupt.recv() => (Duration::ZERO, Ok(())),
        // A door that closes by itself is a defect or a lost socket: go down in order and let the supervisor act.
        _ = doors.join_next() => {
            (Duration::ZERO, Err(Failure::refused(anyhow::anyhow!("a listening socket was lost; the log says which"))))
        }
    };
    tracing::info!(delay = %humantime::format_duration(delay), "shutting down");
    watching.abort();
    // Until it has ended it might still say SERVING.
    let _ = watching.await;
    readiness.set_draining();
    set_health(&health, ServingStatus::NotServing).await;
    tokio::select! {
        () = tokio::time::sleep(delay) => {}
        _ = interrupt.recv() => {}
    }
    stop.cancel();
    let last_answers = async { while doors.join_next().await.is_some() {} };
    if tokio::time::timeout(FINISH_LIMIT, last_answers).await.is_err() {
        tracing::warn!("some connections were still open at the end");
    }
    // Until the last answer, so that a revocation holds on the way out too.
    following.abort();
    stop_writing.cancel();
    let _ = writer.await;
    parts.background.finish(FINISH_LIMIT).await;
    if let Listen::Unix(path) = &settings.grpc_listen {
        let _ = std::fs::remove_file(path);
    }
    tracing::info!("stopped");
    end
}

/// What is behind the doors.
struct Parts {
    authorizer: Arc<Authorizer>,
    caches: CacheAdmin,
    store: Store,
    freshness: Arc<Freshness>,
    outage: Arc<Outage>,
    feed: FeedFollower,
    uses: UseWriter,
    background: Background,
}

impl Parts {
    async fn build(settings: &Settings, metrics: &Metrics) -> Result<Self, Failure> {
        let store = Store::open(StoreOptions {
            url: StoreUrl::parse(settings.store.expose_secret())
                .context("read --store")
                .map_err(Failure::usage)?,
            connections: STORE_CONNECTIONS,
            query_timeout: SERVE_QUERY_TIMEOUT,
            create_if_missing: true,
        })
        .await?;
        let redis = open_redis(settings, metrics).map_err(Failure::usage)?;
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
            recorder,
            settings.key_prefix_length,
        ));
        let caches = CacheAdmin {
            candidates,
            prover,
            redis,
            store: store.clone(),
            freshness: Arc::clone(&freshness),
            metrics: metrics.clone(),
        };
        Ok(Self { authorizer, caches, store, freshness, outage, feed, uses, background })
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

/// What `/config` prints: every setting as text, secrets hidden.
fn shown(settings: &Settings) -> Value {
    let named = |(setting, value): (&Setting, String)| (setting.flag.to_owned(), Value::from(value));
    Value::Object(settings.shown().into_iter().map(named).collect::<Map<_, _>>())
}

fn responder(settings: &Settings) -> Responder {
    Responder::new(ResponseOptions {
        header_prefix: settings.response_header_prefix.clone(),
        headers: settings.response_headers.clone(),
        credential_sources: settings.credential_sources.clone(),
        forward_credentials: settings.forward_credentials,
        error_format: settings.error_format,
        on_unavailable: settings.on_unavailable,
    })
}

fn check_options(settings: &Settings) -> CheckOptions {
    CheckOptions {
        credential_sources: settings.credential_sources.clone(),
        credential_conflict: settings.credential_conflict,
        client_ip: settings.client_ip.clone(),
        timeout: settings.check_timeout,
    }
}

async fn open_grpc(
    doors: &mut JoinSet<()>,
    grpc: Router,
    address: &Listen,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let context = "listen for checks (--grpc-listen)";
    match address {
        Listen::Tcp(address) => {
            let incoming =
                TcpIncoming::from(listen::tcp(*address).await.context(context)?).with_nodelay(Some(true));
            doors.spawn(async move {
                report("grpc", grpc.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await);
            });
        }
        Listen::Unix(path) => {
            let incoming = UnixListenerStream::new(listen::unix(path).await.context(context)?);
            doors.spawn(async move {
                report("grpc", grpc.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await);
            });
        }
    }
    Ok(())
}

fn open_admin(doors: &mut JoinSet<()>, admin: axum::Router, listener: TcpListener, stop: CancellationToken) {
    doors.spawn(async move {
        report("admin", axum::serve(listener, admin).with_graceful_shutdown(stop.cancelled_owned()).await);
    });
}

fn report<E: std::error::Error>(door: &str, served: Result<(), E>) {
    if let Err(error) = served {
        tracing::error!(door, %error, "door closed");
    }
}

/// Looks at the store from time to time, also when nobody asks for a key: each answer looks at the tables anew (a
/// restriction column that is added while we run has to be read from then on), ends an outage, and makes us ready.
struct StoreWatch {
    store: Store,
    freshness: Arc<Freshness>,
    outage: Arc<Outage>,
    readiness: Arc<Readiness>,
    health: HealthReporter,
}

impl StoreWatch {
    async fn run(self) {
        let mut trouble = None;
        let mut said = None;
        let mut looked_at = None;
        loop {
            let now = clock::instant();
            if trouble.is_some() || looked_at.is_none_or(|at| now.saturating_since(at) >= WATCH_STORE) {
                looked_at = Some(now);
                trouble = self.look(trouble).await;
            }
            if trouble.is_none() && self.freshness.mode() != Mode::Starting {
                self.readiness.set_started();
            }
            let ready = self.readiness.check(clock::instant());
            if said != Some(ready.is_ok()) {
                match &ready {
                    Ok(mode) => tracing::info!(mode, "ready"),
                    Err(reason) => tracing::info!(reason, "not ready"),
                }
                let status = if ready.is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
                set_health(&self.health, status).await;
                said = Some(ready.is_ok());
            }
            // Ready as soon as it can be: start to ready is part of every rollout.
            let is_starting = said.is_none_or(|ready| !ready) && trouble.is_none();
            tokio::time::sleep(if is_starting { STARTING } else { RETRY_STORE }).await;
        }
    }

    /// What the store has against being asked, logged once each time it changes.
    async fn look(&self, before: Option<String>) -> Option<String> {
        match self.store.ping().await {
            Ok(()) => {
                self.outage.answered(clock::instant());
                if before.is_some() {
                    tracing::info!(store = self.store.kind(), "the store answers");
                }
                None
            }
            Err(error) => {
                self.outage.failed(clock::instant());
                let error = format!("{:#}", anyhow::Error::new(error));
                if before.as_ref() != Some(&error) {
                    tracing::warn!(error, "the store does not answer");
                }
                self.readiness.set_waiting(error.clone());
                Some(error)
            }
        }
    }
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(SERVICE_NAME, status).await;
}
