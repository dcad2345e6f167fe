//! Checks as Envoy sends them, without Envoy: for many of them, or for ones that Envoy would not send.

use std::net::SocketAddr;

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{Address, HeaderMap, HeaderValue, SocketAddress};
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request};
use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest, CheckResponse};
use envoy_types::pb::google::protobuf::value::Kind;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// How the headers are put into the request (`encode_raw_headers` of Envoy's filter).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// One string a name, repeated ones joined with a comma.
    Joined,
    /// One entry a line, as bytes.
    Raw,
}

/// A check in the making.
#[derive(Clone)]
pub(crate) struct Check {
    method: String,
    path: String,
    headers: Vec<(String, Vec<u8>)>,
    source: String,
    context_extensions: Vec<(String, String)>,
}

impl Check {
    pub(crate) fn new(method: &str, path: &str) -> Self {
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            headers: Vec::new(),
            source: "127.0.0.1".to_owned(),
            context_extensions: Vec::new(),
        }
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn bearer(self, key: &str) -> Self {
        self.header("authorization", format!("Bearer {key}"))
    }

    /// The socket peer of Envoy's downstream connection.
    pub(crate) fn source(mut self, ip: &str) -> Self {
        ip.clone_into(&mut self.source);
        self
    }

    /// What the Envoy route says.
    pub(crate) fn context_extension(mut self, name: &str, value: &str) -> Self {
        self.context_extensions.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The message, as Envoy would make it.
    pub(crate) fn build(self, encoding: Encoding) -> CheckRequest {
        let pseudo = [(":authority", "api.example.com"), (":method", &*self.method), (":path", &*self.path)]
            .map(|(name, value)| (name.to_owned(), value.as_bytes().to_vec()));
        let lines = pseudo.into_iter().chain(self.headers);
        let mut http = HttpRequest {
            id: "1".to_owned(),
            method: self.method.clone(),
            path: self.path.clone(),
            host: "api.example.com".to_owned(),
            scheme: "http".to_owned(),
            protocol: "HTTP/1.1".to_owned(),
            ..HttpRequest::default()
        };
        match encoding {
            Encoding::Raw => {
                let headers =
                    lines.map(|(key, raw_value)| HeaderValue { key, value: String::new(), raw_value });
                http.header_map = Some(HeaderMap { headers: headers.collect() });
            }
            Encoding::Joined => {
                for (name, value) in lines {
                    let value = String::from_utf8(value).expect("joined headers are text");
                    http.headers
                        .entry(name)
                        .and_modify(|joined| *joined = format!("{joined},{value}"))
                        .or_insert(value);
                }
            }
        }
        CheckRequest {
            attributes: Some(AttributeContext {
                source: Some(Peer { address: Some(address(&self.source)), ..Peer::default() }),
                request: Some(Request { http: Some(http), ..Request::default() }),
                context_extensions: self.context_extensions.into_iter().collect(),
                ..AttributeContext::default()
            }),
        }
    }
}

/// A connection to Keyward's gRPC port; clones share it.
#[derive(Clone)]
pub(crate) struct Authorizer(AuthorizationClient<Channel>);

impl Authorizer {
    pub(crate) async fn connect(addr: SocketAddr) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{addr}")).expect("an address makes a URL");
        Self(AuthorizationClient::new(endpoint.connect().await.expect("connect to Keyward")))
    }

    /// Asks; an RPC error is a failure.
    pub(crate) async fn check(&self, request: CheckRequest) -> Answer {
        self.try_check(request).await.expect("a check is answered")
    }

    /// The same where an RPC error is an outcome.
    pub(crate) async fn try_check(&self, request: CheckRequest) -> Result<Answer, Status> {
        let mut client = self.0.clone();
        client.check(request).await.map(|response| Answer(response.into_inner()))
    }
}

/// A reply, read the way Envoy reads it.
#[derive(Debug)]
pub(crate) struct Answer(pub(crate) CheckResponse);

impl Answer {
    /// Envoy lets a request through if and only if the status code is 0, or there is no status at all.
    pub(crate) fn allows(&self) -> bool {
        self.0.status.as_ref().is_none_or(|status| status.code == 0)
    }

    /// What the caller of a denied request gets.
    pub(crate) fn http_status(&self) -> i32 {
        match &self.0.http_response {
            Some(HttpResponse::DeniedResponse(denied)) => {
                denied.status.as_ref().map_or(403, |status| status.code)
            }
            Some(HttpResponse::OkResponse(_)) => 200,
            Some(HttpResponse::ErrorResponse(_)) | None => 0,
        }
    }

    /// The body that the caller of a denied request gets.
    pub(crate) fn body(&self) -> &str {
        match &self.0.http_response {
            Some(HttpResponse::DeniedResponse(denied)) => &denied.body,
            _ => "",
        }
    }

    /// A text of the dynamic metadata.
    pub(crate) fn metadata(&self, name: &str) -> Option<&str> {
        match self.0.dynamic_metadata.as_ref()?.fields.get(name)?.kind.as_ref()? {
            Kind::StringValue(text) => Some(text),
            _ => None,
        }
    }

    /// A header of either answer; the one that is set for the upstream, or the one that the caller gets.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let headers = match &self.0.http_response {
            Some(HttpResponse::OkResponse(ok)) => &ok.headers,
            Some(HttpResponse::DeniedResponse(denied) | HttpResponse::ErrorResponse(denied)) => {
                &denied.headers
            }
            None => return None,
        };
        headers.iter().filter_map(|option| option.header.as_ref()).find(|h| h.key == name).map(|h| &*h.value)
    }
}

fn address(ip: &str) -> Address {
    Address {
        address: Some(AddressKind::SocketAddress(SocketAddress {
            address: ip.to_owned(),
            port_specifier: Some(PortSpecifier::PortValue(40_000)),
            ..SocketAddress::default()
        })),
    }
}
