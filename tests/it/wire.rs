//! The gRPC port itself: what it says to questions that are not from Envoy's HTTP filter, and where it listens.

use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
use rusqlite::Connection;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::program::run;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::keyward::Keyward;

/// Envoy's TCP filter asks without an HTTP request. In Envoy an empty answer is an allow, so this must be a denial.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_without_an_http_request_is_denied() {
    let keyward = Keyward::new().start().await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for check in [CheckRequest::default(), CheckRequest { attributes: Some(AttributeContext::default()) }] {
        let answer = authorizer.check(check).await;
        assert!(!answer.allows(), "{answer:?}");
        assert_eq!(answer.http_status(), 401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn both_forms_of_headers_are_read() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    for encoding in [Encoding::Raw, Encoding::Joined] {
        let check = Check::new("GET", "/v1/models").bearer(&key.secret).build(encoding);
        assert!(authorizer.check(check).await.allows(), "{encoding:?}");
    }
}

/// Envoy may send bodies up to its own limit; a check that is too large to decode would read as a fault.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_with_a_body_of_several_mebibytes_is_read() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let mut check = Check::new("POST", "/v1/chat/completions").bearer(&key.secret).build(Encoding::Raw);
    let http = check.attributes.as_mut().unwrap().request.as_mut().unwrap().http.as_mut().unwrap();
    http.raw_body = vec![b'x'; 7 << 20];
    assert!(authorizer.check(check).await.allows());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_health_service_answers_for_the_server_and_for_ext_authz() {
    let keyward = Keyward::new().start().await;
    let endpoint = Endpoint::from_shared(format!("http://{}", keyward.grpc_addr())).unwrap();
    let channel: Channel = endpoint.connect().await.unwrap();
    for service in ["", "envoy.service.auth.v3.Authorization"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner();
        assert_eq!(answer.status, 1, "{service:?} is not SERVING");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_one_clear_line() {
    let keyward = Keyward::new().start().await;
    let taken = keyward.grpc_addr().to_string();
    let folder = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", folder.path().join("other.db").display());
    let ended = run(
        folder.path(),
        &["serve", "--store", &store, "--grpc-listen", &taken, "--admin-listen", "127.0.0.1:0"],
    );
    assert_eq!(ended.code, 2, "{}", ended.stderr);
    let errors: Vec<&str> = ended.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{}", ended.stderr);
    assert!(errors[0].contains(&taken) && errors[0].contains("--grpc-listen"), "{}", errors[0]);
}

/// Whoever is asked in vain for a prefix must not be refused for long once it exists.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_prefix_is_remembered_for_its_time_and_no_longer() {
    let keyward = Keyward::new().arg("--cache-negative-ttl", "300ms").start().await;
    let user = keyward.create_user("ada", &[]);
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let ask = async || {
        let check = Check::new("GET", "/v1/models").bearer("kw_later-than-asked").build(Encoding::Raw);
        authorizer.check(check).await
    };
    for _ in 0..10 {
        assert!(!ask().await.allows());
    }
    let absent = [("cache", "record"), ("tier", "memory"), ("result", "absent")];
    assert!(keyward.count("keyward_cache_requests_total", &absent).await >= 1);
    let hash = bcrypt::hash("kw_later-than-asked", 4).unwrap();
    Connection::open(keyward.sqlite_file())
        .unwrap()
        .execute(
            "INSERT INTO api_keys (key_hash, key_prefix, user_id, is_active) VALUES (?1, 'kw_later', ?2, 1)",
            (hash, user),
        )
        .unwrap();
    let allowed = crate::support::eventually(async || ask().await.allows().then_some(())).await;
    assert!(allowed.is_some(), "the key stays unknown");
}

/// Numbers in Envoy's metadata are doubles, which have no 2^53 + 1.
#[tokio::test(flavor = "multi_thread")]
async fn an_id_beyond_what_a_double_holds_arrives_whole() {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    let file = Connection::open(keyward.sqlite_file()).unwrap();
    file.execute("UPDATE api_keys SET id = 9007199254740993", []).unwrap();
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let check = Check::new("GET", "/v1/models").bearer(&key.secret).build(Encoding::Raw);
    let answer = authorizer.check(check).await;
    assert!(answer.allows(), "{answer:?}");
    assert_eq!(answer.metadata("key_id"), Some("9007199254740993"));
}
