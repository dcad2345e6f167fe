//! Keys in the query, against the crate `form_urlencoded`.
//!
//! The two differ by design in one point: a plus sign is itself to us.

use keyward::domain::path::decode;
use keyward::server::check_view::CheckView;
use keyward::server::credentials::{find, query_spellings};
use keyward::server::options::{CredentialConflict, CredentialSource};

use super::wire::Parts;
use super::{decoded, is_key};

pub(crate) fn run(data: &[u8]) {
    let Ok(query) = std::str::from_utf8(data) else { return };
    assert_eq!(decode(query), decoded(query));
    let target = format!("/v1/models?{query}");
    let message = Parts { target: &target, ..Parts::default() }.encode();
    let view = CheckView::read(&message).expect("what prost writes is read");
    let sources = [CredentialSource::Query("key".to_owned())];
    let found = find(&sources, CredentialConflict::Reject, &view.headers, &target);
    let found = found.map(|key| key.map(|key| key.expose_secret().to_vec()));

    let parameters: Vec<(&str, &str)> = query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| part.split_once('=').unwrap_or((part, "")))
        .collect();
    let names_key = |raw: &str| theirs(raw) == "key" && decoded(raw).is_some();
    let of_key: Vec<&(&str, &str)> = parameters.iter().filter(|(name, _)| names_key(name)).collect();
    let spellings: Vec<&str> = query_spellings(&sources, &target).collect();
    assert_eq!(spellings, of_key.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    match of_key.as_slice() {
        [] => assert_eq!(found.expect("nothing is there"), None),
        [(_, value)] if decoded(value).is_some() && is_key(theirs(value).as_bytes()) => {
            assert_eq!(found.expect("one key is there"), Some(theirs(value).into_bytes()));
        }
        _ => assert!(found.is_err(), "two, or one that is no key"),
    }
}

/// One name or value as `form_urlencoded` decodes it; bytes that are no text become U+FFFD, which no key has.
fn theirs(raw: &str) -> String {
    let raw = raw.replace('+', "%2B").replace('=', "%3D");
    form_urlencoded::parse(raw.as_bytes()).next().map(|(name, _)| name.into_owned()).unwrap_or_default()
}
