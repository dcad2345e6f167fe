//! Which paths are ambiguous, against normal forms that are written here.
//!
//! A path that is not ambiguous has to be its own normal form under every combination of Envoy's settings
//! (`normalize_path`, `merge_slashes`, `path_with_escaped_slashes_action`), and under what upstreams may do.

use keyward::domain::path::{decode, is_ambiguous, lenient};

use super::decoded;

pub(crate) fn run(data: &[u8]) {
    let Ok(path) = std::str::from_utf8(data) else { return };
    assert_eq!(decode(path), decoded(path));
    let is_odd = path.contains("//")
        || !path.starts_with('/')
        || path.contains(['\\', ';', '#', '?'])
        || path.bytes().any(|byte| byte.is_ascii_control());
    if is_odd {
        assert!(is_ambiguous(path), "{path:?}");
    }
    if is_ambiguous(path) {
        return;
    }
    let means = decoded(path).expect("every escape is well formed");
    let means = String::from_utf8(means).expect("what it means is text");
    for settings in 0..8_u8 {
        let normal = normal_form(path, settings & 1 > 0, settings & 2 > 0, settings & 4 > 0);
        assert_eq!(normal, path, "under settings {settings:03b}");
        // A second reader decodes first.
        let normal = normal_form(&means, settings & 1 > 0, settings & 2 > 0, settings & 4 > 0);
        assert_eq!(normal, means, "decoded, under settings {settings:03b}");
    }
    assert_eq!(means.matches('/').count(), path.matches('/').count(), "an escaped slash in {path:?}");
    for forbidden in ['\\', '%', ';', '#', '?', '\0', '\u{7f}'] {
        assert!(!means.contains(forbidden), "{path:?} has {forbidden:?}");
    }
    for segment in means.split('/') {
        assert!(!matches!(segment.trim(), "." | ".."), "a dot segment in {path:?}");
    }
    let plain = lenient(path);
    assert_eq!(lenient(&plain), plain, "lenient twice");
    let without_case = lenient_of(&means);
    assert_eq!(plain, without_case);
}

/// Envoy's own steps, in its order.
fn normal_form(path: &str, normalize: bool, merge: bool, unescape_slashes: bool) -> String {
    let mut path = path.to_owned();
    if unescape_slashes {
        for (escape, byte) in [("%2f", "/"), ("%2F", "/"), ("%5c", "\\"), ("%5C", "\\")] {
            path = path.replace(escape, byte);
        }
    }
    if normalize {
        path = without_dot_segments(&path.replace('\\', "/"));
    }
    if merge {
        while path.contains("//") {
            path = path.replace("//", "/");
        }
    }
    path
}

/// RFC 3986, section 5.2.4, for paths that begin with a slash; dots may be escaped, as browsers take them.
fn without_dot_segments(path: &str) -> String {
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    let mut kept: Vec<&str> = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        let dots = segment.replace("%2e", ".").replace("%2E", ".");
        match dots.as_str() {
            ".." => drop(kept.pop()),
            "." => {}
            _ => {
                kept.push(segment);
                continue;
            }
        }
        if index + 1 == segments.len() {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

/// Lower case, without a slash at the end.
fn lenient_of(means: &str) -> String {
    let text = means.strip_suffix('/').filter(|rest| !rest.is_empty()).unwrap_or(means);
    text.to_ascii_lowercase()
}
