//! The part of an answer that is the same for every request with a key, written once.

use std::fmt;
use std::sync::OnceLock;

/// A place for it beside the record that it was made from, so that it ends with that record. What the bytes mean is known
/// to who writes them, and they are written when they are first needed.
#[derive(Default)]
pub struct PreparedAnswer(OnceLock<Written>);

/// What was written.
pub struct Written {
    bytes: Box<[u8]>,
    facts_from: usize,
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

/// It repeats the record.
impl fmt::Debug for PreparedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.get().is_some() { "PreparedAnswer(written)" } else { "PreparedAnswer(empty)" })
    }
}

impl Written {
    /// From the fields for the request's headers and the fields of the facts.
    pub fn new(headers: &[u8], facts: &[u8], set: u32, too_long: u32) -> Self {
        Self { bytes: [headers, facts].concat().into(), facts_from: headers.len(), set, too_long }
    }

    /// Headers, facts.
    pub fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at_checked(self.facts_from).unwrap_or_default()
    }
}
