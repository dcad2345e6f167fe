//! An unknown prefix and a wrong secret are one answer: whoever holds no key learns from neither which prefixes exist.

use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use tokio::time::Instant;

use crate::support::envoy::Envoy;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::{Request, Response};
use crate::support::keyward::{Key, Keyward};
use crate::support::port::free_addr;
use crate::support::upstream::Upstream;

const ID: &str = "one-request-id";

/// What a caller without a key can try: a prefix that nobody has, and wrong secrets for keys in every state.
struct Tries {
    unknown: String,
    wrong: Vec<(&'static str, String)>,
}

/// The proven key has been used; the others have never been seen.
async fn tries(keyward: &Keyward) -> Tries {
    keyward.create_user("ada", &[]);
    keyward.create_user("eve", &[]);
    let create = |user: &str, name: &str, hash: &str| keyward.create_key(user, name, &["--hash", hash]);
    let proven = create("ada", "proven", "bcrypt");
    let (cold, plain) = (create("ada", "cold", "bcrypt"), create("ada", "plain", "sha256"));
    let (revoked, of_nobody) = (create("ada", "revoked", "sha256"), create("eve", "disabled", "sha256"));
    keyward.cli_ok(&["key", "revoke", &revoked.id.to_string()]);
    keyward.cli_ok(&["user", "disable", "eve"]);
    let answer = Authorizer::connect(keyward.grpc_addr()).await;
    let check = Check::new("GET", "/v1/models").bearer(&proven.secret);
    assert!(answer.check(check.build(Encoding::Raw)).await.allows());
    let wrong = [
        ("proven", &proven),
        ("cold", &cold),
        ("plain", &plain),
        ("revoked", &revoked),
        ("disabled", &of_nobody),
    ];
    let wrong = wrong.map(|(what, key): (_, &Key)| (what, key.wrong()));
    let wrong = wrong.into_iter().chain([("mistyped", proven.mistyped())]).collect();
    Tries { unknown: "zz_unknown-prefix-with-a-secret".to_owned(), wrong }
}

/// Without what every answer has of its own.
fn seen(response: Response) -> (u16, Vec<(String, String)>, String) {
    let own = ["date", "x-envoy-upstream-service-time"];
    let headers =
        response.headers.iter().filter(|(name, _)| !own.contains(&name.as_str())).cloned().collect();
    (response.status, headers, response.text())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_prefix_and_a_wrong_secret_are_answered_alike_to_the_byte() {
    let http = free_addr();
    let keyward = Keyward::new().arg("--http-listen", &http.to_string()).start().await;
    let upstream = Upstream::start().await;
    let envoy = Envoy::new(keyward.grpc_addr(), upstream.addr()).start().await;
    let tries = tries(&keyward).await;
    let mut client = AuthorizationClient::connect(format!("http://{}", keyward.grpc_addr())).await.unwrap();
    for (path, kind) in [
        ("/v1/models", "application/json"),
        ("/v1/messages", "application/json"),
        ("/v1beta/models/gemini-pro:generateContent", "application/json"),
        ("/pkg.Service/Method", "application/grpc"),
    ] {
        let check = |secret: &str| {
            let check = Check::new("POST", path).bearer(secret).header("content-type", kind);
            check.header("x-request-id", ID).build(Encoding::Raw)
        };
        let through =
            |secret: &str| Request::post_as(kind, path, "{}").bearer(secret).header("x-request-id", ID);
        let ask = |secret: &str| {
            let path = format!("/check{path}");
            Request::new("POST", &path).bearer(secret).header("content-type", kind).header("x-request-id", ID)
        };
        let unknown = client.check(check(&tries.unknown)).await.unwrap();
        assert!(!format!("{unknown:?}").contains("key_id"), "{unknown:?}");
        let unknown_through = without_id(through(&tries.unknown).send(envoy.addr()).await);
        let unknown_http = seen(ask(&tries.unknown).send(http).await);
        for (what, wrong) in &tries.wrong {
            let answer = client.check(check(wrong)).await.unwrap();
            let metadata = |response: &tonic::Response<_>| {
                let mut all = response.metadata().clone();
                all.remove("date");
                format!("{all:?}")
            };
            assert_eq!(metadata(&answer), metadata(&unknown), "{what} on {path}");
            assert_eq!(answer.get_ref(), unknown.get_ref(), "{what} on {path}");
            assert_eq!(
                without_id(through(wrong).send(envoy.addr()).await),
                unknown_through,
                "{what} on {path}"
            );
            assert_eq!(seen(ask(wrong).send(http).await), unknown_http, "{what} on {path}");
        }
    }
    assert_eq!(upstream.requests(), 0);
}

/// Envoy gives every request from outside an id of its own; it is put into the body and two headers, and nowhere else.
fn without_id(response: Response) -> (u16, Vec<(String, String)>, String) {
    let id = response.value("x-request-id").unwrap_or_default().to_owned();
    let (status, headers, body) = seen(response);
    let strip = |text: String| if id.is_empty() { text } else { text.replace(&id, "ID") };
    (status, headers.into_iter().map(|(name, value)| (name, strip(value))).collect(), strip(body))
}

/// `make timing`: how well the two can be told apart by time. Prints, and holds nothing: time is no promise of ours.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: make timing"]
async fn how_long_the_one_answer_takes() {
    const TIMES: usize = 200;
    let keyward = Keyward::new().start().await;
    let tries = tries(&keyward).await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    println!("{:<26} {:>9} {:>9} {:>9}  (of {TIMES}, by gRPC, in microseconds)", "", "p10", "p50", "p90");
    let fresh = |at: usize| format!("q{at:06}-unknown-prefix");
    let again = |_| tries.unknown.clone();
    println!("{}", measure(&authorizer, "unknown prefix, fresh", TIMES, fresh).await);
    println!("{}", measure(&authorizer, "unknown prefix, again", TIMES, again).await);
    for (what, wrong) in &tries.wrong {
        // Another wrong secret each time; without a checksum of ours, which would be refused before any look-up.
        let another = |at: usize| format!("{}-{at:06}-wrong", &wrong[..8]);
        println!("{}", measure(&authorizer, &format!("wrong secret, {what} key"), TIMES, another).await);
    }
}

async fn measure(
    authorizer: &Authorizer,
    what: &str,
    times: usize,
    secret: impl Fn(usize) -> String,
) -> String {
    let mut took: Vec<std::time::Duration> = Vec::with_capacity(times);
    for at in 0..times {
        let check = Check::new("GET", "/v1/models").bearer(&secret(at)).build(Encoding::Raw);
        let before = Instant::now();
        let answer = authorizer.check(check).await;
        took.push(before.elapsed());
        assert!(!answer.allows());
    }
    took.sort_unstable();
    let at = |share: usize| took.get(times * share / 100).map_or(0, std::time::Duration::as_micros);
    format!("{what:<26} {:>9} {:>9} {:>9}", at(10), at(50), at(90))
}
