//! Redis names: the one file that knows what Keyward's keys in Redis are called.
//!
//! `keyward:1:` and a letter for the kind, then a keyed MAC in hex: no foreign text reaches a name, and who reads the
//! names learns neither prefixes nor keys.

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::secrets::KeySet;
use super::verdict_name::put_field;
use crate::domain::key::{KeyPrefix, PresentedKey};
use crate::domain::record::KeyId;

/// Matches what `flush` removes: records and proofs, not the last-used markers.
pub(super) const FLUSH_PATTERN: &str = "keyward:1:[rv]:*";

/// The Redis name of one entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RedisName(String);

impl RedisName {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    fn new(kind: char, mac: Hmac<Sha256>) -> Self {
        Self(format!("keyward:1:{kind}:{}", hex(&mac.finalize().into_bytes())))
    }
}

impl KeySet {
    /// Where the records of a prefix are.
    pub(super) fn record_name(&self, prefix: &KeyPrefix) -> RedisName {
        let mut mac = self.record_names.clone();
        put_field(&mut mac, prefix.as_str().as_bytes());
        RedisName::new('r', mac)
    }

    /// Where the proof of a key is. It is found by the key alone, so that it can be fetched together with the record
    /// that holds the hash; which hash it proves is inside the seal.
    pub(super) fn proof_name(&self, key: &PresentedKey) -> RedisName {
        let mut mac = self.proof_names.clone();
        put_field(&mut mac, key.expose_secret());
        RedisName::new('v', mac)
    }

    /// The marker of a key's last use.
    pub(super) fn marker_name(&self, key: KeyId) -> RedisName {
        let mut mac = self.marker_names.clone();
        put_field(&mut mac, &key.get().to_be_bytes());
        RedisName::new('u', mac)
    }
}

/// Lower-case hex.
pub(super) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::secrets::CacheSecrets;

    fn secrets(text: &str) -> CacheSecrets {
        CacheSecrets::parse(text.as_bytes()).unwrap()
    }

    /// Other replicas and other versions look under these very names.
    #[test]
    fn names_are_pinned_byte_for_byte() {
        let secrets = secrets("0123456789abcdef0123456789abcdef");
        let keys = secrets.writing();
        let prefix = KeyPrefix::new("kw_01234").unwrap();
        let key = PresentedKey::parse(b"kw_0123456789").unwrap();
        assert_eq!(hex(&keys.id), "750c1b0b");
        assert_eq!(
            keys.record_name(&prefix).as_str(),
            "keyward:1:r:ab00ab78a7af5723e3e8c2cb8b7bccad579e4f7c73298bdaa670fd4f38ddfaa2"
        );
        assert_eq!(
            keys.proof_name(&key).as_str(),
            "keyward:1:v:0787dd53dbe4a541f43b42fe4a1cbf3f89122b517d3d169e3063fc7a6927c0ed"
        );
        assert_eq!(
            keys.marker_name(KeyId::new(7)).as_str(),
            "keyward:1:u:d21cc486a8dea784f4f7f8a2e94c6d08b9818bb6a5ca4065bbcd54e09abd64d5"
        );
    }

    #[test]
    fn names_differ_by_secret_and_by_what_they_name() {
        let (a, b) =
            (secrets("0123456789abcdef0123456789abcdef"), secrets("0123456789abcdef0123456789abcdeg"));
        let prefix = |text: &str| KeyPrefix::new(text).unwrap();
        assert_ne!(a.writing().record_name(&prefix("kw_0")), b.writing().record_name(&prefix("kw_0")));
        assert_ne!(a.writing().record_name(&prefix("kw_0")), a.writing().record_name(&prefix("kw_1")));
        assert_ne!(a.writing().marker_name(KeyId::new(1)), a.writing().marker_name(KeyId::new(-1)));
        let name = a.writing().record_name(&prefix("evil:\r\n*"));
        assert!(name.as_str().bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b':'));
    }
}
