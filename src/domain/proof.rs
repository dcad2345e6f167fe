//! Verdicts, and the evidence that a key was proven.

use std::sync::Arc;

use super::record::Candidate;

/// What comparing one whole key with one exact hash said: an immutable fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The key is the one that the hash was made from.
    Match,
    /// It is not.
    Mismatch,
}

/// A candidate whose hash the presented key matches. Policy takes nothing less.
#[derive(Debug)]
pub struct Proven {
    candidate: Arc<Candidate>,
}

impl Proven {
    /// The only way to a `Proven`: a candidate and the verdict on *its* hash.
    pub fn from_verdict(candidate: &Arc<Candidate>, verdict: Verdict) -> Option<Self> {
        match verdict {
            Verdict::Match => Some(Self { candidate: Arc::clone(candidate) }),
            Verdict::Mismatch => None,
        }
    }

    /// The proven candidate.
    pub fn candidate(&self) -> &Arc<Candidate> {
        &self.candidate
    }

    /// Gives the candidate on, for the permit or the denial.
    pub fn into_candidate(self) -> Arc<Candidate> {
        self.candidate
    }
}
