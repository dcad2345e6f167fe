//! Every door, every kind of answer and every fault at once, with canaries in all that is secret.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use super::canaries::Canaries;
use crate::support::certificates::Authority;
use crate::support::collector::Collector;
use crate::support::envoy::Envoy;
use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Key, Keyward};
use crate::support::port::free_addr;
use crate::support::postgres::Postgres;
use crate::support::process::without_settings;
use crate::support::redis::Redis;
use crate::support::upstream::Upstream;

const CACHE_SECRET: &str = "c4naryCacheSecret-0123456789abcdef";
const DATABASE_PASSWORD: &str = "c4naryDatabasePassword";
const REDIS_PASSWORD: &str = "c4naryRedisPassword";
const MALFORMED: &str = "c4nary malformed, key!";

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_leaves_by_any_door_with_logs_as_text() {
    no_secret_leaves("text").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_leaves_by_any_door_with_logs_as_json() {
    no_secret_leaves("json").await;
}

async fn no_secret_leaves(log_format: &str) {
    let (mut redis, mut postgres) = (Redis::start().await, Postgres::start().await);
    redis
        .command(&["ACL", "SETUSER", "keyward", "on", &format!(">{REDIS_PASSWORD}"), "~*", "&*", "+@all"])
        .await;
    postgres.create_platform().await;
    let (folder, collector) = (tempfile::tempdir().unwrap(), Collector::start().await);
    let secret_file = folder.path().join("secret");
    fs::write(&secret_file, format!("{CACHE_SECRET}\n")).unwrap();
    let store = postgres.url("platform").replace("postgres@", &format!("postgres:{DATABASE_PASSWORD}@"));
    let redis_url = redis.url().replace("redis://", &format!("redis://keyward:{REDIS_PASSWORD}@"));
    let http = free_addr();
    let settings = format!("store: {store}\nredis: {redis_url}\n");
    let keyward = Keyward::new()
        .store(&postgres.url("platform"))
        .file(&settings)
        .arg("--cache-secret-file", &secret_file.display().to_string())
        .arg("--log-level", "trace")
        .arg("--log-format", log_format)
        .arg("--decision-log", "stdout")
        .arg("--http-listen", &http.to_string())
        .arg("--otlp-endpoint", &collector.url("grpc"))
        .start()
        .await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key(
        "ada",
        "bcrypt",
        &["--allowed-endpoints", "/v1/models", "--allowed-models", "gpt-4o"],
    );
    let plain = keyward.create_key("ada", "sha256", &["--hash", "sha256"]);
    let revoked = keyward.create_key("ada", "revoked", &["--hash", "sha256"]);
    keyward.cli_ok(&["key", "revoke", &revoked.id.to_string()]);

    let mut canaries = Canaries::default();
    for of in [&key, &plain, &revoked] {
        canaries.add("a key", &of.secret[8..]);
        canaries.add("a wrong key", &of.wrong()[8..]);
    }
    canaries.add("a malformed key", MALFORMED);
    let rows = postgres.client("platform").await.query("SELECT key_hash FROM api_keys", &[]).await.unwrap();
    for row in rows {
        canaries.add("a hash", &row.get::<_, String>(0)[7..]);
    }
    for (what, secret) in [
        ("the cache secret", CACHE_SECRET),
        ("the database's password", DATABASE_PASSWORD),
        ("Redis' password", REDIS_PASSWORD),
    ] {
        canaries.add(what, secret);
    }

    let mut answers = ask_everywhere(&keyward, http, &[&key, &plain, &revoked]).await;
    operate(&keyward, &key, &mut answers).await;
    in_redis(&redis, &canaries).await;
    redis.kill();
    answers += &ask_everywhere(&keyward, http, &[&key]).await;
    postgres.kill();
    let unknown = format!("zz_c4nary{}", &plain.secret[8..]);
    answers += &ask_everywhere(&keyward, http, &[&Key { id: 0, secret: unknown }]).await;
    bad_reload(&keyward, &format!("store: [{store}\nredis: {redis_url}\n")).await;

    for path in ["/metrics", "/stats", "/config", "/readyz", "/livez"] {
        canaries.assert_absent(path, keyward.admin(path).await.text());
    }
    let span = collector.span(|span| span.name == "bcrypt").await;
    assert_eq!(span.name, "bcrypt");
    canaries.assert_absent("an answer", &answers);
    canaries.assert_absent("the spans", format!("{:?}", collector.spans()));
    for what in ["cmdline", "environ"] {
        canaries.assert_absent(what, fs::read(format!("/proc/{}/{what}", keyward.id())).unwrap_or_default());
    }
    let (log, decisions) = (keyward.log(), keyward.stdout());
    assert!(log.contains("TRACE"), "the log is not at trace level");
    assert_eq!(log.lines().any(|line| line.starts_with('{')), log_format == "json");
    for reason in
        ["malformed_credentials", "invalid_api_key", "key_inactive", "endpoint_not_allowed", "unavailable"]
    {
        assert!(decisions.contains(reason), "nothing was refused for {reason}:\n{decisions}");
    }
    canaries.assert_absent("the log", log);
    canaries.assert_absent("the decision log", decisions);
}

/// By gRPC, through Envoy and by HTTP: good, wrong and malformed keys. What was answered, and what Envoy logged.
async fn ask_everywhere(keyward: &Keyward, http: std::net::SocketAddr, keys: &[&Key]) -> String {
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(keyward.grpc_addr(), upstream.addr()).start().await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let mut answers = String::new();
    let presented =
        keys.iter().flat_map(|key| [key.secret.clone(), key.wrong()]).chain([MALFORMED.to_owned()]);
    for secret in presented {
        for encoding in [Encoding::Raw, Encoding::Joined] {
            for check in [
                Check::new("GET", "/v1/models").bearer(&secret),
                Check::new("GET", "/v1/forbidden").header("x-api-key", secret.as_str()),
                Check::new("GET", &format!("/v1/models?key={secret}")).header("api-key", secret.as_str()),
                Check::new("POST", "/v1/messages")
                    .bearer(&secret)
                    .header("x-goog-api-key", "another-key-here"),
            ] {
                write!(answers, "{:?}", authorizer.try_check(check.build(encoding)).await).unwrap();
            }
        }
        for request in [
            Request::get("/v1/models").bearer(&secret),
            Request::get("/v1/forbidden").header("x-api-key", &secret),
            Request::post("/v1/chat/completions", r#"{"model":"gpt-4o"}"#).bearer(&secret),
        ] {
            write!(answers, "{:?}", request.send(envoy.addr()).await.text()).unwrap();
        }
        let asked = Request::get("/check/v1/models").bearer(&secret).send(http).await;
        write!(answers, "{:?} {}", asked.headers, asked.text()).unwrap();
    }
    answers + &envoy.access_log()
}

/// What operators do, with a key where a prefix or nothing at all belongs.
async fn operate(keyward: &Keyward, key: &Key, answers: &mut String) {
    let admin = keyward.admin_addr();
    for path in
        ["/cache/invalidate?prefix=", "/deny?prefix=", "/deny?prefix=kw_&note=", "/cache/flush?", "/nothing/"]
    {
        let said = Request::new("POST", &format!("{path}{}", key.secret)).send(admin).await;
        write!(answers, "{:?} {}", said.headers, said.text()).unwrap();
    }
    let admin = admin.to_string();
    for output in ["table", "json"] {
        for more in [&[][..], &["--running", "--admin-listen", &admin]] {
            let base =
                ["check", "--key-stdin", "--method", "GET", "--path", "/v1/models", "--output", output];
            for secret in [key.secret.clone(), key.wrong(), MALFORMED.to_owned()] {
                let said = keyward.cli_with_input(&[&base, more].concat(), &secret);
                *answers += &String::from_utf8_lossy(&[said.stdout, said.stderr].concat());
            }
        }
    }
}

async fn in_redis(redis: &Redis, canaries: &Canaries) {
    let names = eventually(async || {
        let names: Vec<String> = redis::from_redis_value(redis.command(&["KEYS", "*"]).await).unwrap();
        (names.len() >= 3).then_some(names)
    });
    for name in names.await.expect("records and proofs in Redis") {
        let dump: Vec<u8> = redis::from_redis_value(redis.command(&["DUMP", &name]).await).unwrap();
        canaries.assert_absent("a name in Redis", &name);
        canaries.assert_absent("a value in Redis", dump);
    }
}

async fn bad_reload(keyward: &Keyward, settings: &str) {
    fs::write(keyward.settings_file(), settings).unwrap();
    keyward.hangup();
    let failed = eventually(async || keyward.log().contains("reload failed").then_some(()));
    assert!(failed.await.is_some(), "the reload did not fail");
}

/// What commands print about URLs that hold a password: good ones, broken ones and ones where nobody is.
#[test]
fn no_command_repeats_a_password() {
    let mut canaries = Canaries::default();
    canaries.add("the database's password", DATABASE_PASSWORD);
    canaries.add("Redis' password", REDIS_PASSWORD);
    let folder = tempfile::tempdir().unwrap();
    let stores = [
        "postgres://ada:{}@127.0.0.1:1/x",
        "postgres://ada:{}@[::1/x",
        "postgrs://ada:{}@h/x",
        "{}",
        "sqlite:{}?mode=x",
    ];
    let redises = [
        "redis://ada:{}@127.0.0.1:1",
        "redis://ada:{}@[::1",
        "rdis://ada:{}@h",
        "{}",
        "redis+sentinel://:{}@h",
    ];
    for (store, redis) in stores.into_iter().zip(redises) {
        let (store, redis) = (store.replace("{}", DATABASE_PASSWORD), redis.replace("{}", REDIS_PASSWORD));
        let file = folder.path().join("keyward.yaml");
        fs::write(&file, format!("store: \"{store}\"\nredis: \"{redis}\"\n")).unwrap();
        let file = file.display().to_string();
        for args in [
            &["config", "check"][..],
            &["config", "print"],
            &["config", "print", "--output", "json"],
            &["config", "check", "--config", &file],
            &["config", "print", "--config", &file],
            &["serve", "--config", &file],
            &["serve"],
            &["migrate"],
            &["user", "list"],
            &["key", "show", "1"],
        ] {
            // A name of a file that is no URL is a password only to whoever wrote it there.
            if store.starts_with("sqlite:") || store == DATABASE_PASSWORD {
                continue;
            }
            let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_keyward")));
            without_settings(&mut command);
            if !args.contains(&"--config") {
                command.env("KEYWARD_STORE", &store).env("KEYWARD_REDIS", &redis);
            }
            let said = command.args(args).current_dir(folder.path()).output().unwrap();
            let text = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).into_owned();
            assert!(!text.is_empty(), "{args:?} said nothing");
            canaries.assert_absent(&format!("{args:?}"), text);
        }
    }
}

/// Somebody who can't speak TLS, and a log that says everything about it.
#[tokio::test(flavor = "multi_thread")]
async fn no_private_key_is_logged_or_shown() {
    let folder = tempfile::tempdir().unwrap();
    let files = Authority::new().sign(&["localhost"]).write(folder.path(), "server");
    let text = fs::read_to_string(&files.key).unwrap();
    let body: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
    let mut canaries = Canaries::default();
    // Behind 36 bytes that say which curve it is, before the public half.
    canaries.add("the private key", &body[48..90]);
    let keyward = Keyward::new()
        .arg("--grpc-tls-cert", &files.certificate.display().to_string())
        .arg("--grpc-tls-key", &files.key.display().to_string())
        .arg("--log-level", "trace")
        .start()
        .await;
    let _ = Request::get("/").try_send(keyward.grpc_addr()).await;
    keyward.hangup();
    let done = eventually(async || keyward.log().contains("reloaded").then_some(()));
    assert!(done.await.is_some(), "no reload");
    canaries.assert_absent("/config", keyward.admin("/config").await.text());
    canaries.assert_absent("the log", keyward.log());
}
