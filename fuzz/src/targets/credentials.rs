//! The key in headers and query, against what must hold of whatever is found.
//!
//! The first line is the request target, the others are headers.

use keyward::domain::denial::Denial;
use keyward::domain::key::PresentedKey;
use keyward::server::check_view::CheckView;
use keyward::server::credentials::find;
use keyward::server::headers::Headers;
use keyward::server::options::{CredentialConflict, CredentialSource};

use super::wire::{Parts, header_lines};
use super::{first_line, is_key};

const PLAIN: [&str; 3] = ["x-api-key", "api-key", "x-goog-api-key"];

pub(crate) fn run(data: &[u8]) {
    let (target, lines) = first_line(data);
    let Ok(target) = std::str::from_utf8(target) else { return };
    let headers = header_lines(lines);
    let message = Parts { target, headers: headers.clone(), ..Parts::default() }.encode();
    let view = CheckView::read(&message).expect("what prost writes is read");
    let mut sources: Vec<CredentialSource> =
        ["bearer", "x-api-key", "api-key", "x-goog-api-key", "query:key"]
            .map(|source| source.parse().expect("a source"))
            .into();
    let ask = |sources: &[CredentialSource], conflict| find_in(sources, conflict, &view.headers, target);
    let strict = ask(&sources, CredentialConflict::Reject);
    let first = ask(&sources, CredentialConflict::First);
    sources.reverse();
    assert_eq!(ask(&sources, CredentialConflict::Reject), strict, "the order of the sources matters");
    let last = ask(&sources, CredentialConflict::First);

    let shown = presented(&headers, target);
    match &strict {
        Ok(Some(key)) => {
            assert!(is_key(key));
            assert!(!shown.is_empty() && shown.iter().all(|one| one == key), "not the only one");
            assert_eq!((&first, &last), (&strict, &strict));
        }
        Ok(None) => {
            assert!(shown.is_empty(), "one was presented and not seen");
            assert_eq!((&first, &last), (&strict, &strict));
        }
        Err(denial) => {
            assert_eq!(*denial, Denial::MalformedCredentials);
            for found in [&first, &last] {
                match found {
                    Ok(Some(key)) => assert!(is_key(key) && shown.contains(key)),
                    Ok(None) => panic!("a malformed one was taken for none"),
                    Err(_) => {}
                }
            }
        }
    }
}

type Found = Result<Option<Vec<u8>>, Denial>;

fn find_in(
    sources: &[CredentialSource],
    conflict: CredentialConflict,
    headers: &Headers<'_>,
    target: &str,
) -> Found {
    let secret = |key: PresentedKey| key.expose_secret().to_vec();
    find(sources, conflict, headers, target).map(|key| key.map(secret))
}

/// Everything that somebody could take for a credential in one of the sources, keys or not.
pub(crate) fn presented(headers: &[(&str, &[u8])], target: &str) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for (name, value) in headers {
        let value = trim(value);
        if PLAIN.iter().any(|plain| plain.eq_ignore_ascii_case(name)) {
            found.push(value.to_vec());
        } else if name.eq_ignore_ascii_case("authorization")
            && let Some((scheme, rest)) = value.split_at_checked(6)
            && scheme.eq_ignore_ascii_case(b"bearer")
            && rest.first().is_none_or(|byte| b" \t,".contains(byte))
        {
            found.push(trim(rest).to_vec());
        }
    }
    let query = target.split_once('?').map(|(_, query)| query).unwrap_or_default();
    for (name, value) in form_urlencoded::parse(query.replace('+', "%2B").as_bytes()) {
        if name == "key" {
            found.push(value.into_owned().into_bytes());
        }
    }
    found
}

fn trim(value: &[u8]) -> &[u8] {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = value.iter().position(|byte| !is_blank(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !is_blank(byte)).map_or(start, |end| end + 1);
    &value[start..end]
}
