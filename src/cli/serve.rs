//! `keyward serve`: the doors, and the life of the process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use serde_json::{Map, Value};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;

use super::doors::{DoorsTls, Opening, door, open_admin, responder};
use super::failure::{Exit, Failure};
use super::flags::{AllSettings, SettingFlags};
use super::own_memory;
use super::parts::{Parts, Purpose};
use super::reload::Reloading;
use super::secret_file::SecretFile;
use crate::config::{Setting, Settings};
use crate::server::admin::{AdminState, router};
use crate::server::explain::Explainer;
use crate::server::grpc::GrpcServices;
use crate::server::readiness::Readiness;
use crate::server::watch::{StoreWatch, set_health};
use crate::server::workers::Workers;
use crate::telemetry::decision_log::DecisionLog;
use crate::telemetry::logging::{self, Level};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::traces::Traces;

/// What the last answers and writes may take after the drain delay.
const FINISH_LIMIT: Duration = Duration::from_secs(5);
/// What a reader of the decision log may take for its last lines.
const LAST_LINES_LIMIT: Duration = Duration::from_secs(1);

/// Runs the sidecar until it is told to stop.
pub(super) fn run(flags: SettingFlags<AllSettings>) -> Result<Exit, Failure> {
    let settings = &flags.clone().load()?.settings;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(settings.worker_threads)
        .thread_name("keyward")
        .enable_all()
        .build()
        .context("start the runtime")?;
    let traces = {
        let _inside = runtime.enter();
        Traces::start(&settings.otlp_endpoint, settings.otlp_protocol, settings.otlp_sample)
            .context("export spans (--otlp-endpoint)")
            .map_err(Failure::usage)?
    };
    let level = logging::start(settings.log_format, &settings.log_level, traces.as_ref());
    own_memory::keep();
    runtime.block_on(async {
        let served = serve(settings, flags, level).await;
        if let Some(traces) = traces {
            traces.finish(FINISH_LIMIT).await;
        }
        served
    })?;
    Ok(Exit::Done)
}

async fn serve(settings: &Settings, flags: SettingFlags<AllSettings>, level: Level) -> Result<(), Failure> {
    let metrics = Metrics::new();
    let tls = DoorsTls::load(settings, &metrics).map_err(Failure::usage)?;
    let decision_log = open_decision_log(settings, &metrics).await?;
    let parts = Parts::build(settings, &metrics, Purpose::Serve).await?;
    let readiness = Arc::new(Readiness::new(Arc::clone(&parts.freshness), Arc::clone(&parts.outage)));
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::NotServing).await;

    let explainer =
        Explainer::new(Arc::clone(&parts.authorizer), responder(settings), settings.check_timeout);
    let door = Arc::new(door(settings, parts.authorizer, decision_log.clone(), &metrics));
    let services = GrpcServices {
        door: Arc::clone(&door),
        max_bytes: settings.max_check_bytes,
        others: Routes::new(health_service).prepare(),
    };
    let shown = Arc::new(ArcSwap::from_pointee(shown(settings)));
    let admin = router(AdminState {
        caches: parts.caches,
        deny: Arc::clone(&parts.deny),
        explainer,
        registry: metrics.registry(),
        readiness: Arc::clone(&readiness),
        settings: Arc::clone(&shown),
    });

    // Before anybody can be served, so that nobody is cut off by a signal that nobody listens for.
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let hangup = signal(SignalKind::hangup()).context("listen for SIGHUP")?;
    let stop = CancellationToken::new();
    let mut doors = JoinSet::new();
    let workers = Workers::start(settings.worker_threads).context("start the threads that serve checks")?;
    let opening = Opening { settings, workers: Arc::new(workers), stop: &stop };
    opening.grpc(&mut doors, services, tls.grpc.clone()).await.map_err(Failure::usage)?;
    opening.http(&mut doors, door, &readiness, tls.http.clone()).await.map_err(Failure::usage)?;
    open_admin(&mut doors, admin, settings, &stop).map_err(Failure::usage)?;

    let secret_file = SecretFile::new(settings.cache_secret_file.clone(), parts.redis, metrics.clone());
    let reloading = Reloading {
        flags,
        in_force: settings.clone(),
        shown,
        level,
        deny: Arc::clone(&parts.deny),
        decision_log: decision_log.clone(),
        secret_file: secret_file.clone(),
        metrics: metrics.clone(),
    };
    let stop_writing = CancellationToken::new();
    let writer = tokio::spawn(parts.uses.run(stop_writing.clone()));
    let mut followers = JoinSet::new();
    followers.spawn(reloading.follow(hangup));
    followers.spawn(parts.deny.watch());
    followers.spawn(parts.feed.run());
    watch_files(&mut followers, secret_file, tls);
    let watch = StoreWatch {
        store: parts.store,
        freshness: parts.freshness,
        outage: parts.outage,
        readiness: Arc::clone(&readiness),
        health: health.clone(),
    };
    let watching = tokio::spawn(watch.run());
    let stop_canary = CancellationToken::new();
    let canary = parts.canary.map(|canary| tokio::spawn(canary.run(stop_canary.clone())));

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
    stop_canary.cancel();
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
    if let Some(canary) = canary
        && tokio::time::timeout(FINISH_LIMIT, canary).await.is_err()
    {
        tracing::warn!("the canary's key was left behind; another replica removes it within an hour");
    }
    // Not before the last answer: a revocation and a denial have to hold for that one too.
    followers.abort_all();
    write_last_lines(decision_log.as_deref()).await;
    stop_writing.cancel();
    let _ = writer.await;
    parts.background.finish(FINISH_LIMIT).await;
    tracing::info!("stopped");
    end
}

/// Files that are read again when they change.
fn watch_files(followers: &mut JoinSet<()>, secret_file: Option<SecretFile>, tls: DoorsTls) {
    if let Some(file) = secret_file {
        followers.spawn(file.watch());
    }
    for tls in [tls.grpc, tls.http].into_iter().flatten() {
        followers.spawn(tls.watch());
    }
}

/// What `/config` prints: every setting as text, secrets hidden.
pub(super) fn shown(settings: &Settings) -> Value {
    let named = |(setting, value): (&Setting, String)| (setting.flag.to_owned(), Value::from(value));
    Value::Object(settings.shown().into_iter().map(named).collect::<Map<_, _>>())
}

async fn open_decision_log(
    settings: &Settings,
    metrics: &Metrics,
) -> Result<Option<Arc<DecisionLog>>, Failure> {
    let Some(target) = &settings.decision_log else { return Ok(None) };
    let dropped = metrics.decision_log_dropped.clone();
    let log = DecisionLog::start(target.clone(), settings.decision_log_sample, dropped).await;
    log.map(Some).with_context(|| format!("open --decision-log {target}")).map_err(Failure::usage)
}

async fn write_last_lines(decision_log: Option<&DecisionLog>) {
    if let Some(log) = decision_log
        && !log.finish(LAST_LINES_LIMIT).await
    {
        tracing::warn!("nobody takes the last lines of the decision log; they are lost");
    }
}
