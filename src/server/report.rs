//! An explained decision as JSON: the shape that docs/check.md promises. Fields are added, never renamed.

use std::collections::BTreeMap;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::service::auth::v3::CheckResponse;
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use serde::{Deserialize, Serialize};

use crate::authorizer::Checked;
use crate::authorizer::candidates::RecordAge;
use crate::authorizer::explain::{Explanation, Lookup, Proof, ProofSource};
use crate::authorizer::freshness::Mode;
use crate::authorizer::proof::ProofError;
use crate::domain::decision::{Cause, Decision, Tier};
use crate::domain::denial::Denial;
use crate::domain::explain::Explained;
use crate::domain::key::KeyFormatError;
use crate::domain::policy::{Outcome, Step};

/// Candidates that are named one by one.
const MAX_NAMED: usize = 8;

/// A decision and how it came about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `allow`, `deny` or `unavailable`.
    pub decision: String,
    /// The denial's code; `unavailable` where nothing was decided.
    pub reason: Option<String>,
    /// Why nothing was decided.
    pub cause: Option<String>,
    /// What the caller gets where the request does not go on; 200 where it does. `null` where Envoy's own failure mode
    /// decides (`--on-unavailable error`).
    pub status: Option<i32>,
    /// What the caller reads, or why nothing was decided.
    pub message: Option<String>,
    /// The proven key.
    pub key_id: Option<i64>,
    /// Where its record came from.
    pub tier: Option<String>,
    /// What a rule in shadow mode would have said.
    pub shadow_reason: Option<String>,
    /// In the order in which they are taken; all of them, every time.
    pub steps: Vec<StepReport>,
    /// Allow: the headers that the upstream gets. Otherwise: those that the caller gets.
    pub headers: BTreeMap<String, String>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// `format`, `record`, `proof`, and those of policy.
    pub step: String,
    /// `passed`, `failed`, `shadowed`, `undecided`, `not_reached`.
    pub outcome: String,
    /// The denial's code or the cause.
    pub reason: Option<String>,
    /// What it looked at, for people.
    pub facts: String,
    /// Where the record or the proof came from: `memory`, `redis`, `store`; for the proof also `bcrypt`, `sha256`.
    pub source: Option<String>,
    /// Since the record left the store.
    pub age_seconds: Option<f64>,
    /// How changes of the record would be heard of.
    pub feed: Option<FeedReport>,
}

/// What proves a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeedReport {
    /// `feed`, `ttl`, or `starting` where no feed is followed (yet).
    pub mode: String,
    /// Why there is no feed.
    pub reason: Option<String>,
    /// Whether the feed goes on proving this record.
    pub covered: bool,
    /// Since the last moment at which the record was known to be true.
    pub proven_seconds_ago: f64,
    /// It should have been read again, and the store can't be asked.
    pub suspect: bool,
}

impl StepReport {
    fn new(step: &str, outcome: &str, facts: String) -> Self {
        let (step, outcome) = (step.to_owned(), outcome.to_owned());
        Self { step, outcome, reason: None, facts, source: None, age_seconds: None, feed: None }
    }

    fn because(self, reason: &str) -> Self {
        Self { reason: Some(reason.to_owned()), ..self }
    }
}

/// The first step of a key that is one.
pub(super) fn well_formed(prefix: &str) -> StepReport {
    StepReport::new("format", "passed", format!("the key is well formed; its prefix is {prefix}"))
}

/// The first step of what is no key.
pub(super) fn malformed(defect: KeyFormatError) -> StepReport {
    StepReport::new("format", "failed", defect.to_string()).because(Denial::MalformedCredentials.code())
}

/// The first step of a key that can't exist.
fn mistyped() -> StepReport {
    let facts = "the key looks like one that was made here, but its checksum is wrong: mistyped, or cut off";
    StepReport::new("format", "failed", facts.to_owned()).because(Denial::InvalidApiKey.code())
}

/// Writes it all down. `response` is `None` where Envoy is left to decide.
pub(super) fn write(
    format: StepReport,
    checked: &Checked,
    explanation: &Explanation,
    response: Option<&CheckResponse>,
) -> Report {
    let cause = match &checked.decision {
        Decision::Unavailable(cause) => Some(*cause),
        Decision::Allow(_) | Decision::Anonymous | Decision::Deny(_) => None,
    };
    let format = if explanation.is_mistyped { mistyped() } else { format };
    let is_key = format.reason.is_none();
    let mut steps = vec![format];
    steps.push(match &explanation.lookup {
        Some(lookup) => record(lookup),
        None => open_step("record", cause.filter(|_| is_key)),
    });
    steps.push(match &explanation.proof {
        Some(_) if explanation.lookup.as_ref().is_some_and(|lookup| lookup.candidates.is_empty()) => {
            StepReport::new("proof", "not_reached", String::new())
        }
        Some(found) => proof(found),
        None => open_step("proof", cause.filter(|_| explanation.lookup.is_some())),
    });
    if explanation.policy.is_empty() {
        steps.extend(Step::ALL.map(|step| StepReport::new(step.name(), "not_reached", String::new())));
    } else {
        steps.extend(explanation.policy.iter().map(rule));
    }
    let (decision, reason, message, key) = match &checked.decision {
        Decision::Allow(permit) => ("allow", None, None, Some(permit.key())),
        Decision::Anonymous => ("allow", None, None, None),
        Decision::Deny(denied) => (
            "deny",
            Some(denied.reason.code()),
            Some(denied.message()),
            denied.candidate.as_ref().map(|candidate| &candidate.key),
        ),
        Decision::Unavailable(cause) => ("unavailable", Some("unavailable"), Some(told(*cause)), None),
    };
    let shadow = match &checked.decision {
        Decision::Allow(permit) => permit.shadow_denial(),
        Decision::Anonymous | Decision::Deny(_) | Decision::Unavailable(_) => None,
    };
    let (status, headers) = answer(response);
    Report {
        decision: decision.to_owned(),
        reason: reason.map(str::to_owned),
        cause: cause.map(|cause| cause.as_str().to_owned()),
        status,
        message: message.map(str::to_owned),
        key_id: key.map(|key| key.id.get()),
        tier: checked.tier.map(|tier| tier.as_str().to_owned()),
        shadow_reason: shadow.map(|denial| denial.reason.code().to_owned()),
        steps,
        headers,
    }
}

/// A step that has no result: because of the cause, or because it was not come to.
fn open_step(step: &str, cause: Option<Cause>) -> StepReport {
    match cause {
        Some(cause) => StepReport::new(step, "undecided", told(cause).to_owned()).because(cause.as_str()),
        None => StepReport::new(step, "not_reached", String::new()),
    }
}

const fn told(cause: Cause) -> &'static str {
    match cause {
        Cause::Store => "the store can't be asked, or what is remembered may not refuse without it",
        Cause::TooManyCandidates => "too many keys have this prefix (see --key-prefix-length)",
        Cause::Overload => "too much is waiting already",
        Cause::Deadline => {
            "it took longer than --check-timeout; what was begun goes on, so the next check may know"
        }
        Cause::Verification => "the comparison ended without a verdict",
    }
}

fn record(lookup: &Lookup) -> StepReport {
    let tier = lookup.tier.as_str();
    let mut step = match &lookup.age {
        None => {
            let facts = match lookup.tier {
                Tier::Memory => "no key has this prefix; that is remembered from the store",
                Tier::Redis | Tier::Store => "no key has this prefix; the store was asked",
            };
            StepReport::new("record", "failed", facts.to_owned()).because(Denial::InvalidApiKey.code())
        }
        Some(age) => StepReport::new("record", "passed", record_facts(lookup, age)),
    };
    step.source = Some(tier.to_owned());
    if let Some(age) = &lookup.age {
        step.age_seconds = age.since_store.map(|age| age.as_secs_f64());
        let (mode, reason) = match &age.mode {
            Mode::Starting => ("starting", None),
            Mode::Feed => ("feed", None),
            Mode::Ttl(reason) => ("ttl", Some(reason.clone())),
        };
        step.feed = Some(FeedReport {
            mode: mode.to_owned(),
            reason,
            covered: age.is_covered,
            proven_seconds_ago: age.since_proof.as_secs_f64(),
            suspect: lookup.is_suspect,
        });
    }
    step
}

fn record_facts(lookup: &Lookup, age: &RecordAge) -> String {
    let named: Vec<String> = lookup
        .candidates
        .iter()
        .take(MAX_NAMED)
        .map(|candidate| match &candidate.hash_defect {
            Some(defect) => format!("key {} ({defect})", candidate.id),
            None => format!("key {}", candidate.id),
        })
        .collect();
    let more = match lookup.candidates.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let left = match (lookup.tier, age.since_store) {
        (Tier::Store, _) => "read from the store now".to_owned(),
        (tier, Some(age)) => format!("from {}, read from the store {} ago", tier.as_str(), seconds(age)),
        (tier, None) => format!("from {}, read from the store at an unknown time", tier.as_str()),
    };
    let proven = seconds(age.since_proof);
    let feed = match &age.mode {
        Mode::Starting => String::new(),
        Mode::Feed if age.is_covered => format!("; the change feed covers it, as of {proven} ago"),
        Mode::Feed => format!("; the change feed does not cover it, it was true {proven} ago"),
        Mode::Ttl(reason) => format!("; no change feed ({reason}), it was true {proven} ago"),
    };
    let suspect = if lookup.is_suspect {
        "; it should be read again and the store can't be asked, so it may allow and not refuse"
    } else {
        ""
    };
    format!("{}{more}, {left}{feed}{suspect}", named.join(", "))
}

fn seconds(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}

fn proof(proof: &Proof) -> StepReport {
    let by = match proof.by {
        Some(ProofSource::Memory) => "as remembered",
        Some(ProofSource::Redis) => "by a proof that Redis kept",
        Some(ProofSource::Bcrypt) => "by bcrypt",
        Some(ProofSource::Sha256) => "by SHA-256",
        None => "there is no hash to compare with",
    };
    let mut step = match &proof.result {
        Ok(proven) => {
            let key = &proven.candidate().key;
            StepReport::new("proof", "passed", format!("key {} {} matches, {by}", key.id, key.name))
        }
        Err(ProofError::NoMatch) => {
            StepReport::new("proof", "failed", format!("the key matches none of these, {by}"))
                .because(Denial::InvalidApiKey.code())
        }
        Err(ProofError::TooManyAttempts(_)) => {
            StepReport::new("proof", "failed", "too many wrong keys from this address".to_owned())
                .because(Denial::TooManyAttempts.code())
        }
        Err(ProofError::Undecided(cause)) => open_step("proof", Some(*cause)),
    };
    step.source = proof.by.map(|source| source.as_str().to_owned());
    step
}

fn rule(explained: &Explained) -> StepReport {
    let step = |outcome| StepReport::new(explained.step.name(), outcome, explained.facts.clone());
    match explained.outcome {
        None => step("not_reached"),
        Some(Outcome::Passed) => step("passed"),
        Some(Outcome::Failed(denial)) => step("failed").because(denial.code()),
        Some(Outcome::Shadowed(denial)) => step("shadowed").because(denial.code()),
    }
}

/// Status and headers as Envoy would be told.
fn answer(response: Option<&CheckResponse>) -> (Option<i32>, BTreeMap<String, String>) {
    const ALLOWED: i32 = 200;
    let pairs = |headers: &[HeaderValueOption]| {
        headers
            .iter()
            .filter_map(|option| option.header.clone())
            .map(|header| (header.key, header.value))
            .collect()
    };
    match response.and_then(|response| response.http_response.as_ref()) {
        Some(HttpResponse::OkResponse(ok)) => (Some(ALLOWED), pairs(&ok.headers)),
        Some(HttpResponse::DeniedResponse(denied)) => {
            (denied.status.as_ref().map(|status| status.code), pairs(&denied.headers))
        }
        Some(HttpResponse::ErrorResponse(_)) | None => (None, BTreeMap::new()),
    }
}
