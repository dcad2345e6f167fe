//! Cache secrets: what seals and names everything in Redis.
//!
//! Each line of the secret file is one secret; the first one writes, all of them read, so a secret is rotated by adding
//! the new one first and removing the old one after the longest lifetime. From each secret one key per purpose is
//! derived (HKDF-SHA256), so that nothing made for one purpose means anything under another. The secrets themselves are
//! wiped as soon as the keys are derived.

use std::fmt;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use hkdf::Hkdf;
use hmac::Hmac;
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use zeroize::Zeroizing;

use super::verdict_name::{Purpose, VerdictNamer, keyed_mac};

/// Fewest bytes of one secret.
pub const MIN_SECRET_BYTES: usize = 32;

/// Most secrets at a time: each one costs every look-up one more name.
pub const MAX_SECRETS: usize = 8;

/// Largest secret file that is read; eight secrets of 8 KiB.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// One or more secrets, as keys per purpose. Never printed.
pub struct CacheSecrets {
    /// At least one; the first one writes.
    sets: Box<[KeySet]>,
    /// Tells one list from another; never printed.
    fingerprint: [u8; 32],
}

impl CacheSecrets {
    /// Reads the secret file. Warns where others than its owner may read it.
    pub fn read(path: &Path) -> Result<Self, CacheSecretError> {
        let (secrets, mode) = Self::read_file(path)?;
        if mode & 0o044 != 0 {
            tracing::warn!(
                path = %path.display(),
                mode = format!("{:03o}", mode & 0o777),
                "cache secret file can be read by group or others; set its mode to 0600"
            );
        }
        Ok(secrets)
    }

    /// Reads it once more, without the warning.
    pub fn read_again(path: &Path) -> Result<Self, CacheSecretError> {
        Self::read_file(path).map(|(secrets, _)| secrets)
    }

    /// Whether the other list holds the same, in the same order.
    pub fn is_same(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }

    fn read_file(path: &Path) -> Result<(Self, u32), CacheSecretError> {
        let unreadable = |source| CacheSecretError::Unreadable { path: path.to_owned(), source };
        let mut file = std::fs::File::open(path).map_err(unreadable)?;
        let mode = file.metadata().map_err(unreadable)?.permissions().mode();
        // One allocation of the final size: growing would leave copies behind that are not wiped.
        let capacity = usize::try_from(MAX_FILE_BYTES + 1).unwrap_or(usize::MAX);
        let mut text = Zeroizing::new(Vec::with_capacity(capacity));
        file.by_ref().take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
        let secrets = Self::parse(&text)
            .map_err(|defect| CacheSecretError::Defective { path: path.to_owned(), defect })?;
        Ok((secrets, mode))
    }

    /// Parses the contents of a secret file: one secret per line, empty lines skipped.
    pub fn parse(text: &[u8]) -> Result<Self, CacheSecretDefect> {
        if u64::try_from(text.len()).unwrap_or(u64::MAX) > MAX_FILE_BYTES {
            return Err(CacheSecretDefect::FileTooLarge);
        }
        let mut secrets: Vec<&[u8]> = Vec::with_capacity(MAX_SECRETS);
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let secret = line.strip_suffix(b"\r").unwrap_or(line);
            if secret.is_empty() {
                continue;
            }
            let line = index + 1;
            if secret.len() < MIN_SECRET_BYTES {
                return Err(CacheSecretDefect::TooShort { line, length: secret.len() });
            }
            if secrets.contains(&secret) {
                return Err(CacheSecretDefect::Repeated { line });
            }
            if secrets.len() == MAX_SECRETS {
                return Err(CacheSecretDefect::TooMany);
            }
            secrets.push(secret);
        }
        if secrets.is_empty() {
            return Err(CacheSecretDefect::Empty);
        }
        // Bit by bit: joined, there would be a copy to wipe.
        let mut fingerprint = Sha256::new();
        for secret in &secrets {
            fingerprint.update(secret);
            // No secret has a line's end.
            fingerprint.update(b"\n");
        }
        let fingerprint = fingerprint.finalize().into();
        Ok(Self { sets: secrets.into_iter().map(KeySet::derive).collect(), fingerprint })
    }

    /// The keys that write.
    pub(super) fn writing(&self) -> &KeySet {
        self.sets.first().expect("parse refuses a file without a secret")
    }

    /// All keys, the writing ones first.
    pub(super) fn reading(&self) -> &[KeySet] {
        &self.sets
    }
}

impl fmt::Debug for CacheSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CacheSecrets({} [redacted])", self.sets.len())
    }
}

/// Why a secret file is refused.
#[derive(Debug, Error)]
pub enum CacheSecretError {
    /// It could not be opened or read.
    #[error("cannot read the cache secret file {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It was read and holds no usable secrets.
    #[error("the cache secret file {} can't be used", path.display())]
    Defective {
        /// The file.
        path: PathBuf,
        /// What is wrong and how to put it right.
        #[source]
        defect: CacheSecretDefect,
    },
}

/// What is wrong with the contents of a secret file. Never quotes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CacheSecretDefect {
    /// No line has anything on it.
    #[error("it holds no secret; write one with `openssl rand -base64 48`")]
    Empty,
    /// Over 64 KiB.
    #[error("it is larger than 64 KiB; it should hold one secret per line, at most 8")]
    FileTooLarge,
    /// A line of under 32 bytes.
    #[error(
        "line {line} has {length} bytes, a secret has at least 32; write one with `openssl rand -base64 48`"
    )]
    TooShort {
        /// Which line, from 1.
        line: usize,
        /// How many bytes it has.
        length: usize,
    },
    /// The same secret twice.
    #[error("line {line} repeats an earlier secret; remove it")]
    Repeated {
        /// Which line, from 1.
        line: usize,
    },
    /// More than eight secrets.
    #[error("it holds more than 8 secrets; remove those that no replica writes with any more")]
    TooMany,
}

/// The keys that come from one secret.
pub(super) struct KeySet {
    /// Says which secret sealed an entry, without saying anything about the secret.
    pub(super) id: [u8; 4],
    /// Names of records in Redis.
    pub(super) record_names: Hmac<Sha256>,
    /// Seals records.
    pub(super) record_seal: Zeroizing<[u8; 32]>,
    /// Names of proofs in Redis, from the key alone.
    pub(super) proof_names: Hmac<Sha256>,
    /// Names of verdicts inside sealed proofs, from key and hash.
    pub(super) verdicts: VerdictNamer,
    /// Seals proofs.
    pub(super) proof_seal: Zeroizing<[u8; 32]>,
    /// Names of last-used markers.
    pub(super) marker_names: Hmac<Sha256>,
}

impl KeySet {
    fn derive(secret: &[u8]) -> Self {
        let root = Hkdf::<Sha256>::new(Some(b"keyward/1/cache-secret"), secret);
        let key = |purpose: &str| {
            let mut key = Zeroizing::new([0_u8; 32]);
            root.expand(purpose.as_bytes(), key.as_mut_slice()).expect("HKDF-SHA256 gives up to 8160 bytes");
            key
        };
        let mut id = [0_u8; 4];
        root.expand(b"secret-id", &mut id).expect("HKDF-SHA256 gives up to 8160 bytes");
        Self {
            id,
            record_names: keyed_mac(
                &key("name-record"),
                Purpose::new(b"keyward/1/record name: length and prefix"),
            ),
            record_seal: key("seal-record"),
            proof_names: keyed_mac(
                &key("locate-verdict"),
                Purpose::new(b"keyward/1/verdict place: length and key"),
            ),
            verdicts: VerdictNamer::from_key(&key("name-verdict")),
            proof_seal: key("seal-verdict"),
            marker_names: keyed_mac(
                &key("name-marker"),
                Purpose::new(b"keyward/1/marker name: length and key id"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "0123456789abcdef0123456789abcdef";
    const B: &str = "fedcba9876543210fedcba9876543210";

    fn defect(text: &str) -> Option<CacheSecretDefect> {
        CacheSecrets::parse(text.as_bytes()).err()
    }

    #[test]
    fn one_secret_per_line_and_the_first_one_writes() {
        let both = CacheSecrets::parse(format!("\n{A}\r\n\n{B}").as_bytes()).unwrap();
        assert_eq!(both.reading().len(), 2);
        assert_eq!(both.writing().id, CacheSecrets::parse(A.as_bytes()).unwrap().writing().id);
        assert_eq!(both.reading()[1].id, CacheSecrets::parse(B.as_bytes()).unwrap().writing().id);
    }

    #[test]
    fn what_is_no_secret_file_is_refused() {
        assert_eq!(defect(""), Some(CacheSecretDefect::Empty));
        assert_eq!(defect("\n\r\n"), Some(CacheSecretDefect::Empty));
        assert_eq!(defect(&A[..31]), Some(CacheSecretDefect::TooShort { line: 1, length: 31 }));
        assert_eq!(
            defect(&format!("{A}\nshort\n")),
            Some(CacheSecretDefect::TooShort { line: 2, length: 5 })
        );
        assert_eq!(defect(&format!("{A}\n{A}\n")), Some(CacheSecretDefect::Repeated { line: 2 }));
        let many = |n: u32| (0..n).map(|i| format!("{A}{i}")).collect::<Vec<_>>().join("\n");
        assert_eq!(defect(&many(8)), None);
        assert_eq!(defect(&many(9)), Some(CacheSecretDefect::TooMany));
        assert_eq!(defect(&"x".repeat(65_537)), Some(CacheSecretDefect::FileTooLarge));
    }

    #[test]
    fn errors_name_the_file_and_the_fix_and_not_the_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        let missing = CacheSecrets::read(&path).unwrap_err().to_string();
        assert!(missing.contains(&path.display().to_string()), "{missing}");
        std::fs::write(&path, "tooshort").unwrap();
        let error = CacheSecrets::read(&path).unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains("secret can't be used") && text.contains("openssl"), "{text}");
        assert!(!text.contains("tooshort"), "{text}");
        std::fs::write(&path, A).unwrap();
        assert_eq!(format!("{:?}", CacheSecrets::read(&path).unwrap()), "CacheSecrets(1 [redacted])");
    }

    #[test]
    fn every_purpose_has_its_own_key() {
        let secrets = CacheSecrets::parse(A.as_bytes()).unwrap();
        assert_ne!(*secrets.writing().record_seal, *secrets.writing().proof_seal);
    }
}
