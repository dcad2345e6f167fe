//! Where Keyward listens: several sockets, unix and abstract ones, one port for two processes, connections that age.

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::task::JoinSet;

use crate::support::envoy::{self, Envoy};
use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Key, Keyward};
use crate::support::upstream::Upstream;

/// Connects Envoy to a unix socket instead.
fn by_pipe(envoy: envoy::Builder, keyward: &Keyward, name: &str) -> envoy::Builder {
    let port = keyward.grpc_addr().port();
    envoy.replace(
        &format!("socket_address: {{address: 127.0.0.1, port_value: {port}}} # @keyward"),
        &format!("pipe: {{path: \"{name}\"}}"),
    )
}

/// What Envoy forgives by default would hide what this file is about.
fn unforgiving(envoy: envoy::Builder) -> envoy::Builder {
    envoy.replace("num_retries: 3", "num_retries: 0")
}

fn with_key(keyward: &Keyward) -> Key {
    keyward.create_user("ada", &[]);
    keyward.create_key("ada", "ci", &["--hash", "sha256"])
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_unix_and_abstract_sockets_answer_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("grpc.sock");
    // Left behind by a process that was killed.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let name = format!("keyward-test-{}", std::process::id());
    let keyward = Keyward::new()
        .also_listen(&format!("unix:{}", path.display()))
        .also_listen(&format!("unix:@{name}"))
        .start()
        .await;
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o660);
    let key = with_key(&keyward);
    let upstream = Upstream::start().await;
    for pipe in [None, Some(path.display().to_string()), Some(format!("@{name}"))] {
        let envoy = Envoy::new(keyward.grpc_addr(), upstream.addr());
        let envoy = match &pipe {
            Some(pipe) => by_pipe(envoy, &keyward, pipe),
            None => envoy,
        };
        let envoy = envoy.start().await;
        let ask = async |key: &str| Request::get("/v1/models").bearer(key).send(envoy.addr()).await.status;
        assert_eq!(ask(&key.secret).await, 200, "{pipe:?}");
        assert_eq!(ask(&key.wrong()).await, 401, "{pipe:?}");
    }
    assert!(keyward.sigterm_and_wait().await.success());
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_comma_list_is_several_listeners_too() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let list = paths.clone().map(|path| format!("unix:{}", path.display())).join(",");
    let keyward = Keyward::new().also_listen(&list).start().await;
    for path in paths {
        tokio::net::UnixStream::connect(path).await.unwrap();
    }
    Authorizer::connect(keyward.grpc_addr()).await;
}

/// Callers that ask without a pause until they are told to stop.
struct Load {
    callers: JoinSet<()>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    failures: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Load {
    fn start(envoy: &Envoy, key: &Key) -> Self {
        let mut load = Self {
            callers: JoinSet::new(),
            stop: Arc::default(),
            answered: Arc::default(),
            failures: Arc::default(),
        };
        for _ in 0..4 {
            let request = Request::get("/v1/models").bearer(&key.secret);
            let (stop, answered, failures, addr) = (
                Arc::clone(&load.stop),
                Arc::clone(&load.answered),
                Arc::clone(&load.failures),
                envoy.addr(),
            );
            load.callers.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let response = request.clone().send(addr).await;
                    if response.status == 200 {
                        answered.fetch_add(1, Ordering::SeqCst);
                    } else {
                        failures.lock().unwrap().push(format!("{} {}", response.status, response.text()));
                    }
                }
            });
        }
        load
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::SeqCst)
    }

    /// Waits for this many answers more.
    async fn goes_on(&self, more: usize) {
        let enough = self.answered() + more;
        eventually(async || (self.answered() >= enough).then_some(())).await.expect("answers should come");
    }

    /// Every request must have been answered with 200.
    async fn end(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(ended) = self.callers.join_next().await {
            ended.unwrap();
        }
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{} of {}: {failures:?}", failures.len(), self.answered());
    }
}

/// Without retries, so that nothing is forgiven.
#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_connections_come_of_age() {
    let keyward = Keyward::new().arg("--max-connection-age", "1s").start().await;
    let key = with_key(&keyward);
    let upstream = Upstream::start().await;
    let envoy = unforgiving(Envoy::new(keyward.grpc_addr(), upstream.addr())).start().await;
    let load = Load::start(&envoy, &key);
    let notices = async || (envoy.stat("cluster.keyward.upstream_cx_close_notify").await >= 4).then_some(());
    eventually(notices).await.expect("connections should be told to go");
    load.goes_on(20).await;
    load.end().await;
    assert!(envoy.stat("cluster.keyward.upstream_cx_total").await >= 4);
}

/// tonic's own grace would have cut it off.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_is_longer_than_the_connections_age_is_answered() {
    let keyward = Keyward::new()
        .arg("--max-connection-age", "1s")
        .arg("--check-timeout", "30s")
        .arg("--verify-threads", "1")
        .start()
        .await;
    let user = keyward.create_user("ada", &[]);
    let file = rusqlite::Connection::open(keyward.sqlite_file()).unwrap();
    // About a second each, and all have to be tried.
    for last in ["a", "e", "i", "m"] {
        let hash = format!("$2b$14$012345678901234567890u{}{last}", "u".repeat(30));
        file.execute(
            "INSERT INTO api_keys (key_hash, key_prefix, user_id, is_active) VALUES (?1, 'kw_slows', ?2, 1)",
            (hash, user),
        )
        .unwrap();
    }
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let started = tokio::time::Instant::now();
    let check = Check::new("GET", "/v1/models").bearer("kw_slowslow-secret").build(Encoding::Raw);
    assert_eq!(authorizer.check(check).await.http_status(), 401);
    assert_eq!(keyward.bcrypt_runs().await, 4);
    assert!(started.elapsed().as_millis() > 1100, "bcrypt was too fast for this test");
}

/// A successor that starts before its predecessor ends: nobody notices.
#[tokio::test(flavor = "multi_thread")]
async fn a_port_is_handed_over_without_a_failed_request() {
    let old = Keyward::new().arg("--reuse-port", "on").start().await;
    let key = with_key(&old);
    let addr = old.grpc_addr();
    let folder = tempfile::tempdir().unwrap();
    // The old one's folder goes with it.
    let file = folder.path().join("keyward.db");
    rusqlite::Connection::open(old.sqlite_file())
        .unwrap()
        .execute("VACUUM INTO ?1", [file.display().to_string()])
        .unwrap();
    let upstream = Upstream::start().await;
    let envoy = unforgiving(Envoy::new(addr, upstream.addr())).start().await;
    let load = Load::start(&envoy, &key);
    load.goes_on(20).await;

    let new = Keyward::new()
        .store(&format!("sqlite:{}", file.display()))
        .also_listen(&addr.to_string())
        .arg("--reuse-port", "on")
        .start()
        .await;
    load.goes_on(20).await;
    assert!(old.sigterm_and_wait().await.success());
    load.goes_on(20).await;
    load.end().await;
    assert!(new.count("keyward_checks_total", &[("decision", "allow")]).await >= 20);
}
