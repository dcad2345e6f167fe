//! The change feed of Postgres: whoever writes, by whatever statement, every Keyward is told, and the writer is never
//! refused.

use std::future::poll_fn;

use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::{AsyncMessage, Client, NoTls};

use crate::stores::open;
use crate::support::PATIENCE;
use crate::support::postgres::Postgres;

/// What a message says has changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    /// A key, by its prefixes.
    Key(Vec<String>),
    /// A user.
    User(i64),
    /// Anything.
    Flush,
}

fn key(prefix: &str) -> Told {
    Told::Key(vec![prefix.to_owned()])
}

fn told(payload: &str) -> Told {
    let message: Value = serde_json::from_str(payload).unwrap();
    assert_eq!(message["v"], 1, "{payload}");
    assert!(message["x"].as_str().unwrap().parse::<u64>().is_ok(), "{payload}");
    if message.get("flush").is_some() {
        assert_eq!(message["flush"], true, "{payload}");
        return Told::Flush;
    }
    let prefixes: Vec<String> = serde_json::from_value(message["p"].clone()).unwrap();
    if let Some(user) = message["u"].as_i64() {
        assert!(prefixes.is_empty(), "{payload}");
        return Told::User(user);
    }
    assert!(message["u"].is_null(), "{payload}");
    Told::Key(prefixes)
}

/// A migrated database, a writer, and someone who listens.
struct Bed {
    server: Postgres,
    writer: Client,
    other: Client,
    heard: UnboundedReceiver<String>,
    markers: usize,
    _listener: Client,
}

impl Bed {
    /// With user 3, and key 7 `kw_01234` of theirs.
    async fn new() -> Self {
        let server = Postgres::start().await;
        server.create_database("platform").await;
        open(&server.url("platform")).await.migrate().await.unwrap();
        let (listener, mut connection) =
            tokio_postgres::connect(&server.url("platform"), NoTls).await.unwrap();
        let (sender, heard) = unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notification(notification) = message
                    && sender.send(notification.payload().to_owned()).is_err()
                {
                    return;
                }
            }
        });
        listener.batch_execute("LISTEN keyward_changes").await.unwrap();
        let writer = server.client("platform").await;
        let other = server.client("platform").await;
        let mut bed = Self { server, writer, other, heard, markers: 0, _listener: listener };
        bed.start_over().await;
        bed
    }

    /// The rows of a new bed.
    async fn start_over(&mut self) {
        self.write(
            "TRUNCATE api_keys, users, keyward_old_secrets; \
             INSERT INTO keyward_old_secrets (key_id, key_hash, key_prefix, current_hash, rotated_at, expires_at) \
             VALUES (7, 'o', 'kw_01234', 'h', now(), now()); \
             INSERT INTO users (id, email, username, hashed_password) VALUES (3, 'a', 'ada', '!'); \
             INSERT INTO api_keys (id, key_hash, key_prefix, user_id) VALUES (7, 'h', 'kw_01234', 3)",
        )
        .await;
        self.payloads().await;
    }

    async fn write(&self, sql: &str) {
        self.writer.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// Every message since the last call. Messages arrive in the order of commits: what is not there when the marker
    /// is was not sent.
    async fn payloads(&mut self) -> Vec<String> {
        self.markers += 1;
        let marker = format!("marker {}", self.markers);
        self.other.batch_execute(&format!("NOTIFY keyward_changes, '{marker}'")).await.unwrap();
        let mut payloads = Vec::new();
        loop {
            let next = tokio::time::timeout(PATIENCE, self.heard.recv()).await;
            let payload = next.expect("the marker arrives").expect("the listener listens");
            if payload == marker {
                return payloads;
            }
            payloads.push(payload);
        }
    }

    /// What they say, sorted.
    async fn settled(&mut self) -> Vec<Told> {
        let mut all: Vec<Told> = self.payloads().await.iter().map(|payload| told(payload)).collect();
        all.sort();
        all
    }

    /// What is heard of this.
    async fn after(&mut self, sql: &str) -> Vec<Told> {
        self.write(sql).await;
        self.settled().await
    }
}

/// Every column that decides, with what is heard of its change.
fn changes_of_columns() -> Vec<(String, Vec<Told>)> {
    let this = || vec![key("kw_01234")];
    let mut cases: Vec<(String, Vec<Told>)> = [
        "key_hash = 'i'",
        "user_id = NULL",
        "id = 8",
        "name = 'n'",
        "is_active = false",
        "is_active = NULL",
        "expires_at = now()",
        "is_unlimited = true",
        "budget_limit_cents = 1",
        "budget_type = 'monthly'",
        "rate_limit_per_minute = 1",
        "rate_limit_per_hour = 1",
        "rate_limit_per_day = 1",
        // With columns that count traffic, as an ORM writes them.
        "is_active = false, updated_at = now(), total_requests = 5",
    ]
    .iter()
    .map(|change| (format!("UPDATE api_keys SET {change}"), this()))
    .collect();
    for list in [
        "permissions",
        "scopes",
        "allowed_models",
        "allowed_endpoints",
        "allowed_ips",
        "allowed_chatbots",
        "allowed_agents",
    ] {
        // From NULL; and NULL is not JSON's null.
        for value in ["[]", "null", "[\"a\"]"] {
            cases.push((format!("UPDATE api_keys SET {list} = '{value}'"), this()));
        }
    }
    for change in [
        "username = 'b'",
        "email = 'b'",
        "is_active = false",
        "is_superuser = true",
        "role = 'admin'",
        "account_locked = true",
        "account_locked_until = now()",
    ] {
        cases.push((format!("UPDATE users SET {change}"), vec![Told::User(3)]));
    }
    cases
}

/// Every kind of statement, with what is heard of it.
fn statements() -> Vec<(&'static str, Vec<Told>)> {
    let this = || vec![key("kw_01234")];
    let both = || Told::Key(vec!["kw_01234".to_owned(), "kw_other".to_owned()]);
    vec![
        ("UPDATE api_keys SET key_prefix = 'kw_other'", vec![both()]),
        ("UPDATE api_keys SET key_prefix = NULL", this()),
        ("DELETE FROM api_keys", this()),
        ("INSERT INTO api_keys (id, key_prefix) VALUES (8, 'kw_other')", vec![key("kw_other")]),
        ("UPDATE api_keys SET is_active = false FROM users WHERE users.id = user_id", this()),
        (
            "WITH gone AS (UPDATE api_keys SET is_active = false RETURNING id) SELECT count(*) FROM gone",
            this(),
        ),
        ("INSERT INTO api_keys (id) VALUES (7) ON CONFLICT (id) DO UPDATE SET is_active = false", this()),
        (
            "COPY api_keys (id, key_prefix) FROM PROGRAM 'echo 8,kw_other' WITH (FORMAT csv)",
            vec![key("kw_other")],
        ),
        ("UPDATE keyward_old_secrets SET expires_at = expires_at - interval '1 day'", this()),
        ("UPDATE keyward_old_secrets SET rotated_at = rotated_at - interval '1 day'", vec![]),
        ("DELETE FROM keyward_old_secrets", this()),
        (
            "INSERT INTO keyward_old_secrets (key_id, key_hash, key_prefix, current_hash, rotated_at, expires_at) \
             SELECT key_id, 'p', key_prefix, current_hash, rotated_at, expires_at FROM keyward_old_secrets",
            this(),
        ),
        ("TRUNCATE keyward_old_secrets", vec![Told::Flush]),
        ("TRUNCATE api_keys", vec![Told::Flush]),
        ("TRUNCATE users CASCADE", vec![Told::Flush]),
        ("DELETE FROM api_keys; DELETE FROM users", vec![key("kw_01234"), Told::User(3)]),
        (
            "DELETE FROM api_keys; UPDATE users SET id = 4",
            vec![key("kw_01234"), Told::User(3), Told::User(4)],
        ),
        (
            "ALTER TABLE api_keys DROP CONSTRAINT api_keys_user_id_fkey, \
             ADD FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE; DELETE FROM users",
            vec![key("kw_01234"), Told::User(3)],
        ),
        (
            "CREATE FUNCTION lock_out() RETURNS trigger LANGUAGE plpgsql \
             AS 'BEGIN NEW.is_active := false; RETURN NEW; END'; \
             CREATE TRIGGER lock_out BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION lock_out(); \
             UPDATE api_keys SET total_requests = 1; DROP FUNCTION lock_out CASCADE",
            this(),
        ),
    ]
}

/// A revocation that is not announced lives on in every cache.
#[tokio::test]
async fn every_form_of_revocation_is_announced_with_its_prefixes() {
    let mut bed = Bed::new().await;
    let mut cases = changes_of_columns();
    cases.extend(statements().into_iter().map(|(sql, expected)| (sql.to_owned(), expected)));
    let version: i32 = bed
        .other
        .query_one("SELECT current_setting('server_version_num')::integer", &[])
        .await
        .unwrap()
        .get(0);
    if version >= 150_000 {
        let merge = "MERGE INTO api_keys k USING (VALUES (7)) AS gone (id) ON k.id = gone.id \
                     WHEN MATCHED THEN UPDATE SET is_active = false";
        cases.push((merge.to_owned(), vec![key("kw_01234")]));
    }
    for (sql, expected) in cases {
        bed.start_over().await;
        assert_eq!(bed.after(&sql).await, expected, "{sql}");
    }
}

#[tokio::test]
async fn a_message_names_the_transaction_and_has_a_fixed_form() {
    let mut bed = Bed::new().await;
    bed.write("BEGIN").await;
    let transaction: String = bed.writer.query_one("SELECT txid_current()::text", &[]).await.unwrap().get(0);
    bed.write("UPDATE api_keys SET is_active = false; UPDATE users SET is_active = false; COMMIT").await;
    bed.write("BEGIN").await;
    let second: String = bed.writer.query_one("SELECT txid_current()::text", &[]).await.unwrap().get(0);
    bed.write("TRUNCATE api_keys; COMMIT").await;
    let payloads: Vec<Value> =
        bed.payloads().await.iter().map(|payload| serde_json::from_str(payload).unwrap()).collect();
    assert_eq!(
        payloads,
        [
            serde_json::json!({ "v": 1, "x": transaction, "u": null, "p": ["kw_01234"] }),
            serde_json::json!({ "v": 1, "x": transaction, "u": 3, "p": [] }),
            serde_json::json!({ "v": 1, "x": second, "flush": true }),
        ]
    );
}

/// Every use of a key is counted: announcing it would empty every cache all the time.
#[tokio::test]
async fn traffic_columns_are_not_announced() {
    let mut bed = Bed::new().await;
    bed.write("ALTER TABLE api_keys ADD hits integer; ALTER TABLE users ADD theme json").await;
    for change in [
        "api_keys SET total_requests = total_requests + 1",
        "api_keys SET total_tokens = 9, total_cost = 9, last_used_at = now(), updated_at = now()",
        "api_keys SET total_cost = NULL",
        "api_keys SET description = 'd', tags = '[]', created_at = now()",
        "api_keys SET hits = 1",
        "api_keys SET is_active = is_active, scopes = scopes, allowed_models = allowed_models",
        "users SET last_login = now(), updated_at = now()",
        "users SET hashed_password = 'other', created_at = now()",
        "users SET theme = '{}'",
        "users SET is_active = is_active, role = role",
    ] {
        assert_eq!(bed.after(&format!("UPDATE {change}")).await, [], "{change}");
    }
    bed.write(
        "INSERT INTO api_keys (id, key_prefix) SELECT n, 'kw_' || n FROM generate_series(1001, 2000) n",
    )
    .await;
    bed.payloads().await;
    assert_eq!(bed.after("UPDATE api_keys SET total_requests = 5").await, []);
}

/// Logical replication applies changes in this role, in which ordinary triggers do not fire.
#[tokio::test]
async fn replica_role_is_announced() {
    let mut bed = Bed::new().await;
    bed.write("SET session_replication_role = replica").await;
    assert_eq!(bed.after("UPDATE api_keys SET is_active = false").await, [key("kw_01234")]);
    assert_eq!(bed.after("UPDATE users SET is_active = false").await, [Told::User(3)]);
    assert_eq!(bed.after("TRUNCATE api_keys").await, [Told::Flush]);
}

#[tokio::test]
async fn a_mass_change_is_one_flush() {
    let mut bed = Bed::new().await;
    bed.write(
        "INSERT INTO api_keys (id, key_prefix) SELECT n, 'kw_' || n FROM generate_series(1001, 11000) n",
    )
    .await;
    bed.payloads().await;
    for sql in [
        "UPDATE api_keys SET is_active = false WHERE id > 1000",
        "DO $$ BEGIN FOR i IN 1001..11000 LOOP UPDATE api_keys SET name = 'n' WHERE id = i; END LOOP; END $$",
        "DELETE FROM api_keys WHERE id > 1000",
    ] {
        let heard = bed.after(sql).await;
        assert_eq!(heard.len(), 101, "{sql}");
        assert_eq!(heard.iter().filter(|told| **told == Told::Flush).count(), 1, "{sql}");
    }
}

#[tokio::test]
async fn counting_starts_anew_in_each_transaction() {
    let mut bed = Bed::new().await;
    bed.write(
        "INSERT INTO api_keys (id, key_prefix) SELECT n, 'kw_' || n FROM generate_series(1001, 1200) n",
    )
    .await;
    bed.payloads().await;
    for round in 0..3 {
        let sql = format!("UPDATE api_keys SET name = '{round}' WHERE id BETWEEN 1001 AND 1100");
        let heard = bed.after(&sql).await;
        assert_eq!(heard.len(), 100);
        assert!(!heard.contains(&Told::Flush));
    }
    // What others put there counts for nothing.
    for setting in ["garbage", "1:99", ":::", ""] {
        bed.write(&format!("SET keyward.changes = '{setting}'")).await;
        let sql = format!("UPDATE api_keys SET name = 'after {setting}' WHERE id = 7");
        assert_eq!(bed.after(&sql).await, [key("kw_01234")], "{setting:?}");
    }
    let own = "BEGIN; DO $$ BEGIN PERFORM set_config('keyward.changes', txid_current() || ':-9x', true); END $$; \
               UPDATE api_keys SET name = 'last' WHERE id = 7; COMMIT";
    assert_eq!(bed.after(own).await, [key("kw_01234")]);
}

#[tokio::test]
async fn rolled_back_changes_and_savepoints_announce_nothing_wrong() {
    let mut bed = Bed::new().await;
    bed.write(
        "INSERT INTO api_keys (id, key_prefix) SELECT n, 'kw_' || n FROM generate_series(1001, 2000) n; \
         INSERT INTO api_keys (id, key_prefix) VALUES (8, 'kw_other')",
    )
    .await;
    bed.payloads().await;
    assert_eq!(bed.after("BEGIN; UPDATE api_keys SET is_active = false; ROLLBACK").await, []);
    let heard = bed
        .after(
            "BEGIN; UPDATE api_keys SET is_active = false WHERE id = 7; \
             SAVEPOINT s; UPDATE api_keys SET name = 'n' WHERE id > 1000; DELETE FROM api_keys; ROLLBACK TO s; \
             UPDATE api_keys SET is_active = false WHERE id = 8; COMMIT",
        )
        .await;
    assert_eq!(heard, [key("kw_01234"), key("kw_other")], "the undone changes were not counted either");
    let heard = bed.after("BEGIN; SAVEPOINT s; DELETE FROM api_keys WHERE id = 8; RELEASE s; COMMIT").await;
    assert_eq!(heard, [key("kw_other")]);
    // The undone statement of a transaction that failed.
    let failed = bed.writer.batch_execute("UPDATE api_keys SET name = 'm'; SELECT 1 / 0").await;
    assert!(failed.is_err());
    assert_eq!(bed.settled().await, []);
}

/// The tables are the platform's, whose migrations know nothing of the feed.
#[tokio::test]
async fn columns_may_come_and_go_after_the_migration() {
    let mut bed = Bed::new().await;
    // The session has planned both paths before anything changes.
    bed.write("UPDATE api_keys SET total_cost = 1").await;
    assert_eq!(bed.after("UPDATE api_keys SET is_active = false").await, [key("kw_01234")]);
    bed.write(
        "ALTER TABLE api_keys ALTER id TYPE bigint, ALTER key_prefix TYPE char(12), \
         ALTER total_cost TYPE numeric(20, 4), ALTER allowed_models TYPE jsonb USING '[]', \
         DROP COLUMN scopes, ADD scopes text[], DROP COLUMN allowed_agents, DROP COLUMN total_tokens, \
         ADD note text; \
         CREATE TYPE grade AS ENUM ('user', 'admin'); \
         ALTER TABLE users ALTER role DROP DEFAULT, ALTER role TYPE grade USING role::grade, \
         ALTER id TYPE bigint, ADD role_id integer, DROP COLUMN last_login",
    )
    .await;
    bed.payloads().await;
    let fresh = bed.server.client("platform").await;
    for round in 0..2 {
        for (change, expected) in [
            ("api_keys SET total_cost = coalesce(total_cost, 0) + 1", vec![]),
            ("api_keys SET note = 'n'", vec![]),
            ("api_keys SET scopes = array_append(scopes, 'chat')", vec![key("kw_01234")]),
            ("api_keys SET allowed_models = allowed_models || '[1]'", vec![key("kw_01234")]),
            ("api_keys SET is_active = NOT is_active", vec![key("kw_01234")]),
            ("users SET updated_at = now()", vec![]),
            ("users SET role_id = coalesce(role_id, 0) + 1", vec![Told::User(3)]),
            ("users SET is_superuser = NOT is_superuser", vec![Told::User(3)]),
        ] {
            // A session that knew the old columns, then a new one.
            let session = if round == 0 { &bed.writer } else { &fresh };
            session.batch_execute(&format!("UPDATE {change}")).await.unwrap();
            assert_eq!(bed.settled().await, expected, "{change}, round {round}");
        }
    }
    assert_eq!(bed.after("UPDATE users SET role = 'admin'").await, [Told::User(3)]);
    assert_eq!(bed.after("DELETE FROM api_keys").await, [key("kw_01234")]);
    bed.write("ALTER TABLE api_keys DROP COLUMN is_active CASCADE, DROP COLUMN expires_at").await;
    let insert = "INSERT INTO api_keys (id, key_prefix) VALUES (9, 'kw_other')";
    assert_eq!(bed.after(insert).await, [key("kw_other")]);
}

/// Postgres stores this escape in a json column, and fails to read the column's parts.
#[tokio::test]
async fn json_with_nul_escape_is_compared() {
    let mut bed = Bed::new().await;
    for value in [r#"["\u0000"]"#, r#"["\u0000", "\ud800"]"#] {
        let sql = format!("UPDATE api_keys SET allowed_models = '{value}'");
        assert_eq!(bed.after(&sql).await, [key("kw_01234")], "{value}");
        assert_eq!(bed.after(&sql).await, [], "the same again");
        assert_eq!(bed.after("UPDATE api_keys SET total_requests = total_requests + 1").await, []);
        assert_eq!(bed.after("UPDATE api_keys SET description = 'd'").await, []);
    }
}

#[tokio::test]
async fn a_prefix_too_long_for_a_message_flushes() {
    let mut bed = Bed::new().await;
    bed.write("ALTER TABLE api_keys ALTER key_prefix TYPE text").await;
    let longest = "x".repeat(128);
    let both = Told::Key(vec!["kw_01234".to_owned(), longest.clone()]);
    assert_eq!(bed.after(&format!("UPDATE api_keys SET key_prefix = '{longest}'")).await, [both]);
    for prefix in ["repeat('x', 129)", "repeat('x', 100000)", "'pr\u{e9}fixe'"] {
        let sql = format!("UPDATE api_keys SET key_prefix = {prefix}");
        assert_eq!(bed.after(&sql).await, [Told::Flush], "{prefix}");
        assert_eq!(
            bed.after("UPDATE api_keys SET is_active = NOT is_active").await,
            [Told::Flush],
            "{prefix}"
        );
    }
    // What JSON and SQL have to quote.
    bed.write(r#"UPDATE api_keys SET key_prefix = 'a"b\c''d'"#).await;
    bed.payloads().await;
    assert_eq!(bed.after("DELETE FROM api_keys").await, [key(r#"a"b\c'd"#)]);
}

/// The platform's own role, in a database whose owner took rights away.
#[tokio::test]
async fn a_writer_without_rights_on_notify_still_writes_and_announces() {
    let mut bed = Bed::new().await;
    bed.write(
        "REVOKE EXECUTE ON FUNCTION pg_notify(text, text) FROM PUBLIC; \
         CREATE ROLE writer; GRANT UPDATE ON api_keys TO writer",
    )
    .await;
    bed.write("SET ROLE writer").await;
    assert_eq!(bed.after("UPDATE api_keys SET is_active = false").await, [key("kw_01234")]);
    bed.write("RESET ROLE").await;
    // Without a function that the message is made with, there is still the flush.
    bed.write("REVOKE EXECUTE ON FUNCTION set_config(text, text, boolean) FROM PUBLIC").await;
    bed.write("REVOKE EXECUTE ON FUNCTION txid_current() FROM PUBLIC").await;
    bed.write("SET ROLE writer").await;
    assert_eq!(bed.after("UPDATE api_keys SET is_active = true").await, [Told::Flush]);
    bed.write("RESET ROLE").await;
    let active: bool =
        bed.other.query_one("SELECT is_active FROM api_keys WHERE id = 7", &[]).await.unwrap().get(0);
    assert!(active, "it was written");
}

/// Whoever owns the table would otherwise run code as whoever migrated.
#[tokio::test]
async fn the_function_lends_nobody_its_owners_rights() {
    let bed = Bed::new().await;
    let definer: bool = bed
        .other
        .query_one("SELECT prosecdef FROM pg_proc WHERE oid = 'keyward_notify_v1()'::regprocedure", &[])
        .await
        .unwrap()
        .get(0);
    assert!(!definer);
}

async fn catalogue_rows(client: &Client) -> Vec<String> {
    let rows = client
        .query(
            "SELECT format('%s %s %s %s', tgrelid::regclass, tgname, tgenabled, xmin) FROM pg_trigger \
             WHERE tgname LIKE 'keyward%' \
             UNION ALL SELECT format('%s %s', oid, xmin) FROM pg_proc WHERE proname LIKE 'keyward%' \
             ORDER BY 1",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn migrating_again_leaves_the_triggers_as_they_are() {
    let mut bed = Bed::new().await;
    let before = catalogue_rows(&bed.other).await;
    assert_eq!(before.len(), 7, "a function, and two triggers on each table");
    let store = open(&bed.server.url("platform")).await;
    store.migrate().await.unwrap();
    assert_eq!(catalogue_rows(&bed.other).await, before);

    // What someone switched off or dropped comes back.
    bed.write(
        "ALTER TABLE api_keys ENABLE TRIGGER keyward_changes; ALTER TABLE users DISABLE TRIGGER ALL; \
         DROP TRIGGER keyward_truncate ON api_keys",
    )
    .await;
    store.migrate().await.unwrap();
    assert!(
        catalogue_rows(&bed.other)
            .await
            .iter()
            .filter(|row| row.contains("keyward_"))
            .all(|row| row.contains(" A "))
    );
    assert_eq!(catalogue_rows(&bed.other).await.len(), 7);
    bed.payloads().await;
    bed.write("SET session_replication_role = replica").await;
    assert_eq!(bed.after("UPDATE api_keys SET is_active = false").await, [key("kw_01234")]);
    assert_eq!(bed.after("UPDATE users SET is_active = false").await, [Told::User(3)]);
    assert_eq!(bed.after("TRUNCATE api_keys").await, [Told::Flush]);
}
