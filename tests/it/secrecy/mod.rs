//! What is secret stays secret: not in a log at any level, not on the admin port, not in Redis.

mod canaries;
mod doors;
mod memory;

use std::fmt::Write;

use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::keyward::Keyward;
use crate::support::redis::Redis;

const CACHE_SECRET: &str = "canary-cache-secret-0123456789abcdef";

#[tokio::test(flavor = "multi_thread")]
async fn no_key_hash_or_cache_secret_is_to_be_found_anywhere() {
    let redis = Redis::start().await;
    let folder = tempfile::tempdir().unwrap();
    let secret_file = folder.path().join("secret");
    std::fs::write(&secret_file, format!("{CACHE_SECRET}\n")).unwrap();
    let keyward = Keyward::new()
        .redis(&redis.url(), &secret_file)
        .arg("--log-level", "trace")
        .arg("--decision-log", "stdout")
        .start()
        .await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let file = rusqlite::Connection::open(keyward.sqlite_file()).unwrap();
    let hash: String = file.query_row("SELECT key_hash FROM api_keys", [], |row| row.get(0)).unwrap();

    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let wrong = format!("{}-canary-wrong-suffix", &key.secret[..8]);
    let malformed = "canary malformed key";
    let checks = [
        Check::new("GET", "/v1/models").bearer(&key.secret),
        Check::new("GET", "/v1/models").bearer(&wrong),
        Check::new("GET", "/v1/models").bearer(malformed),
        Check::new("GET", "/v1/models").header("x-api-key", key.secret.as_str()),
        Check::new("GET", &format!("/v1/models?key={}", key.secret)),
    ];
    let mut answers = String::new();
    for check in checks {
        for encoding in [Encoding::Raw, Encoding::Joined] {
            let answer = authorizer.check(check.clone().build(encoding)).await;
            write!(answers, "{answer:?}").unwrap();
        }
    }
    let names: Option<Vec<String>> = eventually(async || {
        let names: Vec<String> = redis::from_redis_value(redis.command(&["KEYS", "*"]).await).unwrap();
        (names.len() >= 2).then_some(names)
    })
    .await;
    let mut in_redis = Vec::new();
    for name in names.expect("record and proof in Redis") {
        let dump: Vec<u8> = redis::from_redis_value(redis.command(&["DUMP", &name]).await).unwrap();
        in_redis.extend(name.into_bytes());
        in_redis.extend(dump);
    }
    let mut places = vec![
        ("the log", keyward.log()),
        ("an answer", answers),
        ("the decision log", keyward.stdout()),
        ("Redis", String::from_utf8_lossy(&in_redis).into_owned()),
    ];
    for path in ["/metrics", "/stats", "/config", "/readyz"] {
        places.push((path, keyward.admin(path).await.text()));
    }
    assert!(keyward.stdout().contains("malformed_credentials"), "there is no decision log");
    assert!(places[0].1.contains("TRACE"), "the log is not at trace level");
    for (place, text) in &places {
        for (what, secret) in [
            ("the key", key.secret.as_str()),
            ("the key's secret part", &key.secret[8..]),
            ("a wrong key", &wrong[8..]),
            ("a malformed key", malformed),
            ("the hash", &hash),
            ("the cache secret", CACHE_SECRET),
        ] {
            assert!(!text.contains(secret), "{what} is in {place}");
        }
    }
}
