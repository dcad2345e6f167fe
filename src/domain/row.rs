//! A candidate as a store reads it: columns, still without meaning.
//!
//! Every tier hands over this one form (Redis keeps it sealed), and [`super::record::Candidate::from_row`] gives it its
//! meaning, so that a record means the same wherever it came from. Numbers and dates are numbers here, never text.

use serde::{Deserialize, Deserializer, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// One key with its owner. `None` = NULL, or a column that this database does not have. Written out with every field
/// and read back strictly: a missing or unknown field is an error, because an entry that lost a restriction on the
/// way would otherwise read as unrestricted.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "each field is the column of the same name; the exceptions are described")]
pub struct CandidateRow {
    pub key_id: i64,
    #[serde(deserialize_with = "required")]
    pub key_name: Option<String>,
    #[serde(deserialize_with = "required")]
    pub key_hash: Option<String>,
    #[serde(deserialize_with = "required")]
    pub key_prefix: Option<String>,
    #[serde(deserialize_with = "required")]
    pub is_active: Option<bool>,
    /// Microseconds since 1970 UTC; `i64::MAX` and `i64::MIN` are PostgreSQL's infinities.
    #[serde(deserialize_with = "required")]
    pub expires_at: Option<i64>,
    /// JSON text, like the other list columns.
    #[serde(deserialize_with = "required")]
    pub scopes: Option<String>,
    #[serde(deserialize_with = "required")]
    pub allowed_models: Option<String>,
    #[serde(deserialize_with = "required")]
    pub allowed_endpoints: Option<String>,
    #[serde(deserialize_with = "required")]
    pub allowed_ips: Option<String>,
    #[serde(deserialize_with = "required")]
    pub allowed_chatbots: Option<String>,
    #[serde(deserialize_with = "required")]
    pub allowed_agents: Option<String>,
    #[serde(deserialize_with = "required")]
    pub rate_limit_per_minute: Option<i64>,
    #[serde(deserialize_with = "required")]
    pub rate_limit_per_hour: Option<i64>,
    #[serde(deserialize_with = "required")]
    pub rate_limit_per_day: Option<i64>,
    #[serde(deserialize_with = "required")]
    pub is_unlimited: Option<bool>,
    #[serde(deserialize_with = "required")]
    pub budget_limit_cents: Option<i64>,
    #[serde(deserialize_with = "required")]
    pub budget_type: Option<String>,
    #[serde(deserialize_with = "required")]
    pub total_cost: Option<i64>,
    /// Cents in `usage_tracking` since the first of the month (UTC); `None` where that table does not exist.
    #[serde(deserialize_with = "required")]
    pub month_cost: Option<i64>,
    /// `None` where the key has no owner row.
    #[serde(deserialize_with = "required")]
    pub user_id: Option<i64>,
    #[serde(deserialize_with = "required")]
    pub username: Option<String>,
    #[serde(deserialize_with = "required")]
    pub email: Option<String>,
    #[serde(deserialize_with = "required")]
    pub user_is_active: Option<bool>,
    #[serde(deserialize_with = "required")]
    pub is_superuser: Option<bool>,
    /// `users.role`, or the name behind `users.role_id`.
    #[serde(deserialize_with = "required")]
    pub role: Option<String>,
    #[serde(deserialize_with = "required")]
    pub account_locked: Option<bool>,
    /// Microseconds since 1970 UTC.
    #[serde(deserialize_with = "required")]
    pub account_locked_until: Option<i64>,
    /// Columns that held something of a type that the column can't have (SQLite lets any column hold anything). Each
    /// makes the key's policy invalid; the field itself is `None`.
    pub unreadable: Vec<String>,
}

/// By default serde reads a missing `Option` as `None`.
fn required<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(deserializer)
}

impl std::fmt::Debug for CandidateRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CandidateRow").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

#[cfg(test)]
impl CandidateRow {
    /// An active key 7 of the active user 3, without restrictions, with the given hash.
    pub(crate) fn sample(key_hash: &str) -> Self {
        Self {
            key_id: 7,
            key_name: Some("ci".into()),
            key_hash: Some(key_hash.into()),
            key_prefix: Some("kw_01234".into()),
            is_active: Some(true),
            expires_at: None,
            scopes: None,
            allowed_models: None,
            allowed_endpoints: None,
            allowed_ips: None,
            allowed_chatbots: None,
            allowed_agents: None,
            rate_limit_per_minute: None,
            rate_limit_per_hour: None,
            rate_limit_per_day: None,
            is_unlimited: None,
            budget_limit_cents: None,
            budget_type: None,
            total_cost: None,
            month_cost: None,
            user_id: Some(3),
            username: Some("ada".into()),
            email: Some("ada@example.com".into()),
            user_is_active: Some(true),
            is_superuser: Some(false),
            role: Some("user".into()),
            account_locked: None,
            account_locked_until: None,
            unreadable: Vec::new(),
        }
    }
}
