//! The commands from outside: help, exit codes, output.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::tempdir;
use tokio::time::Instant;

use crate::program::{Ended, keyward, run};

const COMMANDS: [&[&str]; 34] = [
    &["config", "schema"],
    &["completions"],
    &["man"],
    &[],
    &["serve"],
    &["migrate"],
    &["check"],
    &["health"],
    &["user"],
    &["user", "create"],
    &["user", "list"],
    &["user", "show"],
    &["user", "enable"],
    &["user", "disable"],
    &["key"],
    &["key", "create"],
    &["key", "list"],
    &["key", "show"],
    &["key", "update"],
    &["key", "rotate"],
    &["key", "revoke"],
    &["key", "delete"],
    &["key", "import"],
    &["key", "history"],
    &["cache"],
    &["cache", "stats"],
    &["cache", "invalidate"],
    &["cache", "flush"],
    &["deny"],
    &["deny", "add"],
    &["deny", "remove"],
    &["deny", "list"],
    &["config", "check"],
    &["config", "print"],
];

#[test]
fn every_command_explains_itself_with_an_example() {
    let directory = tempdir().unwrap();
    for command in COMMANDS {
        let ended = run(directory.path(), &[command, &["--help"]].concat());
        assert_eq!(ended.code, 0, "{command:?}");
        assert!(ended.stdout.contains("\nExample"), "{command:?}");
        assert!(ended.stdout.contains("Usage: keyward"), "{command:?}");
        assert_eq!(ended.stderr, "", "{command:?}");
    }
}

#[test]
fn every_setting_is_explained_by_serve() {
    let directory = tempdir().unwrap();
    let help = run(directory.path(), &["serve", "--help"]).stdout;
    for setting in keyward::config::TABLE {
        assert!(
            help.contains(&format!("--{} <", setting.flag))
                || help.contains(&format!("--{} [<", setting.flag))
        );
        assert!(help.contains(&setting.variable()), "{}", setting.flag);
    }
}

#[test]
fn wrong_usage_is_2() {
    let directory = tempdir().unwrap();
    for arguments in [
        &[][..],
        &["nonsense"],
        &["serve", "--nonsense"],
        &["user", "create", "--username", "7", "--email", "a@b"],
        &["user", "create", "--username", "alice", "--email", "nowhere"],
        &["user", "show"],
        &["key", "show", "alice"],
        &["key", "show", "0"],
        &["key", "create", "--user", "alice"],
        &["key", "create", "--user", "alice", "--name", "n", "--allowed-ips", "10.0.0.0/33"],
        &["key", "create", "--user", "alice", "--name", "n", "--allowed-endpoints", "/ok,bad"],
        &["key", "create", "--user", "alice", "--name", "n", "--rate-limit-per-minute", "-1"],
        &["key", "create", "--user", "alice", "--name", "n", "--budget-type", "weekly"],
        &["key", "create", "--user", "alice", "--name", "n", "--expires-at", "2001-01-01"],
        &[
            "key",
            "create",
            "--user",
            "alice",
            "--name",
            "n",
            "--expires-at",
            "2099-01-01",
            "--expires-in",
            "1d",
        ],
        &["key", "create", "--user", "alice", "--name", "n", "--key-prefix-length", "33"],
        &["key", "update", "7"],
        &["key", "update", "7", "--clear", "name"],
        &["key", "update", "7", "--tags", "a", "--clear", "tags"],
        &["key", "update", "7", "--is-active", "perhaps"],
        &["key", "rotate", "7", "--grace", "0s"],
        &["key", "rotate", "7", "--grace", "1d", "--now"],
        &["key", "import"],
        &["key", "import", "absent.csv"],
        &["key", "list", "--unused-since", "long"],
        &["check", "--path", "/"],
        &["check", "kw_0123456789"],
        &["check", "--key-stdin", "--ip", "localhost"],
        &["check", "--key-stdin"],
        &["health", "--timeout", "0s"],
        &["cache", "invalidate"],
        &["cache", "invalidate", "--prefix", "a", "--key-id", "7"],
        &["deny", "add"],
        &["deny", "add", "--key-id", "none"],
        &["deny", "remove", "--prefix", "a", "--key-id", "7"],
        &["user", "list", "--output", "xml"],
    ] {
        let ended = run(directory.path(), arguments);
        assert_eq!(ended.code, 2, "{arguments:?}: {}", ended.stderr);
        assert_eq!(ended.stdout, "", "{arguments:?}");
        assert!(!ended.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn nobody_at_the_admin_port_is_3_and_names_the_address() {
    let directory = tempdir().unwrap();
    // Bound and dropped, so that nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for command in [
        &["cache", "stats"][..],
        &["cache", "flush"],
        &["cache", "invalidate", "--key-id", "7"],
        &["deny", "list"],
        &["health"],
        &["health", "--live"],
    ] {
        let ended = run(directory.path(), &[command, &["--admin-listen", &address]].concat());
        assert_eq!(ended.code, 3, "{command:?}");
        assert!(
            ended.stderr.contains(&address) && ended.stderr.contains("--admin-listen"),
            "{}",
            ended.stderr
        );
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
}

/// Answers one request and returns what was asked.
fn asked(arguments: &[&str], answer: &'static str) -> (Ended, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        let mut chunk = [0; 1024];
        while !request.ends_with(b"\r\n\r\n") {
            let length = stream.read(&mut chunk).unwrap();
            assert_ne!(length, 0, "the request ended early");
            request.extend_from_slice(&chunk[..length]);
        }
        stream.write_all(answer.as_bytes()).unwrap();
        String::from_utf8(request).unwrap()
    });
    let directory = tempdir().unwrap();
    let ended = run(directory.path(), &[arguments, &["--admin-listen", &address]].concat());
    (ended, server.join().unwrap())
}

const STATS: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 28\r\n\r\n{\"records\": {\"entries\": 12}}";

#[test]
fn stats_are_asked_for_and_printed_in_either_form() {
    let (ended, request) = asked(&["cache", "stats", "--output", "json"], STATS);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(request.starts_with("GET /stats HTTP/1.1\r\n"), "{request}");
    let body: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(body["records"]["entries"], 12);
    let (ended, _) = asked(&["cache", "stats"], STATS);
    assert!(ended.stdout.contains("records.entries") && ended.stdout.contains("12"), "{}", ended.stdout);
}

#[test]
fn invalidation_names_its_selector_and_encodes_the_prefix() {
    const DONE: &str = "HTTP/1.1 204 No Content\r\n\r\n";
    for (arguments, target) in [
        (&["--prefix", "a&key_id=7"][..], "/cache/invalidate?prefix=a%26key_id%3D7"),
        (&["--key-id", "7"], "/cache/invalidate?key_id=7"),
        (&["--user-id", "9"], "/cache/invalidate?user_id=9"),
    ] {
        let (ended, request) = asked(&[&["cache", "invalidate"], arguments].concat(), DONE);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert!(request.starts_with(&format!("POST {target} HTTP/1.1\r\n")), "{request}");
    }
}

#[test]
fn a_refusal_of_the_sidecar_is_1_and_a_torn_answer_is_3() {
    const REFUSED: &str = "HTTP/1.1 404 Not Found\r\ncontent-length: 7\r\n\r\nno such";
    let (ended, _) = asked(&["cache", "flush"], REFUSED);
    assert_eq!(ended.code, 1);
    assert!(ended.stderr.contains("404") && ended.stderr.contains("no such"), "{}", ended.stderr);
    let (ended, _) = asked(&["cache", "flush"], "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort");
    assert_eq!(ended.code, 3, "{}", ended.stderr);
}

#[test]
fn health_is_what_the_sidecar_says_and_its_exit_code() {
    const READY: &str = "HTTP/1.1 200 OK\r\ncontent-length: 29\r\n\r\nready: change feed, lease 2s\n";
    const NOT_READY: &str =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 25\r\n\r\nnot ready: shutting down\n";
    let (ended, request) = asked(&["health"], READY);
    assert_eq!((ended.code, &*ended.stdout), (0, "ready: change feed, lease 2s\n"), "{}", ended.stderr);
    assert!(request.starts_with("GET /readyz HTTP/1.1\r\n"), "{request}");
    let (ended, _) = asked(&["health"], NOT_READY);
    assert_eq!((ended.code, &*ended.stdout, &*ended.stderr), (1, "not ready: shutting down\n", ""));
    let (ended, request) = asked(&["health", "--live"], "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
    assert_eq!((ended.code, &*ended.stdout), (0, "200 OK\n"), "{}", ended.stderr);
    assert!(request.starts_with("GET /livez HTTP/1.1\r\n"), "{request}");
}

/// A process that hangs keeps its port open; the probe has to end all the same, and before the kubelet ends it.
#[test]
fn a_sidecar_that_hangs_is_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let directory = tempdir().unwrap();
    let began = Instant::now();
    let ended = run(directory.path(), &["health", "--timeout", "200ms", "--admin-listen", &address]);
    assert_eq!(ended.code, 3, "{}", ended.stderr);
    assert!(ended.stderr.contains("no answer within 200ms"), "{}", ended.stderr);
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let directory = tempdir().unwrap();
    let mut child = keyward(directory.path(), &["config", "print"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended: Ended = child.wait_with_output().unwrap().into();
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
}

#[test]
fn migrate_can_be_printed_without_a_store() {
    let directory = tempdir().unwrap();
    for store in ["sqlite:absent.db", "postgres://nowhere.invalid/db"] {
        let ended = run(directory.path(), &["migrate", "--print", "--store", store]);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert!(!ended.stdout.is_empty());
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "printing created a file");
}

#[test]
fn a_key_from_creation_to_revocation() {
    let directory = tempdir().unwrap();
    let ok = |arguments: &[&str]| {
        let ended = run(directory.path(), arguments);
        assert_eq!(ended.code, 0, "{arguments:?}: {}", ended.stderr);
        ended
    };
    let json = |arguments: &[&str]| -> Value {
        serde_json::from_str(&ok(&[arguments, &["--output", "json"]].concat()).stdout).unwrap()
    };
    // Without the file: refused, and no file is created by a command that only reads.
    assert_ne!(run(directory.path(), &["user", "list"]).code, 0);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    ok(&["migrate"]);
    ok(&["migrate"]);
    let user = json(&["user", "create", "--username", "alice", "--email", "alice@example.com"]);
    assert_eq!(user["role"], "user");
    let again = run(directory.path(), &["user", "create", "--username", "alice", "--email", "b@example.com"]);
    assert_eq!(again.code, 1, "{}", again.stderr);
    assert_eq!(json(&["user", "disable", "alice"])["is_active"], false);
    assert_eq!(json(&["user", "enable", "alice"])["is_active"], true);

    let create = ["key", "create", "--user", "alice", "--name", "n", "--hash", "sha256"];
    let created = ok(&[&create[..], &["--allowed-models", "a, b"]].concat());
    let secret = created.stdout.trim_end();
    assert!(secret.starts_with("kw_") && secret.len() == 48, "the secret is alone on standard output");
    assert!(created.stderr.contains("shown once"));
    let second = json(&create);
    assert_eq!(second["key"].as_str().unwrap().get(..8), second["key_prefix"].as_str());

    let keys = json(&["key", "list", "--user", "alice"]);
    assert_eq!(keys.as_array().unwrap().len(), 2);
    assert_eq!(keys[0]["allowed_models"], serde_json::json!(["a", "b"]));
    assert!(!keys.to_string().contains(secret) && !keys.to_string().contains("sha256:"));
    let id = second["id"].to_string();
    assert_eq!(json(&["key", "revoke", &id])["is_active"], false);
    assert_eq!(json(&["key", "show", &id])["is_active"], false);
    assert_eq!(run(directory.path(), &["key", "show", "4711"]).code, 1);
    assert_eq!(run(directory.path(), &["key", "create", "--user", "bob", "--name", "n"]).code, 1);
}

#[test]
fn completions_know_every_command() {
    let directory = tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let ended = run(directory.path(), &["completions", shell]);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        for word in ["serve", "migrate", "create", "allowed-models"] {
            assert!(ended.stdout.contains(word), "{shell} does not know {word}");
        }
    }
    let ended = run(directory.path(), &["completions", "tcsh"]);
    assert_eq!(ended.code, 2);
    assert!(ended.stderr.contains("bash"), "{}", ended.stderr);
}

#[test]
fn every_command_has_a_manual_page() {
    let directory = tempdir().unwrap();
    let ended = run(directory.path(), &["man"]);
    assert!(ended.stdout.starts_with(".ie") && ended.stdout.contains(".TH keyward 1"), "{}", ended.stdout);
    let ended = run(directory.path(), &["man", "--to", "pages"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    for page in ["keyward.1", "keyward-serve.1", "keyward-key-create.1", "keyward-config-schema.1"] {
        let text = std::fs::read_to_string(directory.path().join("pages").join(page)).unwrap();
        let name = page.trim_end_matches(".1");
        assert!(text.contains(&format!(".TH {name} 1")), "{page}: {text}");
    }
}
