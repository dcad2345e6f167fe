//! Redis between memory and store, through the whole program: what it spares, and that it is neither trusted nor needed.

use tempfile::TempDir;

use crate::support::eventually;
use crate::support::grpc::{Answer, Authorizer, Check, Encoding};
use crate::support::keyward::{Builder, Key, Keyward};
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;

/// A Postgres, a Redis, and what replicas share besides them.
struct Rig {
    postgres: Postgres,
    store: String,
    redis: Redis,
    folder: TempDir,
}

impl Rig {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), "0123456789abcdef0123456789abcdef\n").unwrap();
        let postgres = Postgres::start().await;
        let store = postgres.create_platform().await;
        Self { postgres, store, redis: Redis::start().await, folder }
    }

    fn replica(&self) -> Builder {
        let secret = self.folder.path().join("secret");
        Keyward::new().store(&self.store).redis(&self.redis.url(), &secret)
    }

    /// A first replica that has proven a key and has handed record and proof to Redis.
    async fn warm(&self) -> (Keyward, Key) {
        let first = self.replica().start().await;
        first.create_user("ada", &[]);
        let key = first.create_key("ada", "ci", &[]);
        assert!(ask(&first, &key.secret).await.allows());
        assert_eq!(first.bcrypt_runs().await, 1);
        let stored = eventually(async || (self.entries().await.len() >= 2).then_some(()));
        assert!(stored.await.is_some(), "record and proof did not reach Redis");
        (first, key)
    }

    /// The names of records and proofs.
    async fn entries(&self) -> Vec<String> {
        let names = self.redis.command(&["KEYS", "keyward:*"]).await;
        let names: Vec<String> = redis::from_redis_value(names).unwrap();
        names.into_iter().filter(|name| !name.contains(":u:")).collect()
    }
}

async fn ask(keyward: &Keyward, secret: &str) -> Answer {
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    authorizer.check(Check::new("GET", "/v1/models").bearer(secret).build(Encoding::Raw)).await
}

async fn redis_count(keyward: &Keyward, cache: &str, result: &str) -> u64 {
    let labels = [("cache", cache), ("tier", "redis"), ("result", result)];
    keyward.count("keyward_cache_requests_total", &labels).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_replica_needs_neither_bcrypt_nor_the_store() {
    let rig = Rig::start().await;
    // It runs already: what was read before it began to listen is not for it.
    let second = rig.replica().start().await;
    let (_first, key) = rig.warm().await;
    assert!(ask(&second, &key.secret).await.allows());
    assert_eq!(second.bcrypt_runs().await, 0);
    let from_store = [("cache", "record"), ("tier", "store")];
    assert_eq!(second.count("keyward_cache_requests_total", &from_store).await, 0);
    // One round trip brought both.
    assert_eq!(redis_count(&second, "record", "hit").await, 1);
    assert_eq!(redis_count(&second, "verdict", "hit").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_served_by_redis_without_bcrypt() {
    let rig = Rig::start().await;
    let (first, key) = rig.warm().await;
    assert!(first.sigterm_and_wait().await.success());
    let again = rig.replica().start().await;
    assert!(ask(&again, &key.secret).await.allows());
    assert_eq!(again.bcrypt_runs().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_knows_of_a_key_lets_no_other_key_in() {
    let rig = Rig::start().await;
    let (_first, key) = rig.warm().await;
    let second = rig.replica().start().await;
    let wrong = key.wrong();
    let answer = ask(&second, &wrong).await;
    assert_eq!(answer.header("x-keyward-reason"), Some("invalid_api_key"));
    // The record is in memory by now; the verdict on the right key still comes from Redis.
    assert!(ask(&second, &key.secret).await.allows());
    assert_eq!(second.bcrypt_runs().await, 1, "for the wrong key alone");
    assert!(!ask(&second, &wrong).await.allows());
}

/// Whoever owns Redis can cost us work, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn forged_and_swapped_entries_are_counted_misses() {
    let rig = Rig::start().await;
    let (_first, key) = rig.warm().await;
    let names = rig.entries().await;
    // Each entry gets the value of another one: sealed by us, but not for this name.
    let values: Vec<redis::Value> = {
        let mut values = Vec::new();
        for name in &names {
            values.push(rig.redis.command(&["DUMP", name]).await);
        }
        values
    };
    for (name, value) in names.iter().zip(values.into_iter().cycle().skip(1)) {
        let dump: Vec<u8> = redis::from_redis_value(value).unwrap();
        rig.redis.command(&[b"RESTORE", name.as_bytes(), b"60000", &dump, b"REPLACE"]).await;
    }
    let second = rig.replica().start().await;
    assert!(ask(&second, &key.secret).await.allows());
    assert_eq!(redis_count(&second, "record", "rejected").await, 1);
    assert_eq!(redis_count(&second, "verdict", "rejected").await, 1);
    assert_eq!(second.bcrypt_runs().await, 1);

    for name in rig.entries().await {
        rig.redis.command(&["SET", &name, "forged"]).await;
    }
    let third = rig.replica().start().await;
    assert!(ask(&third, &key.secret).await.allows());
    assert_eq!(redis_count(&third, "record", "rejected").await, 1);
    assert_eq!(third.bcrypt_runs().await, 1);
}

/// A record that was switched off must not be served to a replica that has not seen it.
#[tokio::test(flavor = "multi_thread")]
async fn invalidation_reaches_redis_too() {
    let rig = Rig::start().await;
    let (first, key) = rig.warm().await;
    let platform = rig.postgres.client("platform").await;
    platform
        .batch_execute(&format!("UPDATE api_keys SET is_active = false WHERE id = {}", key.id))
        .await
        .unwrap();
    first.cli_ok(&["cache", "invalidate", "--key-id", &key.id.to_string()]);
    assert_eq!(ask(&first, &key.secret).await.header("x-keyward-reason"), Some("key_inactive"));
    let second = rig.replica().start().await;
    assert_eq!(ask(&second, &key.secret).await.header("x-keyward-reason"), Some("key_inactive"));
}

/// As docs/operations.md gives it.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_of_redis_with_six_commands_is_enough() {
    let rig = Rig::start().await;
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md")).unwrap();
    let line =
        page.lines().find(|line| line.starts_with("ACL SETUSER keyward ")).expect("the page has the user");
    let words: Vec<&str> =
        line.split(' ').map(|word| if word == ">PASSWORD" { ">secret" } else { word }).collect();
    rig.redis.command(&words).await;
    let url = rig.redis.url().replace("redis://", "redis://keyward:secret@");
    let replica = || Keyward::new().store(&rig.store).redis(&url, &rig.folder.path().join("secret")).start();
    let first = replica().await;
    first.create_user("ada", &[]);
    let key = first.create_key("ada", "ci", &[]);
    let second = replica().await;
    assert!(ask(&first, &key.secret).await.allows());
    let stored = eventually(async || (rig.entries().await.len() >= 2).then_some(()));
    assert!(stored.await.is_some(), "record and proof did not reach Redis");
    assert!(ask(&second, &key.secret).await.allows());
    assert_eq!(redis_count(&second, "verdict", "hit").await, 1);
    first.cli_ok(&["cache", "flush"]);
    assert!(rig.entries().await.is_empty());
    for keyward in [&first, &second] {
        let failures: Vec<String> = keyward
            .admin("/metrics")
            .await
            .text()
            .lines()
            .filter(|line| line.starts_with("keyward_redis_failures_total") && !line.ends_with(" 0"))
            .map(str::to_owned)
            .collect();
        assert!(failures.is_empty(), "{failures:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_that_is_down_at_start_is_not_felt() {
    let mut rig = Rig::start().await;
    rig.redis.kill();
    let keyward = rig.replica().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    assert!(ask(&keyward, &key.secret).await.allows());
    assert!(ask(&keyward, &key.secret).await.allows());
    assert_eq!(keyward.bcrypt_runs().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_that_freezes_costs_a_miss_and_then_is_left_alone() {
    let rig = Rig::start().await;
    let keyward = rig.replica().start().await;
    keyward.create_user("ada", &[]);
    rig.redis.freeze();
    let opened = eventually(async || {
        let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
        let answer = ask(&keyward, &key.secret).await;
        assert!(answer.allows(), "{answer:?}");
        let stats = keyward.cli_json(&["cache", "stats"]);
        (stats["redis"]["breaker"] == "open").then_some(())
    });
    assert!(opened.await.is_some(), "the breaker stays closed");
    rig.redis.resume();
    let closed = eventually(async || {
        let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
        assert!(ask(&keyward, &key.secret).await.allows());
        let stats = keyward.cli_json(&["cache", "stats"]);
        (stats["redis"]["breaker"] == "closed").then_some(())
    });
    assert!(closed.await.is_some(), "the breaker stays open");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_write_last_used_at_once() {
    let rig = Rig::start().await;
    let (first, key) = rig.warm().await;
    let second = rig.replica().start().await;
    assert!(ask(&second, &key.secret).await.allows());
    let platform = rig.postgres.client("platform").await;
    let last_used = async || {
        let row = platform.query_one("SELECT last_used_at::text FROM api_keys", &[]).await.unwrap();
        row.get::<_, Option<String>>(0)
    };
    let written = eventually(async || last_used().await);
    let written = written.await.expect("last_used_at is not written");
    // Both flush what they have, and neither has anything that the other one wrote already.
    let writes = first.count("keyward_last_used_writes_total", &[]).await
        + second.count("keyward_last_used_writes_total", &[]).await;
    assert!(first.sigterm_and_wait().await.success());
    assert!(second.sigterm_and_wait().await.success());
    assert_eq!((writes, last_used().await), (1, Some(written)));
}

#[tokio::test(flavor = "multi_thread")]
async fn flush_empties_memory_and_redis() {
    let rig = Rig::start().await;
    let (first, key) = rig.warm().await;
    rig.redis.command(&["SET", "somebody-elses", "1"]).await;
    first.cli_ok(&["cache", "flush"]);
    assert!(rig.entries().await.is_empty());
    let theirs: String =
        redis::from_redis_value(rig.redis.command(&["GET", "somebody-elses"]).await).unwrap();
    assert_eq!(theirs, "1");
    assert!(ask(&first, &key.secret).await.allows());
    assert_eq!(first.bcrypt_runs().await, 2);
}

/// The secret is exchanged while replicas run: first the new one is added in front, then the old one is taken out.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_rotated_under_running_replicas_and_a_bad_file_changes_nothing() {
    const OLD: &str = "0123456789abcdef0123456789abcdef\n";
    const NEW: &str = "fedcba9876543210fedcba9876543210\n";
    let rig = Rig::start().await;
    let (first, key) = rig.warm().await;
    let second = rig.replica().start().await;
    let file = rig.folder.path().join("secret");
    let reload = async |keyward: &Keyward, text: &str, result: &str| {
        std::fs::write(&file, text).unwrap();
        let count = async || keyward.count("keyward_reloads_total", &[("result", result)]).await;
        let before = count().await;
        keyward.hangup();
        let done = eventually(async || (count().await > before).then_some(()));
        assert!(done.await.is_some(), "{}", keyward.log());
    };

    reload(&second, "too short\n", "failed").await;
    assert!(second.log().contains("--cache-secret-file"), "{}", second.log());
    reload(&second, &format!("{NEW}{OLD}"), "ok").await;
    assert!(ask(&second, &key.secret).await.allows());
    assert_eq!(second.bcrypt_runs().await, 0, "what the old secret sealed is read on");

    // By the file alone: no signal comes where Kubernetes swaps it.
    std::fs::write(&file, NEW).unwrap();
    let taken = eventually(async || first.log().contains("cache secrets changed").then_some(()));
    assert!(taken.await.is_some(), "{}", first.log());
    let other = first.create_key("ada", "other", &[]);
    let before = rig.entries().await.len();
    assert!(ask(&first, &other.secret).await.allows());
    let stored = eventually(async || (rig.entries().await.len() >= before + 2).then_some(()));
    assert!(stored.await.is_some(), "record and proof did not reach Redis");
    assert!(ask(&second, &other.secret).await.allows());
    assert_eq!(second.bcrypt_runs().await, 0, "what the new secret sealed is read too");
    std::fs::write(&file, OLD).unwrap();
    let third = rig.replica().start().await;
    assert!(ask(&third, &other.secret).await.allows());
    assert_eq!(third.bcrypt_runs().await, 1, "and is nothing to the old one");
}
