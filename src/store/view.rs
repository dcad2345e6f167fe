//! Views: rows as an operator sees them, for both stores.

use crate::domain::allowlist::strings_from_json;
use crate::domain::record::{Candidate, KeyId, UserId};
use crate::domain::time::Timestamp;

use super::admin::{HistoryEntry, KeySettings, KeyView, OldSecret, UserView};
use super::error::StoreError;
use super::select::{Cells, candidate_row};

/// Reads the cells of [`super::select::key_views_sql`]. A list that can't be read is shown empty and named in `defects`.
pub(super) fn key_view(cells: &mut impl Cells) -> Result<KeyView, StoreError> {
    let user_id = cells.int("owner_id")?.map(UserId::new);
    let description = cells.text("description")?;
    let tags = cells.text("tags")?;
    let permissions = cells.text("permissions")?;
    let created_at = time(cells, "created_at")?;
    let updated_at = time(cells, "updated_at")?;
    let last_used_at = time(cells, "last_used_at")?;
    // These six restrict nothing: of a wrong type they are shown empty and are no defect.
    drop(cells.take_unreadable());

    let row = candidate_row(cells)?;
    let settings = KeySettings {
        description,
        scopes: list(row.scopes.as_deref()),
        permissions: list(permissions.as_deref()),
        allowed_models: list(row.allowed_models.as_deref()),
        allowed_endpoints: list(row.allowed_endpoints.as_deref()),
        allowed_ips: list(row.allowed_ips.as_deref()),
        allowed_chatbots: list(row.allowed_chatbots.as_deref()),
        allowed_agents: list(row.allowed_agents.as_deref()),
        tags: list(tags.as_deref()),
        rate_limit_per_minute: limit(row.rate_limit_per_minute),
        rate_limit_per_hour: limit(row.rate_limit_per_hour),
        rate_limit_per_day: limit(row.rate_limit_per_day),
        is_unlimited: row.is_unlimited == Some(true),
        budget_limit_cents: row.budget_limit_cents,
        budget_type: row.budget_type.clone(),
        expires_at: row.expires_at.map(Timestamp::from_microseconds),
    };
    Ok(KeyView {
        id: KeyId::new(row.key_id),
        name: row.key_name.clone(),
        key_prefix: row.key_prefix.clone(),
        user_id,
        username: row.username.clone(),
        is_active: row.is_active == Some(true),
        settings,
        created_at,
        updated_at,
        last_used_at,
        old_secrets: Vec::new(),
        defects: Candidate::from_row(&row).defects(),
    })
}

/// Reads the cells of [`super::select::old_secrets_sql`].
pub(super) fn old_secret(cells: &mut impl Cells) -> Result<OldSecret, StoreError> {
    Ok(OldSecret { rotated_at: time(cells, "rotated_at")?, expires_at: time(cells, "expires_at")? })
}

/// Reads the cells of [`super::select::history_sql`].
pub(super) fn history_entry(cells: &mut impl Cells) -> Result<HistoryEntry, StoreError> {
    Ok(HistoryEntry {
        at: time(cells, "at")?,
        actor: cells.text("actor")?,
        action: cells.text("action")?,
        changes: cells.text("changes")?,
    })
}

/// Reads the cells of [`super::select::user_views_sql`].
pub(super) fn user_view(cells: &mut impl Cells) -> Result<UserView, StoreError> {
    let Some(id) = cells.int("user_id")? else {
        return Err(StoreError::Schema("users.id is not a number".to_owned()));
    };
    Ok(UserView {
        id: UserId::new(id),
        username: cells.text("username")?.unwrap_or_default(),
        email: cells.text("email")?.unwrap_or_default(),
        role: cells.text("role")?,
        is_active: cells.bool("user_is_active")? == Some(true),
        is_superuser: cells.bool("is_superuser")? == Some(true),
        created_at: time(cells, "created_at")?,
    })
}

fn time(cells: &mut impl Cells, name: &'static str) -> Result<Option<Timestamp>, StoreError> {
    Ok(cells.time(name)?.map(Timestamp::from_microseconds))
}

fn list(json: Option<&str>) -> Vec<String> {
    strings_from_json(json).unwrap_or_default()
}

/// A negative one is named in `defects`.
fn limit(column: Option<i64>) -> Option<u32> {
    column.filter(|value| *value >= 0).map(|value| u32::try_from(value).unwrap_or(u32::MAX))
}
