//! HTTP forward-auth as the real Envoy (`envoy/http-service.yaml`) and the real nginx (`examples/nginx.conf`) use it, and
//! what the other shipped examples must not forget.

use std::net::SocketAddr;
use std::time::Duration;

use keyward::domain::denial::Denial;
use keyward::server::options::IdentityHeader;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::envoy::Envoy;
use crate::support::http::{Request, Response};
use crate::support::keyward::{Key, Keyward};
use crate::support::nginx::Nginx;
use crate::support::port::free_addr;
use crate::support::upstream::Upstream;

/// The proxy in front.
enum Proxy {
    Envoy(Envoy),
    Nginx(Nginx),
}

struct Stack {
    keyward: Keyward,
    proxy: Proxy,
    upstream: Upstream,
}

impl Stack {
    async fn envoy(more: &[(&str, &str)]) -> Self {
        let (keyward, http, upstream) = behind("envoy", more).await;
        let proxy = Envoy::of_file("envoy/http-service.yaml", http, upstream.addr()).start().await;
        Self { keyward, proxy: Proxy::Envoy(proxy), upstream }
    }

    async fn nginx(changes: &[(&str, &str)]) -> Self {
        let (keyward, http, upstream) = behind("nginx", &[]).await;
        let proxy = Nginx::start(http, upstream.addr(), changes).await;
        Self { keyward, proxy: Proxy::Nginx(proxy), upstream }
    }

    fn addr(&self) -> SocketAddr {
        match &self.proxy {
            Proxy::Envoy(envoy) => envoy.addr(),
            Proxy::Nginx(nginx) => nginx.addr(),
        }
    }

    async fn send(&self, request: Request) -> Response {
        request.send(self.addr()).await
    }

    fn create(&self, name: &str, options: &[&str]) -> Key {
        self.keyward.create_key("ada", name, &[&["--hash", "sha256"], options].concat())
    }
}

async fn behind(profile: &str, more: &[(&str, &str)]) -> (Keyward, SocketAddr, Upstream) {
    let http = free_addr();
    let builder = Keyward::new().arg("--http-listen", &http.to_string()).arg("--http-profile", profile);
    let builder = more.iter().fold(builder, |builder, (flag, value)| builder.arg(flag, value));
    let keyward = builder.start().await;
    keyward.create_user("ada", &[]);
    (keyward, http, Upstream::start().await)
}

const ENVOYS: [(&str, &str); 2] =
    [("--client-ip", "header:x-peer-address"), ("--scope-paths", "/v1/admin/**=admin")];

async fn both() -> [Stack; 2] {
    [Stack::envoy(&ENVOYS).await, Stack::nginx(&[]).await]
}

fn reason(response: &Response) -> (u16, &str) {
    (response.status, response.reason())
}

/// What the upstream reads, whatever the caller made up, under which spelling ever.
#[tokio::test(flavor = "multi_thread")]
async fn the_upstream_reads_keyward_s_words_and_no_key() {
    for stack in both().await {
        let key = stack.create("ci", &["--scopes", "chat", "--rate-limit-per-minute", "60"]);
        let request = Request::post("/v1/chat/completions?a=b", r#"{"model":"m"}"#).bearer(&key.secret);
        let request = request.header("x-api-key", &key.secret).header("x-keyward-superuser", "true");
        let request = request.header("x-keyward-superuser", "TRUE").header("X-Keyward-Role", "admin");
        let request = request.header("x-keyward-overflow", "scopes").header("x-keyward-user-email", "b@ss");
        let echo = stack.send(request).await.echo();
        assert_eq!((&*echo.method, &*echo.path), ("POST", "/v1/chat/completions?a=b"));
        assert_eq!(echo.body, r#"{"model":"m"}"#);
        let id = key.id.to_string();
        for (name, expected) in [
            ("key-id", &*id),
            ("superuser", "false"),
            ("role", "user"),
            ("scopes", "chat"),
            ("allowed-models", "*"),
            ("rate-limit-minute", "60"),
        ] {
            assert_eq!(echo.values(&format!("x-keyward-{name}")), [expected], "{name}");
        }
        let others = ["overflow", "user-email", "key-name", "rate-limit-day", "reason"];
        for name in others.map(|name| format!("x-keyward-{name}")) {
            assert!(echo.values(&name).is_empty(), "{name}: {echo:?}");
        }
        for name in [
            "authorization",
            "x-api-key",
            "x-original-uri",
            "x-original-method",
            "x-envoy-auth-headers-to-remove",
        ] {
            assert!(echo.values(name).is_empty(), "{name}: {echo:?}");
        }
        assert!(!format!("{echo:?}").contains(&key.secret[8..]), "{echo:?}");
    }
}

/// The request that is denied for exactly this reason behind both proxies. A new reason does not compile without its case.
fn denied(denial: Denial, stack: &Stack) -> Request {
    let create = |options: &[&str]| stack.create(denial.code(), options);
    let get = |path: &str, key: &Key| Request::get(path).bearer(&key.secret);
    let models = |key: Key| get("/v1/models", &key);
    match denial {
        Denial::MissingCredentials => Request::get("/v1/models"),
        Denial::MalformedCredentials => Request::get("/v1/models").bearer("short"),
        Denial::InvalidApiKey => Request::get("/v1/models").bearer("zz_no-such-key"),
        Denial::KeyInactive => {
            let key = create(&[]);
            stack.keyward.cli_ok(&["key", "revoke", &key.id.to_string()]);
            models(key)
        }
        Denial::KeyExpired => models(set(stack, create(&[]), "expires_at = '2020-01-01 00:00:00'")),
        Denial::UserInactive => {
            stack.keyward.create_user("bob", &[]);
            let key = stack.keyward.create_key("bob", "ci", &["--hash", "sha256"]);
            stack.keyward.cli_ok(&["user", "disable", "bob"]);
            models(key)
        }
        Denial::PolicyInvalid => models(set(stack, create(&[]), r#"allowed_models = '{"not": "a list"}'"#)),
        Denial::IpNotAllowed => models(create(&["--allowed-ips", "10.0.0.0/8"])),
        Denial::EndpointNotAllowed => {
            get("/v1/embeddings", &create(&["--allowed-endpoints", "POST /v1/embeddings"]))
        }
        // A model has to be named on this path.
        Denial::AmbiguousRequest => {
            let key = create(&["--allowed-models", "claude-*"]);
            Request::post("/v1/chat/completions", "").bearer(&key.secret)
        }
        Denial::ScopeMissing => get("/v1/admin/users", &create(&["--scopes", "chat"])),
        Denial::ModelNotAllowed => get("/model/gpt-4o/invoke", &create(&["--allowed-models", "claude-*"])),
        Denial::InsufficientQuota => {
            models(set(stack, create(&["--budget-limit-cents", "500"]), "total_cost = 500"))
        }
        // Once it has been sent often enough.
        Denial::TooManyAttempts => Request::get("/v1/models").bearer("zz_guessed-key"),
    }
}

/// Changes a column behind Keyward's back, before the key's first use.
fn set(stack: &Stack, key: Key, assignment: &str) -> Key {
    let file = rusqlite::Connection::open(stack.keyward.sqlite_file()).unwrap();
    file.busy_timeout(Duration::from_secs(10)).unwrap();
    let changed = file.execute(&format!("UPDATE api_keys SET {assignment} WHERE id = ?1"), [key.id]).unwrap();
    assert_eq!(changed, 1);
    key
}

#[tokio::test(flavor = "multi_thread")]
async fn every_denial_reaches_the_caller_with_its_status_its_reason_and_a_body() {
    for stack in both().await {
        let mut guesses = 0;
        for denial in Denial::ALL {
            let mut response = stack.send(denied(denial, &stack)).await;
            while denial == Denial::TooManyAttempts && response.reason() == "invalid_api_key" {
                guesses += 1;
                response = stack.send(denied(denial, &stack)).await;
            }
            assert_eq!(reason(&response), (denial.http_status(), denial.code()), "{response:?}");
            let challenge = (denial.http_status() == 401).then_some(r#"Bearer realm="keyward""#);
            assert_eq!(response.value("www-authenticate"), challenge, "{response:?}");
            assert_eq!(response.value("content-type"), Some("application/json"), "{response:?}");
            assert_eq!(response.json()["error"]["code"], denial.code());
            // Only who has guessed too often may fare better later, and hears when.
            let waits = denial == Denial::TooManyAttempts;
            assert_eq!(response.value("x-should-retry"), (!waits).then_some("false"), "{response:?}");
            assert_eq!(response.value("retry-after").is_some(), waits, "{response:?}");
        }
        assert_eq!(stack.upstream.requests(), 0, "a denied request went upstream");
        for denial in Denial::ALL {
            let labels = [("decision", "deny"), ("reason", denial.code())];
            let expected = if denial == Denial::InvalidApiKey { 1 + guesses } else { 1 };
            assert_eq!(stack.keyward.count("keyward_checks_total", &labels).await, expected, "{denial:?}");
        }
    }
}

/// Both are the proxy's: method and path from the request line, the address from the connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_can_not_say_which_request_theirs_is_nor_where_it_comes_from() {
    for stack in both().await {
        let narrow = stack.create("narrow", &["--allowed-endpoints", "GET /v1/models"]);
        let local = stack.create("local", &["--allowed-ips", "127.0.0.0/8"]);
        let foreign = stack.create("foreign", &["--allowed-ips", "10.0.0.0/8"]);
        let names = [
            ("x-original-uri", "/v1/models"),
            ("x-original-url", "http://api.example.com/v1/models"),
            ("x-original-method", "GET"),
            ("x-forwarded-uri", "/v1/models"),
            ("x-forwarded-method", "GET"),
            ("x-envoy-original-path", "/v1/models"),
            ("x-forwarded-for", "10.1.2.3"),
            ("x-peer-address", "10.1.2.3"),
            ("X-Peer-Address", "10.1.2.4"),
        ];
        let forge_with = |method: &str, path: &str, key: &Key, names: &[(&str, &str)]| {
            let request = Request::new(method, path).bearer(&key.secret);
            names.iter().fold(request, |request, (name, value)| request.header(name, value))
        };
        let forge = |method: &str, path: &str, key: &Key| forge_with(method, path, key, &names);
        // Each alone too: two that contradict each other might be refused for that.
        for names in names.iter().map(std::slice::from_ref).chain([names.as_slice()]) {
            for (method, path) in
                [("GET", "/v1/secrets"), ("DELETE", "/v1/models"), ("GET", "/check/v1/models")]
            {
                let response = stack.send(forge_with(method, path, &narrow, names)).await;
                assert_eq!(reason(&response), (403, "endpoint_not_allowed"), "{method} {path} {names:?}");
            }
        }
        let response = stack.send(forge("GET", "/x", &foreign)).await;
        assert_eq!(reason(&response), (403, "ip_not_allowed"));
        assert_eq!(stack.upstream.requests(), 0);
        // The same forgery does not stand in the way of what is allowed, and does not go upstream either.
        let echo = stack.send(forge("GET", "/v1/models?x=1", &narrow)).await.echo();
        assert_eq!((&*echo.method, &*echo.path), ("GET", "/v1/models?x=1"));
        assert!(echo.values("x-original-url").is_empty(), "{echo:?}");
        stack.send(forge("GET", "/x", &local)).await.echo();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keyward_nothing_passes_and_the_caller_reads_503() {
    for stack in both().await {
        let key = stack.create("ci", &[]);
        stack.send(Request::get("/x").bearer(&key.secret)).await.echo();
        let Stack { keyward, proxy, upstream } = stack;
        assert!(keyward.sigterm_and_wait().await.success());
        let addr = match &proxy {
            Proxy::Envoy(envoy) => envoy.addr(),
            Proxy::Nginx(nginx) => nginx.addr(),
        };
        for request in [Request::get("/x").bearer(&key.secret), Request::get("/x"), Request::get("/public/x")]
        {
            let response = request.send(addr).await;
            assert_eq!(response.status, 503, "{response:?}");
        }
        assert_eq!(upstream.requests(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_decided_is_503() {
    for stack in [
        Stack::envoy(&[("--check-timeout", "1ms")]).await,
        // As one that answers 503 itself: without a store to ask.
        Stack::nginx(&[]).await,
    ] {
        let slow = stack.keyward.create_key("ada", "slow", &[]).secret;
        let undecided = match &stack.proxy {
            Proxy::Envoy(_) => stack.send(Request::get("/x").bearer(&slow)).await,
            Proxy::Nginx(_) => {
                let file = rusqlite::Connection::open(stack.keyward.sqlite_file()).unwrap();
                file.execute("DROP TABLE api_keys", []).unwrap();
                stack.send(Request::get("/x").bearer(&slow)).await
            }
        };
        assert_eq!(undecided.status, 503, "{undecided:?}");
        assert_eq!(stack.upstream.requests(), 0);
        let count = stack.keyward.count("keyward_checks_total", &[("decision", "unavailable")]).await;
        assert!(count >= 1, "Keyward itself said so");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_asks_for_scopes_and_lets_the_anonymous_in_where_its_locations_say_so() {
    let stack = Stack::nginx(&[]).await;
    let admin = stack.create("admin", &["--scopes", "admin"]);
    let echo = stack.send(Request::get("/v1/admin/users").bearer(&admin.secret)).await.echo();
    assert_eq!(echo.values("x-keyward-scopes"), ["admin"]);
    let forged = Request::get("/public/x?anonymous=no").header("x-keyward-key-id", "1");
    let echo = stack.send(forged.header("x-keyward-superuser", "true")).await.echo();
    assert!(!echo.headers.iter().any(|(name, _)| name.starts_with("x-keyward-")), "{echo:?}");
    let bad = stack.send(Request::get("/public/x").bearer("zz_no-such-key")).await;
    assert_eq!(reason(&bad), (401, "invalid_api_key"));
    // A caller's query is not the check URL's.
    let response = stack.send(Request::get("/x?anonymous=allow")).await;
    assert_eq!(reason(&response), (401, "missing_credentials"));
    for inside in ["/keyward", "/keyward-public", "/keyward?anonymous=allow"] {
        assert_ne!(stack.send(Request::get(inside)).await.status, 200, "{inside} is nginx's own");
    }
    let Proxy::Nginx(nginx) = &stack.proxy else { panic!("it is nginx") };
    let log = nginx.access_log();
    assert!(log.contains(r#""reason":"missing_credentials""#), "{log}");
    assert!(
        log.contains(&format!(r#""key_id":"{}""#, admin.id)) && !log.contains("anonymous=allow"),
        "{log}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_refuses_what_it_and_the_upstream_could_read_differently() {
    let stack = Stack::nginx(&[]).await;
    let key = stack.create("ci", &[]);
    for path in
        ["/v1/admin/../x", "/x/./y", "/x//y", "/x/..", "/%2e%2e/x", "/a%2fb", "/a%5Cb", "/a;b", "/a\\b"]
    {
        let response = stack.send(Request::get(path).bearer(&key.secret)).await;
        assert_eq!(response.status, 400, "{path}");
    }
    for path in ["/x.y/.well-known/z..", "/x?y=../z//;%2f"] {
        let response = stack.send(Request::get(path).bearer(&key.secret)).await;
        assert_eq!(response.echo().path, path);
    }
    // Spellings that nginx drops unless it is told to keep them; if it is, Keyward refuses them.
    let spelled = || Request::get("/x").bearer(&key.secret).header("x_keyward_superuser", "true");
    assert!(stack.send(spelled()).await.echo().values("x_keyward_superuser").is_empty());
    let change = [("underscores_in_headers off;", "underscores_in_headers on;")];
    let stack = Stack::nginx(&change).await;
    let key = stack.create("ci", &[]);
    let spelled = Request::get("/x").bearer(&key.secret).header("x_keyward_superuser", "true");
    assert_eq!(reason(&stack.send(spelled).await), (400, "ambiguous_request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_passes_the_body_on_for_keys_with_a_list_of_models() {
    let stack = Stack::envoy(&ENVOYS).await;
    let key = stack.create("models", &["--allowed-models", "gpt-4o*"]);
    let chat =
        async |body: &str| stack.send(Request::post("/v1/chat/completions", body).bearer(&key.secret)).await;
    let body = r#"{"model":"gpt-4o-mini","x":"ü"}"#;
    let echo = chat(body).await.echo();
    assert_eq!(echo.values("x-keyward-model"), ["gpt-4o-mini"]);
    assert_eq!(echo.values("content-length"), [body.len().to_string()]);
    assert_eq!(reason(&chat(r#"{"model":"claude-3"}"#).await), (403, "model_not_allowed"));
    assert_eq!(reason(&chat("").await), (400, "ambiguous_request"));
    // Without a length, and with it what belongs to the connection alone.
    let mut chunked = TcpStream::connect(stack.addr()).await.unwrap();
    let head =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked";
    let chunks = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let bytes = format!("{head}\r\nauthorization: Bearer {}\r\n\r\n{chunks}", key.secret);
    chunked.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    chunked.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    // Cut by Envoy, whose content-length is that of the part.
    let padding = "x".repeat(5 << 20);
    let large = format!(r#"{{"model":"gpt-4o","x":"{padding}"}}"#);
    assert_eq!(reason(&chat(&large).await), (400, "ambiguous_request"));
    let cut = Request::post("/v1/chat/completions", &large).bearer(&key.secret);
    let cut = stack.send(cut.header("x-envoy-auth-partial-body", "false")).await;
    assert_eq!(reason(&cut), (400, "ambiguous_request"));
    let free = stack.create("free", &[]);
    let response = stack.send(Request::post("/v1/chat/completions", &large).bearer(&free.secret)).await;
    assert_eq!(response.echo().body.len(), large.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_logs_whose_key_it_was_and_takes_out_every_spelling() {
    let stack = Stack::envoy(&ENVOYS).await;
    let key = stack.create("narrow", &["--allowed-endpoints", "/v1/**"]);
    // They replace the path in some frameworks; this key's path had a say.
    let request = Request::get("/v1/logged").bearer(&key.secret).header("x-rewrite-url", "/admin");
    let echo = stack.send(request.header("x-keyward-more", "1")).await.echo();
    assert!(echo.values("x-rewrite-url").is_empty() && echo.values("x-keyward-more").is_empty(), "{echo:?}");
    let Proxy::Envoy(envoy) = &stack.proxy else { panic!("it is Envoy") };
    let line = envoy.access_log_of("/v1/logged").await;
    assert_eq!(line["key_id"], key.id.to_string(), "{line}");
    let head = Request::new("HEAD", "/v1/head").bearer("zz_no-such-key").try_send(envoy.addr());
    // An answer to HEAD announces a body that never comes: the log has what matters.
    let mut log = std::pin::pin!(envoy.access_log_of("/v1/head"));
    let line = tokio::select! { line = &mut log => line, _ = head => log.await };
    assert_eq!(line["status"], 401);
}

/// A name that is missing in one of them would be the caller's to set.
#[test]
fn no_example_forgets_a_header() {
    let read =
        |file: &str| std::fs::read_to_string(format!("{}/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let (nginx, caddy, traefik) =
        (read("examples/nginx.conf"), read("examples/Caddyfile"), read("examples/traefik.yaml"));
    let copied = caddy.lines().find(|line| line.trim_start().starts_with("copy_headers ")).unwrap();
    let copied: Vec<String> = copied.split_whitespace().map(str::to_ascii_lowercase).collect();
    for name in IdentityHeader::ALL.iter().map(|header| header.name()).chain(["overflow"]) {
        let variable = name.replace('-', "_");
        for line in [
            format!("auth_request_set $keyward_{variable} $upstream_http_x_keyward_{variable};"),
            format!("proxy_set_header x-keyward-{name} $keyward_{variable};"),
        ] {
            assert_eq!(nginx.matches(&line).count(), 1, "examples/nginx.conf: {line}");
        }
        assert!(copied.contains(&format!("x-keyward-{name}")), "examples/Caddyfile: {name}");
    }
    for carrier in keyward::server::credentials::KNOWN_CARRIERS {
        let lower = |text: &str| text.to_ascii_lowercase();
        assert!(lower(&nginx).contains(&format!("proxy_set_header {carrier} \"\";")), "nginx: {carrier}");
        assert!(lower(&caddy).contains(&format!("request_header -{carrier}\n")), "Caddy: {carrier}");
        assert!(lower(&traefik).contains(&format!(" {carrier}: \"\"\n")), "Traefik: {carrier}");
    }
    assert!(!traefik.contains("trustForwardHeader: true"));
}
