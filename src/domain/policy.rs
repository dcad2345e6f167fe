//! The rules, in the order of the contract, and the permit that only they can make.

use std::sync::Arc;

use super::allowlist::Allowlist;
use super::body::{self, BodyDefect};
use super::decision::Denied;
use super::denial::Denial;
use super::deny_list::DenyList;
use super::model::ModelName;
use super::path;
use super::proof::Proven;
use super::record::{Candidate, KeyPolicy, KeyRecord, UserRecord};
use super::request::Request;
use super::rules::{PolicyRules, Rule, ShadowDenial};
use super::time::Timestamp;

/// Evidence that policy allowed a proven key this request.
#[derive(Debug)]
pub struct Permit {
    candidate: Arc<Candidate>,
    policy: Arc<KeyPolicy>,
    model: Option<ModelName>,
    shadow_denial: Option<ShadowDenial>,
    is_by_path: bool,
}

impl Permit {
    /// The key and all that belongs to it.
    pub fn candidate(&self) -> &Candidate {
        &self.candidate
    }

    /// The key record.
    pub fn key(&self) -> &KeyRecord {
        &self.candidate.key
    }

    /// The key's owner.
    pub fn owner(&self) -> &UserRecord {
        &self.candidate.owner
    }

    /// The key's rights.
    pub fn policy(&self) -> &KeyPolicy {
        &self.policy
    }

    /// The model that is asked for, as far as it had to be known: by the route, the path, or the body of a key that has a
    /// list. Empty otherwise.
    pub fn model(&self) -> &str {
        self.model.as_ref().map(ModelName::as_str).unwrap_or_default()
    }

    /// Whether method and path had a say in it, so that the upstream must not take others for them.
    pub fn is_by_path(&self) -> bool {
        self.is_by_path
    }

    /// The first rule in shadow mode that would have denied this.
    pub fn shadow_denial(&self) -> Option<ShadowDenial> {
        self.shadow_denial
    }
}

/// Why a rule denies a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Refusal {
    reason: Denial,
    rule: Option<Rule>,
    detail: Option<&'static str>,
}

impl From<Denial> for Refusal {
    fn from(reason: Denial) -> Self {
        Self { reason, rule: None, detail: None }
    }
}

impl From<BodyDefect> for Refusal {
    fn from(defect: BodyDefect) -> Self {
        Self { reason: Denial::AmbiguousRequest, rule: None, detail: Some(defect.message()) }
    }
}

/// One thing that policy looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `is_active`, and the deny list.
    Active,
    /// `expires_at`
    Expiry,
    /// The owner's `is_active` and lock.
    Owner,
    /// Whether the key's restrictions can be read.
    Readable,
    /// One of its restrictions.
    Rule(Rule),
}

/// How a step ended. One that was not reached does not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing against the request.
    Passed,
    /// The request is denied.
    Failed(Denial),
    /// It would be denied, but the rule is in shadow mode.
    Shadowed(Denial),
}

/// What names a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelSource {
    /// The route's `model`.
    Route,
    /// The path.
    Path,
    /// The body.
    Body,
}

/// Hears how a decision comes about. `()` listens to nothing and costs nothing.
pub(super) trait Observer {
    /// A step has ended; the last words are more than the reason says.
    fn ended(&mut self, step: Step, outcome: Outcome, detail: Option<&'static str>);
    /// A model that was held against the key's list.
    fn model(&mut self, source: ModelSource, model: &str, is_admitted: bool);
}

impl Observer for () {
    fn ended(&mut self, _: Step, _: Outcome, _: Option<&'static str>) {}
    fn model(&mut self, _: ModelSource, _: &str, _: bool) {}
}

/// Decides whether a proven key may make this request at this moment. There is no permit without a look at the deny
/// list.
pub fn evaluate(
    proven: Proven,
    deny_list: &DenyList,
    rules: &PolicyRules,
    request: &Request<'_>,
    now: Timestamp,
) -> Result<Permit, Denied> {
    evaluate_heard(proven, deny_list, rules, request, now, &mut ())
}

/// The one way to a permit; [`super::explain`] listens to it.
pub(super) fn evaluate_heard(
    proven: Proven,
    deny_list: &DenyList,
    rules: &PolicyRules,
    request: &Request<'_>,
    now: Timestamp,
    observer: &mut impl Observer,
) -> Result<Permit, Denied> {
    let candidate = proven.into_candidate();
    let refusal = match state(&candidate, deny_list, now, observer) {
        Ok(policy) => match apply(policy, &candidate.owner, rules, request, observer) {
            Ok((model, shadow_denial)) => {
                let is_by_path = !rules.scope_paths.is_empty()
                    || matches!(policy.endpoints, Allowlist::Only(_))
                    || matches!(policy.models, Allowlist::Only(_));
                return Ok(Permit {
                    policy: Arc::clone(policy),
                    candidate,
                    model,
                    shadow_denial,
                    is_by_path,
                });
            }
            Err(refusal) => refusal,
        },
        Err(refusal) => refusal,
    };
    let Refusal { reason, rule, detail } = refusal;
    Err(Denied { reason, rule, detail, candidate: Some(candidate), retry_after: None })
}

/// The key's policy, if key and owner are in force at all.
fn state<'c>(
    candidate: &'c Candidate,
    deny_list: &DenyList,
    now: Timestamp,
    observer: &mut impl Observer,
) -> Result<&'c Arc<KeyPolicy>, Refusal> {
    let Candidate { key, owner, policy, .. } = candidate;
    let mut passes = |step, is_granted, otherwise| {
        let result = granted(is_granted, otherwise);
        let outcome = if is_granted { Outcome::Passed } else { Outcome::Failed(otherwise) };
        observer.ended(step, outcome, None);
        result
    };
    passes(Step::Active, key.is_active && !deny_list.denies(key), Denial::KeyInactive)?;
    passes(Step::Expiry, key.expires_at.is_none_or(|end| now <= end), Denial::KeyExpired)?;
    passes(Step::Owner, owner.may_act(now), Denial::UserInactive)?;
    passes(Step::Readable, policy.is_ok(), Denial::PolicyInvalid)?;
    policy.as_ref().map_err(|_| Denial::PolicyInvalid.into())
}

/// Applies the rules in their order: the model that is asked for, and what shadow mode let pass.
fn apply(
    policy: &KeyPolicy,
    owner: &UserRecord,
    rules: &PolicyRules,
    request: &Request<'_>,
    observer: &mut impl Observer,
) -> Result<(Option<ModelName>, Option<ShadowDenial>), Refusal> {
    let (mut named, mut shadow_denial) = (None, None);
    for rule in Rule::ALL {
        let outcome = match rule {
            Rule::Ips => address(policy, request),
            Rule::Endpoints => endpoint(policy, request),
            Rule::Scopes => scopes(policy, owner, rules, request),
            Rule::Models => models(policy, rules, request, observer).map(|model| named = model),
            Rule::Budget => budget(policy),
        };
        let step = Step::Rule(rule);
        match outcome {
            Ok(()) => observer.ended(step, Outcome::Passed, None),
            Err(Refusal { reason, detail, .. }) if rules.shadow.covers(rule) => {
                observer.ended(step, Outcome::Shadowed(reason), detail);
                shadow_denial.get_or_insert(ShadowDenial { rule, reason });
            }
            Err(refusal) => {
                observer.ended(step, Outcome::Failed(refusal.reason), refusal.detail);
                return Err(Refusal { rule: Some(rule), ..refusal });
            }
        }
    }
    Ok((named, shadow_denial))
}

/// A list and no address is a denial: a client that can't be told is in no network.
fn address(policy: &KeyPolicy, request: &Request<'_>) -> Result<(), Refusal> {
    let admitted = match &policy.networks {
        Allowlist::Unrestricted => true,
        only @ Allowlist::Only(_) => {
            request.client.is_some_and(|client| only.admits(|network| network.contains(client)))
        }
    };
    granted(admitted, Denial::IpNotAllowed)
}

fn endpoint(policy: &KeyPolicy, request: &Request<'_>) -> Result<(), Refusal> {
    if matches!(policy.endpoints, Allowlist::Unrestricted) {
        return Ok(());
    }
    if path::is_ambiguous(request.path) {
        return Err(Denial::AmbiguousRequest.into());
    }
    let admitted = policy.endpoints.admits(|(_, rule)| rule.covers(request.method, request.path));
    granted(admitted, Denial::EndpointNotAllowed)
}

/// Those of the route, and those that the operator's table asks for by path.
fn scopes(
    policy: &KeyPolicy,
    owner: &UserRecord,
    rules: &PolicyRules,
    request: &Request<'_>,
) -> Result<(), Refusal> {
    if owner.is_superuser {
        return Ok(());
    }
    if !rules.scope_paths.is_empty() && path::is_ambiguous(request.path) {
        return Err(Denial::AmbiguousRequest.into());
    }
    let mut by_path = rules.scope_paths.required(request.method, request.path);
    let granted_all = policy.scopes.has_all(request.route.required_scopes)
        && by_path.all(|scope| policy.scopes.has_all(scope));
    granted(granted_all, Denial::ScopeMissing)
}

/// The model of the request, each that it names having been held against the key's list.
///
/// A key without a list may ask for any model, so its body is not read.
fn models(
    policy: &KeyPolicy,
    rules: &PolicyRules,
    request: &Request<'_>,
    observer: &mut impl Observer,
) -> Result<Option<ModelName>, Refusal> {
    let is_ambiguous = path::is_ambiguous(request.path);
    let taken = if is_ambiguous { None } else { rules.model_paths.of(request.path) };
    let named_by_path = taken.as_ref().and_then(|taken| taken.named.as_deref());
    let named_by_route = Some(request.route.model).filter(|model| !model.is_empty());
    let named = named_by_route.or(named_by_path);
    if matches!(policy.models, Allowlist::Unrestricted) {
        return Ok(named.map(ModelName::new));
    }
    if is_ambiguous {
        // It might be one that takes a model.
        return Err(Denial::AmbiguousRequest.into());
    }
    let (mut first, mut all_admitted) = (named.map(ModelName::new), true);
    let mut hold = |source, model: &str| {
        let is_admitted = policy.models.admits(|rule| rule.covers(model));
        observer.model(source, model, is_admitted);
        all_admitted &= is_admitted;
    };
    for (source, model) in [(ModelSource::Route, named_by_route), (ModelSource::Path, named_by_path)] {
        if let Some(model) = model {
            hold(source, model);
        }
    }
    let takes_forms = taken.as_ref().is_some_and(|taken| taken.takes_forms);
    let body = body::models(&request.body, takes_forms, &mut |model| {
        hold(ModelSource::Body, model);
        first.get_or_insert_with(|| ModelName::new(model));
    });
    granted(all_admitted, Denial::ModelNotAllowed)?;
    let Err(defect) = body else {
        return Ok(first);
    };
    // Elsewhere too, whoever names a model has to name one.
    let is_asked_for = taken.is_some() || defect == BodyDefect::Duplicate;
    if is_asked_for && !is_excused(defect, named_by_path, named_by_route, request) {
        return Err(defect.into());
    }
    Ok(first)
}

/// Whether a body may be so on a path that takes a model: where the path says which one, the upstream goes by the path;
/// where the route does, the body need not name one; and a request that is no more than a question has none.
fn is_excused(
    defect: BodyDefect,
    named_by_path: Option<&str>,
    named_by_route: Option<&str>,
    request: &Request<'_>,
) -> bool {
    let asks_only = matches!(request.method, "GET" | "HEAD" | "OPTIONS" | "DELETE");
    named_by_path.is_some()
        || match defect {
            BodyDefect::Missing => named_by_route.is_some() || asks_only,
            BodyDefect::NoModel => named_by_route.is_some(),
            BodyDefect::Partial
            | BodyDefect::Compressed
            | BodyDefect::Unreadable
            | BodyDefect::Duplicate
            | BodyDefect::WrongType => false,
        }
}

fn budget(policy: &KeyPolicy) -> Result<(), Refusal> {
    granted(!policy.budget.is_used_up(), Denial::InsufficientQuota)
}

fn granted(is_granted: bool, otherwise: Denial) -> Result<(), Refusal> {
    if is_granted { Ok(()) } else { Err(otherwise.into()) }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
