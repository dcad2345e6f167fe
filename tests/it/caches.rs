//! The Redis tier against a real Redis that is slow, frozen, gone, back, or hostile (DESIGN section 6, guarantees 5, 6, 8, 9).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use keyward::cache::breaker::BreakerState;
use keyward::cache::redis::{Fetched, RedisCache, RedisOptions, StoredRecords};
use keyward::cache::redis_url::RedisUrl;
use keyward::cache::secrets::CacheSecrets;
use keyward::domain::decision::Tier;
use keyward::domain::freshness::shared::Stamp;
use keyward::domain::freshness::snapshot::Snapshot;
use keyward::domain::hash::KeyHash;
use keyward::domain::key::{KeyPrefix, PresentedKey};
use keyward::domain::record::KeyId;
use keyward::domain::row::CandidateRow;
use keyward::domain::time::Timestamp;
use keyward::telemetry::metrics::{CacheKind, CacheResult, Metrics};
use redis::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::redis::Redis;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const OTHER_SECRET: &str = "fedcba9876543210fedcba9876543210";
const HASH: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";
const KEY: &str = "kw_0123456789";
const NOW: Timestamp = Timestamp::from_microseconds(1_700_000_000_000_000);
const HOUR: Duration = Duration::from_hours(1);

fn stored(rows: Vec<CandidateRow>, read_at: Timestamp) -> StoredRecords {
    let snapshot = Snapshot::parse("100:120:100,105").unwrap();
    StoredRecords { rows, read_at, stamp: Some(Stamp { incarnation: "here".into(), snapshot }) }
}

/// A replica: its tier and its own counters.
struct Replica {
    cache: RedisCache,
    metrics: Metrics,
}

impl Replica {
    fn new(url: &str, secrets: &str, timeout: Duration) -> Self {
        let metrics = Metrics::new();
        let options = RedisOptions {
            url: RedisUrl::parse(url).unwrap(),
            secrets: CacheSecrets::parse(secrets.as_bytes()).unwrap(),
            timeout,
            connections: 2,
        };
        Self { cache: RedisCache::open(options, metrics.clone()).unwrap(), metrics }
    }

    /// Patient, because the tests share the machine; how long a time limit is does not matter to them.
    fn of(redis: &Redis, secrets: &str) -> Self {
        Self::new(&redis.url(), secrets, Duration::from_secs(5))
    }

    async fn fetch(&self) -> Fetched<()> {
        self.cache.fetch(Some(&prefix()), Some(&key(KEY)), NOW, |_| Some(())).await
    }

    async fn keep(&self) {
        self.cache.keep_records(&prefix(), &stored(vec![row()], NOW), HOUR).await;
        self.cache.keep_proof(&key(KEY), &hash(HASH), NOW, HOUR).await;
    }

    fn count(&self, kind: CacheKind, result: CacheResult) -> u64 {
        self.metrics.cache_count(kind, Tier::Redis, result)
    }

    /// Look-ups counted, whatever came of them.
    fn all(&self, kind: CacheKind) -> u64 {
        [CacheResult::Hit, CacheResult::Miss, CacheResult::Absent, CacheResult::Rejected, CacheResult::Error]
            .map(|result| self.count(kind, result))
            .iter()
            .sum()
    }

    /// Asks until the breaker is where it should be; each step is a call that must return by itself.
    async fn ask_until(&self, state: BreakerState) {
        tokio::time::timeout(Duration::from_mins(1), async {
            while self.cache.status().breaker != state {
                self.fetch().await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("breaker never became {state:?}: {:?}", self.cache));
    }
}

fn key(text: &str) -> PresentedKey {
    PresentedKey::parse(text.as_bytes()).unwrap()
}

fn hash(text: &str) -> KeyHash {
    KeyHash::parse(text).unwrap()
}

fn prefix() -> KeyPrefix {
    KeyPrefix::new(&KEY[..8]).unwrap()
}

fn row() -> CandidateRow {
    let json = serde_json::json!({
        "key_id": 7, "key_name": "ci", "key_hash": HASH, "key_prefix": &KEY[..8], "is_active": true,
        "expires_at": null, "scopes": null, "allowed_models": "[\"gpt\"]", "allowed_endpoints": null,
        "allowed_ips": null, "allowed_chatbots": null, "allowed_agents": null, "rate_limit_per_minute": 60,
        "rate_limit_per_hour": null, "rate_limit_per_day": null, "is_unlimited": null,
        "budget_limit_cents": null, "budget_type": null, "total_cost": null, "month_cost": null, "user_id": 3,
        "username": "ada", "email": "ada@example.com", "user_is_active": true, "is_superuser": false,
        "role": "user", "account_locked": null, "account_locked_until": null, "unreadable": [],
    });
    serde_json::from_value(json).unwrap()
}

/// The names that Redis holds of one kind (`r`, `v`, `u`).
async fn names(redis: &Redis, kind: char) -> Vec<Vec<u8>> {
    let reply = redis.command(&["KEYS", &format!("keyward:1:{kind}:*")]).await;
    let mut names: Vec<Vec<u8>> = redis::from_redis_value(reply).unwrap();
    names.sort();
    names
}

async fn only_name(redis: &Redis, kind: char) -> Vec<u8> {
    let names = names(redis, kind).await;
    assert_eq!(names.len(), 1, "one name of kind {kind}");
    names.into_iter().next().unwrap()
}

async fn value(redis: &Redis, name: &[u8]) -> Vec<u8> {
    redis::from_redis_value(redis.command(&[b"GET".as_slice(), name]).await).unwrap()
}

async fn set(redis: &Redis, name: &[u8], value: &[u8]) {
    redis.command(&[b"SET".as_slice(), name, value]).await;
}

#[tokio::test]
async fn a_second_replica_gets_record_and_proof_in_one_round_trip() {
    let redis = Redis::start().await;
    Replica::of(&redis, SECRET).keep().await;
    let replica = Replica::of(&redis, SECRET);
    let fetched = replica.fetch().await;
    let (records, ()) = fetched.records.expect("records");
    assert!(records.rows == vec![row()]);
    assert_eq!(records.read_at, NOW);
    let proof = fetched.proof.expect("proof");
    assert_eq!(proof.proven_at(), NOW);
    assert!(proof.proves(&key(KEY), &hash(HASH)));
    assert_eq!(replica.count(CacheKind::Record, CacheResult::Hit), 1);
    assert_eq!(replica.count(CacheKind::Verdict, CacheResult::Hit), 1);
    let reads: Vec<u8> = redis::from_redis_value(redis.command(&["INFO", "commandstats"]).await).unwrap();
    let reads = String::from_utf8(reads).unwrap();
    assert!(reads.contains("cmdstat_getrange:calls=2"), "{reads}");
    assert!(!reads.contains("cmdstat_ping:calls=4"), "no ping before a use: {reads}");
}

#[tokio::test]
async fn a_unix_socket_and_a_database_number_are_used() {
    let redis = Redis::start().await;
    let by_socket = Replica::new(&format!("{}?db=3", redis.unix_url()), SECRET, Duration::from_secs(5));
    by_socket.keep().await;
    assert!(Replica::of(&redis, SECRET).fetch().await.records.is_none(), "database 0 is empty");
    let by_port = Replica::new(&format!("{}/3", redis.url()), SECRET, Duration::from_secs(5));
    assert!(by_port.fetch().await.records.is_some());
}

/// Guarantee 5: the proof is of the whole key and of the exact hash.
#[tokio::test]
async fn a_stored_proof_proves_no_other_key_and_no_other_hash() {
    let redis = Redis::start().await;
    let replica = Replica::of(&redis, SECRET);
    replica.keep().await;
    let proof = replica.fetch().await.proof.unwrap();
    assert!(!proof.proves(&key("kw_0123456780"), &hash(HASH)));
    assert!(!proof.proves(&key(KEY), &hash(&HASH.replace("17lhWy", "17lhWz"))));
    let same_prefix = replica.cache.fetch(None, Some(&key("kw_0123456780")), NOW, |_| Some(())).await;
    assert!(same_prefix.proof.is_none());
    assert_eq!(replica.count(CacheKind::Verdict, CacheResult::Miss), 1);
    assert_eq!(replica.all(CacheKind::Record), 1, "a record that was not asked for is not counted");
}

#[tokio::test]
async fn another_secret_sees_nothing_and_an_added_one_reads_on() {
    let redis = Redis::start().await;
    Replica::of(&redis, SECRET).keep().await;
    let stranger = Replica::of(&redis, OTHER_SECRET);
    let fetched = stranger.fetch().await;
    assert!(fetched.records.is_none() && fetched.proof.is_none());
    assert_eq!(stranger.count(CacheKind::Record, CacheResult::Miss), 1);
    assert_eq!(stranger.count(CacheKind::Verdict, CacheResult::Miss), 1);

    let rotated = Replica::of(&redis, &format!("{OTHER_SECRET}\n{SECRET}"));
    let fetched = rotated.fetch().await;
    assert!(fetched.records.is_some());
    assert!(fetched.proof.unwrap().proves(&key(KEY), &hash(HASH)));
    assert_eq!((rotated.all(CacheKind::Record), rotated.all(CacheKind::Verdict)), (1, 1));

    rotated.keep().await;
    assert!(stranger.fetch().await.records.is_some(), "the first secret writes");
    assert!(rotated.fetch().await.proof.unwrap().proves(&key(KEY), &hash(HASH)));
    rotated.cache.forget(&[prefix()]).await.unwrap();
    assert!(names(&redis, 'r').await.is_empty(), "forgotten under every secret");
}

/// Nothing that identifies a key, a hash or an owner is in Redis in clear.
#[tokio::test]
async fn names_and_values_say_nothing() {
    let redis = Redis::start().await;
    let replica = Replica::of(&redis, SECRET);
    replica.keep().await;
    replica.cache.claim_uses(&[KeyId::new(7)], HOUR).await.unwrap();
    for kind in ['r', 'v', 'u'] {
        let name = only_name(&redis, kind).await;
        let all = [name.clone(), value(&redis, &name).await].concat();
        for secret in [&KEY[..8], "ada", "$2b$", "gpt"] {
            assert!(
                !all.windows(secret.len()).any(|window| window == secret.as_bytes()),
                "{secret} in {kind}"
            );
        }
        let lifetime: i64 =
            redis::from_redis_value(redis.command(&[b"PTTL".as_slice(), &name]).await).unwrap();
        assert!((1..=3_600_000).contains(&lifetime), "lifetime of {kind}: {lifetime}");
    }
}

/// Guarantee 6, for whoever has full rights on Redis: all of it is a counted miss and none of it is believed.
#[tokio::test]
async fn hostile_values_are_rejected_and_counted() {
    let redis = Redis::start().await;
    let writer = Replica::of(&redis, SECRET);
    writer.keep().await;
    let (record, proof) = (only_name(&redis, 'r').await, only_name(&redis, 'v').await);
    let (record_value, proof_value) = (value(&redis, &record).await, value(&redis, &proof).await);
    // Another prefix, whose record an attacker puts in place of this one.
    let other = KeyPrefix::new("kw_other").unwrap();
    writer.cache.keep_records(&other, &stored(vec![row()], NOW), HOUR).await;
    let other_name = names(&redis, 'r').await.into_iter().find(|name| *name != record).unwrap();
    let other_value = value(&redis, &other_name).await;

    let mut flipped = record_value.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut version = record_value.clone();
    version[0] = 2;
    let mut secret_id = record_value.clone();
    secret_id[1] ^= 1;
    let oversized = vec![1; 2 * 1024 * 1024];
    let rows: [(&str, &[u8]); 9] = [
        ("forged", b"\x01 this was never sealed, but it is long enough to have been sealed"),
        ("replayed under another name", &other_value),
        ("swapped between purposes", &proof_value),
        ("damaged", &flipped),
        ("truncated", &record_value[..record_value.len() - 1]),
        ("cut to nearly nothing", &record_value[..3]),
        ("unknown version", &version),
        ("another secret's id", &secret_id),
        ("oversized", &oversized),
    ];
    for (index, (what, hostile)) in rows.iter().enumerate() {
        set(&redis, &record, hostile).await;
        let fetched = writer.fetch().await;
        assert!(fetched.records.is_none(), "{what}");
        assert!(fetched.proof.is_some(), "{what}: the proof is untouched");
        let rejected = u64::try_from(index).unwrap() + 1;
        assert_eq!(writer.count(CacheKind::Record, CacheResult::Rejected), rejected, "{what}");
        assert_eq!(writer.all(CacheKind::Record), rejected, "{what} is counted once");
    }
    set(&redis, &proof, &record_value).await;
    assert!(writer.fetch().await.proof.is_none());
    assert_eq!(writer.count(CacheKind::Verdict, CacheResult::Rejected), 1);
    assert_eq!(writer.cache.status().rejected_entries, 11);
    assert_eq!(writer.cache.status().breaker, BreakerState::Closed, "a lying Redis is not a slow one");

    set(&redis, &record, &record_value).await;
    assert!(writer.fetch().await.records.is_some(), "the true entry is good again");
    set(&redis, &record, b"").await;
    assert!(writer.fetch().await.records.is_none());
    assert_eq!(writer.count(CacheKind::Record, CacheResult::Miss), 1, "nothing there is a miss");
}

#[tokio::test]
async fn a_wrong_type_under_one_name_costs_that_name_alone() {
    let redis = Redis::start().await;
    let replica = Replica::of(&redis, SECRET);
    replica.keep().await;
    let record = only_name(&redis, 'r').await;
    redis.command(&[b"DEL".as_slice(), &record]).await;
    redis.command(&[b"LPUSH".as_slice(), &record, b"x"]).await;
    for _ in 0..20 {
        let fetched = replica.fetch().await;
        assert!(fetched.records.is_none());
        assert!(fetched.proof.is_some());
    }
    assert_eq!(replica.count(CacheKind::Record, CacheResult::Error), 20);
    assert_eq!(replica.count(CacheKind::Verdict, CacheResult::Hit), 20);
    assert_eq!(replica.cache.status().breaker, BreakerState::Closed);
    replica.keep().await;
    assert!(replica.fetch().await.records.is_some(), "writing puts it right");
}

#[tokio::test]
async fn entries_from_the_future_and_without_lifetime_are_not_used() {
    let redis = Redis::start().await;
    let replica = Replica::of(&redis, SECRET);
    let later = NOW.saturating_add(Duration::from_secs(6));
    replica.cache.keep_records(&prefix(), &stored(vec![row()], later), HOUR).await;
    assert!(replica.fetch().await.records.is_none());
    assert_eq!(replica.count(CacheKind::Record, CacheResult::Rejected), 1);
    replica.cache.forget(&[prefix()]).await.unwrap();
    replica.cache.keep_records(&prefix(), &stored(vec![row()], NOW), Duration::from_micros(999)).await;
    assert!(names(&redis, 'r').await.is_empty());
}

#[tokio::test]
async fn one_use_is_claimed_by_one_replica() {
    let redis = Redis::start().await;
    let (a, b) = (Replica::of(&redis, SECRET), Replica::of(&redis, SECRET));
    let keys: Vec<KeyId> = (0..600).map(KeyId::new).collect();
    let (of_a, of_b) = tokio::join!(a.cache.claim_uses(&keys, HOUR), b.cache.claim_uses(&keys, HOUR));
    let (of_a, of_b) = (of_a.unwrap(), of_b.unwrap());
    assert_eq!((of_a.len(), of_b.len()), (600, 600));
    assert!(of_a.iter().zip(&of_b).all(|(a, b)| a != b), "each key is claimed by exactly one");
    assert_eq!(a.cache.claim_uses(&[KeyId::new(5), KeyId::new(1000)], HOUR).await, Some(vec![false, true]));
    assert_eq!(a.cache.claim_uses(&[], HOUR).await, Some(vec![]));
}

#[tokio::test]
async fn flush_removes_records_and_proofs_and_nothing_else() {
    let redis = Redis::start().await;
    let replica = Replica::of(&redis, SECRET);
    for name in ["keyward:2:r:x", "keyward:10:v:x", "other", "keyward:1:x:y"] {
        set(&redis, name.as_bytes(), b"1").await;
    }
    replica.keep().await;
    Replica::of(&redis, OTHER_SECRET).keep().await;
    for number in 0..1500 {
        let prefix = KeyPrefix::new(&format!("p{number}")).unwrap();
        replica.cache.keep_records(&prefix, &stored(vec![], NOW), HOUR).await;
    }
    replica.cache.claim_uses(&[KeyId::new(1)], HOUR).await.unwrap();
    assert_eq!(replica.cache.flush().await, Ok(1504));
    assert_eq!((names(&redis, 'r').await.len(), names(&redis, 'v').await.len()), (0, 0));
    assert_eq!(names(&redis, 'u').await.len(), 1);
    assert!(matches!(redis.command(&["DBSIZE"]).await, Value::Int(5)));
}

#[tokio::test]
async fn redis_that_is_down_at_the_start_is_used_once_it_is_up() {
    let mut redis = Redis::stopped();
    let replica = Replica::of(&redis, SECRET);
    replica.ask_until(BreakerState::Open).await;
    assert!(replica.count(CacheKind::Record, CacheResult::Error) >= 5);
    assert_eq!(replica.metrics.redis_breaker_open.get(), 1);
    assert_eq!(replica.cache.claim_uses(&[KeyId::new(1)], HOUR).await, None);
    assert!(replica.cache.forget(&[prefix()]).await.is_err());
    assert!(replica.cache.flush().await.is_err());
    redis.restart().await;
    replica.ask_until(BreakerState::Closed).await;
    assert_eq!(replica.metrics.redis_breaker_open.get(), 0);
    replica.keep().await;
    assert!(replica.fetch().await.records.is_some());
}

#[tokio::test]
async fn redis_that_is_killed_and_comes_back_is_used_again() {
    let mut redis = Redis::start().await;
    let replica = Replica::of(&redis, SECRET);
    replica.keep().await;
    redis.kill();
    replica.ask_until(BreakerState::Open).await;
    assert_ne!(replica.cache.status().last_error, None);
    redis.restart().await;
    replica.ask_until(BreakerState::Closed).await;
    replica.keep().await;
    assert!(replica.fetch().await.proof.is_some());
}

/// A frozen Redis keeps its connections open and never answers: only the time limit ends a call.
#[tokio::test]
async fn redis_that_hangs_costs_the_time_limit_and_then_nothing() {
    let redis = Redis::start().await;
    let replica = Replica::new(&redis.url(), SECRET, Duration::from_millis(200));
    replica.keep().await;
    redis.freeze();
    replica.ask_until(BreakerState::Open).await;
    let asked = replica.all(CacheKind::Record);
    assert!(asked <= 6, "opened after {asked} calls");
    assert_eq!(replica.cache.status().connections, 0, "a connection that did not answer is given up");
    // With the breaker open and no probe due, a thousand calls need no time limit at all.
    for _ in 0..1000 {
        let fetched = replica.fetch().await;
        assert!(fetched.records.is_none() && fetched.proof.is_none());
    }
    assert_eq!(replica.all(CacheKind::Verdict), asked + 1000, "each look-up is counted once");
    redis.resume();
    replica.ask_until(BreakerState::Closed).await;
    replica.keep().await;
    assert!(replica.fetch().await.records.is_some());
}

/// Callers that go away in the middle of a call must not shift the replies of others (redis-rs #325, and the `OpenAI` leak of 2023).
#[tokio::test]
async fn replies_reach_their_own_request_when_others_are_cancelled() {
    let redis = Redis::start().await;
    let replica = Arc::new(Replica::of(&redis, SECRET));
    let prefixes: Arc<Vec<KeyPrefix>> =
        Arc::new((0..50).map(|number| KeyPrefix::new(&format!("p{number}")).unwrap()).collect());
    for (number, prefix) in prefixes.iter().enumerate() {
        let mut row = row();
        row.key_id = i64::try_from(number).unwrap();
        replica.cache.keep_records(prefix, &stored(vec![row], NOW), HOUR).await;
    }
    let tasks: Vec<_> = (0..2000_usize)
        .map(|turn| {
            let (replica, prefixes) = (Arc::clone(&replica), Arc::clone(&prefixes));
            tokio::spawn(async move {
                let number = turn % prefixes.len();
                let fetch = replica.cache.fetch(prefixes.get(number), None, NOW, |_| Some(()));
                if turn % 3 == 0 {
                    let _ = tokio::time::timeout(Duration::from_micros(200), fetch).await;
                    return;
                }
                let rows = fetch.await.records.expect("records").0.rows;
                assert_eq!(rows[0].key_id, i64::try_from(number).unwrap());
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(replica.count(CacheKind::Record, CacheResult::Rejected), 0);
    assert_eq!(replica.cache.status().breaker, BreakerState::Closed);
}

/// A server that answers every read with the given bytes.
async fn garbage_server(garbage: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = [0; 4096];
                while let Ok(1..) = socket.read(&mut buffer).await {
                    if socket.write_all(garbage).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn garbage_for_an_answer_is_a_counted_error_and_opens_the_breaker() {
    let rows: [&[u8]; 10] = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$9223372036854775807\r\nx",
        b"*9223372036854775807\r\n",
        b"*1000000000\r\n$1\r\nx\r\n",
        b"|9223372036854775807\r\n",
        b"$-2\r\n:x\r\n",
        b"+OK\r\n+OK\r\n",
        b"*1\r\n*1\r\n*1\r\n:1\r\n*1\r\n:1\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n-LOADING again\r\n",
        b"\0\xff\xfe",
    ];
    for garbage in rows {
        let address = garbage_server(garbage).await;
        let replica = Replica::new(&format!("redis://{address}"), SECRET, Duration::from_millis(100));
        for _ in 0..12 {
            let fetched = replica.fetch().await;
            assert!(fetched.records.is_none() && fetched.proof.is_none());
        }
        let text = String::from_utf8_lossy(garbage).into_owned();
        assert_eq!(replica.count(CacheKind::Record, CacheResult::Error), 12, "{text}");
        assert_eq!(replica.cache.status().breaker, BreakerState::Open, "{text}");
        assert_ne!(replica.cache.status().last_error, None, "{text}");
    }
}

/// Redis can't fill the memory: neither with an answer nor unasked. The server answers once, then sends without end.
#[tokio::test]
async fn a_flood_from_redis_breaks_the_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let replica = Replica::new(&format!("redis://{address}"), SECRET, Duration::from_secs(5));
    let server = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut buffer = [0; 4096];
        assert!(socket.read(&mut buffer).await.unwrap() > 0);
        socket.write_all(b"$0\r\n\r\n$0\r\n\r\n").await.unwrap();
        let mut sent = 0_usize;
        let _ = socket.write_all(b"$1000000000000\r\n").await;
        while sent < 1 << 30 && socket.write_all(&vec![b'x'; 65_536]).await.is_ok() {
            sent += 65_536;
        }
        sent
    };
    let (fetched, sent) = tokio::join!(replica.fetch(), server);
    assert!(fetched.records.is_none() && fetched.proof.is_none());
    assert_eq!(replica.count(CacheKind::Record, CacheResult::Miss), 1);
    assert!(sent < 64 << 20, "{sent} bytes were taken");
}

#[tokio::test]
async fn a_wrong_password_is_told_and_is_no_error_of_a_check() {
    let redis = Redis::start().await;
    redis.command(&["CONFIG", "SET", "requirepass", "right"]).await;
    let url = |password: &str| redis.url().replace("://", &format!("://:{password}@"));
    let replica = Replica::new(&url("wrong"), SECRET, Duration::from_secs(5));
    assert!(replica.fetch().await.records.is_none());
    assert_eq!(replica.cache.status().last_error, Some("login"));
    let replica = Replica::new(&url("right"), SECRET, Duration::from_secs(5));
    replica.keep().await;
    assert!(replica.fetch().await.records.is_some());
    assert!(!format!("{:?}", replica.cache).contains("right"));
}

/// A Redis that refuses writes (full, read-only) is still read.
#[tokio::test]
async fn refused_writes_leave_reading_alone() {
    let redis = Redis::start().await;
    let replica = Replica::of(&redis, SECRET);
    replica.keep().await;
    redis.command(&["CONFIG", "SET", "maxmemory", "1"]).await;
    for _ in 0..20 {
        replica.keep().await;
        assert!(replica.fetch().await.records.is_some());
    }
    assert_eq!(replica.cache.claim_uses(&[KeyId::new(1)], HOUR).await, None);
    assert_eq!(replica.cache.status().last_error, Some("refused"));
    assert_eq!(replica.cache.status().breaker, BreakerState::Closed);
}
