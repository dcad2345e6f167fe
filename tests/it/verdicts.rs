//! bcrypt runs once for a key and a hash, however often and at what time the key comes.

use tokio::task::JoinSet;

use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::keyward::Keyward;

#[tokio::test(flavor = "multi_thread")]
async fn fifty_first_requests_at_once_share_one_bcrypt_run() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let mut checks = JoinSet::new();
    for _ in 0..50 {
        let authorizer = authorizer.clone();
        let request = Check::new("GET", "/v1/models").bearer(&key.secret).build(Encoding::Raw);
        checks.spawn(async move { authorizer.check(request).await });
    }
    for answer in checks.join_all().await {
        assert!(answer.allows(), "{answer:?}");
    }
    assert_eq!(keyward.bcrypt_runs().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_hashed_once_as_well() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let wrong = format!("{}-and-more", &key.secret[..20]);
    for _ in 0..5 {
        let request = Check::new("GET", "/v1/models").bearer(&wrong).build(Encoding::Raw);
        assert!(!authorizer.check(request).await.allows());
    }
    assert_eq!(keyward.bcrypt_runs().await, 1);
}

/// bcrypt may take longer than a check may wait. The caller is told to try again, never that the key is wrong, and the
/// work is not thrown away.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_runs_out_of_time_is_503_and_its_verdict_is_kept() {
    let keyward = Keyward::new().arg("--check-timeout", "1ms").start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let request = || Check::new("GET", "/v1/models").bearer(&key.secret).build(Encoding::Raw);
    let first = authorizer.check(request()).await;
    assert_eq!((first.http_status(), first.header("retry-after")), (503, Some("1")), "{first:?}");
    let allowed = eventually(async || {
        let answer = authorizer.check(request()).await;
        assert!(answer.allows() || answer.http_status() == 503, "{answer:?}");
        answer.allows().then_some(())
    });
    assert!(allowed.await.is_some(), "the verdict is not kept");
    assert_eq!(keyward.bcrypt_runs().await, 1);
}

/// A key that no record can belong to costs no bcrypt: there is nothing to compare it with.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_prefix_costs_no_bcrypt() {
    let keyward = Keyward::new().start().await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for prefix in 0..20 {
        let unknown = format!("zz_{prefix:05}-unknown");
        let request = Check::new("GET", "/v1/models").bearer(&unknown).build(Encoding::Raw);
        assert_eq!(authorizer.check(request).await.header("x-keyward-reason"), Some("invalid_api_key"));
    }
    assert_eq!(keyward.bcrypt_runs().await, 0);
}
