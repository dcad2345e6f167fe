//! HTTP forward-auth by itself: which words of a question are the proxy's, and what the answer always holds. The questions
//! are those that nginx, Traefik, Caddy and Envoy send; `forward_auth_proxies` has the real ones.

use std::net::SocketAddr;

use keyward::server::options::IdentityHeader;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use crate::support::http::{Request, Response};
use crate::support::keyward::{Key, Keyward};
use crate::support::port::free_addr;

/// A sidecar with an HTTP port, and a key that may `GET /v1/models` from anywhere.
struct Door {
    keyward: Keyward,
    http: SocketAddr,
    key: Key,
}

impl Door {
    async fn open(profile: &str, more: &[(&str, &str)]) -> Self {
        let http = free_addr();
        let builder = Keyward::new().arg("--http-listen", &http.to_string()).arg("--http-profile", profile);
        let keyward =
            more.iter().fold(builder, |builder, (flag, value)| builder.arg(flag, value)).start().await;
        keyward.create_user("ada", &[]);
        let options = ["--hash", "sha256", "--allowed-endpoints", "GET /v1/models"];
        let key = keyward.create_key("ada", "ci", &options);
        Self { keyward, http, key }
    }

    fn create(&self, name: &str, options: &[&str]) -> String {
        self.keyward.create_key("ada", name, &[&["--hash", "sha256"], options].concat()).secret
    }

    async fn send(&self, request: Request) -> Response {
        request.send(self.http).await
    }
}

/// What each proxy sends about an original request, less its headers.
fn question(profile: &str, method: &str, target: &str) -> Request {
    let (own_method, own_target) = match profile {
        "envoy" => return Request::new(method, &format!("/check{target}")),
        "nginx" => ("x-original-method", "x-original-uri"),
        _ => ("x-forwarded-method", "x-forwarded-uri"),
    };
    // Caddy keeps the query of the original.
    let query = target.split_once('?').filter(|_| profile == "caddy").map(|(_, query)| format!("?{query}"));
    let url = format!("/check{}", query.unwrap_or_default());
    let request = Request::get(&url).header(own_method, method).header(own_target, target);
    if profile == "nginx" { request } else { request.header("x-forwarded-host", "api.example.com") }
}

const PROFILES: [&str; 4] = ["envoy", "nginx", "traefik", "caddy"];

fn reason(response: &Response) -> (u16, &str) {
    (response.status, response.reason())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allow_is_200_and_carries_every_owned_header_so_that_all_are_overwritten() {
    for profile in PROFILES {
        let door = Door::open(profile, &[]).await;
        let forged = question(profile, "GET", "/v1/models?limit=1").bearer(&door.key.secret);
        let forged = forged.header("x-keyward-role", "admin").header("x-keyward-superuser", "true");
        let response = door.send(forged.header("x-keyward-key-name", "boss")).await;
        assert_eq!(response.status, 200, "{profile}: {response:?}");
        for header in IdentityHeader::ALL {
            let name = format!("x-keyward-{}", header.name());
            assert_eq!(response.values(&name).len(), 1, "{profile}: {name}");
        }
        let value = |name: &str| response.value(&format!("x-keyward-{name}")).unwrap().to_owned();
        assert_eq!(value("key-id"), door.key.id.to_string());
        assert_eq!(value("superuser"), "false");
        assert_eq!(value("allowed-endpoints"), "GET%20/v1/models");
        for empty in ["key-name", "username", "user-email", "rate-limit-day", "overflow", "reason"] {
            assert_eq!(value(empty), "", "{profile}: {empty}");
        }
        let removed = response.value("x-envoy-auth-headers-to-remove");
        assert_eq!(removed.is_some(), profile == "envoy");
        let removed: Vec<&str> = removed.unwrap_or_default().split(',').collect();
        if profile == "envoy" {
            for name in ["authorization", "x-api-key", "x_api_key", "x-keyward-key-name", "x_keyward_role"] {
                assert!(removed.contains(&name), "{name} {removed:?}");
            }
        }
        let checks = door.keyward.count("keyward_checks_total", &[("decision", "allow")]).await;
        assert_eq!(checks, 1, "{profile}: counted like a check over gRPC");
    }
}

/// The heart of it: what the caller sends under another profile's names, or besides the proxy's own, changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_can_not_say_which_request_theirs_is() {
    for profile in PROFILES {
        let door = Door::open(profile, &[]).await;
        let foreign: Vec<(&str, &str)> = [
            ("x-original-method", "GET"),
            ("x-original-uri", "/v1/models"),
            ("x-original-url", "http://api.example.com/v1/models"),
            ("x-forwarded-method", "GET"),
            ("x-forwarded-uri", "/v1/models"),
        ]
        .into_iter()
        .filter(|(name, _)| match profile {
            "envoy" => true,
            "nginx" => name.starts_with("x-forwarded"),
            _ => name.starts_with("x-original"),
        })
        .collect();
        // Each alone too: two that contradict each other might be refused for that.
        let alone = foreign.iter().map(std::slice::from_ref);
        for names in alone.chain([foreign.as_slice()]) {
            let forge = |request: Request| {
                let request =
                    names.iter().fold(request, |request, (name, value)| request.header(name, value));
                request.bearer(&door.key.secret)
            };
            for (method, target) in
                [("GET", "/v1/admin"), ("DELETE", "/v1/models"), ("GET", "/v1/admin?/v1/models")]
            {
                let response = door.send(forge(question(profile, method, target))).await;
                let context = format!("{profile} {method} {target} {names:?}");
                assert_eq!(reason(&response), (403, "endpoint_not_allowed"), "{context}");
            }
            // Nobody named the original request; the caller's word is none.
            let unnamed = if profile == "envoy" { "/check" } else { "/check?x=/v1/models" };
            let unnamed = door.send(forge(Request::get(unnamed))).await;
            assert!([400, 403, 404].contains(&unnamed.status), "{profile} {names:?}: {unnamed:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_names_no_request_or_two_is_refused() {
    for (profile, method, uri) in
        [("nginx", "x-original-method", "x-original-uri"), ("caddy", "x-forwarded-method", "x-forwarded-uri")]
    {
        let door = Door::open(profile, &[]).await;
        let ask = || Request::get("/check").bearer(&door.key.secret);
        // nginx makes 500 of 400.
        let refused = (if profile == "nginx" { 403 } else { 400 }, "ambiguous_request");
        for (what, request) in [
            ("nothing", ask()),
            ("no method", ask().header(uri, "/v1/models")),
            ("no path", ask().header(method, "GET")),
            ("two methods", ask().header(method, "GET").header(method, "GET").header(uri, "/v1/models")),
            ("two paths", ask().header(method, "GET").header(uri, "/v1/models").header(uri, "/v1/admin")),
            ("empty path", ask().header(method, "GET").header(uri, "")),
            ("no path at all", ask().header(method, "GET").header(uri, "v1/models")),
            ("a blank", ask().header(method, "GET").header(uri, "/v1/models x")),
            ("foreign bytes", ask().header(method, "GET").header(uri, b"/v1/models\xff")),
        ] {
            assert_eq!(reason(&door.send(request).await), refused, "{profile}: {what}");
        }
        assert!(
            door.keyward.log().contains("names no original request"),
            "{profile}: {}",
            door.keyward.log()
        );
        let asked = || ask().header(method, "GET").header(uri, "/v1/models");
        assert_eq!(door.send(asked()).await.status, 200);
        if profile == "nginx" {
            let both = asked().header("x-original-url", "http://api.example.com/v1/admin");
            assert_eq!(reason(&door.send(both).await), refused);
        }
        for (verb, target) in
            [("PUT", "/check"), ("GET", "/check/"), ("GET", "/"), ("GET", "/check/v1/models")]
        {
            let request = Request::new(verb, target).header(method, "GET").header(uri, "/v1/models");
            assert_eq!(door.send(request.bearer(&door.key.secret)).await.status, 404, "{verb} {target}");
        }
        let posted = Request::new("POST", "/check").header(method, "GET").header(uri, "/v1/models");
        assert_eq!(door.send(posted.bearer(&door.key.secret)).await.status, 200);
    }
}

/// A proxy that can't be told to take a header out would pass it on.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_proxy_can_not_take_out_is_refused() {
    for profile in PROFILES {
        let door = Door::open(profile, &[("--credential-sources", "bearer,x-api-key,query:key")]).await;
        let ask = || question(profile, "GET", "/v1/models").bearer(&door.key.secret);
        for name in ["x_keyward_superuser", "x-keyward_role", "x-keyward-more", "x_api_key", "x-rewrite-url"]
        {
            let response = door.send(ask().header(name, "true")).await;
            let expected = match profile {
                "envoy" => (200, ""),
                "nginx" => (403, "ambiguous_request"),
                _ => (400, "ambiguous_request"),
            };
            assert_eq!(reason(&response), expected, "{profile}: {name}");
            let removed = response.value("x-envoy-auth-headers-to-remove").unwrap_or_default();
            assert_eq!(removed.split(',').any(|own| own == name), profile == "envoy", "{profile}: {name}");
        }
        let by_query = question(profile, "GET", &format!("/v1/models?key={}", door.key.secret));
        let response = door.send(by_query).await;
        assert_eq!(reason(&response), (401, "malformed_credentials"), "{profile}: a key in the query");
        let denied = door.keyward.count("keyward_checks_total", &[("decision", "deny")]).await;
        assert_eq!(denied, if profile == "envoy" { 1 } else { 6 }, "{profile}: a vetoed allow is no allow");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_of_the_check_url_are_read_where_a_caller_can_not_write_them() {
    for profile in ["nginx", "traefik", "caddy"] {
        let door = Door::open(profile, &[]).await;
        let key = door.create("scoped", &["--scopes", "chat"]);
        let (method, uri) = match profile {
            "nginx" => ("x-original-method", "x-original-uri"),
            _ => ("x-forwarded-method", "x-forwarded-uri"),
        };
        let ask = |url: &str| Request::get(url).header(method, "GET").header(uri, "/x");
        let anonymous = door.send(ask("/check?anonymous=allow")).await;
        let admin = door.send(ask("/check?required_scopes=admin").bearer(&key)).await;
        let misspelt = door.send(ask("/check?required_scope=admin").bearer(&key)).await;
        if profile == "caddy" {
            assert_eq!(
                (anonymous.status, admin.status, misspelt.status),
                (401, 200, 200),
                "the caller's query"
            );
            continue;
        }
        assert_eq!(anonymous.status, 200);
        assert_eq!(anonymous.value("x-keyward-key-id"), Some(""), "nobody is nobody");
        let bad = door.send(ask("/check?anonymous=allow").bearer("zz_no-such-key")).await;
        assert_eq!(reason(&bad), (401, "invalid_api_key"));
        assert_eq!(reason(&admin), (403, "scope_missing"));
        assert_eq!(door.send(ask("/check?required_scopes=chat").bearer(&key)).await.status, 200);
        assert!(matches!(misspelt.status, 400 | 403), "{misspelt:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_body_counts_where_the_proxy_sends_it_whole() {
    let post = |profile: &str, body: &str| {
        let (target, named) = if profile == "envoy" {
            ("/check/v1/chat/completions", vec![])
        } else {
            let named = [("x-forwarded-method", "POST"), ("x-forwarded-uri", "/v1/chat/completions")];
            ("/check", named.to_vec())
        };
        let request = Request::post(target, body);
        named.iter().fold(request, |request, (name, value)| request.header(name, value))
    };
    let body = r#"{"model":"gpt-4o"}"#;
    for profile in ["envoy", "traefik", "caddy"] {
        let door = Door::open(profile, &[("--max-check-bytes", "64KiB")]).await;
        let key = door.create("models", &["--allowed-models", "gpt-*"]);
        let partial = |request: Request, value: &str| request.header("x-envoy-auth-partial-body", value);
        let ask = |body: &str| post(profile, body).bearer(&key);
        let ambiguous = (400, "ambiguous_request");
        match profile {
            "envoy" => {
                assert_eq!(door.send(partial(ask(body), "false")).await.status, 200);
                let other = partial(ask(r#"{"model":"claude"}"#), "false");
                assert_eq!(reason(&door.send(other).await), (403, "model_not_allowed"));
                // Its length is that of what was sent along, so that it proves nothing.
                assert_eq!(reason(&door.send(ask(body)).await), ambiguous);
                assert_eq!(reason(&door.send(partial(ask(body), "true")).await), ambiguous);
                let both = partial(partial(ask(body), "true"), "false");
                assert_eq!(reason(&door.send(both).await), ambiguous);
            }
            "traefik" => {
                assert_eq!(door.send(ask(body)).await.status, 200);
                let other = ask(r#"{"model":"claude"}"#);
                assert_eq!(reason(&door.send(other).await), (403, "model_not_allowed"));
            }
            _ => assert_eq!(reason(&door.send(ask(body)).await), ambiguous, "Caddy sends none"),
        }
        if profile != "caddy" {
            let large = format!(r#"{{"model":"gpt-4o","x":"{}"}}"#, "x".repeat(100 << 10));
            assert_eq!(reason(&door.send(partial(ask(&large), "false")).await), ambiguous);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_is_whom_the_proxy_names() {
    for profile in PROFILES {
        let door = Door::open(profile, &[]).await;
        let key = door.create("local", &["--allowed-ips", "192.0.2.0/24"]);
        let ask = |forwarded_for: &str| {
            let request = question(profile, "GET", "/x").bearer(&key);
            request.header("x-forwarded-for", forwarded_for)
        };
        // Envoy leaves the caller's own there unless it is told otherwise, so that it has to be asked for (xff:1).
        let expected = if profile == "envoy" { 403 } else { 200 };
        assert_eq!(door.send(ask("192.0.2.7")).await.status, expected, "{profile}");
        assert_eq!(door.send(ask("198.51.100.1, 192.0.2.7")).await.status, expected, "{profile}");
        assert_eq!(reason(&door.send(ask("192.0.2.7, 198.51.100.1")).await), (403, "ip_not_allowed"));
        let unknown = question(profile, "GET", "/x").bearer(&key);
        assert_eq!(reason(&door.send(unknown).await), (403, "ip_not_allowed"), "{profile}");
    }
    let door = Door::open("envoy", &[("--client-ip", "xff:1")]).await;
    let key = door.create("local", &["--allowed-ips", "192.0.2.0/24"]);
    let ask = question("envoy", "GET", "/x").bearer(&key).header("x-forwarded-for", "10.0.0.1, 192.0.2.7");
    assert_eq!(door.send(ask).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_can_not_be_decided_is_503_in_every_profile() {
    for profile in PROFILES {
        // bcrypt takes longer.
        let door = Door::open(profile, &[("--check-timeout", "1ms")]).await;
        let slow = door.keyward.create_key("ada", "slow", &[]).secret;
        let response = door.send(question(profile, "GET", "/x").bearer(&slow)).await;
        assert_eq!(reason(&response), (503, "unavailable"), "{profile}");
        assert_eq!(response.value("retry-after"), Some("1"));
        assert_eq!(door.keyward.count("keyward_checks_total", &[("decision", "unavailable")]).await, 1);
    }
    let door = Door::open("envoy", &[("--check-timeout", "1ms"), ("--on-unavailable", "error")]).await;
    let slow = door.keyward.create_key("ada", "slow", &[]).secret;
    assert_eq!(door.send(question("envoy", "GET", "/x").bearer(&slow)).await.status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let door = Door::open("envoy", &[("--check-timeout", "100ms")]).await;
    let mut stalled = TcpStream::connect(door.http).await.unwrap();
    let head = "POST /check/x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n12";
    stalled.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stalled.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    // nginx and Caddy send none and may leave its length in the head.
    let door = Door::open("nginx", &[]).await;
    let key = door.create("any", &[]);
    let announced = question("nginx", "POST", "/x").bearer(&key).header("content-length", "5");
    assert_eq!(door.send(announced).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_does_as_well_and_readiness_is_told_here_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("http.sock");
    let keyward = Keyward::new()
        .arg("--http-listen", &format!("unix:{}", path.display()))
        .arg("--http-profile", "traefik")
        .arg("--drain-delay", "30s")
        .start()
        .await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    let connect = async || UnixStream::connect(&path).await.unwrap();
    let allowed = question("traefik", "GET", "/x").bearer(&key.secret).send_over(connect().await).await;
    assert_eq!(allowed.status, 200);
    assert_eq!(Request::get("/readyz").send_over(connect().await).await.status, 200);
    keyward.terminate();
    // Draining: not ready, and still answering.
    let not_ready = crate::support::eventually(async || {
        (Request::get("/readyz").send_over(connect().await).await.status == 503).then_some(())
    });
    not_ready.await.expect("not ready while it drains");
    let allowed = question("traefik", "GET", "/x").bearer(&key.secret).send_over(connect().await).await;
    assert_eq!(allowed.status, 200);
}
