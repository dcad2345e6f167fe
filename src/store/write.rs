//! Writes: which columns a new user or key sets, for both stores.
//!
//! A column that the operator asked for and the database does not have is an error, because a restriction must not get
//! lost on the way; a column that is only good to have is left out. What was not asked for gets the column's default.

use crate::domain::record::UserId;
use crate::domain::time::Timestamp;

use super::admin::{KeySettings, NewKey, NewUser};
use super::catalogue::Catalogue;
use super::error::StoreError;

/// No password's hash, in any scheme: people sign in elsewhere.
const NO_PASSWORD: &str = "!";

/// One column to be written.
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) value: Value,
}

/// What to write, by the form that it is read in.
pub(super) enum Value {
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
    columns.where_present("is_active", Value::Bool(true));
    settings_columns(&mut columns, &key.settings)?;
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
    if settings.is_unlimited {
        columns.required("is_unlimited", Some(Value::Bool(true)))
    } else {
        columns.where_present("is_unlimited", Value::Bool(false));
        Ok(())
    }
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
