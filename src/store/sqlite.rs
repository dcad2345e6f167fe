//! SQLite: the embedded store, a file beside the sidecar.
//!
//! One connection reads and one writes, each on a blocking thread; in WAL mode a reader never waits for a writer, of
//! this process or another. The file is looked at before each use: where it has been replaced, the old one, which only
//! we still see, would never show a revocation.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, Row, Transaction, TransactionBehavior};
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::domain::key::KeyPrefix;
use crate::domain::record::KeyId;
use crate::domain::row::CandidateRow;
use crate::domain::time::Timestamp;

use super::catalogue::{Catalogue, TABLES};
use super::error::StoreError;
use super::migrate;
use super::select::{Cells, Dialect, candidate_row, candidates_sql, settle};
use super::{CLI_QUERY_TIMEOUT, Reading};
use super::{sqlite_feed, timestamp};

/// A file with two connections to it. Cloning shares them.
#[derive(Clone)]
pub(super) struct SqliteStore {
    reader: Arc<Mutex<Session>>,
    writer: Arc<Mutex<Session>>,
    query_timeout: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Reader,
    Writer,
}

/// One connection, opened at its first use.
pub(super) struct Session {
    path: PathBuf,
    role: Role,
    busy_timeout: Duration,
    open: Option<Open>,
}

struct Open {
    connection: Connection,
    /// Device and inode of the file.
    file: (u64, u64),
    plan: Option<Arc<Plan>>,
}

/// The statements for this file's tables, as of a version of its schema.
pub(super) struct Plan {
    version: i64,
    pub(super) catalogue: Catalogue,
    candidates: String,
}

impl SqliteStore {
    pub(super) async fn open(
        path: &Path,
        query_timeout: Duration,
        create_if_missing: bool,
    ) -> Result<Self, StoreError> {
        // A little shorter than ours, so that SQLite gives up first.
        let busy_timeout = query_timeout.saturating_mul(9).checked_div(10).unwrap_or(query_timeout);
        let session =
            |role| Arc::new(Mutex::new(Session { path: path.to_owned(), role, busy_timeout, open: None }));
        let store = Self { reader: session(Role::Reader), writer: session(Role::Writer), query_timeout };
        let path = path.to_owned();
        // Creating tables takes several syncs of the disk; nobody waits for an answer yet.
        Self { query_timeout: query_timeout.max(CLI_QUERY_TIMEOUT), ..store.clone() }
            .write(move |session| {
                if create_if_missing {
                    create_file(&path)?;
                }
                match session.read(|_, _| Ok(())) {
                    Err(StoreError::MissingTables) if create_if_missing => session.migrate(),
                    // The caller finds out by ping, like on a Postgres without tables.
                    Err(StoreError::MissingTables | StoreError::Schema(_)) => Ok(()),
                    other => other,
                }
            })
            .await?;
        Ok(store)
    }

    pub(super) async fn candidates(&self, prefix: &KeyPrefix) -> Result<Reading, StoreError> {
        let prefix = prefix.clone();
        self.read(move |session| {
            let rows = session.read(|transaction, plan| candidates(transaction, plan, prefix.as_str()))?;
            Ok(Reading { rows, stamp: None })
        })
        .await
    }

    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.read(|session| session.read(|transaction, plan| candidates(transaction, plan, "").map(|_| ())))
            .await
    }

    pub(super) async fn record_uses(&self, uses: &[(KeyId, Timestamp)]) -> Result<(), StoreError> {
        let uses = uses.to_vec();
        self.write(move |session| {
            session.change(|transaction, plan| {
                if !plan.catalogue.has("api_keys", "last_used_at") {
                    return Err(StoreError::Refused("api_keys has no column last_used_at".to_owned()));
                }
                let mut stored =
                    transaction.prepare_cached("SELECT last_used_at FROM api_keys WHERE id = ?1")?;
                let mut update =
                    transaction.prepare_cached("UPDATE api_keys SET last_used_at = ?2 WHERE id = ?1")?;
                for (id, at) in &uses {
                    let mut rows = stored.query((id.get(),))?;
                    let Some(row) = rows.next()? else { continue };
                    // As moments: texts of several forms (`T`, an offset) do not sort by time. What can't be read is
                    // replaced.
                    let last = as_text(row.get_ref(0)?).and_then(timestamp::parse);
                    if last.is_none_or(|last| last < *at) {
                        update.execute((id.get(), timestamp::format(*at)))?;
                    }
                }
                Ok(())
            })
        })
        .await
    }

    pub(super) async fn prefixes(&self, column: &'static str, id: i64) -> Result<Vec<KeyPrefix>, StoreError> {
        let sql = format!("SELECT DISTINCT CAST(key_prefix AS TEXT) FROM api_keys WHERE {column} = ?1");
        self.read(move |session| {
            session.read(|transaction, _| {
                let mut statement = transaction.prepare_cached(&sql)?;
                let mut rows = statement.query((id,))?;
                let mut prefixes = Vec::new();
                while let Some(row) = rows.next()? {
                    if let ValueRef::Text(text) = row.get_ref(0)? {
                        prefixes.extend(std::str::from_utf8(text).ok().and_then(KeyPrefix::new));
                    }
                }
                Ok(prefixes)
            })
        })
        .await
    }

    pub(super) async fn migrate(&self) -> Result<(), StoreError> {
        self.write(Session::migrate).await
    }

    /// Work that only reads.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Session) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.run(&self.reader, work).await
    }

    /// Work that writes.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Session) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.run(&self.writer, work).await
    }

    /// Who waits for the connection takes no thread. Work that has begun goes on past its deadline, and its end is not
    /// awaited.
    async fn run<T: Send + 'static>(
        &self,
        session: &Arc<Mutex<Session>>,
        work: impl FnOnce(&mut Session) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let session = Arc::clone(session);
        let done = async {
            let mut session = session.lock_owned().await;
            spawn_blocking(move || work(&mut session)).await
        };
        match timeout(self.query_timeout, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(StoreError::unavailable(error)),
            Err(_) => Err(StoreError::Timeout),
        }
    }
}

impl Session {
    /// Reads one state of the file: tables and rows belong together.
    pub(super) fn read<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>, &Plan) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let open = self.opened()?;
        let transaction = open.connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
        let plan = current_plan(&mut open.plan, &transaction)?;
        work(&transaction, &plan)
    }

    /// Writes, all or nothing.
    pub(super) fn change<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>, &Plan) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let open = self.opened()?;
        // At once: a transaction that begins to write only later can't wait for another writer.
        let transaction = open.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let plan = current_plan(&mut open.plan, &transaction)?;
        let done = work(&transaction, &plan)?;
        transaction.commit()?;
        Ok(done)
    }

    fn migrate(&mut self) -> Result<(), StoreError> {
        let open = self.opened()?;
        let transaction = open.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(migrate::SQLITE)?;
        sqlite_feed::migrate(&transaction, &read_catalogue(&transaction)?)?;
        transaction.commit()?;
        Ok(())
    }

    /// Device and inode of the file that is open.
    pub(super) fn file(&mut self) -> Result<(u64, u64), StoreError> {
        Ok(self.opened()?.file)
    }

    fn opened(&mut self) -> Result<&mut Open, StoreError> {
        let metadata = fs::metadata(&self.path).map_err(StoreError::unavailable)?;
        let file = (metadata.dev(), metadata.ino());
        let reusable = self.open.take().filter(|open| open.file == file);
        let open = match reusable {
            Some(open) => open,
            None => Open { connection: self.connect()?, file, plan: None },
        };
        Ok(self.open.insert(open))
    }

    fn connect(&self) -> Result<Connection, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.busy_timeout(self.busy_timeout)?;
        connection.pragma_update(None, "foreign_keys", true)?;
        match self.role {
            Role::Reader => connection.pragma_update(None, "query_only", true)?,
            // On a file that we may only read this fails, and reading goes on.
            Role::Writer => drop(connection.query_row("PRAGMA journal_mode = WAL", (), |_| Ok(()))),
        }
        Ok(connection)
    }
}

/// With rights for its owner alone, as it holds hashes; SQLite gives its companions (`-wal`, `-shm`) the same.
fn create_file(path: &Path) -> Result<(), StoreError> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(StoreError::unavailable(error)),
    }
}

fn current_plan(known: &mut Option<Arc<Plan>>, connection: &Connection) -> Result<Arc<Plan>, StoreError> {
    let version: i64 = connection.query_row("PRAGMA schema_version", (), |row| row.get(0))?;
    if let Some(plan) = known.as_ref().filter(|plan| plan.version == version) {
        return Ok(Arc::clone(plan));
    }
    let catalogue = read_catalogue(connection)?;
    let candidates = candidates_sql(&catalogue, Dialect::Sqlite)?;
    Ok(Arc::clone(known.insert(Arc::new(Plan { version, catalogue, candidates }))))
}

fn read_catalogue(connection: &Connection) -> Result<Catalogue, StoreError> {
    let mut catalogue = Catalogue::default();
    let mut statement = connection.prepare("SELECT name, type FROM pragma_table_info(?1)")?;
    for table in TABLES {
        let mut rows = statement.query((table,))?;
        while let Some(row) = rows.next()? {
            catalogue.insert(table, row.get(0)?, row.get(1)?);
        }
    }
    catalogue.checked()
}

fn candidates(
    transaction: &Transaction<'_>,
    plan: &Plan,
    prefix: &str,
) -> Result<Vec<CandidateRow>, StoreError> {
    let mut statement = transaction.prepare_cached(&plan.candidates)?;
    let mut rows = statement.query((prefix,))?;
    let mut candidates = Vec::new();
    while let Some(row) = rows.next()? {
        candidates.push(candidate_row(&mut SqliteCells::new(row))?);
    }
    settle(candidates, prefix)
}

/// Cells of a SQLite row, each of whatever type it pleases.
pub(super) struct SqliteCells<'a> {
    row: &'a Row<'a>,
    unreadable: Vec<String>,
}

impl<'a> SqliteCells<'a> {
    pub(super) fn new(row: &'a Row<'a>) -> Self {
        Self { row, unreadable: Vec::new() }
    }

    /// NULL is `None`; what `read` does not take is `None` and noted.
    fn cell<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(ValueRef<'_>) -> Option<T>,
    ) -> Result<Option<T>, StoreError> {
        let value = self.row.get_ref(name)?;
        if value == ValueRef::Null {
            return Ok(None);
        }
        let read = read(value);
        if read.is_none() {
            self.unreadable.push(name.to_owned());
        }
        Ok(read)
    }
}

fn as_text(value: ValueRef<'_>) -> Option<&str> {
    match value {
        ValueRef::Text(bytes) => std::str::from_utf8(bytes).ok(),
        ValueRef::Null | ValueRef::Integer(_) | ValueRef::Real(_) | ValueRef::Blob(_) => None,
    }
}

impl Cells for SqliteCells<'_> {
    fn int(&mut self, name: &'static str) -> Result<Option<i64>, StoreError> {
        self.cell(name, |value| value.as_i64().ok())
    }
    fn bool(&mut self, name: &'static str) -> Result<Option<bool>, StoreError> {
        self.cell(name, |value| match value {
            ValueRef::Integer(0) => Some(false),
            ValueRef::Integer(1) => Some(true),
            _ => None,
        })
    }
    fn text(&mut self, name: &'static str) -> Result<Option<String>, StoreError> {
        self.cell(name, |value| as_text(value).map(str::to_owned))
    }
    fn time(&mut self, name: &'static str) -> Result<Option<i64>, StoreError> {
        self.cell(name, |value| as_text(value).and_then(timestamp::parse).map(Timestamp::as_microseconds))
    }
    fn take_unreadable(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unreadable)
    }
}
