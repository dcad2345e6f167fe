//! One question, one answer, counted: what the gRPC and the HTTP port do alike, once each has read its own wire.

use std::sync::Arc;
use std::time::Duration;

use tracing::{Instrument, Span};

use super::answer::Answer;
use super::credentials;
use super::decisions::{DecisionRecorder, words};
use super::options::{ClientIpSource, CredentialConflict, CredentialSource};
use super::request::Inbound;
use super::response::{LeftToEnvoy, Responder};
use crate::authorizer::{Authorizer, Checked};
use crate::clock;
use crate::domain::decision::{Cause, Decision, Denied};
use crate::domain::denial::Denial;
use crate::domain::key::PresentedKey;
use crate::domain::time::{Instant, Now};
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

/// How far a check has come.
pub enum Begun {
    /// To its end.
    Decided(Checked),
    /// Something has to be asked about this key.
    Open(PresentedKey),
}

/// Decides and answers.
pub struct Door {
    authorizer: Arc<Authorizer>,
    responder: Responder,
    options: CheckOptions,
    decisions: Option<DecisionRecorder>,
    metrics: Metrics,
}

impl Door {
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

    /// What the operator chose.
    pub fn options(&self) -> &CheckOptions {
        &self.options
    }

    /// Who writes the answers.
    pub fn responder(&self) -> &Responder {
        &self.responder
    }

    /// The decision, as far as it takes no waiting; otherwise the key to ask with. `inbound` is `None` for a check without
    /// an HTTP request. Only in the HTTP port may something come between this and [`Self::finish`].
    pub fn begin(&self, inbound: Option<&Inbound<'_>>, now: Now) -> Begun {
        let Some(inbound) = inbound else {
            return Begun::Decided(refused(Denial::MissingCredentials));
        };
        let CheckOptions { credential_sources, credential_conflict, .. } = &self.options;
        match credentials::find(credential_sources, *credential_conflict, inbound.headers, inbound.target) {
            Ok(Some(key)) => match self.authorizer.check_at_once(&key, &inbound.request, now) {
                Some(checked) => Begun::Decided(checked),
                None => Begun::Open(key),
            },
            Ok(None) if inbound.request.route.allows_anonymous => {
                Begun::Decided(Checked { decision: Decision::Anonymous, tier: None })
            }
            Ok(None) => Begun::Decided(refused(Denial::MissingCredentials)),
            Err(denial) => Begun::Decided(refused(denial)),
        }
    }

    /// The decision on what was left open. `span` is the check's.
    pub async fn ask(
        &self,
        key: &PresentedKey,
        inbound: &Inbound<'_>,
        deadline: Duration,
        span: &Span,
    ) -> Checked {
        self.authorizer.check_by_asking(key, &inbound.request, deadline).instrument(span.clone()).await
    }

    /// The answer to what was decided, counted, in the span and in the decision log.
    pub fn finish(
        &self,
        checked: &Checked,
        inbound: Option<&Inbound<'_>>,
        began: Instant,
        span: &Span,
    ) -> Result<Answer, LeftToEnvoy> {
        let answer = self.responder.respond(checked, inbound);
        note(span, checked, inbound);
        self.count(checked, inbound, clock::instant().saturating_since(began));
        answer
    }

    /// The answer, counted like any other, to what could not even be read as a request.
    pub fn refuse(&self, reason: Denial) -> Result<Answer, LeftToEnvoy> {
        let checked = refused(reason);
        self.count(&checked, None, Duration::ZERO);
        self.responder.respond(&checked, None)
    }

    /// The answer where there was no time to decide.
    pub fn give_up(&self, cause: Cause) -> Result<Answer, LeftToEnvoy> {
        let checked = Checked { decision: Decision::Unavailable(cause), tier: None };
        self.count(&checked, None, self.options.timeout);
        self.responder.respond(&checked, None)
    }

    /// In the metrics, and in the decision log where there is one.
    fn count(&self, checked: &Checked, inbound: Option<&Inbound<'_>>, took: Duration) {
        if let Some(decisions) = &self.decisions {
            decisions.record(checked, inbound, took);
        }
        if let Decision::Allow(permit) = &checked.decision {
            if let Some(denial) = permit.shadow_denial() {
                self.metrics.count_shadow_denial(denial.reason.code());
            }
            return self.metrics.count_allowed(checked.tier, took);
        }
        if let Decision::Unavailable(cause) = &checked.decision {
            tracing::debug!(cause = cause.as_str(), "check could not be decided");
        }
        let (decision, reason) = words(&checked.decision);
        self.metrics.count_check(&CheckLabels { decision, reason }, checked.tier, took);
    }
}

fn note(span: &Span, checked: &Checked, inbound: Option<&Inbound<'_>>) {
    if span.is_disabled() {
        return;
    }
    let (decision, reason) = words(&checked.decision);
    let key = match &checked.decision {
        Decision::Allow(permit) => Some(permit.key().id),
        Decision::Deny(denied) => denied.candidate.as_ref().map(|candidate| candidate.key.id),
        Decision::Anonymous | Decision::Unavailable(_) => None,
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

/// A refusal that no key is needed for.
pub(super) fn refused(reason: Denial) -> Checked {
    Checked { decision: Decision::Deny(Denied::unproven(reason)), tier: None }
}
