//! A real Redis of the test's own: started on a free port, frozen, killed and restarted at will, gone when dropped.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Value};
use rustix::process::{Pid, Signal, kill_process};

use super::eventually;

/// How long a server may take to come up on a busy machine.
const START: Duration = Duration::from_secs(20);

pub(crate) struct Redis {
    port: u16,
    folder: tempfile::TempDir,
    server: Option<Child>,
}

impl Redis {
    /// Starts a server that answers.
    pub(crate) async fn start() -> Self {
        let mut redis = Self::stopped();
        redis.restart().await;
        redis
    }

    /// An address where no server is yet.
    pub(crate) fn stopped() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port();
        Self { port, folder: tempfile::tempdir().unwrap(), server: None }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The same server by its Unix socket.
    pub(crate) fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.folder.path().join("socket").display())
    }

    /// Starts the server again, empty.
    pub(crate) async fn restart(&mut self) {
        self.kill();
        let server = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string()])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(self.folder.path())
            .arg("--unixsocket")
            .arg(self.folder.path().join("socket"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        self.server = Some(server);
        tokio::time::timeout(START, async {
            while self.try_command(&["PING"]).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("redis-server answers");
    }

    /// Kills it at once (SIGKILL).
    pub(crate) fn kill(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
    }

    /// Stops answering without closing anything (SIGSTOP).
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Goes on after [`Redis::freeze`].
    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Takes its folder away, so that it can't save; after that it takes no writes. Give the folder back to restart it.
    pub(crate) async fn break_saving(&self) {
        std::fs::remove_dir_all(self.folder.path()).unwrap();
        self.command(&["CONFIG", "SET", "save", "3600 1"]).await;
        self.command(&["CONFIG", "SET", "stop-writes-on-bgsave-error", "yes"]).await;
        self.command(&["BGSAVE"]).await;
        let failed = eventually(async || {
            let said = self.command(&["INFO", "persistence"]).await;
            format!("{said:?}").contains("rdb_last_bgsave_status:err").then_some(())
        });
        assert!(failed.await.is_some(), "Redis can save without a folder");
    }

    /// After [`Redis::break_saving`].
    pub(crate) async fn mend_saving(&self) {
        std::fs::create_dir_all(self.folder.path()).unwrap();
        self.command(&["CONFIG", "SET", "stop-writes-on-bgsave-error", "no"]).await;
    }

    /// Runs one command on a connection of its own.
    pub(crate) async fn command(&self, args: &[impl AsRef<[u8]>]) -> Value {
        self.try_command(args).await.expect("redis answers")
    }

    /// A connection that waits as long as a busy machine needs.
    pub(crate) async fn connection(&self) -> redis::RedisResult<MultiplexedConnection> {
        let patient = AsyncConnectionConfig::new().set_response_timeout(Some(START));
        redis::Client::open(self.url())?.get_multiplexed_async_connection_with_config(&patient).await
    }

    async fn try_command(&self, args: &[impl AsRef<[u8]>]) -> redis::RedisResult<Value> {
        let mut connection = self.connection().await?;
        let mut command = redis::Cmd::new();
        for arg in args {
            command.arg(arg.as_ref());
        }
        command.query_async(&mut connection).await
    }

    fn signal(&self, signal: Signal) {
        let server = self.server.as_ref().expect("the server runs");
        let pid = Pid::from_child(server);
        kill_process(pid, signal).expect("the server is ours");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // SIGKILL ends a frozen process too.
        self.kill();
    }
}
