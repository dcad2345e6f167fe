//! Certificates made for one test.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};

/// How many authorities there are.
static MADE: AtomicUsize = AtomicUsize::new(0);

/// An authority.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key, as PEM.
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// The names of the files of a [`Pair`].
pub(crate) struct Files {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        // Of one name, an authority and what it signs, or two authorities, would be taken for each other.
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        params.distinguished_name.push(DnType::CommonName, format!("authority {number} of the tests"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, key()).expect("make an authority"))
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for these names: an IP address, a URI or a DNS name each.
    pub(crate) fn sign(&self, names: &[&str]) -> Pair {
        let san = |name: &&str| match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) if name.contains(':') => SanType::URI(Ia5String::try_from(*name).expect("ASCII")),
            Err(_) => SanType::DnsName(Ia5String::try_from(*name).expect("ASCII")),
        };
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.iter().map(san).collect();
        let key = key();
        let certificate = params.signed_by(&key, &self.0).expect("sign a certificate");
        Pair { certificate: certificate.pem(), key: key.serialize_pem() }
    }

    /// Writes its certificate.
    pub(crate) fn write(&self, path: PathBuf) -> PathBuf {
        std::fs::write(&path, self.pem()).expect("write an authority's certificate");
        path
    }
}

impl Pair {
    /// Writes both.
    pub(crate) fn write(&self, folder: &Path, name: &str) -> Files {
        let files = Files {
            certificate: folder.join(format!("{name}.crt")),
            key: folder.join(format!("{name}.key")),
        };
        std::fs::write(&files.certificate, &self.certificate).expect("write a certificate");
        std::fs::write(&files.key, &self.key).expect("write a key");
        files
    }
}

fn key() -> KeyPair {
    KeyPair::generate().expect("make a key")
}
