//! Every denial as its caller reads it: status, reason, headers, and a body in the caller's dialect.

use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::CheckRequest;
use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use keyward::domain::denial::Denial;
use serde_json::Value;
use tonic::Code;
use tonic::transport::Endpoint;

use crate::support::envoy::Builder as Envoy;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::{Request, Response};
use crate::support::keyward::{Key, Keyward};
use crate::support::{Stack, eventually};

/// The request that is denied for exactly this reason. A new reason does not compile without its case.
async fn case(denial: Denial, stack: &Stack) -> Request {
    let keyward = &stack.keyward;
    let user = keyward.create_user(denial.code(), &[]).to_string();
    let create = |options: &[&str]| keyward.create_key(&user, denial.code(), options);
    match denial {
        Denial::MissingCredentials => Request::get("/v1/models"),
        Denial::MalformedCredentials => Request::get("/v1/models").bearer("short"),
        Denial::InvalidApiKey => Request::get("/v1/models").bearer("zz_no-such-key"),
        Denial::KeyInactive => {
            let key = create(&[]);
            keyward.cli_ok(&["key", "revoke", &key.id.to_string()]);
            Request::get("/v1/models").bearer(&key.secret)
        }
        Denial::KeyExpired => {
            let key = create(&[]);
            set(keyward, &key, "expires_at = '2020-01-01 00:00:00'");
            Request::get("/v1/models").bearer(&key.secret)
        }
        Denial::UserInactive => {
            let key = create(&[]);
            keyward.cli_ok(&["user", "disable", &user]);
            Request::get("/v1/models").bearer(&key.secret)
        }
        Denial::PolicyInvalid => {
            let key = create(&[]);
            set(keyward, &key, r#"allowed_models = '{"not": "a list"}'"#);
            Request::get("/v1/models").bearer(&key.secret)
        }
        Denial::IpNotAllowed => {
            let key = create(&["--allowed-ips", "10.0.0.0/8,2001:db8::/32"]);
            Request::get("/v1/models").bearer(&key.secret)
        }
        Denial::EndpointNotAllowed => {
            let key = create(&["--allowed-endpoints", "POST /v1/embeddings"]);
            Request::get("/v1/embeddings").bearer(&key.secret)
        }
        Denial::AmbiguousRequest => {
            let key = create(&["--allowed-endpoints", "/v1/**"]);
            Request::get("/v1/models;v=1").bearer(&key.secret)
        }
        // The shipped configuration asks for the scope `admin` here.
        Denial::ScopeMissing => {
            let key = create(&["--scopes", "chat"]);
            Request::get("/v1/admin/users").bearer(&key.secret)
        }
        Denial::ModelNotAllowed => {
            let key = create(&["--allowed-models", "claude-*"]);
            Request::get("/v1/only-gpt/models").bearer(&key.secret)
        }
        Denial::InsufficientQuota => {
            let key = create(&["--budget-limit-cents", "500"]);
            set(keyward, &key, "total_cost = 500");
            Request::get("/v1/models").bearer(&key.secret)
        }
        // Whether or not there is such a prefix.
        Denial::TooManyAttempts => {
            let guess = || Request::get("/v1/models").bearer("zz_guessed-key");
            let refused = async || (guess().send(stack.envoy.addr()).await.status == 429).then_some(());
            assert!(eventually(refused).await.is_some(), "nobody minds wrong keys");
            guess()
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_reason_has_its_status_its_word_and_a_readable_body() {
    let route = |envoy: Envoy| envoy.route("/v1/only-gpt/", "{model: gpt-4o}");
    let stack = Stack::start_with(Keyward::new(), route).await;
    for denial in Denial::ALL {
        let response = case(denial, &stack).await.send(stack.envoy.addr()).await;
        let code = denial.code();
        assert_eq!((response.reason(), response.status), (code, denial.http_status()), "{response:?}");
        let challenge = (denial.http_status() == 401).then_some(r#"Bearer realm="keyward""#);
        assert_eq!(response.value("www-authenticate"), challenge, "{code}");
        let waits = denial == Denial::TooManyAttempts;
        let told = (response.value("x-should-retry"), response.value("retry-after").map(str::parse::<u64>));
        if waits {
            assert!(matches!(told, (None, Some(Ok(1..=3)))), "{told:?}");
        } else {
            assert_eq!(told, (Some("false"), None), "{code}: what is refused stays refused");
        }
        assert_is_openai(&response, code);
        let id = response.json()["request_id"].as_str().unwrap_or_default().to_owned();
        assert!(!id.is_empty(), "{code}: Envoy gives every request an id");
        for name in ["x-request-id", "request-id"] {
            assert_eq!(response.value(name), Some(&*id), "{code}: {name}");
        }
    }
    assert_eq!(stack.upstream.requests(), 0, "a denied request went upstream");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_dialect_is_spoken_where_its_callers_are() {
    let stack = Stack::start().await;
    let send = async |request: Request| request.send(stack.envoy.addr()).await;

    assert_is_openai(&send(Request::post("/v1/chat/completions", "{}")).await, "missing_credentials");
    assert_is_openai(&send(Request::post("/v1/messagesX", "{}")).await, "missing_credentials");

    let anthropic = Request::get("/v1/models").header("anthropic-version", "2023-06-01");
    for request in [Request::post("/v1/messages", "{}"), Request::get("/v1/messages/batches"), anthropic] {
        let body = send(request).await.json();
        assert_eq!(body["type"], "error", "{body}");
        assert_eq!(body["error"]["type"], "authentication_error", "{body}");
        assert_eq!(body["error"]["details"]["error_code"], "missing_credentials", "{body}");
        assert_is_text(&body["error"]["message"]);
        assert_is_text(&body["request_id"]);
    }

    // Another version of the API has another path.
    let google = Request::post("/v1/models/gemini-pro:generateContent", "{}");
    let google = google.header("x-goog-api-client", "google-genai-sdk/3.4.0 gl-python/3.11.7");
    for request in [Request::post("/v1beta/models/gemini-pro:generateContent", "{}"), google] {
        let body = send(request).await.json();
        assert_eq!(body["error"]["code"], 401, "{body}");
        assert_eq!(body["error"]["status"], "UNAUTHENTICATED", "{body}");
        assert_eq!(body["error"]["details"][0]["reason"], "MISSING_CREDENTIALS", "{body}");
        assert_is_text(&body["error"]["details"][1]["requestId"]);
        assert_is_text(&body["error"]["message"]);
    }
    assert_is_openai(
        &send(Request::post("/v1beta/openai/chat/completions", "{}")).await,
        "missing_credentials",
    );

    let problem = Request::post("/v1/messages", "{}").header("accept", "application/problem+json");
    let response = send(problem).await;
    assert_eq!(response.value("content-type"), Some("application/problem+json"));
    let body = response.json();
    assert_eq!((&body["status"], &body["title"]), (&401.into(), &"Unauthorized".into()), "{body}");
    assert_eq!(body["code"], "missing_credentials", "{body}");
    assert_is_text(&body["detail"]);
    assert_is_text(&body["request_id"]);
}

/// Whoever tries keys must not learn which prefixes exist.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_prefix_and_a_wrong_secret_get_the_same_answer_byte_for_byte() {
    let stack = Stack::start().await;
    stack.keyward.create_user("ada", &[]);
    // A key that is off, and one with restrictions, say nothing either before they are proven.
    let known = stack.keyward.create_key("ada", "ci", &[]);
    let off = stack.keyward.create_key("ada", "off", &["--allowed-endpoints", "/nowhere"]);
    stack.keyward.cli_ok(&["key", "revoke", &off.id.to_string()]);
    let wrong = |key: &Key| format!("{}{}", &key.secret[..8], "x".repeat(key.secret.len() - 8));
    let unknown = format!("zz_nokey{}", "x".repeat(known.secret.len() - 8));
    let authorizer = Authorizer::connect(stack.keyward.grpc_addr()).await;

    let ask = async |key: &str| {
        let check = Check::new("GET", "/v1/models").bearer(key).build(Encoding::Raw);
        let answer = authorizer.check(check).await;
        let mut seen = Request::get("/v1/models").bearer(key).send(stack.envoy.addr()).await;
        assert_eq!((seen.status, seen.reason()), (401, "invalid_api_key"));
        // What Envoy makes anew for every request.
        let request_id = seen.json()["request_id"].as_str().unwrap_or_default().to_owned();
        seen.headers.retain(|(name, value)| name != "date" && *value != request_id);
        let body = seen.text().replace(&request_id, "");
        (answer.0, seen.headers, body)
    };
    let expected = ask(&unknown).await;
    assert_eq!(ask(&wrong(&known)).await, expected);
    assert_eq!(ask(&wrong(&off)).await, expected);
}

type HeaderLine = (&'static str, Vec<u8>);

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_single_well_formed_key_is_refused_and_never_falls_through() {
    let malformed = Denial::MalformedCredentials.code();
    let missing = Denial::MissingCredentials.code();
    let invalid = Denial::InvalidApiKey.code();
    for raw in ["true", "false"] {
        let stack = Stack::start_with(Keyward::new(), |envoy| {
            let shipped = "encode_raw_headers: true";
            if raw == "true" { envoy } else { envoy.replace(shipped, "encode_raw_headers: false") }
        })
        .await;
        stack.keyward.create_user("ada", &[]);
        let key = stack.keyward.create_key("ada", "ci", &[]).secret;
        let other = stack.keyward.create_key("ada", "other", &[]).secret;
        let bearer = |rest: &str| ("authorization", format!("Bearer {rest}").into_bytes());
        let x_api_key = |value: &str| ("x-api-key", value.as_bytes().to_vec());

        let cases: Vec<(&str, &str, Vec<HeaderLine>)> = vec![
            ("nothing", missing, vec![]),
            ("another scheme", missing, vec![("authorization", b"Basic dXNlcjpwYXNz".to_vec())]),
            (
                "bytes that are no UTF-8",
                malformed,
                vec![("authorization", b"Bearer kw_\xff\xfe12345678".to_vec())],
            ),
            ("no UTF-8 in another header", malformed, vec![("x-api-key", b"kw_\xe9\xe912345678".to_vec())]),
            ("UTF-8", malformed, vec![bearer("kw_schlüssel12345")]),
            ("an exclamation mark", malformed, vec![bearer("kw_!!!!!!!!!!!!!!")]),
            ("a blank inside", malformed, vec![bearer(&format!("{} {}", &key[..10], &key[10..]))]),
            ("a tab inside", malformed, vec![x_api_key(&format!("{}\t{}", &key[..10], &key[10..]))]),
            ("a key and a word more", malformed, vec![bearer(&format!("{key} x"))]),
            ("a comma", malformed, vec![x_api_key(&format!("{key},{other}"))]),
            ("a comma at the end", malformed, vec![x_api_key(&format!("{key},"))]),
            ("73 bytes", malformed, vec![bearer(&"k".repeat(73))]),
            ("72 bytes and unknown", invalid, vec![bearer(&"k".repeat(72))]),
            ("a right key with more behind it", malformed, vec![bearer(&format!("{key}{}", "k".repeat(73)))]),
            ("8 bytes", malformed, vec![bearer("kw_12345")]),
            ("9 bytes and unknown", invalid, vec![bearer("kw_123456")]),
            ("quotes", invalid, vec![bearer(&format!("\"{key}\""))]),
            ("Bearer twice", malformed, vec![bearer(&format!("Bearer {key}"))]),
            ("Bearer without a blank", missing, vec![("authorization", format!("Bearer{key}").into_bytes())]),
            ("two authorization lines", malformed, vec![bearer(&key), bearer(&other)]),
            ("one authorization line twice", malformed, vec![bearer(&key), bearer(&key)]),
            ("two x-api-key lines", malformed, vec![x_api_key(&key), x_api_key(&other)]),
            ("two keys in two sources", malformed, vec![bearer(&key), x_api_key(&other)]),
            ("an empty Bearer before a good key", malformed, vec![bearer(""), x_api_key(&key)]),
            ("a bad Bearer before a good key", malformed, vec![bearer("short"), x_api_key(&key)]),
            ("a good Bearer before an empty source", malformed, vec![bearer(&key), x_api_key("")]),
            ("a good Bearer before a bad source", malformed, vec![bearer(&key), x_api_key("short")]),
            (
                "a good Bearer before an unknown key",
                malformed,
                vec![bearer(&key), x_api_key("zz_no-such-key")],
            ),
        ];
        for (name, reason, headers) in cases {
            let mut request = Request::get("/v1/models");
            for (header, value) in headers {
                request = request.header(header, value);
            }
            let response = request.send(stack.envoy.addr()).await;
            let context = format!("{name}, encode_raw_headers: {raw}");
            assert_eq!((response.status, response.reason()), (401, reason), "{context}");
            assert!(!response.text().contains(&key[8..]), "{context}: the key is in the answer");
        }
        assert_eq!(stack.upstream.requests(), 0);
        let good = Request::get("/v1/models").bearer(&key).send(stack.envoy.addr()).await;
        assert_eq!(good.status, 200, "the key itself is fine: {}", good.reason());
    }
}

/// Envoy refuses these bytes in HTTP/1.1 itself; whoever speaks gRPC to Keyward may still send them.
#[tokio::test(flavor = "multi_thread")]
async fn control_bytes_are_refused_whoever_asks() {
    let keyward = Keyward::new().start().await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for encoding in [Encoding::Raw, Encoding::Joined] {
        for byte in [0, 1, b'\n', b'\r', 0x1b, 0x7f] {
            let key = [b"kw_abcde".as_slice(), &[byte], b"fghij"].concat();
            let check = Check::new("GET", "/").header("x-api-key", key).build(encoding);
            let answer = authorizer.check(check).await;
            assert!(!answer.allows());
            assert_eq!(answer.http_status(), 401);
            assert_eq!(
                answer.header("x-keyward-reason"),
                Some("malformed_credentials"),
                "{byte:#x} {encoding:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_is_envoys_peer_and_the_routes_scopes_are_asked_for() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let options = ["--allowed-ips", "10.0.0.0/8,2001:db8::/32", "--scopes", "chat,embed"];
    let key = keyward.create_key("ada", "ci", &options).secret;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for (source, scopes, reason) in [
        ("10.1.2.3", "", None),
        ("::ffff:10.1.2.3", "", None),
        ("2001:db8::1", "", None),
        ("11.1.2.3", "", Some("ip_not_allowed")),
        ("2001:db9::1", "", Some("ip_not_allowed")),
        ("", "", Some("ip_not_allowed")),
        ("not an address", "", Some("ip_not_allowed")),
        ("10.1.2.3", "chat", None),
        ("10.1.2.3", "chat, embed", None),
        ("10.1.2.3", "chat,admin", Some("scope_missing")),
    ] {
        // The caller's word on its address counts for nothing unless a setting says so.
        let check = Check::new("GET", "/").bearer(&key).header("x-forwarded-for", "10.9.9.9").source(source);
        let check = check.context_extension("required_scopes", scopes).build(Encoding::Raw);
        let answer = authorizer.check(check).await;
        assert_eq!(answer.allows(), reason.is_none(), "{source} {scopes}");
        assert_eq!(answer.header("x-keyward-reason"), reason, "{source} {scopes}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_client_reads_a_status_and_a_plain_message() {
    let stack = Stack::start().await;
    stack.keyward.create_user("ada", &[]);
    let narrow = stack.keyward.create_key("ada", "narrow", &["--allowed-endpoints", "/v1/**"]);
    let broke = stack.keyward.create_key("ada", "broke", &["--budget-limit-cents", "0"]);
    for (key, path, grpc_status, reason) in [
        (None, "/pkg.Service/Method", "16", "missing_credentials"),
        (Some("zz_no-such-key"), "/pkg.Service/Method", "16", "invalid_api_key"),
        (Some(&*narrow.secret), "/pkg.Service/Method", "7", "endpoint_not_allowed"),
        (Some(&*narrow.secret), "/v1/Method;x", "3", "ambiguous_request"),
        (Some(&*broke.secret), "/pkg.Service/Method", "8", "insufficient_quota"),
    ] {
        let request =
            Request::new("POST", path).header("content-type", "application/grpc").header("te", "trailers");
        let request = request.header("content-length", "0");
        let request = if let Some(key) = key { request.bearer(key) } else { request };
        let response = request.send(stack.envoy.addr()).await;
        assert_eq!(response.status, 200, "{reason}: gRPC carries its status elsewhere");
        assert_eq!(response.value("grpc-status"), Some(grpc_status), "{reason}");
        assert_eq!(response.reason(), reason);
        let message = response.value("grpc-message").unwrap_or_default();
        assert!(!message.is_empty() && !message.contains('{'), "{reason}: {message:?}");
    }
    assert_eq!(stack.upstream.requests(), 0);
}

/// Not the bytes of it: what a real client makes of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_grpc_client_gets_a_clean_status() {
    // bcrypt takes longer, so that a key that needs it can't be decided in time.
    let stack = Stack::start_with(Keyward::new().arg("--check-timeout", "1ms"), |envoy| envoy).await;
    stack.keyward.create_user("ada", &[]);
    let create = |name: &str, options: &[&str]| stack.keyward.create_key("ada", name, options).secret;
    let narrow = create("narrow", &["--hash", "sha256", "--allowed-endpoints", "/v1/other"]);
    let broke = create("broke", &["--hash", "sha256", "--budget-limit-cents", "0"]);
    let slow = create("slow", &[]);
    let channel = Endpoint::from_shared(format!("http://{}", stack.envoy.addr())).unwrap();
    // Any service would do; this one's client is at hand.
    let mut client = AuthorizationClient::new(channel.connect().await.unwrap());
    let mut refusal = async |key: Option<&str>| {
        let mut request = tonic::Request::new(CheckRequest::default());
        if let Some(key) = key {
            request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        }
        client.check(request).await.unwrap_err()
    };
    for (key, code, reason) in [
        (None, Code::Unauthenticated, Denial::MissingCredentials),
        (Some("zz_no-such-key"), Code::Unauthenticated, Denial::InvalidApiKey),
        (Some(narrow.as_str()), Code::PermissionDenied, Denial::EndpointNotAllowed),
        (Some(broke.as_str()), Code::ResourceExhausted, Denial::InsufficientQuota),
    ] {
        // A machine that is busy may need more than the millisecond for these too.
        let status = eventually(async || {
            let status = refusal(key).await;
            (status.code() != Code::Unavailable).then_some(status)
        });
        let status = status.await.unwrap_or_else(|| panic!("{reason:?} is never told"));
        assert_eq!((status.code(), status.message()), (code, reason.message()));
        let reason_header = status.metadata().get("x-keyward-reason").and_then(|value| value.to_str().ok());
        assert_eq!(reason_header, Some(reason.code()));
    }
    let status = refusal(Some(slow.as_str())).await;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().ends_with("Try again in a moment."), "{status:?}");
    assert_eq!(stack.upstream.requests(), 0);
}

fn assert_is_openai(response: &Response, code: &str) {
    assert_eq!(response.value("content-type"), Some("application/json"), "{code}");
    let body = response.json();
    assert_eq!(body["error"]["code"], code, "{body}");
    assert_is_text(&body["error"]["message"]);
    assert_is_text(&body["error"]["type"]);
    assert!(body["error"].get("param").is_some_and(Value::is_null), "{body}");
}

fn assert_is_text(value: &Value) {
    assert!(value.as_str().is_some_and(|text| !text.is_empty()), "{value}");
}

/// Changes a column of a key behind Keyward's back; before its first use, so that no cache knows the old row.
fn set(keyward: &Keyward, key: &Key, assignment: &str) {
    let file = rusqlite::Connection::open(keyward.sqlite_file()).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    let changed = file.execute(&format!("UPDATE api_keys SET {assignment} WHERE id = ?1"), [key.id]).unwrap();
    assert_eq!(changed, 1);
}

/// What is repeated may be read by a browser or a log as something else than text.
#[tokio::test(flavor = "multi_thread")]
async fn a_denial_repeats_nothing_of_what_was_sent() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let create = |name: &str, options: &[&str]| keyward.create_key("ada", name, options).secret;
    let endpoints = create("endpoints", &["--allowed-endpoints", "/v1/models"]);
    let models = create("models", &["--allowed-models", "gpt-4o"]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let canary = "<script>canary";
    for (key, path, reason) in [
        ("kw_<script>canary", "/v1/models".to_owned(), "invalid_api_key"),
        ("<script> canary", "/v1/models".to_owned(), "malformed_credentials"),
        (&*endpoints, format!("/v1/{canary}"), "endpoint_not_allowed"),
        (&*endpoints, format!("/v1//{canary}?{canary}"), "ambiguous_request"),
        (&*models, format!("/openai/deployments/{canary}/chat/completions"), "model_not_allowed"),
    ] {
        for dialect in ["x-none", "anthropic-version"] {
            let check = Check::new("GET", &path).header("x-api-key", key).header(dialect, canary);
            let answer = authorizer.check(check.header("user-agent", canary).build(Encoding::Raw)).await;
            assert_eq!(answer.header("x-keyward-reason"), Some(reason), "{path}");
            assert_eq!(answer.header("content-type"), Some("application/json"), "{reason}");
            assert!(!format!("{answer:?}").contains("canary"), "{reason}: {answer:?}");
        }
    }
}
