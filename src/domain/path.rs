//! The path that a request asks for, as far as a decision may rely on it.

/// Whether an upstream could read this path (without its query) differently from us: dot segments, doubled slashes,
/// encoded separators, parameters, a fragment, what is no UTF-8 (overlong forms of `.` and `/` among it). A key with an
/// endpoint list is not allowed to ask for such a path.
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
    segment == "." || segment == ".." || segment.bytes().any(is_special)
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
            "/caf%c3%a9",
            "/café",
        ] {
            assert!(!is_ambiguous(path), "{path:?}");
        }
    }
}
