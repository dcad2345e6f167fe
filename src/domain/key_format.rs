//! The form of the keys that Keyward makes, with a checksum at the end: typing errors are told without any look-up, and
//! scanners can tell a leaked key from other text.
//!
//! ```text
//! kw_ 7Hq2x gT4…(33 characters)…Lw9 _ 3aXb8Z
//! └── prefix ┘└────── secret ─────┘   └ CRC-32 of all before the last underscore
//! ```
//!
//! 33 characters of 58 are 193 random bits, the public prefix not counted.

use super::key::{PrefixLength, PresentedKey};

/// Characters that are hard to take for each other: no `0`, `O`, `I`, `l`.
pub const ALPHABET: &[u8; 58] = b"123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";

/// Characters behind the public prefix.
pub const SECRET_CHARACTERS: usize = 33;

/// 58^6 is more than 2^32.
pub const CHECKSUM_CHARACTERS: usize = 6;

/// What stands behind the public prefix: secret, underscore, checksum.
pub const TAIL_CHARACTERS: usize = SECRET_CHARACTERS + 1 + CHECKSUM_CHARACTERS;

/// The checksum of what stands before the last underscore.
pub fn checksum(text: &[u8]) -> [u8; CHECKSUM_CHARACTERS] {
    let mut rest = crc32fast::hash(text);
    let mut characters = [0; CHECKSUM_CHARACTERS];
    for character in characters.iter_mut().rev() {
        let place = usize::try_from(rest % 58).unwrap_or_default();
        *character = ALPHABET.get(place).copied().unwrap_or_default();
        rest /= 58;
    }
    characters
}

/// How the keys of this installation look.
#[derive(Debug, Clone)]
pub struct KeyForm {
    /// `--key-prefix-length`
    pub prefix_length: PrefixLength,
    /// `--new-key-prefix`
    pub beginning: String,
}

impl KeyForm {
    /// Whether this key has the form of those that Keyward makes here and not their checksum. Keys of any other form may
    /// be somebody else's and are never called mistyped.
    pub fn is_mistyped(&self, key: &PresentedKey) -> bool {
        is_mistyped(key, &self.beginning, self.prefix_length)
    }
}

fn is_mistyped(key: &PresentedKey, beginning: &str, length: PrefixLength) -> bool {
    let bytes = key.expose_secret();
    if beginning.is_empty() || bytes.len() != length.get().saturating_add(TAIL_CHARACTERS) {
        return false;
    }
    let Some((text, [b'_', sum @ ..])) = bytes.split_at_checked(bytes.len() - CHECKSUM_CHARACTERS - 1) else {
        return false;
    };
    let Some(random) = text.strip_prefix(beginning.as_bytes()) else {
        return false;
    };
    let is_ours = |bytes: &[u8]| bytes.iter().all(|byte| ALPHABET.contains(byte));
    is_ours(random) && is_ours(sum) && checksum(text) != sum
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BEGINNING: &str = "kw_";

    fn key(random: &str) -> String {
        let text = format!("{BEGINNING}{random}");
        let sum = checksum(text.as_bytes());
        format!("{text}_{}", std::str::from_utf8(&sum).unwrap())
    }

    fn mistyped(text: &str) -> bool {
        let key = PresentedKey::parse(text.as_bytes()).unwrap();
        is_mistyped(&key, BEGINNING, PrefixLength::DEFAULT)
    }

    /// Fixed for ever: keys are in the world that end so.
    #[test]
    fn the_checksum_is_crc_32_in_base_58() {
        // CRC-32 of "123456789" is 0xcbf43926.
        assert_eq!(&checksum(b"123456789"), b"6DNX4R");
        assert_eq!(&checksum(b""), b"111111");
    }

    #[test]
    fn keys_of_another_form_are_never_called_mistyped() {
        let good = key(&"a".repeat(38));
        assert_eq!(good.len(), 8 + TAIL_CHARACTERS);
        assert!(!mistyped(&good));
        for other in [
            good.replace('_', "-"),
            good.replacen("kw_", "sk_", 1),
            format!("{good}a"),
            good[..47].to_owned(),
            // Not our alphabet.
            good.replacen("aaaa", "aa0a", 1),
            format!("{}0", &good[..47]),
        ] {
            assert!(!mistyped(&other), "{other}");
        }
        let key = PresentedKey::parse(good.replacen('a', "b", 1).as_bytes()).unwrap();
        assert!(is_mistyped(&key, BEGINNING, PrefixLength::DEFAULT));
        assert!(!is_mistyped(&key, "", PrefixLength::DEFAULT), "everything begins with nothing");
        assert!(!is_mistyped(&key, BEGINNING, PrefixLength::new(9).unwrap()));
    }

    proptest! {
        #[test]
        fn a_wrong_character_or_two_that_changed_places_are_noticed(
            random in "[1-9A-HJ-NP-Za-km-z]{38}", place in 0..38_usize, other in 0..58_usize
        ) {
            let good = key(&random);
            prop_assert!(!mistyped(&good));
            let mut bytes = good.clone().into_bytes();
            bytes[place + 3] = ALPHABET[other];
            let wrong = String::from_utf8(bytes).unwrap();
            prop_assert_eq!(mistyped(&wrong), wrong != good);
            let mut bytes = good.clone().into_bytes();
            bytes.swap(place + 3, (place + 1) % 38 + 3);
            let swapped = String::from_utf8(bytes).unwrap();
            prop_assert_eq!(mistyped(&swapped), swapped != good);
        }
    }
}
