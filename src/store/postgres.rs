//! Postgres: a small pool of sessions and the lookups of a running sidecar.
//!
//! Everything is bounded by the query timeout, waiting for a session included. A session whose answer was not awaited
//! to its end is thrown away, so that nobody waits behind somebody else's query. Only a primary is asked: a standby
//! would answer with what was true some time ago.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use deadpool_postgres::{
    ClientWrapper, Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, Runtime, TimeoutType,
};
use tokio_postgres::{Row, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::domain::freshness::shared::Stamp;
use crate::domain::freshness::snapshot::Snapshot;
use crate::domain::key::KeyPrefix;
use crate::domain::record::KeyId;
use crate::domain::row::CandidateRow;
use crate::domain::time::Timestamp;

use super::catalogue::{Catalogue, TABLES};
use super::error::StoreError;
use super::incarnation;
use super::postgres_connect::{HOST_TIMEOUT, PrimaryFirst};
use super::postgres_tls;
use super::select::{Cells, Dialect, candidate_row, candidates_sql, settle};
use super::url::PostgresTarget;
use super::{Reading, Sessions};

/// The sessions and what is known of the tables.
pub(super) struct PostgresStore {
    pool: Pool,
    /// For sessions outside the pool.
    config: tokio_postgres::Config,
    tls: MakeRustlsConnect,
    create_timeout: Duration,
    query_timeout: Duration,
    /// Built from the catalogue; read again when a statement no longer fits and at each ping.
    plan: RwLock<Option<Arc<Plan>>>,
}

/// The statements for this database's tables.
#[derive(PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) catalogue: Catalogue,
    candidates: String,
}

impl PostgresStore {
    /// Connects to nothing yet: the server may be down when a sidecar starts.
    pub(super) fn open(
        target: &PostgresTarget,
        connections: usize,
        query_timeout: Duration,
    ) -> Result<Self, StoreError> {
        let tls = postgres_tls::connector(target)?;
        let connector = PrimaryFirst::new(&target.config, tls.clone());
        let manager = Manager::from_connect(target.config.clone(), connector, ManagerConfig::default());
        let connect_timeout = target.config.get_connect_timeout().copied().unwrap_or(HOST_TIMEOUT);
        let hosts = target.config.get_hosts().len().max(target.config.get_hostaddrs().len());
        let create_timeout =
            connect_timeout.saturating_mul(u32::try_from(hosts).unwrap_or(u32::MAX).saturating_add(1));
        let pool = Pool::builder(manager)
            .max_size(connections.max(1))
            .wait_timeout(Some(query_timeout))
            .create_timeout(Some(create_timeout))
            .recycle_timeout(Some(query_timeout))
            .runtime(Runtime::Tokio1)
            .post_create(Hook::async_fn(move |client, _| {
                Box::pin(prepare_session(client, query_timeout, connect_timeout))
            }))
            .build()
            .map_err(StoreError::unavailable)?;
        let config = target.config.clone();
        Ok(Self { pool, config, tls, create_timeout, query_timeout, plan: RwLock::new(None) })
    }

    /// How the pool is used now.
    pub(super) fn sessions(&self) -> Sessions {
        let status = self.pool.status();
        Sessions {
            idle: status.available,
            in_use: status.size.saturating_sub(status.available),
            limit: status.max_size,
            waiting: status.waiting,
        }
    }

    /// Connects to the primary, outside the pool, under a name of its own for `pg_stat_activity`.
    pub(super) fn feed_connector(&self) -> PrimaryFirst {
        let mut config = self.config.clone();
        let name = format!("{}-feed", config.get_application_name().unwrap_or("keyward"));
        config.application_name(name);
        PrimaryFirst::new(&config, self.tls.clone())
    }

    /// How long connecting may take.
    pub(super) fn connect_limit(&self) -> Duration {
        self.create_timeout
    }

    /// The lookup: one query, once the session has prepared it.
    pub(super) async fn candidates(&self, prefix: &KeyPrefix) -> Result<Reading, StoreError> {
        // Postgres text can't hold a NUL, so no row has this prefix.
        if prefix.as_str().contains('\0') {
            return Ok(Reading { rows: Vec::new(), stamp: None });
        }
        self.within(async {
            let lease = self.lease().await?;
            let result = self.lookup(lease.client()?, prefix.as_str()).await;
            lease.settle(result)
        })
        .await
    }

    /// Reads the catalogue again and asks for a prefix that nobody has: that the tables are there, fit, and may be read.
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.within(async {
            let lease = self.lease().await?;
            let result = async {
                let plan = self.read_plan(lease.client()?).await?;
                self.query_candidates(lease.client()?, &plan, "").await.map(|_| ())
            }
            .await;
            lease.settle(result)
        })
        .await
    }

    /// Sets `last_used_at` where that moves it forward. Rows that somebody else holds are skipped: they are being
    /// changed, and this is not worth waiting or a deadlock.
    pub(super) async fn record_uses(&self, uses: &[(KeyId, Timestamp)]) -> Result<(), StoreError> {
        let (ids, times): (Vec<i64>, Vec<i64>) =
            uses.iter().map(|(id, at)| (id.get(), at.as_microseconds())).unzip();
        self.within(async {
            let lease = self.lease().await?;
            let result = async {
                let client = lease.client()?;
                let plan = self.plan(client).await?;
                let sql = record_uses_sql(&plan.catalogue)?;
                let statement = client.prepare_cached(&sql).await?;
                client.execute(&statement, &[&ids, &times]).await?;
                Ok(())
            }
            .await;
            lease.settle(result)
        })
        .await
    }

    /// The prefixes of the keys with this number in this column.
    pub(super) async fn prefixes(&self, column: &'static str, id: i64) -> Result<Vec<KeyPrefix>, StoreError> {
        let sql = format!("SELECT DISTINCT key_prefix::text FROM api_keys WHERE {column} = $1::int8");
        self.within(async {
            let lease = self.lease().await?;
            let result = async { Ok(lease.client()?.query(&sql, &[&id]).await?) }.await;
            let rows = lease.settle(result)?;
            Ok(rows.iter().filter_map(|row| KeyPrefix::new(row.try_get(0).ok()?)).collect())
        })
        .await
    }

    /// A session. It is waited for in a task of its own: a session takes several round trips to set up, and if that
    /// were dropped at the query's deadline, no session would ever come about over a slow line.
    pub(super) async fn lease(&self) -> Result<Lease, StoreError> {
        let pool = self.pool.clone();
        match tokio::spawn(async move { pool.get().await }).await {
            Ok(Ok(client)) => Ok(Lease { client: Some(client) }),
            Ok(Err(error)) => Err(pool_error(error)),
            Err(error) => Err(StoreError::unavailable(error)),
        }
    }

    /// Everything that is asked of the server runs in here.
    pub(super) async fn within<T>(
        &self,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        tokio::time::timeout(self.query_timeout, work).await.unwrap_or(Err(StoreError::Timeout))
    }

    /// The plan, read from the catalogue where there is none yet.
    async fn plan(&self, client: &ClientWrapper) -> Result<Arc<Plan>, StoreError> {
        match self.known_plan() {
            Some(plan) => Ok(plan),
            None => self.read_plan(client).await,
        }
    }

    async fn lookup(&self, client: &ClientWrapper, prefix: &str) -> Result<Reading, StoreError> {
        if let Some(plan) = self.known_plan() {
            let result = self.query_candidates(client, &plan, prefix).await;
            // The tables have changed under us: columns gone, tables recreated, types altered.
            if !matches!(result, Err(StoreError::Schema(_) | StoreError::MissingTables)) {
                return result;
            }
            client.statement_cache.clear();
        }
        let plan = self.read_plan(client).await?;
        self.query_candidates(client, &plan, prefix).await
    }

    async fn query_candidates(
        &self,
        client: &ClientWrapper,
        plan: &Plan,
        prefix: &str,
    ) -> Result<Reading, StoreError> {
        let statement = client.prepare_cached(&plan.candidates).await?;
        let rows = client.query(&statement, &[&prefix]).await?;
        let stamp = rows.first().and_then(stamp);
        let rows: Result<Vec<CandidateRow>, StoreError> =
            rows.iter().map(|row| candidate_row(&mut PostgresCells(row))).collect();
        Ok(Reading { rows: settle(rows?, prefix)?, stamp })
    }

    fn known_plan(&self) -> Option<Arc<Plan>> {
        self.plan.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) async fn read_plan(&self, client: &ClientWrapper) -> Result<Arc<Plan>, StoreError> {
        let read = read_catalogue(client).await.and_then(|catalogue| {
            let candidates = candidates_sql(&catalogue, Dialect::Postgres)?;
            Ok(Arc::new(Plan { catalogue, candidates }))
        });
        let mut known = self.plan.write().unwrap_or_else(PoisonError::into_inner);
        match &read {
            // An equal plan stays, so that the sessions' prepared statements do.
            Ok(plan) if known.as_ref() != Some(plan) => {
                if plan.catalogue.has_hidden_old_secrets() {
                    tracing::warn!(
                        "the table keyward_old_secrets can't be read: secrets that a rotation keeps are refused here; \
                         grant SELECT on it to this role"
                    );
                }
                *known = Some(Arc::clone(plan));
            }
            Err(StoreError::MissingTables | StoreError::Schema(_)) => *known = None,
            Ok(_) | Err(_) => {}
        }
        read
    }
}

/// What the query behind this row had seen.
fn stamp(row: &Row) -> Option<Stamp> {
    let incarnation: &str = row.try_get("incarnation").ok()?;
    let snapshot = Snapshot::parse(row.try_get("snapshot").ok()?)?;
    Some(Stamp { incarnation: incarnation.into(), snapshot })
}

/// A session on loan. Dropped before [`Lease::settle`] (a deadline, a cancelled check) it is closed.
pub(super) struct Lease {
    client: Option<Object>,
}

impl Lease {
    pub(super) fn client(&self) -> Result<&ClientWrapper, StoreError> {
        self.client.as_deref().ok_or(StoreError::Timeout)
    }

    pub(super) fn client_mut(&mut self) -> Result<&mut ClientWrapper, StoreError> {
        self.client.as_deref_mut().ok_or(StoreError::Timeout)
    }

    /// Gives the session back where the server has answered, whatever it said.
    pub(super) fn settle<T>(mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if !matches!(result, Err(StoreError::Unavailable(_))) {
            drop(self.client.take());
        }
        result
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            drop(Object::take(client));
        }
    }
}

/// Cells of a Postgres row: the server has cast each to its form already.
pub(super) struct PostgresCells<'a>(pub(super) &'a Row);

impl PostgresCells<'_> {
    fn cell<'r, T: tokio_postgres::types::FromSql<'r>>(
        &'r self,
        name: &str,
    ) -> Result<Option<T>, StoreError> {
        self.0.try_get(name).map_err(|error| StoreError::Schema(error.to_string()))
    }
}

impl Cells for PostgresCells<'_> {
    fn int(&mut self, name: &'static str) -> Result<Option<i64>, StoreError> {
        self.cell(name)
    }
    fn bool(&mut self, name: &'static str) -> Result<Option<bool>, StoreError> {
        self.cell(name)
    }
    fn text(&mut self, name: &'static str) -> Result<Option<String>, StoreError> {
        self.cell(name)
    }
    fn time(&mut self, name: &'static str) -> Result<Option<i64>, StoreError> {
        self.cell(name)
    }
    fn take_unreadable(&mut self) -> Vec<String> {
        Vec::new()
    }
}

const STANDBY: &str = "standby";

/// What every session starts with. The server's own timeout is a little shorter than ours, so that a slow query costs
/// its answer and not the session too.
async fn prepare_session(
    client: &mut ClientWrapper,
    query_timeout: Duration,
    connect_timeout: Duration,
) -> Result<(), HookError> {
    let statement_timeout =
        query_timeout.saturating_mul(9).checked_div(10).unwrap_or(query_timeout).as_millis();
    let sql = format!(
        "SET statement_timeout = {}; SET idle_in_transaction_session_timeout = 10000; SET TIME ZONE 'UTC'; \
         SELECT pg_is_in_recovery()",
        statement_timeout.clamp(1, 86_400_000)
    );
    let answer = tokio::time::timeout(connect_timeout, client.simple_query(&sql))
        .await
        .map_err(|_| HookError::message("the session could not be set up in time"))?
        .map_err(HookError::Backend)?;
    let is_primary = answer.iter().any(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0) == Some("f"),
        _ => false,
    });
    if !is_primary {
        return Err(HookError::message(STANDBY));
    }
    // Without it records are not shared, and the change feed covers none: slower, and as safe.
    let _ = tokio::time::timeout(connect_timeout, incarnation::note(client)).await;
    Ok(())
}

fn pool_error(error: PoolError) -> StoreError {
    match error {
        PoolError::Timeout(TimeoutType::Wait) => StoreError::Timeout,
        PoolError::PostCreateHook(HookError::Message(message)) if message == STANDBY => {
            StoreError::NotPrimary
        }
        PoolError::Backend(error) => StoreError::unavailable(error),
        other => StoreError::unavailable(other),
    }
}

/// By the role's own search path. The tables that add to a record are used only where they may be read; of the two
/// that make a record nothing is left out, because a restriction that is not read is a restriction lost; and changes
/// are not made in silence by who may not read of them.
async fn read_catalogue(client: &ClientWrapper) -> Result<Catalogue, StoreError> {
    const SQL: &str = "\
        SELECT t.name, a.attname::text, \
               (CASE WHEN y.typtype = 'd' THEN y.typbasetype ELSE y.oid END)::regtype::text \
        FROM unnest($1::text[]) AS t(name) \
        JOIN pg_catalog.pg_attribute a \
          ON a.attrelid = to_regclass(t.name) AND a.attnum > 0 AND NOT a.attisdropped \
        JOIN pg_catalog.pg_type y ON y.oid = a.atttypid \
        WHERE t.name IN ('api_keys', 'users', 'keyward_history') OR has_column_privilege(a.attrelid, a.attnum, 'SELECT') \
        UNION ALL SELECT 'keyward_old_secrets', '', '' WHERE to_regclass('keyward_old_secrets') IS NOT NULL";
    let mut catalogue = Catalogue::default();
    for row in client.query(SQL, &[&TABLES.as_slice()]).await? {
        let table: String = row.try_get(0)?;
        catalogue.insert(&table, row.try_get(1)?, row.try_get(2)?);
    }
    catalogue.checked()
}

fn record_uses_sql(catalogue: &Catalogue) -> Result<String, StoreError> {
    let Some(kind) = catalogue.kind("api_keys", "last_used_at") else {
        return Err(StoreError::Refused("api_keys has no column last_used_at".to_owned()));
    };
    let at = timestamp_sql("u.at", kind);
    Ok(format!(
        "UPDATE api_keys AS k SET last_used_at = {at} \
         FROM (SELECT id, max(at) AS at FROM unnest($1::int8[], $2::int8[]) AS x(id, at) GROUP BY id) AS u \
         WHERE k.id = u.id AND (k.last_used_at IS NULL OR k.last_used_at < {at}) \
         AND k.id IN (SELECT id FROM api_keys WHERE id = ANY($1::int8[]) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED)"
    ))
}

/// Microseconds since 1970 (an SQL expression) as a value for a column of this type. In two steps, because an interval
/// is multiplied in floating point, which counts microseconds exactly up to the year 2255 only.
pub(super) fn timestamp_sql(microseconds: &str, kind: &str) -> String {
    let finite = format!(
        "timestamp '1970-01-01' + ({microseconds} / 1000000) * interval '1 second' \
         + ({microseconds} % 1000000) * interval '1 microsecond'"
    );
    let zone = if kind == "timestamp with time zone" { " AT TIME ZONE 'UTC'" } else { "" };
    format!(
        "(CASE {microseconds} WHEN {} THEN timestamp 'infinity' WHEN (-9223372036854775807 - 1) \
         THEN timestamp '-infinity' ELSE {finite} END){zone}",
        i64::MAX
    )
}
