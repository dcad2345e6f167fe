//! TLS on the gRPC port: who gets an answer, and what a change of the files does.

use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, HandshakeKind, ProtocolVersion, RootCertStore, SupportedProtocolVersion};
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::program::run;
use crate::support::certificates::{Authority, Files};
use crate::support::envoy::{self, Envoy};
use crate::support::http::Request;
use crate::support::keyward::{self, Key, Keyward};
use crate::support::upstream::Upstream;
use crate::support::{PATIENCE, eventually};

const SERVER: &str = "keyward.example.com";
const TLS12: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS12];
const TLS13: [&SupportedProtocolVersion; 1] = [&rustls::version::TLS13];
const CLIENT: &str = "spiffe://example.com/ns/edge/sa/envoy";

/// A Keyward's certificates, and those of its clients.
pub(crate) struct Pki {
    folder: TempDir,
    authority: Authority,
    pub(crate) ca: PathBuf,
    pub(crate) server: Files,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("keyward-tls-").tempdir().unwrap();
        let authority = Authority::new();
        let ca = authority.write(folder.path().join("ca.crt"));
        let server = authority.sign(&[SERVER]).write(folder.path(), "server");
        Self { folder, authority, ca, server }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    fn tls(&self, keyward: keyward::Builder) -> keyward::Builder {
        keyward
            .arg("--grpc-tls-cert", &shown(&self.server.certificate))
            .arg("--grpc-tls-key", &shown(&self.server.key))
    }

    fn mtls(&self, keyward: keyward::Builder) -> keyward::Builder {
        self.tls(keyward).arg("--grpc-tls-client-ca", &shown(&self.ca))
    }

    pub(crate) fn client(&self, names: &[&str]) -> Files {
        self.authority.sign(names).write(self.path(), "client")
    }
}

pub(crate) fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A block of docs/tls.md, by its first line.
fn documented(first: &str) -> String {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/tls.md")).unwrap();
    let block = page.split("```yaml\n").find(|block| block.starts_with(first)).unwrap();
    block.split("```").next().unwrap().to_owned()
}

fn replaced(text: &str, shipped: &str, ours: &str) -> String {
    assert_eq!(text.matches(shipped).count(), 1, "{shipped}");
    text.replace(shipped, ours)
}

/// What docs/tls.md shows, with these files.
fn speaks_tls(envoy: envoy::Builder, ca: &Path, client: Option<&Files>) -> envoy::Builder {
    let (certificate, key) = ("/etc/envoy/tls/tls.crt", "/etc/envoy/tls/tls.key");
    let mut socket = replaced(&documented("      transport_socket:"), "/etc/envoy/tls/ca.crt", &shown(ca));
    if let Some(client) = client {
        socket = replaced(&socket, certificate, &shown(&client.certificate));
        socket = replaced(&socket, key, &shown(&client.key));
    } else {
        let own = format!(
            "            tls_certificates:
              - certificate_chain: {{filename: {certificate}}}
                private_key: {{filename: {key}}}
"
        );
        socket = replaced(&socket, &own, "");
    }
    envoy.replace("      connect_timeout: 0.25s\n", &format!("      connect_timeout: 5s\n{socket}"))
}

fn with_key(keyward: &Keyward) -> Key {
    keyward.create_user("ada", &[]);
    keyward.create_key("ada", "ci", &[])
}

/// The status of a request with a good key that comes in by this Envoy.
async fn status_through(
    keyward: &Keyward,
    key: &Key,
    change: impl FnOnce(envoy::Builder) -> envoy::Builder,
) -> u16 {
    let upstream = Upstream::start().await;
    let envoy = change(Envoy::new(keyward.grpc_addr(), upstream.addr())).start().await;
    let status = Request::get("/v1/models").bearer(&key.secret).send(envoy.addr()).await.status;
    assert_eq!(upstream.requests() == 1, status == 200);
    status
}

async fn refused_handshakes(keyward: &Keyward) -> u64 {
    keyward.count("keyward_tls_handshakes_failed_total", &[("door", "grpc")]).await
}

/// The log comes after the alert that the client sees.
async fn is_logged(keyward: &Keyward, text: &str) {
    let found = eventually(async || keyward.log().contains(text).then_some(())).await;
    assert!(found.is_some(), "{text} is not in the log:\n{}", keyward.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_asks_over_tls_and_nobody_in_the_clear() {
    let pki = Pki::new();
    let keyward = pki.tls(Keyward::new()).start().await;
    let key = with_key(&keyward);
    assert_eq!(status_through(&keyward, &key, |envoy| speaks_tls(envoy, &pki.ca, None)).await, 200);
    assert_eq!(refused_handshakes(&keyward).await, 0);
    assert_eq!(status_through(&keyward, &key, |envoy| envoy).await, 503);
    assert!(refused_handshakes(&keyward).await > 0);
    is_logged(&keyward, "corrupt message").await;
    // The other way round: Envoy does not believe just any server.
    let stranger = Authority::new().write(pki.path().join("stranger.crt"));
    assert_eq!(status_through(&keyward, &key, |envoy| speaks_tls(envoy, &stranger, None)).await, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_clients_of_the_authority_are_answered() {
    let pki = Pki::new();
    let told = Keyward::new().arg("--log-level", "info,keyward::server::tls=debug");
    let keyward = pki.mtls(told).start().await;
    let key = with_key(&keyward);
    let through = async |client: Option<&Files>| {
        status_through(&keyward, &key, |envoy| speaks_tls(envoy, &pki.ca, client)).await
    };
    // Without a list any name will do.
    assert_eq!(through(Some(&pki.client(&["whoever.example.com"]))).await, 200);
    assert_eq!(refused_handshakes(&keyward).await, 0);
    assert_eq!(through(None).await, 503);
    let none = refused_handshakes(&keyward).await;
    assert!(none > 0);
    is_logged(&keyward, "peer sent no certificates").await;
    let foreign = Authority::new().sign(&[CLIENT]).write(pki.path(), "foreign");
    assert_eq!(through(Some(&foreign)).await, 503);
    is_logged(&keyward, "UnknownIssuer").await;
    assert!(refused_handshakes(&keyward).await > none);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_clients_on_the_list_are_answered() {
    let pki = Pki::new();
    let sans = format!("{CLIENT},envoy.example.com,10.1.2.3");
    let keyward = pki.mtls(Keyward::new()).arg("--grpc-tls-client-sans", &sans).start().await;
    let key = with_key(&keyward);
    let through = async |names: &[&str]| {
        let client = pki.client(names);
        status_through(&keyward, &key, |envoy| speaks_tls(envoy, &pki.ca, Some(&client))).await
    };
    assert_eq!(through(&[CLIENT]).await, 200);
    assert_eq!(refused_handshakes(&keyward).await, 0);
    // Its neighbour in the same mesh, and a wildcard that would fit.
    assert_eq!(through(&["spiffe://example.com/ns/edge/sa/envoy2", "*.example.com", "10.1.2.4"]).await, 503);
    assert!(refused_handshakes(&keyward).await > 0);
    is_logged(&keyward, "ApplicationVerificationFailure").await;
    for name in ["other.example.com", "example.com", ""] {
        assert!(!is_let_in(&pki, &keyward, &[name]).await, "{name}");
    }
    for name in ["envoy.example.com", "ENVOY.example.com", "10.1.2.3", CLIENT] {
        assert!(is_let_in(&pki, &keyward, &["x.example.com", name]).await, "{name}");
    }
}

/// Whether the server goes on after the handshake: with TLS 1.3 a client knows only then.
async fn is_let_in(pki: &Pki, keyward: &Keyward, names: &[&str]) -> bool {
    let names: Vec<&str> = names.iter().copied().filter(|name| !name.is_empty()).collect();
    let client = pki.client(&names);
    let mut stream = connect(keyward.grpc_addr(), &Hello::new(pki).with(&client)).await.unwrap();
    // An HTTP/2 server speaks as soon as it may.
    let mut first = [0; 9];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut first)).await.unwrap().is_ok()
}

/// A TLS client of ours.
struct Hello {
    roots: Arc<RootCertStore>,
    client: Option<(Vec<CertificateDer<'static>>, PathBuf)>,
    versions: &'static [&'static SupportedProtocolVersion],
}

impl Hello {
    fn new(pki: &Pki) -> Self {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&pki.ca).unwrap()).unwrap();
        Self { roots: Arc::new(roots), client: None, versions: rustls::ALL_VERSIONS }
    }

    fn with(mut self, client: &Files) -> Self {
        let chain = vec![CertificateDer::from_pem_file(&client.certificate).unwrap()];
        self.client = Some((chain, client.key.clone()));
        self
    }

    fn config(&self) -> ClientConfig {
        let provider = Arc::new(ring::default_provider());
        let verifier: Arc<dyn ServerCertVerifier> =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&provider))
                .build()
                .unwrap();
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.client {
            Some((chain, key)) => builder
                .with_client_auth_cert(
                    chain.clone(),
                    rustls::pki_types::PrivateKeyDer::from_pem_file(key).unwrap(),
                )
                .unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

async fn connect(addr: SocketAddr, hello: &Hello) -> std::io::Result<TlsStream<TcpStream>> {
    connect_with(addr, &Arc::new(hello.config())).await
}

async fn connect_with(addr: SocketAddr, config: &Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(addr).await?;
    let name = ServerName::try_from(SERVER).unwrap();
    tokio::time::timeout(PATIENCE, TlsConnector::from(Arc::clone(config)).connect(name, stream)).await?
}

/// Resumed, a session would come in without a look at the client's certificate.
#[tokio::test(flavor = "multi_thread")]
async fn both_versions_speak_http2_and_no_session_is_resumed() {
    let pki = Pki::new();
    let keyward = pki.tls(Keyward::new()).start().await;
    for (version, spoken) in [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)] {
        let config = Arc::new(Hello { versions: version, ..Hello::new(&pki) }.config());
        for _ in 0..2 {
            let mut stream = connect_with(keyward.grpc_addr(), &config).await.unwrap();
            // Tickets come with or before the first bytes.
            let mut first = [0; 9];
            stream.read_exact(&mut first).await.unwrap();
            let session = stream.get_ref().1;
            assert_eq!(session.protocol_version(), Some(spoken));
            assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
            assert_eq!(session.handshake_kind(), Some(HandshakeKind::Full));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_says_nothing_is_in_nobodys_way_and_let_go() {
    let pki = Pki::new();
    let keyward = pki.tls(Keyward::new()).start().await;
    let mut silent = TcpStream::connect(keyward.grpc_addr()).await.unwrap();
    let _more = [
        TcpStream::connect(keyward.grpc_addr()).await.unwrap(),
        TcpStream::connect(keyward.grpc_addr()).await.unwrap(),
    ];
    connect(keyward.grpc_addr(), &Hello::new(&pki)).await.unwrap();
    assert_eq!(refused_handshakes(&keyward).await, 0);
    let end = tokio::time::timeout(PATIENCE, silent.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

async fn presented(keyward: &Keyward, pki: &Pki) -> CertificateDer<'static> {
    let stream = connect(keyward.grpc_addr(), &Hello::new(pki)).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

/// As Kubernetes writes a secret: a new folder, and one symbolic link that is swapped.
fn publish(folder: &Path, version: &str, certificate: &str, key: &str) {
    let data = folder.join(version);
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("tls.crt"), certificate).unwrap();
    std::fs::write(data.join("tls.key"), key).unwrap();
    symlink(version, folder.join("..data_tmp")).unwrap();
    std::fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn new_files_hold_for_new_connections_and_bad_ones_not_at_all() {
    let pki = Pki::new();
    let pairs = [pki.authority.sign(&[SERVER]), pki.authority.sign(&[SERVER])];
    let [first, second] = [&pairs[0], &pairs[1]];
    let secret = tempfile::tempdir().unwrap();
    publish(secret.path(), "..1", &first.certificate, &first.key);
    let names = ["tls.crt", "tls.key"].map(|name| {
        symlink(Path::new("..data").join(name), secret.path().join(name)).unwrap();
        shown(&secret.path().join(name))
    });
    let keyward =
        Keyward::new().arg("--grpc-tls-cert", &names[0]).arg("--grpc-tls-key", &names[1]).start().await;
    let key = with_key(&keyward);
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(keyward.grpc_addr(), upstream.addr());
    let envoy = speaks_tls(envoy, &pki.ca, None).start().await;
    let ask = async || Request::get("/v1/models").bearer(&key.secret).send(envoy.addr()).await.status;
    assert_eq!(ask().await, 200);
    let of = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    assert_eq!(presented(&keyward, &pki).await, of(&first.certificate));

    publish(secret.path(), "..2", &second.certificate, &second.key);
    let is_new = async || (presented(&keyward, &pki).await == of(&second.certificate)).then_some(());
    eventually(is_new).await.expect("the new certificate should be shown");
    // Envoy's connection is the old one still.
    assert_eq!(ask().await, 200);

    let failed = [("door", "grpc")];
    assert!(keyward.metric("keyward_tls_reload_failed", &failed).await < 0.5);
    publish(secret.path(), "..3", &first.certificate, &second.key);
    let is_noticed =
        async || (keyward.metric("keyward_tls_reload_failed", &failed).await > 0.5).then_some(());
    eventually(is_noticed).await.expect("the bad version should be noticed");
    assert_eq!(presented(&keyward, &pki).await, of(&second.certificate));
    assert_eq!(ask().await, 200);

    publish(secret.path(), "..4", &first.certificate, &first.key);
    let is_repaired =
        async || (keyward.metric("keyward_tls_reload_failed", &failed).await < 0.5).then_some(());
    eventually(is_repaired).await.expect("the good version should be taken");
    assert_eq!(presented(&keyward, &pki).await, of(&first.certificate));
    let log = keyward.log();
    assert_eq!(log.matches("can't be used; the last good ones stay in force").count(), 1, "{log}");
    assert!(log.contains("does not fit the certificate"), "{log}");
    assert!(!log.contains("PRIVATE KEY"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_authority_is_exchanged_while_running() {
    let pki = Pki::new();
    let clients = Authority::new();
    let ca = clients.write(pki.path().join("clients.crt"));
    let keyward = pki.tls(Keyward::new()).arg("--grpc-tls-client-ca", &shown(&ca)).start().await;
    assert!(!is_let_in(&pki, &keyward, &[CLIENT]).await);
    // Both, as one does while clients move from one to the other.
    std::fs::write(&ca, clients.pem() + &pki.authority.pem()).unwrap();
    let is_in = async || is_let_in(&pki, &keyward, &[CLIENT]).await.then_some(());
    eventually(is_in).await.expect("the added authority should count");
}

#[test]
fn the_documented_settings_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("k.yaml"), documented("grpc:\n")).unwrap();
    let ended = run(folder.path(), &["config", "check", "--config", "k.yaml"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
}

#[test]
fn what_is_wrong_with_the_files_is_said_at_start_in_one_line() {
    let pki = Pki::new();
    let other = pki.authority.sign(&[SERVER]).write(pki.path(), "other");
    let junk = pki.path().join("junk.pem");
    std::fs::write(&junk, "-----BEGIN NONSENSE-----\n").unwrap();
    let missing = pki.path().join("missing.pem");
    let (cert, key) = (shown(&pki.server.certificate), shown(&pki.server.key));
    let (missing, junk, other) = (shown(&missing), shown(&junk), shown(&other.key));
    for (files, expected) in [
        ([&missing, &key, &pki.ca.display().to_string()], [&*missing, "put a PEM file there"]),
        ([&cert, &missing, &cert], [&*missing, "put a PEM file there"]),
        ([&cert, &key, &missing], [&*missing, "put a PEM file there"]),
        ([&cert, &other, &cert], [&*other, "does not fit the certificate"]),
        ([&key, &key, &cert], [&*key, "holds no certificate"]),
        ([&cert, &cert, &cert], [&*cert, "holds no private key"]),
        ([&cert, &key, &junk], [&*junk, "no good PEM file"]),
        ([&cert, &key, &key], [&*key, "holds no certificate"]),
    ] {
        let ended = run(
            pki.path(),
            &[
                "serve",
                "--grpc-listen",
                "127.0.0.1:0",
                "--admin-listen",
                "127.0.0.1:0",
                "--grpc-tls-cert",
                files[0],
                "--grpc-tls-key",
                files[1],
                "--grpc-tls-client-ca",
                files[2],
            ],
        );
        assert_eq!(ended.code, 2, "{}", ended.stderr);
        let errors: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{}", ended.stderr);
        for part in expected {
            assert!(errors[0].contains(part), "{part}: {}", errors[0]);
        }
    }
}
