//! TLS on a door: certificates from files that are read again when they change, and who may come in.
//!
//! The files are somebody else's: cert-manager's, a script's, a Kubernetes secret that is swapped by a symbolic link.
//! So a change counts once the files have stayed as they are from one look to the next, all of them together, and a
//! version that can't be used leaves the last good one in force.
//!
//! Sessions are not resumed: a resumed one would skip the look at the client's certificate, and Envoy's connections
//! live for hours.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_blocking;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zeroize::Zeroizing;

use super::client_san::{ClientSan, OnlyThese};
use crate::clock;
use crate::domain::time::Instant;
use crate::telemetry::metrics::{Door, Metrics};

/// How often the files are looked at. A change holds after two looks.
const LOOK: Duration = Duration::from_secs(1);

/// A client that has not shaken hands by then is let go.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// How often a failed handshake is worth a warning.
const WARN_INTERVAL: Duration = Duration::from_secs(10);

/// Longer than any chain; what is longer is some other file.
const MOST_BYTES: u64 = 1 << 20;

/// Which files, and who may come in.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// PEM: our certificate, then the intermediate ones.
    pub certificate: PathBuf,
    /// PEM: its private key.
    pub key: PathBuf,
    /// PEM: the authorities of clients. Where it is set, a client without a certificate of theirs is refused.
    pub client_ca: Option<PathBuf>,
    /// Which of those clients; empty for all.
    pub client_sans: Vec<ClientSan>,
}

/// Why there is no TLS with these files.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum TlsError {
    /// Not there, or not to be read.
    #[error("{path} can't be read: {reason}; {fix}")]
    Unreadable {
        /// The file.
        path: String,
        /// What the system says.
        reason: String,
        /// What to do.
        fix: &'static str,
    },
    /// It holds something else.
    #[error("{path} {reason}")]
    Defective {
        /// The file.
        path: String,
        /// What is wrong, and what should be there.
        reason: String,
    },
    /// Each is good, and they do not belong together.
    #[error(
        "the private key in {key} does not fit the certificate in {certificate}; its first certificate must be the server's own"
    )]
    Unmatched {
        /// Its file.
        certificate: String,
        /// Its file.
        key: String,
    },
}

/// What the files held: a digest each, so that no copy of a key is kept, or why not.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sight(Vec<Result<[u8; 32], io::ErrorKind>>);

/// What the looks have shown.
#[derive(Debug)]
struct Looks {
    /// What was tried last, and what came of it.
    tried: Sight,
    failed: bool,
    /// Seen once; tried when it is seen again.
    new: Option<Sight>,
}

/// Shakes hands for one door, by the newest good version of its files.
pub struct Tls {
    door: Door,
    files: TlsFiles,
    protocols: &'static [&'static [u8]],
    current: ArcSwap<ServerConfig>,
    looks: Mutex<Looks>,
    warned: Mutex<Option<Instant>>,
    metrics: Metrics,
}

impl Tls {
    /// Reads the files. `protocols` is what is offered by ALPN: `h2`, `http/1.1`.
    pub fn load(
        door: Door,
        files: TlsFiles,
        protocols: &'static [&'static [u8]],
        metrics: Metrics,
    ) -> Result<Self, TlsError> {
        let Read { sight, config } = files.read(protocols);
        metrics.tls_reload_failed(door).set(0);
        let looks = Mutex::new(Looks { tried: sight, failed: false, new: None });
        let current = ArcSwap::from_pointee(config?);
        Ok(Self { door, files, protocols, current, looks, warned: Mutex::new(None), metrics })
    }

    /// Shakes hands, within a time limit; to be called in the connection's own task. What failed is counted.
    pub async fn accept<S>(&self, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let acceptor = TlsAcceptor::from(self.current.load_full());
        let accepted = match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
            Ok(accepted) => accepted,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")),
        };
        // Who hangs up in the middle is most likely a probe that only wants to know whether the port is open.
        if accepted.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::UnexpectedEof) {
            self.metrics.tls_handshakes_failed(self.door).inc();
        }
        accepted
    }

    /// Tells of a handshake that failed: a misconfigured client has to be found, and a hostile one must not fill the
    /// log.
    pub fn report(&self, peer: &impl fmt::Display, error: &io::Error) {
        let door = self.door.as_str();
        if error.kind() == io::ErrorKind::UnexpectedEof || !self.may_warn() {
            tracing::debug!(door, %peer, %error, "TLS handshake failed");
            return;
        }
        tracing::warn!(door, %peer, %error, "TLS handshake failed; others in the next ten seconds are told at level debug");
    }

    fn may_warn(&self) -> bool {
        let now = clock::instant();
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let may = warned.is_none_or(|at| now.saturating_since(at) >= WARN_INTERVAL);
        if may {
            *warned = Some(now);
        }
        may
    }

    /// Reads the files whenever they change, until the task is aborted.
    pub async fn watch(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let tls = Arc::clone(&self);
            let _ = spawn_blocking(move || tls.look()).await;
        }
    }

    fn look(&self) {
        let mut looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let sight = self.files.sight();
        if sight == looks.tried {
            looks.new = None;
            return;
        }
        if looks.new.as_ref() != Some(&sight) {
            looks.new = Some(sight);
            return;
        }
        let read = self.files.read(self.protocols);
        if read.sight != sight {
            looks.new = Some(read.sight);
            return;
        }
        looks.new = None;
        looks.tried = sight;
        looks.failed = match read.config {
            Ok(config) => {
                self.current.store(Arc::new(config));
                tracing::info!(door = self.door.as_str(), "new TLS files are in force for new connections");
                false
            }
            Err(error) => {
                tracing::warn!(
                    door = self.door.as_str(), %error,
                    "new TLS files can't be used; the last good ones stay in force"
                );
                true
            }
        };
        self.metrics.tls_reload_failed(self.door).set(i64::from(looks.failed));
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("door", &self.door).field("files", &self.files).finish_non_exhaustive()
    }
}

/// One reading of all files.
struct Read {
    sight: Sight,
    config: Result<ServerConfig, TlsError>,
}

type Bytes = Result<Zeroizing<Vec<u8>>, io::Error>;

impl TlsFiles {
    fn sight(&self) -> Sight {
        Sight(self.paths().map(|path| digest(&read(path))).collect())
    }

    fn paths(&self) -> impl Iterator<Item = &Path> {
        [self.certificate.as_path(), self.key.as_path()].into_iter().chain(self.client_ca.as_deref())
    }

    fn read(&self, protocols: &[&[u8]]) -> Read {
        let bytes = self.paths().map(read).collect::<Vec<_>>();
        let sight = Sight(bytes.iter().map(digest).collect());
        let mut bytes = bytes.into_iter();
        let mut next = || bytes.next().unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
        let (certificate, key) = (next(), next());
        let client_ca = self.client_ca.as_ref().map(|path| (path.as_path(), next()));
        Read { sight, config: self.config(certificate, key, client_ca, protocols) }
    }

    fn config(
        &self,
        certificate: Bytes,
        key: Bytes,
        client_ca: Option<(&Path, Bytes)>,
        protocols: &[&[u8]],
    ) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let chain = certificates(&self.certificate, certificate)?;
        let key = private_key(&self.key, key)?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| defective(&self.certificate, &error.to_string()))?;
        let builder = match client_ca {
            Some((path, bytes)) => builder.with_client_cert_verifier(self.verifier(
                path,
                certificates(path, bytes)?,
                &provider,
            )?),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => TlsError::Unmatched {
                certificate: self.certificate.display().to_string(),
                key: self.key.display().to_string(),
            },
            // What a key is refused for has no name of its own in rustls.
            rustls::Error::General(reason) => {
                defective(&self.key, &format!("holds a private key that can't be used: {reason}"))
            }
            error => {
                defective(&self.certificate, &format!("holds a certificate that can't be used: {error}"))
            }
        })?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn verifier(
        &self,
        path: &Path,
        authorities: Vec<CertificateDer<'static>>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let bad = |reason: &dyn fmt::Display| {
            defective(path, &format!("holds a certificate that can't be an authority: {reason}"))
        };
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(|error| bad(&error))?;
        }
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build();
        let verifier = verifier.map_err(|error| bad(&error))?;
        if self.client_sans.is_empty() {
            return Ok(verifier);
        }
        Ok(Arc::new(OnlyThese::new(verifier, self.client_sans.clone())))
    }
}

fn read(path: &Path) -> Bytes {
    // A pipe would be waited for, and a device never ends.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Zeroizing::new(Vec::new());
    File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn digest(bytes: &Bytes) -> Result<[u8; 32], io::ErrorKind> {
    bytes.as_ref().map(|bytes| Sha256::digest(bytes).into()).map_err(io::Error::kind)
}

fn readable(path: &Path, bytes: Bytes) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    bytes.map_err(|error| TlsError::Unreadable {
        path: path.display().to_string(),
        fix: match error.kind() {
            io::ErrorKind::PermissionDenied => "let the user that Keyward runs as read it",
            _ => "put a PEM file there or correct the path",
        },
        reason: error.to_string(),
    })
}

fn certificates(path: &Path, bytes: Bytes) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = readable(path, bytes)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let certificates =
        certificates.map_err(|error| defective(path, &format!("is no good PEM file: {error}")))?;
    if certificates.is_empty() {
        return Err(defective(
            path,
            "holds no certificate; it should have -----BEGIN CERTIFICATE----- in it",
        ));
    }
    Ok(certificates)
}

fn private_key(path: &Path, bytes: Bytes) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = readable(path, bytes)?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
        pem::Error::NoItemsFound => defective(
            path,
            "holds no private key; it should have -----BEGIN PRIVATE KEY----- in it, and no passphrase",
        ),
        error => defective(path, &format!("is no good PEM file: {error}")),
    })
}

fn defective(path: &Path, reason: &str) -> TlsError {
    TlsError::Defective { path: path.display().to_string(), reason: reason.to_owned() }
}
