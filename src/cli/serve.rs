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
use crate::authorizer::candidates::{Candidates, RecordLifetimes};
use crate::authorizer::deny::DenyControl;
use crate::authorizer::proof::Prover;
use crate::authorizer::uses::{self, UseWriter};
use crate::cache::records::RecordCache;
use crate::cache::redis::{RedisCache, RedisOptions};
use crate::cache::redis_url::RedisUrl;
use crate::cache::secrets::CacheSecrets;
use crate::cache::verdict_name::VerdictNamer;
use crate::cache::verdicts::VerdictCache;
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
    let readiness = Arc::new(Readiness::new());
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
        deny: Arc::clone(&parts.deny),
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
    let watching_file = tokio::spawn(parts.deny.watch());
    let mode =
        format!("ttl mode, changes take effect within {}", humantime::format_duration(record_ttl(settings)));
    let watching = tokio::spawn(watch_store(parts.store, Arc::clone(&readiness), health.clone(), mode));

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
    // Not before the last answer: a denial has to hold for that one too.
    watching_file.abort();
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
    deny: Arc<DenyControl>,
    store: Store,
    uses: UseWriter,
    background: Background,
}

impl Parts {
    async fn build(settings: &Settings, metrics: &Metrics) -> Result<Self, Failure> {
        let deny = DenyControl::open(settings.deny_file.clone(), settings.key_prefix_length, metrics.clone())
            .map_err(|error| Failure::usage(error.into()))?;
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
        let lifetimes =
            RecordLifetimes { present: record_ttl(settings), absent: settings.cache_negative_ttl };
        let candidates = Candidates::new(
            RecordCache::new(max_entries),
            redis.clone(),
            store.clone(),
            Arc::clone(&prover),
            background.clone(),
            metrics.clone(),
            lifetimes,
        );
        let interval = settings.last_used_interval;
        let (recorder, uses) =
            uses::channel(store.clone(), redis.clone(), interval, max_entries, metrics.clone());
        let authorizer = Arc::new(Authorizer::new(
            Arc::clone(&candidates),
            Arc::clone(&prover),
            Arc::clone(&deny),
            recorder,
            settings.key_prefix_length,
        ));
        let caches = CacheAdmin { candidates, prover, redis, store: store.clone(), metrics: metrics.clone() };
        Ok(Self { authorizer, caches, deny, store, uses, background })
    }
}

/// There is no change feed yet, so the shorter of the two lifetimes is how long a change takes.
fn record_ttl(settings: &Settings) -> Duration {
    settings.cache_record_ttl.min(settings.record_ttl_without_feed)
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

/// Ready once the store has answered; until then says what is missing. Goes on asking, because each answer also looks
/// at the tables anew: a restriction column that is added while we run has to be read from then on.
async fn watch_store(store: Store, readiness: Arc<Readiness>, health: HealthReporter, mode: String) {
    let mut trouble = Some("the store has not answered yet".to_owned());
    loop {
        let answer = store.ping().await.map_err(|error| format!("{:#}", anyhow::Error::new(error)));
        match &answer {
            Ok(()) if trouble.is_some() => {
                tracing::info!(store = store.kind(), mode, "the store answers");
                readiness.set_ready(mode.clone());
                set_health(&health, ServingStatus::Serving).await;
            }
            Err(error) if trouble.as_ref() != Some(error) => {
                tracing::warn!(error, "the store does not answer");
                readiness.set_waiting(error.clone());
            }
            Ok(()) | Err(_) => {}
        }
        trouble = answer.err();
        tokio::time::sleep(if trouble.is_some() { RETRY_STORE } else { WATCH_STORE }).await;
    }
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(SERVICE_NAME, status).await;
}
