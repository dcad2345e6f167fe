//! `keyward check`: the decision that Envoy would get, and why.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::program::{Ended, keyward, run};
use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::Keyward;
use crate::support::port;

/// Runs `keyward check --key-stdin …` with this on standard input.
fn check(folder: &Path, input: &str, options: &[&str]) -> Ended {
    let mut command = keyward(folder, &[&["check", "--key-stdin"], options].concat());
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}

fn report(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.stderr))
}

fn step<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["steps"].as_array().unwrap().iter().find(|step| step["step"] == name).unwrap()
}

/// A store in the folder's `keyward.db`, with a user `ada`; nobody serves it.
struct Store(TempDir);

impl Store {
    fn new() -> Self {
        let store = Self(tempdir().unwrap());
        store.ok(&["migrate"]);
        store.ok(&["user", "create", "--username", "ada", "--email", "ada@example.com"]);
        store
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let ended = run(self.path(), arguments);
        assert_eq!(ended.code, 0, "{arguments:?}: {}", ended.stderr);
        ended.stdout
    }

    /// The secret, with the line break that it was printed with.
    fn key(&self, options: &[&str]) -> String {
        self.ok(&[&["key", "create", "--user", "ada", "--name", "ci", "--hash", "sha256"], options].concat())
    }

    fn sql(&self, text: &str) {
        rusqlite::Connection::open(self.path().join("keyward.db")).unwrap().execute_batch(text).unwrap();
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn check(&self, key: &str, options: &[&str]) -> Ended {
        check(self.path(), key, options)
    }

    fn json(&self, key: &str, options: &[&str]) -> (i32, Value) {
        let ended = self.check(key, &[options, &["--output", "json"]].concat());
        (ended.code, report(&ended))
    }
}

const STEPS: [&str; 12] = [
    "format",
    "record",
    "proof",
    "active",
    "expiry",
    "owner",
    "policy",
    "ips",
    "endpoints",
    "scopes",
    "models",
    "budget",
];

#[test]
fn an_allowed_request_is_0_and_every_step_says_why() {
    let store = Store::new();
    let key = store.key(&[
        "--allowed-models",
        "gpt-*",
        "--allowed-ips",
        "10.0.0.0/8,192.0.2.1",
        "--scopes",
        "chat",
        "--budget-limit-cents",
        "100",
    ]);
    let body = store.file("body.json", r#"{"model":"gpt-4o"}"#);
    let options = ["--body", body.to_str().unwrap(), "--ip", "10.1.2.3", "--required-scopes", "chat"];
    let (code, report) = store.json(&key, &options);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["decision"], "allow");
    assert_eq!(
        (&report["reason"], &report["status"], &report["tier"]),
        (&Value::Null, &json!(200), &json!("store"))
    );
    assert_eq!(report["key_id"], 1);
    let names: Vec<_> = report["steps"].as_array().unwrap().iter().map(|step| &step["step"]).collect();
    assert_eq!(names, STEPS);
    assert!(report["steps"].as_array().unwrap().iter().all(|step| step["outcome"] == "passed"), "{report}");
    assert_eq!(step(&report, "record")["source"], "store");
    assert!(step(&report, "record")["age_seconds"].as_f64().unwrap() < 20.0);
    assert_eq!(step(&report, "proof")["source"], "sha256");
    assert_eq!(step(&report, "ips")["facts"], "allowed_ips has 2 entries; client 10.1.2.3");
    assert_eq!(step(&report, "models")["facts"], "allowed_models: gpt-*; asks for gpt-4o (body)");
    assert_eq!(step(&report, "budget")["facts"], "spent 0 of 100 cents");
    assert_eq!(report["headers"]["x-keyward-model"], "gpt-4o");
    assert_eq!(report["headers"]["x-keyward-key-id"], "1");

    let table = store.check(&key, &options);
    assert_eq!((table.code, table.stderr.as_str()), (0, ""));
    assert_eq!(table.stdout.lines().filter(|line| line.starts_with("✓ ")).count(), STEPS.len());
    assert!(table.stdout.contains("\nallow\n") && table.stdout.contains("  x-keyward-model: gpt-4o"));
    assert!(!table.stdout.contains('\x1b'), "colours are for terminals");
    // With the carriage return of another system, and without any line break.
    for input in [key.trim_end(), &key.replace('\n', "\r\n")] {
        assert_eq!(store.check(input, &options).code, 0);
    }
}

/// What is changed in the row, what is asked, which step says no and with which word.
#[test]
fn each_denial_is_1_and_names_the_step_that_decided() {
    const NOTHING: &str = "SELECT 1";
    let body = |store: &Store| store.file("body.json", r#"{"model":"claude-3"}"#).display().to_string();
    let cases: [(&str, &[&str], &str, &str); 12] = [
        ("UPDATE api_keys SET is_active = 0", &[], "active", "key_inactive"),
        (NOTHING, &["--deny-file", "deny"], "active", "key_inactive"),
        ("UPDATE api_keys SET expires_at = '2020-01-01 00:00:00'", &[], "expiry", "key_expired"),
        ("UPDATE users SET is_active = 0", &[], "owner", "user_inactive"),
        ("UPDATE api_keys SET allowed_models = '{}'", &[], "policy", "policy_invalid"),
        (
            "UPDATE api_keys SET allowed_ips = '[\"10.0.0.0/8\"]'",
            &["--ip", "11.0.0.1"],
            "ips",
            "ip_not_allowed",
        ),
        (
            "UPDATE api_keys SET allowed_endpoints = '[\"/v1/models\"]'",
            &[],
            "endpoints",
            "endpoint_not_allowed",
        ),
        (
            "UPDATE api_keys SET allowed_endpoints = '[\"/v1/**\"]'",
            &["--path", "/v1/../admin?x=1"],
            "endpoints",
            "ambiguous_request",
        ),
        (NOTHING, &["--required-scopes", "admin"], "scopes", "scope_missing"),
        (
            "UPDATE api_keys SET allowed_models = '[\"gpt-*\"]'",
            &["--body", "BODY"],
            "models",
            "model_not_allowed",
        ),
        (
            "UPDATE api_keys SET allowed_models = '[\"gpt-*\"]'",
            &["--model", "m"],
            "models",
            "model_not_allowed",
        ),
        (
            "UPDATE api_keys SET budget_limit_cents = 100, total_cost = 120",
            &[],
            "budget",
            "insufficient_quota",
        ),
    ];
    for (sql, options, decided_by, reason) in cases {
        let store = Store::new();
        let key = store.key(&[]);
        store.file("deny", "key-id 1\n");
        store.sql(sql);
        let body = body(&store);
        let options: Vec<&str> =
            options.iter().map(|option| if *option == "BODY" { body.as_str() } else { option }).collect();
        let (code, report) = store.json(&key, &options);
        assert_eq!(
            (code, &report["decision"], &report["reason"]),
            (1, &json!("deny"), &json!(reason)),
            "{report}"
        );
        assert_eq!(report["headers"]["x-keyward-reason"], reason);
        let decided = step(&report, decided_by);
        assert_eq!((&decided["outcome"], &decided["reason"]), (&json!("failed"), &json!(reason)), "{report}");
        let position = STEPS.iter().position(|name| *name == decided_by).unwrap();
        for (index, step) in report["steps"].as_array().unwrap().iter().enumerate() {
            let expected = match index.cmp(&position) {
                std::cmp::Ordering::Less => "passed",
                std::cmp::Ordering::Equal => "failed",
                std::cmp::Ordering::Greater => "not_reached",
            };
            assert_eq!(step["outcome"], expected, "{reason}: {step}");
        }
        let table = store.check(&key, &options);
        assert_eq!(table.code, 1);
        let status = report["status"].as_i64().unwrap();
        assert!(table.stdout.contains(&format!("\ndeny: {status} {reason}\n")), "{}", table.stdout);
        assert!(table.stdout.contains(&format!("\n✗ {decided_by}")), "{}", table.stdout);
    }
}

#[test]
fn a_rule_in_shadow_mode_is_told_and_denies_nothing() {
    let store = Store::new();
    let key = store.key(&[]);
    let options = ["--required-scopes", "admin", "--shadow", "scopes"];
    let (code, report) = store.json(&key, &options);
    assert_eq!((code, &report["shadow_reason"]), (0, &json!("scope_missing")), "{report}");
    assert_eq!(step(&report, "scopes")["outcome"], "shadowed");
    assert!(store.check(&key, &options).stdout.contains("\n~ scopes"));
}

#[test]
fn a_key_that_is_unknown_wrong_or_none_is_told_apart_for_the_operator() {
    let store = Store::new();
    let key = store.key(&[]);
    let wrong = format!("{}zzz", &key[..8]);
    let mistyped = format!("{}{}{}", &key[..20], if &key[20..21] == "z" { "y" } else { "z" }, &key[21..]);
    let looks = "the key looks like one that was made here, but its checksum is wrong: mistyped, or cut off";
    for (input, failed, reason, facts) in [
        (mistyped.as_str(), "format", "invalid_api_key", looks),
        ("zz_nosuchkey", "record", "invalid_api_key", "no key has this prefix; the store was asked"),
        (wrong.as_str(), "proof", "invalid_api_key", "the key matches none of these, by SHA-256"),
        ("short", "format", "malformed_credentials", "the credential is too short to be a key"),
    ] {
        let (code, report) = store.json(input, &[]);
        assert_eq!(
            (code, &report["reason"], &report["key_id"]),
            (1, &json!(reason), &Value::Null),
            "{report}"
        );
        let step = step(&report, failed);
        assert_eq!((&step["outcome"], &step["facts"]), (&json!("failed"), &json!(facts)));
    }
    let two_lines = format!("{key}{key}");
    assert_eq!(store.json(&two_lines, &[]).1["reason"], "malformed_credentials");
    store.sql("UPDATE api_keys SET key_hash = '$2x$10$abc'");
    let (_, report) = store.json(&key, &[]);
    assert!(
        step(&report, "record")["facts"].as_str().unwrap().contains("key 1 (key_hash is of the $2x$ form")
    );
    assert_eq!(
        step(&report, "proof")["facts"],
        "the key matches none of these, there is no hash to compare with"
    );
}

#[test]
fn what_is_no_question_is_2_and_says_what_is_missing() {
    let store = Store::new();
    let key = store.key(&[]);
    for (input, options, text) in [
        ("", &[][..], "no key on standard input"),
        ("\n", &[], "no key on standard input"),
        (&key, &["--path", "v1"], "the path does not begin with /"),
        (&key, &["--method", "G T"], "the method"),
        (&key, &["--body", "none.json"], "none.json"),
        (&key, &["--deny-file", "none"], "--deny-file"),
    ] {
        for running in [&[][..], &["--running"]] {
            if options.contains(&"--deny-file") && !running.is_empty() {
                continue;
            }
            let ended = store.check(input, &[options, running].concat());
            assert_eq!((ended.code, ended.stdout.as_str()), (2, ""), "{options:?}");
            assert!(ended.stderr.contains(text), "{}", ended.stderr);
        }
    }
    let ended = run(store.path(), &["check"]);
    assert_eq!(ended.code, 2);
    assert!(ended.stderr.contains("--key-stdin < FILE"), "{}", ended.stderr);
}

#[test]
fn what_can_not_be_decided_is_3_and_creates_nothing() {
    const KEY: &str = "kw_0123456789";
    let folder = tempdir().unwrap();
    let ended = check(folder.path(), KEY, &[]);
    assert_eq!((ended.code, ended.stdout.as_str()), (3, ""));
    assert!(ended.stderr.contains("the store can't be reached"), "{}", ended.stderr);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "a file was created");

    let nobody = port::free_addr().to_string();
    let postgres = format!("postgres://{nobody}/platform");
    let ended = check(folder.path(), KEY, &["--store", &postgres, "--output", "json"]);
    let report = report(&ended);
    assert_eq!(
        (ended.code, &report["decision"], &report["cause"]),
        (3, &json!("unavailable"), &json!("store"))
    );
    assert_eq!((&report["status"], &report["reason"]), (&json!(503), &json!("unavailable")));
    assert_eq!(step(&report, "record")["outcome"], "undecided");
    assert!(ended.stderr.contains("Connection refused"), "{}", ended.stderr);

    let ended = check(folder.path(), KEY, &["--running", "--admin-listen", &nobody]);
    assert_eq!((ended.code, ended.stdout.as_str()), (3, ""));
    assert!(ended.stderr.contains(&nobody), "{}", ended.stderr);
}

/// A sidecar whose store outlives it.
async fn sidecar() -> (Keyward, TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let file = folder.path().join("keyward.db");
    let keyward = Keyward::new().store(&format!("sqlite:{}", file.display())).arg("--log-level", "trace");
    let keyward = keyward.start().await;
    keyward.create_user("ada", &[]);
    (keyward, folder, file)
}

fn ask_running(admin: SocketAddr, key: &str, options: &[&str]) -> (Ended, Value) {
    let folder = tempdir().unwrap();
    let admin = admin.to_string();
    let options = [options, &["--running", "--admin-listen", &admin, "--output", "json"]].concat();
    let ended = check(folder.path(), key, &options);
    let report = report(&ended);
    (ended, report)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sidecar_answers_from_its_caches_and_nothing_counts_as_a_use() {
    let (keyward, _folder, file) = sidecar().await;
    let key = keyward.create_key("ada", "ci", &[]);
    let ask =
        || ask_running(keyward.admin_addr(), &key.secret, &["--method", "GET", "--path", "/v1/models"]).1;
    let first = ask();
    assert_eq!((&first["decision"], &first["tier"]), (&json!("allow"), &json!("store")), "{first}");
    assert_eq!(step(&first, "proof")["source"], "bcrypt");
    // The feed may yet bring the news of the key's creation, and drop the record once.
    let from_memory = eventually(async || Some(ask()).filter(|told| told["tier"] == "memory")).await;
    let second = from_memory.expect("memory knows the key");
    let record = step(&second, "record");
    assert_eq!((&second["tier"], &record["source"]), (&json!("memory"), &json!("memory")), "{second}");
    assert_eq!(step(&second, "proof")["source"], "memory");
    let (age, feed) = (record["age_seconds"].as_f64().unwrap(), &record["feed"]);
    assert!(age > 0.0 && feed["proven_seconds_ago"].as_f64().unwrap() <= age, "{record}");
    assert_eq!((&feed["mode"], &feed["suspect"]), (&json!("feed"), &json!(false)), "{record}");
    assert_eq!(feed["covered"], true);
    assert_eq!(keyward.bcrypt_runs().await, 1);

    // What Envoy asks finds what was learnt, and the counters of checks know nothing of the explanations.
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    assert_eq!(keyward.count("keyward_checks_total", &[]).await, 0);
    let asked = Check::new("GET", "/v1/models").bearer(&format!("{}x", &key.secret)).build(Encoding::Raw);
    assert!(!authorizer.check(asked).await.allows());
    assert_eq!(keyward.count("keyward_checks_total", &[]).await, 1);
    // What waits to be written is written on the way out.
    assert!(keyward.sigterm_and_wait().await.success());
    let used: Option<String> = rusqlite::Connection::open(file)
        .unwrap()
        .query_row("SELECT last_used_at FROM api_keys", [], |row| row.get(0))
        .unwrap();
    assert_eq!(used, None);
}

/// Each of these, asked by Envoy's message and by the command, cold and from memory.
#[tokio::test(flavor = "multi_thread")]
async fn the_explanation_is_about_the_decision_that_envoy_gets() {
    let (keyward, _folder, _file) = sidecar().await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let create =
        |options: &[&str]| keyward.create_key("ada", "ci", &[&["--hash", "sha256"], options].concat());
    let open = create(&[]);
    let revoked = create(&[]);
    keyward.cli_ok(&["key", "revoke", &revoked.id.to_string()]);
    let limited = create(&["--allowed-models", "gpt-*", "--allowed-ips", "10.0.0.0/8", "--scopes", "chat"]);
    // key, address, path, route's model, route's scopes
    let cases = [
        (open.secret.clone(), "10.0.0.1", "/v1/models", "", ""),
        (open.wrong(), "10.0.0.1", "/v1/models", "", ""),
        ("zz_nosuchkey".to_owned(), "10.0.0.1", "/v1/models", "", ""),
        ("short".to_owned(), "10.0.0.1", "/v1/models", "", ""),
        (open.secret.clone(), "10.0.0.1", "/v1/models", "", "admin"),
        (revoked.secret.clone(), "10.0.0.1", "/v1/models", "", ""),
        (limited.secret.clone(), "10.0.0.1", "/v1/chat/completions", "gpt-4o", "chat"),
        (limited.secret.clone(), "11.0.0.1", "/v1/chat/completions", "gpt-4o", "chat"),
        (limited.secret.clone(), "10.0.0.1", "/v1/chat/completions", "claude-3", "chat"),
        (limited.secret.clone(), "10.0.0.1", "/v1/chat/completions", "", "chat"),
        (limited.secret.clone(), "10.0.0.1", "/v1/messages", "", "chat"),
    ];
    for round in ["cold", "from memory"] {
        for (key, ip, path, model, scopes) in &cases {
            let mut options = vec!["--ip", ip, "--path", path];
            let mut asked = Check::new("POST", path).bearer(key).source(ip);
            for (flag, name, value) in
                [("--model", "model", model), ("--required-scopes", "required_scopes", scopes)]
            {
                if !value.is_empty() {
                    options.extend([flag, value]);
                    asked = asked.context_extension(name, value);
                }
            }
            let (_, told) = ask_running(keyward.admin_addr(), key, &options);
            let answer = authorizer.check(asked.build(Encoding::Raw)).await;
            assert_eq!(told["decision"] == "allow", answer.allows(), "{round} {options:?}: {told}");
            assert_eq!(told["status"], answer.http_status(), "{round} {options:?}: {told}");
            assert_eq!(told["reason"].as_str(), answer.header("x-keyward-reason"), "{round} {options:?}");
            for (name, value) in told["headers"].as_object().unwrap() {
                assert_eq!(answer.header(name), value.as_str(), "{round} {options:?} {name}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_and_its_hash_are_in_no_output_and_no_log() {
    let (keyward, _folder, file) = sidecar().await;
    let key = keyward.create_key("ada", "ci", &[]);
    let hash: String = rusqlite::Connection::open(&file)
        .unwrap()
        .query_row("SELECT key_hash FROM api_keys", [], |row| row.get(0))
        .unwrap();
    let store = format!("sqlite:{}", file.display());
    let admin = keyward.admin_addr().to_string();
    let mut seen = String::new();
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    authorizer.check(Check::new("GET", "/v1/models").build(Encoding::Raw)).await;
    for secret in [&key.secret, &key.wrong()] {
        for place in [&["--store", &store][..], &["--running", "--admin-listen", &admin]] {
            for format in ["table", "json"] {
                let ended = check(file.parent().unwrap(), secret, &[place, &["--output", format]].concat());
                seen.extend([ended.stdout, ended.stderr]);
            }
        }
    }
    // What is wrong with the question is told without repeating it.
    let bad = [
        format!(r#"{{"key":"{}","method":"GET","pth":"/"}}"#, key.secret),
        format!(r#"{{"key":{{"{}":1}},"method":"GET","path":"/"}}"#, key.secret),
        format!(r#"{{"key":"a","method":"GET","path":"/","{}":1}}"#, key.secret),
        format!(r#"{{"key":"{0}","method":"{0}","path":"/"}}"#, key.secret),
        key.secret.clone(),
    ];
    for text in bad {
        let response = Request::post("/check", &text).send(keyward.admin_addr()).await;
        assert!((400..500).contains(&response.status), "{}", response.status);
        seen.push_str(&response.text());
    }
    seen.push_str(&keyward.log());
    assert!(seen.contains("TRACE") && seen.contains(&key.secret[..8]));
    for secret in [&key.secret[8..key.secret.len() - 1], &hash, &hash[29..]] {
        assert!(!seen.contains(secret), "a secret was told");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_takes_json_of_a_bounded_size_and_nothing_else() {
    let (keyward, _folder, _file) = sidecar().await;
    let key = keyward.create_key("ada", "ci", &["--hash", "sha256", "--allowed-models", "gpt-*"]);
    let send = async |request: Request| request.send(keyward.admin_addr()).await;
    let described = |more: &str| {
        format!(r#"{{"key":"{}","method":"POST","path":"/v1/chat/completions"{more}}}"#, key.secret)
    };
    let text = described(r#","body":"{\"model\":\"gpt-4o\"}""#);
    let answer = send(Request::post("/check", &text)).await;
    assert_eq!((answer.status, &answer.json()["decision"]), (200, &json!("allow")), "{}", answer.text());
    let base64 = described(r#","body_base64":"eyJtb2RlbCI6ImNsYXVkZSJ9""#);
    let answer = send(Request::post("/check", &base64)).await;
    assert_eq!((answer.status, &answer.json()["reason"]), (200, &json!("model_not_allowed")));
    for more in [r#","body":"a","body_base64":"YQ==""#, r#","body_base64":"?""#] {
        assert_eq!(send(Request::post("/check", &described(more))).await.status, 400, "{more}");
    }
    // A page in somebody's browser can send this without being asked.
    assert_eq!(send(Request::post_as("text/plain", "/check", &text)).await.status, 415);
    assert_eq!(send(Request::get("/check")).await.status, 405);
    let large = format!(r#","body":"{}""#, "x".repeat(9 << 20));
    assert_eq!(send(Request::post("/check", &described(&large))).await.status, 400);
    let announced = Request::new("POST", "/check")
        .header("content-type", "application/json")
        .header("content-length", (13 << 20).to_string());
    assert_eq!(send(announced).await.status, 413);
}
