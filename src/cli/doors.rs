//! The doors of `keyward serve`, by the settings: what answers behind them, TLS, listening.

use std::sync::Arc;

use anyhow::Context;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::authorizer::Authorizer;
use crate::config::Settings;
use crate::domain::key_format::KeyForm;
use crate::server::connections::{Connections, Services};
use crate::server::decisions::DecisionRecorder;
use crate::server::door::{CheckOptions, Door};
use crate::server::forward_auth::ForwardAuth;
use crate::server::grpc::GrpcServices;
use crate::server::listen::{self, Listener, SocketOptions};
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

/// TLS for both ports, as far as it is set.
pub(super) struct DoorsTls {
    pub(super) grpc: Option<Arc<Tls>>,
    pub(super) http: Option<Arc<Tls>>,
}

impl DoorsTls {
    pub(super) fn load(settings: &Settings, metrics: &Metrics) -> anyhow::Result<Self> {
        let files =
            |certificate: &Option<_>, key: &Option<_>, client_ca: &Option<_>, client_sans: &Vec<_>| {
                let (certificate, key) = (certificate.clone()?, key.clone()?);
                Some(TlsFiles {
                    certificate,
                    key,
                    client_ca: client_ca.clone(),
                    client_sans: client_sans.clone(),
                })
            };
        let Settings { grpc_tls_cert, grpc_tls_key, grpc_tls_client_ca, grpc_tls_client_sans, .. } = settings;
        let Settings { http_tls_cert, http_tls_key, http_tls_client_ca, http_tls_client_sans, .. } = settings;
        let of_grpc = files(grpc_tls_cert, grpc_tls_key, grpc_tls_client_ca, grpc_tls_client_sans);
        let of_http = files(http_tls_cert, http_tls_key, http_tls_client_ca, http_tls_client_sans);
        let load = |door, files: Option<TlsFiles>, protocols, what: &'static str| {
            let tls = files.map(|files| Tls::load(door, files, protocols, metrics.clone()).context(what));
            tls.transpose().map(|tls| tls.map(Arc::new))
        };
        let grpc = load(
            DoorLabel::Grpc,
            of_grpc,
            &[b"h2"],
            "set up TLS for checks (--grpc-tls-cert, --grpc-tls-key, --grpc-tls-client-ca)",
        )?;
        let http = load(
            DoorLabel::Http,
            of_http,
            &[b"http/1.1"],
            "set up TLS for checks over HTTP (--http-tls-cert, --http-tls-key, --http-tls-client-ca)",
        )?;
        Ok(Self { grpc, http })
    }
}

/// What both ports share.
pub(super) struct Opening<'a> {
    pub(super) settings: &'a Settings,
    pub(super) workers: Arc<Workers>,
    pub(super) stop: &'a CancellationToken,
}

impl Opening<'_> {
    /// Listens for checks over gRPC at all addresses, or at none.
    pub(super) async fn grpc(
        &self,
        doors: &mut JoinSet<()>,
        services: GrpcServices,
        tls: Option<Arc<Tls>>,
    ) -> anyhow::Result<()> {
        let grpc = Connections {
            services: Services::Grpc(services),
            tls,
            workers: Arc::clone(&self.workers),
            max_age: self.settings.max_connection_age,
        };
        let mut listeners = Vec::new();
        for address in &self.settings.grpc_listen {
            let listener = Listener::open(address, self.options(self.settings.reuse_port)).await;
            listeners.push(listener.context("listen for checks (--grpc-listen)")?);
        }
        for listener in listeners {
            doors.spawn(grpc.clone().serve(listener, self.stop.clone()));
        }
        Ok(())
    }

    /// Listens for checks over HTTP, where it is set.
    pub(super) async fn http(
        &self,
        doors: &mut JoinSet<()>,
        door: Arc<Door>,
        readiness: &Arc<Readiness>,
        tls: Option<Arc<Tls>>,
    ) -> anyhow::Result<()> {
        let Settings { http_listen, http_profile, max_check_bytes, .. } = self.settings;
        let Some(address) = http_listen else { return Ok(()) };
        let answering = ForwardAuth::new(door, *http_profile, *max_check_bytes, Arc::clone(readiness));
        let http = Connections {
            services: Services::Http(answering.router()),
            tls,
            workers: Arc::clone(&self.workers),
            max_age: None,
        };
        let listener = Listener::open(address, self.options(false)).await;
        let listener = listener.context("listen for checks over HTTP (--http-listen)")?;
        doors.spawn(http.serve(listener, self.stop.clone()));
        Ok(())
    }

    fn options(&self, reuse_port: bool) -> SocketOptions {
        SocketOptions { reuse_port, mode: self.settings.socket_mode }
    }
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
