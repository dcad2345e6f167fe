//! A real Postgres for one test: a copy of a data directory that is made once, on a free port, gone at the end.
//!
//! Postgres refuses to run as root, so as root it runs as the user `postgres`. `setpriv --pdeathsig` ends it even where
//! the test is killed; so it must be started from the test's own thread.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use keyward::store::{CLI_QUERY_TIMEOUT, Store, StoreOptions, StoreUrl};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// One server.
pub(crate) struct Postgres {
    directory: TempDir,
    port: u16,
    server: Option<Child>,
}

#[allow(dead_code, reason = "not every test program uses every fault")]
impl Postgres {
    /// An empty server with the superuser `postgres`, which needs no password.
    pub(crate) async fn start() -> Self {
        let mut postgres = Self::prepare();
        postgres.start_again().await;
        postgres
    }

    /// A server that recovers for ever, like the standby of a primary that is gone. It has no databases of ours.
    pub(crate) async fn start_standby() -> Self {
        let mut postgres = Self::prepare();
        postgres.demote();
        postgres.start_again().await;
        postgres
    }

    /// From the next start on it is a standby, until it is promoted: then it goes on in another timeline.
    pub(crate) fn demote(&self) {
        let signal = self.data().join("standby.signal");
        fs::write(&signal, "").unwrap();
        if let Some(id) = server_user() {
            chown(&signal, Some(id), Some(id)).unwrap();
        }
    }

    fn prepare() -> Self {
        let directory = tempfile::Builder::new().prefix("keyward-pg-").tempdir_in("/tmp").unwrap();
        if let Some(id) = server_user() {
            chown(directory.path(), Some(id), Some(id)).unwrap();
        }
        let template = template();
        let data = directory.path().join("data");
        run(Command::new("cp").arg("-a").arg(template).arg(&data));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { directory, port, server: None }
    }

    /// Starts the same server, after [`Postgres::stop`] or [`Postgres::kill`], on the same port.
    pub(crate) async fn start_again(&mut self) {
        assert!(self.server.is_none(), "it runs already");
        let log = File::options().create(true).append(true).open(self.directory.path().join("log")).unwrap();
        let socket = format!("unix_socket_directories={}", self.directory.path().display());
        let port = format!("port={}", self.port);
        let mut command = as_server_user(&binary("postgres"));
        command.arg("-D").arg(self.data());
        for setting in [
            port.as_str(),
            &socket,
            "listen_addresses=127.0.0.1",
            "fsync=off",
            "full_page_writes=off",
            "autovacuum=off",
            "shared_buffers=16MB",
            "max_connections=100",
        ] {
            command.args(["-c", setting]);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.server = Some(command.spawn().unwrap());
        for _ in 0..1500 {
            if tokio_postgres::connect(&self.url("postgres"), NoTls).await.is_ok() {
                return;
            }
            let ended = self.server.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "Postgres ended: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("Postgres did not start: {}", self.log());
    }

    /// The URL of a database for the superuser.
    pub(crate) fn url(&self, database: &str) -> String {
        self.url_as("postgres", database)
    }

    /// The URL of a database for a role.
    pub(crate) fn url_as(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}@127.0.0.1:{}/{database}", self.port)
    }

    /// The port on 127.0.0.1.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Creates an empty database.
    pub(crate) async fn create_database(&self, name: &str) {
        self.client("postgres").await.batch_execute(&format!("CREATE DATABASE \"{name}\"")).await.unwrap();
    }

    /// A database with Keyward's tables and change feed; its URL.
    pub(crate) async fn create_platform(&self) -> String {
        self.create_database("platform").await;
        let url = self.url("platform");
        let options = StoreOptions {
            url: StoreUrl::parse(&url).unwrap(),
            connections: 1,
            query_timeout: CLI_QUERY_TIMEOUT,
            create_if_missing: false,
            actor: None,
        };
        Store::open(options).await.unwrap().migrate().await.unwrap();
        url
    }

    /// A session of the superuser.
    pub(crate) async fn client(&self, database: &str) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.url(database), NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// From the next start on, with this certificate and key.
    pub(crate) fn enable_tls(&self, certificate: &Path, key: &Path) {
        for (file, name) in [(certificate, "server.crt"), (key, "server.key")] {
            let copy = self.data().join(name);
            fs::copy(file, &copy).unwrap();
            fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).unwrap();
            if let Some(id) = server_user() {
                chown(&copy, Some(id), Some(id)).unwrap();
            }
        }
        let mut settings = File::options().append(true).open(self.data().join("postgresql.conf")).unwrap();
        settings.write_all(b"ssl = on\n").unwrap();
    }

    /// A copy of the data of a server that is stopped.
    pub(crate) fn back_up(&self) -> PathBuf {
        let backup = self.directory.path().join("backup");
        run(Command::new("cp").arg("-a").arg(self.data()).arg(&backup));
        backup
    }

    /// Puts a copy in the place of the data of a server that is stopped.
    pub(crate) fn restore(&self, backup: &Path) {
        fs::remove_dir_all(self.data()).unwrap();
        run(Command::new("cp").arg("-a").arg(backup).arg(self.data()));
    }

    /// Ends it in good order; sessions are cut off.
    pub(crate) fn stop(&mut self) {
        self.end(Signal::INT);
    }

    /// Ends it like a power failure.
    pub(crate) fn kill(&mut self) {
        for pid in self.processes() {
            let _ = kill_process(pid, Signal::KILL);
        }
        self.end(Signal::KILL);
    }

    /// Stops every process of it: connections stay open and nothing answers.
    pub(crate) fn freeze(&self) {
        self.signal_all(Signal::STOP);
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) {
        self.signal_all(Signal::CONT);
    }

    fn signal_all(&self, signal: Signal) {
        for pid in self.processes() {
            // A session may have ended meanwhile.
            let _ = kill_process(pid, signal);
        }
    }

    /// The postmaster first, then its children.
    fn processes(&self) -> Vec<Pid> {
        let Some(postmaster) = self.server.as_ref().map(Child::id) else {
            return Vec::new();
        };
        let children = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()?;
            (parent == postmaster).then_some(pid)
        });
        std::iter::once(postmaster)
            .chain(children)
            .filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
            .collect()
    }

    fn end(&mut self, signal: Signal) {
        if let Some(mut server) = self.server.take() {
            let pid = i32::try_from(server.id()).ok().and_then(Pid::from_raw).unwrap();
            let _ = kill_process(pid, signal);
            let _ = server.wait();
        }
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.resume();
        self.end(Signal::QUIT);
    }
}

/// A data directory as `initdb` makes it, made once and copied.
fn template() -> PathBuf {
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("postgres");
    fs::create_dir_all(&cache).unwrap();
    let lock = File::create(cache.join("lock")).unwrap();
    lock.lock().unwrap();
    let version = binary("initdb").components().rev().nth(2).unwrap().as_os_str().to_owned();
    let template = cache.join(version);
    if !template.exists() {
        // Made where the server's user may write, then moved here whole.
        let scratch = tempfile::Builder::new().prefix("keyward-initdb-").tempdir_in("/tmp").unwrap();
        if let Some(id) = server_user() {
            chown(scratch.path(), Some(id), Some(id)).unwrap();
        }
        let data = scratch.path().join("data");
        run(as_server_user(&binary("initdb"))
            .args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data));
        let unfinished = cache.join("unfinished");
        let _ = fs::remove_dir_all(&unfinished);
        run(Command::new("cp").arg("-a").arg(&data).arg(&unfinished));
        fs::rename(&unfinished, &template).unwrap();
    }
    template
}

/// The newest installed version's.
fn binary(name: &str) -> PathBuf {
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .expect("Postgres is installed (apt-get install postgresql)")
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
        .collect();
    versions.sort();
    versions.pop().expect("a version of Postgres").1.join("bin").join(name)
}

/// The user to run as, where we are root.
pub(super) fn server_user() -> Option<u32> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with("postgres:")).expect("a user postgres");
    line.split(':').nth(2)?.parse().ok()
}

pub(super) fn as_server_user(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    if let Some(id) = server_user() {
        command.args([format!("--reuid={id}"), format!("--regid={id}"), "--clear-groups".to_owned()]);
    }
    command.args(["--pdeathsig", "QUIT", "--"]).arg(program).current_dir("/");
    command
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
