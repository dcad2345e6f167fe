//! Migrations: scripts that create what is missing, safe to run again.

use super::sqlite_feed;

/// The SQL for a kind of store, for `migrate --print`.
pub fn migration_sql(kind: &str) -> String {
    if kind == "sqlite" {
        format!("{SQLITE}\n{}", sqlite_feed::migration_sql())
    } else {
        format!("{POSTGRES}\n{POSTGRES_FEED}")
    }
}

/// Creates the tables and indexes that are missing in Postgres.
pub(super) const POSTGRES: &str = include_str!("migrations/postgres.sql");

/// Creates the triggers of the change feed in Postgres.
pub(super) const POSTGRES_FEED: &str = include_str!("migrations/postgres_feed.sql");

/// Creates what is missing in SQLite.
pub(super) const SQLITE: &str = include_str!("migrations/sqlite.sql");
