//! The real nginx with the configuration that we ship.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::process::Process;
use super::{eventually, port};

/// An nginx that takes requests.
pub(crate) struct Nginx {
    process: Process,
    listener: SocketAddr,
    /// Holds the configuration, the logs and its temporary files.
    _folder: TempDir,
}

impl Nginx {
    /// `examples/nginx.conf` with other addresses, files of its own, and these changes, each in the one place where it
    /// fits.
    pub(crate) async fn start(keyward: SocketAddr, upstream: SocketAddr, changes: &[(&str, &str)]) -> Self {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/nginx.conf");
        let config = std::fs::read_to_string(shipped).expect("read examples/nginx.conf");
        let folder = tempfile::Builder::new().prefix("keyward-nginx-").tempdir().expect("make a folder");
        let listener = port::free_addr();
        let own_files = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path {}/{name};\n", folder.path().display()));
        let addresses = [
            ("server 127.0.0.1:9192; # @keyward", format!("server {keyward};")),
            ("server 127.0.0.1:8000; # @upstream", format!("server {upstream};")),
            ("listen 127.0.0.1:10000; # @listener", format!("listen {listener};")),
            ("pid /run/nginx.pid; # @pid", format!("pid {}/nginx.pid;", folder.path().display())),
            ("http { # @http", format!("http {{\n{}", own_files.concat())),
        ];
        let changes = changes.iter().map(|(shipped, ours)| (*shipped, (*ours).to_owned()));
        // Time to spare for a busy machine, in every check.
        let config = config.replace("proxy_read_timeout 1s;", "proxy_read_timeout 15s;");
        let config = addresses.into_iter().chain(changes).fold(config, |config, (shipped, ours)| {
            assert_eq!(config.matches(shipped).count(), 1, "nginx.conf should hold {shipped:?} once");
            config.replace(shipped, &ours)
        });
        let file = folder.path().join("nginx.conf");
        std::fs::write(&file, config).expect("write the configuration");
        let folder_text = folder.path().display().to_string();
        // Not two processes: a master that is killed would leave its worker behind.
        let directives = "daemon off; master_process off;";
        let args = ["-p", &folder_text, "-e", "stderr", "-c", &file.display().to_string(), "-g", directives];
        let mut process = Process::start("nginx", &binary(), folder.path(), &args.map(str::to_owned));
        let ready = eventually(async || {
            if let Some(status) = process.ended() {
                panic!("nginx ended with {status} before it was ready:\n{}", process.stderr());
            }
            tokio::net::TcpStream::connect(listener).await.ok()
        });
        assert!(ready.await.is_some(), "nginx did not listen:\n{}", process.stderr());
        Self { process, listener, _folder: folder }
    }

    /// Where callers come in.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.listener
    }

    /// The access log so far.
    pub(crate) fn access_log(&self) -> String {
        self.process.stdout()
    }
}

fn binary() -> PathBuf {
    let places = ["/usr/sbin/nginx", "/usr/bin/nginx", "/usr/local/sbin/nginx"].map(PathBuf::from);
    let own = std::env::var_os("KEYWARD_NGINX").map(PathBuf::from);
    let found = own.into_iter().chain(places).find(|path| path.exists());
    found.expect("there is no nginx; run scripts/install-tools.sh nginx")
}
