//! Labels: bounded, every value known beforehand. Nothing that a caller sends becomes one.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

use crate::domain::decision::{Cause, Tier};

/// What was looked up in a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheKind {
    /// Prefix to candidates.
    Record,
    /// Key and hash to verdict.
    Verdict,
}

/// How a look-up ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheResult {
    /// Found.
    Hit,
    /// Not known.
    Miss,
    /// Known not to exist.
    Absent,
    /// Found, but the seal or the form was wrong: counted and treated as a miss.
    Rejected,
    /// The tier did not answer in time or answered with an error.
    Error,
}

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CheckLabels {
    /// `allow`, `deny` or `unavailable`
    pub decision: &'static str,
    /// `ok`, `anonymous`, a denial code, or the cause of an `unavailable`
    pub reason: &'static str,
}

/// Which cache, where, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CacheLabels {
    /// `record` or `verdict`
    pub cache: CacheKind,
    /// `memory`, `redis` or `store`
    pub tier: Tier,
    /// `hit`, `miss`, `absent`, `rejected` or `error`
    pub result: CacheResult,
}

/// Where the record of a check came from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TierLabels {
    /// `memory`, `redis`, `store`, or `none` where no record was looked up
    pub tier: &'static str,
}

/// What would have been denied.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ShadowLabels {
    /// A denial code.
    pub reason: &'static str,
}

/// Why Redis did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FailureLabels {
    /// The word that `/stats` has in `last_error`.
    pub kind: &'static str,
}

/// How a reload ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReloadLabels {
    /// `ok` or `failed`
    pub result: &'static str,
}

/// Where connections come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Door {
    /// `--grpc-listen`
    Grpc,
    /// `--http-listen`
    Http,
}

impl Door {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Grpc, Self::Http];

    /// The label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        }
    }
}

/// Which door.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DoorLabels {
    /// `grpc` or `http`
    pub door: Door,
}

/// Which program is running.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BuildLabels {
    /// The package's version.
    pub version: &'static str,
}

macro_rules! label_value {
    ($type:ty, $($variant:pat => $word:expr),+ $(,)?) => {
        impl EncodeLabelValue for $type {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
                let word: &str = match self { $($variant => $word),+ };
                word.encode(encoder)
            }
        }
    };
}

label_value!(CacheKind, Self::Record => "record", Self::Verdict => "verdict");
label_value!(
    CacheResult,
    Self::Hit => "hit", Self::Miss => "miss", Self::Absent => "absent",
    Self::Rejected => "rejected", Self::Error => "error",
);
label_value!(Door, door => door.as_str());
label_value!(Tier, tier => tier.as_str());

/// What rules of policy say.
pub(super) const SHADOW_REASONS: [&str; 6] = [
    "ip_not_allowed",
    "endpoint_not_allowed",
    "ambiguous_request",
    "scope_missing",
    "model_not_allowed",
    "insufficient_quota",
];

/// Every cause of an `unavailable`.
pub(super) const CAUSES: [Cause; 5] =
    [Cause::Store, Cause::TooManyCandidates, Cause::Overload, Cause::Deadline, Cause::Verification];

/// Every kind of failure of Redis.
pub const REDIS_FAILURES: [&str; 8] = [
    "breaker_open",
    "connect_timeout",
    "connect",
    "login",
    "timeout",
    "connection_dropped",
    "protocol",
    "refused",
];
