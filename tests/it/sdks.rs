//! The SDKs that callers use (OpenAI's, Anthropic's and Google's, from `PyPI`), through a real Envoy: a good key works, and
//! each refusal is the SDK's own error for it, repeated only where that can help. `scripts/sdk_test.py` does the asking.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use keyward::domain::denial::Denial;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::support::PATIENCE;
use crate::support::envoy::Envoy;
use crate::support::keyward::Keyward;
use crate::support::postgres::Postgres;

#[tokio::test(flavor = "multi_thread")]
async fn openai_callers_are_answered_or_told_why_not_and_do_not_insist() {
    is_answered_or_told_why_not("openai").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anthropic_callers_are_answered_or_told_why_not_and_do_not_insist() {
    is_answered_or_told_why_not("anthropic").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn google_callers_are_answered_or_told_why_not_and_do_not_insist() {
    is_answered_or_told_why_not("google").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_callers_with_many_wrong_keys_meet_a_rate_limit_error() {
    is_limited_for_guesses("openai").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anthropic_callers_with_many_wrong_keys_meet_a_rate_limit_error() {
    is_limited_for_guesses("anthropic").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn google_callers_with_many_wrong_keys_meet_a_rate_limit_error() {
    is_limited_for_guesses("google").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_callers_wait_as_told_and_outlast_an_outage() {
    outlasts_an_outage("openai").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anthropic_callers_wait_as_told_and_outlast_an_outage() {
    outlasts_an_outage("anthropic").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn google_callers_try_again_and_outlast_an_outage() {
    outlasts_an_outage("google").await;
}

async fn is_answered_or_told_why_not(sdk: &str) {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let create = |name: &str, options: &[&str]| {
        let options = [&["--hash", "sha256"], options].concat();
        keyward.create_key("ada", name, &options)
    };
    let good = create("good", &[]);
    let revoked = create("revoked", &[]);
    keyward.cli_ok(&["key", "revoke", &revoked.id.to_string()]);
    let keys = json!({
        "good": good.secret,
        "wrong": good.wrong(),
        "malformed": "short",
        "revoked": revoked.secret,
        "spent": create("spent", &["--budget-limit-cents", "0"]).secret,
        "models": create("models", &["--allowed-models", "allowed-*"]).secret,
        "elsewhere": create("elsewhere", &["--allowed-endpoints", "/v1/embeddings"]).secret,
    });
    let mut caller = Caller::start(sdk, &keyward).await;
    caller.run("works and is refused", &keys).await;
    drop(keyward);
    caller.run("finds nobody", &keys).await;
}

async fn is_limited_for_guesses(sdk: &str) {
    let keyward = Keyward::new().arg("--attempts-per-minute", "1").start().await;
    keyward.create_user("ada", &[]);
    let good = keyward.create_key("ada", "good", &["--hash", "sha256"]);
    let keys = json!({ "good": good.secret, "mistyped": good.mistyped(), "wrong": good.wrong() });
    Caller::start(sdk, &keyward).await.run("is limited for guesses", &keys).await;
}

async fn outlasts_an_outage(sdk: &str) {
    let mut postgres = Postgres::start().await;
    let url = postgres.create_platform().await;
    let keyward = Keyward::new().store(&url).start().await;
    keyward.create_user("ada", &[]);
    // Never used before the outage: what is known goes on for a while without the store.
    let fresh = keyward.create_key("ada", "fresh", &["--hash", "sha256"]);
    let keys = json!({ "fresh": fresh.secret });
    let mut caller = Caller::start(sdk, &keyward).await;
    postgres.kill();
    caller.run("is told to wait", &keys).await;
    caller.ask("outlasts an outage", &keys).await;
    caller.await_line("refused").await;
    postgres.start_again().await;
    caller.await_line("done").await;
}

/// A program that uses one SDK, with Envoy between it and a stand-in for an LLM, which is in the same process.
struct Caller {
    lines: Lines<BufReader<ChildStdout>>,
    stdin: ChildStdin,
    envoy: Envoy,
    folder: TempDir,
    /// Killed when dropped.
    _process: Child,
}

impl Caller {
    async fn start(sdk: &str, keyward: &Keyward) -> Self {
        let folder = tempfile::Builder::new().prefix("keyward-sdk-").tempdir().expect("make a folder");
        let log = std::fs::File::create(folder.path().join("log")).expect("create the log file");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/sdk_test.py");
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(python())
            .arg("-B")
            .args([script.as_os_str(), sdk.as_ref()])
            // Keys, addresses and proxies of the person who runs the tests are none of an SDK's business.
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("start a child with setpriv (Debian: util-linux)");
        let stdin = process.stdin.take().expect("stdin is piped");
        let stdout = process.stdout.take().expect("stdout is piped");
        let mut lines = BufReader::new(stdout).lines();
        let port = next_line(&mut lines, folder.path()).await;
        let llm = SocketAddr::from(([127, 0, 0, 1], port.parse().expect("the script says its port first")));
        let envoy = Envoy::new(keyward.grpc_addr(), llm).start().await;
        Self { lines, stdin, envoy, folder, _process: process }
    }

    /// Runs one part of the script to its end.
    async fn run(&mut self, part: &str, keys: &Value) {
        self.ask(part, keys).await;
        self.await_line("done").await;
    }

    async fn ask(&mut self, part: &str, keys: &Value) {
        // What is said of a body depends on the body.
        let told = Denial::ALL.into_iter().filter(|denial| *denial != Denial::AmbiguousRequest);
        let messages: Map<String, Value> =
            told.map(|denial| (denial.code().to_owned(), denial.message().into())).collect();
        let url = format!("http://{}", self.envoy.addr());
        let plan = json!({"part": part, "url": url, "keys": keys, "messages": messages});
        self.stdin.write_all(format!("{plan}\n").as_bytes()).await.expect("the script reads its stdin");
    }

    /// Everything that the script finds right on the way is one more line.
    #[expect(
        clippy::print_stdout,
        reason = "what `make sdk-test` shows, and what went well before a failure"
    )]
    async fn await_line(&mut self, wanted: &str) {
        loop {
            let line = next_line(&mut self.lines, self.folder.path()).await;
            if line == wanted {
                return;
            }
            println!("{line}");
            assert_ne!(line, "done", "the script ended its part without {wanted:?}");
        }
    }
}

async fn next_line(lines: &mut Lines<BufReader<ChildStdout>>, folder: &Path) -> String {
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await.ok().and_then(Result::ok).flatten();
    line.unwrap_or_else(|| {
        let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
        panic!("scripts/sdk_test.py failed:\n{log}")
    })
}

fn python() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/sdks/bin/python");
    assert!(path.exists(), "there are no SDKs at {}; run scripts/install-tools.sh sdks", path.display());
    path
}
