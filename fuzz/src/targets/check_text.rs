//! A whole check, written as text, so that what is mutated stays a message.
//!
//! The first line is method and target. Lines of headers follow; `@source`, `@extension` (`name=value`) and `@whole`
//! (which says that the body is all of it) are no headers. Behind an empty line comes the body.

use super::wire::{Parts, header_lines};
use super::{check, check_view, first_line};

pub(crate) fn run(data: &[u8]) {
    if let Some(message) = written(data) {
        check_view::run(&message);
        check::run(&message);
    }
}

/// The message; `None` where the first line is no text.
pub(crate) fn written(data: &[u8]) -> Option<Vec<u8>> {
    let (line, rest) = first_line(data);
    let line = std::str::from_utf8(line).ok()?;
    let (method, target) = line.split_once(' ').unwrap_or(("GET", line));
    let (head, body) = match rest.windows(2).position(|pair| pair == b"\n\n") {
        Some(end) => (&rest[..end], &rest[end + 2..]),
        None => (rest, &[][..]),
    };
    let length = body.len().to_string();
    let mut parts = Parts { method, target, body, ..Parts::default() };
    for (name, value) in header_lines(head) {
        let text = std::str::from_utf8(value).unwrap_or_default();
        match name {
            "@source" => parts.source = Some(text),
            "@extension" => parts.extensions.extend(text.split_once('=')),
            "@whole" => parts.headers.push(("content-length", length.as_bytes())),
            _ => parts.headers.push((name, value)),
        }
    }
    Some(parts.encode())
}
