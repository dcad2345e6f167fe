//! Which clients of a trusted authority may come in: by the names in their certificate, to the letter.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use webpki::EndEntityCert;

use super::options::Unexpected;

/// A subject alternative name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientSan {
    /// `envoy.example.com`, in lower case.
    Dns(String),
    /// `spiffe://cluster.local/ns/edge/sa/envoy`
    Uri(String),
    /// `10.0.0.7`
    Ip(IpAddr),
}

impl FromStr for ClientSan {
    type Err = Unexpected;

    fn from_str(text: &str) -> Result<Self, Unexpected> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Ip(address));
        }
        // No DNS name has a colon, and no URI has none.
        if let Some((scheme, rest)) = text.split_once(':') {
            let is_scheme = scheme.starts_with(|letter: char| letter.is_ascii_alphabetic())
                && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
            if is_scheme && !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Ok(Self::Uri(text.to_owned()));
            }
        } else if !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        {
            return Ok(Self::Dns(text.to_ascii_lowercase()));
        }
        let expected =
            "a DNS name without wildcard, a URI such as spiffe://example.com/envoy, or an IP address";
        Err(Unexpected(expected.to_owned()))
    }
}

impl fmt::Display for ClientSan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(text) | Self::Uri(text) => f.write_str(text),
            Self::Ip(address) => address.fmt(f),
        }
    }
}

impl ClientSan {
    fn is_in(&self, certificate: &EndEntityCert<'_>) -> bool {
        match self {
            Self::Dns(name) => certificate.valid_dns_names().any(|found| found.eq_ignore_ascii_case(name)),
            Self::Uri(uri) => certificate.valid_uri_names().any(|found| found == uri),
            Self::Ip(address) => {
                let name = ServerName::IpAddress((*address).into());
                certificate.verify_is_valid_for_subject_name(&name).is_ok()
            }
        }
    }
}

/// Whom the inner verifier trusts and who has one of these names.
#[derive(Debug)]
pub(super) struct OnlyThese {
    inner: Arc<dyn ClientCertVerifier>,
    sans: Vec<ClientSan>,
}

impl OnlyThese {
    pub(super) fn new(inner: Arc<dyn ClientCertVerifier>, sans: Vec<ClientSan>) -> Self {
        Self { inner, sans }
    }
}

impl ClientCertVerifier for OnlyThese {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let certificate = EndEntityCert::try_from(end_entity)
            .map_err(|_| rustls::Error::from(CertificateError::BadEncoding))?;
        if self.sans.iter().any(|san| san.is_in(&certificate)) {
            Ok(verified)
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_told_by_its_form() {
        let of = |text: &str| text.parse::<ClientSan>().ok();
        assert_eq!(of("Envoy.example.com"), Some(ClientSan::Dns("envoy.example.com".into())));
        assert_eq!(of("spiffe://a/B"), Some(ClientSan::Uri("spiffe://a/B".into())));
        assert_eq!(of("10.0.0.7"), Some(ClientSan::Ip("10.0.0.7".parse().unwrap())));
        assert_eq!(of("::1"), Some(ClientSan::Ip("::1".parse().unwrap())));
        for bad in ["", "*.example.com", "a b", ":x", "spiffe:", "spiffe://a b", "/x"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        for text in ["envoy.example.com", "spiffe://a/B", "10.0.0.7"] {
            assert_eq!(of(text).unwrap().to_string(), text);
        }
    }
}
