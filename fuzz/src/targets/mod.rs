//! One target for each reader of foreign bytes: a plain function of the bytes, which panics where the reader is wrong.
//!
//! None of them asks only that nothing panics. Each holds the reader against a second one that knows nothing of the
//! first: another crate where there is one, otherwise a slow and obvious one that is written here.

pub(crate) mod change_feed;
pub(crate) mod check;
pub(crate) mod check_text;
pub(crate) mod check_view;
pub(crate) mod client_ip;
pub(crate) mod credentials;
pub(crate) mod deny_list;
pub(crate) mod endpoint;
pub(crate) mod hash;
pub(crate) mod json_body;
pub(crate) mod model_path;
pub(crate) mod multipart_body;
pub(crate) mod network;
pub(crate) mod original;
pub(crate) mod path;
pub(crate) mod query;
pub(crate) mod redis_url;
pub(crate) mod row;
pub(crate) mod sealed_entry;
pub(crate) mod snapshot;
pub(crate) mod store_url;

mod check_oracle;
mod wire;

/// What a target is.
pub(crate) type Target = fn(&[u8]);

/// Every target by its name, which is that of its door and of its corpus.
pub(crate) const ALL: [(&str, Target); 21] = [
    ("change_feed", change_feed::run),
    ("check", check::run),
    ("check_text", check_text::run),
    ("check_view", check_view::run),
    ("client_ip", client_ip::run),
    ("credentials", credentials::run),
    ("deny_list", deny_list::run),
    ("endpoint", endpoint::run),
    ("hash", hash::run),
    ("json_body", json_body::run),
    ("model_path", model_path::run),
    ("multipart_body", multipart_body::run),
    ("network", network::run),
    ("original", original::run),
    ("path", path::run),
    ("query", query::run),
    ("redis_url", redis_url::run),
    ("row", row::run),
    ("sealed_entry", sealed_entry::run),
    ("snapshot", snapshot::run),
    ("store_url", store_url::run),
];

/// The bytes before and behind the first line's end; nothing behind where there is none.
fn first_line(data: &[u8]) -> (&[u8], &[u8]) {
    match data.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (data, &[]),
    }
}

/// The same of a text; `None` where it is none.
fn lines(data: &[u8]) -> Option<(&str, &str)> {
    let text = std::str::from_utf8(data).ok()?;
    Some(text.split_once('\n').unwrap_or((text, "")))
}

/// Percent escapes decoded once by hand; `None` where one is malformed.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return None;
            }
            out.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &rest[2..];
        } else {
            out.push(*first);
        }
    }
    Some(out)
}

/// Whether bytes are a key, by the contract's words.
fn is_key(bytes: &[u8]) -> bool {
    (9..=72).contains(&bytes.len())
        && bytes.iter().all(|byte| (0x21..=0x7e).contains(byte) && !b",!".contains(byte))
}
