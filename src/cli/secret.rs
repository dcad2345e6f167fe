//! New keys: the secret, its public prefix and its hash. Their form is [`crate::domain::key_format`]'s.

use anyhow::Context;
use clap::ValueEnum;
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::domain::key::{KeyPrefix, MAX_KEY_BYTES, PrefixLength, PresentedKey};
use crate::domain::key_format::{ALPHABET, SECRET_CHARACTERS, TAIL_CHARACTERS, checksum};

/// Fewer in the public prefix and too many keys share one, each of which costs a bcrypt to tell apart.
const FEWEST_RANDOM_IN_PREFIX: usize = 4;
/// More and the key has no room for its secret.
const LONGEST_PREFIX: usize = MAX_KEY_BYTES - TAIL_CHARACTERS;
const BCRYPT_COST: u32 = 10;

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
    /// Makes a key that begins with `beginning` (`--new-key-prefix`) and has a public prefix of this length.
    pub(super) fn generate(beginning: &str, length: PrefixLength) -> anyhow::Result<Self> {
        let shortest = beginning.len() + FEWEST_RANDOM_IN_PREFIX;
        anyhow::ensure!(
            (shortest..=LONGEST_PREFIX).contains(&length.get()),
            "keys that begin with {beginning:?} need a --key-prefix-length from {shortest} to {LONGEST_PREFIX}, not {}",
            length.get()
        );
        Self::from_random(beginning, length, system_randomness)
    }

    /// Makes another secret for a key that keeps its public prefix.
    pub(super) fn for_prefix(prefix: &KeyPrefix, length: PrefixLength) -> anyhow::Result<Self> {
        anyhow::ensure!(
            prefix.as_str().len() == length.get() && length.get() <= LONGEST_PREFIX,
            "its prefix {:?} has {} characters; --key-prefix-length is {}, so no request finds this key: create another one",
            prefix.as_str(),
            prefix.as_str().len(),
            length.get()
        );
        Self::from_random(prefix.as_str(), length, system_randomness)
    }

    fn from_random(
        beginning: &str,
        length: PrefixLength,
        mut fill: impl FnMut(&mut [u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let mut text = Zeroizing::new(String::with_capacity(MAX_KEY_BYTES));
        text.push_str(beginning);
        let end = length.get() + SECRET_CHARACTERS;
        let mut bytes = Zeroizing::new([0_u8; 64]);
        while text.len() < end {
            fill(&mut *bytes)?;
            let missing = end - text.len();
            text.extend(bytes.iter().filter_map(|byte| letter(*byte)).take(missing));
        }
        let sum = checksum(text.as_bytes());
        text.push('_');
        text.extend(sum.map(char::from));
        let key = PresentedKey::parse(text.as_bytes())?;
        let prefix = KeyPrefix::new(key.prefix(length)?).context("cut the prefix")?;
        Ok(Self { text, prefix })
    }

    /// The text for `key_hash`.
    pub(super) fn hash(&self, form: HashForm) -> anyhow::Result<Zeroizing<String>> {
        hash(self.text.as_bytes(), form)
    }
}

/// The text for `key_hash` of any secret.
pub(super) fn hash(secret: &[u8], form: HashForm) -> anyhow::Result<Zeroizing<String>> {
    let text = match form {
        HashForm::Bcrypt => bcrypt::hash(secret, BCRYPT_COST)?,
        HashForm::Sha256 => {
            let digest = Sha256::digest(secret);
            digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
        }
    };
    Ok(Zeroizing::new(text))
}

fn system_randomness(bytes: &mut [u8]) -> anyhow::Result<()> {
    getrandom::fill(bytes).map_err(|error| anyhow::anyhow!("read the system's randomness: {error}"))
}

/// Bytes from 232 on are thrown away: 232 is four times 58, so every letter is equally likely.
fn letter(byte: u8) -> Option<char> {
    if byte >= 232 {
        return None;
    }
    ALPHABET.get(usize::from(byte % 58)).map(|letter| char::from(*letter))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::hash::KeyHash;
    use crate::domain::key_format::KeyForm;

    fn form() -> KeyForm {
        KeyForm { prefix_length: PrefixLength::DEFAULT, beginning: "kw_".to_owned() }
    }

    #[test]
    fn every_letter_is_equally_likely() {
        let mut counts = BTreeMap::new();
        for letter in (0..=u8::MAX).filter_map(letter) {
            *counts.entry(letter).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 58);
        assert!(counts.values().all(|count| *count == 4), "{counts:?}");
    }

    #[test]
    fn a_key_is_its_prefix_33_letters_and_a_checksum_and_differs_each_time() {
        let make = || NewSecret::generate("kw_", PrefixLength::DEFAULT).unwrap();
        let key = make();
        assert_eq!(key.text.len(), 48);
        assert!(key.text.starts_with("kw_"));
        assert_eq!(key.prefix.as_str(), &key.text[..8]);
        assert_ne!(*key.text, *make().text);
        let presented = PresentedKey::parse(key.text.as_bytes()).unwrap();
        assert!(!form().is_mistyped(&presented));
        let mistyped =
            PresentedKey::parse(format!("{}?", &key.text[..47]).replace('?', "1").as_bytes()).unwrap();
        assert_eq!(form().is_mistyped(&mistyped), !key.text.ends_with('1'));
    }

    #[test]
    fn another_secret_for_a_key_has_its_prefix() {
        let prefix = KeyPrefix::new("sk-abcde").unwrap();
        let key = NewSecret::for_prefix(&prefix, PrefixLength::DEFAULT).unwrap();
        assert_eq!((key.prefix, key.text.len()), (prefix.clone(), 48));
        assert!(key.text.starts_with("sk-abcde"));
        assert!(NewSecret::for_prefix(&prefix, PrefixLength::new(9).unwrap()).is_err());
        assert!(NewSecret::for_prefix(&KeyPrefix::new("sk abcde").unwrap(), PrefixLength::DEFAULT).is_err());
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
        assert_eq!(key.unwrap().text[..41], *"1".repeat(41));
        assert_eq!(reads, 2);
        assert!(NewSecret::from_random("", PrefixLength::DEFAULT, |_| anyhow::bail!("none")).is_err());
    }

    #[test]
    fn a_prefix_length_that_shows_too_much_or_too_little_is_refused() {
        let make = |beginning: &str, length| {
            NewSecret::generate(beginning, PrefixLength::new(length).unwrap()).map(|key| key.text.len())
        };
        assert!(make("kw_", 6).is_err());
        assert_eq!(make("kw_", 7).unwrap(), 47);
        assert_eq!(make("kw_", 32).unwrap(), 72);
        let error = make("kw_", 33).unwrap_err().to_string();
        assert!(error.contains("from 7 to 32, not 33"), "{error}");
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
