//! The memory tier for verdicts: which key a hash was proven by, and which keys it refused.
//!
//! For a hash whose key is known, any other key is refused by comparing two MACs. That is sound because no two accepted
//! keys share a bcrypt input: longer keys and NUL bytes are refused when a key is parsed.

use std::time::Duration;

use quick_cache::sync::Cache;

use super::verdict_name::{VerdictName, VerdictNamer};
use crate::domain::hash::{HashFingerprint, KeyHash};
use crate::domain::key::PresentedKey;
use crate::domain::proof::Verdict;
use crate::domain::time::Instant;

/// How long a refusal is remembered: long enough to absorb a client that repeats a wrong key.
const MISMATCH_LIFETIME: Duration = Duration::from_mins(10);

/// Verdicts by hash and by name, bounded.
pub struct VerdictCache {
    /// Names verdicts with a key of this process alone.
    namer: VerdictNamer,
    /// The one key that matches a hash, by name.
    proven: Cache<HashFingerprint, Proof>,
    /// Keys that did not match, in a map of their own: guesses evict guesses.
    refused: Cache<VerdictName, Instant>,
}

#[derive(Clone, Copy)]
struct Proof {
    name: VerdictName,
    until: Instant,
}

/// What is remembered of one key and one hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recall {
    /// It was compared before, or follows from the proof of another key.
    Known(Verdict),
    /// It has to be compared.
    Unknown,
}

impl VerdictCache {
    /// Holds at most `max_entries` of each kind.
    pub fn new(namer: VerdictNamer, max_entries: usize) -> Self {
        Self { namer, proven: Cache::new(max_entries), refused: Cache::new(max_entries) }
    }

    /// The verdict on a key and a hash, as far as it is remembered.
    pub fn recall(&self, key: &PresentedKey, hash: &KeyHash, now: Instant) -> Recall {
        let name = self.namer.name(key, hash);
        if let Some(proof) = self.proven.get(&hash.fingerprint())
            && now < proof.until
        {
            let verdict = if proof.name == name { Verdict::Match } else { Verdict::Mismatch };
            return Recall::Known(verdict);
        }
        match self.refused.get(&name) {
            Some(until) if now < until => Recall::Known(Verdict::Mismatch),
            _ => Recall::Unknown,
        }
    }

    /// The name under which concurrent comparisons of one key and hash find each other.
    pub fn name(&self, key: &PresentedKey, hash: &KeyHash) -> VerdictName {
        self.namer.name(key, hash)
    }

    /// Remembers that the key matches the hash.
    pub fn keep_match(&self, key: &PresentedKey, hash: &KeyHash, until: Instant) {
        self.proven.insert(hash.fingerprint(), Proof { name: self.namer.name(key, hash), until });
    }

    /// Remembers that it does not.
    pub fn keep_mismatch(&self, key: &PresentedKey, hash: &KeyHash, now: Instant) {
        self.refused.insert(self.namer.name(key, hash), now.saturating_add(MISMATCH_LIFETIME));
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.proven.clear();
        self.refused.clear();
    }

    /// Verdicts remembered: matches, mismatches.
    pub fn len(&self) -> (usize, usize) {
        (self.proven.len(), self.refused.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn key(text: &str) -> PresentedKey {
        PresentedKey::parse(text.as_bytes()).unwrap()
    }

    fn cache() -> VerdictCache {
        VerdictCache::new(VerdictNamer::random().unwrap(), 100)
    }

    #[test]
    fn a_proven_hash_knows_its_key_and_refuses_every_other() {
        let (cache, hash) = (cache(), KeyHash::parse(HASH).unwrap());
        assert_eq!(cache.recall(&key("kw_0123456789"), &hash, at(0)), Recall::Unknown);
        cache.keep_match(&key("kw_0123456789"), &hash, at(10));
        assert_eq!(cache.recall(&key("kw_0123456789"), &hash, at(9)), Recall::Known(Verdict::Match));
        assert_eq!(cache.recall(&key("kw_0123456780"), &hash, at(9)), Recall::Known(Verdict::Mismatch));
        assert_eq!(cache.recall(&key("kw_0123456789"), &hash, at(10)), Recall::Unknown);
        assert_eq!(cache.recall(&key("kw_0123456780"), &hash, at(10)), Recall::Unknown);
    }

    #[test]
    fn a_proof_does_not_speak_for_another_hash() {
        let (cache, hash) = (cache(), KeyHash::parse(HASH).unwrap());
        let rotated = KeyHash::parse(&HASH.replace("lhWy", "lhWz")).unwrap();
        cache.keep_match(&key("kw_0123456789"), &hash, at(10));
        assert_eq!(cache.recall(&key("kw_0123456789"), &rotated, at(1)), Recall::Unknown);
    }

    #[test]
    fn a_refusal_is_remembered_for_that_key_alone() {
        let (cache, hash) = (cache(), KeyHash::parse(HASH).unwrap());
        cache.keep_mismatch(&key("kw_wrong6789"), &hash, at(0));
        assert_eq!(cache.recall(&key("kw_wrong6789"), &hash, at(599)), Recall::Known(Verdict::Mismatch));
        assert_eq!(cache.recall(&key("kw_wrong6780"), &hash, at(1)), Recall::Unknown);
        assert_eq!(cache.recall(&key("kw_wrong6789"), &hash, at(600)), Recall::Unknown);
    }
}
