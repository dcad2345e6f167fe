//! bcrypt can't be exhausted, and nobody is locked out by what a stranger does.

use envoy_types::pb::envoy::service::auth::v3::CheckRequest;
use tokio::task::JoinSet;

use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::keyward::Keyward;

const OWNER: &str = "10.0.0.1";
const STRANGER: &str = "10.0.0.66";

fn check(key: &str, client: &str) -> CheckRequest {
    Check::new("GET", "/v1/models").bearer(key).source(client).build(Encoding::Raw)
}

/// Another secret for each number; of no form that is made here, so that it has to be looked at.
fn guess(prefix: &str, number: usize) -> String {
    format!("{}{number:08}-guess", &prefix[..8])
}

/// A key that is known is answered as ever; one that was never seen is proven from its owner's address, whatever a
/// stranger has done to its prefix. A stranger's guesses cost no more bcrypt than the setting says.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_s_guesses_end_and_the_owner_is_not_locked_out() {
    let keyward = Keyward::new().arg("--attempts-per-minute", "5").start().await;
    keyward.create_user("ada", &[]);
    let (known, new) = (keyward.create_key("ada", "known", &[]), keyward.create_key("ada", "new", &[]));
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    assert!(authorizer.check(check(&known.secret, STRANGER)).await.allows());

    let mut compared = keyward.bcrypt_runs().await;
    for (key, costs) in [(&known, 0), (&new, 1)] {
        let mut looked_at = 0;
        for number in 0..40 {
            let answer = authorizer.check(check(&guess(&key.secret, number), STRANGER)).await;
            let expected = if answer.http_status() == 429 { "too_many_attempts" } else { "invalid_api_key" };
            assert_eq!(answer.header("x-keyward-reason"), Some(expected), "{answer:?}");
            assert!(number >= 5 || expected == "invalid_api_key", "refused too early");
            looked_at += u64::from(answer.http_status() == 401);
        }
        assert!(looked_at < 40, "nobody minds");
        compared += costs * looked_at;
        assert_eq!(keyward.bcrypt_runs().await, compared, "what is refused is not compared");
    }

    assert!(authorizer.check(check(&known.secret, STRANGER)).await.allows(), "a known key waits for nobody");
    assert!(authorizer.check(check(&new.secret, OWNER)).await.allows(), "the owner is locked out");
}

/// Else the count would tell which prefixes exist, and which of them were used.
#[tokio::test(flavor = "multi_thread")]
async fn guesses_are_answered_alike_whether_or_not_there_is_such_a_prefix() {
    let keyward = Keyward::new().arg("--attempts-per-minute", "3").start().await;
    keyward.create_user("ada", &[]);
    let known = keyward.create_key("ada", "known", &[]);
    let new = keyward.create_key("ada", "new", &[]);
    let machine = keyward.create_key("ada", "machine", &["--hash", "sha256"]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    assert!(authorizer.check(check(&known.secret, OWNER)).await.allows());
    for prefix in ["zz_nokey", &known.secret, &new.secret, &machine.secret] {
        let mut codes = Vec::new();
        for number in 0..4 {
            codes.push(authorizer.check(check(&guess(prefix, number), STRANGER)).await.http_status());
        }
        assert_eq!(codes, [401, 401, 401, 429], "{}", &prefix[..8]);
    }
    // One with a typing error too, which is refused without a look at anything.
    let mut codes = Vec::new();
    for _ in 0..4 {
        codes.push(authorizer.check(check(&new.mistyped(), "10.0.0.67")).await.http_status());
    }
    assert_eq!(codes, [401, 401, 401, 429]);
}

/// The first requests of a good key come at once, and more of them than there may be wrong ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_a_new_key_is_no_burst_of_attempts() {
    let keyward = Keyward::new().arg("--attempts-per-minute", "8").start().await;
    keyward.create_user("ada", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for round in 0..3 {
        let key = keyward.create_key("ada", &format!("key {round}"), &[]);
        let mut checks = JoinSet::new();
        for _ in 0..100 {
            let (authorizer, request) = (authorizer.clone(), check(&key.secret, OWNER));
            checks.spawn(async move { authorizer.check(request).await });
        }
        for answer in checks.join_all().await {
            assert!(answer.allows(), "{answer:?}");
        }
    }
}

/// Guesses at the same time do not all pass before the first of them is counted.
#[tokio::test(flavor = "multi_thread")]
async fn guesses_at_the_same_time_are_counted_before_they_are_compared() {
    let keyward = Keyward::new().arg("--attempts-per-minute", "5").start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let started = tokio::time::Instant::now();
    let mut checks = JoinSet::new();
    for number in 0..50 {
        let (authorizer, request) = (authorizer.clone(), check(&guess(&key.secret, number), STRANGER));
        checks.spawn(async move { authorizer.check(request).await });
    }
    checks.join_all().await;
    // What comes back meanwhile: one every twelve seconds.
    let came_back = started.elapsed().as_secs() / 12;
    let compared = keyward.bcrypt_runs().await;
    assert!(compared <= 5 + came_back + 1, "{compared} comparisons");
}

/// Made-up prefixes cost the store a bounded number of queries, and others' new keys nothing.
#[tokio::test(flavor = "multi_thread")]
async fn made_up_prefixes_from_one_address_leave_the_store_to_the_others() {
    let keyward = Keyward::new().arg("--lookups-per-second", "4").start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let started = tokio::time::Instant::now();
    let mut refused = 0;
    for number in 0..200 {
        let answer = authorizer.check(check(&format!("zz{number:06}-made-up"), STRANGER)).await;
        assert!(number > 0 || answer.http_status() == 401, "{answer:?}");
        if answer.http_status() != 401 {
            let told = (answer.header("x-keyward-reason"), answer.header("retry-after"));
            assert_eq!(told, (Some("unavailable"), Some("1")), "{answer:?}");
            refused += 1;
        }
    }
    assert!(refused > 0, "nobody minds");
    let queries =
        keyward.count("keyward_cache_requests_total", &[("tier", "store"), ("result", "absent")]).await;
    // A quarter of four in a second.
    let most = started.elapsed().as_secs() + 2;
    assert!(queries <= most, "{queries} queries, and there may be {most}");
    assert!(authorizer.check(check(&key.secret, OWNER)).await.allows(), "another's new key");
}
