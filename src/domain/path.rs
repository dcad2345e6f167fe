//! The path that a request asks for, as far as a decision may rely on it.

use std::borrow::Cow;

/// Whether an upstream could read this path (without its query) differently from us: dot segments (some forgive blanks
/// around them), doubled slashes, encoded separators, parameters, a fragment, what is no UTF-8 (some take `%c0%af` for a
/// slash). A key with an endpoint list is not allowed to ask for such a path.
pub fn is_ambiguous(path: &str) -> bool {
    if !path.starts_with('/') || path.contains("//") {
        return true;
    }
    path.split('/').any(|segment| {
        if segment.contains('%') {
            decode(segment).is_none_or(|decoded| str::from_utf8(&decoded).map_or(true, is_special))
        } else {
            is_special(segment)
        }
    })
}

/// Whether a decoded segment is more than a name to some reader.
fn is_special(segment: &str) -> bool {
    let is_special =
        |byte| matches!(byte, b'/' | b'\\' | b'%' | b';' | b'#' | b'?') || u8::is_ascii_control(&byte);
    matches!(segment.trim(), "." | "..") || segment.bytes().any(is_special)
}

/// The path as a lenient upstream takes it: without its escapes, in any case, with or without a slash at its end. For
/// rules that ask for something where they fit, so that no other spelling gets around them. To be asked about paths that
/// are not ambiguous.
pub fn lenient(path: &str) -> Cow<'_, str> {
    let path = path.strip_suffix('/').filter(|rest| !rest.is_empty()).unwrap_or(path);
    let decoded = if path.contains('%') {
        decode(path)
            .and_then(|decoded| String::from_utf8(decoded).ok())
            .map_or(Cow::Borrowed(path), Cow::Owned)
    } else {
        Cow::Borrowed(path)
    };
    if decoded.contains(|letter: char| letter.is_ascii_uppercase()) {
        Cow::Owned(decoded.to_ascii_lowercase())
    } else {
        decoded
    }
}

/// Decodes percent escapes once; `None` where one is malformed.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => super::hash::hex_digit(bytes.next()?)? << 4 | super::hash::hex_digit(bytes.next()?)?,
            _ => byte,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_two_readers_could_read_differently() {
        for path in [
            "",
            "v1/chat",
            "*",
            "//v1",
            "/v1//chat",
            "/v1/../admin",
            "/v1/./chat",
            "/v1/%2e%2e/admin",
            "/v1/..",
            "/v1%2fchat",
            "/v1%5cchat",
            "/v1\\chat",
            "/v1/chat;x=1",
            "/v1/chat%3bx",
            "/a%00",
            "/a#b",
            "/a%23b",
            "/a%2",
            "/a%zz",
            "/a%252e",
            "/v1/%c0%ae%c0%ae/admin",
            "/v1%c0%afadmin",
            "/v1/..%20/admin",
            "/v1/%20./chat",
            "/v1/..%c2%a0/admin",
            "/v1/\u{2003}../admin",
            "/v1/x%c0%af..%c0%afadmin",
            "/v1/%e0%80%ae./admin",
            "/v1/%e9",
        ] {
            assert!(is_ambiguous(path), "{path:?}");
        }
    }

    #[test]
    fn every_spelling_of_a_path_is_one_to_the_lenient() {
        for path in ["/v1/chat", "/v1/chat/", "/V1/Chat", "/v1/ch%61t/", "/%561/chat"] {
            assert_eq!(lenient(path), "/v1/chat", "{path:?}");
        }
        for path in ["/", "/v1/%zz", "/v1/caf\u{e9}"] {
            assert_eq!(lenient(path), path);
        }
    }

    #[test]
    fn plain_paths() {
        for path in [
            "/",
            "/v1/chat/completions",
            "/v1/models/",
            "/v1/model/a%3ab",
            "/v1/...",
            "/a.b/c~d",
            "/caf%c3%a9",
            "/café",
            "/%c3%a9/%20",
        ] {
            assert!(!is_ambiguous(path), "{path:?}");
        }
    }
}
