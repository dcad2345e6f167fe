//! An allowed request's whole way: what the upstream learns, and what it must never see.

use keyward::domain::path::decode;

use crate::support::Stack;
use crate::support::http::Request;
use crate::support::keyward::Keyward;

/// Every name that Keyward owns, without the prefix.
const OWNED: [&str; 18] = [
    "key-id",
    "key-name",
    "key-prefix",
    "user-id",
    "username",
    "user-email",
    "role",
    "superuser",
    "scopes",
    "allowed-models",
    "allowed-endpoints",
    "allowed-chatbots",
    "rate-limit-minute",
    "rate-limit-hour",
    "rate-limit-day",
    "budget-limit-cents",
    "budget-remaining-cents",
    "model",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_upstream_learns_who_is_calling_and_what_they_may_use() {
    let stack = Stack::start().await;
    let user_id = stack.keyward.create_user("ada", &["--role", "operator"]);
    let key = stack.keyward.create_key(
        "ada",
        "ci",
        &[
            "--scopes",
            "chat,embed",
            "--allowed-models",
            "gpt-4o*,claude-*",
            "--rate-limit-per-minute",
            "60",
            "--rate-limit-per-hour",
            "1000",
            "--budget-limit-cents",
            "500",
        ],
    );
    let body = r#"{"model":"gpt-4o-mini"}"#;
    let request = Request::post("/v1/chat/completions?b=2&a=1", body).bearer(&key.secret);
    let echo = request.send(stack.envoy.addr()).await.echo();
    for (name, value) in [
        ("key-id", &*key.id.to_string()),
        ("key-prefix", &key.secret[..8]),
        ("user-id", &user_id.to_string()),
        ("role", "operator"),
        ("superuser", "false"),
        ("scopes", "chat,embed"),
        ("allowed-models", "gpt-4o*,claude-*"),
        ("allowed-endpoints", "*"),
        ("allowed-chatbots", "*"),
        ("rate-limit-minute", "60"),
        ("rate-limit-hour", "1000"),
        ("budget-limit-cents", "500"),
        ("budget-remaining-cents", "500"),
        ("model", "gpt-4o-mini"),
    ] {
        assert_eq!(echo.values(&format!("x-keyward-{name}")), [value], "{name}");
    }
    for name in ["key-name", "username", "user-email"] {
        assert!(echo.values(&format!("x-keyward-{name}")).is_empty(), "{name} is sent only when asked for");
    }
    // The rest of the request is as it was; a query that held no key keeps its order.
    assert_eq!((&*echo.method, &*echo.path), ("POST", "/v1/chat/completions?b=2&a=1"));
    assert_eq!(echo.body, body);
    assert!(!stack.keyward.log().contains(&key.secret[8..]), "the secret is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_names_arrive_percent_encoded_when_they_are_asked_for() {
    let asked = Keyward::new().arg("--response-headers", "key-id,key-name,username,user-email");
    let stack = Stack::start_with(asked, |envoy| envoy).await;
    stack.keyward.create_user("ada", &[]);
    for name in ["Jürgens Schlüssel, 100% {\"neu\"}", "名前", "a: b; c=d", "plain"] {
        let key = stack.keyward.create_key("ada", name, &[]);
        let echo = Request::get("/").bearer(&key.secret).send(stack.envoy.addr()).await.echo();
        let sent = echo.values("x-keyward-key-name");
        assert_eq!(sent.len(), 1, "{name}");
        assert!(sent[0].bytes().all(|byte| byte.is_ascii_graphic()), "{name}: {sent:?}");
        assert_eq!(decode(sent[0]).unwrap(), name.as_bytes(), "{sent:?}");
        assert_eq!(echo.values("x-keyward-username"), ["ada"]);
        assert_eq!(echo.values("x-keyward-user-email"), ["ada@example.com"]);
        assert!(echo.values("x-keyward-user-id").is_empty(), "was not asked for");
    }
}

/// Whether Keyward sets a name or not: what the caller sent under it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_survives_that_the_caller_sent_under_an_owned_name() {
    let stack = Stack::start_with(Keyward::new(), |envoy| {
        // The shipped configuration refuses underscores before Keyward sees them; others don't.
        envoy.replace(
            "headers_with_underscores_action: REJECT_REQUEST",
            "headers_with_underscores_action: ALLOW",
        )
    })
    .await;
    stack.keyward.create_user("ada", &[]);
    let key = stack.keyward.create_key("ada", "ci", &[]);
    let mut request = Request::get("/").bearer(&key.secret);
    for name in OWNED.iter().chain(&["overflow"]) {
        let hyphens = format!("X-Keyward-{name}");
        // Twice: a first value that is replaced must not leave a second one behind.
        request = request.header(&hyphens, "spoofed").header(&hyphens.to_lowercase(), "spoofed");
        request = request.header(&hyphens.replace('-', "_"), "spoofed");
    }
    let echo = request.send(stack.envoy.addr()).await.echo();
    let spoofed: Vec<_> = echo.headers.iter().filter(|(_, value)| value.contains("spoofed")).collect();
    assert!(spoofed.is_empty(), "{spoofed:?}");
    assert_eq!(echo.values("x-keyward-key-id"), [key.id.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_source_is_accepted_and_no_carrier_goes_upstream() {
    let stack = Stack::start().await;
    stack.keyward.create_user("ada", &[]);
    let key = stack.keyward.create_key("ada", "ci", &[]);
    let bearer = format!("Bearer {}", key.secret);
    let cases: [(&str, Vec<(&str, String)>); 9] = [
        ("bearer", vec![("authorization", bearer.clone())]),
        ("any case, several blanks", vec![("Authorization", format!("bEARER   {}", key.secret))]),
        ("x-api-key", vec![("x-api-key", key.secret.clone())]),
        ("api-key", vec![("api-key", key.secret.clone())]),
        ("x-goog-api-key", vec![("x-goog-api-key", key.secret.clone())]),
        (
            "Basic is no key of ours",
            vec![
                ("authorization", "Basic dXNlcjpwYXNzd29yZA==".to_owned()),
                ("x-api-key", key.secret.clone()),
            ],
        ),
        ("the same key twice", vec![("authorization", bearer.clone()), ("x-api-key", key.secret.clone())]),
        (
            "the same key everywhere",
            vec![
                ("x-goog-api-key", key.secret.clone()),
                ("authorization", bearer),
                ("api-key", key.secret.clone()),
                ("x-api-key", key.secret.clone()),
            ],
        ),
        ("blanks around", vec![("x-api-key", format!("  {}\t ", key.secret))]),
    ];
    for (name, headers) in cases {
        let mut request = Request::get("/v1/models");
        for (header, value) in headers {
            request = request.header(header, value);
        }
        let echo = request.send(stack.envoy.addr()).await.echo();
        for carrier in ["authorization", "x-api-key", "api-key", "x-goog-api-key"] {
            assert!(echo.values(carrier).is_empty(), "{name}: {carrier} went upstream");
        }
        assert_eq!(echo.values("x-keyward-key-id"), [key.id.to_string()], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_goes_upstream_only_where_the_settings_say_so() {
    let stack = Stack::start_with(Keyward::new().arg("--forward-credentials", "on"), |envoy| envoy).await;
    stack.keyward.create_user("ada", &[]);
    let key = stack.keyward.create_key("ada", "ci", &[]);
    let request = Request::get("/").bearer(&key.secret).header("x-keyward-user-id", "spoofed");
    let echo = request.send(stack.envoy.addr()).await.echo();
    assert_eq!(echo.values("authorization"), [format!("Bearer {}", key.secret)]);
    assert_ne!(echo.values("x-keyward-user-id"), ["spoofed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_the_query_is_removed_by_the_spelling_that_was_sent() {
    let with_query = Keyward::new().arg("--credential-sources", "bearer,query:key");
    let stack = Stack::start_with(with_query, |envoy| envoy).await;
    stack.keyward.create_user("ada", &[]);
    let key = stack.keyward.create_key("ada", "ci", &[]);
    let secret = &key.secret;
    for (sent, seen) in [
        (format!("/v1/models?key={secret}"), "/v1/models"),
        (format!("/v1/models?b=2&k%65y={secret}&a=1"), "/v1/models?a=1&b=2"),
    ] {
        let echo = Request::get(&sent).send(stack.envoy.addr()).await.echo();
        assert_eq!(echo.path, seen);
    }
    let twice =
        Request::get(&format!("/v1/models?%6Bey={secret}&key={secret}")).send(stack.envoy.addr()).await;
    assert_eq!((twice.status, twice.reason()), (401, "malformed_credentials"), "twice, in two spellings");
    let other = Request::get("/v1/models?b=2&monkey=1&a=1").bearer(secret).send(stack.envoy.addr()).await;
    assert_eq!(other.echo().path, "/v1/models?b=2&monkey=1&a=1", "a query without a key is left alone");
    assert!(!stack.envoy.access_log().contains(&secret[8..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_tells_who_was_let_in_and_why_others_were_not() {
    let stack = Stack::start().await;
    let user_id = stack.keyward.create_user("ada", &[]);
    let key = stack.keyward.create_key("ada", "ci", &["--allowed-endpoints", "/allowed"]);
    Request::get("/allowed").bearer(&key.secret).send(stack.envoy.addr()).await;
    Request::get("/elsewhere").bearer(&key.secret).send(stack.envoy.addr()).await;
    Request::get("/unknown?key=1").bearer("zz_no-such-key").send(stack.envoy.addr()).await;

    let allowed = stack.envoy.access_log_of("/allowed").await;
    assert_eq!(allowed["status"], 200);
    assert_eq!(allowed["key_id"], key.id.to_string());
    assert_eq!(allowed["user_id"], user_id.to_string());
    assert_eq!(allowed["tier"], "store");
    assert!(allowed["reason"].is_null());

    let refused = stack.envoy.access_log_of("/elsewhere").await;
    assert_eq!(refused["reason"], "endpoint_not_allowed");
    assert_eq!(refused["key_id"], key.id.to_string());
    assert_eq!(refused["details"], "ext_authz_denied");

    let unknown = stack.envoy.access_log_of("/unknown").await;
    assert_eq!(unknown["reason"], "invalid_api_key");
    assert!(unknown["key_id"].is_null(), "an unproven key is told from no record");
    assert!(!stack.envoy.access_log().contains(&key.secret[8..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_header_prefix_is_a_setting_of_both_answers() {
    let stack =
        Stack::start_with(Keyward::new().arg("--response-header-prefix", "x-acme-"), |envoy| envoy).await;
    stack.keyward.create_user("ada", &[]);
    let key = stack.keyward.create_key("ada", "ci", &[]);
    let request = Request::get("/").bearer(&key.secret).header("x-acme-user-id", "spoofed");
    let echo = request.send(stack.envoy.addr()).await.echo();
    assert_eq!(echo.values("x-acme-key-id"), [key.id.to_string()]);
    assert_ne!(echo.values("x-acme-user-id"), ["spoofed"]);
    assert!(echo.values("x-keyward-key-id").is_empty());
    let denied = Request::get("/").send(stack.envoy.addr()).await;
    assert_eq!(denied.value("x-acme-reason"), Some("missing_credentials"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anonymous_route_lets_no_key_pass_but_not_a_bad_one() {
    let stack = Stack::start_with(Keyward::new(), |envoy| envoy.route("/open/", "{anonymous: allow}")).await;
    let open = Request::get("/open/x").header("x-keyward-user-id", "1").send(stack.envoy.addr()).await.echo();
    assert!(open.values("x-keyward-user-id").is_empty(), "nobody's identity is made up");
    let bad = Request::get("/open/x").bearer("zz_no-such-key").send(stack.envoy.addr()).await;
    assert_eq!((bad.status, bad.reason()), (401, "invalid_api_key"));
    let closed = Request::get("/closed/x").send(stack.envoy.addr()).await;
    assert_eq!((closed.status, closed.reason()), (401, "missing_credentials"));
}
