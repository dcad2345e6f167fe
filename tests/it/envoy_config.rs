//! The shipped Envoy configuration by itself: what it does where Keyward does not answer, and what it never asks about.

use std::path::{Path, PathBuf};

use crate::support::envoy::{self, Envoy};
use crate::support::http::Request;
use crate::support::keyward::Keyward;
use crate::support::port::free_addr;
use crate::support::upstream::Upstream;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The lines of a file that are more than a comment.
fn settings(file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(file)).unwrap();
    let is_setting = |line: &&str| !line.trim_start().starts_with('#') && !line.trim().is_empty();
    text.lines().filter(is_setting).map(str::to_owned).collect()
}

#[test]
fn envoy_takes_every_file_that_we_ship_and_finds_nothing_to_warn_of() {
    let mut files = Vec::new();
    for folder in ["envoy", "k8s/overlays/sidecar"] {
        let found = std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
        let is_envoys = |path: &PathBuf| {
            path.extension().is_some_and(|extension| extension == "yaml")
                && std::fs::read_to_string(path).unwrap().contains("\nstatic_resources:")
        };
        files.extend(found.filter(is_envoys));
    }
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        let output = envoy::validate(&file);
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && warnings.is_empty(), "{}: {warnings}", file.display());
    }
}

/// `envoy/envoy.yaml` line by line and in its order, with three blocks between.
#[test]
fn the_configuration_with_rate_limits_is_the_shipped_one_with_additions() {
    let mut shipped = settings("envoy/envoy.yaml").into_iter().peekable();
    let mut added: Vec<Vec<String>> = Vec::new();
    let mut is_adding = false;
    for line in settings("envoy/rate-limit.yaml") {
        if shipped.next_if_eq(&line).is_some() {
            is_adding = false;
            continue;
        }
        if !is_adding {
            added.push(Vec::new());
            is_adding = true;
        }
        added.last_mut().unwrap().push(line.trim().to_owned());
    }
    assert_eq!(shipped.next(), None, "envoy/rate-limit.yaml lacks this line");
    let beginnings: Vec<&str> = added.iter().map(|block| &*block[0]).collect();
    assert_eq!(beginnings, ["- name: envoy.filters.http.ratelimit", "rate_limits:", "- name: rate-limit"]);
}

/// The pod's configuration is the one that all tests here run, but for where it listens and finds Keyward.
#[test]
fn the_pods_configuration_is_the_shipped_one_with_other_addresses() {
    let (shipped, pod) = (settings("envoy/envoy.yaml"), settings("k8s/overlays/sidecar/envoy.yaml"));
    let own = |own: &[String], other: &[String]| -> Vec<String> {
        let lines = own.iter().filter(|line| !other.contains(line));
        lines.map(|line| line.trim().to_owned()).collect()
    };
    assert_eq!(
        own(&pod, &shipped),
        [
            "socket_address: {address: 0.0.0.0, port_value: 10000} # @listener",
            "pipe: {path: /run/keyward/grpc.sock} # @keyward",
        ]
    );
    assert_eq!(
        own(&shipped, &pod),
        [
            "socket_address: {address: 127.0.0.1, port_value: 10000} # @listener",
            "socket_address: {address: 127.0.0.1, port_value: 9191} # @keyward",
        ]
    );
}

/// The same file without what belongs to bodies.
#[test]
fn the_configuration_without_bodies_is_the_shipped_one_with_lines_missing() {
    let mut own = settings("envoy/no-body.yaml").into_iter().peekable();
    let is_missing = |line: &String| own.next_if_eq(line).is_none();
    let missing: Vec<String> = settings("envoy/envoy.yaml")
        .into_iter()
        .filter(is_missing)
        .map(|line| line.trim().to_owned())
        .collect();
    assert_eq!(own.next(), None, "envoy/envoy.yaml lacks this line");
    let beginnings: Vec<&str> =
        missing.iter().filter_map(|line| line.split_once(':')).map(|(name, _)| name).collect();
    assert_eq!(
        beginnings,
        [
            "per_connection_buffer_limit_bytes",
            "with_request_body",
            "- match",
            "route",
            "typed_per_filter_config",
            "envoy.filters.http.ext_authz",
            "\"@type\"",
            "check_settings",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_bodies_a_key_without_a_list_works_and_one_with_a_list_is_refused() {
    let keyward = Keyward::new().start().await;
    let upstream = Upstream::start().await;
    let envoy = Envoy::of_file("envoy/no-body.yaml", keyward.grpc_addr(), upstream.addr()).start().await;
    keyward.create_user("ada", &[]);
    let free = keyward.create_key("ada", "free", &["--hash", "sha256"]);
    let listed = keyward.create_key("ada", "listed", &["--hash", "sha256", "--allowed-models", "gpt-4o"]);
    let body = format!(r#"{{"model":"gpt-4o","x":"{}"}}"#, "x".repeat(2 << 20));
    let send =
        async |path: &str, secret: &str| Request::post(path, &body).bearer(secret).send(envoy.addr()).await;
    let response = send("/v1/chat/completions", &free.secret).await;
    assert_eq!((response.status, response.echo().body.len()), (200, body.len()));
    let response = send("/v1/chat/completions", &listed.secret).await;
    assert_eq!((response.status, response.reason()), (400, "ambiguous_request"));
    // The path names the model, so that the body is not needed.
    assert_eq!(send("/model/gpt-4o/invoke", &listed.secret).await.status, 200);
    assert_eq!(send("/model/claude-3/invoke", &listed.secret).await.status, 403);
}

/// The very file of the pod, and the socket that it names.
#[tokio::test(flavor = "multi_thread")]
async fn the_pods_envoy_reaches_keyward_by_its_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("grpc.sock");
    let keyward = Keyward::new().arg("--grpc-listen", &format!("unix:{}", socket.display())).start().await;
    let upstream = Upstream::start().await;
    let envoy = Envoy::of_pod(&socket, upstream.addr()).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    let get = async |secret: &str| Request::get("/v1/models").bearer(secret).send(envoy.addr()).await;
    assert_eq!(get(&key.secret).await.status, 200);
    assert_eq!(get(&key.wrong()).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_answer_nothing_passes_and_the_caller_reads_503() {
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(free_addr(), upstream.addr()).start().await;
    for request in
        [Request::get("/v1/models"), Request::post("/v1/chat/completions", "{}").bearer("kw_012345678")]
    {
        let response = request.send(envoy.addr()).await;
        assert_eq!(response.status, 503, "{response:?}");
    }
    assert_eq!(upstream.requests(), 0);
    assert_eq!(envoy.stat("http.api.ext_authz.error").await, 2);
}

/// Why `failure_mode_allow: false` is spelled out.
#[tokio::test(flavor = "multi_thread")]
async fn fail_open_would_forward_the_credential_and_what_the_caller_made_up() {
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(free_addr(), upstream.addr())
        .replace("failure_mode_allow: false", "failure_mode_allow: true")
        .start()
        .await;
    let request = Request::post("/v1/chat/completions?x=1", r#"{"model":"m"}"#);
    let echo =
        request.bearer("kw_012345678").header("x-keyward-superuser", "true").send(envoy.addr()).await.echo();
    assert_eq!(echo.values("authorization"), ["Bearer kw_012345678"]);
    assert_eq!(echo.values("x-keyward-superuser"), ["true"]);
    assert_eq!((&*echo.method, &*echo.path), ("POST", "/v1/chat/completions?x=1"));
    assert_eq!(echo.body, r#"{"model":"m"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_readers_could_read_differently_is_refused_before_it_is_authorized() {
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(free_addr(), upstream.addr()).start().await;
    for path in ["/v1%2fmodels", "/v1%5Cmodels", "/v1/%00"] {
        assert_eq!(Request::get(path).send(envoy.addr()).await.status, 400, "{path}");
    }
    let underscore = Request::get("/v1/models").header("x_keyward_user_id", "1");
    assert_eq!(underscore.send(envoy.addr()).await.status, 400);
    assert_eq!(envoy.stat("http.api.ext_authz.error").await, 0);
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_preflight_needs_no_key_and_a_denial_can_be_read_by_the_page() {
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(free_addr(), upstream.addr()).start().await;
    let origin = "https://app.example.com";
    let preflight = Request::new("OPTIONS", "/v1/chat/completions")
        .header("origin", origin)
        .header("access-control-request-method", "POST");
    let response = preflight.send(envoy.addr()).await;
    assert_eq!(response.status, 200);
    assert_eq!(response.value("access-control-allow-origin"), Some(origin));
    let denied = Request::get("/v1/models").header("origin", origin).send(envoy.addr()).await;
    assert_eq!(denied.value("access-control-allow-origin"), Some(origin));
    assert_eq!(upstream.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_has_no_query() {
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(free_addr(), upstream.addr()).start().await;
    Request::get("/v1/models?key=kw_topsecret").send(envoy.addr()).await;
    let line = envoy.access_log_of("/v1/models").await;
    assert_eq!(line["status"], 503);
    assert_eq!(line["details"], "ext_authz_error");
    assert!(!envoy.access_log().contains("topsecret"));
}
