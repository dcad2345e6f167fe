//! What only SQLite can do to us: values of any type, and a file that others write, replace or have not made.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use keyward::domain::key::KeyPrefix;
use keyward::domain::record::{Candidate, KeyId};
use keyward::domain::row::CandidateRow;
use keyward::domain::time::Timestamp;
use keyward::store::{Store, StoreError, StoreOptions, StoreUrl};
use tempfile::TempDir;

async fn open(path: &std::path::Path, create_if_missing: bool) -> Result<Store, StoreError> {
    let url = StoreUrl::parse(&format!("sqlite:{}", path.display())).unwrap();
    let query_timeout = Duration::from_millis(300);
    Store::open(StoreOptions { url, connections: 4, query_timeout, create_if_missing, actor: None }).await
}

/// A file with an active key 7 `kw_01234` of user 3.
async fn file_with_a_key() -> (TempDir, PathBuf, Store, rusqlite::Connection) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.db");
    let store = open(&path, true).await.unwrap();
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch(
        "INSERT INTO users (id, email, username, hashed_password) VALUES (3, 'a', 'ada', '!'); \
         INSERT INTO api_keys (id, key_hash, key_prefix, user_id) VALUES (7, 'h', 'kw_01234', 3)",
    )
    .unwrap();
    (directory, path, store, raw)
}

async fn rows(store: &Store) -> Result<Vec<CandidateRow>, StoreError> {
    Ok(store.candidates(&KeyPrefix::new("kw_01234").unwrap()).await?.rows)
}

#[tokio::test]
async fn a_new_file_is_its_owners_alone_and_has_tables() {
    let (_directory, path, store, _raw) = file_with_a_key().await;
    store.ping().await.unwrap();
    for file in [path.clone(), path.with_extension("db-wal"), path.with_extension("db-shm")] {
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{}", file.display());
    }
    // Opening it again keeps what is there.
    assert_eq!(rows(&open(&path, true).await.unwrap()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_missing_file_is_made_only_where_that_is_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none.db");
    assert!(matches!(open(&path, false).await, Err(StoreError::Unavailable(_))));
    assert!(!path.exists());
    assert!(open(&directory.path().join("no/such/folder.db"), true).await.is_err());
}

/// What can't be read must never read as active, unlimited, superuser or unrestricted.
#[tokio::test]
async fn a_value_of_a_wrong_type_disables_its_key_and_is_named() {
    let (_directory, _path, store, raw) = file_with_a_key().await;
    for (table, column, name) in [
        ("api_keys", "is_active", "is_active"),
        ("api_keys", "expires_at", "expires_at"),
        ("api_keys", "key_hash", "key_hash"),
        ("api_keys", "scopes", "scopes"),
        ("api_keys", "allowed_ips", "allowed_ips"),
        ("api_keys", "allowed_agents", "allowed_agents"),
        ("api_keys", "rate_limit_per_minute", "rate_limit_per_minute"),
        ("api_keys", "is_unlimited", "is_unlimited"),
        ("api_keys", "budget_limit_cents", "budget_limit_cents"),
        ("users", "is_active", "user_is_active"),
        ("users", "is_superuser", "is_superuser"),
        ("users", "account_locked", "account_locked"),
        ("users", "account_locked_until", "account_locked_until"),
    ] {
        let before: rusqlite::types::Value =
            raw.query_row(&format!("SELECT {column} FROM {table}"), (), |row| row.get(0)).unwrap();
        raw.execute(&format!("UPDATE {table} SET {column} = X'00ff'"), ()).unwrap();
        let rows = rows(&store).await.unwrap();
        assert_eq!(rows[0].unreadable, [name]);
        let candidate = Candidate::from_row(&rows[0]);
        assert!(candidate.policy.is_err_and(|defects| defects.to_string().contains(name)));
        assert!(!(name == "is_active" && candidate.key.is_active));
        assert!(!candidate.owner.is_superuser);
        raw.execute(&format!("UPDATE {table} SET {column} = ?1"), (before,)).unwrap();
    }
    for (column, value) in [
        ("is_active", "2"),
        ("is_active", "'yes'"),
        ("is_active", "0.5"),
        ("expires_at", "1700000000"),
        ("expires_at", "'tomorrow'"),
        ("rate_limit_per_day", "'many'"),
        ("allowed_models", "CAST(X'ff' AS TEXT)"),
    ] {
        raw.execute(&format!("UPDATE api_keys SET {column} = {value}"), ()).unwrap();
        let rows = rows(&store).await.unwrap();
        assert_eq!(rows[0].unreadable, [column], "{column} = {value}");
        assert_ne!(rows[0].is_active, if column == "is_active" { Some(true) } else { None });
        raw.execute(&format!("UPDATE api_keys SET {column} = NULL, is_active = 1"), ()).unwrap();
    }
}

#[tokio::test]
async fn readers_do_not_wait_for_a_writer() {
    let (_directory, _path, store, raw) = file_with_a_key().await;
    raw.execute_batch("BEGIN IMMEDIATE; UPDATE api_keys SET is_active = 0").unwrap();
    let uses = [(KeyId::new(7), Timestamp::from_microseconds(0))];
    let writing = {
        let store = store.clone();
        tokio::spawn(async move { store.record_uses(&uses).await })
    };
    assert_eq!(rows(&store).await.unwrap()[0].is_active, Some(true));
    assert!(matches!(writing.await.unwrap(), Err(StoreError::Timeout)));
    raw.execute_batch("COMMIT").unwrap();
    assert_eq!(rows(&store).await.unwrap()[0].is_active, Some(false));
    store.record_uses(&uses).await.unwrap();
}

/// The old file, which only we still see, would never show a revocation.
#[tokio::test]
async fn a_replaced_file_is_opened_anew_and_a_removed_one_is_unavailable() {
    let (directory, path, store, raw) = file_with_a_key().await;
    drop(raw);
    assert_eq!(rows(&store).await.unwrap().len(), 1);
    let other = directory.path().join("other.db");
    let made = open(&other, true).await.unwrap();
    made.ping().await.unwrap();
    drop(made);
    rusqlite::Connection::open(&other).unwrap().execute_batch("PRAGMA journal_mode = DELETE").unwrap();
    for companion in ["db-wal", "db-shm"] {
        let _ = std::fs::remove_file(path.with_extension(companion));
    }
    std::fs::rename(&other, &path).unwrap();
    assert!(rows(&store).await.unwrap().is_empty());
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(rows(&store).await, Err(StoreError::Unavailable(_))));
    assert!(store.ping().await.is_err());
}

/// `SQLite` keeps what a platform wrote, in whatever form: moments are compared, not their texts.
#[tokio::test]
async fn last_use_is_compared_as_a_moment_in_every_form() {
    let (_folder, _path, store, file) = file_with_a_key().await;
    let noon = Timestamp::from_microseconds(1_763_812_800_000_000);
    let hour = Duration::from_hours(1);
    let id: i64 = file.query_row("SELECT id FROM api_keys", [], |row| row.get(0)).unwrap();
    for (stored, moves) in [
        ("2025-11-22T11:00:00", true),
        ("2025-11-22 11:00:00", true),
        ("2025-11-22 11:00:00Z", true),
        // 11:00 and 13:00 in UTC.
        ("2025-11-22 13:00:00+02:00", true),
        ("2025-11-22 11:00:00-02:00", false),
        ("2025-11-22T13:00:00", false),
        // Nothing is lost by replacing what nobody can read.
        ("soon", true),
    ] {
        file.execute("UPDATE api_keys SET last_used_at = ?1", [stored]).unwrap();
        store.record_uses(&[(KeyId::new(id), noon)]).await.unwrap();
        let last: String = file.query_row("SELECT last_used_at FROM api_keys", [], |row| row.get(0)).unwrap();
        assert_eq!(last != stored, moves, "{stored} became {last}");
    }
    // Within one batch too, in whatever order it came.
    store.record_uses(&[(KeyId::new(id), noon.saturating_add(hour)), (KeyId::new(id), noon)]).await.unwrap();
    assert_eq!(store.key(KeyId::new(id)).await.unwrap().last_used_at, Some(noon.saturating_add(hour)));
}
