//! SQLite for the command line: every write is one transaction, which also reads back what it shows.

use rusqlite::types::{ToSqlOutput, Value as SqlValue};
use rusqlite::{OptionalExtension, ToSql, Transaction};

use crate::domain::record::{KeyId, UserId};
use crate::domain::time::Timestamp;

use super::admin::{KeyView, NewKey, NewUser, UserRef, UserView};
use super::catalogue::Catalogue;
use super::error::StoreError;
use super::select::{Dialect, key_views_sql, user_views_sql};
use super::sqlite::{SqliteCells, SqliteStore};
use super::timestamp;
use super::view::{key_view, user_view};
use super::write::{Column, Value, active_columns, key_columns, user_columns};

impl SqliteStore {
    pub(super) async fn create_user(&self, user: &NewUser, now: Timestamp) -> Result<UserView, StoreError> {
        let user = user.clone();
        self.write(move |session| {
            session.change(|transaction, plan| {
                let role_id = role_id(transaction, &plan.catalogue, &user.role)?;
                let columns = user_columns(&user, role_id, &plan.catalogue, now)?;
                let id = insert(transaction, "users", columns)?;
                show_user(transaction, &plan.catalogue, id)
            })
        })
        .await
    }

    pub(super) async fn list_users(&self) -> Result<Vec<UserView>, StoreError> {
        self.read(|session| {
            session.read(|transaction, plan| {
                let sql = format!("{} ORDER BY u.id", user_views_sql(&plan.catalogue, Dialect::Sqlite)?);
                let mut statement = transaction.prepare(&sql)?;
                let mut rows = statement.query(())?;
                let mut users = Vec::new();
                while let Some(row) = rows.next()? {
                    users.push(user_view(&mut SqliteCells::new(row))?);
                }
                Ok(users)
            })
        })
        .await
    }

    pub(super) async fn user(&self, user: &UserRef) -> Result<UserView, StoreError> {
        let user = user.clone();
        self.read(move |session| {
            session.read(|transaction, plan| {
                let id = user_id(transaction, &user)?;
                show_user(transaction, &plan.catalogue, id.get())
            })
        })
        .await
    }

    pub(super) async fn set_user_active(
        &self,
        user: &UserRef,
        is_active: bool,
        now: Timestamp,
    ) -> Result<UserView, StoreError> {
        let user = user.clone();
        self.write(move |session| {
            session.change(|transaction, plan| {
                let id = user_id(transaction, &user)?.get();
                let columns = active_columns("users", is_active, &plan.catalogue, now)?;
                update(transaction, "users", columns, id)?;
                show_user(transaction, &plan.catalogue, id)
            })
        })
        .await
    }

    pub(super) async fn create_key(&self, key: &NewKey, now: Timestamp) -> Result<KeyView, StoreError> {
        let key = key.clone();
        self.write(move |session| {
            session.change(|transaction, plan| {
                let owner = user_id(transaction, &key.user)?;
                let columns = key_columns(&key, owner, &plan.catalogue, now)?;
                let id = insert(transaction, "api_keys", columns)?;
                show_key(transaction, &plan.catalogue, id)
            })
        })
        .await
    }

    pub(super) async fn list_keys(&self, user: Option<&UserRef>) -> Result<Vec<KeyView>, StoreError> {
        let user = user.cloned();
        self.read(move |session| {
            session.read(|transaction, plan| {
                let owner =
                    user.as_ref().map(|user| user_id(transaction, user)).transpose()?.map(UserId::get);
                let select = key_views_sql(&plan.catalogue, Dialect::Sqlite)?;
                let sql = format!("{select} WHERE ?1 IS NULL OR k.user_id = ?1 ORDER BY k.id");
                let mut statement = transaction.prepare(&sql)?;
                let mut rows = statement.query((owner,))?;
                let mut keys = Vec::new();
                while let Some(row) = rows.next()? {
                    keys.push(key_view(&mut SqliteCells::new(row))?);
                }
                Ok(keys)
            })
        })
        .await
    }

    pub(super) async fn key(&self, id: KeyId) -> Result<KeyView, StoreError> {
        self.read(move |session| {
            session.read(|transaction, plan| show_key(transaction, &plan.catalogue, id.get()))
        })
        .await
    }

    pub(super) async fn set_key_active(
        &self,
        id: KeyId,
        is_active: bool,
        now: Timestamp,
    ) -> Result<KeyView, StoreError> {
        self.write(move |session| {
            session.change(|transaction, plan| {
                let columns = active_columns("api_keys", is_active, &plan.catalogue, now)?;
                update(transaction, "api_keys", columns, id.get())?;
                show_key(transaction, &plan.catalogue, id.get())
            })
        })
        .await
    }

    pub(super) async fn delete_key(&self, id: KeyId) -> Result<(), StoreError> {
        self.write(move |session| {
            session.change(|transaction, _| {
                let deleted = transaction.execute("DELETE FROM api_keys WHERE id = ?1", (id.get(),))?;
                if deleted == 0 { Err(StoreError::NotFound("key")) } else { Ok(()) }
            })
        })
        .await
    }
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

fn insert(
    transaction: &Transaction<'_>,
    table: &'static str,
    columns: Vec<Column>,
) -> Result<i64, StoreError> {
    let names: Vec<&str> = columns.iter().map(|column| column.name).collect();
    let places = vec!["?"; columns.len()].join(", ");
    let sql = format!("INSERT INTO {table} ({}) VALUES ({places}) RETURNING id", names.join(", "));
    let values = rusqlite::params_from_iter(columns.into_iter().map(|column| column.value));
    Ok(transaction.query_row(&sql, values, |row| row.get(0))?)
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
    transaction.execute(&sql, rusqlite::params_from_iter(values))?;
    Ok(())
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Int(value) => ToSqlOutput::from(*value),
            Self::Bool(value) => ToSqlOutput::from(*value),
            Self::Text(text) | Self::Json(text) => ToSqlOutput::from(text.as_str()),
            Self::Time(at) => ToSqlOutput::Owned(SqlValue::Text(timestamp::format(*at))),
        })
    }
}
