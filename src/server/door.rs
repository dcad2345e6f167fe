//! One question, one answer, counted: what the gRPC and the HTTP port do alike, once each has read its own wire.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::{CheckResponse, OkHttpResponse};

use super::credentials;
use super::options::{ClientIpSource, CredentialConflict, CredentialSource};
use super::request::Inbound;
use super::response::{self, LeftToEnvoy, Responder};
use crate::authorizer::{Authorizer, Checked};
use crate::clock;
use crate::domain::decision::{Cause, Decision, Denied};
use crate::domain::denial::Denial;
use crate::telemetry::metrics::{CheckLabels, Metrics};

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

/// Decides and answers.
pub struct Door {
    authorizer: Arc<Authorizer>,
    responder: Responder,
    options: CheckOptions,
    metrics: Metrics,
}

impl Door {
    /// A door to this authorizer.
    pub fn new(
        authorizer: Arc<Authorizer>,
        responder: Responder,
        options: CheckOptions,
        metrics: Metrics,
    ) -> Self {
        Self { authorizer, responder, options, metrics }
    }

    /// What the operator chose.
    pub fn options(&self) -> &CheckOptions {
        &self.options
    }

    /// Who writes the answers.
    pub fn responder(&self) -> &Responder {
        &self.responder
    }

    /// The answer to a check; `inbound` is `None` for a check without an HTTP request. `veto` may turn an allow into a
    /// denial, for a proxy that can't do to the request what the allow depends on; it is never asked about a denial.
    pub async fn answer(
        &self,
        inbound: Option<&Inbound<'_>>,
        deadline: Duration,
        veto: impl Fn(&OkHttpResponse) -> Option<Denial>,
    ) -> Result<CheckResponse, LeftToEnvoy> {
        let started = clock::instant();
        let mut checked = self.decide(inbound, deadline).await;
        let mut response = self.responder.respond(&checked, inbound);
        if let Some(denial) = response.as_ref().ok().and_then(response::allowed).and_then(veto) {
            checked = Checked { tier: checked.tier, ..refused(denial) };
            response = self.responder.respond(&checked, inbound);
        }
        self.count(&checked, clock::instant().saturating_since(started));
        if let Decision::Unavailable(cause) = &checked.decision {
            tracing::debug!(cause = cause.as_str(), "check could not be decided");
        }
        response
    }

    /// The answer, counted like any other, to what could not even be read as a request.
    pub fn refuse(&self, reason: Denial) -> Result<CheckResponse, LeftToEnvoy> {
        let checked = refused(reason);
        self.count(&checked, Duration::ZERO);
        self.responder.respond(&checked, None)
    }

    /// The answer where there was no time to decide.
    pub fn give_up(&self, cause: Cause) -> Result<CheckResponse, LeftToEnvoy> {
        let checked = Checked { decision: Decision::Unavailable(cause), tier: None };
        self.count(&checked, self.options.timeout);
        self.responder.respond(&checked, None)
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
        let (decision, reason) = match &checked.decision {
            Decision::Allow(permit) => {
                if let Some(denial) = permit.shadow_denial() {
                    self.metrics.count_shadow_denial(denial.reason.code());
                }
                return self.metrics.count_allowed(checked.tier, elapsed);
            }
            Decision::Anonymous => ("allow", "anonymous"),
            Decision::Deny(denied) => ("deny", denied.reason.code()),
            Decision::Unavailable(cause) => ("unavailable", cause.as_str()),
        };
        self.metrics.count_check(&CheckLabels { decision, reason }, checked.tier, elapsed);
    }
}

fn refused(reason: Denial) -> Checked {
    Checked { decision: Decision::Deny(Denied::unproven(reason)), tier: None }
}
