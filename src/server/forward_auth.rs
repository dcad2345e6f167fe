//! HTTP forward-auth: the same question and answer as over gRPC, for proxies that ask over HTTP.
//!
//! 200 is an allow and nothing else is. It carries every header that Keyward owns, empty where there is nothing to say,
//! so that a proxy that copies them overwrites whatever the caller sent under their names.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use envoy_types::pb::envoy::config::core::v3::HeaderValueOption;
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{DeniedHttpResponse, OkHttpResponse};
use http_body_util::{BodyExt, Limited};
use prost::Message;
use tokio::time::timeout;
use tracing::Span;

use super::answer::Answer;
use super::check_view::CheckView;
use super::credentials::KNOWN_CARRIERS;
use super::door::{Begun, Door, refused};
use super::options::{CredentialSource, HttpProfile};
use super::original::{NoOriginal, describe, is_question};
use super::readiness::Readiness;
use super::request::Inbound;
use super::response::{self, LeftToEnvoy};
use crate::authorizer::Checked;
use crate::clock;
use crate::domain::decision::Cause;
use crate::domain::denial::Denial;
use crate::telemetry::traces;

/// How Envoy is told over HTTP what it is told in `headers_to_remove` over gRPC.
const TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";

/// What the HTTP port answers with.
pub struct ForwardAuth {
    door: Arc<Door>,
    profile: HttpProfile,
    max_bytes: usize,
    readiness: Arc<Readiness>,
    /// Names that a 200 always carries.
    owned: BTreeSet<String>,
    /// Headers that the proxy's own configuration removes, as the documentation asks.
    left_to_proxy: BTreeSet<String>,
    has_complained: AtomicBool,
}

impl ForwardAuth {
    /// A port for this kind of proxy (`--http-profile`); bodies up to `max_bytes` (`--max-check-bytes`).
    pub fn new(door: Arc<Door>, profile: HttpProfile, max_bytes: usize, readiness: Arc<Readiness>) -> Self {
        let owned = door.responder().owned_headers().collect();
        let configured = door.options().credential_sources.iter().filter_map(|source| match source {
            CredentialSource::Header(name) => Some(name.clone()),
            CredentialSource::Bearer | CredentialSource::Query(_) => None,
        });
        let left_to_proxy = KNOWN_CARRIERS.map(str::to_owned).into_iter().chain(configured).collect();
        let has_complained = AtomicBool::new(false);
        Self { door, profile, max_bytes, readiness, owned, left_to_proxy, has_complained }
    }

    /// The routes: `/readyz`, and everything else is a question or nothing.
    pub fn router(self) -> Router {
        Router::new().route("/readyz", get(readyz)).fallback(check).with_state(Arc::new(self))
    }

    async fn answer(&self, head: Parts, body: Body) -> Result<Answer, LeftToEnvoy> {
        let began = clock::now();
        let limit = self.door.options().timeout;
        let body = if self.profile.sends_body() {
            match timeout(limit, Limited::new(body, self.max_bytes).collect()).await {
                Ok(Ok(collected)) => collected.to_bytes(),
                Ok(Err(_)) => return self.door.refuse(Denial::AmbiguousRequest),
                Err(_) => return self.door.give_up(Cause::Deadline),
            }
        } else {
            Bytes::new()
        };
        let described = match describe(self.profile, &head, body) {
            Ok(described) => described,
            Err(defect) => {
                self.complain(defect);
                return self.door.refuse(Denial::AmbiguousRequest);
            }
        };
        let described = described.encode_to_vec();
        let check = CheckView::read(&described).unwrap_or_default();
        let inbound = Inbound::read(&check, &HeaderMap::new(), &self.door.options().client_ip);
        let span = span(inbound.as_ref());
        let checked = match (self.door.begin(inbound.as_ref(), began), &inbound) {
            (Begun::Decided(checked), _) => checked,
            (Begun::Open(key), Some(inbound)) => {
                let left = limit.saturating_sub(clock::instant().saturating_since(began.instant));
                self.door.ask(&key, inbound, left, &span).await
            }
            // Nothing is open without a request.
            (Begun::Open(_), None) => refused(Denial::MissingCredentials),
        };
        let vetoed = self.vetoed(checked, inbound.as_ref(), &head.headers);
        self.door.finish(&vetoed, inbound.as_ref(), began.instant, &span)
    }

    /// An allow that asks more of the proxy than it can do is a denial.
    fn vetoed(&self, checked: Checked, inbound: Option<&Inbound<'_>>, sent: &HeaderMap) -> Checked {
        let answer = self.door.responder().respond(&checked, inbound).ok().and_then(|answer| answer.read());
        let denial = answer.as_ref().and_then(response::allowed).and_then(|allow| self.veto(allow, sent));
        denial.map_or(checked, refused)
    }

    /// What has to be taken out of a request before it may go upstream, and that this proxy can't be told to take out.
    fn veto(&self, allow: &OkHttpResponse, sent: &HeaderMap) -> Option<Denial> {
        if !allow.query_parameters_to_remove.is_empty() {
            return Some(Denial::MalformedCredentials);
        }
        let stays = |name: &String| {
            sent.contains_key(name) && !self.owned.contains(name) && !self.left_to_proxy.contains(name)
        };
        let is_told = self.profile == HttpProfile::Envoy;
        (!is_told && allow.headers_to_remove.iter().any(stays)).then_some(Denial::AmbiguousRequest)
    }

    /// Once: a proxy that is set up wrong asks wrong every time, and callers may be able to provoke it.
    fn complain(&self, NoOriginal(defect): NoOriginal) {
        if !self.has_complained.swap(true, Ordering::Relaxed) {
            let profile = self.profile.name();
            tracing::warn!(profile, defect, "a question over HTTP names no original request; it was refused");
        }
    }

    fn write(&self, answer: Result<Answer, LeftToEnvoy>) -> Response {
        let Some(answer) = answer.ok().and_then(|answer| answer.read()) else {
            return StatusCode::SERVICE_UNAVAILABLE.into_response();
        };
        match (response::allowed(&answer), &answer.http_response) {
            (Some(allow), _) => self.allow(allow),
            (None, Some(HttpResponse::DeniedResponse(denied))) => self.deny(denied),
            (None, _) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        }
    }

    fn allow(&self, allow: &OkHttpResponse) -> Response {
        let to_remove = allow.headers_to_remove.join(",");
        let empty = self.owned.iter().map(|name| (name.as_str(), ""));
        let said = pairs(&allow.headers);
        let removal = (self.profile == HttpProfile::Envoy).then_some((TO_REMOVE, to_remove.as_str()));
        // A name that is said twice keeps its last value.
        headers(empty.chain(said).chain(removal)).map_or_else(unwritable, IntoResponse::into_response)
    }

    fn deny(&self, denied: &DeniedHttpResponse) -> Response {
        let status = denied.status.as_ref().and_then(|status| u16::try_from(status.code).ok());
        let status = match (self.profile, status) {
            (_, None | Some(..=399)) => 503,
            // nginx knows 401 and 403, and makes 500 of all others: right for what can't be decided, wrong for these.
            (HttpProfile::Nginx, Some(400 | 402 | 429)) => 403,
            (_, Some(status)) => status,
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        let headers = headers(pairs(&denied.headers));
        headers.map_or_else(unwritable, |headers| (status, headers, denied.body.clone()).into_response())
    }
}

/// Under the original request's trace.
fn span(inbound: Option<&Inbound<'_>>) -> Span {
    let method = inbound.map(|inbound| inbound.request.method).unwrap_or_default();
    traces::check(method, |name| inbound.and_then(|inbound| inbound.headers.text(name)))
}

async fn readyz(State(state): State<Arc<ForwardAuth>>) -> Response {
    match state.readiness.check(clock::instant()) {
        Ok(mode) => format!("ready: {mode}\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response(),
    }
}

async fn check(State(state): State<Arc<ForwardAuth>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    if !is_question(state.profile, &head) {
        state.complain(NoOriginal(
            "it is not GET or POST /check, or with the envoy profile nothing below /check/",
        ));
        return StatusCode::NOT_FOUND.into_response();
    }
    let answer = state.answer(head, body).await;
    state.write(answer)
}

fn pairs(options: &[HeaderValueOption]) -> impl Iterator<Item = (&str, &str)> {
    let headers = options.iter().filter_map(|option| option.header.as_ref());
    headers.map(|header| (header.key.as_str(), header.value.as_str()))
}

/// `None` where something is no header: then there is no answer rather than a part of one.
fn headers<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Option<HeaderMap> {
    let pairs = pairs
        .map(|(name, value)| Some((HeaderName::try_from(name).ok()?, HeaderValue::from_str(value).ok()?)));
    let mut headers = HeaderMap::new();
    for pair in pairs {
        let (name, value) = pair?;
        headers.insert(name, value);
    }
    Some(headers)
}

fn unwritable() -> Response {
    tracing::error!("an answer could not be written as HTTP");
    StatusCode::SERVICE_UNAVAILABLE.into_response()
}
