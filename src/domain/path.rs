//! The path that a request asks for, as far as a decision may rely on it.

/// Whether an upstream could read this path (without its query) differently from us: dot segments (some forgive blanks
/// around them), doubled slashes, encoded separators, parameters, a fragment, what is no UTF-8 (some take `%c0%af` for a
/// slash). A key with an endpoint list is not allowed to ask for such a path.
pub fn is_ambiguous(path: &str) -> bool {
    if !path.starts_with('/') || path.contains("//") || path.contains(['\\', ';', '#', '\0']) {
        return true;
    }
    path.split('/').any(|segment| match decode(segment) {
        None => true,
        Some(decoded) => {
            decoded
                .iter()
                .any(|byte| matches!(byte, b'/' | b'\\' | b'%' | b';' | b'#' | b'?' | 0..=0x1f | 0x7f))
                || matches!(decoded.trim_ascii(), b"." | b"..")
                || std::str::from_utf8(&decoded).is_err()
        }
    })
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
            "/v1/..%20/admin",
            "/v1/%20./chat",
            "/v1/x%c0%af..%c0%afadmin",
            "/v1/%e0%80%ae./admin",
            "/v1/%e9",
        ] {
            assert!(is_ambiguous(path), "{path:?}");
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
            "/%c3%a9/%20",
        ] {
            assert!(!is_ambiguous(path), "{path:?}");
        }
    }
}
