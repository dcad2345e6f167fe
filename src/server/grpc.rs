//! `envoy.service.auth.v3.Authorization/Check`: Envoy's message in, the door's answer out.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::authorization_server::Authorization;
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::Span;

use super::door::Door;
use super::request::Inbound;
use super::response::LeftToEnvoy;
use crate::telemetry::traces;

/// The gRPC door.
pub struct CheckService {
    door: Arc<Door>,
}

impl CheckService {
    /// Asks this door.
    pub fn new(door: Arc<Door>) -> Self {
        Self { door }
    }
}

#[tonic::async_trait]
impl Authorization for CheckService {
    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let (metadata, _, check) = request.into_parts();
        let options = self.door.options();
        let inbound = Inbound::read(&check, &metadata, &options.client_ip);
        let deadline = deadline(&metadata, options.timeout);
        let span = span(inbound.as_ref(), &metadata);
        match self.door.answer(inbound.as_ref(), deadline, span, |_| None).await {
            Ok(response) => Ok(Response::new(response)),
            Err(LeftToEnvoy) => Err(Status::unavailable("can't be decided now")),
        }
    }
}

/// Envoy's own span first: the caller's is the parent of that one.
fn span(inbound: Option<&Inbound<'_>>, metadata: &MetadataMap) -> Span {
    let method = inbound.map(|inbound| inbound.request.method).unwrap_or_default();
    let of_envoy = metadata.contains_key("traceparent");
    traces::check(method, |name| {
        if of_envoy {
            metadata.get(name).and_then(|value| value.to_str().ok())
        } else {
            inbound.and_then(|inbound| inbound.headers.text(name))
        }
    })
}

/// Our own limit, or the caller's where it is shorter: an answer after that is for nobody.
fn deadline(metadata: &MetadataMap, own: Duration) -> Duration {
    let callers = metadata.get("grpc-timeout").and_then(|value| grpc_timeout(value.to_str().ok()?));
    callers.map_or(own, |callers| own.min(callers))
}

/// `1*8DIGIT unit`, as gRPC over HTTP/2 defines it.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount.saturating_mul(3600))),
        "M" => Some(Duration::from_secs(amount.saturating_mul(60))),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shorter_deadline_counts() {
        let own = Duration::from_millis(180);
        let of = |timeout: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", timeout.parse().unwrap());
            deadline(&metadata, own)
        };
        assert_eq!(deadline(&MetadataMap::new(), own), own);
        assert_eq!(of("100m"), Duration::from_millis(100));
        assert_eq!(of("2S"), own);
        assert_eq!(of("90000u"), Duration::from_millis(90));
        for odd in ["", "m", "123456789m", "-1m", "1x", "1.5S"] {
            assert_eq!(of(odd), own, "{odd:?}");
        }
    }
}
