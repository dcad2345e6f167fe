//! Takes keys out of texts that a caller chose, before they go into a log.
//!
//! Callers put their key where it does not belong: into the path, as a model's name. What is known of it is looked for,
//! and so is whatever has the form of a key that Keyward made.

use super::credentials::KNOWN_CARRIERS;
use super::headers::Headers;
use super::options::CredentialSource;
use crate::domain::key::{MIN_KEY_BYTES, PresentedKey};
use crate::domain::key_format::{ALPHABET, KeyForm};

/// What stands in a key's place.
pub const REDACTED: &str = "[redacted]";

/// From so many characters on, the secret part alone is looked for; less could be part of any word.
const MIN_SECRET_BYTES: usize = 8;

/// What begins like one of our keys and goes on for so long is taken for one, cut short or not.
const MIN_OWN_CHARACTERS: usize = 16;

/// What must not be seen of one request. Borrowed, so that there is no second copy of a secret to wipe.
pub struct Mask<'a> {
    secrets: Vec<&'a str>,
    form: &'a KeyForm,
}

impl<'a> Mask<'a> {
    /// From the key that was read, and from everything that its carriers hold: also from what is no key, or one too many.
    pub fn new(
        form: &'a KeyForm,
        key: Option<&'a PresentedKey>,
        headers: &Headers<'a>,
        sources: &[CredentialSource],
    ) -> Self {
        let mut secrets: Vec<&str> = Vec::new();
        let configured = sources.iter().filter_map(|source| match source {
            CredentialSource::Header(name) => Some(name.as_str()),
            CredentialSource::Bearer | CredentialSource::Query(_) => None,
        });
        for name in KNOWN_CARRIERS.into_iter().chain(configured) {
            let values = headers.values(name).filter_map(|value| std::str::from_utf8(value).ok());
            let words = values.flat_map(|value| value.split([' ', '\t', ',']));
            secrets.extend(words.filter(|word| word.len() >= MIN_KEY_BYTES));
        }
        if let Some(whole) = key.and_then(|key| std::str::from_utf8(key.expose_secret()).ok()) {
            let part = whole.get(form.prefix_length.get()..).unwrap_or_default();
            // The part last: what is left of a whole key without it may be most of a short one.
            secrets.extend([whole, part].into_iter().filter(|secret| secret.len() >= MIN_SECRET_BYTES));
        }
        Self { secrets, form }
    }

    /// The text without them, and not longer than `limit` bytes; what was cut ends in `…`.
    pub fn text(&self, text: &str, limit: usize) -> String {
        let mut masked = self.masked(text);
        if masked.len() > limit {
            let end = (0..=limit).rev().find(|end| masked.is_char_boundary(*end)).unwrap_or_default();
            masked.truncate(end);
            masked.push('…');
        }
        masked
    }

    fn masked(&self, text: &str) -> String {
        let plain = self.plainly_masked(text);
        if !text.contains('%') {
            return plain;
        }
        // Behind escapes there is no telling which characters are the key's, so nothing is left.
        let decoded = String::from_utf8_lossy(&decoded(plain.as_bytes())).into_owned();
        if self.plainly_masked(&decoded) == decoded { plain } else { REDACTED.to_owned() }
    }

    fn plainly_masked(&self, text: &str) -> String {
        let mut masked = text.to_owned();
        for secret in &self.secrets {
            if masked.contains(secret) {
                masked = masked.replace(secret, REDACTED);
            }
        }
        self.without_own_form(&masked)
    }

    fn without_own_form(&self, text: &str) -> String {
        let KeyForm { beginning, prefix_length } = self.form;
        let (mut masked, mut rest) = (String::new(), text);
        while !beginning.is_empty()
            && let Some(start) = rest.find(beginning.as_str())
            && let Some((before, key)) = rest.split_at_checked(start)
        {
            let is_ours = |byte: &u8| ALPHABET.contains(byte) || *byte == b'_';
            let random = key.bytes().skip(beginning.len()).take_while(is_ours).count();
            let length = beginning.len().saturating_add(random);
            let shown = if random < MIN_OWN_CHARACTERS { length } else { prefix_length.get().min(length) };
            masked.push_str(before);
            masked.push_str(key.get(..shown).unwrap_or_default());
            if shown < length {
                masked.push_str(REDACTED);
            }
            rest = key.get(length..).unwrap_or_default();
        }
        masked.push_str(rest);
        masked
    }
}

/// Percent escapes decoded once; malformed ones stay as they are.
fn decoded(bytes: &[u8]) -> Vec<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (mut decoded, mut rest) = (Vec::with_capacity(bytes.len()), bytes);
    while let [first, behind @ ..] = rest {
        if let [b'%', high, low, behind @ ..] = rest
            && let (Some(high), Some(low)) = (digit(high), digit(low))
        {
            decoded.push(high * 16 + low);
            rest = behind;
        } else {
            decoded.push(*first);
            rest = behind;
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::PrefixLength;

    const KEY: &str = "sk-live-topsecretpart";

    fn masked(text: &str, header: Option<(&str, &str)>) -> String {
        let form = KeyForm { prefix_length: PrefixLength::DEFAULT, beginning: "kw_".into() };
        let key = PresentedKey::parse(KEY.as_bytes()).unwrap();
        let list: Vec<(String, Vec<u8>)> =
            header.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
        Mask::new(&form, Some(&key), &Headers::from_pairs(&list), &[]).text(text, 100)
    }

    #[test]
    fn the_presented_key_is_taken_out_wherever_it_stands() {
        for (text, expected) in [
            ("/v1/models", "/v1/models"),
            ("/v1/sk-live-topsecretpart/x", "/v1/[redacted]/x"),
            ("/topsecretpart/topsecretpart", "/[redacted]/[redacted]"),
            ("/v1/topsecr%65tpart", "[redacted]"),
            ("/v1/topsecr%65tpart%zz", "[redacted]"),
            ("/a%20b/topsecretpart", "/a%20b/[redacted]"),
            ("/topsecret", "/topsecret"),
        ] {
            assert_eq!(masked(text, None), expected);
        }
    }

    #[test]
    fn so_is_what_looks_like_one_of_ours() {
        for (text, expected) in [
            ("/kw_7Hq2xabcdefghijkmnop/x", "/kw_7Hq2x[redacted]/x"),
            ("/kw_short", "/kw_short"),
            ("/kw_kw_7Hq2xabcdefghijkmnop", "/kw_kw_7H[redacted]"),
            ("/%6bw_7Hq2xabcdefghijkmnop", "[redacted]"),
        ] {
            assert_eq!(masked(text, None), expected);
        }
    }

    #[test]
    fn and_what_a_carrier_holds_that_is_no_key() {
        let header = Some(("authorization", "Bearer one-half another-half"));
        assert_eq!(masked("/one-half/another-half", header), "/one-half/[redacted]");
        assert_eq!(masked("/another-half", Some(("x-api-key", "x,another-half"))), "/[redacted]");
    }

    /// A key that the cut goes through is gone before that.
    #[test]
    fn a_long_text_is_cut_last() {
        let text = format!("/{}{KEY}", "é".repeat(45));
        let masked = masked(&text, None);
        assert_eq!(masked, format!("/{}[redacted…", "é".repeat(45)));
    }
}
