//! New keys: the secret, its public prefix and its hash.

use anyhow::Context;
use clap::ValueEnum;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::domain::key::{KeyPrefix, PrefixLength, PresentedKey};

/// 62^32 is 190.5 bits.
const RANDOM_CHARACTERS: usize = 32;
/// Fewer in the public prefix and too many keys share one, each of which costs a bcrypt to tell apart.
const FEWEST_RANDOM_IN_PREFIX: usize = 4;
/// Fewer behind the public prefix (130 bits) and a `sha256:` hash is no longer safe from guessing.
const FEWEST_SECRET: usize = 22;
const BCRYPT_COST: u32 = 10;
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// How the secret is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum HashForm {
    /// bcrypt with cost 10, as the platform's other programs write it
    Bcrypt,
    /// SHA-256: instant to verify, and enough for a generated key
    Sha256,
}

/// A key that nobody has seen yet.
pub(super) struct NewSecret {
    /// The whole key.
    pub(super) text: Zeroizing<String>,
    /// Its public part.
    pub(super) prefix: KeyPrefix,
}

impl NewSecret {
    /// Makes a key that begins with `beginning` (`--new-key-prefix`).
    pub(super) fn generate(beginning: &str, length: PrefixLength) -> anyhow::Result<Self> {
        Self::from_random(beginning, length, |bytes| {
            getrandom::fill(bytes).map_err(|error| anyhow::anyhow!("read the system's randomness: {error}"))
        })
    }

    fn from_random(
        beginning: &str,
        length: PrefixLength,
        mut fill: impl FnMut(&mut [u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let shortest = beginning.len() + FEWEST_RANDOM_IN_PREFIX;
        let longest = beginning.len() + RANDOM_CHARACTERS - FEWEST_SECRET;
        anyhow::ensure!(
            (shortest..=longest).contains(&length.get()),
            "keys that begin with {beginning:?} need a --key-prefix-length from {shortest} to {longest}, not {}",
            length.get()
        );
        let mut text = Zeroizing::new(String::with_capacity(beginning.len() + RANDOM_CHARACTERS));
        text.push_str(beginning);
        let mut bytes = Zeroizing::new([0_u8; 64]);
        while text.len() < beginning.len() + RANDOM_CHARACTERS {
            fill(&mut *bytes)?;
            let missing = beginning.len() + RANDOM_CHARACTERS - text.len();
            text.extend(bytes.iter().filter_map(|byte| letter(*byte)).take(missing));
        }
        let key = PresentedKey::parse(text.as_bytes())?;
        let prefix = KeyPrefix::new(key.prefix(length)?).context("cut the prefix")?;
        Ok(Self { text, prefix })
    }

    /// The text for `key_hash`.
    pub(super) fn hash(&self, form: HashForm) -> anyhow::Result<Zeroizing<String>> {
        let text = match form {
            HashForm::Bcrypt => bcrypt::hash(self.text.as_bytes(), BCRYPT_COST)?,
            HashForm::Sha256 => {
                let digest = Sha256::digest(self.text.as_bytes());
                digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
            }
        };
        Ok(Zeroizing::new(text))
    }
}

/// Bytes from 248 on are thrown away: 248 is four times 62, so every letter is equally likely.
fn letter(byte: u8) -> Option<char> {
    if byte >= 248 {
        return None;
    }
    ALPHABET.get(usize::from(byte % 62)).map(|letter| char::from(*letter))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::hash::KeyHash;

    #[test]
    fn every_letter_is_equally_likely() {
        let mut counts = BTreeMap::new();
        for letter in (0..=u8::MAX).filter_map(letter) {
            *counts.entry(letter).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 62);
        assert!(counts.values().all(|count| *count == 4), "{counts:?}");
    }

    #[test]
    fn a_key_is_its_beginning_and_32_letters_and_differs_each_time() {
        let make = || NewSecret::generate("kw_", PrefixLength::DEFAULT).unwrap();
        let key = make();
        assert_eq!(key.text.len(), 35);
        assert!(key.text.starts_with("kw_"));
        assert_eq!(key.prefix.as_str(), &key.text[..8]);
        assert_ne!(*key.text, *make().text);
    }

    #[test]
    fn randomness_is_read_until_there_is_enough_and_its_failure_is_an_error() {
        let mut reads = 0;
        let key = NewSecret::from_random("", PrefixLength::DEFAULT, |bytes| {
            reads += 1;
            // The first reading has nothing usable.
            bytes.fill(if reads == 1 { 255 } else { 0 });
            Ok(())
        });
        assert_eq!(*key.unwrap().text, "0".repeat(32));
        assert_eq!(reads, 2);
        assert!(NewSecret::from_random("", PrefixLength::DEFAULT, |_| anyhow::bail!("none")).is_err());
    }

    #[test]
    fn a_prefix_length_that_shows_too_much_or_too_little_is_refused() {
        let make = |beginning: &str, length| {
            NewSecret::generate(beginning, PrefixLength::new(length).unwrap()).map(|key| key.text.len())
        };
        assert!(make("kw_", 6).is_err());
        assert_eq!(make("kw_", 7).unwrap(), 35);
        assert_eq!(make("kw_", 13).unwrap(), 35);
        let error = make("kw_", 14).unwrap_err().to_string();
        assert!(error.contains("from 7 to 13, not 14"), "{error}");
        assert_eq!(make(&"a".repeat(40), 44).unwrap(), 72);
    }

    #[test]
    fn both_hashes_are_accepted_by_the_reader_and_match() {
        let key = NewSecret::generate("kw_", PrefixLength::DEFAULT).unwrap();
        let presented = PresentedKey::parse(key.text.as_bytes()).unwrap();
        let sha256 = KeyHash::parse(&key.hash(HashForm::Sha256).unwrap()).unwrap();
        assert_eq!(sha256.matches_sha256(&presented), Some(true));
        let text = key.hash(HashForm::Bcrypt).unwrap();
        assert_eq!(KeyHash::parse(&text).unwrap().bcrypt_cost(), Some(10));
        assert!(bcrypt::verify(key.text.as_bytes(), &text).unwrap());
    }
}
