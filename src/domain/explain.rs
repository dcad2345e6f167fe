//! A decision with every step on the way to it, for the operator who asks why.
//!
//! The rules are those of [`policy`]: this only listens to them and adds what each of them looked at. Everything about
//! the record may be told here, but for what is behind its hash.

use super::allowlist::Allowlist;
use super::decision::Denied;
use super::deny_list::DenyList;
use super::limit::Budget;
use super::model::ModelRule;
use super::path;
use super::policy::{self, ModelSource, Observer, Outcome, Permit, Step};
use super::proof::Proven;
use super::record::{AccountLock, Candidate, KeyPolicy};
use super::request::Request;
use super::rules::{PolicyRules, Rule};
use super::time::Timestamp;

/// Most items of one list that are repeated, and most characters of one of them: a body may name a million models.
const MAX_ITEMS: usize = 8;
const MAX_CHARACTERS: usize = 120;

impl Step {
    /// All of them, in the order in which they are taken.
    pub const ALL: [Self; 9] = [
        Self::Active,
        Self::Expiry,
        Self::Owner,
        Self::Readable,
        Self::Rule(Rule::Ips),
        Self::Rule(Rule::Endpoints),
        Self::Rule(Rule::Scopes),
        Self::Rule(Rule::Models),
        Self::Rule(Rule::Budget),
    ];

    /// The word in output.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Expiry => "expiry",
            Self::Owner => "owner",
            Self::Readable => "policy",
            Self::Rule(rule) => rule.name(),
        }
    }
}

/// One step and what it looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// Which one.
    pub step: Step,
    /// `None` where an earlier one had already decided.
    pub outcome: Option<Outcome>,
    /// For people; empty where the step was not reached.
    pub facts: String,
}

/// [`policy::evaluate`] with its steps. The decision is the very same: it is made by the same rules in the same run.
pub fn explain(
    proven: Proven,
    deny_list: &DenyList,
    rules: &PolicyRules,
    request: &Request<'_>,
    now: Timestamp,
) -> (Result<Permit, Denied>, Vec<Explained>) {
    let candidate = std::sync::Arc::clone(proven.candidate());
    let mut heard = Heard::default();
    let decision = policy::evaluate_heard(proven, deny_list, rules, request, now, &mut heard);
    let look = Look { candidate: &candidate, deny_list, rules, request, now, heard: &heard };
    let explained = |step| {
        let Some((_, outcome, detail)) = heard.ended.iter().find(|(own, ..)| *own == step) else {
            return Explained { step, outcome: None, facts: String::new() };
        };
        let mut facts = look.facts(step);
        if let Some(detail) = detail {
            facts = format!("{facts}; {detail}");
        }
        Explained { step, outcome: Some(*outcome), facts }
    };
    (decision, Step::ALL.map(explained).into())
}

/// What the rules said.
#[derive(Default)]
struct Heard {
    ended: Vec<(Step, Outcome, Option<&'static str>)>,
    models: Vec<(ModelSource, String, bool)>,
    /// Models that were named besides those.
    more_models: usize,
}

impl Observer for Heard {
    fn ended(&mut self, step: Step, outcome: Outcome, detail: Option<&'static str>) {
        self.ended.push((step, outcome, detail));
    }

    fn model(&mut self, source: ModelSource, model: &str, is_admitted: bool) {
        // One that is refused is what the operator looks for, so it takes the last place.
        let is_worth_it = !is_admitted && self.models.iter().all(|(_, _, admitted)| *admitted);
        if self.models.len() < MAX_ITEMS || is_worth_it {
            self.models.push((source, shortened(model), is_admitted));
        } else {
            self.more_models = self.more_models.saturating_add(1);
        }
    }
}

/// What a step may look at.
struct Look<'a> {
    candidate: &'a Candidate,
    deny_list: &'a DenyList,
    rules: &'a PolicyRules,
    request: &'a Request<'a>,
    now: Timestamp,
    heard: &'a Heard,
}

impl Look<'_> {
    fn facts(&self, step: Step) -> String {
        let Step::Rule(rule) = step else {
            return self.state(step);
        };
        // A rule is reached only where the policy can be read.
        let Ok(policy) = &self.candidate.policy else {
            return String::new();
        };
        match rule {
            Rule::Ips => self.address(policy),
            Rule::Endpoints => self.endpoint(policy),
            Rule::Scopes => self.scopes(policy),
            Rule::Models => self.models(policy),
            Rule::Budget => budget(policy.budget),
        }
    }

    fn state(&self, step: Step) -> String {
        let Candidate { key, owner, policy, .. } = self.candidate;
        match step {
            Step::Active => {
                let active = if key.is_active { "is_active is true" } else { "is_active is not true" };
                let listed =
                    if self.deny_list.denies(key) { "on the deny list" } else { "not on the deny list" };
                format!("{active}; {listed}")
            }
            Step::Expiry => match key.expires_at {
                None => "expires_at is not set".to_owned(),
                Some(end) => format!("expires_at is {}, now is {}", moment(end), moment(self.now)),
            },
            Step::Owner => {
                let Some(id) = owner.id else {
                    return "the key has no owner row".to_owned();
                };
                let active = if owner.is_active { "is_active is true" } else { "is_active is not true" };
                let lock = match owner.lock {
                    AccountLock::Open => "not locked".to_owned(),
                    AccountLock::Locked => "locked".to_owned(),
                    AccountLock::Until(end) => {
                        format!("locked until {}, now is {}", moment(end), moment(self.now))
                    }
                };
                format!("user {id} {}: {active}; {lock}", shortened(&owner.username))
            }
            Step::Readable => match policy {
                Ok(_) => "every restriction can be read".to_owned(),
                Err(defects) => defects.to_string(),
            },
            Step::Rule(_) => String::new(),
        }
    }

    fn address(&self, policy: &KeyPolicy) -> String {
        let client = match self.request.client {
            Some(client) => format!("client {client}"),
            None => "the client's address is not known".to_owned(),
        };
        format!("{}; {client}", length("allowed_ips", &policy.networks))
    }

    fn endpoint(&self, policy: &KeyPolicy) -> String {
        let asked = self.asked();
        match &policy.endpoints {
            Allowlist::Unrestricted => format!("allowed_endpoints is unrestricted; {asked}"),
            Allowlist::Only(entries) => {
                let entries = items(entries.iter().map(|(text, _)| &**text));
                format!("allowed_endpoints: {entries}; {asked}")
            }
        }
    }

    fn scopes(&self, policy: &KeyPolicy) -> String {
        let Request { method, path, route, .. } = self.request;
        let by_route = route.required_scopes.split(',').map(str::trim).filter(|scope| !scope.is_empty());
        let required = items(by_route.chain(self.rules.scope_paths.required(method, path)));
        let own = items(policy.scopes.iter());
        let superuser =
            if self.candidate.owner.is_superuser { "; the owner is a superuser, who has all" } else { "" };
        format!("required: {required}; the key has: {own}{superuser}")
    }

    fn models(&self, policy: &KeyPolicy) -> String {
        let entries = match &policy.models {
            Allowlist::Unrestricted => {
                return "allowed_models is unrestricted; the body is not read".to_owned();
            }
            Allowlist::Only(entries) => items(entries.iter().map(ModelRule::as_str)),
        };
        if self.heard.models.is_empty() {
            return format!("allowed_models: {entries}; no model is named; {}", self.asked());
        }
        let asked = self.heard.models.iter().map(|(source, model, is_admitted)| {
            let source = match source {
                ModelSource::Route => "route",
                ModelSource::Path => "path",
                ModelSource::Body => "body",
            };
            let verdict = if *is_admitted { "" } else { ", not admitted" };
            format!("{model} ({source}{verdict})")
        });
        let asked = asked.collect::<Vec<_>>().join(", ");
        let more = match self.heard.more_models {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("allowed_models: {entries}; asks for {asked}{more}")
    }

    fn asked(&self) -> String {
        let Request { method, path, .. } = self.request;
        let ambiguous = if path::is_ambiguous(path) { " (ambiguous)" } else { "" };
        format!("{} {}{ambiguous}", shortened(method), shortened(path))
    }
}

fn budget(budget: Budget) -> String {
    match budget {
        Budget::Unlimited => "no budget applies".to_owned(),
        Budget::Limited { limit, spent } => format!("spent {} of {} cents", spent.get(), limit.get()),
    }
}

fn length<T>(column: &str, list: &Allowlist<T>) -> String {
    match list {
        Allowlist::Unrestricted => format!("{column} is unrestricted"),
        Allowlist::Only(entries) if entries.len() == 1 => format!("{column} has 1 entry"),
        Allowlist::Only(entries) => format!("{column} has {} entries", entries.len()),
    }
}

fn items<'a>(mut items: impl Iterator<Item = &'a str>) -> String {
    let shown: Vec<String> = items.by_ref().take(MAX_ITEMS).map(shortened).collect();
    match (shown.is_empty(), items.count()) {
        (true, _) => "none".to_owned(),
        (false, 0) => shown.join(", "),
        (false, more) => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Foreign text: not more of it than can be read.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn moment(moment: Timestamp) -> String {
    match moment {
        Timestamp::INFINITY => "infinity".to_owned(),
        Timestamp::NEGATIVE_INFINITY => "-infinity".to_owned(),
        _ => jiff::Timestamp::from_microsecond(moment.as_microseconds())
            .map_or_else(|_| "out of range".to_owned(), |time| time.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::body::Body;
    use crate::domain::denial::Denial;
    use crate::domain::proof::Verdict;
    use crate::domain::request::RouteOptions;
    use crate::domain::row::CandidateRow;

    const HASH: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";
    const NOW: Timestamp = Timestamp::from_microseconds(1_000_000);

    fn of(
        change: impl FnOnce(&mut CandidateRow),
        rules: &PolicyRules,
        request: &Request<'_>,
    ) -> (Result<(), Denial>, Vec<Explained>) {
        let mut row = CandidateRow::sample(HASH);
        change(&mut row);
        let candidate = Arc::new(Candidate::from_row(&row));
        let proven = || Proven::from_verdict(&candidate, Verdict::Match).unwrap();
        let list = DenyList::default();
        let (decision, steps) = explain(proven(), &list, rules, request, NOW);
        let told = decision.map(|permit| permit.shadow_denial()).map_err(|denied| denied.reason);
        let decided = policy::evaluate(proven(), &list, rules, request, NOW);
        let decided = decided.map(|permit| permit.shadow_denial()).map_err(|denied| denied.reason);
        assert_eq!(told, decided, "the explanation is about another decision");
        (told.map(|_| ()), steps)
    }

    fn request(body: &str) -> Request<'_> {
        Request {
            method: "POST",
            path: "/v1/chat/completions",
            client: Some("10.1.2.3".parse().unwrap()),
            route: RouteOptions { required_scopes: "chat", ..RouteOptions::default() },
            body: Body { bytes: Some(body.as_bytes()), is_whole: true, ..Body::default() },
        }
    }

    fn step<'a>(steps: &'a [Explained], name: &str) -> &'a Explained {
        steps.iter().find(|explained| explained.step.name() == name).unwrap()
    }

    #[test]
    fn every_step_says_what_it_looked_at() {
        let (decision, steps) = of(
            |row| {
                row.scopes = Some("[\"chat\"]".into());
                row.allowed_ips = Some("[\"10.0.0.0/8\",\"192.0.2.1\"]".into());
                row.allowed_endpoints = Some("[\"POST /v1/**\"]".into());
                row.allowed_models = Some("[\"gpt-*\"]".into());
                row.expires_at = Some(2_000_000);
                row.budget_limit_cents = Some(100);
                row.total_cost = Some(20);
            },
            &PolicyRules::default(),
            &request(r#"{"model":"gpt-4o"}"#),
        );
        assert_eq!(decision, Ok(()));
        assert!(steps.iter().all(|explained| explained.outcome == Some(Outcome::Passed)));
        let facts: Vec<_> = steps.iter().map(|explained| explained.facts.as_str()).collect();
        assert_eq!(
            facts,
            [
                "is_active is true; not on the deny list",
                "expires_at is 1970-01-01T00:00:02Z, now is 1970-01-01T00:00:01Z",
                "user 3 ada: is_active is true; not locked",
                "every restriction can be read",
                "allowed_ips has 2 entries; client 10.1.2.3",
                "allowed_endpoints: POST /v1/**; POST /v1/chat/completions",
                "required: chat; the key has: chat",
                "allowed_models: gpt-*; asks for gpt-4o (body)",
                "spent 20 of 100 cents",
            ]
        );
    }

    #[test]
    fn steps_behind_the_one_that_decided_were_not_reached() {
        let (decision, steps) =
            of(|row| row.scopes = None, &PolicyRules::default(), &request(r#"{"model":"gpt-4o"}"#));
        assert_eq!(decision, Err(Denial::ScopeMissing));
        let scopes = step(&steps, "scopes");
        assert_eq!(scopes.outcome, Some(Outcome::Failed(Denial::ScopeMissing)));
        assert_eq!(scopes.facts, "required: chat; the key has: none");
        for name in ["models", "budget"] {
            assert_eq!((step(&steps, name).outcome, step(&steps, name).facts.as_str()), (None, ""));
        }
    }

    #[test]
    fn a_rule_in_shadow_mode_says_so_and_the_next_one_is_reached() {
        let rules = PolicyRules { shadow: "scopes,models".parse().unwrap(), ..PolicyRules::default() };
        let body = r#"{"model":"gpt-4o","fallbacks":["claude-3"]}"#;
        let (decision, steps) =
            of(|row| row.allowed_models = Some("[\"gpt-*\"]".into()), &rules, &request(body));
        assert_eq!(decision, Ok(()));
        assert_eq!(step(&steps, "scopes").outcome, Some(Outcome::Shadowed(Denial::ScopeMissing)));
        let models = step(&steps, "models");
        assert_eq!(models.outcome, Some(Outcome::Shadowed(Denial::ModelNotAllowed)));
        assert!(
            models.facts.ends_with("asks for gpt-4o (body), claude-3 (body, not admitted)"),
            "{}",
            models.facts
        );
        assert_eq!(step(&steps, "budget").outcome, Some(Outcome::Passed));
    }

    #[test]
    fn what_is_wrong_with_a_body_and_with_a_record_is_told() {
        let restricted = |row: &mut CandidateRow| {
            row.scopes = Some("[\"chat\"]".into());
            row.allowed_models = Some("[\"gpt-*\"]".into());
        };
        let (decision, steps) = of(restricted, &PolicyRules::default(), &request("{}"));
        assert_eq!(decision, Err(Denial::AmbiguousRequest));
        let facts = &step(&steps, "models").facts;
        assert!(facts.contains("no model is named") && facts.contains("Name one of them"), "{facts}");
        let (_, steps) =
            of(|row| row.allowed_ips = Some("[7]".into()), &PolicyRules::default(), &request("{}"));
        assert_eq!(step(&steps, "policy").facts, "allowed_ips has an entry that can't be read");
    }

    #[test]
    fn foreign_text_is_cut_and_the_refused_model_is_shown_among_many() {
        let names: Vec<String> = (0..50).map(|number| format!("\"gpt-{number}\"")).collect();
        let long = "m".repeat(200);
        let body = format!(r#"{{"model":"gpt-4o","models":[{},"{long}"]}}"#, names.join(","));
        let (decision, steps) = of(
            |row| {
                row.scopes = Some("[\"chat\"]".into());
                row.allowed_models = Some("[\"gpt-*\"]".into());
            },
            &PolicyRules::default(),
            &request(&body),
        );
        assert_eq!(decision, Err(Denial::ModelNotAllowed));
        let facts = &step(&steps, "models").facts;
        assert!(facts.contains("… (body, not admitted) and 43 more"), "{facts}");
        assert!(facts.len() < 1_000, "{}", facts.len());
        assert_eq!(items(["a"; 10].into_iter()), "a, a, a, a, a, a, a, a and 2 more");
    }
}
