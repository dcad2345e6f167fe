//! The rules, in the order of the contract, and the permit that only they can make.

use std::sync::Arc;

use super::allowlist::Allowlist;
use super::body::{self, BodyDefect};
use super::decision::Denied;
use super::denial::Denial;
use super::deny_list::DenyList;
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
    model: Option<Box<str>>,
    shadow_denial: Option<ShadowDenial>,
    is_by_path: bool,
}

impl Permit {
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
        self.model.as_deref().unwrap_or_default()
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
    detail: Option<&'static str>,
}

impl From<Denial> for Refusal {
    fn from(reason: Denial) -> Self {
        Self { reason, detail: None }
    }
}

impl From<BodyDefect> for Refusal {
    fn from(defect: BodyDefect) -> Self {
        Self { reason: Denial::AmbiguousRequest, detail: Some(defect.message()) }
    }
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
    let candidate = proven.into_candidate();
    let refusal = match state(&candidate, deny_list, now) {
        Ok(policy) => match apply(policy, &candidate.owner, rules, request) {
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
        Err(denial) => denial.into(),
    };
    let Refusal { reason, detail } = refusal;
    Err(Denied { reason, detail, candidate: Some(candidate) })
}

/// The key's policy, if key and owner are in force at all.
fn state<'c>(
    candidate: &'c Candidate,
    deny_list: &DenyList,
    now: Timestamp,
) -> Result<&'c Arc<KeyPolicy>, Denial> {
    let Candidate { key, owner, policy } = candidate;
    if !key.is_active || deny_list.denies(key) {
        return Err(Denial::KeyInactive);
    }
    if key.expires_at.is_some_and(|end| now > end) {
        return Err(Denial::KeyExpired);
    }
    if !owner.may_act(now) {
        return Err(Denial::UserInactive);
    }
    policy.as_ref().map_err(|_| Denial::PolicyInvalid)
}

/// Applies the rules in their order: the model that is asked for, and what shadow mode let pass.
fn apply(
    policy: &KeyPolicy,
    owner: &UserRecord,
    rules: &PolicyRules,
    request: &Request<'_>,
) -> Result<(Option<Box<str>>, Option<ShadowDenial>), Refusal> {
    let (mut named, mut shadow_denial) = (None, None);
    for rule in Rule::ALL {
        let outcome = match rule {
            Rule::Ips => address(policy, request),
            Rule::Endpoints => endpoint(policy, request),
            Rule::Scopes => scopes(policy, owner, rules, request),
            Rule::Models => models(policy, rules, request).map(|model| named = model),
            Rule::Budget => budget(policy),
        };
        match outcome {
            Ok(()) => {}
            Err(Refusal { reason, .. }) if rules.shadow.covers(rule) => {
                shadow_denial.get_or_insert(ShadowDenial { rule, reason });
            }
            Err(refusal) => return Err(refusal),
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
) -> Result<Option<Box<str>>, Refusal> {
    let is_ambiguous = path::is_ambiguous(request.path);
    let taken = if is_ambiguous { None } else { rules.model_paths.of(request.path) };
    let named_by_path = taken.as_ref().and_then(|taken| taken.named.as_deref());
    let named_by_route = Some(request.route.model).filter(|model| !model.is_empty());
    let named = named_by_route.or(named_by_path);
    if matches!(policy.models, Allowlist::Unrestricted) {
        return Ok(named.map(Into::into));
    }
    if is_ambiguous {
        // It might be one that takes a model.
        return Err(Denial::AmbiguousRequest.into());
    }
    let is_admitted = |model: &str| policy.models.admits(|rule| rule.covers(model));
    let (mut first, mut all_admitted) = (named.map(Box::from), true);
    for model in [named_by_route, named_by_path].into_iter().flatten() {
        all_admitted &= is_admitted(model);
    }
    let takes_forms = taken.as_ref().is_some_and(|taken| taken.takes_forms);
    let body = body::models(&request.body, takes_forms, &mut |model| {
        all_admitted &= is_admitted(model);
        first.get_or_insert_with(|| model.into());
    });
    granted(all_admitted, Denial::ModelNotAllowed)?;
    match body {
        Err(defect) if taken.is_some() && !is_excused(defect, named_by_path, named_by_route, request) => {
            Err(defect.into())
        }
        Ok(()) | Err(_) => Ok(first),
    }
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::body::Body;
    use crate::domain::key::PrefixLength;
    use crate::domain::proof::Verdict;
    use crate::domain::request::RouteOptions;
    use crate::domain::row::CandidateRow;

    const HASH: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";
    const NOW: Timestamp = Timestamp::from_microseconds(1_000_000);

    fn decide(row: &CandidateRow, request: &Request<'_>) -> Result<(), Denial> {
        decide_with(&DenyList::default(), row, request)
    }

    fn decide_with(deny_list: &DenyList, row: &CandidateRow, request: &Request<'_>) -> Result<(), Denial> {
        permit(deny_list, &PolicyRules::default(), row, request).map(|_| ()).map_err(|denied| denied.reason)
    }

    fn permit(
        deny_list: &DenyList,
        rules: &PolicyRules,
        row: &CandidateRow,
        request: &Request<'_>,
    ) -> Result<Permit, Denied> {
        let candidate = Arc::new(Candidate::from_row(row));
        let proven = Proven::from_verdict(&candidate, Verdict::Match).unwrap();
        evaluate(proven, deny_list, rules, request, NOW)
    }

    fn json(text: &str) -> Body<'_> {
        Body { bytes: Some(text.as_bytes()), is_whole: true, ..Body::default() }
    }

    fn request() -> Request<'static> {
        Request {
            method: "POST",
            path: "/v1/chat/completions",
            client: Some("10.1.2.3".parse().unwrap()),
            route: RouteOptions { required_scopes: "chat", model: "gpt-4o", ..RouteOptions::default() },
            body: Body::default(),
        }
    }

    /// A key with every restriction, each of them met by [`request`].
    fn restricted() -> CandidateRow {
        let mut row = CandidateRow::sample(HASH);
        row.expires_at = Some(NOW.as_microseconds());
        row.scopes = Some("[\"chat\"]".into());
        row.allowed_ips = Some("[\"10.0.0.0/8\"]".into());
        row.allowed_endpoints = Some("[\"POST /v1/chat/*\"]".into());
        row.allowed_models = Some("[\"gpt-*\"]".into());
        row.budget_limit_cents = Some(100);
        row.total_cost = Some(99);
        row
    }

    #[test]
    fn a_key_within_all_its_rights_is_allowed() {
        assert_eq!(decide(&restricted(), &request()), Ok(()));
    }

    /// Each row breaks one rule and all later ones, so the answer also shows the order.
    #[test]
    fn rules_are_applied_in_the_contract_s_order() {
        type Break = fn(&mut CandidateRow);
        let rules: [(Break, Denial); 9] = [
            (|row| row.is_active = None, Denial::KeyInactive),
            (|row| row.expires_at = Some(NOW.as_microseconds() - 1), Denial::KeyExpired),
            (|row| row.user_is_active = Some(false), Denial::UserInactive),
            (|row| row.rate_limit_per_day = Some(-1), Denial::PolicyInvalid),
            (|row| row.allowed_ips = Some("[\"192.0.2.0/24\"]".into()), Denial::IpNotAllowed),
            (|row| row.allowed_endpoints = Some("[\"GET /v1/models\"]".into()), Denial::EndpointNotAllowed),
            (|row| row.scopes = None, Denial::ScopeMissing),
            (|row| row.allowed_models = Some("[\"claude-*\"]".into()), Denial::ModelNotAllowed),
            (|row| row.total_cost = Some(100), Denial::InsufficientQuota),
        ];
        for (first, (_, expected)) in rules.iter().enumerate() {
            let mut row = restricted();
            for (break_rule, _) in rules.iter().skip(first) {
                break_rule(&mut row);
            }
            assert_eq!(decide(&row, &request()), Err(*expected));
        }
    }

    #[test]
    fn an_unknown_client_is_in_no_network() {
        let unknown = Request { client: None, ..request() };
        assert_eq!(decide(&restricted(), &unknown), Err(Denial::IpNotAllowed));
    }

    #[test]
    fn an_ambiguous_path_matters_only_to_keys_with_a_list_of_endpoints_or_models() {
        let odd = Request { path: "/v1/chat/../admin", ..request() };
        assert_eq!(decide(&restricted(), &odd), Err(Denial::AmbiguousRequest));
        let mut open = restricted();
        (open.allowed_endpoints, open.allowed_models) = (None, None);
        assert_eq!(decide(&open, &odd), Ok(()));
    }

    #[test]
    fn a_superuser_s_key_has_all_scopes_but_nothing_else() {
        let mut row = restricted();
        row.scopes = None;
        row.is_superuser = Some(true);
        assert_eq!(decide(&row, &request()), Ok(()));
        row.is_active = Some(false);
        assert_eq!(decide(&row, &request()), Err(Denial::KeyInactive));
    }

    #[test]
    fn a_key_on_the_deny_list_is_as_good_as_revoked_whoever_owns_it() {
        let mut row = restricted();
        row.is_superuser = Some(true);
        let (id, prefix) = (row.key_id, row.key_prefix.clone().unwrap());
        let list = |text: String| DenyList::parse(text.as_bytes(), PrefixLength::DEFAULT).unwrap();
        for denying in [format!("key-id {id}"), format!("prefix {prefix}")] {
            assert_eq!(decide_with(&list(denying), &row, &request()), Err(Denial::KeyInactive));
        }
        let other = list(format!("key-id {}\nprefix zz_other", id + 1));
        assert_eq!(decide_with(&other, &row, &request()), Ok(()));
        // It is the first rule, so nothing about the others is told.
        row.expires_at = Some(0);
        assert_eq!(decide_with(&list(format!("key-id {id}")), &row, &request()), Err(Denial::KeyInactive));
    }

    /// method, path, route's model, body, expected: a key that may use `gpt-*` only.
    #[test]
    fn a_model_list_holds_wherever_the_model_is_named() {
        const OK: Result<&str, Denial> = Ok("gpt-4o");
        const NOT: Result<&str, Denial> = Err(Denial::ModelNotAllowed);
        const UNCLEAR: Result<&str, Denial> = Err(Denial::AmbiguousRequest);
        const CHAT: &str = "/v1/chat/completions";
        let mut row = CandidateRow::sample(HASH);
        row.allowed_models = Some("[\"gpt-*\"]".into());
        for (method, path, route, body, expected) in [
            ("POST", CHAT, "", Some(r#"{"model":"gpt-4o"}"#), OK),
            ("POST", CHAT, "", Some(r#"{"model":"claude-3"}"#), NOT),
            ("POST", CHAT, "", Some(r#"{"model":"gpt-4o","models":["claude-3"]}"#), NOT),
            ("POST", CHAT, "", Some(r#"{"model":"gpt-4o","fallbacks":["gpt-4"]}"#), OK),
            ("POST", CHAT, "", Some(r#"{"model":"gpt-4o","model":"claude-3"}"#), UNCLEAR),
            ("POST", CHAT, "", Some(r#"{"messages":[]}"#), UNCLEAR),
            ("POST", CHAT, "", None, UNCLEAR),
            ("GET", CHAT, "", None, Ok("")),
            ("GET", CHAT, "", Some(r#"{"model":"claude-3"}"#), NOT),
            ("POST", "/v1/chat/completions/", "", Some(r#"{"model":"claude-3"}"#), NOT),
            ("POST", "/V1/chat/completions", "", Some(r#"{"model":"claude-3"}"#), NOT),
            ("POST", "/v1//chat/completions", "", Some(r#"{"model":"gpt-4o"}"#), UNCLEAR),
            // The route's model, alone and beside others.
            ("POST", CHAT, "gpt-4o", None, OK),
            ("POST", CHAT, "gpt-4o", Some(r#"{"messages":[]}"#), OK),
            ("POST", CHAT, "gpt-4o", Some(r#"{"model":"claude-3"}"#), NOT),
            ("POST", CHAT, "gpt-4o", Some("{"), UNCLEAR),
            ("POST", CHAT, "claude-3", Some(r#"{"model":"gpt-4o"}"#), NOT),
            // The path's.
            ("POST", "/openai/deployments/gpt-4o/chat/completions", "", Some("{}"), OK),
            ("POST", "/openai/deployments/claude/chat/completions", "", Some(r#"{"model":"gpt-4o"}"#), NOT),
            ("POST", "/openai/deployments/gpt-4o/chat/completions", "", Some(r#"{"model":"claude-3"}"#), NOT),
            ("POST", "/v1beta/models/gpt-4o:generateContent", "", None, OK),
            ("POST", "/model/claude-3/invoke", "", Some("{}"), NOT),
            // Not a path that takes a model; one that is named counts all the same.
            ("GET", "/v1/models", "", None, Ok("")),
            ("POST", "/v1/files", "", Some("--x"), Ok("")),
            ("POST", "/v1/fine_tuning/jobs", "", Some(r#"{"model":"claude-3"}"#), NOT),
        ] {
            let request = Request {
                method,
                path,
                client: None,
                route: RouteOptions { model: route, ..RouteOptions::default() },
                body: body.map(json).unwrap_or_default(),
            };
            let decided = permit(&DenyList::default(), &PolicyRules::default(), &row, &request);
            let found = decided.map(|permit| permit.model().to_owned()).map_err(|denied| denied.reason);
            assert_eq!(found, expected.map(str::to_owned), "{method} {path} {route:?} {body:?}");
        }
    }

    #[test]
    fn a_partial_body_is_refused_with_its_own_message_and_matters_only_to_keys_with_a_list() {
        let body = Body { is_whole: false, ..json(r#"{"model":"gpt-4o"}"#) };
        let partial = Request { body, route: RouteOptions::default(), ..request() };
        let mut row = CandidateRow::sample(HASH);
        assert_eq!(decide(&row, &partial), Ok(()));
        row.allowed_models = Some("[\"gpt-*\"]".into());
        let denied = permit(&DenyList::default(), &PolicyRules::default(), &row, &partial).unwrap_err();
        assert_eq!(denied.reason, Denial::AmbiguousRequest);
        assert_eq!(denied.message(), BodyDefect::Partial.message());
    }

    /// Each of the five rules, alone in shadow: it lets pass what it would deny, says so, and spares no other rule.
    #[test]
    fn a_shadowed_rule_reports_and_denies_nothing() {
        type Break = fn(&mut CandidateRow);
        let broken: [(Rule, Break, Denial); 5] = [
            (Rule::Ips, |row| row.allowed_ips = Some("[\"192.0.2.0/24\"]".into()), Denial::IpNotAllowed),
            (
                Rule::Endpoints,
                |row| row.allowed_endpoints = Some("[\"/x\"]".into()),
                Denial::EndpointNotAllowed,
            ),
            (Rule::Scopes, |row| row.scopes = None, Denial::ScopeMissing),
            (Rule::Models, |row| row.allowed_models = Some("[\"x\"]".into()), Denial::ModelNotAllowed),
            (Rule::Budget, |row| row.total_cost = Some(100), Denial::InsufficientQuota),
        ];
        for (rule, break_rule, reason) in broken {
            let mut row = restricted();
            break_rule(&mut row);
            for shadow in [rule.name(), "policy"] {
                let rules = PolicyRules { shadow: shadow.parse().unwrap(), ..PolicyRules::default() };
                let permit = permit(&DenyList::default(), &rules, &row, &request()).unwrap();
                assert_eq!(permit.shadow_denial(), Some(ShadowDenial { rule, reason }), "{shadow}");
            }
            for other in Rule::ALL.into_iter().filter(|other| *other != rule) {
                let rules = PolicyRules { shadow: other.name().parse().unwrap(), ..PolicyRules::default() };
                let denied = permit(&DenyList::default(), &rules, &row, &request()).unwrap_err();
                assert_eq!(denied.reason, reason, "{} in shadow", other.name());
            }
        }
        let mut off = restricted();
        off.is_active = Some(false);
        let rules = PolicyRules { shadow: "policy".parse().unwrap(), ..PolicyRules::default() };
        let denied = permit(&DenyList::default(), &rules, &off, &request()).unwrap_err();
        assert_eq!(denied.reason, Denial::KeyInactive, "the key itself is never shadowed");
    }

    #[test]
    fn scopes_are_asked_for_by_path_too() {
        let rules = PolicyRules {
            scope_paths: "/v1/chat/**=chat,POST /v1/**=write,/v1/Files/=files,GET /batches=list"
                .parse()
                .unwrap(),
            ..PolicyRules::default()
        };
        let of_method = |method: &str, scopes: &str, path: &str| {
            let mut row = CandidateRow::sample(HASH);
            row.scopes = Some(scopes.into());
            let request = Request { method, path, route: RouteOptions::default(), ..request() };
            permit(&DenyList::default(), &rules, &row, &request).map(|_| ()).map_err(|denied| denied.reason)
        };
        let of = |scopes: &str, path: &str| of_method("POST", scopes, path);
        assert_eq!(of("[\"chat\",\"write\"]", "/v1/chat/completions"), Ok(()));
        assert_eq!(of("[\"chat\"]", "/v1/chat/completions"), Err(Denial::ScopeMissing));
        assert_eq!(of("[\"write\"]", "/v1/embeddings"), Ok(()));
        assert_eq!(of("[]", "/healthz"), Ok(()));
        assert_eq!(of_method("HEAD", "[]", "/batches"), Err(Denial::ScopeMissing));
        assert_eq!(of_method("HEAD", "[\"list\"]", "/batches"), Ok(()));
        for spelling in ["/v1/files", "/v1/files/", "/V1/FILES", "/v1/%66iles"] {
            assert_eq!(of("[\"write\"]", spelling), Err(Denial::ScopeMissing), "{spelling}");
            assert_eq!(of("[\"files\",\"write\"]", spelling), Ok(()), "{spelling}");
        }
        assert_eq!(of("[\"write\"]", "/v1/./chat/completions"), Err(Denial::AmbiguousRequest));
    }

    #[test]
    fn a_mismatch_proves_nothing() {
        let candidate = Arc::new(Candidate::from_row(&restricted()));
        assert!(Proven::from_verdict(&candidate, Verdict::Mismatch).is_none());
    }

    proptest! {
        /// Adding a restriction never turns a denial into an allow.
        #[test]
        fn narrowing_never_allows(which in 0_usize..6, start in 0_usize..6, value in prop::sample::select(vec!["[\"x\"]", "[\"/v1/**\"]", "[\"10.0.0.0/8\"]", "{}"])) {
            let narrow = |row: &mut CandidateRow, which: usize| match which {
                0 => row.allowed_ips = Some(value.into()),
                1 => row.allowed_endpoints = Some(value.into()),
                2 => row.allowed_models = Some(value.into()),
                3 => row.is_active = Some(false),
                4 => row.budget_limit_cents = Some(0),
                _ => row.expires_at = Some(0),
            };
            let mut before = CandidateRow::sample(HASH);
            before.scopes = Some("[\"chat\"]".into());
            if start != which {
                narrow(&mut before, start);
            }
            let mut after = before.clone();
            narrow(&mut after, which);
            if decide(&before, &request()).is_err() {
                prop_assert!(decide(&after, &request()).is_err());
            }
        }
    }
}
