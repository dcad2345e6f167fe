//! Start, stop, and what the process says about itself.

use crate::support::keyward::Keyward;

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_a_ready_sidecar_cleanly() {
    let keyward = Keyward::new().start().await;
    assert_eq!(keyward.admin("/livez").await.status, 200);
    let status = keyward.sigterm_and_wait().await;
    assert!(status.success(), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sidecar_tells_its_statistics_to_the_command_line() {
    let keyward = Keyward::new().start().await;
    let stats = keyward.cli_json(&["cache", "stats"]);
    assert!(stats.is_object(), "{stats}");
    assert!(keyward.metric("keyward_build_info", &[]).await > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_sidecar_is_asked_for_its_health_by_the_same_binary() {
    let keyward = Keyward::new().start().await;
    let ready = String::from_utf8(keyward.cli_ok(&["health"])).unwrap();
    assert!(ready.starts_with("ready: "), "{ready}");
    assert_eq!(keyward.cli_ok(&["health", "--live"]), b"ok\n");
}
