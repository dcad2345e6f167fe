//! SQLite for the command line: every write is one transaction, which also reads back what it shows.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rusqlite::types::{ToSqlOutput, Value as SqlValue};
use rusqlite::{OptionalExtension, Params, ToSql, Transaction};

use crate::domain::record::{KeyId, UserId};

use super::admin::{
    HistoryEntry, ImportMode, KeyChange, KeyFilter, KeyView, NewKey, NewUser, Rotation, UserRef, UserView,
};
use super::catalogue::Catalogue;
use super::error::StoreError;
use super::select::{Dialect, history_sql, key_views_sql, old_secrets_sql, user_views_sql};
use super::sqlite::{SqliteCells, SqliteStore};
use super::timestamp;
use super::view::{history_entry, key_view, old_secret, user_view};
use super::write::{
    Action, Column, Origin, Value, active_columns, change_columns, check_has_history, check_has_old_secrets,
    check_old_secrets, check_prefix, history_columns, kept_until, key_columns, old_secret_columns,
    rotation_columns, user_columns,
};

impl SqliteStore {
    pub(super) async fn create_user(&self, user: &NewUser, origin: Origin) -> Result<UserView, StoreError> {
        let user = user.clone();
        self.alter(move |transaction, catalogue| {
            let role_id = role_id(transaction, catalogue, &user.role)?;
            let columns = user_columns(&user, role_id, catalogue, origin.at)?;
            let id = insert(transaction, "users", columns.clone())?;
            note(transaction, catalogue, Action::on_user("user create", id), &columns, &origin)?;
            show_user(transaction, catalogue, id)
        })
        .await
    }

    pub(super) async fn list_users(&self) -> Result<Vec<UserView>, StoreError> {
        self.look(|transaction, catalogue| {
            let sql = format!("{} ORDER BY u.id", user_views_sql(catalogue, Dialect::Sqlite)?);
            each(transaction, &sql, (), |cells| user_view(cells).map(Some))
        })
        .await
    }

    pub(super) async fn user(&self, user: &UserRef) -> Result<UserView, StoreError> {
        let user = user.clone();
        self.look(move |transaction, catalogue| {
            let id = user_id(transaction, &user)?;
            show_user(transaction, catalogue, id.get())
        })
        .await
    }

    pub(super) async fn set_user_active(
        &self,
        user: &UserRef,
        is_active: bool,
        origin: Origin,
    ) -> Result<UserView, StoreError> {
        let user = user.clone();
        self.alter(move |transaction, catalogue| {
            let id = user_id(transaction, &user)?.get();
            let columns = active_columns("users", is_active, catalogue, origin.at)?;
            update(transaction, "users", columns.clone(), id)?;
            let action = if is_active { "user enable" } else { "user disable" };
            note(transaction, catalogue, Action::on_user(action, id), &columns, &origin)?;
            show_user(transaction, catalogue, id)
        })
        .await
    }

    pub(super) async fn create_key(&self, key: &NewKey, origin: Origin) -> Result<KeyView, StoreError> {
        let key = key.clone();
        self.alter(move |transaction, catalogue| {
            let owner = user_id(transaction, &key.user)?;
            let id = insert_key(transaction, catalogue, &key, owner, "key create", &origin)?;
            show_key(transaction, catalogue, id)
        })
        .await
    }

    /// `at` is the place of the key that is being written.
    pub(super) async fn import_keys(
        &self,
        keys: &Arc<[NewKey]>,
        mode: ImportMode,
        at: &Arc<AtomicUsize>,
        origin: Origin,
    ) -> Result<(), StoreError> {
        let (keys, at) = (Arc::clone(keys), Arc::clone(at));
        self.alter(move |transaction, catalogue| {
            transaction.execute_batch("SAVEPOINT import")?;
            let mut owners = HashMap::new();
            for (place, key) in keys.iter().enumerate() {
                at.store(place, Ordering::Relaxed);
                let owner = match owners.get(&key.user) {
                    Some(owner) => *owner,
                    None => *owners.entry(&key.user).or_insert(user_id(transaction, &key.user)?),
                };
                insert_key(transaction, catalogue, key, owner, "key import", &origin)?;
            }
            if mode == ImportMode::DryRun {
                transaction.execute_batch("ROLLBACK TO import")?;
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn list_keys(&self, filter: &KeyFilter) -> Result<Vec<KeyView>, StoreError> {
        let filter = filter.clone();
        self.look(move |transaction, catalogue| {
            let owner =
                filter.user.as_ref().map(|user| user_id(transaction, user)).transpose()?.map(UserId::get);
            let sql = format!(
                "{} WHERE (?1 IS NULL OR k.user_id = ?1) AND (?2 IS NULL OR k.key_prefix = ?2) ORDER BY k.id",
                key_views_sql(catalogue, Dialect::Sqlite)?
            );
            each(transaction, &sql, (owner, &filter.prefix), |cells| {
                Ok(Some(key_view(cells)?).filter(|key| filter.admits(key)))
            })
        })
        .await
    }

    pub(super) async fn key(&self, id: KeyId) -> Result<KeyView, StoreError> {
        self.look(move |transaction, catalogue| {
            let mut key = show_key(transaction, catalogue, id.get())?;
            if catalogue.has_old_secrets() {
                let sql = old_secrets_sql(catalogue, Dialect::Sqlite)?;
                key.old_secrets = each(transaction, &sql, (id.get(),), |cells| old_secret(cells).map(Some))?;
            }
            Ok(key)
        })
        .await
    }

    pub(super) async fn update_key(
        &self,
        id: KeyId,
        change: &KeyChange,
        origin: Origin,
    ) -> Result<(), StoreError> {
        let change = change.clone();
        self.alter(move |transaction, catalogue| {
            let columns = change_columns(&change, catalogue, origin.at)?;
            update(transaction, "api_keys", columns.clone(), id.get())?;
            note(transaction, catalogue, Action::on_key("key update", id.get()), &columns, &origin)
        })
        .await
    }

    pub(super) async fn rotate_key(&self, rotation: &Rotation, origin: Origin) -> Result<(), StoreError> {
        let rotation = rotation.clone();
        self.alter(move |transaction, catalogue| {
            let id = rotation.id.get();
            let sql = "SELECT key_hash, key_prefix FROM api_keys WHERE id = ?1";
            let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
            let found: Option<(Option<String>, Option<String>)> =
                transaction.query_row(sql, (id,), read).optional()?;
            let (hash, prefix) = found.ok_or(StoreError::NotFound("key"))?;
            check_prefix(&rotation, prefix.as_deref())?;
            let mut told = Vec::new();
            if catalogue.has_old_secrets() {
                let ended = "DELETE FROM keyward_old_secrets WHERE key_id = ?1 \
                             AND (?2 OR current_hash IS NOT ?3 OR expires_at < ?4)";
                let all = rotation.keep_until.is_none();
                transaction.execute(ended, (id, all, &hash, timestamp::format(origin.at)))?;
                let kept = "UPDATE keyward_old_secrets SET current_hash = ?2 WHERE key_id = ?1";
                let kept = transaction.execute(kept, (id, rotation.hash.as_str()))?;
                check_old_secrets(u64::try_from(kept).unwrap_or(u64::MAX))?;
            }
            if let (Some(until), Some(hash)) = (rotation.keep_until, hash) {
                check_has_old_secrets(catalogue)?;
                told.push(kept_until(until));
                let columns = old_secret_columns(&rotation, &hash, until, origin.at);
                insert(transaction, "keyward_old_secrets", columns)?;
            }
            update(transaction, "api_keys", rotation_columns(&rotation, catalogue, origin.at), id)?;
            note(transaction, catalogue, Action::on_key("key rotate", id), &told, &origin)
        })
        .await
    }

    pub(super) async fn end_old_secrets(&self, id: KeyId, origin: Origin) -> Result<u64, StoreError> {
        self.alter(move |transaction, catalogue| {
            show_key(transaction, catalogue, id.get())?;
            let ended = end_old_secrets(transaction, catalogue, id.get())?;
            if ended > 0 {
                let action = Action::on_key("key rotate --now", id.get());
                note(transaction, catalogue, action, &[], &origin)?;
            }
            Ok(ended)
        })
        .await
    }

    pub(super) async fn set_key_active(
        &self,
        id: KeyId,
        is_active: bool,
        origin: Origin,
    ) -> Result<(), StoreError> {
        self.alter(move |transaction, catalogue| {
            let columns = active_columns("api_keys", is_active, catalogue, origin.at)?;
            update(transaction, "api_keys", columns.clone(), id.get())?;
            let action = if is_active { "key update" } else { "key revoke" };
            note(transaction, catalogue, Action::on_key(action, id.get()), &columns, &origin)
        })
        .await
    }

    pub(super) async fn delete_key(&self, id: KeyId, origin: Origin) -> Result<(), StoreError> {
        self.alter(move |transaction, catalogue| {
            if transaction.execute("DELETE FROM api_keys WHERE id = ?1", (id.get(),))? == 0 {
                return Err(StoreError::NotFound("key"));
            }
            end_old_secrets(transaction, catalogue, id.get())?;
            note(transaction, catalogue, Action::on_key("key delete", id.get()), &[], &origin)
        })
        .await
    }

    pub(super) async fn key_history(&self, id: KeyId) -> Result<Vec<HistoryEntry>, StoreError> {
        self.look(move |transaction, catalogue| {
            check_has_history(catalogue)?;
            let sql = history_sql(catalogue, Dialect::Sqlite)?;
            each(transaction, &sql, (id.get(),), |cells| history_entry(cells).map(Some))
        })
        .await
    }

    /// One transaction that writes.
    async fn alter<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>, &Catalogue) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.write(|session| session.change(|transaction, plan| work(transaction, &plan.catalogue))).await
    }

    /// One transaction that reads.
    async fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>, &Catalogue) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.read(|session| session.read(|transaction, plan| work(transaction, &plan.catalogue))).await
    }
}

/// What is made of the rows of a query, less what is left out.
fn each<T>(
    transaction: &Transaction<'_>,
    sql: &str,
    parameters: impl Params,
    read: impl Fn(&mut SqliteCells<'_>) -> Result<Option<T>, StoreError>,
) -> Result<Vec<T>, StoreError> {
    let mut statement = transaction.prepare(sql)?;
    let mut rows = statement.query(parameters)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.extend(read(&mut SqliteCells::new(row))?);
    }
    Ok(found)
}

fn user_id(transaction: &Transaction<'_>, user: &UserRef) -> Result<UserId, StoreError> {
    let read = |row: &rusqlite::Row<'_>| row.get(0);
    let id: Option<i64> = match user {
        UserRef::Id(id) => transaction.query_row("SELECT id FROM users WHERE id = ?1", (id.get(),), read),
        UserRef::Username(name) => {
            transaction.query_row("SELECT id FROM users WHERE username = ?1", (name,), read)
        }
    }
    .optional()?;
    id.map(UserId::new).ok_or(StoreError::NotFound("user"))
}

fn role_id(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    role: &str,
) -> Result<Option<i64>, StoreError> {
    if !catalogue.has_roles() {
        return Ok(None);
    }
    let sql = "SELECT id FROM roles WHERE name = ?1";
    Ok(transaction.query_row(sql, (role,), |row| row.get(0)).optional()?)
}

fn show_user(transaction: &Transaction<'_>, catalogue: &Catalogue, id: i64) -> Result<UserView, StoreError> {
    let sql = format!("{} WHERE u.id = ?1", user_views_sql(catalogue, Dialect::Sqlite)?);
    let mut statement = transaction.prepare(&sql)?;
    let mut rows = statement.query((id,))?;
    let row = rows.next()?.ok_or(StoreError::NotFound("user"))?;
    user_view(&mut SqliteCells::new(row))
}

fn show_key(transaction: &Transaction<'_>, catalogue: &Catalogue, id: i64) -> Result<KeyView, StoreError> {
    let sql = format!("{} WHERE k.id = ?1", key_views_sql(catalogue, Dialect::Sqlite)?);
    let mut statement = transaction.prepare(&sql)?;
    let mut rows = statement.query((id,))?;
    let row = rows.next()?.ok_or(StoreError::NotFound("key"))?;
    key_view(&mut SqliteCells::new(row))
}

fn insert_key(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    key: &NewKey,
    owner: UserId,
    action: &'static str,
    origin: &Origin,
) -> Result<i64, StoreError> {
    let columns = key_columns(key, owner, catalogue, origin.at)?;
    let id = insert(transaction, "api_keys", columns.clone())?;
    note(transaction, catalogue, Action::on_key(action, id), &columns, origin)?;
    Ok(id)
}

fn end_old_secrets(transaction: &Transaction<'_>, catalogue: &Catalogue, id: i64) -> Result<u64, StoreError> {
    if !catalogue.has_old_secrets() {
        return Ok(0);
    }
    let ended = transaction.execute("DELETE FROM keyward_old_secrets WHERE key_id = ?1", (id,))?;
    Ok(u64::try_from(ended).unwrap_or(u64::MAX))
}

/// Notes a change, where changes are noted.
fn note(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    action: Action,
    written: &[Column],
    origin: &Origin,
) -> Result<(), StoreError> {
    match history_columns(action, written, origin, catalogue) {
        Some(columns) => insert(transaction, "keyward_history", columns).map(|_| ()),
        None => Ok(()),
    }
}

fn insert(
    transaction: &Transaction<'_>,
    table: &'static str,
    columns: Vec<Column>,
) -> Result<i64, StoreError> {
    let names: Vec<&str> = columns.iter().map(|column| column.name).collect();
    let places = vec!["?"; columns.len()].join(", ");
    let sql = format!("INSERT INTO {table} ({}) VALUES ({places}) RETURNING id", names.join(", "));
    let values = rusqlite::params_from_iter(columns.into_iter().map(|column| column.value));
    Ok(transaction.prepare_cached(&sql)?.query_row(values, |row| row.get(0))?)
}

fn update(
    transaction: &Transaction<'_>,
    table: &'static str,
    columns: Vec<Column>,
    id: i64,
) -> Result<(), StoreError> {
    let set: Vec<String> = columns.iter().map(|column| format!("{} = ?", column.name)).collect();
    let sql = format!("UPDATE {table} SET {} WHERE id = ?", set.join(", "));
    let values = columns.into_iter().map(|column| column.value).chain([Value::Int(id)]);
    let updated = transaction.execute(&sql, rusqlite::params_from_iter(values))?;
    if updated == 0 {
        Err(StoreError::NotFound(if table == "users" { "user" } else { "key" }))
    } else {
        Ok(())
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Null => ToSqlOutput::Owned(SqlValue::Null),
            Self::Int(value) => ToSqlOutput::from(*value),
            Self::Bool(value) => ToSqlOutput::from(*value),
            Self::Text(text) | Self::Json(text) => ToSqlOutput::from(text.as_str()),
            Self::Time(at) => ToSqlOutput::Owned(SqlValue::Text(timestamp::format(*at))),
        })
    }
}
