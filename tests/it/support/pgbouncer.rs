//! A real `PgBouncer` before a Postgres, in transaction mode: clients share server sessions.

use std::fs;
use std::os::unix::fs::chown;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::port;
use super::postgres::{Postgres, as_server_user, server_user};

/// One pooler.
pub(crate) struct PgBouncer {
    process: Child,
    port: u16,
    _folder: TempDir,
}

impl PgBouncer {
    /// Before a server's database.
    pub(crate) fn start(postgres: &Postgres, database: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("keyward-pgbouncer-").tempdir_in("/tmp").unwrap();
        let port = port::free_addr().port();
        let settings = folder.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n{database} = host=127.0.0.1 port={} dbname={database} user=postgres\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n\
             pool_mode = transaction\nunix_socket_dir =\nignore_startup_parameters = extra_float_digits\n",
            postgres.port()
        );
        fs::write(&settings, text).unwrap();
        if let Some(id) = server_user() {
            chown(folder.path(), Some(id), Some(id)).unwrap();
        }
        let mut command: Command = as_server_user("/usr/sbin/pgbouncer".as_ref());
        command.arg("-q").arg(&settings).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("start pgbouncer (Debian: pgbouncer)");
        Self { process, port, _folder: folder }
    }

    /// The URL of the database behind it.
    pub(crate) fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
