//! What the command line writes and reads: users and keys as an operator sees them.

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
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UserRef {
    /// `users.id`
    Id(UserId),
    /// `users.username`
    Username(String),
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
    /// Rights and limits.
    pub settings: KeySettings,
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
