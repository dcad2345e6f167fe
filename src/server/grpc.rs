//! `envoy.service.auth.v3.Authorization/Check` over HTTP/2: one message in, one message out, as gRPC frames them.
//!
//! Not by generated code: it would make a tree of each message, in which a check reads a few leaves. What is answered
//! from memory is answered before anything waits. All other services on the port are tonic's.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{HeaderMap, Request, Response};
use tokio::time::timeout;
use tonic::Status;
use tonic::service::Routes;
use tower_service::Service;
use tracing::Span;

use super::answer::Answer;
use super::check_view::CheckView;
use super::door::{Begun, Door, refused};
use super::request::Inbound;
use super::response::LeftToEnvoy;
use crate::clock;
use crate::domain::denial::Denial;
use crate::domain::key::PresentedKey;
use crate::domain::time::Instant;
use crate::telemetry::traces;

/// The method that is answered here.
const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";

/// What gRPC puts before a message: whether it is compressed, and its length in four bytes.
const HEAD: usize = 5;

/// How long a message may take to arrive. Envoy sends one in a piece.
const ARRIVAL: Duration = Duration::from_secs(10);

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// The services of the gRPC port.
#[derive(Clone)]
pub struct GrpcServices {
    /// Decides checks.
    pub door: Arc<Door>,
    /// `--max-check-bytes`
    pub max_bytes: usize,
    /// Everything else.
    pub others: Routes,
}

impl GrpcServices {
    /// Answers one call.
    pub async fn call(mut self, request: Request<Incoming>) -> Result<Response<ResponseBody>, Infallible> {
        if request.uri().path() != CHECK {
            let response = Box::pin(self.others.call(request)).await?;
            return Ok(response.map(ResponseBody::Other));
        }
        let (head, body) = request.into_parts();
        let message = match self.receive(body).await {
            Ok(message) => message,
            Err(status) => return Ok(refuse(&status)),
        };
        let call = Call { message, metadata: head.headers };
        Ok(match self.answer_at_once(&call) {
            Ok(response) => response,
            Err(open) => Box::pin(self.answer_by_asking(call, *open)).await,
        })
    }

    /// The one message of a call. Until it is whole it is only waited for, so there is an end to that.
    async fn receive(&self, body: Incoming) -> Result<Bytes, Status> {
        let whole = timeout(ARRIVAL, self.gather(body)).await;
        unframe(whole.map_err(|_| Status::deadline_exceeded("the message did not arrive in time"))??)
    }

    async fn gather(&self, mut body: Incoming) -> Result<Bytes, Status> {
        let limit = self.max_bytes.saturating_add(HEAD);
        let Some(first) = next_data(&mut body).await? else {
            return Err(Status::internal("the call has no message"));
        };
        // Nearly always the whole of it, and then nothing is copied.
        let whole =
            if body.is_end_stream() { first } else { Box::pin(rest(first, &mut body, limit)).await? };
        if whole.len() > limit {
            return Err(Status::out_of_range("the message is larger than --max-check-bytes"));
        }
        Ok(whole)
    }

    /// The key, where something has to be asked about it.
    fn answer_at_once(&self, call: &Call) -> Result<Response<ResponseBody>, Box<Open>> {
        let began = clock::now();
        let check = match CheckView::read(&call.message) {
            Ok(check) => check,
            Err(defect) => return Ok(refuse(&Status::internal(defect.to_string()))),
        };
        let inbound = Inbound::read(&check, &call.metadata, &self.door.options().client_ip);
        let span = span(inbound.as_ref(), &call.metadata);
        match span.in_scope(|| self.door.begin(inbound.as_ref(), began)) {
            Begun::Decided(checked) => {
                Ok(respond(self.door.finish(&checked, inbound.as_ref(), began.instant, &span)))
            }
            Begun::Open(key) => Err(Box::new(Open { key, span, began: began.instant })),
        }
    }

    /// The message is read once more: what was read of it can't be kept across a wait.
    async fn answer_by_asking(&self, call: Call, open: Open) -> Response<ResponseBody> {
        let Open { key, span, began } = open;
        let options = self.door.options();
        let check = CheckView::read(&call.message).unwrap_or_default();
        let inbound = Inbound::read(&check, &call.metadata, &options.client_ip);
        let checked = match &inbound {
            Some(inbound) => {
                self.door.ask(&key, inbound, deadline(&call.metadata, options.timeout), &span).await
            }
            // Nothing was left open then.
            None => refused(Denial::MissingCredentials),
        };
        respond(self.door.finish(&checked, inbound.as_ref(), began, &span))
    }
}

/// What a call brings.
struct Call {
    message: Bytes,
    metadata: HeaderMap,
}

/// A check that memory can't decide.
struct Open {
    key: PresentedKey,
    span: Span,
    began: Instant,
}

/// A message in several pieces, up to the first one that is too many.
async fn rest(first: Bytes, body: &mut Incoming, limit: usize) -> Result<Bytes, Status> {
    let mut whole = first.to_vec();
    while let Some(more) = next_data(body).await? {
        whole.extend_from_slice(&more);
        if whole.len() > limit {
            break;
        }
    }
    Ok(whole.into())
}

async fn next_data(body: &mut Incoming) -> Result<Option<Bytes>, Status> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Status::cancelled("the call was cut off"))?;
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// The message in gRPC's frame.
fn unframe(mut framed: Bytes) -> Result<Bytes, Status> {
    let Some((&[compressed, ref length @ ..], message)) = framed.split_first_chunk::<HEAD>() else {
        return Err(Status::internal("the message is cut short"));
    };
    if compressed != 0 {
        return Err(Status::unimplemented("messages are not taken compressed"));
    }
    if usize::try_from(u32::from_be_bytes(*length)) != Ok(message.len()) {
        return Err(Status::internal("the call has not exactly one message"));
    }
    Ok(framed.split_off(HEAD))
}

fn respond(answer: Result<Answer, LeftToEnvoy>) -> Response<ResponseBody> {
    match answer {
        Ok(answer) => grpc(ResponseBody::Message(answer.into_grpc())),
        Err(LeftToEnvoy) => refuse(&Status::unavailable("can't be decided now")),
    }
}

/// A status without a message, in the head alone.
fn refuse(status: &Status) -> Response<ResponseBody> {
    let mut response = grpc(ResponseBody::Ended);
    // Its own texts are plain, so they always fit.
    let _ = status.add_header(response.headers_mut());
    response
}

fn grpc(body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// The body of a response: what is left of it.
pub enum ResponseBody {
    /// One message, then the trailers that say that all is well.
    Message(Bytes),
    /// Those trailers.
    Trailers,
    /// Nothing.
    Ended,
    /// That of another service.
    Other(tonic::body::Body),
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        match std::mem::replace(this, Self::Ended) {
            Self::Message(message) => {
                *this = Self::Trailers;
                Poll::Ready(Some(Ok(Frame::data(message))))
            }
            Self::Trailers => {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Self::Ended => Poll::Ready(None),
            Self::Other(mut other) => {
                let polled = Pin::new(&mut other).poll_frame(context);
                *this = Self::Other(other);
                polled
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Message(_) | Self::Trailers => false,
            Self::Ended => true,
            Self::Other(other) => other.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Other(other) => other.size_hint(),
            // With a length there would be no trailers.
            Self::Message(_) | Self::Trailers | Self::Ended => SizeHint::default(),
        }
    }
}

/// Envoy's own span first: the caller's is the parent of that one.
fn span(inbound: Option<&Inbound<'_>>, metadata: &HeaderMap) -> Span {
    let method = inbound.map(|inbound| inbound.request.method).unwrap_or_default();
    let of_envoy = || metadata.contains_key("traceparent");
    traces::check(method, |name| {
        if of_envoy() {
            metadata.get(name).and_then(|value| value.to_str().ok())
        } else {
            inbound.and_then(|inbound| inbound.headers.text(name))
        }
    })
}

/// Our own limit, or the caller's where it is shorter: an answer after that is for nobody.
fn deadline(metadata: &HeaderMap, own: Duration) -> Duration {
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
    use tonic::Code;

    use super::*;

    #[test]
    fn the_shorter_deadline_counts() {
        let own = Duration::from_millis(180);
        let of = |timeout: &'static str| {
            let mut metadata = HeaderMap::new();
            metadata.insert("grpc-timeout", timeout.parse().unwrap());
            deadline(&metadata, own)
        };
        assert_eq!(deadline(&HeaderMap::new(), own), own);
        assert_eq!(of("100m"), Duration::from_millis(100));
        assert_eq!(of("2S"), own);
        assert_eq!(of("90000u"), Duration::from_millis(90));
        for odd in ["", "m", "123456789m", "-1m", "1x", "1.5S"] {
            assert_eq!(of(odd), own, "{odd:?}");
        }
    }

    #[test]
    fn only_one_whole_plain_message_is_taken() {
        let of = |framed: &'static [u8]| unframe(Bytes::from_static(framed)).map_err(|status| status.code());
        assert_eq!(of(b"\0\0\0\0\x02hi"), Ok(Bytes::from_static(b"hi")));
        assert_eq!(of(b"\0\0\0\0\0"), Ok(Bytes::new()));
        assert_eq!(of(b"\x01\0\0\0\x02hi"), Err(Code::Unimplemented));
        for odd in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\x03hi", b"\0\0\0\0\x01hi", b"\0\xff\xff\xff\xffhi"] {
            assert_eq!(of(odd), Err(Code::Internal), "{odd:?}");
        }
    }
}
