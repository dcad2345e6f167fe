//! Checks as Envoy writes them, from the parts that a target makes up.

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressForm;
use envoy_types::pb::envoy::config::core::v3::{Address, HeaderMap, HeaderValue, SocketAddress};
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request};
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
use prost::Message as _;

/// What a check says.
#[derive(Default)]
pub(crate) struct Parts<'a> {
    pub(crate) method: &'a str,
    pub(crate) target: &'a str,
    pub(crate) headers: Vec<(&'a str, &'a [u8])>,
    pub(crate) extensions: Vec<(&'a str, &'a str)>,
    pub(crate) source: Option<&'a str>,
    pub(crate) body: &'a [u8],
}

impl Parts<'_> {
    /// The message, with headers as a list of raw values.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let headers = self.headers.iter().map(|(name, value)| HeaderValue {
            key: (*name).to_owned(),
            value: String::new(),
            raw_value: value.to_vec(),
        });
        let http = HttpRequest {
            method: self.method.to_owned(),
            path: self.target.to_owned(),
            header_map: Some(HeaderMap { headers: headers.collect() }),
            raw_body: self.body.to_vec(),
            ..HttpRequest::default()
        };
        let source = self.source.map(|address| Peer {
            address: Some(Address {
                address: Some(AddressForm::SocketAddress(SocketAddress {
                    address: address.to_owned(),
                    ..SocketAddress::default()
                })),
            }),
            ..Peer::default()
        });
        let extensions =
            self.extensions.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let attributes = AttributeContext {
            source,
            request: Some(Request { time: None, http: Some(http) }),
            context_extensions: extensions.collect(),
            ..AttributeContext::default()
        };
        CheckRequest { attributes: Some(attributes) }.encode_to_vec()
    }
}

/// `name: value` lines; a line without a colon or with a name that is no text is left out.
pub(crate) fn header_lines(lines: &[u8]) -> Vec<(&str, &[u8])> {
    let mut headers = Vec::new();
    for line in lines.split(|byte| *byte == b'\n') {
        if let Some(colon) = line.iter().position(|byte| *byte == b':') {
            let value = &line[colon + 1..];
            let value = value.strip_prefix(b" ").unwrap_or(value);
            if let Ok(name) = std::str::from_utf8(&line[..colon]) {
                headers.push((name, value));
            }
        }
    }
    headers
}
