//! The doors of `keyward serve`, by the settings: what answers behind them, TLS, listening.

use std::sync::Arc;

use anyhow::Context;
use axum::serve::ListenerExt;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::authorizer::Authorizer;
use crate::config::Settings;
use crate::domain::key_format::KeyForm;
use crate::server::connections::Connections;
use crate::server::decisions::DecisionRecorder;
use crate::server::door::{CheckOptions, Door};
use crate::server::forward_auth::ForwardAuth;
use crate::server::grpc::GrpcServices;
use crate::server::listen::{self, Listener};
use crate::server::readiness::Readiness;
use crate::server::response::{Responder, ResponseOptions};
use crate::server::tls::{Tls, TlsFiles};
use crate::server::workers::Workers;
use crate::telemetry::decision_log::DecisionLog;
use crate::telemetry::metrics::{Door as DoorLabel, Metrics};

/// What builds answers, by the settings.
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

/// What decides and answers, for all doors.
pub(super) fn door(
    settings: &Settings,
    authorizer: Arc<Authorizer>,
    decision_log: Option<Arc<DecisionLog>>,
    metrics: &Metrics,
) -> Door {
    let recorder = decision_log.map(|log| DecisionRecorder {
        log,
        credential_sources: settings.credential_sources.clone(),
        credential_conflict: settings.credential_conflict,
        form: KeyForm {
            prefix_length: settings.key_prefix_length,
            beginning: settings.new_key_prefix.clone(),
        },
    });
    Door::new(authorizer, responder(settings), check_options(settings), recorder, metrics.clone())
}

/// TLS for the gRPC port, as far as it is set.
pub(super) fn grpc_tls(settings: &Settings, metrics: &Metrics) -> anyhow::Result<Option<Arc<Tls>>> {
    let (Some(certificate), Some(key)) = (&settings.grpc_tls_cert, &settings.grpc_tls_key) else {
        return Ok(None);
    };
    let files = TlsFiles {
        certificate: certificate.clone(),
        key: key.clone(),
        client_ca: settings.grpc_tls_client_ca.clone(),
        client_sans: settings.grpc_tls_client_sans.clone(),
    };
    let tls = Tls::load(DoorLabel::Grpc, files, &[b"h2"], metrics.clone());
    Ok(Some(Arc::new(
        tls.context("set up TLS for checks (--grpc-tls-cert, --grpc-tls-key, --grpc-tls-client-ca)")?,
    )))
}

/// What every connection of the gRPC port gets.
pub(super) fn connections(
    settings: &Settings,
    services: GrpcServices,
    tls: Option<Arc<Tls>>,
) -> anyhow::Result<Connections> {
    let workers = Workers::start(settings.worker_threads).context("start the threads that serve checks")?;
    Ok(Connections { services, tls, workers: Arc::new(workers), max_age: settings.max_connection_age })
}

/// All of them, or none.
pub(super) async fn open_grpc(
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

/// Where it is set.
pub(super) async fn open_http(
    doors: &mut JoinSet<()>,
    door: Arc<Door>,
    settings: &Settings,
    readiness: &Arc<Readiness>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let Some(address) = &settings.http_listen else { return Ok(()) };
    let http = ForwardAuth::new(door, settings.http_profile, settings.max_check_bytes, Arc::clone(readiness))
        .router();
    let stop = stop.clone();
    let listener =
        Listener::open(address, false).await.context("listen for checks over HTTP (--http-listen)")?;
    match listener {
        Listener::Tcp(listener) => {
            let listener = listener.tap_io(|stream| {
                // An answer in two segments would otherwise wait for the peer's delayed acknowledgement.
                let _ = stream.set_nodelay(true);
            });
            doors.spawn(async move {
                let serving = axum::serve(listener, http).with_graceful_shutdown(stop.cancelled_owned());
                report("http", serving.await);
            });
        }
        Listener::Unix(listener, file) => {
            doors.spawn(async move {
                let serving = axum::serve(listener, http).with_graceful_shutdown(stop.cancelled_owned());
                report("http", serving.await);
                if let Some(file) = file {
                    file.remove();
                }
            });
        }
    }
    Ok(())
}

pub(super) fn open_admin(
    doors: &mut JoinSet<()>,
    admin: axum::Router,
    settings: &Settings,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let listener =
        listen::tcp(settings.admin_listen, false).context("listen for admin requests (--admin-listen)")?;
    let stop = stop.clone();
    doors.spawn(async move {
        report("admin", axum::serve(listener, admin).with_graceful_shutdown(stop.cancelled_owned()).await);
    });
    Ok(())
}

fn report<E: std::error::Error>(door: &str, served: Result<(), E>) {
    if let Err(error) = served {
        tracing::error!(door, %error, "door closed");
    }
}
