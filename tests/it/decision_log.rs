//! The decision log: what a line says, which lines there are, and that nobody waits for them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::program::run;
use crate::support::grpc::{Answer, Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Builder, Keyward};
use crate::support::{Stack, eventually};

/// A decision log in a folder of its own, which outlives the sidecar.
struct Log {
    folder: TempDir,
}

impl Log {
    fn new() -> Self {
        Self { folder: tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("decisions")
    }

    fn of(&self, builder: Builder) -> Builder {
        builder.arg("--decision-log", &self.path().display().to_string())
    }

    fn text(&self) -> String {
        fs::read_to_string(self.path()).unwrap()
    }

    fn lines(&self) -> Vec<Value> {
        let text = self.text();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
    }

    /// The line of the one request to this path.
    async fn line(&self, path: &str) -> Value {
        let found = eventually(async || {
            let text = fs::read_to_string(self.path()).ok()?;
            let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            lines.into_iter().find(|line| line["path"] == path)
        });
        found.await.unwrap_or_else(|| panic!("no line about {path}:\n{}", self.text()))
    }
}

/// Keyward without Envoy.
struct Asked {
    keyward: Keyward,
    authorizer: Authorizer,
}

impl Asked {
    async fn start(builder: Builder) -> Self {
        let keyward = builder.start().await;
        let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
        Self { keyward, authorizer }
    }

    async fn ask(&self, check: Check) -> Answer {
        self.authorizer.check(check.build(Encoding::Raw)).await
    }
}

fn anonymous(path: &str) -> Check {
    Check::new("GET", path).context_extension("anonymous", "allow")
}

/// These members of a line, in order.
fn picked<'a, const N: usize>(line: &'a Value, names: [&str; N]) -> [&'a str; N] {
    names.map(|name| {
        let value = line.get(name).unwrap_or_else(|| panic!("{name} is not in {line}"));
        if value.is_null() { "null" } else { value.as_str().unwrap_or_else(|| panic!("{name}: {line}")) }
    })
}

const WHO: [&str; 3] = ["key_id", "key_prefix", "user_id"];
const WHAT: [&str; 5] = ["decision", "reason", "rule", "shadow_reason", "tier"];

/// The examples of the page: as they are written, so that the order counts.
fn documented_names() -> Vec<Vec<String>> {
    let page =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/decision-log.md")).unwrap();
    let examples = page.lines().filter(|line| line.starts_with("{\"time\""));
    examples.map(names).collect()
}

fn names(line: &str) -> Vec<String> {
    let names = line.split(",\"").filter_map(|part| part.split("\":").next());
    names.map(|name| name.trim_start_matches(['{', '"']).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_decision_is_one_line_with_the_documented_names() {
    let log = Log::new();
    let stack = Stack::start_with(log.of(Keyward::new()).arg("--shadow", "models"), |envoy| {
        envoy.route("/open", "{anonymous: allow}")
    })
    .await;
    let user = stack.keyward.create_user("ada", &[]).to_string();
    let key = stack.keyward.create_key(
        "ada",
        "ci",
        &["--allowed-endpoints", "/v1/**", "--allowed-models", "gpt-4o"],
    );
    let (id, prefix, wrong) = (key.id.to_string(), &key.secret[..8], key.wrong());
    let envoy = stack.envoy.addr();

    let body = |model: &str| format!("{{\"model\":\"{model}\"}}");
    let allowed = Request::post("/v1/chat/completions?a=b", &body("gpt-4o")).bearer(&key.secret);
    let echo = allowed.send(envoy).await.echo();
    let line = log.line("/v1/chat/completions").await;
    assert_eq!(picked(&line, WHAT), ["allow", "ok", "null", "null", "store"]);
    assert_eq!(picked(&line, WHO), [&*id, prefix, &*user]);
    assert_eq!(picked(&line, ["method", "client", "model"]), ["POST", "127.0.0.1", "gpt-4o"]);
    assert_eq!(picked(&line, ["request_id"]), [echo.values("x-request-id")[0]]);
    assert!(line["duration_us"].as_u64().is_some_and(|took| took > 0), "{line}");
    let time = picked(&line, ["time"])[0];
    assert_eq!((time.len(), &time[19..20], &time[26..]), (27, ".", "Z"), "{time}");

    Request::post("/v1/completions", &body("o3")).bearer(&key.secret).send(envoy).await.echo();
    let line = log.line("/v1/completions").await;
    let [shadowed @ .., _] = picked(&line, WHAT);
    assert_eq!(shadowed, ["allow", "ok", "models", "model_not_allowed"]);

    for (path, secret, reason, rule, who) in [
        ("/v1/none", None, "missing_credentials", "null", ["null"; 3]),
        ("/v1/wrong", Some(&wrong), "invalid_api_key", "null", ["null", prefix, "null"]),
        ("/v2/x", Some(&key.secret), "endpoint_not_allowed", "endpoints", [&*id, prefix, &*user]),
    ] {
        let mut request = Request::get(path);
        if let Some(secret) = secret {
            request = request.bearer(secret);
        }
        let answer = request.send(envoy).await;
        let line = log.line(path).await;
        let [decision, own_reason, own_rule, shadow, _] = picked(&line, WHAT);
        assert_eq!([decision, own_reason, own_rule, shadow], ["deny", reason, rule, "null"]);
        assert_eq!(picked(&line, WHO), who, "{path}");
        assert_eq!(picked(&line, ["request_id"])[0], answer.value("x-request-id").unwrap(), "{path}");
    }

    Request::get("/open/x").send(envoy).await.echo();
    let line = log.line("/open/x").await;
    assert_eq!(picked(&line, WHAT), ["allow", "anonymous", "null", "null", "null"]);
    assert_eq!(picked(&line, WHO), ["null"; 3]);

    let documented = documented_names();
    assert_eq!(documented.len(), 7, "an example for every kind");
    for line in log.text().lines() {
        assert!(documented.iter().all(|example| *example == names(line)), "{documented:?}\n{line}");
    }
    assert_eq!(log.lines().len(), 6);
    let mode = fs::metadata(log.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_decided_has_its_cause_as_reason() {
    let log = Log::new();
    // Shorter than any bcrypt.
    let asked = Asked::start(log.of(Keyward::new()).arg("--check-timeout", "1ms")).await;
    asked.keyward.create_user("ada", &[]);
    let key = asked.keyward.create_key("ada", "ci", &[]);
    let answer = asked.ask(Check::new("GET", "/late").bearer(&key.secret)).await;
    assert_eq!(answer.http_status(), 503);
    let line = log.line("/late").await;
    assert_eq!(picked(&line, ["decision", "reason", "key_id"]), ["unavailable", "deadline", "null"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_has_every_denial_and_its_share_of_the_rest() {
    const ALLOWED: usize = 400;
    for (sample, range) in [("denials", 0..=0), ("25%", 50..=150), ("all", ALLOWED..=ALLOWED)] {
        let log = Log::new();
        let asked = Asked::start(log.of(Keyward::new()).arg("--decision-log-sample", sample)).await;
        for _ in 0..ALLOWED {
            assert!(asked.ask(anonymous("/allowed")).await.allows());
        }
        for _ in 0..10 {
            assert!(!asked.ask(Check::new("GET", "/denied")).await.allows());
        }
        let status = asked.keyward.sigterm_and_wait().await;
        assert!(status.success(), "{status}");
        let lines = log.lines();
        let of = |decision: &str| lines.iter().filter(|line| line["decision"] == decision).count();
        assert_eq!(of("deny"), 10, "{sample}");
        assert!(range.contains(&of("allow")), "{sample}: {}", of("allow"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_off_by_default_and_goes_to_standard_output_when_asked_to() {
    let silent = Asked::start(Keyward::new()).await;
    silent.ask(anonymous("/x")).await;
    let speaking = Asked::start(Keyward::new().arg("--decision-log", "stdout")).await;
    speaking.ask(anonymous("/x")).await;
    let line = eventually(async || speaking.keyward.stdout().lines().next().map(str::to_owned)).await;
    let line: Value = serde_json::from_str(&line.expect("a line")).unwrap();
    assert_eq!(line["path"], "/x");
    assert_eq!(silent.keyward.stdout(), "");
    assert_eq!(silent.keyward.count("keyward_decision_log_dropped_total", &[]).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_in_it_wherever_a_caller_puts_it() {
    let log = Log::new();
    let builder = log.of(Keyward::new()).arg("--credential-sources", "bearer,x-api-key,query:key");
    let asked = Asked::start(builder).await;
    asked.keyward.create_user("ada", &[]);
    let key = asked.keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    let (secret, wrong) = (&*key.secret, key.wrong());
    let foreign = "sk-foreign-canary-0123456789";
    let escaped = |key: &str| key.replacen(['a', 'b', 'c', 'd', 'e', '1', '2', '3', '_'], "%5f", 1);
    let fully_escaped: String = secret.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let get = |path: &str| Check::new("GET", path);
    let checks = [
        get("/1").bearer(secret),
        get(&format!("/2?key={secret}")),
        get(&format!("/3/{secret}/x")),
        get(&format!("/4/{secret}")).bearer(secret),
        get(&format!("/5/{}", &secret[8..])).bearer(secret),
        get(&format!("/6/{fully_escaped}")).bearer(secret),
        get(&format!("/7/{fully_escaped}")),
        get(&format!("/8/{}/%zz", escaped(secret))).bearer(secret),
        get(&format!("/9/{wrong}")).bearer(&wrong),
        get(&format!("/10/{foreign}")).bearer(foreign),
        get(&format!("/11/{foreign}")).header("x-api-key", format!("{foreign},{secret}")),
        get(&format!("/12/{foreign}")).bearer(secret).header("x-api-key", foreign),
        get(&format!("/13/{foreign}")).header("x-goog-api-key", foreign),
        get(&format!("/14/{}{foreign}", "x".repeat(1015))).bearer(foreign),
        get("/15").bearer(foreign).header("x-request-id", foreign),
        get("/16").bearer(foreign).header("x-request-id", &foreign[8..]),
        Check::new(foreign, "/17").bearer(foreign),
    ];
    let count = checks.len();
    for check in checks {
        for encoding in [Encoding::Raw, Encoding::Joined] {
            asked.authorizer.check(check.clone().build(encoding)).await;
        }
    }
    asked.ask(get("/last")).await;
    log.line("/last").await;
    let text = log.text();
    assert_eq!(text.lines().count(), 2 * count + 1);
    for (what, part) in [
        ("the key", &secret[8..]),
        ("the end of the key", &secret[30..]),
        ("the escaped key", &fully_escaped[24..]),
        ("a wrong key", &wrong[8..]),
        ("a foreign key", &foreign[8..]),
        ("the middle of a foreign key", &foreign[11..17]),
    ] {
        assert!(!text.contains(part), "{what} is in the log:\n{text}");
    }
    assert!(text.contains("[redacted]"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_caller_sends_stays_within_its_line_and_its_bounds() {
    let log = Log::new();
    let asked = Asked::start(log.of(Keyward::new())).await;
    let odd = "/a\n{\"decision\":\"allow\"}\u{1b}[2J\u{9b}31mü\u{202e}";
    asked.ask(Check::new("GET\r\nX", odd)).await;
    asked.ask(Check::new(&"M".repeat(5000), &format!("/{}?secret=query", "ü".repeat(5000)))).await;
    log.line(odd).await;
    let line = eventually(async || log.lines().get(1).cloned()).await.unwrap();
    let text = log.text();
    assert!(text.bytes().all(|byte| byte == b'\n' || (b' '..=b'~').contains(&byte)), "{text}");
    assert_eq!(text.lines().count(), 2);
    let [method, path] = picked(&line, ["method", "path"]);
    assert_eq!((method.len(), path.len()), (128 + '…'.len_utf8(), 1023 + '…'.len_utf8()));
    assert!(path.ends_with('…') && !text.contains("query"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_delays_neither_a_check_nor_the_end() {
    let log = Log::new();
    assert!(Command::new("mkfifo").arg(log.path()).status().unwrap().success());
    // Nobody has it open: the sidecar starts and answers all the same.
    let asked = Asked::start(log.of(Keyward::new())).await;
    assert!(asked.ask(anonymous("/x")).await.allows());
    let status = asked.keyward.sigterm_and_wait().await;
    assert!(status.success(), "{status}");

    // Somebody has it open and does not read. What fits: a pipe of 64 KiB, a batch, 4096 lines.
    let reader = fs::OpenOptions::new().read(true).write(true).open(log.path()).unwrap();
    let asked = Asked::start(log.of(Keyward::new())).await;
    let path = format!("/{}", "x".repeat(1000));
    let dropped = async || asked.keyward.count("keyward_decision_log_dropped_total", &[]).await;
    let mut asks = 0;
    while dropped().await == 0 {
        for _ in 0..500 {
            assert!(asked.ask(anonymous(&path)).await.allows());
        }
        asks += 500;
        assert!(asks < 10_000, "nothing is dropped");
    }
    assert!(asks > 4096, "dropped too early: {asks}");
    // A reload that can't reopen says so and goes on.
    asked.keyward.hangup();
    let failed = eventually(async || {
        (asked.keyward.count("keyward_reloads_total", &[("result", "failed")]).await == 1).then_some(())
    });
    assert!(failed.await.is_some());
    assert!(asked.ask(anonymous("/x")).await.allows());
    let status = asked.keyward.sigterm_and_wait().await;
    assert!(status.success(), "{status}");
    drop(reader);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_file_is_left_behind_at_sighup() {
    let log = Log::new();
    let asked = Asked::start(log.of(Keyward::new())).await;
    asked.ask(anonymous("/before")).await;
    log.line("/before").await;
    let old = log.folder.path().join("decisions.1");
    fs::rename(log.path(), &old).unwrap();
    // Without the signal it goes on where it was.
    asked.ask(anonymous("/between")).await;
    let between = eventually(async || fs::read_to_string(&old).unwrap().contains("/between").then_some(()));
    assert!(between.await.is_some());
    asked.keyward.hangup();
    assert!(eventually(async || log.path().exists().then_some(())).await.is_some());
    asked.ask(anonymous("/after")).await;
    log.line("/after").await;
    assert_eq!(log.lines().len(), 1);
    assert_eq!(fs::read_to_string(&old).unwrap().lines().count(), 2);
    assert_eq!(fs::metadata(log.path()).unwrap().permissions().mode() & 0o777, 0o600);

    // The folder is gone: the open file stays in use.
    let moved = log.folder.path().with_extension("moved");
    fs::rename(log.folder.path(), &moved).unwrap();
    asked.keyward.hangup();
    let failed = eventually(async || {
        (asked.keyward.count("keyward_reloads_total", &[("result", "failed")]).await == 1).then_some(())
    });
    assert!(failed.await.is_some());
    asked.ask(anonymous("/later")).await;
    let file = moved.join("decisions");
    let later = eventually(async || fs::read_to_string(&file).unwrap().contains("/later").then_some(()));
    assert!(later.await.is_some());
    fs::rename(&moved, log.folder.path()).unwrap();
}

#[test]
fn a_file_that_cannot_be_opened_is_refused_at_start() {
    let folder = tempdir().unwrap();
    let ended = run(folder.path(), &["serve", "--decision-log", "/nonexistent/log"]);
    assert_eq!(ended.code, 2);
    assert!(ended.stderr.contains("error: open --decision-log /nonexistent/log"), "{}", ended.stderr);
}
