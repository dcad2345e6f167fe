//! The admin port: liveness, readiness, metrics, statistics, settings, and the cache, deny and check commands.

use std::sync::Arc;

use arc_swap::ArcSwap;
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use prometheus_client::registry::Registry;
use serde::Deserialize;
use serde_json::{Value, json};

use super::deny;
use super::explain::{self, Explainer};
use super::readiness::Readiness;
use crate::authorizer::admin::{AdminError, CacheAdmin};
use crate::authorizer::deny::DenyControl;
use crate::clock;
use crate::domain::key::KeyPrefix;
use crate::domain::record::{KeyId, UserId};
use crate::store::admin::KeySelector;

/// What the admin port shows and does.
pub struct AdminState {
    /// The caches.
    pub caches: CacheAdmin,
    /// The deny list.
    pub deny: Arc<DenyControl>,
    /// What `/check` asks.
    pub explainer: Explainer,
    /// What `/metrics` prints.
    pub registry: Registry,
    /// What `/readyz` says.
    pub readiness: Arc<Readiness>,
    /// What `/config` prints: effective settings, secrets redacted.
    pub settings: Arc<ArcSwap<Value>>,
}

/// The routes.
pub fn router(state: AdminState) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/stats", get(stats))
        .route("/config", get(settings))
        .route("/cache/invalidate", post(invalidate))
        .route("/cache/flush", post(flush))
        .route("/deny", get(deny::list).post(deny::add).delete(deny::remove))
        .route("/check", post(explain::check).layer(DefaultBodyLimit::max(explain::MAX_BYTES)))
        .with_state(Arc::new(state))
}

async fn readyz(State(state): State<Arc<AdminState>>) -> Response {
    match state.readiness.check(clock::instant()) {
        Ok(mode) => format!("ready: {mode}\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response(),
    }
}

async fn metrics(State(state): State<Arc<AdminState>>) -> Response {
    state.caches.refresh_metrics();
    let is_ready = state.readiness.check(clock::instant()).is_ok();
    state.caches.metrics.gauges.ready.set(i64::from(is_ready));
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &state.registry) {
        Ok(()) => {
            let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn stats(State(state): State<Arc<AdminState>>) -> Json<Value> {
    let mut shown = state.caches.stats();
    if let Some(object) = shown.as_object_mut() {
        object.insert("ready".to_owned(), Value::from(state.readiness.check(clock::instant()).is_ok()));
        object.insert("version".to_owned(), Value::from(env!("CARGO_PKG_VERSION")));
    }
    Json(shown)
}

async fn settings(State(state): State<Arc<AdminState>>) -> Json<Value> {
    Json(Value::clone(&state.settings.load()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InvalidateQuery {
    prefix: Option<String>,
    key_id: Option<i64>,
    user_id: Option<i64>,
}

async fn invalidate(State(state): State<Arc<AdminState>>, Query(query): Query<InvalidateQuery>) -> Response {
    let selector = match (query.prefix, query.key_id, query.user_id) {
        (Some(prefix), None, None) => KeyPrefix::new(&prefix).map(KeySelector::Prefix),
        (None, Some(id), None) => Some(KeySelector::Key(KeyId::new(id))),
        (None, None, Some(id)) => Some(KeySelector::User(UserId::new(id))),
        _ => None,
    };
    match selector {
        Some(selector) => answer(state.caches.invalidate(&selector).await),
        None => refuse(StatusCode::BAD_REQUEST, "name one of prefix, key_id and user_id"),
    }
}

async fn flush(State(state): State<Arc<AdminState>>) -> Response {
    answer(state.caches.flush().await)
}

/// Memory is always cleared first, so an error means that a shared tier may still hold something.
fn answer(result: Result<Value, AdminError>) -> Response {
    match result {
        Ok(done) => Json(done).into_response(),
        Err(error) => refuse(StatusCode::BAD_GATEWAY, &error.to_string()),
    }
}

pub(super) fn refuse(status: StatusCode, text: &str) -> Response {
    (status, Json(json!({ "error": text }))).into_response()
}
