//! `keyward serve`: the doors, and the life of the process.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::serve::ListenerExt;
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

use super::failure::{Exit, Failure};
use super::parts::{Parts, Purpose};
use crate::config::{Listen, Setting, Settings};
use crate::server::admin::{AdminState, router};
use crate::server::door::{CheckOptions, Door};
use crate::server::explain::Explainer;
use crate::server::forward_auth::ForwardAuth;
use crate::server::grpc::CheckService;
use crate::server::listen;
use crate::server::readiness::Readiness;
use crate::server::response::{Responder, ResponseOptions};
use crate::server::watch::{StoreWatch, set_health};
use crate::telemetry::logging;
use crate::telemetry::metrics::Metrics;

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
    let parts = Parts::build(settings, &metrics, Purpose::Serve).await?;
    let readiness = Arc::new(Readiness::new(Arc::clone(&parts.freshness), Arc::clone(&parts.outage)));
    let (health, health_service) = tonic_health::server::health_reporter();
    set_health(&health, ServingStatus::NotServing).await;

    let explainer =
        Explainer::new(Arc::clone(&parts.authorizer), responder(settings), settings.check_timeout);
    let door =
        Arc::new(Door::new(parts.authorizer, responder(settings), check_options(settings), metrics.clone()));
    let checks = AuthorizationServer::new(CheckService::new(Arc::clone(&door)))
        .max_decoding_message_size(settings.max_check_bytes);
    let grpc = Server::builder()
        .max_concurrent_streams(Some(MAX_CONCURRENT_STREAMS))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(health_service)
        .add_service(checks);
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
    open_grpc(&mut doors, grpc, &settings.grpc_listen, stop.clone()).await.map_err(Failure::usage)?;
    if let Some(address) = &settings.http_listen {
        let http =
            ForwardAuth::new(door, settings.http_profile, settings.max_check_bytes, Arc::clone(&readiness));
        open_http(&mut doors, http.router(), address, stop.clone()).await.map_err(Failure::usage)?;
    }
    let admin_listener =
        listen::tcp(settings.admin_listen).await.context("listen for admin requests (--admin-listen)");
    let admin_listener = admin_listener.map_err(Failure::usage)?;
    open_admin(&mut doors, admin, admin_listener, stop.clone());

    let stop_writing = CancellationToken::new();
    let writer = tokio::spawn(parts.uses.run(stop_writing.clone()));
    let watching_file = tokio::spawn(parts.deny.watch());
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
    stop_writing.cancel();
    let _ = writer.await;
    parts.background.finish(FINISH_LIMIT).await;
    for address in [Some(&settings.grpc_listen), settings.http_listen.as_ref()].into_iter().flatten() {
        if let Listen::Unix(path) = address {
            let _ = std::fs::remove_file(path);
        }
    }
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

async fn open_http(
    doors: &mut JoinSet<()>,
    http: axum::Router,
    address: &Listen,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let context = "listen for checks over HTTP (--http-listen)";
    match address {
        Listen::Tcp(address) => {
            let listener = listen::tcp(*address).await.context(context)?.tap_io(|stream| {
                // An answer in two segments would otherwise wait for the peer's delayed acknowledgement.
                let _ = stream.set_nodelay(true);
            });
            doors.spawn(async move {
                let serving = axum::serve(listener, http).with_graceful_shutdown(stop.cancelled_owned());
                report("http", serving.await);
            });
        }
        Listen::Unix(path) => {
            let listener = listen::unix(path).await.context(context)?;
            doors.spawn(async move {
                let serving = axum::serve(listener, http).with_graceful_shutdown(stop.cancelled_owned());
                report("http", serving.await);
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
