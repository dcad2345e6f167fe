//! `envoy.service.auth.v3.Authorization/Check`: decode, decide, encode.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::authorization_server::Authorization;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::{Instrument, Span};

use super::credentials;
use super::decisions::{DecisionRecorder, words};
use super::options::{ClientIpSource, CredentialConflict, CredentialSource};
use super::request::Inbound;
use super::response::{LeftToEnvoy, Responder};
use crate::authorizer::{Authorizer, Checked};
use crate::clock;
use crate::domain::decision::{Decision, Denied};
use crate::domain::denial::Denial;
use crate::telemetry::metrics::{CheckLabels, Metrics};
use crate::telemetry::traces;

/// What an operator chooses about questions.
#[derive(Debug, Clone)]
pub struct CheckOptions {
    /// `--credential-sources`
    pub credential_sources: Vec<CredentialSource>,
    /// `--credential-conflict`
    pub credential_conflict: CredentialConflict,
    /// `--client-ip`
    pub client_ip: ClientIpSource,
    /// `--check-timeout`
    pub timeout: Duration,
}

/// The gRPC door.
pub struct CheckService {
    authorizer: Arc<Authorizer>,
    responder: Responder,
    options: CheckOptions,
    decisions: Option<DecisionRecorder>,
    metrics: Metrics,
}

impl CheckService {
    /// A door to this authorizer.
    pub fn new(
        authorizer: Arc<Authorizer>,
        responder: Responder,
        options: CheckOptions,
        decisions: Option<DecisionRecorder>,
        metrics: Metrics,
    ) -> Self {
        Self { authorizer, responder, options, decisions, metrics }
    }

    async fn decide(&self, inbound: Option<&Inbound<'_>>, deadline: Duration) -> Checked {
        let Some(inbound) = inbound else {
            return refused(Denial::MissingCredentials);
        };
        let CheckOptions { credential_sources, credential_conflict, .. } = &self.options;
        match credentials::find(credential_sources, *credential_conflict, &inbound.headers, inbound.target) {
            Ok(Some(key)) => self.authorizer.check(&key, &inbound.request, deadline).await,
            Ok(None) if inbound.request.route.allows_anonymous => {
                Checked { decision: Decision::Anonymous, tier: None }
            }
            Ok(None) => refused(Denial::MissingCredentials),
            Err(denial) => refused(denial),
        }
    }

    fn count(&self, checked: &Checked, elapsed: Duration) {
        if let Decision::Allow(permit) = &checked.decision {
            if let Some(denial) = permit.shadow_denial() {
                self.metrics.count_shadow_denial(denial.reason.code());
            }
            return self.metrics.count_allowed(checked.tier, elapsed);
        }
        let (decision, reason) = words(&checked.decision);
        self.metrics.count_check(&CheckLabels { decision, reason }, checked.tier, elapsed);
    }
}

/// Envoy's own span first: the caller's is the parent of that one.
fn span(inbound: Option<&Inbound<'_>>, metadata: &MetadataMap) -> Span {
    let method = inbound.map(|inbound| inbound.request.method).unwrap_or_default();
    let of_envoy = metadata.contains_key("traceparent");
    traces::check(method, |name| {
        if of_envoy {
            metadata.get(name).and_then(|value| value.to_str().ok())
        } else {
            inbound.and_then(|inbound| inbound.headers.text(name))
        }
    })
}

fn note(span: &Span, checked: &Checked, inbound: Option<&Inbound<'_>>) {
    if span.is_disabled() {
        return;
    }
    let (decision, reason, key) = match &checked.decision {
        Decision::Allow(permit) => ("allow", "ok", Some(permit.key().id)),
        Decision::Anonymous => ("allow", "anonymous", None),
        Decision::Deny(denied) => {
            ("deny", denied.reason.code(), denied.candidate.as_ref().map(|candidate| candidate.key.id))
        }
        Decision::Unavailable(cause) => ("unavailable", cause.as_str(), None),
    };
    span.record("keyward.decision", decision).record("keyward.reason", reason);
    if let Some(tier) = checked.tier {
        span.record("keyward.tier", tier.as_str());
    }
    if let Some(id) = key {
        span.record("keyward.key_id", id.get());
    }
    if let Some(id) = inbound.and_then(Inbound::request_id) {
        span.record("keyward.request_id", id);
    }
}

fn refused(reason: Denial) -> Checked {
    Checked { decision: Decision::Deny(Denied::unproven(reason)), tier: None }
}

#[tonic::async_trait]
impl Authorization for CheckService {
    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let started = clock::instant();
        let (metadata, _, check) = request.into_parts();
        let inbound = Inbound::read(&check, &metadata, &self.options.client_ip);
        let span = span(inbound.as_ref(), &metadata);
        let checked = self
            .decide(inbound.as_ref(), deadline(&metadata, self.options.timeout))
            .instrument(span.clone())
            .await;
        note(&span, &checked, inbound.as_ref());
        let took = clock::instant().saturating_since(started);
        self.count(&checked, took);
        if let Some(decisions) = &self.decisions {
            decisions.record(&checked, inbound.as_ref(), took);
        }
        if let Decision::Unavailable(cause) = &checked.decision {
            tracing::debug!(cause = cause.as_str(), "check could not be decided");
        }
        match self.responder.respond(&checked, inbound.as_ref()) {
            Ok(response) => Ok(Response::new(response)),
            Err(LeftToEnvoy) => Err(Status::unavailable("can't be decided now")),
        }
    }
}

/// Our own limit, or the caller's where it is shorter: an answer after that is for nobody.
fn deadline(metadata: &MetadataMap, own: Duration) -> Duration {
    let callers = metadata.get("grpc-timeout").and_then(|value| grpc_timeout(value.to_str().ok()?));
    callers.map_or(own, |callers| own.min(callers))
}

/// `1*8DIGIT unit`, as gRPC over HTTP/2 defines it.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount.saturating_mul(3600))),
        "M" => Some(Duration::from_secs(amount.saturating_mul(60))),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shorter_deadline_counts() {
        let own = Duration::from_millis(180);
        let of = |timeout: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", timeout.parse().unwrap());
            deadline(&metadata, own)
        };
        assert_eq!(deadline(&MetadataMap::new(), own), own);
        assert_eq!(of("100m"), Duration::from_millis(100));
        assert_eq!(of("2S"), own);
        assert_eq!(of("90000u"), Duration::from_millis(90));
        for odd in ["", "m", "123456789m", "-1m", "1x", "1.5S"] {
            assert_eq!(of(odd), own, "{odd:?}");
        }
    }
}
