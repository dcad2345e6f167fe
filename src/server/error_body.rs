//! A denial in the caller's dialect: the bodies that the OpenAI, Anthropic and Google SDKs read, and RFC 9457.
//!
//! Nothing that the caller sent is repeated, but for a plain request id.

use serde_json::{Value, json};

use super::options::ErrorFormat;
use super::request::Inbound;

/// A refusal as told to the caller.
#[derive(Debug, Clone, Copy)]
pub struct Refusal {
    /// HTTP.
    pub status: u16,
    /// The contract's word.
    pub code: &'static str,
    /// For people.
    pub message: &'static str,
}

/// A body and its type.
#[derive(Debug)]
pub struct ErrorBody {
    /// `content-type`
    pub content_type: &'static str,
    /// Text, JSON but for gRPC clients.
    pub body: String,
}

/// Writes the body of a refusal.
pub fn write(refusal: Refusal, format: ErrorFormat, inbound: Option<&Inbound<'_>>) -> ErrorBody {
    let Refusal { status, code, message } = refusal;
    let request_id = inbound.and_then(Inbound::request_id);
    let (content_type, body) = match dialect(format, inbound) {
        Dialect::OpenAi => {
            let error = json!({"message": message, "type": openai_type(status), "param": null, "code": code});
            ("application/json", with_request_id(json!({"error": error}), request_id))
        }
        Dialect::Anthropic => {
            // The SDK offers the code as `error_code`; the type is its own short list.
            let details = json!({"error_code": code});
            let error = json!({"type": anthropic_type(status), "message": message, "details": details});
            ("application/json", with_request_id(json!({"type": "error", "error": error}), request_id))
        }
        Dialect::Google => {
            let mut details = vec![json!({
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": code.to_ascii_uppercase(),
                "domain": "keyward",
            })];
            if let Some(id) = request_id {
                details.push(json!({"@type": "type.googleapis.com/google.rpc.RequestInfo", "requestId": id}));
            }
            let error = json!({
                "code": status, "message": message, "status": google_status(status), "details": details,
            });
            ("application/json", json!({"error": error}))
        }
        Dialect::Problem => {
            let problem = json!({"type": "about:blank", "title": title(status), "status": status, "detail": message, "code": code});
            ("application/problem+json", with_request_id(problem, request_id))
        }
    };
    ErrorBody { content_type, body: body.to_string() }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    OpenAi,
    Anthropic,
    Google,
    Problem,
}

fn dialect(format: ErrorFormat, inbound: Option<&Inbound<'_>>) -> Dialect {
    match format {
        ErrorFormat::OpenAi => Dialect::OpenAi,
        ErrorFormat::Anthropic => Dialect::Anthropic,
        ErrorFormat::Google => Dialect::Google,
        ErrorFormat::Problem => Dialect::Problem,
        ErrorFormat::Auto => inbound.map_or(Dialect::OpenAi, dialect_of),
    }
}

fn dialect_of(inbound: &Inbound<'_>) -> Dialect {
    let sends = |name: &str| inbound.headers.values(name).next().is_some();
    let accepts_problem =
        inbound.headers.text("accept").is_some_and(|accept| accept.contains("application/problem+json"));
    let path = inbound.request.path;
    if accepts_problem {
        Dialect::Problem
    } else if path == "/v1/messages" || path.starts_with("/v1/messages/") || sends("anthropic-version") {
        Dialect::Anthropic
    } else if path.starts_with("/v1beta/openai/") {
        // Where Gemini is offered to the OpenAI SDK.
        Dialect::OpenAi
    } else if path.starts_with("/v1beta/") || sends("x-goog-api-client") {
        // Google's SDKs send that header, whichever version of the API they are set to.
        Dialect::Google
    } else {
        Dialect::OpenAi
    }
}

fn with_request_id(mut body: Value, request_id: Option<&str>) -> Value {
    if let (Some(object), Some(id)) = (body.as_object_mut(), request_id) {
        object.insert("request_id".to_owned(), Value::from(id));
    }
    body
}

fn openai_type(status: u16) -> &'static str {
    match status {
        402 => "insufficient_quota",
        403 => "permission_error",
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    }
}

fn anthropic_type(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        429 => "rate_limit_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// The canonical codes of `google.rpc.Code`.
fn google_status(status: u16) -> &'static str {
    match status {
        401 => "UNAUTHENTICATED",
        403 => "PERMISSION_DENIED",
        402 | 429 => "RESOURCE_EXHAUSTED",
        500.. => "UNAVAILABLE",
        _ => "INVALID_ARGUMENT",
    }
}

fn title(status: u16) -> &'static str {
    match status {
        401 => "Unauthorized",
        402 => "Payment Required",
        403 => "Forbidden",
        429 => "Too Many Requests",
        500.. => "Service Unavailable",
        _ => "Bad Request",
    }
}
