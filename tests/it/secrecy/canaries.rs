//! Secrets that are looked for everywhere: whole or a piece, as they are or encoded.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use memchr::memmem;

/// Characters of a secret that no place may show in a row.
const PIECE: usize = 12;
/// As many base64 characters as hold nothing but that piece, wherever it begins.
const BASE64_PIECE: usize = PIECE / 3 * 4;

/// What must be nowhere.
#[derive(Default)]
pub(super) struct Canaries(Vec<(&'static str, BTreeSet<Vec<u8>>)>);

impl Canaries {
    /// `secret` is the part that is nobody's business: a key without its prefix, a hash without its cost.
    pub(super) fn add(&mut self, what: &'static str, secret: &str) {
        assert!(secret.len() >= PIECE, "{what} is too short to be looked for");
        self.0.push((what, needles(secret.as_bytes())));
    }

    /// Looks for all of them, in all spellings.
    pub(super) fn assert_absent(&self, place: &str, text: impl AsRef<[u8]>) {
        let text = text.as_ref();
        for (what, needles) in &self.0 {
            // The piece is not repeated here: it is what must not be in a log.
            let found = needles.iter().find_map(|needle| memmem::find(text, needle));
            if let Some(at) = found {
                let before = String::from_utf8_lossy(&text[at.saturating_sub(120)..at]).into_owned();
                panic!("{what} is in {place}, behind {before:?}");
            }
        }
    }
}

fn needles(secret: &[u8]) -> BTreeSet<Vec<u8>> {
    let mut found = BTreeSet::new();
    for piece in secret.windows(PIECE) {
        found.insert(piece.to_vec());
        let each = |one: fn(&u8) -> String, between| piece.iter().map(one).collect::<Vec<_>>().join(between);
        for spelling in [
            each(|byte| format!("{byte:02x}"), ""),
            each(|byte| format!("{byte:02X}"), ""),
            each(|byte| format!("%{byte:02x}"), ""),
            each(|byte| format!("%{byte:02X}"), ""),
            // Only what has to be escaped, as in a form or a URL.
            each(
                |byte| {
                    if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) {
                        char::from(*byte).to_string()
                    } else {
                        format!("%{byte:02X}")
                    }
                },
                "",
            ),
            // How `Debug` writes bytes.
            each(ToString::to_string, ", "),
            each(|byte| format!("\\x{byte:02x}"), ""),
        ] {
            found.insert(spelling.into_bytes());
        }
    }
    // Base64 spells a piece in three ways, by where it begins.
    for shift in 0..3 {
        for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
            let text = engine.encode(&secret[shift..]);
            found.extend(text.as_bytes().windows(BASE64_PIECE).map(<[u8]>::to_vec));
        }
    }
    found
}

#[test]
fn a_piece_is_found_in_every_spelling_and_nothing_else_is() {
    let secret = "canary+secret/0123456789";
    let mut canaries = Canaries::default();
    canaries.add("the secret", secret);
    let spelled = |text: String| std::panic::catch_unwind(|| canaries.assert_absent("here", text)).is_err();
    let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    let percent = secret.replace('+', "%2B").replace('/', "%2F");
    for text in [
        format!("x{secret}x"),
        format!("x{}x", &secret[3..15]),
        hex.to_uppercase(),
        hex,
        percent,
        format!("{:?}", secret.as_bytes()),
        STANDARD_NO_PAD.encode(format!("x{secret}")),
        STANDARD_NO_PAD.encode(format!("xx{secret}")),
        URL_SAFE_NO_PAD.encode(secret),
    ] {
        assert!(spelled(text.clone()), "not found in {text}");
    }
    assert!(!spelled(format!("{} {}", &secret[..11], &secret[13..])), "less than a piece");
}
