//! Odd request targets, and how upstreams may read them: what [`crate::endpoint_paths`] sends and judges by.

use std::collections::BTreeSet;

/// Ways to say "up to the parent", for one reader or another.
const STEPS_UP: [&[u8]; 52] = [
    b"/..",
    b"/%2e%2e",
    b"/%2E%2e",
    b"/.%2E",
    b"/%2e.",
    b"%2f..",
    b"%2F..",
    b"%2f%2e%2e",
    b"%5c..",
    b"%5C%2E%2E",
    b"\\..",
    b"/..\\.",
    b"/..;",
    b"/..;a=b",
    b"/;/..",
    b"/;..",
    b"/x;/../..",
    b"/..%3b",
    b"/..%3Ba",
    b"/%252e%252e",
    b"/%25%32%65%2e",
    b"/%%32%65%2e",
    b"%252f..",
    b"%255c..",
    b"%25252f..",
    b"/..%252f.",
    b"/..%2f.",
    b"/..%5c.",
    b"%c0%af..",
    b"%C0%AF..",
    b"/%c0%ae%c0%ae",
    b"/.%c0%ae",
    b"%c1%9c..",
    b"%e0%80%af..",
    b"/%e0%80%ae%e0%80%ae",
    b"%f0%80%80%af..",
    b"%25c0%25af..",
    b"\xc0\xaf..",
    b"/\xc0\xae\xc0\xae",
    b"/%u002e%u002e",
    b"%u002f..",
    b"/..%00",
    b"%00/..",
    b"/..%20",
    b"/%20..",
    b"/..%09",
    b"/..%0d%0a",
    b"/..%23",
    b"/..%3f",
    b"//..",
    b"/./..",
    b"/.//.%2e/.",
];

/// Where a step may take a request from and to; `{up}` is one.
const JOURNEYS: [&str; 5] = [
    "/v1/chat{up}{up}/admin/keys",
    "/v1/chat/x{up}/completions",
    "/v1/models/x{up}",
    "/admin{up}/v1/chat/x",
    "/v1/x{up}{up}/admin{up}/completions",
];

/// Each with something else about it.
const SINGLE: [&[u8]; 86] = [
    b"/",
    b"",
    b"*",
    b"//",
    b"///v1/chat/x",
    b"//v1/chat/x",
    b"//admin",
    b"//evil.example.com/admin",
    b"/v1//chat/x",
    b"/v1/chat//x",
    b"/v1/chat//",
    b"/v1/chat/.",
    b"/v1/chat/./",
    b"/v1/chat/..",
    b"/v1/chat/../",
    b"/v1/chat/...",
    b"/v1/chat/.../...",
    b"/v1/chat/x.",
    b"/v1/chat/x..",
    b"/v1/chat./x",
    b"/v1/chat../x",
    b"/v1/chat%2e/x",
    b"/v1/chatty",
    b"/v1/chat%78",
    b"/v1/chat%20",
    b"/v1/chat%20/x",
    b"/v1/chat/%20",
    b"/v1/ch%61t/x",
    b"/v1/%63%68%61%74/x",
    b"/%76%31/chat/x",
    b"/V1/CHAT/x",
    b"/v1/Chat/x",
    b"/v1/chat/%2541",
    b"/v1/chat/%",
    b"/v1/chat/%2",
    b"/v1/chat/%zz",
    b"/v1/chat/%C3%A9",
    b"/v1/chat/%e9",
    b"/v1/chat/\xc3\xa9",
    b"/v1/chat/\xe9",
    b"/v1/chat/%ff%fe",
    b"/v1/chat/a b",
    b"/v1/chat/a%20b",
    b"/v1/chat/a\tb",
    b"/v1/chat/\0/x",
    b"/v1/chat/\x7f",
    b"/v1/chat/\x01",
    b"/v1/chat#/../../admin",
    b"/v1/chat/x#",
    b"/v1/chat/x%23/../../../admin",
    b"/v1/chat?/../../admin",
    b"/v1/chat?/../../admin%2f..",
    b"/v1/chat/x?#",
    b"/v1/chat%3f/../../../admin",
    b"/v1/chat/x%3fy",
    b"/admin?/v1/chat/x",
    b"/admin;/v1/chat/x",
    b"/admin#/v1/chat/x",
    b"/admin%3f/v1/chat/x",
    b"/admin%00/v1/chat/x",
    b"/admin/completions",
    b"/v1/chat;/x",
    b"/v1/chat;v=1/x",
    b"/v1/chat/x;y",
    b"/v1;/chat/x",
    b"/;/v1/chat/x",
    b"/v1/chat/x,y=z",
    b"/v1/chat/a:b@c&d=e+f$g!h*i'j(k)",
    b"/v1/chat/<a>[b]{c}|d^e`f\"g",
    b"/v1/chat/~%7e%2D%2e5",
    b"/v1/models/a%3ab",
    b"/v1/models/a/b",
    b"/v1/models/a%2Fb",
    b"/v1/models/a%2fb%2F..%2fc",
    b"/v1/models/",
    b"/v1/models/.",
    b"/v1/models/a%26b",
    b"v1/chat/x",
    b"../admin",
    b"http://api.example.com/v1/chat/../../admin",
    b"http://api.example.com/v1/chat/x",
    b"http://api.example.com/v1/chat%2f..%2f..%2fadmin",
    b"http://api.example.com",
    b"http://api.example.com?/v1/chat/x",
    b"http://user@evil.example.com/v1/chat/x",
    b"https://api.example.com:8443//admin",
];

/// All of them.
pub(crate) fn targets() -> Vec<Vec<u8>> {
    let up_and_away = JOURNEYS.iter().flat_map(|journey| {
        STEPS_UP.iter().map(|up| {
            let parts: Vec<&[u8]> = journey.split("{up}").map(str::as_bytes).collect();
            parts.join(*up)
        })
    });
    let long = ["/v1/chat/".to_owned() + &"x".repeat(8000), "/v1/chat".to_owned() + &"/x/..".repeat(1500)]
        .map(String::into_bytes);
    let singles = SINGLE.iter().map(|target| target.to_vec());
    let all: BTreeSet<Vec<u8>> = up_and_away.chain(singles).chain(long).collect();
    all.into_iter().collect()
}

/// Something that an upstream may do to a path.
type Step = fn(&[u8]) -> Vec<u8>;

/// Everything that some upstream could take this target's path for: what its steps make of it in any order, as often as
/// they change anything. Knows nothing of Keyward's own reading.
pub(crate) fn readings(target: &[u8]) -> BTreeSet<Vec<u8>> {
    let steps: [Step; 10] = [
        decoded,
        without_overlong_forms,
        with_slashes_for_backslashes,
        without_parameters,
        |path| before(path, b';'),
        |path| before(path, 0),
        |path| before(path, b'#'),
        |path| before(path, b'?'),
        merged,
        resolved,
    ];
    let mut found = BTreeSet::new();
    let mut open = vec![before(target, b'?')];
    while let Some(path) = open.pop() {
        if found.insert(path.clone()) {
            open.extend(steps.iter().map(|step| step(&path)));
        }
    }
    found
}

/// Percent escapes and the `%uXXXX` of old servers; what is malformed stays.
fn decoded(path: &[u8]) -> Vec<u8> {
    let number =
        |digits: &[u8]| std::str::from_utf8(digits).ok().and_then(|text| u32::from_str_radix(text, 16).ok());
    let mut out = Vec::new();
    let mut rest = path;
    while let Some((&first, behind)) = rest.split_first() {
        let (byte, length) = match rest {
            [b'%', b'u', a, b, c, d, ..] => (number(&[*a, *b, *c, *d]), 6),
            [b'%', a, b, ..] => (number(&[*a, *b]), 3),
            _ => (None, 1),
        };
        if let Some(byte) = byte.and_then(|number| u8::try_from(number).ok()) {
            out.push(byte);
            rest = &rest[length..];
        } else {
            out.push(first);
            rest = behind;
        }
    }
    out
}

/// UTF-8 that takes two to four bytes for an ASCII character.
fn without_overlong_forms(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = path;
    while let Some((&first, behind)) = rest.split_first() {
        let ascii = |a: u8, b: u8| (a & 1) << 6 | (b & 0x3f);
        let (byte, behind) = match rest {
            [a @ 0xc0..=0xc1, b @ 0x80..=0xbf, behind @ ..]
            | [0xe0, a @ 0x80..=0x81, b @ 0x80..=0xbf, behind @ ..]
            | [0xf0, 0x80, a @ 0x80..=0x81, b @ 0x80..=0xbf, behind @ ..] => (ascii(*a, *b), behind),
            _ => (first, behind),
        };
        out.push(byte);
        rest = behind;
    }
    out
}

fn with_slashes_for_backslashes(path: &[u8]) -> Vec<u8> {
    path.iter().map(|byte| if *byte == b'\\' { b'/' } else { *byte }).collect()
}

/// `/a;x=1/b` as `/a/b`.
fn without_parameters(path: &[u8]) -> Vec<u8> {
    let segments: Vec<Vec<u8>> =
        path.split(|byte| *byte == b'/').map(|segment| before(segment, b';')).collect();
    segments.join(&b'/')
}

fn before(path: &[u8], end: u8) -> Vec<u8> {
    path.split(|byte| *byte == end).next().unwrap_or_default().to_vec()
}

fn merged(path: &[u8]) -> Vec<u8> {
    let mut out = path.to_vec();
    out.dedup_by(|a, b| *a == b'/' && *b == b'/');
    out
}

/// Dot segments, blanks around them forgiven.
fn resolved(path: &[u8]) -> Vec<u8> {
    let mut out: Vec<&[u8]> = Vec::new();
    for segment in path.split(|byte| *byte == b'/') {
        match segment.trim_ascii() {
            b"." => {}
            b".." => {
                out.truncate(out.len().saturating_sub(1).max(1));
            }
            _ => out.push(segment),
        }
    }
    out.join(&b'/')
}
