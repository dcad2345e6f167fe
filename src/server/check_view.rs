//! Envoy's `CheckRequest`, read where it lies: the parts that a check needs, borrowed from the message's bytes.
//!
//! The same as generated code would find (`tests` hold the two against each other), with two differences. A header's
//! value may be any bytes: Envoy writes text, and whoever needs text looks. And a header that stands twice in the map, as
//! no sender writes it, is seen twice, so that neither hides the other.

use super::headers::Headers;
use super::protobuf::{Fields, Malformed, Value};

/// What is read of one check. There is no `Debug`: it holds the key.
#[derive(Default)]
pub struct CheckView<'a> {
    /// The HTTP request; `None` where Envoy's TCP filter asks, with addresses alone.
    pub http: Option<HttpView<'a>>,
    /// The headers of that request.
    pub headers: Headers<'a>,
    /// The address of the socket's peer.
    pub peer: PeerView<'a>,
    /// `context_extensions` of the route.
    pub extensions: Vec<(&'a str, &'a str)>,
}

/// Who asked Envoy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PeerView<'a> {
    /// The check does not say.
    #[default]
    Unknown,
    /// A socket, by the text of its address.
    Socket(&'a str),
    /// Something that has no address: a unix socket, or Envoy itself.
    Other,
}

/// The request, less its headers.
#[derive(Clone, Copy, Default)]
pub struct HttpView<'a> {
    /// `method`
    pub method: &'a str,
    /// `path`, with the query.
    pub path: &'a str,
    /// `raw_body`
    pub raw_body: &'a [u8],
    /// Whether the headers came as a list of raw values (`encode_raw_headers`).
    pub has_header_map: bool,
}

impl<'a> CheckView<'a> {
    /// Reads a `CheckRequest`.
    pub fn read(message: &'a [u8]) -> Result<Self, Malformed> {
        let mut view = Self::default();
        for field in Fields::new(message) {
            if let (1, attributes) = field? {
                view.read_attributes(attributes.message()?)?;
            }
        }
        Ok(view)
    }

    /// The value of an extension of the route.
    pub fn extension(&self, name: &str) -> Option<&'a str> {
        // In a map the last one counts.
        self.extensions.iter().rev().find(|(own, _)| *own == name).map(|(_, value)| *value)
    }

    /// `AttributeContext`
    fn read_attributes(&mut self, attributes: Fields<'a>) -> Result<(), Malformed> {
        for field in attributes {
            match field? {
                (1, source) => self.peer.read(source.message()?)?,
                (4, request) => self.read_request(request.message()?)?,
                (10, extension) => {
                    let (name, value) = entry(extension)?;
                    self.extensions.push((text(name)?, text(value)?));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// `AttributeContext.Request`
    fn read_request(&mut self, request: Fields<'a>) -> Result<(), Malformed> {
        for field in request {
            if let (2, http) = field? {
                self.read_http(http.message()?)?;
            }
        }
        Ok(())
    }

    /// `AttributeContext.HttpRequest`
    fn read_http(&mut self, fields: Fields<'a>) -> Result<(), Malformed> {
        let http = self.http.get_or_insert_default();
        for field in fields {
            match field? {
                (2, method) => http.method = method.text()?,
                (3, header) => {
                    let (name, value) = entry(header)?;
                    self.headers.push(text(name)?, value);
                }
                (4, path) => http.path = path.text()?,
                (12, body) => http.raw_body = body.bytes()?,
                (13, list) => {
                    http.has_header_map = true;
                    for field in list.message()? {
                        if let (1, header) = field? {
                            self.headers.read_listed(header.message()?)?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl<'a> PeerView<'a> {
    /// `AttributeContext.Peer`
    fn read(&mut self, peer: Fields<'a>) -> Result<(), Malformed> {
        for field in peer {
            if let (1, address) = field? {
                self.read_address(address.message()?)?;
            }
        }
        Ok(())
    }

    /// `core.v3.Address`: one of three, the last one counts.
    fn read_address(&mut self, address: Fields<'a>) -> Result<(), Malformed> {
        for field in address {
            match field? {
                (1, socket) => {
                    let mut text = if let Self::Socket(before) = self { before } else { "" };
                    for field in socket.message()? {
                        if let (2, address) = field? {
                            text = address.text()?;
                        }
                    }
                    *self = Self::Socket(text);
                }
                (2 | 3, other) => {
                    other.message()?;
                    *self = Self::Other;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl<'a> Headers<'a> {
    /// `core.v3.HeaderValue`
    fn read_listed(&mut self, header: Fields<'a>) -> Result<(), Malformed> {
        let (mut name, mut value, mut raw) = ("", &b""[..], &b""[..]);
        for field in header {
            match field? {
                (1, key) => name = key.text()?,
                (2, text) => value = text.bytes()?,
                (3, bytes) => raw = bytes.bytes()?,
                _ => {}
            }
        }
        self.push(name, if raw.is_empty() { value } else { raw });
        Ok(())
    }
}

/// One entry of a map: name and value, empty where they are missing.
fn entry(entry: Value<'_>) -> Result<(&[u8], &[u8]), Malformed> {
    let (mut name, mut value) = (&b""[..], &b""[..]);
    for field in entry.message()? {
        match field? {
            (1, key) => name = key.bytes()?,
            (2, bytes) => value = bytes.bytes()?,
            _ => {}
        }
    }
    Ok((name, value))
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|_| Malformed::NoText)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::address::Address as AddressForm;
    use envoy_types::pb::envoy::config::core::v3::{Address, HeaderMap, HeaderValue, Pipe, SocketAddress};
    use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Peer, Request};
    use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    /// Holds what is read against what generated code makes of the same bytes. `None` where that refuses them.
    fn agrees_with_generated_code(bytes: &[u8]) -> Option<Result<(), String>> {
        let expected = CheckRequest::decode(bytes).ok()?;
        Some(match CheckView::read(bytes) {
            Err(Malformed::Group) => Ok(()),
            Err(defect) => Err(format!("refused: {defect}")),
            Ok(view) => compare(&view, &expected),
        })
    }

    fn compare(view: &CheckView<'_>, expected: &CheckRequest) -> Result<(), String> {
        let differs = |what: &str| Err(what.to_owned());
        let attributes = expected.attributes.clone().unwrap_or_default();
        let peer = match attributes.source.and_then(|peer| peer.address).and_then(|address| address.address) {
            None => PeerView::Unknown,
            Some(AddressForm::SocketAddress(socket)) if view.peer == PeerView::Socket(&socket.address) => {
                view.peer
            }
            Some(AddressForm::SocketAddress(_)) => return differs("address"),
            Some(_) => PeerView::Other,
        };
        if peer != view.peer {
            return differs("peer");
        }
        for (name, value) in &attributes.context_extensions {
            if view.extension(name) != Some(value) {
                return differs("extension");
            }
        }
        let http = attributes.request.and_then(|request| request.http);
        match (&view.http, http) {
            (None, None) => Ok(()),
            (Some(own), Some(http)) => {
                if (own.method, own.path, own.raw_body) != (&*http.method, &*http.path, &*http.raw_body)
                    || own.has_header_map != http.header_map.is_some()
                {
                    return differs("request");
                }
                let mut listed = http.header_map.unwrap_or_default().headers;
                let mut map = http.headers;
                for (name, value) in view.headers.iter() {
                    let raw = |header: &HeaderValue| {
                        if header.raw_value.is_empty() {
                            header.value.clone().into_bytes()
                        } else {
                            header.raw_value.clone()
                        }
                    };
                    if let Some(at) =
                        listed.iter().position(|header| header.key == name && raw(header) == value)
                    {
                        listed.remove(at);
                    } else if map.get(name).is_some_and(|own| own.as_bytes() == value) {
                        map.remove(name);
                    } else if !is_doubled(view, name) {
                        return differs("a header too many");
                    }
                }
                if listed.is_empty() && map.is_empty() { Ok(()) } else { differs("a header is missing") }
            }
            _ => differs("presence of the request"),
        }
    }

    fn is_doubled(view: &CheckView<'_>, name: &str) -> bool {
        view.headers.iter().filter(|(own, _)| *own == name).count() > 1
    }

    fn sample() -> CheckRequest {
        let header = |key: &str, value: &str, raw: &[u8]| HeaderValue {
            key: key.into(),
            value: value.into(),
            raw_value: raw.to_vec(),
        };
        let http = HttpRequest {
            id: "1".into(),
            method: "POST".into(),
            path: "/v1/x?a=b".into(),
            host: "h".into(),
            headers: [("a", "b"), ("authorization", "Bearer kw_0123456789"), ("empty", "")]
                .map(|(name, value)| (name.into(), value.into()))
                .into(),
            header_map: Some(HeaderMap { headers: vec![header("r", "", b"\xff"), header("t", "text", b"")] }),
            size: -1,
            raw_body: b"{}".to_vec(),
            ..HttpRequest::default()
        };
        let socket = SocketAddress { address: "10.1.2.3".into(), ..SocketAddress::default() };
        let source = Peer {
            address: Some(Address { address: Some(AddressForm::SocketAddress(socket)) }),
            principal: "spiffe://x".into(),
            ..Peer::default()
        };
        let attributes = AttributeContext {
            source: Some(source.clone()),
            destination: Some(source),
            request: Some(Request { time: None, http: Some(http) }),
            context_extensions: [("model", "m"), ("anonymous", "allow")]
                .map(|(a, b)| (a.into(), b.into()))
                .into(),
            ..AttributeContext::default()
        };
        CheckRequest { attributes: Some(attributes) }
    }

    #[test]
    fn a_whole_check_reads_as_generated_code_reads_it() {
        let bytes = sample().encode_to_vec();
        assert_eq!(agrees_with_generated_code(&bytes), Some(Ok(())));
        let view = CheckView::read(&bytes).unwrap();
        assert_eq!(view.headers.text("authorization"), Some("Bearer kw_0123456789"));
        assert_eq!(view.headers.values("r").collect::<Vec<_>>(), [b"\xff"]);
        assert_eq!((view.peer, view.extension("model")), (PeerView::Socket("10.1.2.3"), Some("m")));
        assert_eq!(view.extension("none"), None);
    }

    /// Messages that stand twice are one on top of the other, and of single fields the last one counts.
    #[test]
    fn a_check_in_pieces_reads_as_generated_code_reads_it() {
        let mut other = sample();
        let attributes = other.attributes.as_mut().unwrap();
        attributes.request.as_mut().unwrap().http.as_mut().unwrap().path = "/other".into();
        attributes.source.as_mut().unwrap().address =
            Some(Address { address: Some(AddressForm::Pipe(Pipe::default())) });
        for pieces in [[sample(), other.clone()], [other, sample()]] {
            let bytes = pieces.map(|piece| piece.encode_to_vec()).concat();
            assert_eq!(agrees_with_generated_code(&bytes), Some(Ok(())));
        }
        assert_eq!(agrees_with_generated_code(&[]), Some(Ok(())));
        assert!(CheckView::read(&[]).unwrap().http.is_none());
    }

    #[test]
    fn a_header_twice_in_the_map_is_seen_twice() {
        let entry = [0x0a, 1, b'a', 0x12, 1];
        let http = [&[0x1a, 6][..], &entry, b"1", &[0x1a, 6], &entry, b"2"].concat();
        let wrapped = |number: u8, bytes: &[u8]| {
            [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()][..], bytes].concat()
        };
        let check = wrapped(1, &wrapped(4, &wrapped(2, &http)));
        let view = CheckView::read(&check).unwrap();
        assert_eq!(view.headers.values("a").collect::<Vec<_>>(), [b"1", b"2"]);
        assert_eq!(view.headers.text("a"), None);
    }

    proptest! {
        /// Wherever a check is cut or changed: what generated code reads, this reads alike.
        #[test]
        fn damaged_checks_read_as_generated_code_reads_them(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            end in any::<prop::sample::Index>(),
            is_cut in any::<bool>(),
        ) {
            let mut bytes = sample().encode_to_vec();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if is_cut {
                bytes.truncate(end.index(bytes.len()));
            }
            if let Some(agreed) = agrees_with_generated_code(&bytes) {
                prop_assert_eq!(agreed, Ok(()));
            }
        }
    }
}
