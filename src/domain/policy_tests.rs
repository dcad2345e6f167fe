//! The rules, as tables of data.

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

/// Headers that replace the path must not go upstream then.
#[test]
fn a_permit_says_whether_the_path_had_a_say() {
    let by_path = |rules: &PolicyRules, endpoints: Option<&str>, models: Option<&str>| {
        let mut row = restricted();
        row.allowed_endpoints = endpoints.map(Into::into);
        row.allowed_models = models.map(Into::into);
        permit(&DenyList::default(), rules, &row, &request()).unwrap().is_by_path()
    };
    let none = PolicyRules::default();
    assert!(!by_path(&none, None, None));
    assert!(by_path(&none, Some("[\"POST /v1/chat/*\"]"), None));
    assert!(by_path(&none, None, Some("[\"gpt-*\"]")));
    let scopes = PolicyRules { scope_paths: "/v1/**=chat".parse().unwrap(), ..PolicyRules::default() };
    assert!(by_path(&scopes, None, None));
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
        ("POST", CHAT, "gpt-4o", Some(r#"{"models":["claude-3"]}"#), NOT),
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
        ("POST", "/v1/fine_tuning/jobs", "", Some(r#"{"model":"gpt-4o","model":"claude-3"}"#), UNCLEAR),
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
        (Rule::Endpoints, |row| row.allowed_endpoints = Some("[\"/x\"]".into()), Denial::EndpointNotAllowed),
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
        scope_paths: "/v1/chat/**=chat,POST /v1/**=write,/v1/Files/=files,GET /batches=list".parse().unwrap(),
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
