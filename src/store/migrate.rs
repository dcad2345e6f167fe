//! Migrations: one script a store, safe to run again.

/// The SQL for a kind of store, for `migrate --print`.
pub fn migration_sql(kind: &str) -> &'static str {
    if kind == "sqlite" { SQLITE } else { POSTGRES }
}

/// Creates what is missing in Postgres.
pub(super) const POSTGRES: &str = include_str!("migrations/postgres.sql");

/// Creates what is missing in SQLite.
pub(super) const SQLITE: &str = include_str!("migrations/sqlite.sql");
