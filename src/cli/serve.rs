//! `keyward serve`: the doors, and the life of the process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use envoy_types::pb::envoy::service::auth::v3::authorization_server::AuthorizationServer;
use serde_json::{Map, Value};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;

use super::failure::{Exit, Failure};
use super::parts::{Parts, Purpose};
use crate::config::{Setting, Settings};
use crate::server::admin::{AdminState, router};
use crate::server::connections::Connections;
use crate::server::explain::Explainer;
use crate::server::grpc::{CheckOptions, CheckService};
use crate::server::listen::{self, Listener};
use crate::server::readiness::Readiness;
use crate::server::response::{Responder, ResponseOptions};
use crate::server::tls::{Tls, TlsFiles};
use crate::server::watch::{StoreWatch, set_health};
use crate::telemetry::logging;
use crate::telemetry::metrics::{Door, Metrics};

/// What the last answers and writes may take after the drain delay.
const FINISH_LIMIT: Duration = Duration::from_secs(5);

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
    let tls = grpc_tls(settings, &metrics).map_err(Failure::usage)?;
    let parts = Parts::build(settings, &metrics, Purpose::Serve).await?;
    let readiness = Arc::new(Readiness::new(Arc::clone(&parts.freshness), Arc::clone(&parts.outage)));
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::NotServing).await;

    let explainer =
        Explainer::new(Arc::clone(&parts.authorizer), responder(settings), settings.check_timeout);
    let checks =
        CheckService::new(parts.authorizer, responder(settings), check_options(settings), metrics.clone());
    let checks = AuthorizationServer::new(checks).max_decoding_message_size(settings.max_check_bytes);
    let grpc = Connections {
        routes: Routes::new(health_service).add_service(checks).prepare(),
        tls: tls.clone(),
        max_age: settings.max_connection_age,
    };
    let admin = router(AdminState {
        caches: parts.caches,
        deny: Arc::clone(&parts.deny),
        explainer,
        registry: metrics.registry(),
        readiness: Arc::clone(&readiness),
        settings: shown(settings),
    });

    // Before anybody can be served, so that nobody is cut off by a signal that nobody listens for.
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let stop = CancellationToken::new();
    let mut doors = JoinSet::new();
    open_grpc(&mut doors, grpc, settings, &stop).await.map_err(Failure::usage)?;
    let admin_listener =
        listen::tcp(settings.admin_listen, false).context("listen for admin requests (--admin-listen)");
    let admin_listener = admin_listener.map_err(Failure::usage)?;
    open_admin(&mut doors, admin, admin_listener, stop.clone());

    let stop_writing = CancellationToken::new();
    let writer = tokio::spawn(parts.uses.run(stop_writing.clone()));
    let watching_file = tokio::spawn(parts.deny.watch());
    let watching_tls = tls.map(|tls| tokio::spawn(tls.watch()));
    let following = tokio::spawn(parts.feed.run());
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
    following.abort();
    watching_file.abort();
    if let Some(watching_tls) = watching_tls {
        watching_tls.abort();
    }
    stop_writing.cancel();
    let _ = writer.await;
    parts.background.finish(FINISH_LIMIT).await;
    tracing::info!("stopped");
    end
}

/// What `/config` prints: every setting as text, secrets hidden.
fn shown(settings: &Settings) -> Value {
    let named = |(setting, value): (&Setting, String)| (setting.flag.to_owned(), Value::from(value));
    Value::Object(settings.shown().into_iter().map(named).collect::<Map<_, _>>())
}

pub(super) fn responder(settings: &Settings) -> Responder {
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

/// TLS for the gRPC port, as far as it is set.
fn grpc_tls(settings: &Settings, metrics: &Metrics) -> anyhow::Result<Option<Arc<Tls>>> {
    let (Some(certificate), Some(key)) = (&settings.grpc_tls_cert, &settings.grpc_tls_key) else {
        return Ok(None);
    };
    let files = TlsFiles {
        certificate: certificate.clone(),
        key: key.clone(),
        client_ca: settings.grpc_tls_client_ca.clone(),
        client_sans: settings.grpc_tls_client_sans.clone(),
    };
    let tls = Tls::load(Door::Grpc, files, &[b"h2"], metrics.clone());
    Ok(Some(Arc::new(
        tls.context("set up TLS for checks (--grpc-tls-cert, --grpc-tls-key, --grpc-tls-client-ca)")?,
    )))
}

/// All of them, or none.
async fn open_grpc(
    doors: &mut JoinSet<()>,
    grpc: Connections,
    settings: &Settings,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut listeners = Vec::new();
    for address in &settings.grpc_listen {
        let listener = Listener::open(address, settings.reuse_port).await;
        listeners.push(listener.context("listen for checks (--grpc-listen)")?);
    }
    for listener in listeners {
        doors.spawn(grpc.clone().serve(listener, stop.clone()));
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
