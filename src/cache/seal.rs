//! Sealing: what is written to Redis can be neither read nor made nor moved without the secret.
//!
//! `version (1 byte) ‖ secret id (4) ‖ nonce (24) ‖ XChaCha20-Poly1305 ciphertext and tag`. The purpose, the version, the
//! secret's id and the whole Redis name are authenticated with it, so an entry is good only where and for what it was
//! sealed. A nonce is 192 random bits: replicas need not agree on a counter, and none is ever met twice.

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use thiserror::Error;
use zeroize::Zeroizing;

use super::names::RedisName;
use super::secrets::KeySet;
use super::verdict_name::RandomnessError;

/// Largest sealed entry that is written or believed.
pub(super) const MAX_SEALED_BYTES: usize = 1024 * 1024;

const VERSION: u8 = 1;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
const HEADER_BYTES: usize = 1 + 4 + NONCE_BYTES;
const OVERHEAD: usize = HEADER_BYTES + TAG_BYTES;

/// What an entry is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sealed {
    /// The records of a prefix.
    Record,
    /// The proof of a key.
    Proof,
}

impl Sealed {
    const fn label(self) -> &'static [u8] {
        match self {
            Self::Record => b"keyward/1/sealed record",
            Self::Proof => b"keyward/1/sealed proof",
        }
    }

    fn key(self, keys: &KeySet) -> &[u8; 32] {
        match self {
            Self::Record => &keys.record_seal,
            Self::Proof => &keys.proof_seal,
        }
    }
}

/// Why an entry could not be sealed; it is then not written.
#[derive(Debug, Error)]
pub(super) enum SealError {
    /// Over [`MAX_SEALED_BYTES`].
    #[error("the entry is larger than 1 MiB")]
    TooLarge,
    /// No nonce.
    #[error(transparent)]
    Randomness(#[from] RandomnessError),
    /// The cipher refused.
    #[error("the cipher refused the entry")]
    Cipher,
}

/// Why an entry is not believed. All of them are misses; the words are for logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum Rejection {
    /// Over [`MAX_SEALED_BYTES`].
    #[error("larger than 1 MiB")]
    TooLarge,
    /// Too short to be an entry.
    #[error("too short")]
    TooShort,
    /// Made by another version of Keyward.
    #[error("of an unknown version")]
    UnknownVersion,
    /// Sealed under a secret that does not belong to its name.
    #[error("sealed under another secret")]
    OtherSecret,
    /// Not sealed by us, not for this name, not for this purpose, or damaged.
    #[error("with a broken seal")]
    BrokenSeal,
    /// Sealed by us, with contents that are not what they should be.
    #[error("of a wrong form")]
    WrongForm,
    /// Sealed by us, about something else than was asked for.
    #[error("about something else")]
    OtherSubject,
    /// Dated later than any clock skew explains.
    #[error("from the future")]
    Future,
}

/// Seals `plaintext` for one purpose and one name.
pub(super) fn seal(
    keys: &KeySet,
    purpose: Sealed,
    name: &RedisName,
    plaintext: &[u8],
) -> Result<Vec<u8>, SealError> {
    if plaintext.len() > MAX_SEALED_BYTES - OVERHEAD {
        return Err(SealError::TooLarge);
    }
    let mut nonce = [0_u8; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(RandomnessError)?;
    let aad = associated_data(purpose, keys.id, name);
    let ciphertext = XChaCha20Poly1305::new(purpose.key(keys).into())
        .encrypt(&XNonce::from(nonce), Payload { msg: plaintext, aad: &aad })
        .map_err(|_| SealError::Cipher)?;
    Ok([&[VERSION], keys.id.as_slice(), &nonce, &ciphertext].concat())
}

/// Opens what was found under `name`.
pub(super) fn open(
    keys: &KeySet,
    purpose: Sealed,
    name: &RedisName,
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, Rejection> {
    if sealed.len() > MAX_SEALED_BYTES {
        return Err(Rejection::TooLarge);
    }
    let (version, rest) = sealed.split_first().ok_or(Rejection::TooShort)?;
    if *version != VERSION {
        return Err(Rejection::UnknownVersion);
    }
    let (id, rest) = rest.split_first_chunk::<4>().ok_or(Rejection::TooShort)?;
    let (nonce, ciphertext) = rest.split_first_chunk::<NONCE_BYTES>().ok_or(Rejection::TooShort)?;
    if ciphertext.len() < TAG_BYTES {
        return Err(Rejection::TooShort);
    }
    if *id != keys.id {
        return Err(Rejection::OtherSecret);
    }
    let aad = associated_data(purpose, *id, name);
    XChaCha20Poly1305::new(purpose.key(keys).into())
        .decrypt(&XNonce::from(*nonce), Payload { msg: ciphertext, aad: &aad })
        .map(Zeroizing::new)
        .map_err(|_| Rejection::BrokenSeal)
}

/// Purpose behind its length, then two fields of fixed length, then the name: no two lists of fields give the same bytes.
fn associated_data(purpose: Sealed, id: [u8; 4], name: &RedisName) -> Vec<u8> {
    let label = purpose.label();
    let length = u32::try_from(label.len()).unwrap_or(u32::MAX).to_be_bytes();
    [length.as_slice(), label, &[VERSION], &id, name.as_str().as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cache::secrets::CacheSecrets;
    use crate::domain::key::KeyPrefix;

    fn secrets() -> CacheSecrets {
        CacheSecrets::parse(b"0123456789abcdef0123456789abcdef\nfedcba9876543210fedcba9876543210").unwrap()
    }

    fn name(keys: &KeySet, prefix: &str) -> RedisName {
        keys.record_name(&KeyPrefix::new(prefix).unwrap())
    }

    #[test]
    fn an_entry_opens_only_where_and_for_what_it_was_sealed() {
        let secrets = secrets();
        let keys = secrets.writing();
        let here = name(keys, "kw_01234");
        let sealed = seal(keys, Sealed::Record, &here, b"contents").unwrap();
        assert_eq!(open(keys, Sealed::Record, &here, &sealed).unwrap().as_slice(), b"contents");
        let refusal =
            |keys: &KeySet, purpose, name: &RedisName, sealed: &[u8]| open(keys, purpose, name, sealed).err();
        assert_eq!(
            refusal(keys, Sealed::Record, &name(keys, "kw_01235"), &sealed),
            Some(Rejection::BrokenSeal),
            "moved to another name"
        );
        assert_eq!(
            refusal(keys, Sealed::Proof, &here, &sealed),
            Some(Rejection::BrokenSeal),
            "other purpose"
        );
        let other = &secrets.reading()[1];
        assert_eq!(refusal(other, Sealed::Record, &here, &sealed), Some(Rejection::OtherSecret));
        let mut relabelled = sealed.clone();
        relabelled[1..5].copy_from_slice(&other.id);
        assert_eq!(refusal(other, Sealed::Record, &here, &relabelled), Some(Rejection::BrokenSeal));
    }

    /// The same key under both purposes would still not open: the purpose is authenticated too.
    #[test]
    fn purposes_are_apart_even_under_one_key() {
        let secrets = secrets();
        let keys = secrets.writing();
        let here = name(keys, "kw_01234");
        assert_ne!(
            associated_data(Sealed::Record, keys.id, &here),
            associated_data(Sealed::Proof, keys.id, &here)
        );
    }

    /// What an entry says of itself is authenticated, so another label would not show that the key is the same.
    #[test]
    fn every_secret_and_every_purpose_has_a_key_of_its_own() {
        let secrets = secrets();
        let (one, other) = (secrets.writing(), &secrets.reading()[1]);
        assert_ne!(Sealed::Record.key(one), Sealed::Proof.key(one));
        assert_ne!(Sealed::Record.key(one), Sealed::Record.key(other));
        assert_ne!(Sealed::Proof.key(one), Sealed::Proof.key(other));
    }

    #[test]
    fn what_is_shorter_than_a_tag_is_too_short_and_a_tag_alone_is_no_seal() {
        let secrets = secrets();
        let keys = secrets.writing();
        let entry =
            |bytes: usize| [&[VERSION], keys.id.as_slice(), &[0; NONCE_BYTES], &vec![0; bytes]].concat();
        let here = name(keys, "kw_01234");
        let refusal = |bytes| open(keys, Sealed::Record, &here, &entry(bytes)).err();
        assert_eq!(refusal(0), Some(Rejection::TooShort));
        assert_eq!(refusal(TAG_BYTES - 1), Some(Rejection::TooShort));
        assert_eq!(refusal(TAG_BYTES), Some(Rejection::BrokenSeal));
    }

    #[test]
    fn size_is_bounded_on_both_sides() {
        let secrets = secrets();
        let keys = secrets.writing();
        let here = name(keys, "kw_01234");
        let largest = vec![0; (1 << 20) - OVERHEAD];
        let sealed = seal(keys, Sealed::Record, &here, &largest).unwrap();
        assert_eq!(sealed.len(), MAX_SEALED_BYTES);
        assert!(open(keys, Sealed::Record, &here, &sealed).is_ok());
        let over = vec![0; MAX_SEALED_BYTES - OVERHEAD + 1];
        assert!(matches!(seal(keys, Sealed::Record, &here, &over), Err(SealError::TooLarge)));
        let bytes = vec![VERSION; MAX_SEALED_BYTES + 1];
        assert_eq!(open(keys, Sealed::Record, &here, &bytes).err(), Some(Rejection::TooLarge));
    }

    /// Pins the form: header fields where they should be, and two seals of one text share no nonce.
    #[test]
    fn form_is_version_secret_nonce_ciphertext() {
        let secrets = secrets();
        let keys = secrets.writing();
        let here = name(keys, "kw_01234");
        let (a, b) = (
            seal(keys, Sealed::Proof, &here, b"x").unwrap(),
            seal(keys, Sealed::Proof, &here, b"x").unwrap(),
        );
        assert_eq!(a.len(), 1 + 4 + 24 + 1 + 16);
        assert_eq!((a[0], &a[1..5]), (1, keys.id.as_slice()));
        assert_ne!(a[5..29], b[5..29]);
        let mut older = a.clone();
        older[0] = 0;
        assert_eq!(open(keys, Sealed::Proof, &here, &older).err(), Some(Rejection::UnknownVersion));
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_refused() {
        let secrets = secrets();
        let keys = secrets.writing();
        let here = name(keys, "kw_01234");
        let sealed = seal(keys, Sealed::Record, &here, b"contents").unwrap();
        for position in 0..sealed.len() {
            for bit in 0..8 {
                let mut damaged = sealed.clone();
                damaged[position] ^= 1 << bit;
                assert!(open(keys, Sealed::Record, &here, &damaged).is_err(), "byte {position}, bit {bit}");
            }
            assert!(open(keys, Sealed::Record, &here, &sealed[..position]).is_err(), "cut at {position}");
        }
        let longer = [sealed.as_slice(), b"\0"].concat();
        assert!(open(keys, Sealed::Record, &here, &longer).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_open_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let secrets = secrets();
            let keys = secrets.writing();
            prop_assert!(open(keys, Sealed::Record, &name(keys, "kw_01234"), &bytes).is_err());
        }

        #[test]
        fn what_is_sealed_opens(contents in prop::collection::vec(any::<u8>(), 0..2000)) {
            let secrets = secrets();
            let keys = secrets.writing();
            let here = name(keys, "kw_01234");
            let sealed = seal(keys, Sealed::Proof, &here, &contents).unwrap();
            let opened = open(keys, Sealed::Proof, &here, &sealed).unwrap();
            prop_assert_eq!(opened.as_slice(), &contents[..]);
        }
    }
}
