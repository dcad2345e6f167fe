//! Postgres for the command line: every write is one transaction, which also reads back what it shows.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use deadpool_postgres::Transaction;
use tokio_postgres::types::ToSql;

use crate::domain::record::{KeyId, UserId};

use super::admin::{
    HistoryEntry, ImportMode, KeyChange, KeyFilter, KeyView, NewKey, NewUser, Rotation, UserRef, UserView,
};
use super::catalogue::Catalogue;
use super::error::StoreError;
use super::migrate;
use super::postgres::{PostgresCells, PostgresStore, timestamp_sql};
use super::select::{Dialect, castable, history_sql, key_views_sql, old_secrets_sql, user_views_sql};
use super::view::{history_entry, key_view, old_secret, user_view};
use super::write::{
    Action, Column, Origin, Value, active_columns, change_columns, check_has_history, check_has_old_secrets,
    check_old_secrets, check_prefix, history_columns, kept_until, key_columns, old_secret_columns,
    rotation_columns, user_columns,
};

type Parameter = Box<dyn ToSql + Sync + Send>;

impl PostgresStore {
    /// The tables first, and for good: a role that does not own them may still not create triggers on them.
    pub(super) async fn migrate(&self) -> Result<(), StoreError> {
        self.run_script(migrate::POSTGRES).await?;
        self.run_script(migrate::POSTGRES_FEED).await.map_err(|error| match error {
            StoreError::Refused(reason) => StoreError::Refused(format!(
                "{reason}. The tables are up to date, but the triggers of the change feed can only be created by \
                 their owner; until then serve runs in ttl mode"
            )),
            other => other,
        })
    }

    /// One at a time over all processes: two that create the same table at once would make one fail.
    async fn run_script(&self, script: &str) -> Result<(), StoreError> {
        self.within(async {
            let mut lease = self.lease().await?;
            let result = async {
                let transaction = lease.client_mut()?.transaction().await?;
                transaction.batch_execute("SELECT pg_advisory_xact_lock(5436780943221)").await?;
                transaction.batch_execute(script).await?;
                Ok(transaction.commit().await?)
            }
            .await;
            lease.settle(result)
        })
        .await
    }

    pub(super) async fn create_user(&self, user: &NewUser, origin: Origin) -> Result<UserView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let role_id = role_id(transaction, catalogue, &user.role).await?;
            let columns = user_columns(user, role_id, catalogue, origin.at)?;
            let id = insert(transaction, catalogue, "users", columns.clone()).await?;
            note(transaction, catalogue, Action::on_user("user create", id), &columns, &origin).await?;
            show_user(transaction, catalogue, id).await
        })
        .await
    }

    pub(super) async fn list_users(&self) -> Result<Vec<UserView>, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let sql = format!("{} ORDER BY u.id", user_views_sql(catalogue, Dialect::Postgres)?);
            let rows = transaction.query(&sql, &[]).await?;
            rows.iter().map(|row| user_view(&mut PostgresCells(row))).collect()
        })
        .await
    }

    pub(super) async fn user(&self, user: &UserRef) -> Result<UserView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let id = user_id(transaction, user).await?;
            show_user(transaction, catalogue, id.get()).await
        })
        .await
    }

    pub(super) async fn set_user_active(
        &self,
        user: &UserRef,
        is_active: bool,
        origin: Origin,
    ) -> Result<UserView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let id = user_id(transaction, user).await?.get();
            let columns = active_columns("users", is_active, catalogue, origin.at)?;
            update(transaction, catalogue, "users", columns.clone(), id).await?;
            let action = if is_active { "user enable" } else { "user disable" };
            note(transaction, catalogue, Action::on_user(action, id), &columns, &origin).await?;
            show_user(transaction, catalogue, id).await
        })
        .await
    }

    pub(super) async fn create_key(&self, key: &NewKey, origin: Origin) -> Result<KeyView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let owner = user_id(transaction, &key.user).await?;
            let id = insert_key(transaction, catalogue, key, owner, "key create", &origin).await?;
            show_key(transaction, catalogue, id).await
        })
        .await
    }

    /// `at` is the place of the key that is being written.
    pub(super) async fn import_keys(
        &self,
        keys: &[NewKey],
        mode: ImportMode,
        at: &AtomicUsize,
        origin: Origin,
    ) -> Result<(), StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            transaction.batch_execute("SAVEPOINT import").await?;
            let mut owners = HashMap::new();
            for (place, key) in keys.iter().enumerate() {
                at.store(place, Ordering::Relaxed);
                let owner = if let Some(owner) = owners.get(&key.user) {
                    *owner
                } else {
                    *owners.entry(&key.user).or_insert(user_id(transaction, &key.user).await?)
                };
                insert_key(transaction, catalogue, key, owner, "key import", &origin).await?;
            }
            if mode == ImportMode::DryRun {
                transaction.batch_execute("ROLLBACK TO SAVEPOINT import").await?;
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn list_keys(&self, filter: &KeyFilter) -> Result<Vec<KeyView>, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let owner = match &filter.user {
                Some(user) => Some(user_id(transaction, user).await?.get()),
                None => None,
            };
            let select = key_views_sql(catalogue, Dialect::Postgres)?;
            let sql = format!(
                "{select} WHERE ($1::int8 IS NULL OR k.user_id = $1::int8) \
                 AND ($2::text IS NULL OR k.key_prefix::text = $2::text) ORDER BY k.id"
            );
            let mut keys = Vec::new();
            for row in &transaction.query(&sql, &[&owner, &filter.prefix]).await? {
                keys.extend(Some(key_view(&mut PostgresCells(row))?).filter(|key| filter.admits(key)));
            }
            Ok(keys)
        })
        .await
    }

    pub(super) async fn key(&self, id: KeyId) -> Result<KeyView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let mut key = show_key(transaction, catalogue, id.get()).await?;
            if catalogue.has_old_secrets() {
                let sql = old_secrets_sql(catalogue, Dialect::Postgres)?;
                for row in &transaction.query(&sql, &[&id.get()]).await? {
                    key.old_secrets.push(old_secret(&mut PostgresCells(row))?);
                }
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
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let columns = change_columns(change, catalogue, origin.at)?;
            update(transaction, catalogue, "api_keys", columns.clone(), id.get()).await?;
            note(transaction, catalogue, Action::on_key("key update", id.get()), &columns, &origin).await
        })
        .await
    }

    pub(super) async fn rotate_key(&self, rotation: &Rotation, origin: Origin) -> Result<(), StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let id = rotation.id.get();
            let sql = "SELECT key_hash::text, key_prefix::text FROM api_keys WHERE id = $1::int8 FOR UPDATE";
            let row = transaction.query_opt(sql, &[&id]).await?.ok_or(StoreError::NotFound("key"))?;
            let (hash, prefix): (Option<String>, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
            check_prefix(rotation, prefix.as_deref())?;
            let mut told = Vec::new();
            if catalogue.has_old_secrets() {
                let kind = catalogue.kind("keyward_old_secrets", "expires_at").unwrap_or_default();
                let ended = format!(
                    "DELETE FROM keyward_old_secrets WHERE key_id = $1::int8 \
                     AND ($2 OR current_hash IS DISTINCT FROM $3::text OR expires_at < {})",
                    timestamp_sql("$4::int8", kind)
                );
                let all = rotation.keep_until.is_none();
                transaction.execute(&ended, &[&id, &all, &hash, &origin.at.as_microseconds()]).await?;
                let kept = "UPDATE keyward_old_secrets SET current_hash = $2::text WHERE key_id = $1::int8";
                let kept = transaction.execute(kept, &[&id, &rotation.hash.as_str()]).await?;
                check_old_secrets(kept)?;
            }
            if let (Some(until), Some(hash)) = (rotation.keep_until, hash) {
                check_has_old_secrets(catalogue)?;
                told.push(kept_until(until));
                let columns = old_secret_columns(rotation, &hash, until, origin.at);
                insert(transaction, catalogue, "keyward_old_secrets", columns).await?;
            }
            let columns = rotation_columns(rotation, catalogue, origin.at);
            update(transaction, catalogue, "api_keys", columns, id).await?;
            note(transaction, catalogue, Action::on_key("key rotate", id), &told, &origin).await
        })
        .await
    }

    pub(super) async fn end_old_secrets(&self, id: KeyId, origin: Origin) -> Result<u64, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            show_key(transaction, catalogue, id.get()).await?;
            let ended = end_old_secrets(transaction, catalogue, id.get()).await?;
            if ended > 0 {
                let action = Action::on_key("key rotate --now", id.get());
                note(transaction, catalogue, action, &[], &origin).await?;
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
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let columns = active_columns("api_keys", is_active, catalogue, origin.at)?;
            update(transaction, catalogue, "api_keys", columns.clone(), id.get()).await?;
            let action = if is_active { "key update" } else { "key revoke" };
            note(transaction, catalogue, Action::on_key(action, id.get()), &columns, &origin).await
        })
        .await
    }

    pub(super) async fn delete_key(&self, id: KeyId, origin: Origin) -> Result<(), StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let deleted =
                transaction.execute("DELETE FROM api_keys WHERE id = $1::int8", &[&id.get()]).await?;
            if deleted == 0 {
                return Err(StoreError::NotFound("key"));
            }
            end_old_secrets(transaction, catalogue, id.get()).await?;
            note(transaction, catalogue, Action::on_key("key delete", id.get()), &[], &origin).await
        })
        .await
    }

    pub(super) async fn key_history(&self, id: KeyId) -> Result<Vec<HistoryEntry>, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            check_has_history(catalogue)?;
            let sql = history_sql(catalogue, Dialect::Postgres)?;
            let rows = transaction.query(&sql, &[&id.get()]).await?;
            rows.iter().map(|row| history_entry(&mut PostgresCells(row))).collect()
        })
        .await
    }

    /// One transaction over the tables as they are now; undone where `work` fails.
    async fn transact<T>(
        &self,
        work: impl AsyncFnOnce(&Transaction<'_>, &Catalogue) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.within(async {
            let mut lease = self.lease().await?;
            let result = async {
                let plan = self.read_plan(lease.client()?).await?;
                let transaction = lease.client_mut()?.transaction().await?;
                let done = work(&transaction, &plan.catalogue).await?;
                transaction.commit().await?;
                Ok(done)
            }
            .await;
            lease.settle(result)
        })
        .await
    }
}

async fn user_id(transaction: &Transaction<'_>, user: &UserRef) -> Result<UserId, StoreError> {
    let row = match user {
        UserRef::Id(id) => {
            transaction.query_opt("SELECT id::int8 FROM users WHERE id = $1::int8", &[&id.get()]).await?
        }
        UserRef::Username(name) => {
            transaction.query_opt("SELECT id::int8 FROM users WHERE username::text = $1", &[name]).await?
        }
    };
    let row = row.ok_or(StoreError::NotFound("user"))?;
    Ok(UserId::new(row.try_get(0)?))
}

async fn role_id(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    role: &str,
) -> Result<Option<i64>, StoreError> {
    if !catalogue.has_roles() {
        return Ok(None);
    }
    let row = transaction.query_opt("SELECT id::int8 FROM roles WHERE name::text = $1", &[&role]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

async fn show_user(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    id: i64,
) -> Result<UserView, StoreError> {
    let sql = format!("{} WHERE u.id = $1::int8", user_views_sql(catalogue, Dialect::Postgres)?);
    let row = transaction.query_opt(&sql, &[&id]).await?.ok_or(StoreError::NotFound("user"))?;
    user_view(&mut PostgresCells(&row))
}

async fn show_key(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    id: i64,
) -> Result<KeyView, StoreError> {
    let sql = format!("{} WHERE k.id = $1::int8", key_views_sql(catalogue, Dialect::Postgres)?);
    let row = transaction.query_opt(&sql, &[&id]).await?.ok_or(StoreError::NotFound("key"))?;
    key_view(&mut PostgresCells(&row))
}

async fn insert_key(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    key: &NewKey,
    owner: UserId,
    action: &'static str,
    origin: &Origin,
) -> Result<i64, StoreError> {
    let columns = key_columns(key, owner, catalogue, origin.at)?;
    let id = insert(transaction, catalogue, "api_keys", columns.clone()).await?;
    note(transaction, catalogue, Action::on_key(action, id), &columns, origin).await?;
    Ok(id)
}

async fn end_old_secrets(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    id: i64,
) -> Result<u64, StoreError> {
    if !catalogue.has_old_secrets() {
        return Ok(0);
    }
    Ok(transaction.execute("DELETE FROM keyward_old_secrets WHERE key_id = $1::int8", &[&id]).await?)
}

/// Notes a change, where changes are noted.
async fn note(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    action: Action,
    written: &[Column],
    origin: &Origin,
) -> Result<(), StoreError> {
    match history_columns(action, written, origin, catalogue) {
        Some(columns) => insert(transaction, catalogue, "keyward_history", columns).await.map(|_| ()),
        None => Ok(()),
    }
}

async fn insert(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    table: &'static str,
    columns: Vec<Column>,
) -> Result<i64, StoreError> {
    let (names, values, parameters) = rendered(catalogue, table, columns, 1);
    let sql = format!(
        "INSERT INTO {table} ({}) VALUES ({}) RETURNING id::int8",
        names.join(", "),
        values.join(", ")
    );
    let statement = transaction.prepare_cached(&sql).await?;
    Ok(transaction.query_one(&statement, &references(&parameters)).await?.try_get(0)?)
}

async fn update(
    transaction: &Transaction<'_>,
    catalogue: &Catalogue,
    table: &'static str,
    columns: Vec<Column>,
    id: i64,
) -> Result<(), StoreError> {
    let (names, values, mut parameters) = rendered(catalogue, table, columns, 2);
    parameters.insert(0, Box::new(id));
    let set: Vec<String> =
        names.iter().zip(&values).map(|(name, value)| format!("{name} = {value}")).collect();
    let sql = format!("UPDATE {table} SET {} WHERE id = $1::int8", set.join(", "));
    let updated = transaction.execute(&sql, &references(&parameters)).await?;
    if updated == 0 {
        Err(StoreError::NotFound(if table == "users" { "user" } else { "key" }))
    } else {
        Ok(())
    }
}

/// Names, SQL values and parameters, the first of which has this number.
fn rendered(
    catalogue: &Catalogue,
    table: &'static str,
    columns: Vec<Column>,
    first: usize,
) -> (Vec<&'static str>, Vec<String>, Vec<Parameter>) {
    let mut names = Vec::new();
    let mut values = Vec::new();
    let mut parameters: Vec<Parameter> = Vec::new();
    for (number, Column { name, value }) in (first..).zip(columns) {
        let kind = catalogue.kind(table, name).unwrap_or("text");
        names.push(name);
        let (sql, parameter): (String, Parameter) = match value {
            Value::Null => (format!("${number}::text::{}", castable(kind)), Box::new(None::<String>)),
            Value::Int(value) => (format!("${number}::int8"), Box::new(value)),
            Value::Bool(value) => (format!("${number}::bool"), Box::new(value)),
            // Through the column's type, which may be an enum, json or jsonb; a length is checked on assignment.
            Value::Text(value) | Value::Json(value) => {
                (format!("${number}::text::{}", castable(kind)), Box::new(value))
            }
            Value::Time(value) => {
                (timestamp_sql(&format!("${number}::int8"), kind), Box::new(value.as_microseconds()))
            }
        };
        values.push(sql);
        parameters.push(parameter);
    }
    (names, values, parameters)
}

fn references(parameters: &[Parameter]) -> Vec<&(dyn ToSql + Sync)> {
    parameters.iter().map(|parameter| -> &(dyn ToSql + Sync) { &**parameter }).collect()
}
