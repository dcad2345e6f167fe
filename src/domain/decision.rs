//! What is answered to one check: made afresh for every request, never cached.

use std::sync::Arc;
use std::time::Duration;

use super::denial::Denial;
use super::policy::Permit;
use super::record::Candidate;
use super::rules::Rule;

/// The outcome of one check. There is no default: an allow needs a [`Permit`], which only policy makes.
#[derive(Debug)]
pub enum Decision {
    /// A proven key within its rights.
    Allow(Permit),
    /// No key was sent and the route says that this is fine.
    Anonymous,
    /// Refused.
    Deny(Denied),
    /// Can't be decided now; never a refusal of the key.
    Unavailable(Cause),
}

/// A refusal.
#[derive(Debug)]
pub struct Denied {
    /// Why.
    pub reason: Denial,
    /// The proven key that was refused; `None` before proof.
    pub candidate: Option<Arc<Candidate>>,
    /// The rule that refused, where one of the key's restrictions did.
    pub rule: Option<Rule>,
    /// More than the reason says, where there is more to say.
    pub detail: Option<&'static str>,
    /// After how long the same request may fare better, where waiting helps.
    pub retry_after: Option<Duration>,
}

impl Denied {
    /// A refusal before proof: it says nothing about any record.
    pub fn unproven(reason: Denial) -> Self {
        Self { reason, candidate: None, rule: None, detail: None, retry_after: None }
    }

    /// Too many wrong secrets; the next one is looked at after `wait`.
    pub fn too_many_attempts(wait: Duration) -> Self {
        Self { retry_after: Some(wait), ..Self::unproven(Denial::TooManyAttempts) }
    }

    /// What the caller reads.
    pub fn message(&self) -> &'static str {
        self.detail.unwrap_or_else(|| self.reason.message())
    }
}

/// Where a record came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// The memory of this process.
    Memory,
    /// Redis.
    Redis,
    /// Postgres or SQLite.
    Store,
}

impl Tier {
    /// The word in metrics and metadata.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Redis => "redis",
            Self::Store => "store",
        }
    }
}

/// Why a check could not be decided; for logs and metrics, the caller sees `unavailable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The store did not answer, or answered with an error.
    Store,
    /// Too many keys share this prefix (see `--key-prefix-length`).
    TooManyCandidates,
    /// The verification queue is full.
    Overload,
    /// `--check-timeout`, or the caller's own deadline, ran out.
    Deadline,
    /// A verification ended without a verdict.
    Verification,
}

impl Cause {
    /// The word in logs and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::TooManyCandidates => "too_many_candidates",
            Self::Overload => "overload",
            Self::Deadline => "deadline",
            Self::Verification => "verification",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// They are in metrics and logs, so that dashboards and alerts have them.
    #[test]
    fn each_cause_has_the_word_that_is_documented() {
        let causes =
            [Cause::Store, Cause::TooManyCandidates, Cause::Overload, Cause::Deadline, Cause::Verification];
        let words = ["store", "too_many_candidates", "overload", "deadline", "verification"];
        assert_eq!(causes.map(Cause::as_str), words);
    }
}
