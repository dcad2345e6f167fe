//! Parts of an answer that are the same for every request with a key, or with the same rights, written once.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::OnceLock;

/// A place for such a part beside what it was made from, so that it ends with that. What the bytes mean is known to who
/// writes them, and they are written when they are first needed.
#[derive(Default)]
pub struct PreparedAnswer(OnceLock<Written>);

/// What was written.
pub struct Written {
    bytes: Box<[u8]>,
    facts_from: u32,
    /// Headers that are set, by their place in the configured list.
    pub set: u32,
    /// Headers that are too long to be sent, by their place in the configured list.
    pub too_long: u32,
}

impl PreparedAnswer {
    /// What was written, or what `write` writes now.
    pub fn get_or_write(&self, write: impl FnOnce() -> Written) -> &Written {
        self.0.get_or_init(write)
    }
}

/// It says nothing that its neighbours do not say, so it never makes a difference.
impl PartialEq for PreparedAnswer {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for PreparedAnswer {}

impl Hash for PreparedAnswer {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// A copy may be changed, and is written anew.
impl Clone for PreparedAnswer {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// It repeats the record.
impl fmt::Debug for PreparedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.get().is_some() { "PreparedAnswer(written)" } else { "PreparedAnswer(empty)" })
    }
}

impl Written {
    /// From the fields for the request's headers and the fields of the facts.
    pub fn new(headers: &[u8], facts: &[u8], set: u32, too_long: u32) -> Self {
        // Lists that are longer than 8 KiB are not sent, so that there is no part of gibibytes.
        let facts_from = u32::try_from(headers.len()).unwrap_or(u32::MAX);
        Self { bytes: [headers, facts].concat().into(), facts_from, set, too_long }
    }

    /// Headers, facts.
    pub fn parts(&self) -> (&[u8], &[u8]) {
        let at = usize::try_from(self.facts_from).unwrap_or(usize::MAX);
        self.bytes.split_at_checked(at).unwrap_or_default()
    }
}
