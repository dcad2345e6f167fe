//! Verdict names: what a proof is remembered under.
//!
//! A name is a keyed MAC over the whole presented key and the whole text of the hash, each behind its length. Another
//! suffix, a rotated hash or a shifted boundary between the two is another name, so a remembered proof answers exactly
//! the question that was once computed. Every field of that question goes into [`VerdictNamer::name`]; nothing else
//! makes a name.

use std::fmt;
use std::hash::{Hash, Hasher};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::domain::hash::KeyHash;
use crate::domain::key::PresentedKey;

/// Names one verdict. Compared in constant time; says nothing about key or hash to who lacks the naming key.
#[derive(Clone, Copy)]
pub struct VerdictName([u8; 32]);

impl VerdictName {
    pub(super) const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(super) const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for VerdictName {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for VerdictName {}

impl Hash for VerdictName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0);
    }
}

impl fmt::Debug for VerdictName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VerdictName([redacted])")
    }
}

/// Makes verdict names under one key. No allocation: the keyed state is prepared once and copied for each name.
pub struct VerdictNamer {
    /// HMAC that has already taken the purpose, padded to one SHA-256 block so that it costs nothing per name.
    prepared: Hmac<Sha256>,
}

impl VerdictNamer {
    /// A namer under a fresh random key, for names that never leave this process.
    pub fn random() -> Result<Self, RandomnessError> {
        let mut key = Zeroizing::new([0_u8; 32]);
        getrandom::fill(key.as_mut_slice()).map_err(RandomnessError)?;
        Ok(Self::from_key(&key))
    }

    pub(super) fn from_key(key: &[u8; 32]) -> Self {
        Self { prepared: keyed_mac(key, PURPOSE) }
    }

    /// The name of the verdict on this key and this hash.
    pub fn name(&self, key: &PresentedKey, hash: &KeyHash) -> VerdictName {
        let mut mac = self.prepared.clone();
        put_field(&mut mac, key.expose_secret());
        put_field(&mut mac, hash.expose_secret().as_bytes());
        VerdictName(mac.finalize().into_bytes().into())
    }
}

impl fmt::Debug for VerdictNamer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VerdictNamer([redacted])")
    }
}

/// The system gave no random bytes.
#[derive(Debug, thiserror::Error)]
#[error("the system gave no random bytes")]
pub struct RandomnessError(#[source] pub(super) getrandom::Error);

/// HMAC-SHA256 under `key` that has taken `purpose`, padded to one block.
pub(super) fn keyed_mac(key: &[u8; 32], purpose: Purpose) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of every length");
    mac.update(&purpose.0);
    mac
}

/// Adds one field behind its length: 4 bytes, big-endian. Fields are far below 4 GiB; a longer one could not be told
/// from another by its length alone, so its length is written as the largest.
pub(super) fn put_field(mac: &mut Hmac<Sha256>, field: &[u8]) {
    mac.update(&u32::try_from(field.len()).unwrap_or(u32::MAX).to_be_bytes());
    mac.update(field);
}

/// What a MAC is for: a label, padded with zeros to one SHA-256 block.
#[derive(Clone, Copy)]
pub(super) struct Purpose([u8; 64]);

impl Purpose {
    /// A label of at most 64 bytes.
    pub(super) const fn new(label: &[u8]) -> Self {
        let mut block = [0_u8; 64];
        let (start, _) = block.split_at_mut(label.len());
        start.copy_from_slice(label);
        Self(block)
    }
}

const PURPOSE: Purpose = Purpose::new(b"keyward/1/verdict: length and key, length and key_hash");

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BCRYPT: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";

    fn key(text: &str) -> PresentedKey {
        PresentedKey::parse(text.as_bytes()).unwrap()
    }

    fn hash(text: &str) -> KeyHash {
        KeyHash::parse(text).unwrap()
    }

    fn namer() -> VerdictNamer {
        VerdictNamer::from_key(&[7; 32])
    }

    /// The construction, spelled out a second time: whatever is left out of a name, or put differently, shows here.
    #[test]
    fn name_is_the_mac_of_purpose_key_and_hash() {
        let mut mac = Hmac::<Sha256>::new_from_slice(&[7; 32]).unwrap();
        let label = b"keyward/1/verdict: length and key, length and key_hash";
        mac.update(label);
        mac.update(&vec![0; 64 - label.len()]);
        mac.update(&[0, 0, 0, 13]);
        mac.update(b"kw_0123456789");
        mac.update(&[0, 0, 0, 60]);
        mac.update(BCRYPT.as_bytes());
        let expected: [u8; 32] = mac.finalize().into_bytes().into();
        assert_eq!(namer().name(&key("kw_0123456789"), &hash(BCRYPT)).0, expected);
    }

    #[test]
    fn name_is_pinned_byte_for_byte() {
        let name = namer().name(&key("kw_0123456789"), &hash(BCRYPT));
        assert_eq!(
            crate::cache::names::hex(&name.0),
            "7ee3af655c00d24af525d864f3a993bc46fde85056522bc13ec6889d89fd92fe"
        );
    }

    /// Guarantee 5: a wrong key that shares the prefix of a proven key is another name, and so is a rotated hash.
    #[test]
    fn another_key_or_another_hash_is_another_name() {
        let name = |k: &str, h: &str| namer().name(&key(k), &hash(h));
        let proven = name("kw_0123456789", BCRYPT);
        assert_eq!(proven, name("kw_0123456789", BCRYPT));
        assert_ne!(proven, name("kw_0123456788", BCRYPT));
        assert_ne!(proven, name("kw_01234567890", BCRYPT));
        assert_ne!(proven, name("kw_0123456789", &BCRYPT.replace("17lhWy", "17lhWz")));
        assert_ne!(proven, name("kw_0123456789", &BCRYPT.replace("$2b$", "$2a$")));
    }

    #[test]
    fn another_process_gives_other_names() {
        let (a, b) = (VerdictNamer::random().unwrap(), VerdictNamer::random().unwrap());
        assert_ne!(
            a.name(&key("kw_0123456789"), &hash(BCRYPT)),
            b.name(&key("kw_0123456789"), &hash(BCRYPT))
        );
    }

    #[test]
    fn debug_prints_neither_name_nor_key() {
        assert_eq!(
            format!("{:?} {:?}", namer(), namer().name(&key("kw_0123456789"), &hash(BCRYPT))),
            "VerdictNamer([redacted]) VerdictName([redacted])"
        );
    }

    fn mac_of(fields: &[&[u8]]) -> [u8; 32] {
        let mut mac = keyed_mac(&[1; 32], PURPOSE);
        for field in fields {
            put_field(&mut mac, field);
        }
        mac.finalize().into_bytes().into()
    }

    proptest! {
        /// Moving the boundary between two fields, or joining them, is another name.
        #[test]
        fn fields_are_not_ambiguous(bytes in prop::collection::vec(any::<u8>(), 1..40), a in 0_usize..40, b in 0_usize..40) {
            let (a, b) = (a.min(bytes.len()), b.min(bytes.len()));
            let at = |cut: usize| { let (x, y) = bytes.split_at(cut); mac_of(&[x, y]) };
            prop_assert_eq!(at(a) == at(b), a == b);
            prop_assert_ne!(at(a), mac_of(&[&bytes]));
        }

        #[test]
        fn two_keys_never_share_a_name(a in "[a-z0-9_]{9,72}", b in "[a-z0-9_]{9,72}") {
            let name = |k: &str| namer().name(&key(k), &hash(BCRYPT));
            prop_assert_eq!(name(&a) == name(&b), a == b);
        }
    }
}
