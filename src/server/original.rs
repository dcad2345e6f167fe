//! A proxy's question over HTTP to the message that Envoy would send about the same request.
//!
//! What the question says comes from two mouths: the proxy names the original request, and everything else in it was
//! copied from the caller. Which is which is the profile's word alone. A name that belongs to another profile is the
//! caller's, whatever it says; a name of this profile that is missing, there twice or unreadable is no request.

use axum::body::Bytes;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use envoy_types::pb::envoy::config::core::v3::address::Address as AddressForm;
use envoy_types::pb::envoy::config::core::v3::{
    Address, HeaderMap as HeaderList, HeaderValue as ListedHeader, SocketAddress,
};
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{
    HttpRequest, Peer, Request as RequestAttributes,
};
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
use std::collections::HashMap;

use super::options::{HttpProfile, is_token};
use crate::domain::path;

/// Where questions are asked.
pub(super) const QUESTION: &str = "/check";

/// What a check URL may ask for, as `context_extensions` do on an Envoy route.
const ROUTE_OPTIONS: [&str; 4] = ["required_scopes", "model", "anonymous", "consistency"];

/// Said by Envoy about the body that it sends along.
const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";

/// A question that names no original request, or more than one. It is never an allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoOriginal(pub(super) &'static str);

impl HttpProfile {
    /// Headers in which the proxy names the original request; no caller's header of these names gets here.
    const fn own_headers(self) -> &'static [&'static str] {
        match self {
            Self::Envoy => &[],
            Self::Nginx => &["x-original-method", "x-original-uri", "x-original-url"],
            Self::Traefik | Self::Caddy => &["x-forwarded-method", "x-forwarded-uri"],
        }
    }

    /// Whether a question may bring the original body. nginx and Caddy send none, but may leave its length in the head.
    pub(super) const fn sends_body(self) -> bool {
        matches!(self, Self::Envoy | Self::Traefik)
    }

    /// Whether the query of the check URL is the operator's. Caddy puts the caller's there.
    const fn has_own_query(self) -> bool {
        matches!(self, Self::Nginx | Self::Traefik)
    }
}

/// What Envoy would have said about the original request.
pub fn describe(profile: HttpProfile, head: &Parts, body: Bytes) -> Result<CheckRequest, NoOriginal> {
    let (method, target) = match profile {
        HttpProfile::Envoy => by_path(head)?,
        HttpProfile::Nginx => (method(&head.headers, "x-original-method")?, original_url(&head.headers)?),
        HttpProfile::Traefik | HttpProfile::Caddy => (
            method(&head.headers, "x-forwarded-method")?,
            target(required(&head.headers, "x-forwarded-uri")?)?,
        ),
    };
    let own_query = if profile.has_own_query() { head.uri.query() } else { None };
    let context_extensions = own_query.map_or_else(|| Ok(HashMap::new()), route_options)?;
    let is_callers = |name: &HeaderName| {
        let name = name.as_str();
        match profile {
            // Envoy writes the length of what it sends, which need not be all. Its own word on that is the other header.
            HttpProfile::Envoy => name != "content-length",
            _ => name != PARTIAL_BODY && !profile.own_headers().contains(&name),
        }
    };
    let callers = head.headers.iter().filter(|(name, _)| is_callers(name));
    let path = listed(":path", target.as_bytes());
    let headers =
        callers.map(|(name, value)| listed(name.as_str(), value.as_bytes())).chain([path]).collect();
    let http = HttpRequest {
        method: method.to_owned(),
        path: target.to_owned(),
        header_map: Some(HeaderList { headers }),
        raw_body: body.into(),
        ..HttpRequest::default()
    };
    let source =
        peer(profile, &head.headers).map(|address| Peer { address: Some(address), ..Peer::default() });
    let attributes = AttributeContext {
        source,
        request: Some(RequestAttributes { time: None, http: Some(http) }),
        context_extensions,
        ..AttributeContext::default()
    };
    Ok(CheckRequest { attributes: Some(attributes) })
}

/// Whether a question is at the right place, as far as its first line shows.
pub(super) fn is_question(profile: HttpProfile, head: &Parts) -> bool {
    match profile {
        HttpProfile::Envoy => below_question(head).is_some(),
        _ => head.uri.path() == QUESTION && matches!(head.method, Method::GET | Method::POST),
    }
}

/// The target below `/check`.
fn below_question(head: &Parts) -> Option<&str> {
    let target = head.uri.path_and_query()?.as_str().strip_prefix(QUESTION)?;
    target.starts_with('/').then_some(target)
}

fn by_path(head: &Parts) -> Result<(&str, &str), NoOriginal> {
    let below = below_question(head).ok_or(NoOriginal("nothing stands behind /check"))?;
    if head.headers.get_all(PARTIAL_BODY).iter().nth(1).is_some() {
        return Err(NoOriginal("x-envoy-auth-partial-body is there twice"));
    }
    Ok((head.method.as_str(), target(below)?))
}

/// `x-original-uri` (a path) or `x-original-url` (a whole URL, ingress-nginx).
fn original_url(headers: &HeaderMap) -> Result<&str, NoOriginal> {
    match (headers.contains_key("x-original-uri"), headers.contains_key("x-original-url")) {
        (true, true) => Err(NoOriginal("x-original-uri and x-original-url are both there")),
        (true, false) => target(required(headers, "x-original-uri")?),
        (false, _) => {
            let url = required(headers, "x-original-url")?;
            let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
            let (host, _) = rest.and_then(|rest| rest.split_once('/')).unwrap_or_default();
            let is_of_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:[]".contains(&byte);
            if host.is_empty() || !host.bytes().all(is_of_host) {
                return Err(NoOriginal("x-original-url is no URL of HTTP with a host and a path"));
            }
            target(rest.and_then(|rest| rest.get(host.len()..)).unwrap_or_default())
        }
    }
}

fn method<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str, NoOriginal> {
    let method = required(headers, name)?;
    if is_token(method) { Ok(method) } else { Err(NoOriginal("the original method is no method")) }
}

/// A path with its query, in visible ASCII: what may stand in a request line.
fn target(text: &str) -> Result<&str, NoOriginal> {
    if text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text)
    } else {
        Err(NoOriginal("the original path does not begin with / or has other bytes than visible ASCII"))
    }
}

/// A header that the proxy sends once.
fn required<'a>(headers: &'a HeaderMap, name: &str) -> Result<&'a str, NoOriginal> {
    let mut values = headers.get_all(name).iter();
    match (values.next().map(HeaderValue::to_str), values.next()) {
        (Some(Ok(value)), None) if !value.is_empty() => Ok(value),
        (None, _) => Err(NoOriginal("a header that names the original request is missing")),
        _ => Err(NoOriginal("a header that names the original request is empty, no text, or there twice")),
    }
}

/// The options of the check URL. A misspelt one would be a rule that does not hold.
fn route_options(query: &str) -> Result<HashMap<String, String>, NoOriginal> {
    let mut options = HashMap::new();
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let value = path::decode(value).and_then(|value| String::from_utf8(value).ok());
        let value = value.filter(|_| ROUTE_OPTIONS.contains(&name));
        let added = value.map(|value| options.insert(name.to_owned(), value));
        if !matches!(added, Some(None)) {
            return Err(NoOriginal("the check URL has an option that is unknown, unreadable or there twice"));
        }
    }
    Ok(options)
}

/// Who connected to the proxy: what it put at the right end of `x-forwarded-for`. Envoy leaves the caller's own there
/// unless it is told otherwise, so it has to be asked for (`--client-ip xff:1`).
fn peer(profile: HttpProfile, headers: &HeaderMap) -> Option<Address> {
    if profile == HttpProfile::Envoy {
        return None;
    }
    let address = required(headers, "x-forwarded-for").ok()?.rsplit(',').next()?.trim().to_owned();
    let address = SocketAddress { address, ..SocketAddress::default() };
    Some(Address { address: Some(AddressForm::SocketAddress(address)) })
}

fn listed(name: &str, value: &[u8]) -> ListedHeader {
    ListedHeader { key: name.to_owned(), value: String::new(), raw_value: value.to_vec() }
}

#[cfg(test)]
mod tests {
    use axum::http::Request;
    use hyper::HeaderMap as Metadata;
    use prost::Message;

    use super::super::check_view::CheckView;
    use super::super::options::ClientIpSource;
    use super::super::request::Inbound;
    use super::*;

    fn head(target: &str, headers: &[(&str, &str)]) -> Parts {
        let request = Request::builder().method("GET").uri(target);
        let request =
            headers.iter().fold(request, |request, (name, value)| request.header(*name, value.as_bytes()));
        request.body(()).unwrap().into_parts().0
    }

    /// Method and target as understood, or nothing.
    fn original(profile: &str, target: &str, headers: &[(&str, &str)]) -> Option<(String, String)> {
        let profile: HttpProfile = profile.parse().unwrap();
        let check = describe(profile, &head(target, headers), Bytes::new()).ok()?;
        let bytes = check.encode_to_vec();
        let view = CheckView::read(&bytes).unwrap();
        let inbound = Inbound::read(&view, &Metadata::new(), &ClientIpSource::Peer).unwrap();
        Some((inbound.request.method.to_owned(), inbound.target.to_owned()))
    }

    fn is(found: Option<(String, String)>, method: &str, target: &str) -> bool {
        found.is_some_and(|(own_method, own_target)| own_method == method && own_target == target)
    }

    #[test]
    fn each_profile_believes_its_own_names_and_no_others() {
        let forwarded = [("x-forwarded-method", "PUT"), ("x-forwarded-uri", "/f?a=b")];
        let named = [("x-original-method", "DELETE"), ("x-original-uri", "/o")];
        let all = [forwarded, named].concat();
        assert!(is(original("envoy", "/check/v1/x?a=/check/y", &all), "GET", "/v1/x?a=/check/y"));
        assert!(is(original("nginx", "/check", &all), "DELETE", "/o"));
        assert!(is(original("traefik", "/check", &all), "PUT", "/f?a=b"));
        assert!(is(original("caddy", "/check?model=x&zzz", &all), "PUT", "/f?a=b"));
        assert_eq!(original("nginx", "/check", &forwarded), None);
        assert_eq!(original("traefik", "/check", &named), None);
        assert_eq!(original("envoy", "/check", &all), None);
        assert_eq!(original("envoy", "/checked/x", &all), None);
    }

    #[test]
    fn what_is_missing_doubled_or_unreadable_is_no_request() {
        for headers in [
            vec![("x-original-uri", "/o")],
            vec![("x-original-method", "GET")],
            vec![("x-original-method", "GET"), ("x-original-method", "GET"), ("x-original-uri", "/o")],
            vec![("x-original-method", "GET"), ("x-original-uri", "/o"), ("x-original-uri", "/o")],
            vec![("x-original-method", "GET"), ("x-original-uri", "/o"), ("x-original-url", "http://h/o")],
            vec![("x-original-method", "GET, PUT"), ("x-original-uri", "/o")],
            vec![("x-original-method", ""), ("x-original-uri", "/o")],
            vec![("x-original-method", "GET"), ("x-original-uri", "")],
            vec![("x-original-method", "GET"), ("x-original-uri", "o")],
            vec![("x-original-method", "GET"), ("x-original-uri", "/o /p")],
            vec![("x-original-method", "GET"), ("x-original-uri", "/ö")],
            vec![("x-original-method", "GET"), ("x-original-url", "/o")],
            vec![("x-original-method", "GET"), ("x-original-url", "http://h?x/o")],
            vec![("x-original-method", "GET"), ("x-original-url", "http:///o")],
            vec![("x-original-method", "GET"), ("x-original-url", "ftp://h/o")],
        ] {
            assert_eq!(original("nginx", "/check", &headers), None, "{headers:?}");
        }
        let url = [("x-original-method", "GET"), ("x-original-url", "https://[::1]:8443/o?p=http://q/r")];
        assert!(is(original("nginx", "/check", &url), "GET", "/o?p=http://q/r"));
    }

    #[test]
    fn the_check_url_s_options_are_read_where_they_are_the_operator_s() {
        let named = [("x-original-method", "GET"), ("x-original-uri", "/o")];
        let forwarded = [("x-forwarded-method", "GET"), ("x-forwarded-uri", "/o")];
        let target = "/check?anonymous=allow&required_scopes=a%2Cb";
        let options = |profile: HttpProfile, headers: &[(&str, &str)]| {
            let check = describe(profile, &head(target, headers), Bytes::new()).unwrap();
            let bytes = check.encode_to_vec();
            let view = CheckView::read(&bytes).unwrap();
            let inbound = Inbound::read(&view, &Metadata::new(), &ClientIpSource::Peer).unwrap();
            (inbound.request.route.allows_anonymous, inbound.request.route.required_scopes.to_owned())
        };
        assert_eq!(options(HttpProfile::Nginx, &named), (true, "a,b".to_owned()));
        assert_eq!(options(HttpProfile::Traefik, &forwarded), (true, "a,b".to_owned()));
        assert_eq!(options(HttpProfile::Caddy, &forwarded), (false, String::new()));
        for bad in ["/check?required_scope=a", "/check?model=a&model=b", "/check?model=%zz"] {
            assert_eq!(original("nginx", bad, &named), None, "{bad}");
        }
    }

    #[test]
    fn a_body_is_whole_only_by_envoy_s_word() {
        let is_whole = |profile: HttpProfile, target: &str, headers: &[(&str, &str)]| {
            let check = describe(profile, &head(target, headers), Bytes::from_static(b"12345"));
            let bytes = check.ok()?.encode_to_vec();
            let view = CheckView::read(&bytes).unwrap();
            Inbound::read(&view, &Metadata::new(), &ClientIpSource::Peer).map(|it| it.request.body.is_whole)
        };
        let length = ("content-length", "5");
        let envoy = |headers: &[(&str, &str)]| is_whole(HttpProfile::Envoy, "/check/x", headers);
        assert_eq!(envoy(&[length]), Some(false));
        assert_eq!(envoy(&[length, (PARTIAL_BODY, "true")]), Some(false));
        assert_eq!(envoy(&[length, (PARTIAL_BODY, "false")]), Some(true));
        assert_eq!(envoy(&[length, (PARTIAL_BODY, "true"), (PARTIAL_BODY, "false")]), None);
        let forwarded = [("x-forwarded-method", "POST"), ("x-forwarded-uri", "/o"), length];
        assert_eq!(is_whole(HttpProfile::Traefik, "/check", &forwarded), Some(true));
        let cut = [("x-forwarded-method", "POST"), ("x-forwarded-uri", "/o"), (PARTIAL_BODY, "false")];
        assert_eq!(is_whole(HttpProfile::Traefik, "/check", &cut), Some(false));
    }

    #[test]
    fn the_client_is_the_last_address_that_the_proxy_wrote() {
        let client = |profile: HttpProfile, values: &[&str]| {
            let own = [("x-forwarded-method", "GET"), ("x-forwarded-uri", "/o")];
            let all: Vec<_> =
                own.into_iter().chain(values.iter().map(|it| ("x-forwarded-for", *it))).collect();
            let check = describe(profile, &head("/check/o", &all), Bytes::new()).unwrap();
            let bytes = check.encode_to_vec();
            let view = CheckView::read(&bytes).unwrap();
            let inbound = Inbound::read(&view, &Metadata::new(), &ClientIpSource::Peer).unwrap();
            inbound.request.client.map(|ip| ip.to_string())
        };
        assert_eq!(client(HttpProfile::Caddy, &["10.0.0.1, 192.0.2.7"]).as_deref(), Some("192.0.2.7"));
        assert_eq!(client(HttpProfile::Caddy, &["10.0.0.1", "192.0.2.7"]), None);
        assert_eq!(client(HttpProfile::Caddy, &[]), None);
        assert_eq!(client(HttpProfile::Envoy, &["192.0.2.7"]), None);
    }
}
