//! Keys through the running program: what a command does to a key is what a sidecar answers.

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::keyward::{Builder, Key, Keyward};
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;

/// Waits until a check is answered so.
async fn becomes(keyward: &Keyward, secret: &str, expected: &str) {
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let answered = eventually(async || {
        let check = Check::new("GET", "/v1/models").bearer(secret).build(Encoding::Raw);
        let answer = authorizer.check(check).await;
        let said = if answer.allows() { "ok" } else { answer.header("x-keyward-reason").unwrap_or("none") };
        (said == expected).then_some(())
    });
    assert!(answered.await.is_some(), "never {expected}");
}

/// Only the change feed can make a change take effect.
fn patient(builder: Builder) -> Builder {
    builder.arg("--cache-record-ttl", "1h").arg("--cache-negative-ttl", "1h").arg("--lease", "1h")
}

async fn rotate_and_end(keyward: &Keyward) {
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let id = key.id.to_string();
    becomes(keyward, &key.secret, "ok").await;

    let rotated = keyward.cli_json(&["key", "rotate", &id, "--grace", "24h"]);
    let new = Key { id: key.id, secret: rotated["key"].as_str().unwrap().to_owned() };
    assert_eq!(rotated["id"], key.id, "the same key");
    assert_eq!(new.secret[..8], key.secret[..8], "of the same public prefix");
    becomes(keyward, &new.secret, "ok").await;
    becomes(keyward, &key.secret, "ok").await;
    becomes(keyward, &new.wrong(), "invalid_api_key").await;
    assert_eq!(keyward.cli_json(&["key", "show", &id])["old_secrets"].as_array().unwrap().len(), 1);

    keyward.cli_ok(&["key", "revoke", &id]);
    becomes(keyward, &new.secret, "key_inactive").await;
    becomes(keyward, &key.secret, "key_inactive").await;
    keyward.cli_ok(&["key", "update", &id, "--is-active", "true"]);
    becomes(keyward, &key.secret, "ok").await;

    keyward.cli_ok(&["key", "rotate", &id, "--now"]);
    becomes(keyward, &key.secret, "invalid_api_key").await;
    becomes(keyward, &new.secret, "ok").await;
    let again = keyward.cli(&["key", "rotate", &id, "--now"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("no old secrets"));

    let without = keyward.cli_json(&["key", "rotate", &id]);
    becomes(keyward, &new.secret, "invalid_api_key").await;
    becomes(keyward, without["key"].as_str().unwrap(), "ok").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_secrets_work_during_a_rotation_and_one_after_it_on_sqlite() {
    rotate_and_end(&patient(Keyward::new()).start().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_secrets_work_during_a_rotation_and_one_after_it_on_postgres_with_redis() {
    let postgres = Postgres::start().await;
    let url = postgres.create_platform().await;
    let redis = Redis::start().await;
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef").unwrap();
    rotate_and_end(&patient(Keyward::new().store(&url).redis(&redis.url(), &secret)).start().await).await;
}

/// Where nobody ends it, it ends by itself, with nothing told to anybody.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_secret_ends_by_itself() {
    let keyward = patient(Keyward::new()).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    let id = key.id.to_string();
    let new = keyward.cli_json(&["key", "rotate", &id, "--grace", "2s", "--hash", "sha256"]);
    becomes(&keyward, &key.secret, "ok").await;
    becomes(&keyward, &key.secret, "key_expired").await;
    becomes(&keyward, new["key"].as_str().unwrap(), "ok").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistyped_key_of_our_own_is_refused_before_any_look_up() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    becomes(&keyward, &key.mistyped(), "invalid_api_key").await;
    let looked_up = async || {
        let labels = [("cache", "record"), ("tier", "store")];
        keyward.count("keyward_cache_requests_total", &labels).await + keyward.bcrypt_runs().await
    };
    assert_eq!(looked_up().await, 0);
    becomes(&keyward, &key.secret, "ok").await;
    assert_eq!(looked_up().await, 2);
    // Known in memory by now, and refused all the same without a comparison.
    becomes(&keyward, &key.mistyped(), "invalid_api_key").await;
    assert_eq!(looked_up().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_key_is_unknown_and_its_history_stays() {
    let keyward = patient(Keyward::new()).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    let id = key.id.to_string();
    becomes(&keyward, &key.secret, "ok").await;
    let unasked = keyward.cli(&["key", "delete", &id]);
    assert_eq!(unasked.status.code(), Some(2), "what can't be undone wants --yes");
    assert!(String::from_utf8_lossy(&unasked.stderr).contains("--yes"));
    becomes(&keyward, &key.secret, "ok").await;
    keyward.cli_ok(&["key", "delete", &id, "--yes"]);
    becomes(&keyward, &key.secret, "invalid_api_key").await;
    let history = keyward.cli_json(&["key", "history", &id]);
    let actions: Vec<&str> =
        history.as_array().unwrap().iter().map(|entry| entry["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["key create", "key delete"]);
    assert!(!history[0]["actor"].as_str().unwrap().is_empty());
    assert!(!history.to_string().contains("sha256:"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_other_products_work_as_soon_as_they_are_imported() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let sha256 = |text: &str| {
        use sha2::Digest;
        sha2::Sha256::digest(text.as_bytes()).to_vec()
    };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let encoded =
        base64::Engine::encode(&base64::engine::general_purpose::STANDARD, sha256("unkey-22222222"));
    let bcrypt = bcrypt::hash("platform-44444", 4).unwrap();
    let rows = [
        json!({"name": "a", "user": "ada", "key_hash": hex(&sha256("litellm-111111")), "key_prefix": "litellm-"}),
        json!({"name": "b", "user": "ada", "key_hash": encoded, "key_prefix": "unkey-22"}),
        json!({"name": "c", "user": "ada", "key": "plaintext-3333", "allowed_models": ["gpt-*"]}),
        json!({"name": "d", "username": "ada", "key_hash": bcrypt, "key_prefix": "platform", "id": 99}),
    ];
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let report = import(&keyward, &["--format", "jsonl"], &text).1;
    assert_eq!((&report["imported"], &report["refused"]), (&json!(4), &json!(0)), "{report}");
    for secret in ["litellm-111111", "unkey-22222222", "plaintext-3333", "platform-44444"] {
        becomes(&keyward, secret, "ok").await;
    }
    becomes(&keyward, "unkey-2222222x", "invalid_api_key").await;
    // What was imported comes out as it went in, and what comes out goes in again.
    let exported = keyward.cli_json(&["key", "list"]);
    let mut again = exported[2].clone();
    assert_eq!(again["allowed_models"], json!(["gpt-*"]));
    again["key"] = json!("plaintext-4444");
    let report = import(&keyward, &["--format", "jsonl"], &again.to_string()).1;
    assert_eq!(report["imported"], 1, "{report}");
    becomes(&keyward, "plaintext-4444", "ok").await;
}

/// Runs `key import` with this on standard input: its exit code, what it printed, what it said.
fn import(keyward: &Keyward, arguments: &[&str], rows: &str) -> (Option<i32>, Value, String) {
    let command = [&["key", "import", "--output", "json"], arguments].concat();
    let output = keyward.cli_with_input(&command, rows);
    let printed = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), printed, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_rows_are_named_by_line_and_the_good_ones_go_in() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let rows = "name,user,key,allowed_ips,expires_at,rate_limit_per_minute\n\
                one,ada,kw_one-111111,10.0.0.0/8,,60\n\
                two,bob,kw_two-111111,,,\n\
                three,ada,short,,,\n\
                four,ada,kw_four-11111,10.0.0.0/99,,\n\
                five,ada,kw_five-11111,,,sixty\n\
                six,ada,kw_one-111111,,,\n\
                seven,ada,kw_seven-1111\n\
                eight,ada,kw_eight-1111,\"10.0.0.1,::1\",2099-01-01,\n";
    for arguments in [&["--format", "csv", "--dry-run"][..], &["--format", "csv", "--atomic"]] {
        let (code, report, said) = import(&keyward, arguments, rows);
        assert_eq!(code, Some(1), "{said}");
        assert_eq!(report["imported"], 0);
        assert_eq!(keyward.cli_json(&["key", "list"]), json!([]), "{arguments:?} changes nothing");
    }
    let (code, report, said) = import(&keyward, &["--format", "csv"], rows);
    assert_eq!(code, Some(1));
    assert_eq!((&report["rows"], &report["imported"], &report["refused"]), (&json!(8), &json!(2), &json!(6)));
    for told in [
        "line 3: there is no user \"bob\"",
        "line 4: the credential is too short",
        "line 5: allowed_ips: expected an address",
        "line 6: rate_limit_per_minute: expected a number",
        "line 7: the same key stands in an earlier line",
        "line 8: it has 3 cells, the header has 6",
    ] {
        assert!(said.contains(told), "{told}: {said}");
    }
    assert!(!said.contains("kw_two") && !report.to_string().contains("kw_two"), "no secret is repeated");
    let keys = keyward.cli_json(&["key", "list"]);
    assert_eq!(keys[1]["allowed_ips"], json!(["10.0.0.1", "::1"]));
    let (code, _, said) = import(&keyward, &["--format", "csv"], "name,usr,key\n");
    assert!(code == Some(2) && said.contains("unknown column \"usr\"; did you mean user?"), "{said}");
}

/// More rows than fit into one transaction, with one in the middle that the store refuses.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_store_refuses_costs_no_other_row() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let row = |number: u32| format!("k{number},ada,key-{number:08},kw_{number:05}\n");
    let rows: String = (0..1200).map(row).collect();
    let header = "name,user,key,tags\n";
    import(&keyward, &["--format", "csv", "--hash", "sha256"], &format!("{header}{}", row(777)));
    let (code, report, said) =
        import(&keyward, &["--format", "csv", "--hash", "sha256"], &format!("{header}{rows}"));
    assert_eq!(code, Some(1));
    assert_eq!((&report["imported"], &report["refused"]), (&json!(1199), &json!(1)), "{said}");
    assert!(said.contains("line 779: a key with this hash exists"), "{said}");
    let database = Connection::open(keyward.sqlite_file()).unwrap();
    let count: u32 = database.query_row("SELECT count(*) FROM api_keys", (), |row| row.get(0)).unwrap();
    assert_eq!(count, 1200);
}

/// A role that was let in before `migrate` made our tables may read them, one that came later may not, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn sidecars_with_select_alone_know_old_secrets_or_say_that_they_do_not() {
    let postgres = Postgres::start().await;
    let url = postgres.create_platform().await;
    let platform = postgres.client("platform").await;
    let grant = |role: &str| format!("CREATE ROLE {role} LOGIN; GRANT SELECT ON api_keys, users TO {role}");
    platform
        .batch_execute(&format!("{}; DROP TABLE keyward_old_secrets, keyward_history", grant("early")))
        .await
        .unwrap();
    let owner = Keyward::new().store(&url).start().await;
    owner.cli_ok(&["migrate"]);
    platform.batch_execute(&grant("late")).await.unwrap();
    owner.create_user("ada", &[]);
    let key = owner.create_key("ada", "ci", &["--hash", "sha256"]);
    owner.cli_ok(&["key", "rotate", &key.id.to_string(), "--grace", "1h", "--hash", "sha256"]);
    let early = Keyward::new().store(&postgres.url_as("early", "platform")).start().await;
    becomes(&early, &key.secret, "ok").await;
    let late = Keyward::new().store(&postgres.url_as("late", "platform")).start().await;
    becomes(&late, &key.secret, "invalid_api_key").await;
    assert!(late.log().contains("keyward_old_secrets can't be read"), "{}", late.log());
    assert!(!early.log().contains("keyward_old_secrets"), "{}", early.log());
}
