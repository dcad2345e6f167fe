//! Keyward's own binary: `serve` as a child, the other commands run to their end.

use std::ffi::OsStr;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};

use keyward::domain::key_format::{CHECKSUM_CHARACTERS, checksum};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::http::{Request, Response};
use super::process::{Process, without_settings};
use super::{eventually, port};

/// What to start.
pub(crate) struct Builder {
    folder: TempDir,
    store: String,
    args: Vec<String>,
    store_in_file: bool,
    /// Besides the one that every test has.
    more_listeners: Vec<String>,
    /// Free ones otherwise.
    at: Option<(SocketAddr, SocketAddr)>,
}

/// A sidecar that is ready, with a store of its own.
pub(crate) struct Keyward {
    process: Process,
    grpc: SocketAddr,
    admin: SocketAddr,
    store: String,
    folder: TempDir,
}

/// A key as it was created.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    pub(crate) id: i64,
    pub(crate) secret: String,
}

impl Key {
    /// Another key of the same prefix and form.
    pub(crate) fn wrong(&self) -> String {
        let (text, _) = self.secret.split_at(self.secret.len() - CHECKSUM_CHARACTERS - 1);
        let (rest, last) = text.split_at(text.len() - 1);
        let text = format!("{rest}{}", if last == "x" { "y" } else { "x" });
        let sum = checksum(text.as_bytes());
        format!("{text}_{}", String::from_utf8_lossy(&sum))
    }

    /// The same key with a typing error.
    pub(crate) fn mistyped(&self) -> String {
        let (rest, last) = self.secret.split_at(self.secret.len() - 1);
        format!("{rest}{}", if last == "x" { "y" } else { "x" })
    }
}

impl Builder {
    /// Another store; an empty `SQLite` file in the test's folder otherwise.
    #[allow(dead_code, reason = "for the suites that run on PostgreSQL")]
    pub(crate) fn store(mut self, url: &str) -> Self {
        url.clone_into(&mut self.store);
        self
    }

    /// Redis between memory and store.
    #[allow(dead_code, reason = "for the suites that run with Redis")]
    pub(crate) fn redis(self, url: &str, secret_file: &Path) -> Self {
        self.arg("--redis", url).arg("--cache-secret-file", &secret_file.display().to_string())
    }

    /// Settings in a file, for what must not be an argument. A store there replaces the test's own for `serve` alone.
    pub(crate) fn file(mut self, yaml: &str) -> Self {
        let path = self.folder.path().join("keyward.yaml");
        std::fs::write(&path, yaml).expect("write the settings");
        self.store_in_file = yaml.contains("store:");
        self.arg("--config", &path.display().to_string())
    }

    /// One more setting of `serve`.
    pub(crate) fn arg(mut self, flag: &str, value: &str) -> Self {
        self.args.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    /// One more `--grpc-listen`.
    pub(crate) fn also_listen(mut self, address: &str) -> Self {
        self.more_listeners.push(address.to_owned());
        self
    }

    /// Where checks and the admin port are answered.
    pub(crate) fn at(mut self, grpc: SocketAddr, admin: SocketAddr) -> Self {
        self.at = Some((grpc, admin));
        self
    }

    /// Starts `keyward serve` and waits until it says that it is ready.
    pub(crate) async fn start(self) -> Keyward {
        let mut keyward = self.launch();
        keyward.await_ready().await;
        keyward
    }

    /// Starts `keyward serve` and waits for nothing.
    pub(crate) fn launch(self) -> Keyward {
        let (grpc, admin) = self.at.unwrap_or_else(|| (port::free_addr(), port::free_addr()));
        let mut args: Vec<String> = ["serve", "--admin-listen", &admin.to_string()].map(str::to_owned).into();
        if !self.store_in_file {
            args.extend(["--store".to_owned(), self.store.clone()]);
        }
        // bcrypt on a machine that builds and tests at once is slow; only what a test sets itself is to be in its way.
        for (flag, value) in
            [("--grpc-listen", &*grpc.to_string()), ("--check-timeout", "10s"), ("--drain-delay", "0s")]
        {
            if !self.args.iter().any(|arg| arg == flag) {
                args.extend([flag.to_owned(), value.to_owned()]);
            }
        }
        args.extend(
            self.more_listeners.into_iter().flat_map(|address| ["--grpc-listen".to_owned(), address]),
        );
        args.extend(self.args);
        let process = Process::start("keyward", binary(), self.folder.path(), &args);
        Keyward { process, grpc, admin, store: self.store, folder: self.folder }
    }
}

impl Keyward {
    #[expect(clippy::new_ret_no_self, reason = "reads as the start of a sentence that ends with start()")]
    pub(crate) fn new() -> Builder {
        let folder = tempfile::Builder::new().prefix("keyward-test-").tempdir().expect("make a folder");
        let store = format!("sqlite:{}", folder.path().join("keyward.db").display());
        Builder {
            folder,
            store,
            args: Vec::new(),
            store_in_file: false,
            more_listeners: Vec::new(),
            at: None,
        }
    }

    /// Where `ext_authz` is answered.
    pub(crate) fn grpc_addr(&self) -> SocketAddr {
        self.grpc
    }

    /// Where `/readyz`, `/metrics` and their like are.
    #[allow(dead_code, reason = "for suites that need more than `admin`")]
    pub(crate) fn admin_addr(&self) -> SocketAddr {
        self.admin
    }

    /// The `SQLite` file, for tests that write rows themselves.
    pub(crate) fn sqlite_file(&self) -> PathBuf {
        self.folder.path().join("keyward.db")
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        self.process.stderr()
    }

    /// What it has written to standard output so far.
    pub(crate) fn stdout(&self) -> String {
        self.process.stdout()
    }

    /// The file of [`Builder::file`].
    pub(crate) fn settings_file(&self) -> PathBuf {
        self.folder.path().join("keyward.yaml")
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends SIGHUP, at which it reloads.
    pub(crate) fn hangup(&self) {
        self.process.signal(Signal::HUP);
    }

    /// Runs a command to its end, on the same store, or on this sidecar for the `cache` and `deny` commands.
    pub(crate) fn cli<S: AsRef<OsStr>>(&self, args: &[S]) -> Output {
        self.command(args).stdin(Stdio::null()).output().expect("run keyward")
    }

    /// The same with this text on standard input.
    pub(crate) fn cli_with_input<S: AsRef<OsStr>>(&self, args: &[S], input: &str) -> Output {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("run keyward");
        // A command that refuses its arguments does not read.
        let _ = child.stdin.take().expect("its input").write_all(input.as_bytes());
        child.wait_with_output().expect("run keyward")
    }

    fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(binary());
        command.args(args).current_dir(self.folder.path());
        without_settings(&mut command);
        if args
            .first()
            .is_some_and(|first| ["cache", "deny", "health"].iter().any(|of| first.as_ref() == *of))
        {
            command.arg("--admin-listen").arg(self.admin.to_string());
        } else {
            command.arg("--store").arg(&self.store);
        }
        command
    }

    /// The same for a command that must succeed; what it printed.
    pub(crate) fn cli_ok<S: AsRef<OsStr>>(&self, args: &[S]) -> Vec<u8> {
        let output = self.cli(args);
        let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "keyward {args:?} ended with {}: {errors}", output.status);
        output.stdout
    }

    /// The same for a command that prints JSON.
    pub(crate) fn cli_json<S: AsRef<OsStr>>(&self, args: &[S]) -> Value {
        let args: Vec<&OsStr> =
            args.iter().map(AsRef::as_ref).chain(["--output", "json"].map(OsStr::new)).collect();
        serde_json::from_slice(&self.cli_ok(&args))
            .unwrap_or_else(|error| panic!("keyward {args:?} printed no JSON: {error}"))
    }

    /// Creates an active user and returns its id.
    pub(crate) fn create_user(&self, username: &str, options: &[&str]) -> i64 {
        let email = format!("{username}@example.com");
        let args = [&["user", "create", "--username", username, "--email", &email], options].concat();
        id_of(&self.cli_json(&args))
    }

    /// Creates a key of that user (id or name).
    pub(crate) fn create_key(&self, user: &str, name: &str, options: &[&str]) -> Key {
        let args = [&["key", "create", "--user", user, "--name", name], options].concat();
        let created = self.cli_json(&args);
        let secret =
            created.get("key").and_then(Value::as_str).expect("key create prints the key").to_owned();
        Key { id: id_of(&created), secret }
    }

    /// `GET` on the admin port.
    pub(crate) async fn admin(&self, path: &str) -> Response {
        Request::get(path).send(self.admin).await
    }

    /// The sum of the series of a counter, or of a histogram's `_count`, that carry all these labels. A name that does
    /// not exist is a failure, so that a misspelt one can't read as "still zero".
    pub(crate) async fn count(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let values = self.series(name, labels).await;
        values.iter().map(|value| value.parse::<u64>().expect("a count is a whole number")).sum()
    }

    /// The same for any metric.
    pub(crate) async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let values = self.series(name, labels).await;
        values.iter().map(|value| value.parse::<f64>().expect("a metric is a number")).sum()
    }

    /// How often bcrypt has run.
    pub(crate) async fn bcrypt_runs(&self) -> u64 {
        self.count("keyward_bcrypt_duration_seconds_count", &[]).await
    }

    async fn series(&self, name: &str, labels: &[(&str, &str)]) -> Vec<String> {
        let text = self.admin("/metrics").await.text();
        let family = name.trim_end_matches("_count").trim_end_matches("_sum").trim_end_matches("_total");
        assert!(text.contains(family), "there is no metric {name}");
        let wanted: Vec<_> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let series = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (series_name, series_labels) = series.split_once('{').unwrap_or((series, ""));
            let fits = series_name == name && wanted.iter().all(|label| series_labels.contains(label));
            fits.then(|| value.to_owned())
        });
        series.collect()
    }

    /// Stops it where it stands (SIGSTOP): connections stay open and nothing is answered.
    pub(crate) fn freeze(&self) {
        self.process.signal(Signal::STOP);
    }

    /// Goes on after [`Keyward::freeze`].
    pub(crate) fn resume(&self) {
        self.process.signal(Signal::CONT);
    }

    /// Ends it where it stands (SIGKILL).
    pub(crate) fn kill(&self) {
        self.process.signal(Signal::KILL);
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        self.process.terminate();
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) async fn sigterm_and_wait(mut self) -> ExitStatus {
        self.process.terminate();
        eventually(async || self.process.ended()).await.expect("keyward should end after SIGTERM")
    }

    /// Waits until it says that it is ready.
    pub(crate) async fn await_ready(&mut self) {
        let ready = eventually(async || {
            if let Some(status) = self.process.ended() {
                panic!("keyward ended with {status} before it was ready:\n{}", self.process.stderr());
            }
            let response = Request::get("/readyz").try_send(self.admin).await.ok()?;
            (response.status == 200).then_some(())
        });
        assert!(ready.await.is_some(), "keyward did not become ready:\n{}", self.process.stderr());
    }
}

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_keyward"))
}

fn id_of(created: &Value) -> i64 {
    created.get("id").and_then(Value::as_i64).expect("what is created has an id")
}
