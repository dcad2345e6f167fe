//! What only Postgres can do to us: time zones, roles, locks, standbys, servers that stop, freeze and come back.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use keyward::domain::key::KeyPrefix;
use keyward::domain::record::KeyId;
use keyward::domain::time::Timestamp;
use keyward::store::{Store, StoreError};
use tokio_postgres::Client;

use crate::stores::{open, open_with};
use crate::support::postgres::Postgres;

/// A server with our tables, an active key 7 `kw_01234` of user 3, and a session of the superuser.
async fn server_with_a_key() -> (Postgres, Client) {
    let server = Postgres::start().await;
    server.create_database("keys").await;
    open(&server.url("keys")).await.migrate().await.unwrap();
    let client = server.client("keys").await;
    client
        .batch_execute(
            "INSERT INTO users (id, email, username, hashed_password) VALUES (3, 'a', 'ada', '!'); \
             INSERT INTO api_keys (id, key_hash, key_prefix, user_id) VALUES (7, 'h', 'kw_01234', 3)",
        )
        .await
        .unwrap();
    (server, client)
}

async fn ids(store: &Store) -> Result<Vec<i64>, StoreError> {
    let rows = store.candidates(&KeyPrefix::new("kw_01234").unwrap()).await?.rows;
    Ok(rows.iter().map(|row| row.key_id).collect())
}

/// What the lookup finds once the store answers again; bounded.
async fn eventually(store: &Store) -> Vec<i64> {
    for _ in 0..500 {
        if let Ok(ids) = ids(store).await {
            return ids;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it did not come back: {:?}", ids(store).await);
}

/// An expiry that moved with a time zone would let an expired key live for hours.
#[tokio::test]
async fn time_zones_of_roles_and_columns_do_not_move_expiry() {
    let (server, client) = server_with_a_key().await;
    for zone in ["America/New_York", "Asia/Kolkata"] {
        client
            .batch_execute(&format!(
                "ALTER ROLE postgres SET timezone = '{zone}'; ALTER DATABASE keys SET timezone = '{zone}'; \
                 ALTER TABLE api_keys ALTER expires_at TYPE timestamp; \
                 UPDATE api_keys SET expires_at = '2023-11-14 22:13:20.000001', last_used_at = NULL"
            ))
            .await
            .unwrap();
        let store = open(&server.url("keys")).await;
        let prefix = KeyPrefix::new("kw_01234").unwrap();
        let expires = async || store.candidates(&prefix).await.unwrap().rows[0].expires_at;
        assert_eq!(expires().await, Some(1_700_000_000_000_001));
        let at = Timestamp::from_microseconds(1_700_000_000_000_001);
        store.record_uses(&[(KeyId::new(7), at)]).await.unwrap();
        assert_eq!(store.key(KeyId::new(7)).await.unwrap().last_used_at, Some(at));

        client
            .batch_execute(
                "SET timezone = 'UTC'; ALTER TABLE api_keys ALTER expires_at TYPE timestamptz, \
                 ALTER last_used_at TYPE timestamptz",
            )
            .await
            .unwrap();
        assert_eq!(expires().await, Some(1_700_000_000_000_001), "with a zone of its own");
        store.ping().await.unwrap();
        let later = Timestamp::from_microseconds(1_700_000_000_000_002);
        store.record_uses(&[(KeyId::new(7), later)]).await.unwrap();
        assert_eq!(store.key(KeyId::new(7)).await.unwrap().last_used_at, Some(later));
        client.batch_execute("ALTER TABLE api_keys ALTER last_used_at TYPE timestamp").await.unwrap();
    }
}

#[tokio::test]
async fn dates_beyond_all_reason_are_far_future_or_past() {
    let (server, client) = server_with_a_key().await;
    let store = open(&server.url("keys")).await;
    for (date, far) in [("294276-12-31 23:59:59", true), ("4713-01-01 00:00:00 BC", false)] {
        client.execute(&format!("UPDATE api_keys SET expires_at = '{date}'"), &[]).await.unwrap();
        let rows = store.candidates(&KeyPrefix::new("kw_01234").unwrap()).await.unwrap().rows;
        let year_9999 = 253_402_300_799_999_999;
        assert!(rows[0].expires_at.is_some_and(|at| if far { at > year_9999 } else { at < -year_9999 / 2 }));
    }
}

/// Types that the platform's other databases have, and types that can't be what they should.
#[tokio::test]
async fn column_types_are_read_for_what_they_are() {
    let (server, client) = server_with_a_key().await;
    let store = open(&server.url("keys")).await;
    client
        .batch_execute(
            "ALTER TABLE api_keys ALTER key_prefix TYPE char(12), ALTER id TYPE bigint, \
             ALTER allowed_models TYPE jsonb USING allowed_models::jsonb, \
             ALTER total_cost TYPE numeric(20,4), ALTER rate_limit_per_day TYPE smallint, \
             DROP COLUMN scopes, ADD scopes text[]; \
             CREATE TYPE grade AS ENUM ('user', 'admin'); \
             ALTER TABLE users ALTER role DROP DEFAULT, ALTER role TYPE grade USING role::grade; \
             UPDATE api_keys SET allowed_models = '[\"m\"]', total_cost = 12.6, scopes = '{chat,b}'",
        )
        .await
        .unwrap();
    store.ping().await.unwrap();
    let rows = store.candidates(&KeyPrefix::new("kw_01234").unwrap()).await.unwrap().rows;
    assert_eq!(rows[0].allowed_models.as_deref(), Some("[\"m\"]"));
    assert_eq!(rows[0].scopes.as_deref(), Some("[\"chat\",\"b\"]"));
    assert_eq!((rows[0].total_cost, rows[0].role.as_deref()), (Some(13), Some("user")));
    client.batch_execute("UPDATE api_keys SET total_cost = 'NaN'").await.unwrap();
    assert!(
        store.candidates(&KeyPrefix::new("kw_01234").unwrap()).await.unwrap().rows[0].total_cost
            > Some(1 << 60)
    );

    client.batch_execute("ALTER TABLE api_keys ALTER is_active TYPE text").await.unwrap();
    let error = ids(&store).await.unwrap_err();
    assert!(matches!(&error, StoreError::Schema(what) if what.contains("is_active")), "{error}");
    assert!(error.is_unavailable());
}

/// K6: a stolen sidecar must not be able to write.
#[tokio::test]
async fn select_rights_alone_are_enough_and_writes_are_refused() {
    let (server, client) = server_with_a_key().await;
    client
        .batch_execute("CREATE ROLE reader LOGIN; GRANT SELECT ON api_keys, users TO reader")
        .await
        .unwrap();
    // A table that may not be read is not used.
    client
        .batch_execute("CREATE TABLE usage_tracking (key_id integer, cost integer, date date)")
        .await
        .unwrap();
    let store = open(&server.url_as("reader", "keys")).await;
    store.ping().await.unwrap();
    assert_eq!(ids(&store).await.unwrap(), [7]);
    let uses = [(KeyId::new(7), Timestamp::from_microseconds(0))];
    assert!(matches!(store.record_uses(&uses).await, Err(StoreError::Refused(_))));
    let refused = store.set_key_active(KeyId::new(7), false).await.unwrap_err().to_string();
    assert!(refused.contains("permission denied for table api_keys; grant it to this role"), "{refused}");

    client
        .batch_execute("GRANT ALL ON api_keys, users TO reader; ALTER ROLE reader SET default_transaction_read_only = on")
        .await
        .unwrap();
    let store = open(&server.url_as("reader", "keys")).await;
    assert_eq!(ids(&store).await.unwrap(), [7]);
    assert!(matches!(store.record_uses(&uses).await, Err(StoreError::Refused(_))));

    // A restriction that may not be read is an error, not NULL.
    client
        .batch_execute("REVOKE ALL ON users FROM reader; GRANT SELECT (id) ON users TO reader")
        .await
        .unwrap();
    let error = open(&server.url_as("reader", "keys")).await.ping().await.unwrap_err();
    assert!(matches!(error, StoreError::Refused(_)), "{error}");
}

#[tokio::test]
async fn a_locked_table_costs_the_query_timeout_and_no_more() {
    let (server, mut client) = server_with_a_key().await;
    let store = open_with(&server.url("keys"), Duration::from_millis(150)).await;
    eventually(&store).await;
    let lock = client.transaction().await.unwrap();
    lock.batch_execute("LOCK TABLE api_keys").await.unwrap();
    let mut waiting = Vec::new();
    // More than there are sessions.
    for _ in 0..12 {
        let store = store.clone();
        waiting.push(tokio::spawn(tokio::time::timeout(
            Duration::from_secs(2),
            async move { ids(&store).await },
        )));
    }
    for one in waiting {
        let answer = one.await.unwrap().expect("answered in time");
        assert!(matches!(answer, Err(StoreError::Timeout)), "{answer:?}");
    }
    lock.rollback().await.unwrap();
    assert_eq!(eventually(&store).await, [7]);
}

#[tokio::test]
async fn a_row_lock_holds_nobody_up_and_last_use_is_skipped() {
    let (server, mut client) = server_with_a_key().await;
    let store = open(&server.url("keys")).await;
    let lock = client.transaction().await.unwrap();
    lock.batch_execute("UPDATE api_keys SET name = 'x'").await.unwrap();
    store.record_uses(&[(KeyId::new(7), Timestamp::from_microseconds(0))]).await.unwrap();
    assert_eq!(ids(&store).await.unwrap(), [7]);
    lock.rollback().await.unwrap();
    assert_eq!(store.key(KeyId::new(7)).await.unwrap().last_used_at, None);
}

#[tokio::test]
async fn a_server_that_is_down_is_unavailable_and_comes_back() {
    let (mut server, _client) = server_with_a_key().await;
    let store = open_with(&server.url("keys"), Duration::from_millis(500)).await;
    assert_eq!(eventually(&store).await, [7]);
    for end in [Postgres::stop, Postgres::kill] {
        end(&mut server);
        let error = ids(&store).await.unwrap_err();
        assert!(error.is_unavailable(), "{error}");
        // The session that was cut off has been thrown away; from here on there is nobody to connect to.
        let error = ids(&store).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert!(store.ping().await.is_err());
        let unopened = open(&server.url("keys")).await;
        assert!(matches!(ids(&unopened).await, Err(StoreError::Unavailable(_))));
        server.start_again().await;
        assert_eq!(eventually(&store).await, [7]);
    }
}

#[tokio::test]
async fn a_frozen_server_times_out_and_comes_back() {
    let (server, _client) = server_with_a_key().await;
    let store = open_with(&server.url("keys"), Duration::from_millis(200)).await;
    eventually(&store).await;
    server.freeze();
    for _ in 0..8 {
        let answer = tokio::time::timeout(Duration::from_secs(2), ids(&store)).await.expect("in time");
        assert!(answer.as_ref().is_err_and(StoreError::is_unavailable), "{answer:?}");
    }
    server.resume();
    assert_eq!(eventually(&store).await, [7]);
}

/// A standby answers with what was true some time ago.
#[tokio::test]
async fn a_standby_is_refused_and_passed_over() {
    let (primary, _client) = server_with_a_key().await;
    let standby = Postgres::start_standby().await;
    let store = open(&standby.url("postgres")).await;
    assert!(matches!(ids(&store).await, Err(StoreError::NotPrimary)));
    let hosts = format!("127.0.0.1:{},127.0.0.1:{}", standby.port(), primary.port());
    let both = open(&format!("postgres://postgres@{hosts}/keys")).await;
    // The standby has no such database, which must not end the search either.
    assert_eq!(ids(&both).await.unwrap(), [7]);
    let alone =
        open(&format!("postgres://postgres@127.0.0.1:{0},127.0.0.1:{0}/postgres", standby.port())).await;
    assert!(matches!(ids(&alone).await, Err(StoreError::NotPrimary)));
}

/// Without it each lookup walks the table.
#[tokio::test]
async fn the_lookup_is_one_statement_that_uses_the_index() {
    let (server, client) = server_with_a_key().await;
    client
        .batch_execute(
            "INSERT INTO api_keys (id, key_hash, key_prefix, user_id) \
             SELECT n, 'h' || n, CASE WHEN n % 3 = 0 THEN 'kw_same' ELSE 'p' || n END, 3 FROM generate_series(100, 20000) n; \
             ANALYZE api_keys; SELECT pg_stat_reset()",
        )
        .await
        .unwrap();
    let store = open(&server.url("keys")).await;
    for _ in 0..20 {
        assert_eq!(ids(&store).await.unwrap(), [7]);
    }
    drop(store);
    let statistics = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'api_keys'";
    for _ in 0..500 {
        let row = client.query_one(statistics, &[]).await.unwrap();
        let (sequential, by_index): (i64, i64) = (row.get(0), row.get(1));
        assert_eq!(sequential, 0);
        if by_index >= 20 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the index was not used");
}

/// `require` keeps out listeners, `verify-ca` other authorities, `verify-full` other names.
#[tokio::test]
async fn tls_modes_verify_what_they_promise() {
    let (mut server, client) = server_with_a_key().await;
    let names = ["DNS:db.internal", "IP:127.0.0.1"];
    let directory = tempfile::tempdir().unwrap();
    let stranger = Authority::new(directory.path(), "stranger");
    let authority = Authority::new(directory.path(), "ours");
    let url = server.url("keys");
    let answer = async |query: String| ids(&open(&format!("{url}?{query}")).await).await;
    let encrypted = "SELECT count(*) FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) \
                     WHERE s.ssl AND a.application_name = 'keyward'";

    assert_eq!(answer("sslmode=prefer".into()).await.unwrap(), [7], "without TLS on the server");
    assert!(matches!(answer("sslmode=require".into()).await, Err(StoreError::Unavailable(_))));
    drop(client);

    for (name, full) in names.into_iter().zip([false, true]) {
        let (certificate, key) = authority.sign(name);
        server.stop();
        server.enable_tls(&certificate, &key);
        server.start_again().await;
        let root = authority.root.display();
        let other = stranger.root.display();

        assert_eq!(answer("sslmode=disable".into()).await.unwrap(), [7]);
        let store = open(&format!("{url}?sslmode=require")).await;
        assert_eq!(ids(&store).await.unwrap(), [7]);
        let count: i64 = server.client("keys").await.query_one(encrypted, &[]).await.unwrap().get(0);
        assert_eq!(count, 1, "the session is encrypted");
        assert_eq!(answer("sslmode=prefer".into()).await.unwrap(), [7]);

        assert_eq!(answer(format!("sslmode=verify-ca&sslrootcert={root}")).await.unwrap(), [7]);
        assert_eq!(answer(format!("sslmode=require&sslrootcert={root}")).await.unwrap(), [7]);
        let answered = answer(format!("sslmode=verify-full&sslrootcert={root}")).await;
        assert_eq!(answered.is_ok(), full, "{name}: {answered:?}");
        for mode in ["require", "verify-ca", "verify-full"] {
            let answered = answer(format!("sslmode={mode}&sslrootcert={other}")).await;
            assert!(matches!(answered, Err(StoreError::Unavailable(_))), "{mode}: {answered:?}");
        }
    }
}

struct Authority {
    directory: PathBuf,
    root: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(directory: &Path, name: &str) -> Self {
        let (root, key) = (directory.join(format!("{name}.pem")), directory.join(format!("{name}.key")));
        openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name} \
             -addext basicConstraints=critical,CA:TRUE -keyout {} -out {}",
            key.display(),
            root.display()
        ));
        Self { directory: directory.to_owned(), root, key }
    }

    /// A server's certificate for one name, and its key.
    fn sign(&self, name: &str) -> (PathBuf, PathBuf) {
        let (certificate, key) = (self.directory.join("server.pem"), self.directory.join("server.key"));
        openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=server \
             -addext subjectAltName={name} -addext basicConstraints=critical,CA:FALSE -CA {} -CAkey {} \
             -keyout {} -out {}",
            self.root.display(),
            self.key.display(),
            key.display(),
            certificate.display()
        ));
        (certificate, key)
    }
}

fn openssl(arguments: &str) {
    let output = Command::new("openssl").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
