//! Traces: spans of checks to an OpenTelemetry collector, by OTLP over gRPC or HTTP.
//!
//! Spans are of level TRACE and of one target, and nothing but the layer that exports them asks for that target: where
//! there is none, a span costs the look at a flag. They tell where time went and what was decided; never a key, a hash or
//! anything else that the caller sent but for its method and a plain request id.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Request, Response, Uri};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry::{KeyValue, trace::SpanKind};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider};
use tokio::runtime::Handle;
use tracing::{Span, field::Empty};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

/// Of every span here, so that one filter has them all.
const TARGET: &str = "keyward::span";

/// What one export may take.
const EXPORT_LIMIT: Duration = Duration::from_secs(5);

/// Spans that wait for their export; more are dropped.
const MAX_QUEUED: usize = 4096;

/// `--otlp-endpoint`: where the collector is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OtlpEndpoint(Option<Uri>);

/// `off`, or `http://HOST:PORT`. A collector is a neighbour; TLS to one farther away is its business.
impl FromStr for OtlpEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let uri = text.parse::<Uri>().ok().filter(|uri| {
            uri.scheme_str() == Some("http")
                && uri.port().is_some()
                && uri.host().is_some_and(|host| !host.is_empty())
        });
        uri.map(|uri| Self(Some(uri))).ok_or_else(|| "http://HOST:PORT of a collector, or off".to_owned())
    }
}

/// As it is read.
impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            None => f.write_str("off"),
            // A URI without a path is printed with a slash.
            Some(uri) => f.write_str(uri.to_string().trim_end_matches('/')),
        }
    }
}

/// `--otlp-protocol`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// Protobuf over gRPC, port 4317 by custom.
    Grpc,
    /// Protobuf over HTTP/1.1, port 4318 by custom.
    Http,
}

impl FromStr for OtlpProtocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "grpc" => Ok(Self::Grpc),
            "http" => Ok(Self::Http),
            _ => Err("one of grpc, http".to_owned()),
        }
    }
}

/// As it is read.
impl fmt::Display for OtlpProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grpc => "grpc",
            Self::Http => "http",
        })
    }
}

/// `--otlp-sample`: the share of traces that begin here and are exported, from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleShare(f64);

impl FromStr for SampleShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
        share.map(Self).ok_or_else(|| "a number from 0 to 1, such as 0.05".to_owned())
    }
}

/// As it is read.
impl fmt::Display for SampleShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The exporter and its thread.
pub struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// Starts to export; `None` where nobody wants spans. Needs the runtime, and connects to nothing yet.
    pub fn start(
        endpoint: &OtlpEndpoint,
        protocol: OtlpProtocol,
        share: SampleShare,
    ) -> Result<Option<Self>, ExporterBuildError> {
        let Some(uri) = &endpoint.0 else {
            return Ok(None);
        };
        let exporter = SpanExporter::builder();
        let exporter = match protocol {
            OtlpProtocol::Grpc => {
                exporter.with_tonic().with_endpoint(uri.to_string()).with_timeout(EXPORT_LIMIT).build()?
            }
            OtlpProtocol::Http => exporter
                .with_http()
                .with_http_client(Exporting { runtime: Handle::current() })
                .with_endpoint(traces_url(uri))
                .with_timeout(EXPORT_LIMIT)
                .build()?,
        };
        let config = BatchConfigBuilder::default().with_max_queue_size(MAX_QUEUED);
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(config.build()).build();
        let resource = Resource::builder()
            .with_service_name("keyward")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            // Whoever has begun a trace has decided about it.
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(share.0))))
            .with_resource(resource)
            .build();
        Ok(Some(Self { provider }))
    }

    /// What takes the spans.
    pub fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    {
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("keyward"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_filter(Targets::new().with_target(TARGET, tracing::Level::TRACE))
    }

    /// Exports what is left, within the limit.
    pub async fn finish(self, limit: Duration) {
        let ended = tokio::task::spawn_blocking(move || self.provider.shutdown_with_timeout(limit)).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::warn!("the last spans could not be exported");
        }
    }
}

/// A collector has one place for spans; a path of one's own is kept.
fn traces_url(uri: &Uri) -> String {
    if uri.path() == "/" { format!("{uri}v1/traces") } else { uri.to_string() }
}

/// A check: the root of what happens here, and a child of Envoy's span where there is one. `value` reads a header of the
/// trace context.
pub fn check<'a>(method: &str, value: impl Fn(&str) -> Option<&'a str>) -> Span {
    let span = tracing::trace_span!(
        target: TARGET,
        "check",
        otel.kind = ?SpanKind::Server,
        http.request.method = method,
        keyward.decision = Empty,
        keyward.reason = Empty,
        keyward.tier = Empty,
        keyward.key_id = Empty,
        keyward.request_id = Empty,
    );
    if !span.is_disabled() {
        let carrier = Carrier { parent: value("traceparent"), state: value("tracestate") };
        let parent = TraceContextPropagator::new().extract(&carrier);
        if parent.span().span_context().is_valid() {
            // Fails where nobody exports, which is where nobody asks.
            let _ = span.set_parent(parent);
        }
    }
    span
}

/// The look-up of a prefix that memory does not know.
pub fn lookup() -> Span {
    tracing::trace_span!(target: TARGET, "lookup")
}

/// A round trip to Redis.
pub fn redis() -> Span {
    tracing::trace_span!(target: TARGET, "redis", otel.kind = ?SpanKind::Client, db.system.name = "redis")
}

/// A query to the store.
pub fn store() -> Span {
    tracing::trace_span!(target: TARGET, "store", otel.kind = ?SpanKind::Client)
}

/// A bcrypt comparison, waiting for its turn included.
pub fn bcrypt() -> Span {
    tracing::trace_span!(target: TARGET, "bcrypt")
}

/// The trace context as the propagator wants it.
struct Carrier<'a> {
    parent: Option<&'a str>,
    state: Option<&'a str>,
}

impl Extractor for Carrier<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        match name {
            "traceparent" => self.parent,
            "tracestate" => self.state,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// Sends a batch by HTTP. The exporter's thread is none of the runtime's, so the work is done there and awaited here.
#[derive(Debug)]
struct Exporting {
    runtime: Handle,
}

#[tonic::async_trait]
impl HttpClient for Exporting {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let sent = self.runtime.spawn(async move {
            tokio::time::timeout(EXPORT_LIMIT, super::post::send(request)).await.map_err(HttpError::from)?
        });
        sent.await?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_collector_is_refused_and_what_is_one_is_printed_as_written() {
        for text in ["off", "http://127.0.0.1:4317", "http://collector:4318/custom/path", "http://[::1]:4317"]
        {
            assert_eq!(
                text.parse::<OtlpEndpoint>().map(|endpoint| endpoint.to_string()),
                Ok(text.to_owned())
            );
        }
        for text in
            ["", "collector:4317", "https://collector:4317", "http://collector", "http://:4317", "/v1"]
        {
            assert!(text.parse::<OtlpEndpoint>().is_err(), "{text}");
        }
        for (text, fits) in
            [("0", true), ("0.05", true), ("1", true), ("1.1", false), ("-1", false), ("NaN", false)]
        {
            assert_eq!(text.parse::<SampleShare>().is_ok(), fits, "{text}");
        }
    }

    #[test]
    fn spans_go_where_the_collector_has_them_unless_told_otherwise() {
        assert_eq!(traces_url(&Uri::from_static("http://c:4318")), "http://c:4318/v1/traces");
        assert_eq!(traces_url(&Uri::from_static("http://c:4318/x/y")), "http://c:4318/x/y");
    }

    #[test]
    fn without_an_exporter_a_span_is_nothing() {
        let span = check("GET", |_| panic!("nobody asks for the context"));
        assert!(span.is_disabled());
    }
}
