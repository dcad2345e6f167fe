//! Whether an answer may be what it is: an independent, naive look at the preconditions of an allow.
//!
//! It is lopsided on purpose. A denial needs no reason here; an allow needs each of its own.

use std::fmt;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressForm;
use envoy_types::pb::envoy::service::auth::v3::attribute_context::HttpRequest;
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse, OkHttpResponse};
use prost::Message as _;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::credentials::presented;

/// A key of the fixed set.
pub(crate) struct Known {
    pub(crate) secret: &'static str,
    pub(crate) name: &'static str,
    pub(crate) rights: Rights,
}

/// What it may do, or why it may do nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rights {
    All,
    /// The same, behind bcrypt.
    Slow,
    Superuser,
    /// `10.0.0.0/8` and `2001:db8::/32`
    Networks,
    /// `gpt-4o*` and `claude-3`
    Models,
    /// `POST /v1/chat/*`
    Endpoint,
    /// `chat` and `files`
    Scopes,
    Expired,
    Inactive,
    OwnerGone,
    Denied,
    Unreadable,
    Spent,
}

const fn known(secret: &'static str, name: &'static str, rights: Rights) -> Known {
    Known { secret, name, rights }
}

/// Two of them share a prefix.
pub(crate) const KEYS: [Known; 14] = [
    known("kw_plain-fuzz", "plain", Rights::All),
    known("kw_plain-twin", "twin", Rights::Inactive),
    known("kw_bcryp-fuzz", "bcrypt", Rights::Slow),
    known("kw_super-fuzz", "super", Rights::Superuser),
    known("kw_netwo-fuzz", "networks", Rights::Networks),
    known("kw_model-fuzz", "models", Rights::Models),
    known("kw_endpo-fuzz", "endpoint", Rights::Endpoint),
    known("kw_scope-fuzz", "scopes", Rights::Scopes),
    known("kw_ended-fuzz", "ended", Rights::Expired),
    known("kw_inact-fuzz", "inactive", Rights::Inactive),
    known("kw_owner-fuzz", "owner", Rights::OwnerGone),
    known("kw_banne-fuzz", "denied", Rights::Denied),
    known("kw_badly-fuzz", "unreadable", Rights::Unreadable),
    known("kw_spent-fuzz", "spent", Rights::Spent),
];

/// Panics where the answer must not be.
pub(crate) fn judge(message: &[u8], response: &CheckResponse) {
    let status = response.status.as_ref().expect("an answer without a status is an allow");
    match &response.http_response {
        Some(HttpResponse::OkResponse(allow)) => {
            assert_eq!(status.code, 0, "an allow that Envoy takes for a denial");
            // What prost can't read whole, the oracle can't judge; such a message comes from no Envoy.
            if let Ok(request) = CheckRequest::decode(message) {
                let attributes = request.attributes.unwrap_or_default();
                let source =
                    attributes.source.and_then(|peer| peer.address).and_then(|address| address.address);
                let peer = match source {
                    Some(AddressForm::SocketAddress(socket)) => socket.address.parse().ok(),
                    _ => None,
                };
                let http =
                    attributes.request.and_then(|request| request.http).expect("an allow is about HTTP");
                let extension = |name: &str| {
                    attributes
                        .context_extensions
                        .get(name)
                        .map(|value| value.trim().to_owned())
                        .unwrap_or_default()
                };
                let ask = Ask {
                    peer,
                    headers: headers(&http),
                    anonymous: extension("anonymous"),
                    scopes: extension("required_scopes"),
                    model: extension("model"),
                    http: &http,
                };
                ask.hold(allow);
            }
        }
        Some(HttpResponse::DeniedResponse(denied)) => {
            assert_ne!(status.code, 0, "a denial that Envoy takes for an allow");
            let code = denied.status.as_ref().expect("a denial has a status").code;
            assert!((400..600).contains(&code), "a denial with status {code}");
        }
        other => panic!("neither allow nor denial: {other:?}"),
    }
}

struct Ask<'a> {
    http: &'a HttpRequest,
    headers: Vec<(String, Vec<u8>)>,
    peer: Option<IpAddr>,
    anonymous: String,
    scopes: String,
    model: String,
}

fn headers(http: &HttpRequest) -> Vec<(String, Vec<u8>)> {
    let map =
        http.headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone().into_bytes()));
    let listed = http.header_map.iter().flat_map(|list| &list.headers).map(|header| {
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        (header.key.to_ascii_lowercase(), value.to_vec())
    });
    map.chain(listed).collect()
}

impl Ask<'_> {
    fn hold(&self, allow: &OkHttpResponse) {
        self.hold_back_credentials(allow);
        let borrowed: Vec<(&str, &[u8])> =
            self.headers.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect();
        let shown = presented(&borrowed, &self.http.path);
        let named = said(allow, "x-keyward-key-name");
        let Some(first) = shown.first() else {
            assert_eq!(self.anonymous, "allow", "an allow without a credential");
            assert_eq!(named.unwrap_or_default(), "", "nobody has a name");
            return;
        };
        assert!(shown.iter().all(|one| one == first), "an allow with two credentials");
        let key =
            KEYS.iter().find(|key| key.secret.as_bytes() == first.as_slice()).expect("a key that exists");
        assert_eq!(named, Some(key.name), "somebody else's name");
        let scopes: &[&str] = if key.rights == Rights::Scopes { &["chat", "files"] } else { &[] };
        if key.rights != Rights::Superuser {
            let missing = self
                .scopes
                .split(',')
                .map(str::trim)
                .find(|scope| !scope.is_empty() && !scopes.contains(scope));
            assert_eq!(missing, None, "a scope is missing");
        }
        match key.rights {
            Rights::All | Rights::Slow | Rights::Superuser | Rights::Scopes => {}
            Rights::Networks => assert!(self.is_in_network(), "from {:?}", self.peer),
            Rights::Models => self.hold_models(),
            Rights::Endpoint => self.hold_endpoint(),
            Rights::Expired
            | Rights::Inactive
            | Rights::OwnerGone
            | Rights::Denied
            | Rights::Unreadable
            | Rights::Spent => panic!("{} is allowed", key.name),
        }
    }

    /// No credential and no made-up identity goes upstream.
    fn hold_back_credentials(&self, allow: &OkHttpResponse) {
        let removes = |name: &str| allow.headers_to_remove.iter().any(|own| own.eq_ignore_ascii_case(name));
        for carrier in ["authorization", "x-api-key", "api-key", "x-goog-api-key"] {
            assert!(removes(carrier) && said(allow, carrier).is_none(), "{carrier} goes upstream");
        }
        for (name, _) in &self.headers {
            if name.replace('_', "-").starts_with("x-keyward-") {
                assert!(
                    removes(name) || said(allow, name).is_some(),
                    "{name} goes upstream as the caller sent it"
                );
            }
        }
        let query = self.http.path.split_once('?').map(|(_, query)| query).unwrap_or_default();
        for part in query.split('&') {
            let raw = part.split('=').next().unwrap_or_default();
            let plain = raw.replace('+', "%2B");
            let name = form_urlencoded::parse(plain.as_bytes()).next().map(|(name, _)| name.into_owned());
            if name.as_deref() == Some("key") {
                assert!(allow.query_parameters_to_remove.iter().any(|own| own == raw), "{raw} goes upstream");
            }
        }
    }

    fn is_in_network(&self) -> bool {
        let Some(peer) = self.peer else { return false };
        match peer.to_canonical() {
            IpAddr::V4(v4) => v4.octets()[0] == 10,
            IpAddr::V6(v6) => v6.segments()[..2] == [0x2001, 0xdb8],
        }
    }

    fn path(&self) -> &str {
        self.http.path.split('?').next().unwrap_or_default()
    }

    fn hold_endpoint(&self) {
        let last = self.path().strip_prefix("/v1/chat/").expect("below /v1/chat/");
        assert_eq!(self.http.method, "POST");
        let decoded = super::decoded(last).expect("escapes are well formed");
        for text in [last.as_bytes(), &decoded] {
            assert!(!text.is_empty() && !text.iter().any(|byte| b"/\\;#?\0".contains(byte)), "{last:?}");
            assert!(!matches!(text.trim_ascii(), b"." | b".."), "{last:?}");
        }
    }

    /// Every model that any reader could find, and at least one where the path asks for one.
    fn hold_models(&self) {
        let (in_body, is_odd) = self.models_in_body();
        let mut found = in_body;
        if !self.model.is_empty() {
            found.push(self.model.clone());
        }
        let lower = self.path().to_lowercase();
        let is_main =
            ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"]
                .contains(&lower.trim_end_matches('/'));
        let is_good = |model: &str| model.starts_with("gpt-4o") || model == "claude-3";
        // On a path that takes no model a body that can't be read is not about models.
        if is_main || !(is_odd || self.is_cut_short()) {
            assert!(found.iter().all(|model| is_good(model)), "{found:?}");
        }
        let asks_only = matches!(&*self.http.method, "GET" | "HEAD" | "OPTIONS" | "DELETE");
        if is_main && !asks_only {
            assert!(!found.is_empty(), "no model is named");
        }
        if let Some(rest) = self.path().strip_prefix("/openai/deployments/") {
            let model =
                super::decoded(rest.split('/').next().unwrap_or_default()).expect("escapes are well formed");
            let model = String::from_utf8(model).expect("text");
            assert!(model.is_empty() || is_good(&model), "{model:?} in the path");
        }
    }

    /// The models that a JSON body names, and whether it names one in a form that it should not have.
    fn models_in_body(&self) -> (Vec<String>, bool) {
        let is_form = self.headers.iter().any(|(name, value)| {
            name == "content-type" && value.to_ascii_lowercase().windows(10).any(|part| part == b"multipart/")
        });
        let (mut found, mut is_odd, mut names) = (Vec::new(), false, Vec::new());
        let Ok(Members(members)) = serde_json::from_slice(&self.http.raw_body) else { return (found, true) };
        for (name, value) in members {
            match (name.to_uppercase().as_str(), value) {
                ("MODEL", Value::String(model)) => found.push(model),
                ("MODELS" | "FALLBACKS", Value::Array(list)) => {
                    is_odd |= list.len() > 64 || !list.iter().all(Value::is_string);
                    found.extend(list.iter().filter_map(Value::as_str).map(str::to_owned));
                }
                ("MODEL" | "MODELS" | "FALLBACKS", _) => is_odd = true,
                _ => continue,
            }
            is_odd |= names.contains(&name);
            names.push(name);
        }
        is_odd |= found.iter().any(|model| model.len() > 512);
        if is_form { (Vec::new(), true) } else { (found, is_odd) }
    }

    /// Or compressed: in either case nobody has read it.
    fn is_cut_short(&self) -> bool {
        let values = |name: &str| {
            self.headers.iter().filter(|(own, _)| own == name).map(|(_, value)| value).collect::<Vec<_>>()
        };
        let length = self.http.raw_body.len().to_string();
        let partial = values("x-envoy-auth-partial-body");
        let is_whole = match partial.as_slice() {
            [] => values("content-length") == [length.as_bytes()],
            [one] => one.as_slice() == b"false",
            _ => false,
        };
        !is_whole || !values("content-encoding").iter().all(|value| value.eq_ignore_ascii_case(b"identity"))
    }
}

/// What an allow sets a header to.
fn said<'a>(allow: &'a OkHttpResponse, name: &str) -> Option<&'a str> {
    let headers = allow.headers.iter().filter_map(|option| option.header.as_ref());
    headers.filter(|header| header.key.eq_ignore_ascii_case(name)).map(|header| header.value.as_str()).next()
}

/// The members of an object, each as often as it is there.
struct Members(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Members, A::Error> {
                let mut all = Vec::new();
                while let Some(member) = members.next_entry()? {
                    all.push(member);
                }
                Ok(Members(all))
            }
        }
        deserializer.deserialize_map(Object)
    }
}
