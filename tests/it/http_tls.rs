//! TLS on the HTTP port: the real Envoy and the real nginx ask there, with certificates of their own.

use std::net::SocketAddr;
use std::path::Path;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::program::run;
use crate::sockets_tls::{Pki, shown};
use crate::support::certificates::{Authority, Files};
use crate::support::envoy::Envoy;
use crate::support::eventually;
use crate::support::http::Request;
use crate::support::keyward::{self, Key, Keyward};
use crate::support::nginx::Nginx;
use crate::support::port::free_addr;
use crate::support::upstream::Upstream;

const PROXY: &str = "spiffe://example.com/ns/edge/sa/proxy";

struct Door {
    keyward: Keyward,
    http: SocketAddr,
    key: Key,
}

impl Door {
    async fn open(
        pki: &Pki,
        profile: &str,
        change: impl FnOnce(keyward::Builder) -> keyward::Builder,
    ) -> Self {
        let http = free_addr();
        let builder = Keyward::new()
            .arg("--http-listen", &http.to_string())
            .arg("--http-profile", profile)
            .arg("--http-tls-cert", &shown(&pki.server.certificate))
            .arg("--http-tls-key", &shown(&pki.server.key));
        let keyward = change(builder).start().await;
        keyward.create_user("ada", &[]);
        let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
        Self { keyward, http, key }
    }

    async fn refused_handshakes(&self) -> u64 {
        self.keyward.count("keyward_tls_handshakes_failed_total", &[("door", "http")]).await
    }
}

/// The block of docs/tls.md for Envoy, with these files.
fn transport_socket(ca: &Path, client: &Files) -> String {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/tls.md")).unwrap();
    let block = page.split("```yaml\n").find(|block| block.starts_with("      transport_socket:")).unwrap();
    let block = block.split("```").next().unwrap();
    [
        ("/etc/envoy/tls/ca.crt", ca),
        ("/etc/envoy/tls/tls.crt", &client.certificate),
        ("/etc/envoy/tls/tls.key", &client.key),
    ]
    .into_iter()
    .fold(block.to_owned(), |block, (shipped, ours)| block.replace(shipped, &shown(ours)))
}

async fn through_envoy(door: &Door, ca: &Path, client: &Files) -> u16 {
    let upstream = Upstream::start().await;
    let socket = transport_socket(ca, client);
    let envoy = Envoy::of_file("envoy/http-service.yaml", door.http, upstream.addr())
        .replace("      connect_timeout: 0.25s\n", &format!("      connect_timeout: 5s\n{socket}"))
        .start()
        .await;
    let status = Request::get("/v1/models").bearer(&door.key.secret).send(envoy.addr()).await.status;
    assert_eq!(upstream.requests() == 1, status == 200);
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_asks_over_tls_and_only_with_a_certificate_on_the_list() {
    let pki = Pki::new();
    let door = Door::open(&pki, "envoy", |builder| {
        builder.arg("--http-tls-client-ca", &shown(&pki.ca)).arg("--http-tls-client-sans", PROXY)
    })
    .await;
    assert_eq!(through_envoy(&door, &pki.ca, &pki.client(&[PROXY])).await, 200);
    assert_eq!(door.refused_handshakes().await, 0);
    assert_eq!(through_envoy(&door, &pki.ca, &pki.client(&["other.example.com"])).await, 503);
    let refused = door.refused_handshakes().await;
    assert!(refused > 0);
    let foreign = Authority::new().sign(&[PROXY]).write(pki.path(), "foreign");
    assert_eq!(through_envoy(&door, &pki.ca, &foreign).await, 503);
    assert!(door.refused_handshakes().await > refused);
    let grpc = door.keyward.count("keyward_tls_handshakes_failed_total", &[("door", "grpc")]).await;
    assert_eq!(grpc, 0, "the other door has TLS of its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_asks_over_tls_and_nobody_in_the_clear() {
    let pki = Pki::new();
    let door =
        Door::open(&pki, "nginx", |builder| builder.arg("--http-tls-client-ca", &shown(&pki.ca))).await;
    let client = pki.client(&["nginx.example.com"]);
    // As docs/tls.md shows.
    let lines = format!(
        "proxy_pass https://keyward/check;
            proxy_ssl_certificate {};
            proxy_ssl_certificate_key {};
            proxy_ssl_trusted_certificate {};
            proxy_ssl_verify on;
            proxy_ssl_name keyward.example.com;
",
        shown(&client.certificate),
        shown(&client.key),
        shown(&pki.ca)
    );
    let upstream = Upstream::start().await;
    let nginx =
        Nginx::start(door.http, upstream.addr(), &[("proxy_pass http://keyward/check;\n", &lines)]).await;
    let ask = async |key: &str| Request::get("/v1/models").bearer(key).send(nginx.addr()).await.status;
    assert_eq!(ask(&door.key.secret).await, 200);
    assert_eq!(ask("kw_not-a-key-of-anybody").await, 401);
    assert_eq!(door.refused_handshakes().await, 0);

    let mut plain = TcpStream::connect(door.http).await.unwrap();
    plain.write_all(b"GET /check HTTP/1.1\r\nhost: k\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP/"), "{}", String::from_utf8_lossy(&answer));
    let noticed = eventually(async || (door.refused_handshakes().await > 0).then_some(()));
    assert!(noticed.await.is_some(), "it is counted");
}

#[test]
fn tls_by_halves_is_refused_at_start() {
    let pki = Pki::new();
    let certificate = shown(&pki.server.certificate);
    let ended = run(pki.path(), &["serve", "--http-listen", "127.0.0.1:0", "--http-tls-cert", &certificate]);
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    assert!(ended.stderr.contains("--http-tls-key too"), "{}", ended.stderr);
    let missing = shown(&pki.path().join("missing.pem"));
    let ended = run(
        pki.path(),
        &[
            "serve",
            "--http-listen",
            "127.0.0.1:0",
            "--http-tls-cert",
            &certificate,
            "--http-tls-key",
            &missing,
        ],
    );
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    assert!(ended.stderr.contains(&missing) && ended.stderr.contains("over HTTP"), "{}", ended.stderr);
}
