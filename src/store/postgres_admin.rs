//! Postgres for the command line: every write is one transaction, which also reads back what it shows.

use deadpool_postgres::Transaction;
use tokio_postgres::types::ToSql;

use crate::domain::record::{KeyId, UserId};
use crate::domain::time::Timestamp;

use super::admin::{KeyView, NewKey, NewUser, UserRef, UserView};
use super::catalogue::Catalogue;
use super::error::StoreError;
use super::migrate;
use super::postgres::{PostgresCells, PostgresStore, timestamp_sql};
use super::select::{Dialect, castable, key_views_sql, user_views_sql};
use super::view::{key_view, user_view};
use super::write::{Column, Value, active_columns, key_columns, user_columns};

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

    pub(super) async fn create_user(&self, user: &NewUser, now: Timestamp) -> Result<UserView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let role_id = role_id(transaction, catalogue, &user.role).await?;
            let columns = user_columns(user, role_id, catalogue, now)?;
            let id = insert(transaction, catalogue, "users", columns).await?;
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
        now: Timestamp,
    ) -> Result<UserView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let id = user_id(transaction, user).await?.get();
            let columns = active_columns("users", is_active, catalogue, now)?;
            update(transaction, catalogue, "users", columns, id).await?;
            show_user(transaction, catalogue, id).await
        })
        .await
    }

    pub(super) async fn create_key(&self, key: &NewKey, now: Timestamp) -> Result<KeyView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let owner = user_id(transaction, &key.user).await?;
            let columns = key_columns(key, owner, catalogue, now)?;
            let id = insert(transaction, catalogue, "api_keys", columns).await?;
            show_key(transaction, catalogue, id).await
        })
        .await
    }

    pub(super) async fn list_keys(&self, user: Option<&UserRef>) -> Result<Vec<KeyView>, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let owner = match user {
                Some(user) => Some(user_id(transaction, user).await?.get()),
                None => None,
            };
            let select = key_views_sql(catalogue, Dialect::Postgres)?;
            let sql = format!("{select} WHERE $1::int8 IS NULL OR k.user_id = $1::int8 ORDER BY k.id");
            let rows = transaction.query(&sql, &[&owner]).await?;
            rows.iter().map(|row| key_view(&mut PostgresCells(row))).collect()
        })
        .await
    }

    pub(super) async fn key(&self, id: KeyId) -> Result<KeyView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            show_key(transaction, catalogue, id.get()).await
        })
        .await
    }

    pub(super) async fn set_key_active(
        &self,
        id: KeyId,
        is_active: bool,
        now: Timestamp,
    ) -> Result<KeyView, StoreError> {
        self.transact(async |transaction: &Transaction<'_>, catalogue: &Catalogue| {
            let columns = active_columns("api_keys", is_active, catalogue, now)?;
            update(transaction, catalogue, "api_keys", columns, id.get()).await?;
            show_key(transaction, catalogue, id.get()).await
        })
        .await
    }

    pub(super) async fn delete_key(&self, id: KeyId) -> Result<(), StoreError> {
        self.transact(async |transaction: &Transaction<'_>, _: &Catalogue| {
            let deleted =
                transaction.execute("DELETE FROM api_keys WHERE id = $1::int8", &[&id.get()]).await?;
            if deleted == 0 { Err(StoreError::NotFound("key")) } else { Ok(()) }
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
    Ok(transaction.query_one(&sql, &references(&parameters)).await?.try_get(0)?)
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
    transaction.execute(&sql, &references(&parameters)).await?;
    Ok(())
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
