//! Both stores: one suite, run on a real Postgres and on a SQLite file. What only one of them can do is in
//! `stores_postgres.rs` and `stores_sqlite.rs`.

use std::time::Duration;

use keyward::domain::key::KeyPrefix;
use keyward::domain::record::{Candidate, KeyId, UserId};
use keyward::domain::row::CandidateRow;
use keyward::domain::time::Timestamp;
use keyward::store::admin::{KeyFilter, KeySelector, KeySettings, NewKey, NewUser, UserRef};
use keyward::store::{MAX_CANDIDATES, Store, StoreError, StoreOptions, StoreUrl};
use zeroize::Zeroizing;

use crate::support::postgres::Postgres;

pub(crate) const HASH: &str = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

/// A store of our own, and a way around it.
pub(crate) struct Bed {
    pub(crate) store: Store,
    raw: Raw,
    _file: Option<tempfile::TempDir>,
    _server: Option<Postgres>,
}

enum Raw {
    Postgres(tokio_postgres::Client),
    Sqlite(rusqlite::Connection),
}

/// Who is named in the table of changes.
pub(crate) const ACTOR: &str = "tester";

pub(crate) async fn open(url: &str) -> Store {
    open_with(url, Duration::from_secs(5)).await
}

pub(crate) async fn open_with(url: &str, query_timeout: Duration) -> Store {
    let url = StoreUrl::parse(url).unwrap();
    Store::open(StoreOptions {
        url,
        connections: 4,
        query_timeout,
        create_if_missing: false,
        actor: Some(ACTOR.into()),
    })
    .await
    .unwrap()
}

impl Bed {
    /// Without tables.
    pub(crate) async fn bare(kind: &str) -> Self {
        if kind == "postgres" {
            let server = Postgres::start().await;
            server.create_database("keys").await;
            let raw = Raw::Postgres(server.client("keys").await);
            return Self { store: open(&server.url("keys")).await, raw, _file: None, _server: Some(server) };
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.db");
        let raw = rusqlite::Connection::open(&path).unwrap();
        raw.busy_timeout(Duration::from_secs(5)).unwrap();
        let store = open(&format!("sqlite:{}", path.display())).await;
        Self { store, raw: Raw::Sqlite(raw), _file: Some(directory), _server: None }
    }

    /// With the tables that `migrate` makes, and user 3, who is active.
    pub(crate) async fn new(kind: &str) -> Self {
        let bed = Self::bare(kind).await;
        bed.store.migrate().await.unwrap();
        bed.sql(
            "INSERT INTO users (id, email, username, hashed_password, is_active) \
             VALUES (3, 'ada@example.com', 'ada', '!', true)",
        )
        .await;
        bed
    }

    pub(crate) async fn sql(&self, sql: &str) {
        match &self.raw {
            Raw::Postgres(client) => client.batch_execute(sql).await.unwrap(),
            Raw::Sqlite(connection) => connection.execute_batch(sql).unwrap(),
        }
    }

    /// An active key of user 3, with more columns.
    pub(crate) async fn key(&self, id: i64, prefix: &str, columns: &[(&str, &str)]) {
        let mut names = String::new();
        let mut values = String::new();
        for (name, value) in columns {
            names.extend([", ", name]);
            values.extend([", ", value]);
        }
        let prefix = prefix.replace('\'', "''");
        self.sql(&format!(
            "INSERT INTO api_keys (id, key_hash, key_prefix, user_id, is_active{names}) \
             VALUES ({id}, 'hash {id}', '{prefix}', 3, true{values})"
        ))
        .await;
    }

    pub(crate) async fn rows(&self, prefix: &str) -> Result<Vec<CandidateRow>, StoreError> {
        Ok(self.store.candidates(&KeyPrefix::new(prefix).unwrap()).await?.rows)
    }

    pub(crate) async fn ids(&self, prefix: &str) -> Vec<i64> {
        self.rows(prefix).await.unwrap().iter().map(|row| row.key_id).collect()
    }

    /// The one row with this prefix.
    pub(crate) async fn row(&self, prefix: &str) -> CandidateRow {
        let mut rows = self.rows(prefix).await.unwrap();
        assert_eq!(rows.len(), 1, "{prefix}");
        rows.remove(0)
    }

    pub(crate) fn is_postgres(&self) -> bool {
        self.store.kind() == "postgres"
    }
}

pub(crate) fn new_user(name: &str) -> NewUser {
    NewUser { username: name.into(), email: format!("{name}@x"), role: "user".into(), is_superuser: false }
}

pub(crate) fn new_key(user: UserRef, hash: &str) -> NewKey {
    NewKey {
        user,
        name: "ci".into(),
        prefix: KeyPrefix::new("kw_01234").unwrap(),
        hash: Zeroizing::new(hash.into()),
        is_active: true,
        settings: KeySettings::default(),
    }
}

/// Each guarantee, once a store.
macro_rules! on_both_stores {
    ($($name:ident),+ $(,)?) => {
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                super::$name("postgres").await;
            })+
        }
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name("sqlite").await;
            })+
        }
    };
}

pub(crate) use on_both_stores;

on_both_stores!(
    every_column_comes_back_as_written,
    null_everywhere_is_read_as_null_and_allows_nothing,
    json_of_a_wrong_type_makes_the_key_unusable,
    expiry_is_utc_and_reaches_to_infinity,
    all_keys_of_a_prefix_are_found_whoever_owns_them,
    more_than_64_keys_on_a_prefix_are_an_error,
    prefixes_are_compared_byte_by_byte,
    roles_by_id_and_missing_columns_are_read_as_they_are,
    monthly_budgets_are_summed_since_the_first,
    columns_that_appear_later_are_noticed,
    missing_tables_are_named_and_noticed_when_they_come,
    migrating_again_changes_nothing,
    last_use_only_moves_forward,
    prefixes_of_keys_and_users,
);

async fn every_column_comes_back_as_written(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.sql(
        "UPDATE users SET is_superuser = true, role = 'admin', account_locked = true, \
         account_locked_until = '2023-11-14 22:13:20' WHERE id = 3",
    )
    .await;
    bed.key(
        7,
        "kw_01234",
        &[
            ("name", "'ci'"),
            ("expires_at", "'2023-11-14 22:13:20.000001'"),
            ("scopes", "'[\"chat\"]'"),
            ("allowed_models", "'[\"gpt-*\"]'"),
            ("allowed_endpoints", "'[\"/v1/**\"]'"),
            ("allowed_ips", "'[\"10.0.0.0/8\"]'"),
            ("allowed_chatbots", "'[\"b\"]'"),
            ("allowed_agents", "'[\"a\"]'"),
            ("rate_limit_per_minute", "1"),
            ("rate_limit_per_hour", "2"),
            ("rate_limit_per_day", "3"),
            ("is_unlimited", "true"),
            ("budget_limit_cents", "2147483647"),
            ("budget_type", "'monthly'"),
            ("total_cost", "5"),
        ],
    )
    .await;
    let row = bed.row("kw_01234").await;
    let list = |text: &str| Some(format!("[\"{text}\"]"));
    let expected = CandidateRow {
        key_id: 7,
        key_name: Some("ci".into()),
        key_hash: Some("hash 7".into()),
        key_prefix: Some("kw_01234".into()),
        is_active: Some(true),
        expires_at: Some(1_700_000_000_000_001),
        scopes: list("chat"),
        allowed_models: list("gpt-*"),
        allowed_endpoints: list("/v1/**"),
        allowed_ips: list("10.0.0.0/8"),
        allowed_chatbots: list("b"),
        allowed_agents: list("a"),
        rate_limit_per_minute: Some(1),
        rate_limit_per_hour: Some(2),
        rate_limit_per_day: Some(3),
        is_unlimited: Some(true),
        budget_limit_cents: Some(2_147_483_647),
        budget_type: Some("monthly".into()),
        total_cost: Some(5),
        month_cost: None,
        user_id: Some(3),
        username: Some("ada".into()),
        email: Some("ada@example.com".into()),
        user_is_active: Some(true),
        is_superuser: Some(true),
        role: Some("admin".into()),
        account_locked: Some(true),
        account_locked_until: Some(1_700_000_000_000_000),
        unreadable: Vec::new(),
    };
    assert_eq!(serde_json::to_string(&row).unwrap(), serde_json::to_string(&expected).unwrap());
}

async fn null_everywhere_is_read_as_null_and_allows_nothing(kind: &str) {
    let bed = Bed::new(kind).await;
    let nullable = "name scopes allowed_models allowed_endpoints allowed_ips allowed_chatbots allowed_agents \
        rate_limit_per_minute rate_limit_per_hour rate_limit_per_day is_unlimited budget_limit_cents \
        budget_type total_cost expires_at";
    let columns: Vec<(&str, &str)> = nullable.split_whitespace().map(|name| (name, "NULL")).collect();
    bed.key(7, "kw_nulls", &columns).await;
    bed.sql("UPDATE api_keys SET is_active = NULL, user_id = NULL").await;
    let row = bed.row("kw_nulls").await;
    assert_eq!((row.is_active, row.user_id, row.expires_at, row.total_cost), (None, None, None, None));
    assert!(row.scopes.is_none() && row.allowed_agents.is_none() && row.role.is_none());
    let candidate = Candidate::from_row(&row);
    assert!(!candidate.key.is_active);
    assert!(!candidate.owner.may_act(Timestamp::from_microseconds(0)));

    bed.sql("UPDATE api_keys SET user_id = 3; UPDATE users SET is_active = NULL, is_superuser = NULL").await;
    let candidate = Candidate::from_row(&bed.row("kw_nulls").await);
    assert_eq!(candidate.owner.id, Some(UserId::new(3)));
    assert!(!candidate.owner.may_act(Timestamp::from_microseconds(0)));
    assert!(!candidate.owner.is_superuser);
}

async fn json_of_a_wrong_type_makes_the_key_unusable(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.key(7, "kw_01234", &[]).await;
    for column in
        ["scopes", "allowed_models", "allowed_endpoints", "allowed_ips", "allowed_chatbots", "allowed_agents"]
    {
        for (json, good) in [
            ("null", true),
            ("[]", true),
            ("{}", false),
            ("1", false),
            ("\"x\"", false),
            ("[1]", false),
            ("[null]", false),
            ("[[\"x\"]]", false),
        ] {
            bed.sql(&format!("UPDATE api_keys SET {column} = '{json}'")).await;
            let candidate = Candidate::from_row(&bed.row("kw_01234").await);
            assert_eq!(candidate.policy.is_ok(), good, "{column} = {json}");
        }
        bed.sql(&format!("UPDATE api_keys SET {column} = NULL")).await;
    }
}

async fn expiry_is_utc_and_reaches_to_infinity(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.key(7, "kw_01234", &[]).await;
    for (text, expected) in [
        ("2023-11-14 22:13:20", 1_700_000_000_000_000),
        ("2023-11-14 22:13:20.123456", 1_700_000_000_123_456),
        ("1969-12-31 23:59:59.999999", -1),
        ("9999-12-31 23:59:59.999999", 253_402_300_799_999_999),
        ("infinity", i64::MAX),
        ("-infinity", i64::MIN),
    ] {
        bed.sql(&format!("UPDATE api_keys SET expires_at = '{text}'")).await;
        assert_eq!(bed.row("kw_01234").await.expires_at, Some(expected), "{text}");
    }
}

async fn all_keys_of_a_prefix_are_found_whoever_owns_them(kind: &str) {
    let bed = Bed::new(kind).await;
    for owner in 10..15 {
        bed.sql(&format!(
            "INSERT INTO users (id, email, username, hashed_password, is_active) \
             VALUES ({owner}, 'u{owner}', 'u{owner}', '!', true)"
        ))
        .await;
    }
    assert!(bed.ids("kw_none").await.is_empty());
    // Inserted in no order, and found by id.
    for (key, prefix, owner) in [
        (25, "kw_five", 14),
        (21, "kw_five", 10),
        (24, "kw_five", 13),
        (22, "kw_five", 11),
        (23, "kw_five", 12),
        (32, "kw_two", 10),
        (31, "kw_two", 11),
        (41, "kw_one", 10),
    ] {
        bed.key(key, prefix, &[]).await;
        bed.sql(&format!("UPDATE api_keys SET user_id = {owner} WHERE id = {key}")).await;
    }
    assert_eq!(bed.ids("kw_one").await, [41]);
    assert_eq!(bed.ids("kw_two").await, [31, 32]);
    let owners: Vec<_> = bed.rows("kw_five").await.unwrap().iter().map(|row| row.user_id).collect();
    assert_eq!(owners, [Some(10), Some(11), Some(12), Some(13), Some(14)]);
}

async fn more_than_64_keys_on_a_prefix_are_an_error(kind: &str) {
    let bed = Bed::new(kind).await;
    for id in 1..=64 {
        bed.key(id, "kw_crowd", &[]).await;
        bed.key(100 + id, "KW_CROWD", &[]).await;
    }
    assert_eq!(bed.ids("kw_crowd").await.len(), MAX_CANDIDATES);
    bed.key(65, "kw_crowd", &[]).await;
    assert!(matches!(bed.rows("kw_crowd").await, Err(StoreError::TooManyCandidates)));
    assert_eq!(bed.ids("KW_CROWD").await.len(), 64);
}

/// Wildcards, quotes, case and trailing spaces are characters like others.
async fn prefixes_are_compared_byte_by_byte(kind: &str) {
    let bed = Bed::new(kind).await;
    let prefixes =
        ["kw_a%c'd", "kw_abc'd", "kw%a", "kw_a", "kwXa", "kw\\a", "\"kw\"", "KW_A", "Kw_a", "kw_a ", "kw_ä"];
    for (id, prefix) in (1..).zip(prefixes) {
        bed.key(id, prefix, &[]).await;
    }
    for (id, prefix) in (1..).zip(prefixes) {
        assert_eq!(bed.ids(prefix).await, [id], "{prefix}");
    }
    assert!(bed.ids("kw_%").await.is_empty());
    assert!(bed.ids("kw_a\0").await.is_empty());
    let change = if bed.is_postgres() {
        "CREATE EXTENSION citext; ALTER TABLE api_keys ALTER key_prefix TYPE citext"
    } else {
        "ALTER TABLE api_keys RENAME TO old; DROP INDEX ix_api_keys_key_prefix; \
         CREATE TABLE api_keys (id INTEGER PRIMARY KEY, key_hash TEXT, key_prefix TEXT COLLATE NOCASE, \
         user_id INTEGER, is_active BOOLEAN); \
         INSERT INTO api_keys SELECT id, key_hash, key_prefix, user_id, is_active FROM old"
    };
    bed.sql(change).await;
    bed.store.ping().await.unwrap();
    for (id, prefix) in (1..).zip(prefixes) {
        assert_eq!(bed.ids(prefix).await, [id], "{prefix}, whatever the case");
    }
}

async fn roles_by_id_and_missing_columns_are_read_as_they_are(kind: &str) {
    let bed = Bed::bare(kind).await;
    let id = if bed.is_postgres() { "serial" } else { "integer" };
    bed.sql(&format!(
        "CREATE TABLE roles (id integer PRIMARY KEY, name text); INSERT INTO roles VALUES (1, 'admin'); \
         CREATE TABLE users (id {id} PRIMARY KEY, email text, username text, is_active boolean, role_id integer); \
         INSERT INTO users VALUES (3, 'e', 'ada', true, 1); \
         CREATE TABLE api_keys (id integer PRIMARY KEY, key_hash text, key_prefix text, user_id integer, \
         is_active boolean); \
         INSERT INTO api_keys VALUES (7, 'h', 'kw_01234', 3, true)"
    ))
    .await;
    bed.store.ping().await.unwrap();
    let row = bed.row("kw_01234").await;
    assert_eq!(row.role.as_deref(), Some("admin"));
    assert_eq!((row.account_locked, row.allowed_agents.clone(), row.budget_type.clone()), (None, None, None));
    let candidate = Candidate::from_row(&row);
    assert!(candidate.key.is_active && candidate.owner.is_active && candidate.policy.is_ok());

    let user = NewUser { role: "admin".into(), ..new_user("bo") };
    assert_eq!(bed.store.create_user(&user).await.unwrap().role.as_deref(), Some("admin"));
    assert!(matches!(bed.store.create_user(&new_user("cy")).await, Err(StoreError::NotFound("role"))));

    bed.sql("ALTER TABLE users ADD role text").await;
    bed.sql("UPDATE users SET role = 'user', role_id = NULL").await;
    bed.store.ping().await.unwrap();
    assert_eq!(bed.row("kw_01234").await.role.as_deref(), Some("user"));
}

async fn monthly_budgets_are_summed_since_the_first(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.key(7, "kw_01234", &[("budget_type", "'monthly'"), ("total_cost", "1000")]).await;
    bed.key(8, "kw_total", &[("budget_type", "'total'")]).await;
    assert_eq!(bed.row("kw_01234").await.month_cost, None);
    let now = if bed.is_postgres() { "timezone('UTC', now())" } else { "datetime('now')" };
    bed.sql(&format!(
        "CREATE TABLE usage_tracking (id integer, api_key_id integer, cost_cents integer, created_at timestamp); \
         INSERT INTO usage_tracking VALUES (1, 7, 30, {now}), (2, 7, 12, {now}), (3, 8, 99, {now}), \
         (4, 7, 500, '2001-01-01 00:00:00')"
    ))
    .await;
    bed.store.ping().await.unwrap();
    assert_eq!(bed.row("kw_01234").await.month_cost, Some(42));
    assert_eq!(bed.row("kw_total").await.month_cost, None);
    bed.sql("DELETE FROM usage_tracking WHERE id < 4").await;
    assert_eq!(bed.row("kw_01234").await.month_cost, Some(0));

    bed.sql("DROP TABLE usage_tracking").await;
    assert_eq!(bed.row("kw_01234").await.month_cost, None, "a table that goes away is no failure");
    bed.sql("CREATE TABLE usage_tracking (id integer, who text, what text)").await;
    bed.store.ping().await.unwrap();
    assert_eq!(bed.row("kw_01234").await.month_cost, None, "nor is one with other columns");
}

async fn columns_that_appear_later_are_noticed(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.key(7, "kw_01234", &[("allowed_agents", "'[]'")]).await;
    assert_eq!(bed.row("kw_01234").await.allowed_agents.as_deref(), Some("[]"));
    bed.sql("ALTER TABLE api_keys DROP COLUMN allowed_agents").await;
    assert_eq!(bed.row("kw_01234").await.allowed_agents, None);
    bed.sql("ALTER TABLE api_keys ADD allowed_agents json").await;
    bed.sql("UPDATE api_keys SET allowed_agents = '[\"a\"]'").await;
    bed.store.ping().await.unwrap();
    assert_eq!(bed.row("kw_01234").await.allowed_agents.as_deref(), Some("[\"a\"]"));
}

async fn missing_tables_are_named_and_noticed_when_they_come(kind: &str) {
    let bed = Bed::bare(kind).await;
    assert!(matches!(bed.store.ping().await, Err(StoreError::MissingTables)));
    let error = bed.rows("kw_01234").await.unwrap_err();
    assert!(matches!(error, StoreError::MissingTables) && error.is_unavailable());
    assert!(error.to_string().contains("keyward migrate"));
    bed.store.migrate().await.unwrap();
    assert!(bed.ids("kw_01234").await.is_empty());
    bed.sql("DROP TABLE api_keys").await;
    assert!(matches!(bed.rows("kw_01234").await, Err(StoreError::MissingTables)));
    bed.sql("CREATE TABLE api_keys (id integer, key_hash text)").await;
    assert!(matches!(bed.rows("kw_01234").await, Err(StoreError::Schema(_))));
    bed.sql("DROP TABLE api_keys").await;
    bed.store.migrate().await.unwrap();
    bed.store.ping().await.unwrap();
}

async fn migrating_again_changes_nothing(kind: &str) {
    let bed = Bed::bare(kind).await;
    bed.sql(
        "CREATE TABLE users (id integer PRIMARY KEY, shoe_size integer, role text); \
         CREATE TABLE api_keys (id integer PRIMARY KEY, key_hash text, key_prefix text, user_id integer, x text); \
         CREATE INDEX mine ON api_keys (key_prefix); \
         INSERT INTO users VALUES (3, 44, 'user'); INSERT INTO api_keys VALUES (7, 'h', 'kw_01234', 3, 'kept')",
    )
    .await;
    bed.store.migrate().await.unwrap();
    bed.store.migrate().await.unwrap();
    assert_eq!(bed.ids("kw_01234").await, [7]);
    // Fails where a column is gone.
    bed.sql("UPDATE users SET shoe_size = 45; UPDATE api_keys SET x = 'kept too'").await;
    if let Raw::Postgres(client) = &bed.raw {
        let sql = "SELECT indexname::text FROM pg_indexes WHERE tablename = 'api_keys' ORDER BY 1";
        let indexes: Vec<String> =
            client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
        assert_eq!(indexes, ["api_keys_pkey", "ix_api_keys_user_id", "mine"]);
    }
}

async fn last_use_only_moves_forward(kind: &str) {
    let bed = Bed::new(kind).await;
    bed.key(1, "kw_1", &[]).await;
    bed.key(2, "kw_2", &[]).await;
    let at = Timestamp::from_microseconds;
    let last = async |id| bed.store.key(KeyId::new(id)).await.unwrap().last_used_at;
    let later = 1_700_000_000_123_456;
    bed.store
        .record_uses(&[(KeyId::new(1), at(5)), (KeyId::new(1), at(later)), (KeyId::new(9), at(1))])
        .await
        .unwrap();
    assert_eq!((last(1).await, last(2).await), (Some(at(later)), None));
    bed.store.record_uses(&[(KeyId::new(1), at(later - 1)), (KeyId::new(2), at(0))]).await.unwrap();
    assert_eq!((last(1).await, last(2).await), (Some(at(later)), Some(at(0))));
    bed.store.record_uses(&[]).await.unwrap();
}

async fn prefixes_of_keys_and_users(kind: &str) {
    let bed = Bed::new(kind).await;
    for (id, prefix) in [(1, "kw_a"), (2, "kw_b"), (3, "kw_a")] {
        bed.key(id, prefix, &[]).await;
    }
    let prefixes = async |selector: KeySelector| {
        let mut found = bed.store.prefixes(&selector).await.unwrap();
        found.sort();
        found
    };
    let of = |names: &[&str]| names.iter().map(|name| KeyPrefix::new(name).unwrap()).collect::<Vec<_>>();
    assert_eq!(prefixes(KeySelector::User(UserId::new(3))).await, of(&["kw_a", "kw_b"]));
    assert_eq!(prefixes(KeySelector::Key(KeyId::new(2))).await, of(&["kw_b"]));
    assert_eq!(prefixes(KeySelector::Key(KeyId::new(9))).await, of(&[]));
    assert_eq!(prefixes(KeySelector::Prefix(KeyPrefix::new("x").unwrap())).await, of(&["x"]));
}

/// The server runs its checks on tasks of their own.
#[tokio::test]
async fn every_call_may_run_on_any_thread() {
    let bed = Bed::new("sqlite").await;
    let store = bed.store.clone();
    tokio::spawn(async move {
        store.ping().await.unwrap();
        store.prefixes(&KeySelector::Key(KeyId::new(1))).await.unwrap();
        store.record_uses(&[(KeyId::new(1), Timestamp::from_microseconds(0))]).await.unwrap();
        store.candidates(&KeyPrefix::new("x").unwrap()).await.unwrap();
        store.migrate().await.unwrap();
        store.list_users().await.unwrap();
        store.list_keys(&KeyFilter::default()).await.unwrap();
        let user = store.create_user(&new_user("bo")).await.unwrap();
        store.set_user_active(&UserRef::Id(user.id), true).await.unwrap();
        let key = store.create_key(&new_key(UserRef::Id(user.id), HASH)).await.unwrap();
        store.set_key_active(key.id, false).await.unwrap();
    })
    .await
    .unwrap();
}
