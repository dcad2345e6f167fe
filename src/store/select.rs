//! Select: the one list of columns that both stores read, and how a row of them becomes a [`CandidateRow`].
//!
//! Postgres casts every column to one of five forms, whatever its declared type, so that a statement's result type
//! stays the same when the table changes. SQLite hands over what it holds and the reader looks at each value.

use crate::domain::row::CandidateRow;

use super::catalogue::{Catalogue, UsageColumns};
use super::error::StoreError;

/// Most keys that may share a prefix: each wrong secret costs a bcrypt per candidate.
pub const MAX_CANDIDATES: usize = 64;

/// How SQL is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Postgres,
    Sqlite,
}

/// The forms in which a column is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A whole number.
    Int,
    /// True or false.
    Bool,
    /// Text.
    Text,
    /// JSON, as text.
    Json,
    /// Microseconds since 1970 UTC.
    Time,
}

const INTEGERS: [&str; 3] = ["smallint", "integer", "bigint"];
const FRACTIONS: [&str; 3] = ["numeric", "real", "double precision"];
const TIMES: [&str; 3] = ["timestamp without time zone", "timestamp with time zone", "date"];

struct Field {
    /// What the row calls it.
    name: &'static str,
    table: &'static str,
    column: &'static str,
    form: Form,
}

const fn key(name: &'static str, column: &'static str, form: Form) -> Field {
    Field { name, table: "api_keys", column, form }
}

const fn user(name: &'static str, column: &'static str, form: Form) -> Field {
    Field { name, table: "users", column, form }
}

const fn old_secret(name: &'static str, column: &'static str, form: Form) -> Field {
    Field { name, table: "keyward_old_secrets", column, form }
}

const fn history(name: &'static str, form: Form) -> Field {
    Field { name, table: "keyward_history", column: name, form }
}

const CANDIDATE: [Field; 25] = [
    key("key_id", "id", Form::Int),
    key("key_name", "name", Form::Text),
    key("key_prefix", "key_prefix", Form::Text),
    key("is_active", "is_active", Form::Bool),
    key("expires_at", "expires_at", Form::Time),
    key("scopes", "scopes", Form::Json),
    key("allowed_models", "allowed_models", Form::Json),
    key("allowed_endpoints", "allowed_endpoints", Form::Json),
    key("allowed_ips", "allowed_ips", Form::Json),
    key("allowed_chatbots", "allowed_chatbots", Form::Json),
    key("allowed_agents", "allowed_agents", Form::Json),
    key("rate_limit_per_minute", "rate_limit_per_minute", Form::Int),
    key("rate_limit_per_hour", "rate_limit_per_hour", Form::Int),
    key("rate_limit_per_day", "rate_limit_per_day", Form::Int),
    key("is_unlimited", "is_unlimited", Form::Bool),
    key("budget_limit_cents", "budget_limit_cents", Form::Int),
    key("budget_type", "budget_type", Form::Text),
    key("total_cost", "total_cost", Form::Int),
    user("user_id", "id", Form::Int),
    user("username", "username", Form::Text),
    user("email", "email", Form::Text),
    user("user_is_active", "is_active", Form::Bool),
    user("is_superuser", "is_superuser", Form::Bool),
    user("account_locked", "account_locked", Form::Bool),
    user("account_locked_until", "account_locked_until", Form::Time),
];

/// The secret of a key: the current one,
const CURRENT_SECRET: [Field; 2] = [
    key("key_hash", "key_hash", Form::Text),
    // There is no such column: it reads as NULL.
    key("secret_expires_at", "", Form::Time),
];

/// or one that a rotation has replaced.
const OLD_SECRET: [Field; 2] = [
    old_secret("key_hash", "key_hash", Form::Text),
    old_secret("secret_expires_at", "expires_at", Form::Time),
];

/// What an operator sees of an old secret.
const OLD_SECRET_VIEW: [Field; 2] =
    [old_secret("rotated_at", "rotated_at", Form::Time), old_secret("expires_at", "expires_at", Form::Time)];

const HISTORY_VIEW: [Field; 6] = [
    history("at", Form::Time),
    history("actor", Form::Text),
    history("action", Form::Text),
    history("key_id", Form::Int),
    history("user_id", Form::Int),
    history("changes", Form::Json),
];

/// What an operator sees of a key beyond the candidate.
const KEY_VIEW: [Field; 7] = [
    key("owner_id", "user_id", Form::Int),
    key("description", "description", Form::Text),
    key("tags", "tags", Form::Json),
    key("permissions", "permissions", Form::Json),
    key("created_at", "created_at", Form::Time),
    key("updated_at", "updated_at", Form::Time),
    key("last_used_at", "last_used_at", Form::Time),
];

const USER_VIEW: [Field; 6] = [
    user("user_id", "id", Form::Int),
    user("username", "username", Form::Text),
    user("email", "email", Form::Text),
    user("user_is_active", "is_active", Form::Bool),
    user("is_superuser", "is_superuser", Form::Bool),
    user("created_at", "created_at", Form::Time),
];

/// The lookup by prefix; its one parameter is the prefix. No ORDER BY: together with LIMIT it makes Postgres walk the
/// primary key instead of the prefix's index.
pub(super) fn candidates_sql(catalogue: &Catalogue, dialect: Dialect) -> Result<String, StoreError> {
    // What the query has seen goes along with every row: one round trip, one moment.
    let seen = match dialect {
        Dialect::Postgres => {
            ", txid_current_snapshot()::text AS snapshot, \
             nullif(current_setting('keyward.incarnation', true), '') AS incarnation"
        }
        Dialect::Sqlite => "",
    };
    let limit = MAX_CANDIDATES + 1;
    // The first comparison uses the index, whatever the column's type and collation are; the second one compares bytes.
    let condition = match dialect {
        Dialect::Postgres => {
            let kind = castable(catalogue.kind("api_keys", "key_prefix").unwrap_or("text"));
            format!("k.key_prefix = $1::text::{kind} AND k.key_prefix::text = $1::text COLLATE \"C\"")
        }
        Dialect::Sqlite => "k.key_prefix = ?1 AND CAST(k.key_prefix AS TEXT) = ?1 COLLATE BINARY".to_owned(),
    };
    let current = select_keys(catalogue, dialect, &[&CANDIDATE, &CURRENT_SECRET], seen, "")?;
    if !catalogue.has_old_secrets() {
        return Ok(format!("{current} WHERE {condition} LIMIT {limit}"));
    }
    let old = select_keys(catalogue, dialect, &[&CANDIDATE, &OLD_SECRET], seen, &old_secrets_join(dialect))?;
    Ok(format!("{current} WHERE {condition} UNION ALL {old} WHERE {condition} LIMIT {limit}"))
}

/// An old secret belongs to its key as long as that has the hash which replaced it.
fn old_secrets_join(dialect: Dialect) -> String {
    let hash = if dialect == Dialect::Postgres { "k.key_hash::text" } else { "k.key_hash" };
    format!(" JOIN keyward_old_secrets o ON o.key_id = k.id AND o.current_hash = {hash}")
}

/// The old secrets of the key that is the one parameter, the oldest first.
pub(super) fn old_secrets_sql(catalogue: &Catalogue, dialect: Dialect) -> Result<String, StoreError> {
    let columns = columns(catalogue, dialect, &[&OLD_SECRET_VIEW])?;
    let (join, id) = (old_secrets_join(dialect), parameter(dialect));
    Ok(format!("SELECT {columns} FROM api_keys k{join} WHERE k.id = {id} ORDER BY o.id"))
}

/// The changes of the key that is the one parameter, the oldest first.
pub(super) fn history_sql(catalogue: &Catalogue, dialect: Dialect) -> Result<String, StoreError> {
    let columns = columns(catalogue, dialect, &[&HISTORY_VIEW])?;
    Ok(format!(
        "SELECT {columns} FROM keyward_history h WHERE h.key_id = {} ORDER BY h.id",
        parameter(dialect)
    ))
}

fn parameter(dialect: Dialect) -> &'static str {
    if dialect == Dialect::Postgres { "$1::int8" } else { "?1" }
}

/// Keys as an operator sees them, up to WHERE.
pub(super) fn key_views_sql(catalogue: &Catalogue, dialect: Dialect) -> Result<String, StoreError> {
    select_keys(catalogue, dialect, &[&CANDIDATE, &CURRENT_SECRET, &KEY_VIEW], "", "")
}

/// Users as an operator sees them, up to WHERE.
pub(super) fn user_views_sql(catalogue: &Catalogue, dialect: Dialect) -> Result<String, StoreError> {
    let columns = columns(catalogue, dialect, &[&USER_VIEW])?;
    let role = role_expression(catalogue, dialect);
    Ok(format!("SELECT {columns}, {role} AS role FROM users u{}", roles_join(catalogue)))
}

fn select_keys(
    catalogue: &Catalogue,
    dialect: Dialect,
    groups: &[&[Field]],
    more: &str,
    join: &str,
) -> Result<String, StoreError> {
    let columns = columns(catalogue, dialect, groups)?;
    let role = role_expression(catalogue, dialect);
    let month = month_expression(catalogue, dialect);
    Ok(format!(
        "SELECT {columns}, {role} AS role, {month} AS month_cost{more} \
         FROM api_keys k{join} LEFT JOIN users u ON u.id = k.user_id{}",
        roles_join(catalogue)
    ))
}

fn columns(catalogue: &Catalogue, dialect: Dialect, groups: &[&[Field]]) -> Result<String, StoreError> {
    let fields: Result<Vec<String>, StoreError> = groups
        .iter()
        .copied()
        .flatten()
        .map(|field| Ok(format!("{} AS {}", expression(catalogue, dialect, field)?, field.name)))
        .collect();
    Ok(fields?.join(", "))
}

fn roles_join(catalogue: &Catalogue) -> &'static str {
    if catalogue.has_roles() { " LEFT JOIN roles r ON r.id = u.role_id" } else { "" }
}

fn role_expression(catalogue: &Catalogue, dialect: Dialect) -> &'static str {
    match (dialect, catalogue.has_roles(), catalogue.has("users", "role")) {
        (Dialect::Postgres, true, true) => "COALESCE(r.name::text, u.role::text)",
        (Dialect::Postgres, true, false) => "r.name::text",
        (Dialect::Postgres, false, true) => "u.role::text",
        (Dialect::Postgres, false, false) => "NULL::text",
        (Dialect::Sqlite, true, true) => "COALESCE(r.name, u.role)",
        (Dialect::Sqlite, true, false) => "r.name",
        (Dialect::Sqlite, false, true) => "u.role",
        (Dialect::Sqlite, false, false) => "NULL",
    }
}

fn month_expression(catalogue: &Catalogue, dialect: Dialect) -> String {
    let fits = |usage: &UsageColumns| {
        let kind = |column| catalogue.kind("usage_tracking", column).unwrap_or_default();
        catalogue.has("api_keys", "budget_type")
            && (dialect == Dialect::Sqlite
                || INTEGERS.contains(&kind(usage.key))
                    && (INTEGERS.contains(&kind(usage.cost)) || FRACTIONS.contains(&kind(usage.cost)))
                    && TIMES.contains(&kind(usage.at)))
    };
    let Some(usage) = catalogue.usage().filter(fits) else {
        return if dialect == Dialect::Postgres { "NULL::int8".to_owned() } else { "NULL".to_owned() };
    };
    let (key, cost, at) = (usage.key, usage.cost, usage.at);
    match dialect {
        Dialect::Postgres => {
            let start = match catalogue.kind("usage_tracking", at) {
                Some("timestamp with time zone") => {
                    "date_trunc('month', timezone('UTC', now())) AT TIME ZONE 'UTC'"
                }
                _ => "date_trunc('month', timezone('UTC', now()))",
            };
            let sum = postgres_int(&format!("COALESCE(sum(t.{cost}), 0)"), "numeric");
            format!(
                "CASE WHEN k.budget_type::text = 'monthly' THEN \
                 (SELECT {sum} FROM usage_tracking t WHERE t.{key} = k.id AND t.{at} >= {start}) END"
            )
        }
        // Text compares like the dates that it spells, whether a space or a T stands behind the day.
        Dialect::Sqlite => format!(
            "CASE WHEN k.budget_type = 'monthly' THEN (SELECT CAST(total(t.{cost}) AS INTEGER) \
             FROM usage_tracking t WHERE t.{key} = k.id AND t.{at} >= strftime('%Y-%m-01', 'now')) END"
        ),
    }
}

fn expression(catalogue: &Catalogue, dialect: Dialect, field: &Field) -> Result<String, StoreError> {
    let Field { table, column, form, .. } = field;
    let kind = catalogue.kind(table, column);
    let alias = match *table {
        "users" => "u",
        "keyward_old_secrets" => "o",
        "keyward_history" => "h",
        _ => "k",
    };
    let place = format!("{alias}.{column}");
    match (dialect, kind) {
        (Dialect::Sqlite, Some(_)) => Ok(place),
        (Dialect::Sqlite, None) => Ok("NULL".to_owned()),
        (Dialect::Postgres, None) => Ok(match form {
            Form::Int | Form::Time => "NULL::int8",
            Form::Bool => "NULL::bool",
            Form::Text | Form::Json => "NULL::text",
        }
        .to_owned()),
        (Dialect::Postgres, Some(kind)) => postgres_expression(&place, kind, *form).ok_or_else(|| {
            StoreError::Schema(format!("{table}.{column} can't be read as it is of type {kind}"))
        }),
    }
}

/// `None` where the type can't hold what the column is for: that stops everything, because a restriction that is
/// skipped is a restriction lost.
fn postgres_expression(place: &str, kind: &str, form: Form) -> Option<String> {
    match form {
        Form::Int if INTEGERS.contains(&kind) => Some(format!("{place}::int8")),
        Form::Int if FRACTIONS.contains(&kind) => Some(postgres_int(place, kind)),
        Form::Bool if kind == "boolean" => Some(place.to_owned()),
        Form::Json if kind.ends_with("[]") => Some(format!("array_to_json({place})::text")),
        Form::Text | Form::Json => Some(format!("{place}::text")),
        Form::Time if TIMES.contains(&kind) => {
            // The epoch of a naive timestamp is counted as if it were UTC, whatever the session's zone is. Postgres
            // reaches a few years farther than i64 does.
            let finite = postgres_int(&format!("extract(epoch FROM {place}) * 1000000"), "numeric");
            Some(format!(
                "CASE WHEN isfinite({place}) THEN {finite} WHEN {place} > 'epoch' THEN {} WHEN {place} < 'epoch' \
                 THEN {} END",
                i64::MAX,
                "(-9223372036854775807 - 1)"
            ))
        }
        Form::Int | Form::Bool | Form::Time => None,
    }
}

/// Clamped, because one value out of range would fail the whole lookup.
fn postgres_int(expression: &str, kind: &str) -> String {
    let kind = if kind == "real" { "double precision" } else { kind };
    let (low, high) = ("-9000000000000000000", "9000000000000000000");
    format!("LEAST(GREATEST(round(({expression})::{kind}), {low}::{kind}), {high}::{kind})::int8")
}

/// A `regtype` name as a cast's target: bare `character` would mean one character.
pub(super) fn castable(kind: &str) -> &str {
    if kind == "character" { "bpchar" } else { kind }
}

/// The cells of one row, by the names above.
pub(super) trait Cells {
    fn int(&mut self, name: &'static str) -> Result<Option<i64>, StoreError>;
    fn bool(&mut self, name: &'static str) -> Result<Option<bool>, StoreError>;
    fn text(&mut self, name: &'static str) -> Result<Option<String>, StoreError>;
    /// Microseconds.
    fn time(&mut self, name: &'static str) -> Result<Option<i64>, StoreError>;
    /// The names of the cells so far that held something of a wrong type.
    fn take_unreadable(&mut self) -> Vec<String>;
}

/// Reads the cells that [`candidates_sql`] selects. Written without `..`: a new field must be thought about here.
pub(super) fn candidate_row(cells: &mut impl Cells) -> Result<CandidateRow, StoreError> {
    let Some(key_id) = cells.int("key_id")? else {
        return Err(StoreError::Schema("api_keys.id is not a number".to_owned()));
    };
    // An old secret is the same key with an earlier end.
    let ends = [cells.time("expires_at")?, cells.time("secret_expires_at")?];
    Ok(CandidateRow {
        key_id,
        key_name: cells.text("key_name")?,
        key_hash: cells.text("key_hash")?,
        key_prefix: cells.text("key_prefix")?,
        is_active: cells.bool("is_active")?,
        expires_at: ends.into_iter().flatten().min(),
        scopes: cells.text("scopes")?,
        allowed_models: cells.text("allowed_models")?,
        allowed_endpoints: cells.text("allowed_endpoints")?,
        allowed_ips: cells.text("allowed_ips")?,
        allowed_chatbots: cells.text("allowed_chatbots")?,
        allowed_agents: cells.text("allowed_agents")?,
        rate_limit_per_minute: cells.int("rate_limit_per_minute")?,
        rate_limit_per_hour: cells.int("rate_limit_per_hour")?,
        rate_limit_per_day: cells.int("rate_limit_per_day")?,
        is_unlimited: cells.bool("is_unlimited")?,
        budget_limit_cents: cells.int("budget_limit_cents")?,
        budget_type: cells.text("budget_type")?,
        total_cost: cells.int("total_cost")?,
        month_cost: cells.int("month_cost")?,
        user_id: cells.int("user_id")?,
        username: cells.text("username")?,
        email: cells.text("email")?,
        user_is_active: cells.bool("user_is_active")?,
        is_superuser: cells.bool("is_superuser")?,
        role: cells.text("role")?,
        account_locked: cells.bool("account_locked")?,
        account_locked_until: cells.time("account_locked_until")?,
        unreadable: cells.take_unreadable(),
    })
}

/// The candidates of exactly this prefix, by id: what a collation holds equal is not equal.
pub(super) fn settle(mut rows: Vec<CandidateRow>, prefix: &str) -> Result<Vec<CandidateRow>, StoreError> {
    rows.retain(|row| row.key_prefix.as_deref() == Some(prefix));
    if rows.len() > MAX_CANDIDATES {
        return Err(StoreError::TooManyCandidates);
    }
    rows.sort_by_key(|row| row.key_id);
    Ok(rows)
}
