//! Limits as data: what Keyward says of a key's limits, through the shipped `envoy/rate-limit.yaml` and a real Envoy, to a
//! rate limit service that writes down what it is asked.

use serde_json::Value;

use crate::support::Stack;
use crate::support::envoy::{self, Envoy};
use crate::support::http::Request;
use crate::support::keyward::{Key, Keyward};
use crate::support::port::free_addr;
use crate::support::rate_limit::{Asked, RESET_SECONDS, RateLimiter, Reply};
use crate::support::upstream::Upstream;

const PATH: &str = "/v1/models";

/// The most that the columns and the command line hold.
const MOST: &str = "2147483647";

/// A key that the service is asked about.
const LIMITED: [&str; 4] = ["--hash", "sha256", "--rate-limit-per-minute", "60"];

struct Limited {
    stack: Stack,
    limiter: RateLimiter,
}

impl Limited {
    async fn start() -> Self {
        Self::start_with(|envoy| envoy).await
    }

    /// With changes to `envoy/rate-limit.yaml`.
    async fn start_with(change: impl FnOnce(envoy::Builder) -> envoy::Builder) -> Self {
        let limiter = RateLimiter::start(Reply::Ok).await;
        // A busy machine may be slower than the shipped 0.1 s.
        let patient = |envoy: envoy::Builder| change(envoy.replace(" timeout: 0.1s", " timeout: 15s"));
        let stack = stack(limiter.addr().port(), patient).await;
        Self { stack, limiter }
    }

    fn key(&self, name: &str, options: &[&str]) -> Key {
        self.stack.keyward.create_key("ada", name, &[&["--hash", "sha256"], options].concat())
    }

    /// One request with that key, which passes; what the service was asked about it.
    async fn asked(&self, key: &Key) -> Vec<Vec<Asked>> {
        let response = Request::get(PATH).bearer(&key.secret).send(self.stack.envoy.addr()).await;
        assert_eq!(response.status, 200, "{} {}", response.reason(), response.text());
        self.limiter.take_asked()
    }
}

async fn stack(limiter: u16, change: impl FnOnce(envoy::Builder) -> envoy::Builder) -> Stack {
    let keyward = Keyward::new().start().await;
    keyward.create_user("ada", &[]);
    let upstream = Upstream::start().await;
    let envoy = Envoy::of_file("envoy/rate-limit.yaml", keyward.grpc_addr(), upstream.addr())
        .replace("port_value: 8081}", &format!("port_value: {limiter}}}"));
    let envoy = change(envoy).start().await;
    Stack { keyward, envoy, upstream }
}

/// The question about one limit as `envoy/rate-limit.yaml` asks it.
fn limit(key: &Key, requests: u32, unit: &'static str) -> Asked {
    let entries = vec![("key_id".to_owned(), key.id.to_string()), ("unit".to_owned(), unit.to_owned())];
    Asked { entries, limit: Some((requests, unit)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_limit_of_the_key_is_asked_about_with_its_number_and_no_other() {
    let limited = Limited::start().await;
    let all = limited.key(
        "all",
        &["--rate-limit-per-minute", "60", "--rate-limit-per-hour", "1000", "--rate-limit-per-day", MOST],
    );
    let asked = limited.asked(&all).await;
    let expected = vec![
        limit(&all, 60, "MINUTE"),
        limit(&all, 1000, "HOUR"),
        limit(&all, i32::MAX.unsigned_abs(), "DAY"),
    ];
    assert_eq!(asked, [expected]);
    for (option, number, unit) in [
        ("--rate-limit-per-minute", 5, "MINUTE"),
        ("--rate-limit-per-hour", 6, "HOUR"),
        ("--rate-limit-per-day", 7, "DAY"),
    ] {
        let one = limited.key(unit, &[option, &number.to_string()]);
        assert_eq!(limited.asked(&one).await, [vec![limit(&one, number, unit)]]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_without_limits_is_not_asked_about_at_all() {
    let limited = Limited::start().await;
    limited.limiter.reply(Reply::OverLimit);
    let none = limited.key("none", &[]);
    assert_eq!(limited.asked(&none).await, Vec::<Vec<Asked>>::new());
    let unlimited = limited.key("unlimited", &["--is-unlimited"]);
    assert_eq!(limited.asked(&unlimited).await, Vec::<Vec<Asked>>::new());
}

/// 0 is a number like any other, and the strictest. `is_unlimited` is about money.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_zero_is_a_limit_and_is_unlimited_lifts_none() {
    let limited = Limited::start().await;
    let zero = limited.key("zero", &["--rate-limit-per-day", "0"]);
    assert_eq!(limited.asked(&zero).await, [vec![limit(&zero, 0, "DAY")]]);
    let unlimited = limited.key("unlimited", &["--is-unlimited", "--rate-limit-per-minute", "9"]);
    assert_eq!(limited.asked(&unlimited).await, [vec![limit(&unlimited, 9, "MINUTE")]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_caller_sends_changes_no_limit() {
    let limited = Limited::start().await;
    let bound = limited.key("bound", &["--rate-limit-per-minute", "60"]);
    let free = limited.key("free", &[]);
    let forged = |key: &Key| {
        ["minute", "hour", "day"]
            .iter()
            .fold(Request::get(PATH).bearer(&key.secret), |request, unit| {
                request.header(&format!("X-Keyward-Rate-Limit-{unit}"), "1000000")
            })
            .header("x-keyward-key-id", "424242")
    };
    let sent = forged(&bound).send(limited.stack.envoy.addr()).await.echo();
    assert_eq!(limited.limiter.take_asked(), [vec![limit(&bound, 60, "MINUTE")]]);
    assert_eq!(sent.values("x-keyward-rate-limit-minute"), ["60"]);
    assert_eq!(sent.values("x-keyward-rate-limit-hour"), Vec::<&str>::new());
    let sent = forged(&free).send(limited.stack.envoy.addr()).await.echo();
    assert_eq!(limited.limiter.take_asked(), Vec::<Vec<Asked>>::new());
    for unit in ["minute", "hour", "day"] {
        assert_eq!(sent.values(&format!("x-keyward-rate-limit-{unit}")), Vec::<&str>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_the_limit_is_429_and_the_upstream_hears_nothing() {
    let limited = Limited::start().await;
    let key = limited.key("ci", &["--rate-limit-per-minute", "60", "--rate-limit-per-day", "1000"]);
    limited.limiter.reply(Reply::OverLimit);
    let response = Request::get("/v1/over").bearer(&key.secret).send(limited.stack.envoy.addr()).await;
    assert_eq!(response.status, 429, "{}", response.text());
    assert_eq!(limited.stack.upstream.requests(), 0);
    assert_eq!(response.value("retry-after"), Some(RESET_SECONDS.to_string().as_str()));
    assert_eq!(response.value("x-ratelimit-limit"), Some("60, 60;w=60, 1000;w=86400"));
    assert_eq!(response.value("x-ratelimit-remaining"), Some("0"));
    assert_eq!(response.reason(), "", "it is not Keyward that refused");
    let line = limited.stack.envoy.access_log_of("/v1/over").await;
    assert_eq!((&line["flags"], &line["details"]), (&"RL".into(), &"request_rate_limited".into()));
    assert_eq!(line["key_id"], Value::from(key.id.to_string()));
    assert_eq!(limited.stack.envoy.stat("cluster.upstream.ratelimit.over_limit").await, 1);
    let grpc = Request::post_as("application/grpc", "/v1/grpc", "").bearer(&key.secret);
    let response = grpc.send(limited.stack.envoy.addr()).await;
    assert_eq!((response.status, response.value("grpc-status")), (200, Some("8")), "RESOURCE_EXHAUSTED");
    limited.limiter.reply(Reply::Ok);
    let response = Request::get(PATH).bearer(&key.secret).send(limited.stack.envoy.addr()).await;
    assert_eq!(response.status, 200);
    assert_eq!(response.values("x-ratelimit-limit").len(), 1, "{response:?}");
    assert_eq!(limited.stack.envoy.stat("cluster.upstream.ratelimit.ok").await, 1);
    assert_eq!(limited.stack.upstream.requests(), 1);
}

/// Otherwise anybody could use up the limit of a key by its public prefix.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_is_not_counted() {
    let limited = Limited::start().await;
    let key = limited.key("ci", &["--rate-limit-per-minute", "60", "--allowed-endpoints", "/v1/embeddings"]);
    for (request, expected) in [
        (Request::get(PATH), "missing_credentials"),
        (Request::get(PATH).bearer(&key.wrong()), "invalid_api_key"),
        (Request::get(PATH).bearer(&key.secret), "endpoint_not_allowed"),
    ] {
        assert_eq!(request.send(limited.stack.envoy.addr()).await.reason(), expected);
    }
    let allowed = Request::get("/v1/embeddings").bearer(&key.secret).send(limited.stack.envoy.addr()).await;
    assert_eq!(allowed.status, 200, "{}", allowed.text());
    assert_eq!(limited.limiter.take_asked(), [vec![limit(&key, 60, "MINUTE")]], "of four requests, the last");
}

/// `failure_mode_deny: false` and `timeout: 0.1s`, as shipped.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_does_not_answer_stops_nobody() {
    let silent = RateLimiter::start(Reply::Silence).await;
    let broken = RateLimiter::start(Reply::Broken).await;
    for addr in [free_addr(), silent.addr(), broken.addr()] {
        let stack = stack(addr.port(), |envoy| envoy).await;
        let key = stack.keyward.create_key("ada", "ci", &LIMITED);
        let response = Request::get(PATH).bearer(&key.secret).send(stack.envoy.addr()).await;
        assert_eq!(response.status, 200, "{addr}: {}", response.text());
        for counter in ["error", "failure_mode_allowed"] {
            let name = format!("cluster.upstream.ratelimit.{counter}");
            assert_eq!(stack.envoy.stat(&name).await, 1, "{addr} {counter}");
        }
    }
}

/// The other choice that the file offers.
#[tokio::test(flavor = "multi_thread")]
async fn with_failure_mode_deny_the_caller_reads_503() {
    let strict = |envoy: envoy::Builder| envoy.replace("failure_mode_deny: false", "failure_mode_deny: true");
    let absent = stack(free_addr().port(), strict).await;
    let bound = absent.keyward.create_key("ada", "bound", &LIMITED);
    let free = absent.keyward.create_key("ada", "free", &["--hash", "sha256"]);
    let response = Request::get(PATH).bearer(&bound.secret).send(absent.envoy.addr()).await;
    assert_eq!(response.status, 503, "{}", response.text());
    assert_eq!(absent.upstream.requests(), 0);
    assert_eq!(absent.envoy.stat("cluster.upstream.ratelimit.error").await, 1);
    let response = Request::get(PATH).bearer(&free.secret).send(absent.envoy.addr()).await;
    assert_eq!(response.status, 200, "no limit, no question: {}", response.text());
}

/// What the entry `unit` is for: Envoy leaves out a number that it does not find, and asks all the same.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_unit_as_an_entry_a_missing_limit_is_asked_about_without_a_number() {
    let path = "metadata_key: {key: envoy.filters.http.ext_authz, path: [{key: rate_limit}, {key: hour}, {key: unit}]}";
    let indent = " ".repeat(32);
    let entry = format!("{}- metadata:\n{indent}descriptor_key: unit\n{indent}{path}\n", " ".repeat(28));
    for (shipped, ours) in [(&*entry, ""), (path, &*format!("{path}\n{indent}skip_if_absent: true"))] {
        let limited = Limited::start_with(|envoy| envoy.replace(shipped, ours)).await;
        let key = limited.key("ci", &["--rate-limit-per-minute", "60"]);
        let id = ("key_id".to_owned(), key.id.to_string());
        let hour = Asked { entries: vec![id], limit: None };
        assert_eq!(limited.asked(&key).await, [vec![limit(&key, 60, "MINUTE"), hour]], "{ours}");
    }
}

/// A new route is limited without being told to be; a request without a key has no limit to ask about.
#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_on_every_route_and_for_keys_only() {
    let limited = Limited::start_with(|envoy| envoy.route("/public", "{anonymous: allow}")).await;
    limited.limiter.reply(Reply::OverLimit);
    let key = limited.key("ci", &["--rate-limit-per-minute", "60"]);
    let with_key = Request::get("/public").bearer(&key.secret).send(limited.stack.envoy.addr()).await;
    assert_eq!(with_key.status, 429);
    assert_eq!(limited.limiter.take_asked(), [vec![limit(&key, 60, "MINUTE")]]);
    let without = Request::get("/public").send(limited.stack.envoy.addr()).await;
    assert_eq!(without.status, 200, "{}", without.text());
    assert_eq!(limited.limiter.take_asked(), Vec::<Vec<Asked>>::new());
}

/// For a limiter in the application: by default, and in the same numbers.
#[tokio::test(flavor = "multi_thread")]
async fn the_upstream_reads_the_same_numbers_in_headers() {
    let limited = Limited::start().await;
    let key = limited.key("ci", &["--rate-limit-per-minute", "0", "--rate-limit-per-day", MOST]);
    let request = Request::get(PATH).bearer(&key.secret);
    let echo = request.send(limited.stack.envoy.addr()).await.echo();
    assert_eq!(echo.values("x-keyward-rate-limit-minute"), ["0"]);
    assert_eq!(echo.values("x-keyward-rate-limit-hour"), Vec::<&str>::new());
    assert_eq!(echo.values("x-keyward-rate-limit-day"), [MOST]);
}
