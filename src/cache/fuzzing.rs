//! Sealed entries for the fuzz targets in `fuzz/`, which stand outside: thin functions around what is private here.
//! Nothing else uses them.

use zeroize::Zeroizing;

use super::redis::StoredRecords;
use super::seal::{self, Sealed};
use super::secrets::{CacheSecretDefect, CacheSecrets};
use super::{entry, names};
use crate::domain::key::KeyPrefix;
use crate::domain::time::Timestamp;

/// Seals and opens under one secret.
pub struct Sealer(CacheSecrets);

impl Sealer {
    /// Under the first secret of this text.
    pub fn new(secrets: &[u8]) -> Result<Self, CacheSecretDefect> {
        CacheSecrets::parse(secrets).map(Self)
    }

    /// Seals records; `None` where they are too large.
    pub fn seal_records(&self, prefix: &KeyPrefix, plaintext: &[u8]) -> Option<Vec<u8>> {
        let keys = self.0.writing();
        seal::seal(keys, Sealed::Record, &keys.record_name(prefix), plaintext).ok()
    }

    /// Opens what was found where the records of a prefix are.
    pub fn open_records(&self, prefix: &KeyPrefix, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.open(Sealed::Record, prefix, sealed)
    }

    /// Opens the same as if it were a proof.
    pub fn open_as_proof(&self, prefix: &KeyPrefix, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.open(Sealed::Proof, prefix, sealed)
    }

    fn open(&self, purpose: Sealed, prefix: &KeyPrefix, sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let keys = self.0.writing();
        let name: names::RedisName = keys.record_name(prefix);
        seal::open(keys, purpose, &name, sealed).ok()
    }
}

/// Reads an entry of records.
pub fn decode_records(plaintext: &[u8], prefix: &KeyPrefix, now: Timestamp) -> Option<StoredRecords> {
    entry::decode_records(plaintext, prefix, now).ok()
}

/// Writes one.
pub fn encode_records(prefix: &KeyPrefix, records: &StoredRecords) -> Zeroizing<Vec<u8>> {
    entry::encode_records(prefix, records)
}

/// Reads an entry of a proof: the bytes of its name, and when it was proven.
pub fn decode_proof(plaintext: &[u8], now: Timestamp) -> Option<([u8; 32], Timestamp)> {
    entry::decode_proof(plaintext, now).ok().map(|(name, at)| (*name.as_bytes(), at))
}
