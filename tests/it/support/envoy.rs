//! The real Envoy with the configuration that we ship.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use super::http::Request;
use super::process::Process;
use super::{eventually, port};

/// What to start.
pub(crate) struct Builder {
    /// The shipped file that it began as.
    file: &'static str,
    config: String,
    more_listeners: String,
}

/// An Envoy that takes requests.
pub(crate) struct Envoy {
    process: Process,
    listener: SocketAddr,
    admin: SocketAddr,
    /// Holds the configuration and the logs.
    _folder: TempDir,
}

impl Envoy {
    /// `envoy/envoy.yaml` with other ports, and with time to spare for a busy machine.
    #[expect(clippy::new_ret_no_self, reason = "reads as the start of a sentence that ends with start()")]
    pub(crate) fn new(keyward: SocketAddr, upstream: SocketAddr) -> Builder {
        Self::of_file("envoy/envoy.yaml", keyward, upstream)
    }

    /// The same for another shipped file that keeps the markers of `envoy/envoy.yaml`.
    pub(crate) fn of_file(file: &'static str, keyward: SocketAddr, upstream: SocketAddr) -> Builder {
        let builder = Self::shipped(file, upstream);
        // The gRPC port of Keyward's, or its HTTP port.
        let ports = ["port_value: 9191}", "port_value: 9192}"];
        let asked = ports.into_iter().find(|port| builder.config.contains(port)).unwrap_or(ports[0]);
        builder.replace(asked, &format!("port_value: {}}}", keyward.port()))
    }

    /// The pod's file: Keyward is behind a unix socket, and callers come in on every address.
    pub(crate) fn of_pod(socket: &Path, upstream: SocketAddr) -> Builder {
        Self::shipped("k8s/overlays/sidecar/envoy.yaml", upstream)
            .replace("path: /run/keyward/grpc.sock", &format!("path: {}", socket.display()))
            .replace("{address: 0.0.0.0, port_value: 10000}", "{address: 127.0.0.1, port_value: 10000}")
    }

    fn shipped(file: &'static str, upstream: SocketAddr) -> Builder {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let config = std::fs::read_to_string(shipped).unwrap_or_else(|error| panic!("{file}: {error}"));
        Builder { file, config, more_listeners: String::new() }
            .replace("port_value: 8000}", &format!("port_value: {}}}", upstream.port()))
            .replace(" timeout: 0.5s", " timeout: 15s")
    }

    /// Where callers come in.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.listener
    }

    /// The first line of the access log that fits.
    pub(crate) async fn access_log_line(&self, fits: impl Fn(&Value) -> bool) -> Value {
        let line = eventually(async || {
            let output = self.process.stdout();
            output.lines().filter_map(|line| serde_json::from_str(line).ok()).find(&fits)
        });
        line.await.unwrap_or_else(|| panic!("no such line in the access log:\n{}", self.process.stdout()))
    }

    /// The line of the one request to that path.
    pub(crate) async fn access_log_of(&self, path: &str) -> Value {
        self.access_log_line(|line| line.get("path").and_then(Value::as_str) == Some(path)).await
    }

    /// All lines so far, as written.
    pub(crate) fn access_log(&self) -> String {
        self.process.stdout()
    }
}

impl Builder {
    /// Changes the shipped text in one place, which must exist and be the only one.
    pub(crate) fn replace(mut self, shipped: &str, ours: &str) -> Self {
        self.config = once(self.file, &self.config, shipped, ours);
        self
    }

    /// Adds a route before the shipped ones: a prefix with these `context_extensions`.
    pub(crate) fn route(self, prefix: &str, context_extensions: &str) -> Self {
        let route = format!(
            r#"routes: # @routes
                        - match: {{prefix: {prefix}}}
                          route: {{cluster: upstream}}
                          typed_per_filter_config:
                            envoy.filters.http.ext_authz:
                              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute
                              check_settings:
                                context_extensions: {context_extensions}"#
        );
        self.replace("routes: # @routes", &route)
    }

    /// Adds a copy of the listener as it is by now, on another address, with changes of its own. `address` is what Envoy
    /// calls one: `socket_address: {address: "::1", port_value: 1}`, `pipe: {path: /x}`.
    pub(crate) fn also_listen(mut self, name: &str, address: &str, changes: &[(&str, &str)]) -> Self {
        let (_, listeners) = self.config.split_once("  listeners:\n").expect("envoy.yaml has listeners");
        let (listener, _) =
            listeners.split_once("\n  clusters:\n").expect("envoy.yaml has clusters behind them");
        let name = format!("- name: {name}\n      address:");
        let changes = [
            ("- name: api\n      address:", &*name),
            ("socket_address: {address: 127.0.0.1, port_value: 10000} # @listener", address),
        ]
        .into_iter()
        .chain(changes.iter().copied());
        let copy =
            changes.fold(listener.to_owned(), |copy, (shipped, ours)| once(self.file, &copy, shipped, ours));
        self.more_listeners.push_str(&copy);
        self
    }

    /// Starts Envoy and waits until it says that it is ready.
    pub(crate) async fn start(self) -> Envoy {
        let (listener, admin) = (port::free_addr(), port::free_addr());
        let config = self
            .replace("port_value: 10000}", &format!("port_value: {}}}", listener.port()))
            .replace("port_value: 9901}", &format!("port_value: {}}}", admin.port()));
        let config =
            config.config.replace("\n  clusters:\n", &format!("\n{}\n  clusters:\n", config.more_listeners));
        let folder = tempfile::Builder::new().prefix("keyward-envoy-").tempdir().expect("make a folder");
        let file = folder.path().join("envoy.yaml");
        std::fs::write(&file, config).expect("write the configuration");
        let args = [
            "-c",
            &file.display().to_string(),
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "--log-level",
            "warning",
            // The access log is otherwise written every 10 s.
            "--file-flush-interval-msec",
            "10",
        ]
        .map(str::to_owned);
        let mut process = Process::start("envoy", &binary(), folder.path(), &args);
        let ready = eventually(async || {
            if let Some(status) = process.ended() {
                panic!("Envoy ended with {status} before it was ready:\n{}", process.stderr());
            }
            let response = Request::get("/ready").try_send(admin).await.ok()?;
            (response.status == 200).then_some(())
        });
        assert!(ready.await.is_some(), "Envoy did not become ready:\n{}", process.stderr());
        Envoy { process, listener, admin, _folder: folder }
    }
}

impl Envoy {
    /// The value of one of Envoy's own counters.
    pub(crate) async fn stat(&self, name: &str) -> u64 {
        let text = Request::get(&format!("/stats?filter=^{name}$")).send(self.admin).await.text();
        let value = text.trim().strip_prefix(name).and_then(|rest| rest.strip_prefix(": "));
        value.unwrap_or_else(|| panic!("no counter {name}: {text}")).parse().expect("a counter is a number")
    }
}

/// What Envoy itself says of a shipped file, without starting.
pub(crate) fn validate(file: &Path) -> Output {
    Command::new(binary())
        .args(["--mode", "validate", "--log-level", "warning", "-c"])
        .arg(file)
        .output()
        .expect("run Envoy")
}

fn once(file: &str, text: &str, shipped: &str, ours: &str) -> String {
    assert_eq!(text.matches(shipped).count(), 1, "{file} should hold {shipped:?} once");
    text.replace(shipped, ours)
}

fn binary() -> PathBuf {
    let path = std::env::var_os("KEYWARD_ENVOY")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/envoy"), PathBuf::from);
    assert!(path.exists(), "there is no Envoy at {}; run scripts/install-tools.sh", path.display());
    path
}
