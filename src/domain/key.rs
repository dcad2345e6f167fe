//! The presented key and its public prefix.
//!
//! A [`PresentedKey`] is the secret string a caller sent, parsed and unproven. It lives inline (no heap), is wiped when
//! dropped, compares in constant time and never prints itself.

use std::borrow::Borrow;
use std::fmt;

use subtle::ConstantTimeEq;
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Fewest bytes a key has: one more than the default prefix, so that a secret part exists.
pub const MIN_KEY_BYTES: usize = 9;

/// Most bytes a key has. bcrypt reads 72 bytes and ignores the rest, so a longer key would share its hash with others.
pub const MAX_KEY_BYTES: usize = 72;

/// The secret string that a caller sent.
///
/// Visible ASCII (0x21 to 0x7e) without `,` (Envoy joins repeated headers with it) and without `!` (Envoy puts it for
/// bytes that are not UTF-8), 9 to 72 bytes.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PresentedKey {
    bytes: [u8; MAX_KEY_BYTES],
    length: u8,
}

impl PresentedKey {
    /// Parses foreign bytes. The error says what is wrong, never what was sent.
    pub fn parse(bytes: &[u8]) -> Result<Self, KeyFormatError> {
        if bytes.is_empty() {
            return Err(KeyFormatError::Empty);
        }
        if bytes.len() > MAX_KEY_BYTES {
            return Err(KeyFormatError::TooLong);
        }
        if !bytes.iter().all(|byte| is_key_byte(*byte)) {
            return Err(KeyFormatError::ForbiddenByte);
        }
        if bytes.len() < MIN_KEY_BYTES {
            return Err(KeyFormatError::TooShort);
        }
        let mut key = Self { bytes: [0; MAX_KEY_BYTES], length: 0 };
        for (slot, byte) in key.bytes.iter_mut().zip(bytes) {
            *slot = *byte;
        }
        key.length = u8::try_from(bytes.len()).map_err(|_| KeyFormatError::TooLong)?;
        Ok(key)
    }

    /// The secret bytes, for hashing and MACs alone.
    pub fn expose_secret(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }

    /// How many bytes it has, which is no secret.
    pub fn length(&self) -> usize {
        usize::from(self.length)
    }

    /// The public prefix: the first `length` bytes. A key that has no secret part behind its prefix is refused.
    pub fn prefix(&self, length: PrefixLength) -> Result<&str, KeyFormatError> {
        match self.expose_secret().split_at_checked(length.get()) {
            // Visible ASCII by construction, so the conversion can't fail.
            Some((public, [_, ..])) => std::str::from_utf8(public).map_err(|_| KeyFormatError::ForbiddenByte),
            Some((_, [])) | None => Err(KeyFormatError::TooShort),
        }
    }
}

/// Constant time in the contents; the length of a key is no secret.
impl PartialEq for PresentedKey {
    fn eq(&self, other: &Self) -> bool {
        self.expose_secret().ct_eq(other.expose_secret()).into()
    }
}

impl Eq for PresentedKey {}

impl fmt::Debug for PresentedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresentedKey([redacted])")
    }
}

/// Why a credential is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyFormatError {
    /// A source was there and held nothing.
    #[error("the credential is empty")]
    Empty,
    /// A byte outside visible ASCII, or one of `,` and `!`.
    #[error(
        "the credential has a character that no key has (keys are visible ASCII without comma and exclamation mark)"
    )]
    ForbiddenByte,
    /// Over 72 bytes.
    #[error("the credential is longer than 72 characters")]
    TooLong,
    /// Under 9 bytes, or nothing behind the prefix.
    #[error("the credential is too short to be a key")]
    TooShort,
}

pub(super) const fn is_key_byte(byte: u8) -> bool {
    byte.is_ascii_graphic() && byte != b',' && byte != b'!'
}

/// How many bytes of a key are its public prefix (`--key-prefix-length`), 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixLength(u8);

impl PrefixLength {
    /// The contract's default.
    pub const DEFAULT: Self = Self(8);

    /// `None` outside 1 to 64: at least eight bytes of the longest key stay secret.
    pub fn new(length: u8) -> Option<Self> {
        (1..=64).contains(&length).then_some(Self(length))
    }

    /// The number of bytes.
    pub fn get(self) -> usize {
        usize::from(self.0)
    }
}

/// The first characters of a key, stored in clear, **not unique**.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyPrefix(Box<str>);

impl KeyPrefix {
    /// A prefix as stored or as named by an operator; any text that is not empty.
    pub fn new(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| Self(text.into()))
    }

    /// The characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for KeyPrefix {
    fn borrow(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_at_the_limits() {
        let of = |n: usize| PresentedKey::parse(&vec![b'a'; n]).map(|_| ());
        assert_eq!(of(0), Err(KeyFormatError::Empty));
        assert_eq!(of(8), Err(KeyFormatError::TooShort));
        assert_eq!(of(9), Ok(()));
        assert_eq!(of(72), Ok(()));
        assert_eq!(of(73), Err(KeyFormatError::TooLong));
    }

    #[test]
    fn every_byte_outside_the_alphabet_is_refused() {
        for byte in 0..=u8::MAX {
            let mut bytes = *b"kw_0123456789";
            bytes[6] = byte;
            let allowed = (0x21..=0x7e).contains(&byte) && byte != b',' && byte != b'!';
            assert_eq!(PresentedKey::parse(&bytes).is_ok(), allowed, "byte {byte:#x}");
        }
    }

    #[test]
    fn debug_does_not_print_the_secret() {
        let key = PresentedKey::parse(b"kw_topsecret").unwrap();
        assert!(!format!("{key:?}").contains("topsecret"));
    }

    #[test]
    fn a_key_without_a_secret_part_has_no_prefix() {
        let key = PresentedKey::parse(b"123456789").unwrap();
        assert_eq!(key.prefix(PrefixLength::DEFAULT).unwrap(), "12345678");
        assert_eq!(key.prefix(PrefixLength::new(9).unwrap()), Err(KeyFormatError::TooShort));
    }

    proptest! {
        #[test]
        fn an_accepted_key_is_kept_byte_for_byte(bytes in prop::collection::vec(any::<u8>(), 0..90)) {
            if let Ok(key) = PresentedKey::parse(&bytes) {
                prop_assert_eq!(key.expose_secret(), &bytes[..]);
                prop_assert!(bytes.iter().all(|b| (0x21..=0x7e).contains(b)));
            }
        }
    }
}
