//! Headers and query to the presented key: none, one, or malformed.
//!
//! All sources are read and none is preferred. A source that is present but empty or malformed never falls through to
//! another one, and a value that Envoy joined from two headers (with a comma) is no key.

use super::headers::Headers;
use super::options::{CredentialConflict, CredentialSource};
use crate::domain::denial::Denial;
use crate::domain::key::PresentedKey;
use crate::domain::path;

/// Headers that carry keys in the APIs that Keyward stands before. They are removed from what goes upstream whether or
/// not they are sources here, so that nobody smuggles a provider's key past the gateway.
pub const KNOWN_CARRIERS: [&str; 4] = ["authorization", "x-api-key", "api-key", "x-goog-api-key"];

/// A source that holds something, but no key.
struct Malformed;

/// The one key that the sources hold; `None` where they hold nothing of ours. `target` is the request target with its
/// query.
pub fn find(
    sources: &[CredentialSource],
    conflict: CredentialConflict,
    headers: &Headers<'_>,
    target: &str,
) -> Result<Option<PresentedKey>, Denial> {
    let mut found: Option<PresentedKey> = None;
    for source in sources {
        let Some(key) = read(source, headers, target).map_err(|Malformed| Denial::MalformedCredentials)?
        else {
            continue;
        };
        match (&found, conflict) {
            (None, _) => found = Some(key),
            (Some(first), CredentialConflict::Reject) if *first != key => {
                return Err(Denial::MalformedCredentials);
            }
            (Some(_), CredentialConflict::Reject | CredentialConflict::First) => {}
        }
    }
    Ok(found)
}

/// The raw spellings of the configured query names in a request target: what Envoy has to be told to remove, because
/// it compares names undecoded.
pub fn query_spellings<'a>(
    sources: &'a [CredentialSource],
    target: &'a str,
) -> impl Iterator<Item = &'a str> {
    let names = sources.iter().filter_map(|source| match source {
        CredentialSource::Query(name) => Some(name.as_str()),
        CredentialSource::Bearer | CredentialSource::Header(_) => None,
    });
    names.flat_map(move |name| parameters(target).map(|(raw, _)| raw).filter(move |raw| names_it(raw, name)))
}

fn read(
    source: &CredentialSource,
    headers: &Headers<'_>,
    target: &str,
) -> Result<Option<PresentedKey>, Malformed> {
    match source {
        CredentialSource::Bearer => match only(headers.values("authorization"))? {
            Some(value) => bearer(value),
            None => Ok(None),
        },
        CredentialSource::Header(name) => match only(headers.values(name))? {
            Some(value) => parse(trim(value)).map(Some),
            None => Ok(None),
        },
        CredentialSource::Query(name) => {
            let values = parameters(target).filter(|(raw, _)| names_it(raw, name)).map(|(_, value)| value);
            match only(values)? {
                Some(value) => parse(&path::decode(value).ok_or(Malformed)?).map(Some),
                None => Ok(None),
            }
        }
    }
}

/// `Bearer` in any case, one or more spaces, the key, nothing else. Another scheme is no key of ours.
fn bearer(value: &[u8]) -> Result<Option<PresentedKey>, Malformed> {
    let value = trim(value);
    if value.is_empty() {
        return Err(Malformed);
    }
    let scheme_end = value.iter().position(|byte| matches!(byte, b' ' | b'\t' | b',')).unwrap_or(value.len());
    let (scheme, rest) = value.split_at_checked(scheme_end).ok_or(Malformed)?;
    if scheme.eq_ignore_ascii_case(b"bearer") {
        let start = rest.iter().position(|byte| *byte != b' ').ok_or(Malformed)?;
        return parse(rest.get(start..).unwrap_or_default()).map(Some);
    }
    if joins_two(scheme, rest) { Err(Malformed) } else { Ok(None) }
}

/// Whether the rest of a value of another scheme holds a second `authorization` value: Envoy joins two with a comma.
/// `Basic` has no comma of its own; other schemes (`Digest`) have, between `name=value` pairs.
fn joins_two(scheme: &[u8], rest: &[u8]) -> bool {
    let mut later = rest.split(|byte| *byte == b',').skip(1).peekable();
    if scheme.eq_ignore_ascii_case(b"basic") && later.peek().is_some() {
        return true;
    }
    later.any(|part| {
        let part = trim(part);
        part.split(|byte| matches!(byte, b' ' | b'\t'))
            .next()
            .is_some_and(|word| word.eq_ignore_ascii_case(b"bearer"))
    })
}

fn parse(bytes: &[u8]) -> Result<PresentedKey, Malformed> {
    PresentedKey::parse(bytes).map_err(|_| Malformed)
}

/// The value of a source that may occur once.
fn only<T>(mut values: impl Iterator<Item = T>) -> Result<Option<T>, Malformed> {
    let first = values.next();
    if values.next().is_some() { Err(Malformed) } else { Ok(first) }
}

/// HTTP/2 values reach us with the blanks around them.
fn trim(value: &[u8]) -> &[u8] {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = value.iter().position(|byte| !is_blank(byte)).unwrap_or(value.len());
    let end = value.iter().rposition(|byte| !is_blank(byte)).map_or(start, |last| last.saturating_add(1));
    value.get(start..end).unwrap_or_default()
}

/// The query's parameters as sent: raw name, raw value.
fn parameters(target: &str) -> impl Iterator<Item = (&str, &str)> {
    let query = target.split_once('?').map(|(_, query)| query).unwrap_or_default();
    query.split('&').filter(|part| !part.is_empty()).map(|part| part.split_once('=').unwrap_or((part, "")))
}

/// Decoded once, compared exactly. A name with a bad escape is nobody's.
fn names_it(raw: &str, name: &str) -> bool {
    raw == name || (raw.contains('%') && path::decode(raw).is_some_and(|decoded| decoded == name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "kw_0123456789";

    /// `Ok(Some(key))`, `Ok(None)` or `Err` for one set of headers, in both of Envoy's forms, which must agree.
    fn found(
        sources: &str,
        conflict: CredentialConflict,
        headers: &[(&str, &str)],
        target: &str,
    ) -> Result<Option<String>, Denial> {
        let sources: Vec<CredentialSource> =
            sources.split(',').map(|source| source.parse().unwrap()).collect();
        let list: Vec<(String, Vec<u8>)> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
        let headers = Headers::from_pairs(&list);
        find(&sources, conflict, &headers, target)
            .map(|key| key.map(|key| String::from_utf8(key.expose_secret().to_vec()).unwrap()))
    }

    fn by_default(headers: &[(&str, &str)]) -> Result<Option<String>, Denial> {
        found("bearer,x-api-key,api-key,x-goog-api-key", CredentialConflict::Reject, headers, "/v1?key=zzz")
    }

    #[test]
    fn every_source_alone() {
        for header in [
            ("authorization", "Bearer kw_0123456789"),
            ("authorization", "bearer kw_0123456789"),
            ("authorization", "BEARER    kw_0123456789"),
            ("authorization", "  Bearer kw_0123456789 \t"),
            ("Authorization", "Bearer kw_0123456789"),
            ("x-api-key", KEY),
            ("x-api-key", " kw_0123456789 "),
            ("api-key", KEY),
            ("x-goog-api-key", KEY),
        ] {
            assert_eq!(by_default(&[header]), Ok(Some(KEY.into())), "{header:?}");
        }
    }

    #[test]
    fn present_but_empty_or_malformed_never_falls_through() {
        for value in [
            "",
            " ",
            "Bearer",
            "Bearer ",
            "Bearer\tkw_0123456789",
            "Bearer kw_0123456789 x",
            "Bearer \"kw_0123456789\" ",
            "Bearer Bearer kw_0123456789",
            "Bearer kw_0123456789,",
            "Bearer kw_0123456789,Bearer kw_0123456789",
            "Bearer kw_01234567!!",
            "Bearer kw_01234é56789",
            "Bearer kw_0\u{1}23456789",
            "Bearer short",
            "Basic YTpi,Bearer kw_0123456789",
            "Digest a=b, Bearer kw_0123456789",
        ] {
            let headers = [("authorization", value), ("x-api-key", KEY)];
            assert_eq!(by_default(&headers), Err(Denial::MalformedCredentials), "{value:?}");
        }
        assert_eq!(
            by_default(&[("authorization", &format!("Bearer {}", "k".repeat(73)))]),
            Err(Denial::MalformedCredentials)
        );
        assert_eq!(
            by_default(&[("x-api-key", ""), ("authorization", "Bearer kw_0123456789")]),
            Err(Denial::MalformedCredentials)
        );
    }

    #[test]
    fn another_scheme_is_no_key_of_ours() {
        for value in ["Basic YTpi", "Digest username=\"a\", realm=\"bearer\"", "kw_0123456789", "Negotiate x"]
        {
            assert_eq!(by_default(&[("authorization", value)]), Ok(None), "{value:?}");
            assert_eq!(
                by_default(&[("authorization", value), ("x-api-key", KEY)]),
                Ok(Some(KEY.into())),
                "{value:?}"
            );
        }
    }

    #[test]
    fn a_header_sent_twice_is_malformed_even_with_one_value() {
        for name in ["authorization", "x-api-key"] {
            let value = if name == "authorization" { "Bearer kw_0123456789" } else { KEY };
            assert_eq!(by_default(&[(name, value), (name, value)]), Err(Denial::MalformedCredentials));
        }
        assert_eq!(
            by_default(&[("x-api-key", "kw_0123456789,kw_0123456789")]),
            Err(Denial::MalformedCredentials)
        );
    }

    #[test]
    fn two_sources_agree_or_conflict() {
        let same = [("authorization", "Bearer kw_0123456789"), ("x-api-key", KEY)];
        let other = [("authorization", "Bearer kw_other6789"), ("x-api-key", KEY)];
        assert_eq!(by_default(&same), Ok(Some(KEY.into())));
        assert_eq!(by_default(&other), Err(Denial::MalformedCredentials));
        let first = |sources| found(sources, CredentialConflict::First, &other, "/");
        assert_eq!(first("bearer,x-api-key"), Ok(Some("kw_other6789".into())));
        assert_eq!(first("x-api-key,bearer"), Ok(Some(KEY.into())));
    }

    #[test]
    fn the_query_is_read_only_where_it_is_a_source() {
        let of = |target| found("bearer,query:key", CredentialConflict::Reject, &[], target);
        assert_eq!(by_default(&[]), Ok(None));
        for target in ["/v1?key=kw_0123456789", "/v1?a=b&key=kw_0123456789&c", "/v1?k%65y=kw%5F0123456789"] {
            assert_eq!(of(target), Ok(Some(KEY.into())), "{target}");
        }
        for target in
            ["/v1", "/v1?KEY=kw_0123456789", "/v1?a=key", "/v1?k%zzy=kw_0123456789", "/key=kw_0123456789"]
        {
            assert_eq!(of(target), Ok(None), "{target}");
        }
        for target in [
            "/v1?key=",
            "/v1?key",
            "/v1?key=kw_012345%zz",
            "/v1?key=kw_012345678%",
            "/v1?key=kw_01234%00567",
            "/v1?key=kw_0123456789&key=kw_0123456789",
            "/v1?key=kw_0123456789&k%65y=kw_0123456789",
        ] {
            assert_eq!(of(target), Err(Denial::MalformedCredentials), "{target}");
        }
        // A plus sign is itself.
        assert_eq!(of("/v1?key=kw_0123+56789"), Ok(Some("kw_0123+56789".into())));
    }

    #[test]
    fn query_spellings_are_those_that_were_sent() {
        let sources = ["query:key".parse().unwrap(), "query:api_key".parse().unwrap()];
        let of = |target| query_spellings(&sources, target).collect::<Vec<_>>();
        assert_eq!(of("/v1?k%65y=a&b=c&api%5fkey=d"), ["k%65y", "api%5fkey"]);
        assert!(of("/v1?b=key").is_empty());
    }

    proptest! {
        /// Whatever is sent, what is accepted is one key of the alphabet, and it was sent.
        #[test]
        fn an_accepted_key_was_sent(value in prop::collection::vec(any::<u8>(), 0..100)) {
            let list = [("authorization".to_owned(), value.clone())];
            let headers = Headers::from_pairs(&list);
            if let Ok(Some(key)) = find(&[CredentialSource::Bearer], CredentialConflict::Reject, &headers, "/") {
                prop_assert!(value.windows(key.expose_secret().len()).any(|part| part == key.expose_secret()));
                prop_assert!(!key.expose_secret().contains(&b','));
            }
        }
    }
}
