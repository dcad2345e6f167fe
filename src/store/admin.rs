//! What the command line writes and reads: users and keys as an operator sees them.

use std::fmt;

use zeroize::Zeroizing;

use crate::domain::key::KeyPrefix;
use crate::domain::record::{KeyId, UserId};
use crate::domain::time::Timestamp;

/// A user to be created. `hashed_password` gets a value that no password matches.
#[derive(Debug, Clone)]
pub struct NewUser {
    /// Unique.
    pub username: String,
    /// Unique.
    pub email: String,
    /// `user` where the operator named none.
    pub role: String,
    /// Has all scopes.
    pub is_superuser: bool,
}

/// How an operator names a user: digits are an id, anything else a username.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum UserRef {
    /// `users.id`
    Id(UserId),
    /// `users.username`
    Username(String),
}

impl fmt::Display for UserRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{}", id.get()),
            Self::Username(name) => write!(f, "{name:?}"),
        }
    }
}

/// A user as shown to an operator.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each field is the column of the same name")]
pub struct UserView {
    pub id: UserId,
    pub username: String,
    pub email: String,
    pub role: Option<String>,
    pub is_active: bool,
    pub is_superuser: bool,
    pub created_at: Option<Timestamp>,
}

/// What an operator may set on a key. An empty list is stored as NULL (unrestricted; for scopes: none).
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "each field is the column of the same name")]
pub struct KeySettings {
    pub description: Option<String>,
    pub scopes: Vec<String>,
    pub permissions: Vec<String>,
    pub allowed_models: Vec<String>,
    pub allowed_endpoints: Vec<String>,
    pub allowed_ips: Vec<String>,
    pub allowed_chatbots: Vec<String>,
    pub allowed_agents: Vec<String>,
    pub tags: Vec<String>,
    pub rate_limit_per_minute: Option<u32>,
    pub rate_limit_per_hour: Option<u32>,
    pub rate_limit_per_day: Option<u32>,
    pub is_unlimited: bool,
    pub budget_limit_cents: Option<i64>,
    /// `total` or `monthly`
    pub budget_type: Option<String>,
    pub expires_at: Option<Timestamp>,
}

/// A key to be created: the secret itself stays with the caller.
#[derive(Clone)]
pub struct NewKey {
    /// The owner.
    pub user: UserRef,
    /// For people.
    pub name: String,
    /// The secret's public prefix.
    pub prefix: KeyPrefix,
    /// The text for `key_hash`.
    pub hash: Zeroizing<String>,
    /// Whether it may be used.
    pub is_active: bool,
    /// Rights and limits.
    pub settings: KeySettings,
}

/// What changes about a key. What is empty in `settings` stays as it is.
#[derive(Debug, Clone, Default)]
pub struct KeyChange {
    /// For people.
    pub name: Option<String>,
    /// Whether it may be used.
    pub is_active: Option<bool>,
    /// Rights and limits that are set.
    pub settings: KeySettings,
    /// Columns that become NULL; `is_unlimited` becomes false.
    pub clear: Vec<&'static str>,
}

/// What becomes of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportMode {
    /// It stays.
    Commit,
    /// Everything is tried and undone.
    DryRun,
}

/// A new secret for a key that stays the same otherwise, its public prefix included: so whoever knows the key by its
/// prefix (caches, the change feed, the deny list) knows both secrets.
#[derive(Clone)]
pub struct Rotation {
    /// The key.
    pub id: KeyId,
    /// Its prefix, as it was read.
    pub prefix: KeyPrefix,
    /// The text for `key_hash`.
    pub hash: Zeroizing<String>,
    /// Until when the secret that is replaced stays good; `None`: it and all older ones end now.
    pub keep_until: Option<Timestamp>,
}

/// A secret that a rotation has replaced.
#[derive(Debug, Clone, Copy)]
pub struct OldSecret {
    /// When.
    pub rotated_at: Option<Timestamp>,
    /// Until when it is good.
    pub expires_at: Option<Timestamp>,
}

/// One change by command.
#[derive(Debug, Clone)]
pub struct HistoryEntry {
    /// When.
    pub at: Option<Timestamp>,
    /// The operating system's user.
    pub actor: Option<String>,
    /// The command.
    pub action: Option<String>,
    /// JSON object: the columns that were set.
    pub changes: Option<String>,
}

/// Which keys an operator wants to see: those for which all that is named holds.
#[derive(Debug, Clone, Default)]
pub struct KeyFilter {
    /// Of this user.
    pub user: Option<UserRef>,
    /// With exactly this prefix.
    pub prefix: Option<String>,
    /// Expiring up to this moment, or already expired.
    pub expiring_until: Option<Timestamp>,
    /// Neither used nor created since this moment.
    pub unused_since: Option<Timestamp>,
}

impl KeyFilter {
    /// Whether the moments hold. User and prefix are the query's.
    pub(super) fn admits(&self, key: &KeyView) -> bool {
        let expires =
            self.expiring_until.is_none_or(|end| key.settings.expires_at.is_some_and(|at| at <= end));
        let last = key.last_used_at.max(key.created_at);
        expires && self.unused_since.is_none_or(|since| last.is_none_or(|last| last < since))
    }
}

/// A key as shown to an operator: never its hash.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each field is the column of the same name")]
pub struct KeyView {
    pub id: KeyId,
    pub name: Option<String>,
    pub key_prefix: Option<String>,
    pub user_id: Option<UserId>,
    pub username: Option<String>,
    pub is_active: bool,
    pub settings: KeySettings,
    pub created_at: Option<Timestamp>,
    pub updated_at: Option<Timestamp>,
    pub last_used_at: Option<Timestamp>,
    /// Secrets that rotations have replaced and that are still good. Only where one key is shown.
    pub old_secrets: Vec<OldSecret>,
    /// What [`crate::domain::record::Candidate::defects`] says of the row, hash included.
    pub defects: Option<String>,
}

/// Which keys an operator means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySelector {
    /// Every key with this prefix.
    Prefix(KeyPrefix),
    /// One key.
    Key(KeyId),
    /// Every key of this user.
    User(UserId),
}
