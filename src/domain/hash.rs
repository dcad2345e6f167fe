//! Key hashes: the stored proof material, parsed.
//!
//! Two forms are accepted: bcrypt (`$2a$`, `$2b$`, `$2y$`, cost 4 to 14) and `sha256:` with 64 hex digits for
//! machine-made keys. Everything else disables the one key that carries it. `$2x$` marks hashes of a
//! sign-extension bug, which today's implementations compute differently, so it is refused rather than guessed.

use std::fmt;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use thiserror::Error;
use zeroize::Zeroizing;

use super::key::PresentedKey;

/// The bcrypt costs that are computed: 14 is about a second, 31 is a day and a half.
pub const BCRYPT_COSTS: std::ops::RangeInclusive<u32> = 4..=14;

const BCRYPT_BYTES: usize = 60;
const SHA256_LABEL: &str = "sha256:";

/// A stored hash in one of the accepted forms. There are as many in memory as keys, so it is small.
pub struct KeyHash {
    text: Zeroizing<Box<str>>,
    kind: HashKind,
    fingerprint: HashFingerprint,
}

#[derive(Clone, Copy)]
enum HashKind {
    Bcrypt { cost: u32 },
    Sha256,
}

/// Names a hash in memory without being it: half of the SHA-256 of its text, which no two hashes share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HashFingerprint([u8; 16]);

impl HashFingerprint {
    fn of(text: &str) -> Self {
        let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        let (half, _) = digest.split_first_chunk().unwrap_or((&[0; 16], &[]));
        Self(*half)
    }
}

impl KeyHash {
    /// Parses the column's text.
    pub fn parse(text: &str) -> Result<Self, HashDefect> {
        let kind = if text.starts_with(SHA256_LABEL) {
            sha256_digits(text).ok_or(HashDefect::MalformedSha256)?;
            HashKind::Sha256
        } else {
            HashKind::Bcrypt { cost: parse_bcrypt(text)? }
        };
        Ok(Self { text: Zeroizing::new(text.into()), kind, fingerprint: HashFingerprint::of(text) })
    }

    /// The stored text, for bcrypt and for MACs alone.
    pub fn expose_secret(&self) -> &str {
        &self.text
    }

    /// Names this hash in the memory caches.
    pub fn fingerprint(&self) -> HashFingerprint {
        self.fingerprint
    }

    /// The bcrypt cost, where the form is bcrypt.
    pub fn bcrypt_cost(&self) -> Option<u32> {
        match self.kind {
            HashKind::Bcrypt { cost } => Some(cost),
            HashKind::Sha256 => None,
        }
    }

    /// Compares a key with a SHA-256 hash, in constant time; `None` where the form is bcrypt, which is too slow to be
    /// computed here.
    pub fn matches_sha256(&self, key: &PresentedKey) -> Option<bool> {
        match self.kind {
            HashKind::Bcrypt { .. } => None,
            HashKind::Sha256 => {
                let digest: [u8; 32] = Sha256::digest(key.expose_secret()).into();
                let expected = sha256_digits(&self.text).map(Zeroizing::new);
                Some(expected.is_some_and(|expected| digest.ct_eq(&*expected).into()))
            }
        }
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash([redacted])")
    }
}

/// Why a stored hash can't be used; the key that carries it can't be proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum HashDefect {
    /// NULL.
    #[error("key_hash is missing")]
    Missing,
    /// Neither bcrypt nor `sha256:`.
    #[error("key_hash is neither bcrypt ($2a$, $2b$, $2y$) nor sha256:HEX")]
    UnknownForm,
    /// `$2x$`.
    #[error("key_hash is of the $2x$ form, which is not supported")]
    BcryptX,
    /// Not 60 characters of the bcrypt alphabet.
    #[error("key_hash is a malformed bcrypt hash")]
    MalformedBcrypt,
    /// Outside 4 to 14.
    #[error("key_hash has bcrypt cost {0}, outside 4 to 14")]
    CostOutOfRange(u32),
    /// Not 64 hex digits.
    #[error("key_hash is a malformed sha256 hash")]
    MalformedSha256,
}

/// Checks the whole 60-byte form, because the bcrypt crate has panicked on odd hashes before (RUSTSEC-2026-0199).
fn parse_bcrypt(text: &str) -> Result<u32, HashDefect> {
    let bytes = text.as_bytes();
    match bytes {
        [b'$', b'2', b'a' | b'b' | b'y', b'$', ..] => {}
        [b'$', b'2', b'x', b'$', ..] => return Err(HashDefect::BcryptX),
        _ => return Err(HashDefect::UnknownForm),
    }
    let [_, _, _, _, tens @ b'0'..=b'9', units @ b'0'..=b'9', b'$', rest @ ..] = bytes else {
        return Err(HashDefect::MalformedBcrypt);
    };
    let in_alphabet = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'/');
    if bytes.len() != BCRYPT_BYTES || !rest.iter().all(in_alphabet) {
        return Err(HashDefect::MalformedBcrypt);
    }
    let cost = u32::from(tens - b'0') * 10 + u32::from(units - b'0');
    if BCRYPT_COSTS.contains(&cost) { Ok(cost) } else { Err(HashDefect::CostOutOfRange(cost)) }
}

/// The digest behind the label.
fn sha256_digits(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0_u8; 32];
    let (pairs, rest) = text.strip_prefix(SHA256_LABEL)?.as_bytes().as_chunks::<2>();
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = hex_digit(*high)? << 4 | hex_digit(*low)?;
    }
    Some(bytes)
}

/// The value of one hex digit in either case.
pub fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";

    #[test]
    fn forms() {
        let defect = |text: &str| KeyHash::parse(text).map(|hash| hash.bcrypt_cost());
        assert_eq!(defect(GOOD), Ok(Some(10)));
        assert_eq!(defect(&GOOD.replace("$2b$", "$2a$")), Ok(Some(10)));
        assert_eq!(defect(&GOOD.replace("$2b$", "$2y$")), Ok(Some(10)));
        assert_eq!(defect(&GOOD.replace("$2b$", "$2x$")), Err(HashDefect::BcryptX));
        assert_eq!(defect(&GOOD.replace("$10$", "$31$")), Err(HashDefect::CostOutOfRange(31)));
        assert_eq!(defect(&GOOD.replace("$10$", "$03$")), Err(HashDefect::CostOutOfRange(3)));
        assert_eq!(defect(&GOOD.replace("$10$", "$14$")), Ok(Some(14)));
        assert_eq!(defect(&GOOD[..59]), Err(HashDefect::MalformedBcrypt));
        assert_eq!(defect(&GOOD.replace("N9", "é")), Err(HashDefect::MalformedBcrypt));
        assert_eq!(defect(""), Err(HashDefect::UnknownForm));
        assert_eq!(defect("plain"), Err(HashDefect::UnknownForm));
        assert_eq!(defect("sha256:00"), Err(HashDefect::MalformedSha256));
    }

    #[test]
    fn sha256_compares_the_whole_key() {
        let key = PresentedKey::parse(b"kw_0123456789").unwrap();
        let digest: String =
            Sha256::digest(key.expose_secret()).iter().map(|byte| format!("{byte:02x}")).collect();
        let hash = KeyHash::parse(&format!("sha256:{digest}")).unwrap();
        assert_eq!(hash.matches_sha256(&key), Some(true));
        let other = PresentedKey::parse(b"kw_0123456780").unwrap();
        assert_eq!(hash.matches_sha256(&other), Some(false));
        assert_eq!(KeyHash::parse(GOOD).unwrap().matches_sha256(&key), None);
    }

    #[test]
    fn debug_does_not_print_the_hash() {
        assert!(!format!("{:?}", KeyHash::parse(GOOD).unwrap()).contains("N9qo"));
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "\\PC{0,80}") {
            let _ = KeyHash::parse(&text);
        }

        /// Each byte of a good hash, replaced by any other character, is refused or still a whole bcrypt hash.
        #[test]
        fn a_damaged_hash_never_panics(position in 0_usize..60, replacement in any::<char>()) {
            let damaged: String = GOOD.chars().enumerate()
                .map(|(i, c)| if i == position { replacement } else { c }).collect();
            if KeyHash::parse(&damaged).is_ok() {
                prop_assert_eq!(damaged.len(), 60);
                prop_assert!(damaged.is_ascii());
            }
        }
    }
}
