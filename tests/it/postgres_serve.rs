//! The sidecar on Postgres: what callers hear while the database is well, frozen, gone, late or empty.

use crate::support::eventually;
use crate::support::grpc::{Answer, Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Builder, Key, Keyward};
use crate::support::postgres::Postgres;

async fn ask(keyward: &Keyward, secret: &str) -> Answer {
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    authorizer.check(Check::new("GET", "/v1/models").bearer(secret).build(Encoding::Raw)).await
}

fn on(postgres: &Postgres) -> Builder {
    Keyward::new().store(&postgres.url("platform"))
}

/// A database with tables, and a ready sidecar with a key.
async fn started(postgres: &Postgres, change: impl FnOnce(Builder) -> Builder) -> (Keyward, Key) {
    postgres.create_platform().await;
    let keyward = change(on(postgres)).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &["--rate-limit-per-minute", "60"]);
    (keyward, key)
}

/// What `/readyz` says, once it says anything.
async fn readiness(keyward: &Keyward) -> String {
    let said = eventually(async || Request::get("/readyz").try_send(keyward.admin_addr()).await.ok()).await;
    said.expect("the admin port answers").text()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_postgres_is_proven_once_and_its_use_is_written_once() {
    let postgres = Postgres::start().await;
    let (keyward, key) = started(&postgres, |builder| builder).await;
    for _ in 0..20 {
        let answer = ask(&keyward, &key.secret).await;
        assert!(answer.allows(), "{answer:?}");
        assert_eq!(answer.header("x-keyward-rate-limit-minute"), Some("60"));
    }
    assert_eq!(keyward.bcrypt_runs().await, 1);
    // What was noted is written on the way out at the latest.
    assert!(keyward.sigterm_and_wait().await.success());
    let client = postgres.client("platform").await;
    let used = client.query("SELECT id FROM api_keys WHERE last_used_at IS NOT NULL", &[]).await.unwrap();
    assert_eq!(used.len(), 1);
}

/// Neither a valid key nor an unknown one is accused of anything while the database can't be asked.
#[tokio::test(flavor = "multi_thread")]
async fn while_postgres_is_frozen_only_what_is_known_is_answered_and_nobody_is_accused() {
    let postgres = Postgres::start().await;
    let (keyward, key) = started(&postgres, |builder| builder.arg("--record-ttl-without-feed", "300s")).await;
    let cold = keyward.create_key("ada", "cold", &["--hash", "sha256"]);
    assert!(ask(&keyward, &key.secret).await.allows());
    postgres.freeze();
    assert!(ask(&keyward, &key.secret).await.allows());
    for unasked in [cold.secret.as_str(), "zz_unknown-and-not-asked-for"] {
        let answer = ask(&keyward, unasked).await;
        assert_eq!((answer.http_status(), answer.header("retry-after")), (503, Some("1")), "{answer:?}");
    }
    // A wrong secret of a known key is still wrong.
    let wrong = key.wrong();
    assert_eq!(ask(&keyward, &wrong).await.http_status(), 401);
    assert_eq!(keyward.admin("/livez").await.status, 200);
    postgres.resume();
    let recovered = eventually(async || ask(&keyward, &cold.secret).await.allows().then_some(())).await;
    assert!(recovered.is_some(), "the cold key stays unavailable");
    assert_eq!(ask(&keyward, "zz_unknown-and-not-asked-for").await.http_status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_has_grown_old_is_not_used_while_postgres_is_gone() {
    let mut postgres = Postgres::start().await;
    let (keyward, key) =
        started(&postgres, |builder| builder.arg("--lease", "200ms").arg("--outage-grace", "300ms")).await;
    assert!(ask(&keyward, &key.secret).await.allows());
    postgres.kill();
    let refused = eventually(async || {
        let answer = ask(&keyward, &key.secret).await;
        (!answer.allows()).then_some(answer)
    });
    let refused = refused.await.expect("the record is used for ever");
    assert_eq!(refused.http_status(), 503);
    postgres.start_again().await;
    let recovered = eventually(async || ask(&keyward, &key.secret).await.allows().then_some(())).await;
    assert!(recovered.is_some(), "the key stays unavailable: {:?}", ask(&keyward, &key.secret).await);
    // The proof outlived the record.
    assert_eq!(keyward.bcrypt_runs().await, 1);
}

/// `consistency: strict` reads the record from the store for each request. Without a change feed, so that what the route makes of it can be told from what the feed does.
#[tokio::test(flavor = "multi_thread")]
async fn a_strict_route_sees_a_change_at_once() {
    let postgres = Postgres::start().await;
    postgres.create_platform().await;
    let platform = postgres.client("platform").await;
    platform.batch_execute("DROP TRIGGER keyward_changes ON users").await.unwrap();
    let keyward = on(&postgres).arg("--record-ttl-without-feed", "300s").start().await;
    assert!(readiness(&keyward).await.starts_with("ready: ttl mode"));
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let relaxed = || Check::new("GET", "/v1/models").bearer(&key.secret);
    let strict = || relaxed().context_extension("consistency", "strict");
    assert!(authorizer.check(relaxed().build(Encoding::Raw)).await.allows());
    keyward.cli_ok(&["key", "revoke", &key.id.to_string()]);
    let answer = authorizer.check(strict().build(Encoding::Raw)).await;
    assert_eq!(answer.header("x-keyward-reason"), Some("key_inactive"));
    // The difference that the route makes: the record in memory still says otherwise.
    assert!(authorizer.check(relaxed().build(Encoding::Raw)).await.allows());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_on_unavailable_error_the_failure_is_left_to_envoy() {
    let postgres = Postgres::start().await;
    let (keyward, key) = started(&postgres, |builder| builder.arg("--on-unavailable", "error")).await;
    postgres.freeze();
    let mut client =
        envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient::connect(
            format!("http://{}", keyward.grpc_addr()),
        )
        .await
        .unwrap();
    let check = Check::new("GET", "/v1/models").bearer(&key.secret).build(Encoding::Raw);
    let status = client.check(check).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    postgres.resume();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_tables_it_lives_says_what_to_do_and_becomes_ready_when_it_is_done() {
    let postgres = Postgres::start().await;
    postgres.create_database("platform").await;
    let mut keyward = on(&postgres).launch();
    let said = eventually(async || {
        let said = readiness(&keyward).await;
        said.contains("keyward migrate").then_some(())
    });
    assert!(said.await.is_some(), "{}", keyward.log());
    assert_eq!(keyward.admin("/readyz").await.status, 503);
    assert_eq!(ask(&keyward, "kw_any-key-at-all").await.http_status(), 503);
    keyward.cli_ok(&["migrate"]);
    keyward.await_ready().await;
    assert!(readiness(&keyward).await.contains("ttl mode"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_comes_late_is_waited_for() {
    let mut postgres = Postgres::start().await;
    postgres.create_database("platform").await;
    let prepare = on(&postgres).launch();
    prepare.cli_ok(&["migrate"]);
    drop(prepare);
    postgres.stop();
    let mut keyward = on(&postgres).launch();
    assert!(readiness(&keyward).await.contains("not ready"));
    postgres.start_again().await;
    keyward.await_ready().await;
}
