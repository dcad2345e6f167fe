//! The check as our reader finds it, against what prost makes of the same bytes.

use envoy_types::pb::envoy::config::core::v3::HeaderValue;
use envoy_types::pb::envoy::config::core::v3::address::Address as AddressForm;
use envoy_types::pb::envoy::service::auth::v3::CheckRequest;
use keyward::server::check_view::{CheckView, PeerView};
use keyward::server::protobuf::Malformed;
use prost::Message as _;

pub(crate) fn run(data: &[u8]) {
    let Ok(expected) = CheckRequest::decode(data) else {
        // Ours may read it all the same, because it passes over what it does not need.
        let _ = CheckView::read(data);
        return;
    };
    let view = match CheckView::read(data) {
        // No sender of ours writes those.
        Err(Malformed::Group) => return,
        other => other.expect("prost reads it"),
    };
    let attributes = expected.attributes.unwrap_or_default();
    let peer = match attributes.source.and_then(|peer| peer.address).and_then(|address| address.address) {
        None => None,
        Some(AddressForm::SocketAddress(socket)) => Some(Some(socket.address)),
        Some(_) => Some(None),
    };
    let own = match view.peer {
        PeerView::Unknown => None,
        PeerView::Socket(text) => Some(Some(text.to_owned())),
        PeerView::Other => Some(None),
    };
    assert_eq!(own, peer);
    for (name, value) in &attributes.context_extensions {
        assert_eq!(view.extension(name), Some(value.as_str()));
    }
    for (name, _) in &view.extensions {
        assert!(attributes.context_extensions.contains_key(*name), "{name}");
    }
    let http = attributes.request.and_then(|request| request.http);
    assert_eq!(view.http.is_some(), http.is_some());
    let (Some(own), Some(http)) = (view.http, http) else { return };
    assert_eq!((own.method, own.path, own.raw_body), (&*http.method, &*http.path, &*http.raw_body));
    assert_eq!(own.has_header_map, http.header_map.is_some());
    let listed = http.header_map.unwrap_or_default().headers;
    let raw = |header: &HeaderValue| match header.raw_value.as_slice() {
        [] => header.value.clone().into_bytes(),
        raw => raw.to_vec(),
    };
    let all = || view.headers.iter().map(|(name, value)| (name.to_owned(), value.to_vec()));
    let mut theirs: Vec<(String, Vec<u8>)> =
        listed.iter().map(|header| (header.key.clone(), raw(header))).collect();
    theirs.extend(http.headers.iter().map(|(name, value)| (name.clone(), value.clone().into_bytes())));
    for header in &theirs {
        assert!(all().any(|own| own == *header), "{} is missing", header.0);
    }
    // More of ours: only a name that stands twice in the map, of which a map keeps the last.
    for (name, value) in all() {
        let is_hidden = all().filter(|(own, _)| *own == name).count() > 1 && http.headers.contains_key(&name);
        assert!(is_hidden || theirs.contains(&(name.clone(), value)), "{name} is made up");
    }
}
