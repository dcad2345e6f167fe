//! Spans at a collector: what took time, under whose trace, and nothing that is secret.

use crate::support::collector::{Collector, attribute};
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::http::Request;
use crate::support::keyward::{Key, Keyward};
use crate::support::redis::Redis;
use crate::support::{Stack, eventually};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn traced(protocol: &str, more: &[(&str, &str)]) -> (Collector, Keyward, Key) {
    let collector = Collector::start().await;
    let builder =
        Keyward::new().arg("--otlp-endpoint", &collector.url(protocol)).arg("--otlp-protocol", protocol);
    let keyward = more.iter().fold(builder, |builder, (flag, value)| builder.arg(flag, value)).start().await;
    keyward.create_user("ada", &[]);
    let key = keyward.create_key("ada", "ci", &[]);
    (collector, keyward, key)
}

/// A cold check is made of its parts, under the caller's trace.
async fn a_cold_check_has_its_parts(protocol: &str) {
    let (collector, keyward, key) = traced(protocol, &[]).await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let check = Check::new("GET", "/v1/models")
        .bearer(&key.secret)
        .header("traceparent", format!("00-{TRACE}-{PARENT}-01").as_str())
        .header("x-request-id", "request-1");
    assert!(authorizer.check(check.build(Encoding::Raw)).await.allows());
    let root = collector.span(|span| span.name == "check" && hex(&span.trace_id) == TRACE).await;
    assert_eq!(hex(&root.parent_span_id), PARENT);
    for (name, value) in [
        ("http.request.method", "GET"),
        ("keyward.decision", "allow"),
        ("keyward.reason", "ok"),
        ("keyward.tier", "store"),
        ("keyward.key_id", &key.id.to_string()),
        ("keyward.request_id", "request-1"),
    ] {
        assert_eq!(attribute(&root, name), value, "{name}");
    }
    let lookup = collector.span(|span| span.name == "lookup" && span.parent_span_id == root.span_id).await;
    collector.span(|span| span.name == "store" && span.parent_span_id == lookup.span_id).await;
    collector.span(|span| span.name == "bcrypt" && span.parent_span_id == root.span_id).await;

    // From memory there are no parts; and what is refused says why.
    let wrong = Check::new("GET", "/v1/models").bearer(&key.wrong());
    assert!(!authorizer.check(wrong.build(Encoding::Raw)).await.allows());
    let refused = collector.span(|span| attribute(span, "keyward.reason") == "invalid_api_key").await;
    assert_eq!(attribute(&refused, "keyward.decision"), "deny");
    assert_eq!(attribute(&refused, "keyward.key_id"), "");
    let status = keyward.sigterm_and_wait().await;
    assert!(status.success(), "{status}");
    let all = format!("{:?}", collector.spans());
    assert!(!all.contains(&key.secret[8..]) && !all.contains(&key.wrong()[8..]), "{all}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_check_has_its_parts_by_grpc() {
    a_cold_check_has_its_parts("grpc").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_check_has_its_parts_by_http() {
    a_cold_check_has_its_parts("http").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_has_a_span_of_its_own() {
    let (redis, folder) = (Redis::start().await, tempfile::tempdir().unwrap());
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef").unwrap();
    let with_redis = [("--redis", &*redis.url()), ("--cache-secret-file", secret.to_str().unwrap())];
    let (collector, keyward, key) = traced("grpc", &with_redis).await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let check = Check::new("GET", "/v1/models").bearer(&key.secret);
    assert!(authorizer.check(check.build(Encoding::Raw)).await.allows());
    let lookup = collector.span(|span| span.name == "lookup").await;
    let redis = collector.span(|span| span.name == "redis" && span.parent_span_id == lookup.span_id).await;
    assert_eq!(attribute(&redis, "db.system.name"), "redis");
}

/// Whoever begins a trace decides about it; of those that begin here, only a share is exported.
#[tokio::test(flavor = "multi_thread")]
async fn the_caller_s_decision_to_sample_holds_and_ours_where_there_is_none() {
    let (collector, keyward, key) = traced("grpc", &[("--otlp-sample", "0")]).await;
    let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
    let other = TRACE.replace('4', "5");
    for context in [
        None,
        Some(format!("00-{other}-{PARENT}-00")),
        Some("nonsense".to_owned()),
        Some(format!("00-{TRACE}-{PARENT}-01")),
    ] {
        let check = Check::new("GET", "/v1/models").bearer(&key.secret);
        let check =
            context.iter().fold(check, |check, context| check.header("traceparent", context.as_str()));
        assert!(authorizer.check(check.build(Encoding::Raw)).await.allows());
    }
    // The last of them is the only one that is wanted.
    collector.span(|span| span.name == "check").await;
    assert!(keyward.sigterm_and_wait().await.success());
    let traces: Vec<String> = collector
        .spans()
        .iter()
        .filter(|span| span.name == "check")
        .map(|span| hex(&span.trace_id))
        .collect();
    assert_eq!(traces, [TRACE]);
}

/// A collector that is away costs spans and nothing else, neither a check nor the end of the process.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_disturbs_nothing() {
    let nobody = format!("http://{}", crate::support::port::free_addr());
    for protocol in ["grpc", "http"] {
        let builder = Keyward::new().arg("--otlp-endpoint", &nobody).arg("--otlp-protocol", protocol);
        let stack = Stack::start_with(builder, |envoy| envoy).await;
        stack.keyward.create_user("ada", &[]);
        let key = stack.keyward.create_key("ada", "ci", &["--hash", "sha256"]);
        let response = Request::get("/v1/models").bearer(&key.secret).send(stack.envoy.addr()).await;
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(stack.keyward.sigterm_and_wait().await.success());
    }
}

/// Envoy tells its span in the metadata of its question; the one in the request's headers is older.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_is_a_child_of_envoy_s_own_span() {
    let collector = Collector::start().await;
    let builder = Keyward::new().arg("--otlp-endpoint", &collector.url("grpc"));
    let cluster = format!(
        "    - name: collector
      type: STATIC
      load_assignment:
        cluster_name: collector
        endpoints:
          - lb_endpoints:
              - endpoint:
                  address: {{socket_address: {{address: 127.0.0.1, port_value: {}}}}}
      typed_extension_protocol_options:
        envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
          \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
          explicit_http_config: {{http2_protocol_options: {{}}}}

    - name: upstream
      type: STATIC",
        collector.grpc_addr().port()
    );
    let tracing = "                tracing:
                  provider:
                    name: envoy.tracers.opentelemetry
                    typed_config:
                      \"@type\": type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig
                      grpc_service: {envoy_grpc: {cluster_name: collector}, timeout: 5s}
                      service_name: envoy

                route_config:";
    let change = |envoy: crate::support::envoy::Builder| {
        envoy
            .replace("    - name: upstream\n      type: STATIC", &cluster)
            .replace("                route_config:", tracing)
    };
    let stack = Stack::start_with(builder, change).await;
    stack.keyward.create_user("ada", &[]);
    let key = stack.keyward.create_key("ada", "ci", &["--hash", "sha256"]);
    let sent = Request::get("/v1/models").header("traceparent", format!("00-{TRACE}-{PARENT}-01"));
    let response = sent.bearer(&key.secret).send(stack.envoy.addr()).await;
    assert_eq!(response.status, 200, "{}", response.text());
    let check = collector.span(|span| span.name == "check" && hex(&span.trace_id) == TRACE).await;
    assert_ne!(hex(&check.parent_span_id), PARENT, "not the caller's");
    let is_parent =
        |span: &&opentelemetry_proto::tonic::trace::v1::Span| span.span_id == check.parent_span_id;
    let parent = eventually(async || collector.spans_of("envoy").iter().find(is_parent).cloned()).await;
    assert_eq!(hex(&parent.expect("Envoy's span").trace_id), TRACE);
}
