//! The change feed through the running program: what takes effect by it, when there is none, and what an outage makes of
//! what is known.

use std::time::Duration;

use rusqlite::Connection;
use tokio::time::Instant;

use crate::support::eventually;
use crate::support::grpc::{Answer, Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Builder, Key, Keyward};
use crate::support::pgbouncer::PgBouncer;
use crate::support::postgres::Postgres;

/// The path that checks ask for.
const PATH: &str = "/v1/models";

async fn ask(keyward: &Keyward, secret: &str) -> Answer {
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    authorizer.check(Check::new("GET", PATH).bearer(secret).build(Encoding::Raw)).await
}

/// Waits until a check is answered so, and says how long that took.
async fn reason_becomes(keyward: &Keyward, secret: &str, reason: &str) -> Duration {
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let began = Instant::now();
    let answered = eventually(async || {
        let answer = authorizer.check(Check::new("GET", PATH).bearer(secret).build(Encoding::Raw)).await;
        let said = if answer.allows() { "ok" } else { answer.header("x-keyward-reason").unwrap_or("none") };
        (said == reason).then_some(())
    });
    assert!(answered.await.is_some(), "never {reason}: {:?}", ask(keyward, secret).await);
    began.elapsed()
}

async fn readyz(keyward: &Keyward) -> String {
    Request::get("/readyz").send(keyward.admin_addr()).await.text()
}

async fn ready_becomes(keyward: &Keyward, beginning: &str) {
    let said = eventually(async || readyz(keyward).await.starts_with(beginning).then_some(()));
    assert!(said.await.is_some(), "/readyz never says {beginning}: {}", readyz(keyward).await);
}

/// Waits for a heartbeat that was sent from now on: everything that was committed before it has been heard of.
async fn await_beat(keyward: &Keyward) {
    let since = Instant::now();
    let beaten = eventually(async || {
        let age = keyward.metric("keyward_lease_age_seconds", &[]).await;
        (age >= 0.0 && age < since.elapsed().as_secs_f64()).then_some(())
    });
    assert!(beaten.await.is_some(), "no heartbeat comes back");
}

/// Records live for an hour but for the feed, so that nothing else can make a change take effect.
fn patient(builder: Builder) -> Builder {
    builder.arg("--cache-record-ttl", "1h").arg("--cache-negative-ttl", "1h").arg("--lease", "1h")
}

async fn on_postgres(change: impl FnOnce(Builder) -> Builder) -> (Postgres, Keyward, Key) {
    let postgres = Postgres::start().await;
    let url = postgres.create_platform().await;
    let keyward = change(Keyward::new().store(&url)).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    (postgres, keyward, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_by_any_writer_takes_effect_on_a_running_sidecar() {
    let (postgres, keyward, key) = on_postgres(patient).await;
    assert_eq!(readyz(&keyward).await, "ready: change feed, lease 1h\n");
    let platform = postgres.client("platform").await;
    let rows = [
        ("UPDATE api_keys SET is_active = false", "key_inactive"),
        ("UPDATE api_keys SET is_active = true", "ok"),
        ("UPDATE users SET is_active = NULL", "user_inactive"),
        ("UPDATE users SET is_active = true", "ok"),
        ("UPDATE api_keys SET allowed_endpoints = '[\"/v1/other\"]'", "endpoint_not_allowed"),
        ("UPDATE api_keys SET allowed_endpoints = '[\"/v1/*\"]'", "ok"),
        ("UPDATE api_keys SET expires_at = '2001-01-01'", "key_expired"),
        ("UPDATE api_keys SET expires_at = NULL", "ok"),
        ("UPDATE api_keys SET key_prefix = 'kw_other'", "invalid_api_key"),
        ("UPDATE api_keys SET key_prefix = left(name, 0) || (SELECT prefix FROM kept)", "ok"),
        ("TRUNCATE api_keys", "invalid_api_key"),
    ];
    platform.batch_execute("CREATE TABLE kept AS SELECT key_prefix AS prefix FROM api_keys").await.unwrap();
    assert!(ask(&keyward, &key.secret).await.allows());
    for (sql, reason) in rows {
        platform.batch_execute(sql).await.unwrap();
        reason_becomes(&keyward, &key.secret, reason).await;
    }
}

/// What changes with the traffic must not empty the caches.
#[tokio::test(flavor = "multi_thread")]
async fn what_decides_nothing_is_not_announced() {
    let (postgres, keyward, key) = on_postgres(|builder| builder).await;
    assert!(ask(&keyward, &key.secret).await.allows());
    await_beat(&keyward).await;
    let changes = keyward.count("keyward_changes_total", &[]).await;
    let platform = postgres.client("platform").await;
    platform
        .batch_execute(
            "UPDATE api_keys SET last_used_at = now(), total_requests = 1, total_tokens = 2, total_cost = 3; \
             UPDATE users SET last_login = now(), updated_at = now(); UPDATE api_keys SET description = 'a'; \
             UPDATE api_keys SET name = 'a'",
        )
        .await
        .unwrap();
    await_beat(&keyward).await;
    assert_eq!(keyward.count("keyward_changes_total", &[]).await, changes + 1, "the name alone");
}

/// Somebody who was asked in vain for a key must not go on refusing it once it exists.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_is_good_although_its_prefix_was_known_to_be_absent() {
    let (postgres, keyward, key) = on_postgres(patient).await;
    let platform = postgres.client("platform").await;
    platform
        .batch_execute("CREATE TABLE kept AS SELECT * FROM api_keys; DELETE FROM api_keys")
        .await
        .unwrap();
    reason_becomes(&keyward, &key.secret, "invalid_api_key").await;
    platform.batch_execute("INSERT INTO api_keys SELECT * FROM kept").await.unwrap();
    reason_becomes(&keyward, &key.secret, "ok").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_triggers_it_says_so_and_finds_them_once_they_are_there() {
    let postgres = Postgres::start().await;
    let url = postgres.create_platform().await;
    let platform = postgres.client("platform").await;
    platform.batch_execute("ALTER TABLE users DISABLE TRIGGER keyward_changes").await.unwrap();
    let keyward = Keyward::new().store(&url).start().await;
    let said = readyz(&keyward).await;
    assert!(
        said.starts_with("ready: ttl mode, changes take effect within 5s") && said.contains("users"),
        "{said}"
    );
    assert!(keyward.metric("keyward_change_feed_up", &[]).await < 0.5);
    assert!(keyward.log().contains("ttl mode"), "{}", keyward.log());
    keyward.cli_ok(&["migrate"]);
    ready_becomes(&keyward, "ready: change feed").await;
    assert!(keyward.metric("keyward_change_feed_up", &[]).await > 0.5);
    // And it is noticed when one goes while it runs.
    platform.batch_execute("DROP TRIGGER keyward_changes ON api_keys").await.unwrap();
    ready_becomes(&keyward, "ready: ttl mode").await;
}

/// It would hand our notifications to whoever uses the session next, and let our own echo come back all the same.
#[tokio::test(flavor = "multi_thread")]
async fn behind_a_pooler_that_shares_sessions_it_works_without_the_feed_and_says_so() {
    let postgres = Postgres::start().await;
    postgres.create_platform().await;
    let pooler = PgBouncer::start(&postgres, "platform");
    let keyward = Keyward::new().store(&pooler.url("platform")).start().await;
    let said = readyz(&keyward).await;
    assert!(said.starts_with("ready: ttl mode") && said.contains("pooler"), "{said}");
}

/// A failover: sessions on the standby are refused, and its promotion is another history.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_is_followed_and_nothing_from_before_is_used() {
    let (mut postgres, keyward, key) = on_postgres(|builder| builder.arg("--outage-grace", "1h")).await;
    assert!(ask(&keyward, &key.secret).await.allows());
    postgres.stop();
    postgres.demote();
    postgres.start_again().await;
    let refused = eventually(async || keyward.log().contains("standby").then_some(())).await;
    assert!(refused.is_some(), "{}", keyward.log());
    // What is known goes on by its grace; what is not can't be asked of a standby.
    assert!(ask(&keyward, &key.secret).await.allows());
    assert_eq!(ask(&keyward, "kw_unknown-to-anyone-here").await.http_status(), 503);
    postgres.client("platform").await.query("SELECT pg_promote()", &[]).await.unwrap();
    ready_becomes(&keyward, "ready: change feed, lease").await;
    let noticed = eventually(async || keyward.log().contains("history is another one").then_some(())).await;
    assert!(noticed.is_some(), "{}", keyward.log());
    reason_becomes(&keyward, &key.secret, "ok").await;
}

/// The listener is killed again and again: what changes in between is not missed, as its records are read again.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_feed_misses_nothing() {
    let (postgres, keyward, key) = on_postgres(|builder| builder.arg("--cache-record-ttl", "1h")).await;
    let platform = postgres.client("platform").await;
    let mut lost = 0;
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'keyward-feed'";
    for is_active in [false, true, false, true] {
        let killed: i64 = platform.query_one(kill, &[]).await.unwrap().get(0);
        assert_eq!(killed, 1);
        let update = format!("UPDATE api_keys SET is_active = {is_active}");
        platform.batch_execute(&update).await.unwrap();
        let expected = if is_active { "ok" } else { "key_inactive" };
        reason_becomes(&keyward, &key.secret, expected).await;
        lost += 1;
        let noticed = eventually(async || {
            let counted = keyward.count("keyward_change_feed_lost_total", &[]).await == lost;
            let is_back = keyward.metric("keyward_change_feed_up", &[]).await > 0.5;
            (counted && is_back).then_some(())
        });
        assert!(noticed.await.is_some(), "interrupted {lost} times: {}", keyward.log());
    }
}

/// Known keys go on for lease and grace, and then nobody is accused.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_cut_off_serves_known_keys_for_its_grace_and_then_nobody() {
    let (mut postgres, keyward, key) =
        on_postgres(|builder| builder.arg("--lease", "500ms").arg("--outage-grace", "2s")).await;
    let narrow =
        keyward.create_key("ada", "narrow", &["--hash", "sha256", "--allowed-endpoints", "/v1/other"]);
    assert!(ask(&keyward, &key.secret).await.allows());
    assert_eq!(ask(&keyward, &narrow.secret).await.header("x-keyward-reason"), Some("endpoint_not_allowed"));
    postgres.kill();
    let cut_off = Instant::now();
    // Past the lease it is the grace that allows.
    let bridged = eventually(async || (cut_off.elapsed() > Duration::from_millis(900)).then_some(())).await;
    assert!(bridged.is_some());
    assert!(ask(&keyward, &key.secret).await.allows());
    // What would refuse might be wrong by now, and what is not known can't be asked for.
    for secret in [narrow.secret.as_str(), "kw_unknown-to-anyone-here"] {
        let answer = ask(&keyward, secret).await;
        assert_eq!((answer.http_status(), answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    }
    assert!(readyz(&keyward).await.starts_with("ready: change feed interrupted"));
    reason_becomes(&keyward, &key.secret, "unavailable").await;
    let lasted = cut_off.elapsed();
    assert!(lasted >= Duration::from_secs(2), "the grace ended after {lasted:?}");
    ready_becomes(&keyward, "not ready: the store has not answered").await;
    assert_eq!(keyward.admin("/livez").await.status, 200);
    postgres.start_again().await;
    reason_becomes(&keyward, &key.secret, "ok").await;
    reason_becomes(&keyward, &narrow.secret, "endpoint_not_allowed").await;
    ready_becomes(&keyward, "ready: change feed, lease").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_grace_a_replica_that_is_cut_off_fails_closed_at_the_lease() {
    let (mut postgres, keyward, key) =
        on_postgres(|builder| builder.arg("--lease", "300ms").arg("--outage-grace", "0s")).await;
    assert!(ask(&keyward, &key.secret).await.allows());
    postgres.kill();
    let lasted = reason_becomes(&keyward, &key.secret, "unavailable").await;
    assert!(lasted < Duration::from_secs(10), "{lasted:?}");
}

/// Another database in the old one's place: not even an outage may bring back what was known of the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_drops_everything_that_was_remembered() {
    let (mut postgres, keyward, key) = on_postgres(|builder| builder.arg("--outage-grace", "1h")).await;
    postgres.stop();
    let backup = postgres.back_up();
    postgres.start_again().await;
    let later = keyward.create_key("ada", "later", &["--hash", "sha256"]);
    assert!(ask(&keyward, &key.secret).await.allows());
    assert!(ask(&keyward, &later.secret).await.allows());
    // A heartbeat has seen how far the history has come.
    await_beat(&keyward).await;
    postgres.stop();
    postgres.restore(&backup);
    postgres.start_again().await;
    let noticed = eventually(async || keyward.log().contains("history is another one").then_some(())).await;
    assert!(noticed.is_some(), "{}", keyward.log());
    assert!(ask(&keyward, &key.secret).await.allows());
    postgres.kill();
    // It would be good for another hour if it were still remembered.
    assert_eq!(ask(&keyward, &later.secret).await.http_status(), 503);
}

/// The command line is another process; nobody tells the sidecar but the file itself.
#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_a_change_by_another_process_takes_effect() {
    let keyward = patient(Keyward::new()).start().await;
    assert_eq!(readyz(&keyward).await, "ready: change feed, lease 1h\n");
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    reason_becomes(&keyward, &key.secret, "ok").await;
    keyward.cli_ok(&["key", "revoke", &key.id.to_string()]);
    reason_becomes(&keyward, &key.secret, "key_inactive").await;
    let file = Connection::open(keyward.sqlite_file()).unwrap();
    file.execute("UPDATE api_keys SET is_active = 1", ()).unwrap();
    reason_becomes(&keyward, &key.secret, "ok").await;
    file.execute("DELETE FROM api_keys", ()).unwrap();
    reason_becomes(&keyward, &key.secret, "invalid_api_key").await;
}

/// An older file, or one of the platform's own: every write counts then.
#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_without_triggers_every_write_counts() {
    let keyward = patient(Keyward::new()).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    reason_becomes(&keyward, &key.secret, "ok").await;
    let file = Connection::open(keyward.sqlite_file()).unwrap();
    file.execute_batch("DROP TRIGGER keyward_feed_api_keys_updated; UPDATE api_keys SET is_active = 0")
        .unwrap();
    reason_becomes(&keyward, &key.secret, "key_inactive").await;
}

/// Notes of last uses are writes too, of our own, and must not empty the memory.
#[tokio::test(flavor = "multi_thread")]
async fn on_sqlite_notes_of_last_uses_do_not_count() {
    let keyward = patient(Keyward::new()).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    reason_becomes(&keyward, &key.secret, "ok").await;
    let written =
        eventually(async || (keyward.count("keyward_last_used_writes_total", &[]).await == 1).then_some(()));
    assert!(written.await.is_some());
    let changes = keyward.count("keyward_changes_total", &[]).await;
    let file = Connection::open(keyward.sqlite_file()).unwrap();
    file.execute("UPDATE api_keys SET last_used_at = '2026-01-01 00:00:00'", ()).unwrap();
    await_beat(&keyward).await;
    assert_eq!(keyward.count("keyward_changes_total", &[]).await, changes);
}

/// The promise as a graph: each replica switches a key of its own and asks itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_canary_measures_how_long_a_change_takes_and_leaves_nothing_behind() {
    let (postgres, keyward, _) = on_postgres(|builder| builder.arg("--canary", "on")).await;
    let measured = eventually(async || {
        (keyward.count("keyward_revocation_seconds_count", &[]).await >= 1).then_some(())
    });
    assert!(measured.await.is_some(), "nothing was measured: {}", keyward.log());
    assert_eq!(keyward.count("keyward_bound_violations_total", &[]).await, 0);
    assert!(keyward.metric("keyward_revocation_seconds_sum", &[]).await > 0.0);
    let platform = postgres.client("platform").await;
    let canaries = async || -> i64 {
        let sql = "SELECT count(*) FROM api_keys k JOIN users u ON u.id = k.user_id WHERE username = 'keyward-canary'";
        platform.query_one(sql, &[]).await.unwrap().get(0)
    };
    assert_eq!(canaries().await, 1);
    assert!(keyward.sigterm_and_wait().await.success());
    assert_eq!(canaries().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_without_rights_says_so_and_disturbs_nothing() {
    let postgres = Postgres::start().await;
    postgres.create_platform().await;
    let platform = postgres.client("platform").await;
    platform
        .batch_execute("CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        .await
        .unwrap();
    let keyward =
        Keyward::new().store(&postgres.url_as("reader", "platform")).arg("--canary", "on").start().await;
    let said = eventually(async || keyward.log().contains("the canary can't write its key").then_some(()));
    assert!(said.await.is_some(), "{}", keyward.log());
    assert!(readyz(&keyward).await.starts_with("ready: change feed"));
}
