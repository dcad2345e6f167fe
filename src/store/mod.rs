//! The truth: Postgres or SQLite, read and written in the contract's schema.
//!
//! Both stores have one surface and one behaviour (`tests/it/stores.rs` runs on each). A lookup has three answers:
//! candidates, none, or an error, and an error is never taken for none. What a row means is not known here
//! ([`crate::domain::record::Candidate::from_row`]).

pub mod admin;
mod catalogue;
mod error;
pub mod feed;
mod incarnation;
mod migrate;
mod postgres;
mod postgres_admin;
mod postgres_connect;
mod postgres_feed;
mod postgres_tls;
mod select;
mod sqlite;
mod sqlite_admin;
mod sqlite_feed;
mod timestamp;
mod url;
mod view;
mod write;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::domain::freshness::shared::Stamp;
use crate::domain::key::KeyPrefix;
use crate::domain::record::KeyId;
use crate::domain::row::CandidateRow;
use crate::domain::time::Timestamp;

use crate::clock;

use admin::{
    HistoryEntry, ImportMode, KeyChange, KeyFilter, KeySelector, KeyView, NewKey, NewUser, Rotation, UserRef,
    UserView,
};
use feed::{Feed, NoFeed};
use postgres::PostgresStore;
use sqlite::SqliteStore;
use url::Target;
use write::Origin;

pub use error::StoreError;
pub use migrate::migration_sql;
pub use select::MAX_CANDIDATES;
pub use url::{StoreUrl, StoreUrlError};

/// How long a running sidecar waits for the store.
pub const SERVE_QUERY_TIMEOUT: Duration = Duration::from_millis(150);

/// How long the command line waits for the store.
pub const CLI_QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Which store.
    pub url: StoreUrl,
    /// Most sessions with Postgres; SQLite has one that reads and one that writes.
    pub connections: usize,
    /// Bounds every call, waiting for a session included.
    pub query_timeout: Duration,
    /// Whether a missing SQLite file, or missing tables in it, are created. Postgres is never changed by opening it.
    pub create_if_missing: bool,
    /// Who is named in the table of changes; `None`: what is written is no change of an operator's.
    pub actor: Option<Arc<str>>,
}

/// The store. Cloning shares its sessions.
#[derive(Clone)]
pub struct Store {
    backend: Backend,
    actor: Option<Arc<str>>,
}

#[derive(Clone)]
enum Backend {
    Postgres(Arc<PostgresStore>),
    Sqlite(Arc<SqliteStore>),
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Store").field(&self.kind()).finish()
    }
}

/// What a look-up found, and when in the store's own order of events.
#[derive(Debug)]
pub struct Reading {
    /// Ordered by id.
    pub rows: Vec<CandidateRow>,
    /// What the query had seen; `None` where there are no rows, or where the store can't tell.
    pub stamp: Option<Stamp>,
}

/// How the sessions with Postgres are used at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sessions {
    /// Lent to nobody.
    pub idle: usize,
    /// Lent.
    pub in_use: usize,
    /// Most of them.
    pub limit: usize,
    /// Questions that wait for one.
    pub waiting: usize,
}

/// Calls the same function on either store.
macro_rules! either {
    ($self:ident, $store:ident => $call:expr) => {
        match &$self.backend {
            Backend::Postgres($store) => $call.await,
            Backend::Sqlite($store) => $call.await,
        }
    };
}

impl Store {
    /// Opens a store. Postgres need not be reachable yet; what is asked of the settings alone (a root certificate that
    /// can be read) is checked. A SQLite file must be there, or may be created.
    pub async fn open(options: StoreOptions) -> Result<Self, StoreError> {
        let backend = match options.url.target() {
            Target::Postgres(target) => {
                let store = PostgresStore::open(target, options.connections, options.query_timeout)?;
                Backend::Postgres(Arc::new(store))
            }
            Target::Sqlite(path) => {
                let store = SqliteStore::open(path, options.query_timeout, options.create_if_missing).await?;
                Backend::Sqlite(Arc::new(store))
            }
        };
        Ok(Self { backend, actor: options.actor })
    }

    /// `postgres` or `sqlite`.
    pub fn kind(&self) -> &'static str {
        match self.backend {
            Backend::Postgres(_) => "postgres",
            Backend::Sqlite(_) => "sqlite",
        }
    }

    /// How the sessions are used; `None` for SQLite, which has one that reads and one that writes.
    pub fn sessions(&self) -> Option<Sessions> {
        match &self.backend {
            Backend::Postgres(store) => Some(store.sessions()),
            Backend::Sqlite(_) => None,
        }
    }

    /// Every key with exactly this prefix and its owner, ordered by id; empty where there is none.
    pub async fn candidates(&self, prefix: &KeyPrefix) -> Result<Reading, StoreError> {
        either!(self, store => store.candidates(prefix))
    }

    /// Opens a session of the change feed. What it proves is used for at most `lease` after it falls silent.
    pub async fn open_feed(&self, lease: Duration) -> Result<Feed, NoFeed> {
        either!(self, store => store.open_feed(lease))
    }

    /// Whether the store answers and its tables are there, fit, and may be read. Also notices new columns.
    pub async fn ping(&self) -> Result<(), StoreError> {
        either!(self, store => store.ping())
    }

    /// Moves `last_used_at` of each key forward, never back. Without the right to, [`StoreError::Refused`].
    pub async fn record_uses(&self, uses: &[(KeyId, Timestamp)]) -> Result<(), StoreError> {
        if uses.is_empty() {
            return Ok(());
        }
        either!(self, store => store.record_uses(uses))
    }

    /// The prefixes that a selection of keys has, each once. A prefix is its own answer; nothing is asked for it.
    pub async fn prefixes(&self, of: &KeySelector) -> Result<Vec<KeyPrefix>, StoreError> {
        let (column, id) = match of {
            KeySelector::Prefix(prefix) => return Ok(vec![prefix.clone()]),
            KeySelector::Key(id) => ("id", id.get()),
            KeySelector::User(id) => ("user_id", id.get()),
        };
        either!(self, store => store.prefixes(column, id))
    }

    /// Creates the tables and indexes that are missing; alters and drops nothing. Safe to run again.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        either!(self, store => store.migrate())
    }

    /// Creates a user; [`StoreError::Conflict`] where the name or the address is taken.
    pub async fn create_user(&self, user: &NewUser) -> Result<UserView, StoreError> {
        either!(self, store => store.create_user(user, self.origin()))
    }

    /// All users, by id.
    pub async fn list_users(&self) -> Result<Vec<UserView>, StoreError> {
        either!(self, store => store.list_users())
    }

    /// One user.
    pub async fn user(&self, user: &UserRef) -> Result<UserView, StoreError> {
        either!(self, store => store.user(user))
    }

    /// Switches a user, and with them all their keys, on or off.
    pub async fn set_user_active(&self, user: &UserRef, is_active: bool) -> Result<UserView, StoreError> {
        either!(self, store => store.set_user_active(user, is_active, self.origin()))
    }

    /// Creates a key for a user that exists. A setting whose column this database does not have is refused.
    pub async fn create_key(&self, key: &NewKey) -> Result<KeyView, StoreError> {
        either!(self, store => store.create_key(key, self.origin()))
    }

    /// Creates keys, all or none. The error names the first key that the store does not take, by its place.
    pub async fn import_keys(
        &self,
        keys: &Arc<[NewKey]>,
        mode: ImportMode,
    ) -> Result<(), (usize, StoreError)> {
        let failed_at = Arc::new(AtomicUsize::new(0));
        let result = either!(self, store => store.import_keys(keys, mode, &failed_at, self.origin()));
        result.map_err(|error| (failed_at.load(Ordering::Relaxed), error))
    }

    /// Keys by id.
    pub async fn list_keys(&self, filter: &KeyFilter) -> Result<Vec<KeyView>, StoreError> {
        either!(self, store => store.list_keys(filter))
    }

    /// One key, with the old secrets that are still good.
    pub async fn key(&self, id: KeyId) -> Result<KeyView, StoreError> {
        let mut key = either!(self, store => store.key(id))?;
        let now = clock::wall();
        key.old_secrets.retain(|old| old.expires_at.is_some_and(|end| now <= end));
        Ok(key)
    }

    /// Changes a key's settings.
    pub async fn update_key(&self, id: KeyId, change: &KeyChange) -> Result<(), StoreError> {
        either!(self, store => store.update_key(id, change, self.origin()))
    }

    /// Gives a key another secret. [`StoreError::Refused`] where its prefix is no longer the expected one, where old
    /// secrets can't be kept, or where there are too many.
    pub async fn rotate_key(&self, rotation: &Rotation) -> Result<(), StoreError> {
        either!(self, store => store.rotate_key(rotation, self.origin()))
    }

    /// Ends a key's old secrets: how many there were.
    pub async fn end_old_secrets(&self, id: KeyId) -> Result<u64, StoreError> {
        either!(self, store => store.end_old_secrets(id, self.origin()))
    }

    /// Switches a key, with all its secrets, on or off.
    pub async fn set_key_active(&self, id: KeyId, is_active: bool) -> Result<(), StoreError> {
        either!(self, store => store.set_key_active(id, is_active, self.origin()))
    }

    /// Removes a key and its old secrets for good. Its history stays.
    pub async fn delete_key(&self, id: KeyId) -> Result<(), StoreError> {
        either!(self, store => store.delete_key(id, self.origin()))
    }

    /// What commands have changed about a key, the oldest first; also of a key that is deleted.
    pub async fn key_history(&self, id: KeyId) -> Result<Vec<HistoryEntry>, StoreError> {
        either!(self, store => store.key_history(id))
    }

    fn origin(&self) -> Origin {
        Origin { at: clock::wall(), actor: self.actor.clone() }
    }
}
