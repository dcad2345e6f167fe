//! Writes: which columns a new user or key sets, for both stores.
//!
//! A column that the operator asked for and the database does not have is an error, because a restriction must not get
//! lost on the way; a column that is only good to have is left out. What was not asked for gets the column's default.

use std::sync::Arc;

use crate::domain::record::UserId;
use crate::domain::time::Timestamp;

use super::admin::{KeyChange, KeySettings, NewKey, NewUser, Rotation};
use super::catalogue::Catalogue;
use super::error::StoreError;

/// No password's hash, in any scheme: people sign in elsewhere.
const NO_PASSWORD: &str = "!";

/// Most secrets that a key may have besides its current one: each costs a wrong secret one more comparison.
pub(super) const MAX_OLD_SECRETS: usize = 4;

/// When something is written, and by whom.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) at: Timestamp,
    /// `None`: by a running sidecar, which keeps no history.
    pub(super) actor: Option<Arc<str>>,
}

/// One column to be written.
#[derive(Clone)]
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) value: Value,
}

/// What to write, by the form that it is read in.
#[derive(Clone)]
pub(super) enum Value {
    Null,
    Int(i64),
    Bool(bool),
    Text(String),
    /// JSON text.
    Json(String),
    Time(Timestamp),
}

/// Columns in the making.
struct Columns<'a> {
    table: &'static str,
    catalogue: &'a Catalogue,
    asked: Vec<Column>,
}

impl<'a> Columns<'a> {
    fn new(table: &'static str, catalogue: &'a Catalogue) -> Self {
        Self { table, catalogue, asked: Vec::new() }
    }

    fn required(&mut self, name: &'static str, value: Option<Value>) -> Result<(), StoreError> {
        let Some(value) = value else {
            return Ok(());
        };
        if !self.catalogue.has(self.table, name) {
            return Err(StoreError::Refused(format!("{} has no column {name}", self.table)));
        }
        self.asked.push(Column { name, value });
        Ok(())
    }

    fn list(&mut self, name: &'static str, entries: &[String]) -> Result<(), StoreError> {
        if entries.is_empty() {
            return Ok(());
        }
        let json = serde_json::to_string(entries).map_err(|error| StoreError::Refused(error.to_string()))?;
        self.required(name, Some(Value::Json(json)))
    }

    fn where_present(&mut self, name: &'static str, value: Value) {
        if self.catalogue.has(self.table, name) {
            self.asked.push(Column { name, value });
        }
    }
}

/// The columns of a new user. `role_id` is the role's id where there is a table of roles that knows it.
pub(super) fn user_columns(
    user: &NewUser,
    role_id: Option<i64>,
    catalogue: &Catalogue,
    now: Timestamp,
) -> Result<Vec<Column>, StoreError> {
    let mut columns = Columns::new("users", catalogue);
    columns.required("username", Some(Value::Text(user.username.clone())))?;
    columns.required("email", Some(Value::Text(user.email.clone())))?;
    columns.required("is_superuser", user.is_superuser.then_some(Value::Bool(true)))?;
    if role_id.is_none() && !catalogue.has("users", "role") {
        return Err(StoreError::NotFound("role"));
    }
    columns.required("role_id", role_id.map(Value::Int))?;
    columns.where_present("role", Value::Text(user.role.clone()));
    columns.where_present("hashed_password", Value::Text(NO_PASSWORD.to_owned()));
    columns.where_present("is_active", Value::Bool(true));
    if !user.is_superuser {
        columns.where_present("is_superuser", Value::Bool(false));
    }
    columns.where_present("account_locked", Value::Bool(false));
    columns.where_present("created_at", Value::Time(now));
    columns.where_present("updated_at", Value::Time(now));
    Ok(columns.asked)
}

/// The columns of a new key.
pub(super) fn key_columns(
    key: &NewKey,
    owner: UserId,
    catalogue: &Catalogue,
    now: Timestamp,
) -> Result<Vec<Column>, StoreError> {
    let mut columns = Columns::new("api_keys", catalogue);
    columns.required("user_id", Some(Value::Int(owner.get())))?;
    columns.required("key_prefix", Some(Value::Text(key.prefix.as_str().to_owned())))?;
    columns.required("key_hash", Some(Value::Text((*key.hash).clone())))?;
    columns.where_present("name", Value::Text(key.name.clone()));
    columns.where_present("is_active", Value::Bool(key.is_active));
    settings_columns(&mut columns, &key.settings)?;
    if !key.settings.is_unlimited {
        columns.where_present("is_unlimited", Value::Bool(false));
    }
    for name in ["total_requests", "total_tokens", "total_cost"] {
        columns.where_present(name, Value::Int(0));
    }
    columns.where_present("created_at", Value::Time(now));
    columns.where_present("updated_at", Value::Time(now));
    Ok(columns.asked)
}

fn settings_columns(columns: &mut Columns<'_>, settings: &KeySettings) -> Result<(), StoreError> {
    let limit = |limit: Option<u32>| limit.map(|value| Value::Int(i64::from(value)));
    columns.list("scopes", &settings.scopes)?;
    columns.list("permissions", &settings.permissions)?;
    columns.list("allowed_models", &settings.allowed_models)?;
    columns.list("allowed_endpoints", &settings.allowed_endpoints)?;
    columns.list("allowed_ips", &settings.allowed_ips)?;
    columns.list("allowed_chatbots", &settings.allowed_chatbots)?;
    columns.list("allowed_agents", &settings.allowed_agents)?;
    columns.list("tags", &settings.tags)?;
    columns.required("rate_limit_per_minute", limit(settings.rate_limit_per_minute))?;
    columns.required("rate_limit_per_hour", limit(settings.rate_limit_per_hour))?;
    columns.required("rate_limit_per_day", limit(settings.rate_limit_per_day))?;
    columns.required("budget_limit_cents", settings.budget_limit_cents.map(Value::Int))?;
    columns.required("budget_type", settings.budget_type.clone().map(Value::Text))?;
    columns.required("expires_at", settings.expires_at.map(Value::Time))?;
    columns.required("description", settings.description.clone().map(Value::Text))?;
    columns.required("is_unlimited", settings.is_unlimited.then_some(Value::Bool(true)))
}

/// The columns that a change of a key sets.
pub(super) fn change_columns(
    change: &KeyChange,
    catalogue: &Catalogue,
    now: Timestamp,
) -> Result<Vec<Column>, StoreError> {
    let mut columns = Columns::new("api_keys", catalogue);
    columns.required("name", change.name.clone().map(Value::Text))?;
    columns.required("is_active", change.is_active.map(Value::Bool))?;
    settings_columns(&mut columns, &change.settings)?;
    for name in change.clear.iter().copied() {
        let empty = if name == "is_unlimited" { Value::Bool(false) } else { Value::Null };
        columns.required(name, Some(empty))?;
    }
    columns.where_present("updated_at", Value::Time(now));
    Ok(columns.asked)
}

/// A key's new secret.
pub(super) fn rotation_columns(rotation: &Rotation, catalogue: &Catalogue, now: Timestamp) -> Vec<Column> {
    let mut columns = Columns::new("api_keys", catalogue);
    columns.where_present("key_hash", Value::Text((*rotation.hash).clone()));
    columns.where_present("updated_at", Value::Time(now));
    columns.asked
}

/// The secret that it replaces.
pub(super) fn old_secret_columns(
    rotation: &Rotation,
    former_hash: &str,
    keep_until: Timestamp,
    now: Timestamp,
) -> Vec<Column> {
    let text = |text: &str| Value::Text(text.to_owned());
    [
        ("key_id", Value::Int(rotation.id.get())),
        ("key_hash", text(former_hash)),
        ("key_prefix", text(rotation.prefix.as_str())),
        ("current_hash", text(&rotation.hash)),
        ("rotated_at", Value::Time(now)),
        ("expires_at", Value::Time(keep_until)),
    ]
    .map(|(name, value)| Column { name, value })
    .into()
}

/// What the history says of a secret that is kept.
pub(super) fn kept_until(until: Timestamp) -> Column {
    Column { name: "old_secret_expires_at", value: Value::Time(until) }
}

/// The new secret begins like the key that it was made for.
pub(super) fn check_prefix(rotation: &Rotation, found: Option<&str>) -> Result<(), StoreError> {
    if found == Some(rotation.prefix.as_str()) {
        return Ok(());
    }
    Err(StoreError::Refused("the key's prefix has changed meanwhile; try again".to_owned()))
}

/// `kept`: how many there are already.
pub(super) fn check_old_secrets(kept: u64) -> Result<(), StoreError> {
    if kept < u64::try_from(MAX_OLD_SECRETS).unwrap_or(u64::MAX) {
        return Ok(());
    }
    Err(StoreError::Refused(format!(
        "the key has {kept} old secrets that are still good, and may have no more; end them with `keyward key rotate --now`, \
         or rotate without --grace"
    )))
}

pub(super) fn check_has_old_secrets(catalogue: &Catalogue) -> Result<(), StoreError> {
    if catalogue.has_old_secrets() {
        return Ok(());
    }
    Err(StoreError::Refused(
        "there is no table keyward_old_secrets, or no right to read it; run `keyward migrate`, or rotate without --grace"
            .to_owned(),
    ))
}

pub(super) fn check_has_history(catalogue: &Catalogue) -> Result<(), StoreError> {
    if catalogue.has_history() {
        return Ok(());
    }
    Err(StoreError::Refused("there is no table keyward_history; run `keyward migrate`".to_owned()))
}

/// Which row was changed by which command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Action {
    /// The command's words.
    pub(super) name: &'static str,
    pub(super) key_id: Option<i64>,
    pub(super) user_id: Option<i64>,
}

impl Action {
    pub(super) fn on_key(name: &'static str, id: i64) -> Self {
        Self { name, key_id: Some(id), user_id: None }
    }

    pub(super) fn on_user(name: &'static str, id: i64) -> Self {
        Self { name, key_id: None, user_id: Some(id) }
    }
}

/// The entry in the table of changes; `None` where nobody asks for one, or nobody has made that table.
pub(super) fn history_columns(
    action: Action,
    written: &[Column],
    origin: &Origin,
    catalogue: &Catalogue,
) -> Option<Vec<Column>> {
    let actor = origin.actor.as_deref().filter(|_| catalogue.has_history())?;
    let id = |id: Option<i64>| id.map_or(Value::Null, Value::Int);
    let columns = [
        ("at", Value::Time(origin.at)),
        ("actor", Value::Text(actor.to_owned())),
        ("action", Value::Text(action.name.to_owned())),
        ("key_id", id(action.key_id)),
        ("user_id", id(action.user_id)),
        ("changes", Value::Json(changes(written))),
    ];
    Some(columns.map(|(name, value)| Column { name, value }).into())
}

/// What is no secret and does not say itself.
fn changes(written: &[Column]) -> String {
    const UNTOLD: [&str; 7] = [
        "key_hash",
        "hashed_password",
        "created_at",
        "updated_at",
        "total_requests",
        "total_tokens",
        "total_cost",
    ];
    let told = written.iter().filter(|column| !UNTOLD.contains(&column.name));
    let object: serde_json::Map<String, serde_json::Value> = told
        .map(|Column { name, value }| {
            let value = match value {
                Value::Null => serde_json::Value::Null,
                Value::Int(value) => (*value).into(),
                Value::Bool(value) => (*value).into(),
                Value::Text(text) => text.as_str().into(),
                Value::Json(text) => serde_json::from_str(text).unwrap_or_default(),
                Value::Time(at) => match super::timestamp::format(*at).split_once(' ') {
                    Some((date, time)) => format!("{date}T{time}Z").into(),
                    None => super::timestamp::format(*at).into(),
                },
            };
            ((*name).to_owned(), value)
        })
        .collect();
    serde_json::Value::Object(object).to_string()
}

/// Switches a row on or off.
pub(super) fn active_columns(
    table: &'static str,
    is_active: bool,
    catalogue: &Catalogue,
    now: Timestamp,
) -> Result<Vec<Column>, StoreError> {
    let mut columns = Columns::new(table, catalogue);
    columns.required("is_active", Some(Value::Bool(is_active)))?;
    columns.where_present("updated_at", Value::Time(now));
    Ok(columns.asked)
}
