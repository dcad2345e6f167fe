//! SIGHUP: what is read again, what is named, and that a bad reload changes nothing.

use std::fs;

use serde_json::Value;
use tempfile::tempdir;

use crate::support::eventually;
use crate::support::grpc::Authorizer;
use crate::support::keyward::Keyward;

async fn reload(keyward: &Keyward, result: &str) {
    let count = async || keyward.count("keyward_reloads_total", &[("result", result)]).await;
    let before = count().await;
    keyward.hangup();
    let done = eventually(async || (count().await == before + 1).then_some(()));
    assert!(done.await.is_some(), "no reload is counted as {result}:\n{}", keyward.log());
}

async fn shown(keyward: &Keyward, flag: &str) -> Value {
    let settings: Value = serde_json::from_str(&keyward.admin("/config").await.text()).unwrap();
    settings.get(flag).unwrap_or_else(|| panic!("{flag} is not in {settings}")).clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_level_takes_effect_and_a_bad_file_changes_nothing() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("keyward.yaml");
    fs::write(&file, "log: {level: info}\n").unwrap();
    let keyward = Keyward::new().arg("--config", &file.display().to_string()).start().await;
    Authorizer::connect(keyward.grpc_addr()).await;
    assert!(!keyward.log().contains("TRACE"));

    fs::write(&file, "log: {level: trace}\n").unwrap();
    reload(&keyward, "ok").await;
    // HTTP/2 has much to say at that level.
    Authorizer::connect(keyward.grpc_addr()).await;
    assert!(eventually(async || keyward.log().contains("TRACE").then_some(())).await.is_some());
    assert_eq!(shown(&keyward, "log-level").await, "trace");

    fs::write(&file, "log: {level: warn, lvel: x}\n").unwrap();
    reload(&keyward, "failed").await;
    let log = keyward.log();
    let failures: Vec<_> = log.lines().filter(|line| line.contains("reload failed")).collect();
    assert_eq!(failures.len(), 1, "{log}");
    assert!(failures[0].contains("keyward.yaml") && failures[0].contains("lvel"), "{}", failures[0]);
    assert_eq!(shown(&keyward, "log-level").await, "trace");
    assert_eq!(keyward.admin("/readyz").await.status, 200);

    fs::remove_file(&file).unwrap();
    reload(&keyward, "failed").await;

    fs::write(&file, "log: {level: info}\ncache: {record_ttl: 7s}\n").unwrap();
    reload(&keyward, "ok").await;
    let log = keyward.log();
    let line = log.lines().find(|line| line.contains("needs a restart")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("--cache-record-ttl") && !line.contains("--log-level"), "{line}");
    assert_eq!(shown(&keyward, "cache-record-ttl").await, "5m", "what is shown is what is in force");
    assert_eq!(shown(&keyward, "log-level").await, "info");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deny_file_is_read_at_once() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("deny");
    fs::write(&file, "").unwrap();
    let keyward = Keyward::new().arg("--deny-file", &file.display().to_string()).start().await;
    fs::write(&file, "key-id 1\n").unwrap();
    reload(&keyward, "ok").await;
    assert_eq!(keyward.count("keyward_deny_list_entries", &[]).await, 1);
    fs::write(&file, "key-id one\n").unwrap();
    reload(&keyward, "failed").await;
    assert_eq!(keyward.count("keyward_deny_list_entries", &[]).await, 1);
}
