//! Settings from outside: the layers, what is refused, what is shown.

use std::fs;

use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::program::{Ended, keyward, run};

fn printed(ended: &Ended) -> Vec<Value> {
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    serde_json::from_str(&ended.stdout).unwrap()
}

fn row<'a>(rows: &'a [Value], setting: &str) -> &'a Value {
    rows.iter().find(|row| row["setting"] == setting).unwrap()
}

fn with_file(text: &str) -> TempDir {
    let directory = tempdir().unwrap();
    fs::write(directory.path().join("k.yaml"), text).unwrap();
    directory
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let directory = with_file("cache: {record_ttl: 11s, verdict_ttl: 11s, negative_ttl: 11s}\n");
    let ended = keyward(
        directory.path(),
        &["config", "print", "--output", "json", "--config", "k.yaml", "--cache-record-ttl", "13s"],
    )
    .env("KEYWARD_CACHE_RECORD_TTL", "12s")
    .env("KEYWARD_CACHE_VERDICT_TTL", "12s")
    .output()
    .unwrap()
    .into();
    let rows = printed(&ended);
    for (setting, value, origin, source) in [
        ("cache-record-ttl", "13s", "flag", Value::from("--cache-record-ttl")),
        ("cache-verdict-ttl", "12s", "environment", Value::from("KEYWARD_CACHE_VERDICT_TTL")),
        ("cache-negative-ttl", "11s", "file", Value::from("k.yaml:1 cache.negative_ttl")),
        ("cache-max-entries", "100000", "default", Value::Null),
    ] {
        let row = row(&rows, setting);
        assert_eq!(row["value"], value, "{setting}");
        assert_eq!(row["origin"], origin, "{setting}");
        assert_eq!(row["source"], source, "{setting}");
    }
}

#[test]
fn the_file_may_be_named_by_the_environment() {
    let directory = with_file("log: {level: warn}\n");
    let ended = keyward(directory.path(), &["config", "print", "--output", "json"])
        .env("KEYWARD_CONFIG", "k.yaml")
        .output()
        .unwrap()
        .into();
    assert_eq!(row(&printed(&ended), "log-level")["value"], "warn");
}

#[test]
fn passwords_are_hidden_in_either_form_of_output() {
    for output in ["table", "json"] {
        let directory = tempdir().unwrap();
        let ended: Ended = keyward(directory.path(), &["config", "print", "--output", output])
            .env("KEYWARD_STORE", "postgres://kw:hunter2@db/platform?sslpassword=hunter2")
            .env("KEYWARD_REDIS", "rediss://:hunter2@cache")
            .env("KEYWARD_CACHE_SECRET_FILE", "/run/secret")
            .output()
            .unwrap()
            .into();
        assert_eq!(ended.code, 0);
        assert!(ended.stdout.contains("postgres://kw:[redacted]@db/platform"), "{}", ended.stdout);
        assert!(!ended.stdout.contains("hunter2"), "{}", ended.stdout);
    }
}

#[test]
fn every_mistake_has_its_own_line_and_the_exit_code_is_2() {
    let directory = with_file("cache:\n  recod_ttl: 5s\n");
    for command in [&["config", "check"][..], &["config", "print"], &["serve"]] {
        let arguments =
            [command, &["--config", "k.yaml", "--worker-threads", "0", "--on-unavailable", "x"]].concat();
        let ended = run(directory.path(), &arguments);
        assert_eq!(ended.code, 2, "{command:?}");
        assert_eq!(ended.stdout, "");
        let lines: Vec<&str> = ended.stderr.lines().collect();
        assert_eq!(lines.len(), 3, "{}", ended.stderr);
        assert!(lines.iter().all(|line| line.starts_with("error: ")), "{}", ended.stderr);
        assert!(lines[0].contains("k.yaml:2: unknown key cache.recod_ttl; did you mean cache.record_ttl"));
        assert!(lines[1].contains("--worker-threads: \"0\" is not valid, expected auto, or a whole number"));
        assert!(lines[2].contains("--on-unavailable: \"x\" is not valid, expected one of deny, error"));
    }
}

/// Commands that don't serve read the same settings, and refuse them alike.
#[test]
fn a_bad_setting_is_refused_by_every_command_that_reads_settings() {
    let directory = tempdir().unwrap();
    for command in [
        &["migrate"][..],
        &["user", "list"],
        &["key", "list"],
        &["cache", "stats"],
        &["key", "create", "--user", "a", "--name", "n"],
    ] {
        let ended: Ended =
            keyward(directory.path(), command).env("KEYWARD_STOR", "x").output().unwrap().into();
        assert_eq!(ended.code, 2, "{command:?} {}", ended.stderr);
        assert!(ended.stderr.contains("KEYWARD_STOR; did you mean KEYWARD_STORE?"), "{}", ended.stderr);
    }
}

#[test]
fn an_unreadable_file_is_refused() {
    let directory = tempdir().unwrap();
    let ended = run(directory.path(), &["config", "check", "--config", "absent.yaml"]);
    assert_eq!(ended.code, 2);
    assert!(ended.stderr.starts_with("error: absent.yaml: can't be read: "), "{}", ended.stderr);
}

#[test]
fn the_example_file_is_valid() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/config/keyward.yaml");
    let directory = tempdir().unwrap();
    let ended = run(directory.path(), &["config", "check", "--config", example]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, ""), "{}", ended.stderr);
}

#[test]
fn a_switch_may_stand_alone() {
    let directory = tempdir().unwrap();
    let ended = run(directory.path(), &["config", "print", "--forward-credentials", "--output", "json"]);
    assert_eq!(row(&printed(&ended), "forward-credentials")["value"], "on");
}

/// What an editor says of a settings file is what `config check` says, as far as a schema goes.
#[test]
fn the_schema_accepts_the_shipped_file_and_refuses_what_is_no_setting() {
    let directory = tempdir().unwrap();
    let ended = run(directory.path(), &["config", "schema"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let schema = jsonschema::validator_for(&serde_json::from_str(&ended.stdout).unwrap()).unwrap();
    let read = |text: &str| serde_saphyr::from_str::<Value>(text).unwrap();
    let shipped = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/keyward.yaml")).unwrap();
    if let Err(error) = schema.validate(&read(&shipped)) {
        panic!("{error} at {}", error.instance_path());
    }
    assert!(schema.is_valid(&read("grpc: {listen: '127.0.0.1:1'}\nforward: {credentials: true}")));
    for wrong in ["grcp: {listen: x}", "grpc: {lisen: x}", "grpc: 7", "log: {format: xml}", "lease: [1s]"] {
        assert!(!schema.is_valid(&read(wrong)), "{wrong}");
    }
}
