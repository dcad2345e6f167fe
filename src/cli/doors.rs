//! The doors of `keyward serve`, by the settings: what answers behind them, TLS, listening.

use std::sync::Arc;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::authorizer::Authorizer;
use crate::config::Settings;
use crate::domain::key_format::KeyForm;
use crate::server::connections::Connections;
use crate::server::decisions::DecisionRecorder;
use crate::server::grpc::{CheckOptions, CheckService};
use crate::server::listen::Listener;
use crate::server::response::{Responder, ResponseOptions};
use crate::server::tls::{Tls, TlsFiles};
use crate::telemetry::decision_log::DecisionLog;
use crate::telemetry::metrics::{Door, Metrics};

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

pub(super) fn check_service(
    settings: &Settings,
    authorizer: Arc<Authorizer>,
    decision_log: Option<Arc<DecisionLog>>,
    metrics: &Metrics,
) -> CheckService {
    let recorder = decision_log.map(|log| DecisionRecorder {
        log,
        credential_sources: settings.credential_sources.clone(),
        credential_conflict: settings.credential_conflict,
        form: KeyForm {
            prefix_length: settings.key_prefix_length,
            beginning: settings.new_key_prefix.clone(),
        },
    });
    CheckService::new(authorizer, responder(settings), check_options(settings), recorder, metrics.clone())
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
    let tls = Tls::load(Door::Grpc, files, &[b"h2"], metrics.clone());
    Ok(Some(Arc::new(
        tls.context("set up TLS for checks (--grpc-tls-cert, --grpc-tls-key, --grpc-tls-client-ca)")?,
    )))
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

pub(super) fn open_admin(
    doors: &mut JoinSet<()>,
    admin: axum::Router,
    listener: TcpListener,
    stop: CancellationToken,
) {
    doors.spawn(async move {
        report("admin", axum::serve(listener, admin).with_graceful_shutdown(stop.cancelled_owned()).await);
    });
}

fn report<E: std::error::Error>(door: &str, served: Result<(), E>) {
    if let Err(error) = served {
        tracing::error!(door, %error, "door closed");
    }
}
