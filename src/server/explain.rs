//! One described request, decided and explained: for `POST /check` on the admin port and for `keyward check`.
//!
//! The description becomes the very message that Envoy would send, so that it is read, decided and answered by what
//! reads, decides and answers Envoy. It is no use of the key and is not counted as a check.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::HttpBody;
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use envoy_types::pb::envoy::config::core::v3::address::Address as AddressForm;
use envoy_types::pb::envoy::config::core::v3::{Address, SocketAddress};
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{
    HttpRequest, Peer, Request as RequestAttributes,
};
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
use prost::Message;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::admin::{AdminState, refuse};
use super::check_view::CheckView;
use super::options::ClientIpSource;
use super::report::{self, Report};
use super::request::Inbound;
use super::response::Responder;
use crate::authorizer::explain::Explanation;
use crate::authorizer::{Authorizer, Checked};
use crate::domain::decision::{Decision, Denied};
use crate::domain::denial::Denial;
use crate::domain::key::PresentedKey;

/// Largest body of a described request: as much as `--max-check-bytes` takes by default.
pub const MAX_BODY_BYTES: usize = 8 << 20;

/// Largest description: such a body in Base64, and what is said besides.
pub const MAX_BYTES: usize = 12 << 20;

/// Descriptions that are worked on at once: this is for people, and each may be large.
const MAX_AT_ONCE: usize = 4;

/// How long one of them may take to arrive.
const READING: Duration = Duration::from_secs(5);

/// A request as an operator describes it. There is no `Debug`: it holds the key.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Described {
    /// The key, as the caller would send it.
    #[serde(with = "secret_text")]
    pub key: Zeroizing<String>,
    /// The method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// The client's address, however the sidecar is told to find it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// The route's `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The route's `required_scopes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub required_scopes: Option<String>,
    /// `content-type`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// The body, where it is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// The body in Base64, whatever it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
}

/// Wiped when dropped; what serde and the network hold besides is not ours.
mod secret_text {
    use serde::{Deserialize, Deserializer, Serializer};
    use zeroize::Zeroizing;

    pub(super) fn serialize<S: Serializer>(
        text: &Zeroizing<String>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Zeroizing<String>, D::Error> {
        String::deserialize(deserializer).map(Zeroizing::new)
    }
}

/// A description of what is no request. Nothing of it is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NoRequest {
    /// No key to decide about.
    #[error("the key is empty")]
    Key,
    /// No such method.
    #[error("the method is not a word of letters")]
    Method,
    /// No such path.
    #[error("the path does not begin with / or has a blank or a control character")]
    Path,
    /// A body too many.
    #[error("the body is given twice, as text and in Base64")]
    TwoBodies,
    /// It can't be read.
    #[error("the body is not Base64")]
    Base64,
    /// Over [`MAX_BODY_BYTES`].
    #[error("the body is larger than 8 MiB")]
    TooLarge,
}

impl Described {
    /// Puts the body in.
    pub fn with_body(mut self, bytes: &[u8]) -> Self {
        self.body_base64 = Some(BASE64.encode(bytes));
        self
    }

    /// Whether this is a request at all.
    pub fn validate(&self) -> Result<(), NoRequest> {
        self.to_check().map(|_| ())
    }

    fn body_bytes(&self) -> Result<Vec<u8>, NoRequest> {
        let bytes = match (&self.body, &self.body_base64) {
            (None, None) => Vec::new(),
            (Some(text), None) => text.clone().into_bytes(),
            (None, Some(text)) => BASE64.decode(text).map_err(|_| NoRequest::Base64)?,
            (Some(_), Some(_)) => return Err(NoRequest::TwoBodies),
        };
        if bytes.len() > MAX_BODY_BYTES { Err(NoRequest::TooLarge) } else { Ok(bytes) }
    }

    /// What Envoy would send, less the key.
    fn to_check(&self) -> Result<CheckRequest, NoRequest> {
        if self.key.is_empty() {
            return Err(NoRequest::Key);
        }
        if self.method.is_empty()
            || !self.method.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-')
        {
            return Err(NoRequest::Method);
        }
        if !self.path.starts_with('/') || self.path.contains(|c: char| c == ' ' || c.is_control()) {
            return Err(NoRequest::Path);
        }
        let raw_body = self.body_bytes()?;
        let mut headers = HashMap::new();
        let mut header = |name: &str, value: String| headers.insert(name.to_owned(), value);
        if !raw_body.is_empty() {
            header("content-length", raw_body.len().to_string());
        }
        if let Some(content_type) = &self.content_type {
            header("content-type", content_type.clone());
        }
        let http = HttpRequest {
            method: self.method.clone(),
            path: self.path.clone(),
            headers,
            raw_body,
            ..HttpRequest::default()
        };
        let source = self.ip.map(|ip| Peer { address: Some(socket(ip)), ..Peer::default() });
        let route = [("model", &self.model), ("required_scopes", &self.required_scopes)];
        let route = route.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)));
        let attributes = AttributeContext {
            source,
            request: Some(RequestAttributes { time: None, http: Some(http) }),
            context_extensions: route.collect(),
            ..AttributeContext::default()
        };
        Ok(CheckRequest { attributes: Some(attributes) })
    }
}

fn socket(ip: IpAddr) -> Address {
    let address = SocketAddress { address: ip.to_string(), ..SocketAddress::default() };
    Address { address: Some(AddressForm::SocketAddress(address)) }
}

/// Decides described requests.
pub struct Explainer {
    authorizer: Arc<Authorizer>,
    responder: Responder,
    deadline: Duration,
    places: Semaphore,
}

impl Explainer {
    /// By this authorizer, answered as this responder would.
    pub fn new(authorizer: Arc<Authorizer>, responder: Responder, deadline: Duration) -> Self {
        Self { authorizer, responder, deadline, places: Semaphore::new(MAX_AT_ONCE) }
    }

    /// Decides and tells why.
    pub async fn explain(&self, described: &Described) -> Result<Report, NoRequest> {
        let check = described.to_check()?.encode_to_vec();
        let check = CheckView::read(&check).unwrap_or_default();
        // The operator names the client; how a sidecar finds it is another question.
        let Some(inbound) = Inbound::read(&check, &HeaderMap::new(), &ClientIpSource::Peer) else {
            return Err(NoRequest::Path);
        };
        let length = self.authorizer.prefix_length();
        let key = PresentedKey::parse(described.key.as_bytes());
        let prefix = key.as_ref().map_err(|error| *error).and_then(|key| key.prefix(length));
        let format = match prefix {
            Ok(prefix) => report::well_formed(prefix),
            Err(defect) => report::malformed(defect),
        };
        let (checked, explanation) = match &key {
            Ok(key) => self.authorizer.explain(key, &inbound.request, self.deadline).await,
            Err(_) => (
                Checked {
                    decision: Decision::Deny(Denied::unproven(Denial::MalformedCredentials)),
                    tier: None,
                },
                Explanation::default(),
            ),
        };
        let response = self.responder.respond(&checked, Some(&inbound)).ok().and_then(|answer| answer.read());
        Ok(report::write(format, &checked, &explanation, response.as_ref()))
    }
}

/// `POST /check`
pub(super) async fn check(State(state): State<Arc<AdminState>>, request: Request) -> Response {
    let Ok(_place) = state.explainer.places.try_acquire() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "too many requests are being explained; try again");
    };
    // Before anything of it is read.
    if request.body().size_hint().lower() > u64::try_from(MAX_BYTES).unwrap_or(u64::MAX) {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "the description is larger than 12 MiB");
    }
    let described = match timeout(READING, Json::<Described>::from_request(request, &())).await {
        Ok(Ok(Json(described))) => described,
        Err(_) => return refuse(StatusCode::REQUEST_TIMEOUT, "the description did not arrive in time"),
        // Its own text may repeat what was sent.
        Ok(Err(rejection)) => {
            return refuse(
                rejection.status(),
                "expected JSON with key, method and path, and perhaps ip, model, required_scopes, \
                 content_type and body or body_base64",
            );
        }
    };
    match state.explainer.explain(&described).await {
        Ok(report) => Json(report).into_response(),
        Err(error) => refuse(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(json: &str) -> Described {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_description_is_read_as_envoy_s_own_message() {
        let described = described(
            r#"{"key":"kw_0123456789","method":"PUT","path":"/v1/x?a=b","ip":"10.1.2.3","model":"m",
                "required_scopes":"a,b","content_type":"text/plain","body":"hello"}"#,
        );
        let check = described.to_check().unwrap();
        let bytes = check.encode_to_vec();
        let view = CheckView::read(&bytes).unwrap();
        let inbound = Inbound::read(&view, &HeaderMap::new(), &ClientIpSource::Peer).unwrap();
        let request = inbound.request;
        assert_eq!((request.method, request.path), ("PUT", "/v1/x"));
        assert_eq!(request.client, Some("10.1.2.3".parse().unwrap()));
        assert_eq!((request.route.model, request.route.required_scopes), ("m", "a,b"));
        assert_eq!((request.body.bytes, request.body.is_whole), (Some(&b"hello"[..]), true));
        assert_eq!(request.body.content_type, "text/plain");
        assert!(!format!("{check:?}").contains("kw_"), "the key is in no message");
    }

    #[test]
    fn what_is_no_request_is_refused_without_being_repeated() {
        let of = |key: &str, method: &str, path: &str| Described {
            key: Zeroizing::new(key.to_owned()),
            method: method.to_owned(),
            path: path.to_owned(),
            ip: None,
            model: None,
            required_scopes: None,
            content_type: None,
            body: None,
            body_base64: None,
        };
        let error = |described: Described| described.to_check().err();
        assert_eq!(error(of("kw_0123456789", "GET", "/")), None);
        assert_eq!(error(of("", "GET", "/")), Some(NoRequest::Key));
        assert_eq!(error(of("k", "", "/")), Some(NoRequest::Method));
        for path in ["", "v1", "/a b", "/a\n"] {
            assert_eq!(error(of("k", "GET", path)), Some(NoRequest::Path), "{path:?}");
        }
        let mut two = of("k", "GET", "/").with_body(b"a");
        assert_eq!(two.body_bytes(), Ok(b"a".to_vec()));
        two.body = Some(String::new());
        assert_eq!(error(two), Some(NoRequest::TwoBodies));
        let bad = Described { body_base64: Some("?".into()), ..of("k", "GET", "/") };
        assert_eq!(error(bad), Some(NoRequest::Base64));
        assert_eq!(
            error(of("k", "GET", "/").with_body(&vec![0; MAX_BODY_BYTES + 1])),
            Some(NoRequest::TooLarge)
        );
        assert!(
            serde_json::from_str::<Described>(r#"{"key":"k","method":"GET","path":"/","pth":1}"#).is_err()
        );
    }
}
