//! A check's attributes to the domain's request: method, path, client, route options.

use std::net::IpAddr;

use hyper::HeaderMap;

use super::check_view::{CheckView, HttpView, PeerView};
use super::headers::Headers;
use super::options::ClientIpSource;
use crate::domain::body::Body;
use crate::domain::request::{Request, RouteOptions};

/// One HTTP request as Envoy described it.
pub struct Inbound<'a> {
    /// What policy may read.
    pub request: Request<'a>,
    /// All of them.
    pub headers: &'a Headers<'a>,
    /// Path and query as sent.
    pub target: &'a str,
}

impl<'a> Inbound<'a> {
    /// `None` where the check is not about an HTTP request (Envoy's TCP filter asks with addresses alone). `metadata` is
    /// that of the call.
    pub fn read(check: &'a CheckView<'a>, metadata: &HeaderMap, client_ip: &ClientIpSource) -> Option<Self> {
        let http = check.http.as_ref()?;
        let headers = &check.headers;
        let request = Request {
            method: http.method,
            path: path(http, headers),
            client: client(client_ip, check, metadata),
            route: route_options(check),
            body: body(http, headers),
        };
        // Envoy puts the query into `path` and leaves `query` empty.
        Some(Self { request, headers, target: http.path })
    }

    /// Whether the caller is a gRPC client, by Envoy's own rule: `application/grpc`, alone or with a `+suffix`.
    /// gRPC-Web is none: its clients read HTTP.
    pub fn is_grpc(&self) -> bool {
        let content_type = self.headers.text("content-type").unwrap_or_default();
        content_type
            .strip_prefix("application/grpc")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
    }

    /// The id that Envoy gave the request, for error bodies and logs; foreign text, so only a plain one is used.
    pub fn request_id(&self) -> Option<&'a str> {
        let is_plain = |id: &&str| {
            !id.is_empty()
                && id.len() <= 128
                && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        self.headers.text("x-request-id").filter(is_plain)
    }
}

/// Without the query. Empty, which no list admits, where the upstream may get something else: Envoy writes `!` for every
/// byte that is no UTF-8 (HTTP/2 lets them pass), and only `encode_raw_headers` shows which ones were none.
fn path<'a>(http: &HttpView<'a>, headers: &Headers<'a>) -> &'a str {
    let path = http.path.split_once('?').map_or(http.path, |(path, _)| path);
    let is_as_sent = || {
        let mut raw = headers.values(":path");
        http.has_header_map && raw.next().is_some_and(|raw| raw.starts_with(path.as_bytes()))
    };
    if path.contains('!') && !is_as_sent() { "" } else { path }
}

fn route_options<'a>(check: &CheckView<'a>) -> RouteOptions<'a> {
    if check.extensions.is_empty() {
        return RouteOptions::default();
    }
    let option = |name: &str| check.extension(name).map(str::trim);
    RouteOptions {
        required_scopes: option("required_scopes").unwrap_or_default(),
        model: option("model").unwrap_or_default(),
        allows_anonymous: option("anonymous") == Some("allow"),
        is_strict: option("consistency") == Some("strict"),
    }
}

/// Only as bytes (`pack_as_bytes`): as text Envoy puts `!` for what is no UTF-8, and the upstream gets something else.
fn body<'a>(http: &HttpView<'a>, headers: &Headers<'a>) -> Body<'a> {
    if http.raw_body.is_empty() {
        return Body::default();
    }
    // Envoy's own word where it has one; a caller's header of this name does not get here.
    let is_whole = if let Some(partial) = headers.text("x-envoy-auth-partial-body") {
        partial == "false"
    } else {
        let announced = headers.text("content-length").and_then(|length| length.parse::<usize>().ok());
        announced == Some(http.raw_body.len())
    };
    // Several of them, or one that is no text, are as good as an unknown one.
    let single = |name: &str| {
        headers.text(name).or_else(|| headers.values(name).next().map(|_| "?")).unwrap_or_default()
    };
    let (encoding, content_type) = (single("content-encoding"), single("content-type"));
    Body { bytes: Some(http.raw_body), is_whole, encoding, content_type }
}

fn client(source: &ClientIpSource, check: &CheckView<'_>, metadata: &HeaderMap) -> Option<IpAddr> {
    let headers = &check.headers;
    match source {
        ClientIpSource::Peer => match check.peer {
            PeerView::Socket(address) => address.parse().ok(),
            // A unix socket has none.
            PeerView::Other | PeerView::Unknown => None,
        },
        ClientIpSource::Header(name) => headers.text(name)?.trim().parse().ok(),
        ClientIpSource::Metadata(name) => {
            let mut values = metadata.get_all(name).iter();
            match (values.next(), values.next()) {
                (Some(value), None) => value.to_str().ok()?.trim().parse().ok(),
                _ => None,
            }
        }
        ClientIpSource::Xff(position) => {
            let values: Vec<&str> =
                headers.values("x-forwarded-for").map(std::str::from_utf8).collect::<Result<_, _>>().ok()?;
            let mut from_the_right = values.iter().rev().flat_map(|value| value.rsplit(','));
            from_the_right.nth(position.get().checked_sub(1)?)?.trim().parse().ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::address::Address;
    use envoy_types::pb::envoy::config::core::v3::{
        Address as CoreAddress, HeaderMap as HeaderList, HeaderValue, SocketAddress,
    };
    use envoy_types::pb::envoy::service::auth::v3::attribute_context::{
        HttpRequest, Peer, Request as RequestAttributes,
    };
    use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
    use prost::Message;

    use super::*;

    fn check(headers: &[(&str, &str)]) -> CheckRequest {
        let http = HttpRequest {
            method: "GET".into(),
            path: "/v1/x?a=b".into(),
            headers: headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
            ..HttpRequest::default()
        };
        let address =
            Address::SocketAddress(SocketAddress { address: "10.1.2.3".into(), ..SocketAddress::default() });
        let source = Peer { address: Some(CoreAddress { address: Some(address) }), ..Peer::default() };
        let attributes = AttributeContext {
            source: Some(source),
            request: Some(RequestAttributes { time: None, http: Some(http) }),
            ..AttributeContext::default()
        };
        CheckRequest { attributes: Some(attributes) }
    }

    /// What is read of a check, handed to `look`.
    fn read<T>(check: &CheckRequest, look: impl FnOnce(Option<Inbound<'_>>) -> T) -> T {
        let bytes = check.encode_to_vec();
        let view = CheckView::read(&bytes).unwrap();
        look(Inbound::read(&view, &HeaderMap::new(), &ClientIpSource::Peer))
    }

    fn client_of(source: &str, headers: &[(&str, &str)], metadata: &HeaderMap) -> Option<String> {
        let bytes = check(headers).encode_to_vec();
        let view = CheckView::read(&bytes).unwrap();
        let inbound = Inbound::read(&view, metadata, &source.parse().unwrap()).unwrap();
        inbound.request.client.map(|ip| ip.to_string())
    }

    #[test]
    fn a_check_without_an_http_request_is_none() {
        let is_some = |check: &CheckRequest| read(check, |inbound| inbound.is_some());
        assert!(is_some(&check(&[])));
        assert!(!is_some(&CheckRequest::default()));
        assert!(!is_some(&CheckRequest { attributes: Some(AttributeContext::default()) }));
    }

    #[test]
    fn the_path_is_cut_at_its_query() {
        read(&check(&[]), |inbound| {
            let inbound = inbound.unwrap();
            assert_eq!((inbound.request.path, inbound.target), ("/v1/x", "/v1/x?a=b"));
        });
    }

    #[test]
    fn an_exclamation_mark_in_the_path_is_believed_only_where_the_bytes_show_it() {
        let raw = |path: &[u8]| {
            let header =
                HeaderValue { key: ":path".into(), raw_value: path.to_vec(), ..HeaderValue::default() };
            Some(HeaderList { headers: vec![header] })
        };
        for (header_map, expected) in [
            (raw(b"/v1/a!?b=\xff"), "/v1/a!"),
            (raw(b"/v1/a\xff?b=c"), ""),
            (Some(HeaderList::default()), ""),
            (None, ""),
        ] {
            let mut check = check(&[]);
            let http = check.attributes.as_mut().unwrap().request.as_mut().unwrap().http.as_mut().unwrap();
            (http.path, http.header_map) = ("/v1/a!?b=c".into(), header_map);
            read(&check, |inbound| assert_eq!(inbound.unwrap().request.path, expected));
        }
    }

    #[test]
    fn the_client_s_address_by_each_source() {
        let mut metadata = HeaderMap::new();
        metadata.insert("client", "192.0.2.7".parse().unwrap());
        let headers =
            [("x-forwarded-for", "1.1.1.1, 2.2.2.2,3.3.3.3"), ("x-real-ip", "4.4.4.4"), ("bad", "5.5")];
        for (source, expected) in [
            ("peer", Some("10.1.2.3")),
            ("xff:1", Some("3.3.3.3")),
            ("xff:2", Some("2.2.2.2")),
            ("xff:3", Some("1.1.1.1")),
            ("xff:4", None),
            ("header:x-real-ip", Some("4.4.4.4")),
            ("header:bad", None),
            ("header:none", None),
            ("metadata:client", Some("192.0.2.7")),
            ("metadata:none", None),
        ] {
            assert_eq!(client_of(source, &headers, &metadata).as_deref(), expected, "{source}");
        }
    }

    #[test]
    fn grpc_web_is_not_grpc() {
        for (content_type, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;x", true),
            ("application/grpc-web", false),
            ("application/json", false),
        ] {
            let check = check(&[("content-type", content_type)]);
            read(&check, |inbound| assert_eq!(inbound.unwrap().is_grpc(), expected, "{content_type}"));
        }
    }
}
