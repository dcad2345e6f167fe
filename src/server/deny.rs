//! `/deny` on the admin port: who is on the deny list, and who comes and goes.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::admin::{AdminState, refuse};
use crate::authorizer::deny::{ChangeError, DenyControl, Persistence, Source};
use crate::domain::deny_list::DenyEntry;
use crate::domain::record::KeyId;

/// Exactly one of them is given.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EntryQuery {
    key_id: Option<i64>,
    prefix: Option<String>,
}

impl EntryQuery {
    fn entry(self, deny: &DenyControl) -> Result<DenyEntry, String> {
        match (self.key_id, self.prefix) {
            (Some(id), None) => Ok(DenyEntry::Key(KeyId::new(id))),
            (None, Some(prefix)) => deny.prefix(&prefix).map_err(|defect| defect.to_string()),
            _ => Err("name one of key_id and prefix".to_owned()),
        }
    }
}

/// `GET /deny`
pub(super) async fn list(State(state): State<Arc<AdminState>>) -> Json<Value> {
    let shown = state.deny.shown();
    let entries: Vec<Value> =
        shown.entries.iter().map(|(entry, source)| entry_json(entry, *source)).collect();
    Json(json!({ "entries": entries, "file": state.deny.path(), "file_error": shown.trouble }))
}

/// `POST /deny`
pub(super) async fn add(State(state): State<Arc<AdminState>>, Query(query): Query<EntryQuery>) -> Response {
    let entry = match query.entry(&state.deny) {
        Ok(entry) => entry,
        Err(expected) => return refuse(StatusCode::BAD_REQUEST, &expected),
    };
    match state.deny.add(entry).await {
        Ok(Persistence::File) => Json(json!({ "denied": true, "persistent": true })).into_response(),
        Ok(Persistence::Memory(reason)) => {
            let note = format!("{reason}: held until this process ends; add it to --deny-file to keep it");
            Json(json!({ "denied": true, "persistent": false, "note": note })).into_response()
        }
        Err(error) => refused(&error),
    }
}

/// `DELETE /deny`
pub(super) async fn remove(
    State(state): State<Arc<AdminState>>,
    Query(query): Query<EntryQuery>,
) -> Response {
    let entry = match query.entry(&state.deny) {
        Ok(entry) => entry,
        Err(expected) => return refuse(StatusCode::BAD_REQUEST, &expected),
    };
    match state.deny.remove(entry).await {
        Ok(()) => Json(json!({ "denied": false })).into_response(),
        Err(error) => refused(&error),
    }
}

fn refused(error: &ChangeError) -> Response {
    let status = match error {
        ChangeError::NotListed => StatusCode::NOT_FOUND,
        ChangeError::Full | ChangeError::InFile { .. } => StatusCode::CONFLICT,
    };
    refuse(status, &error.to_string())
}

fn entry_json(entry: &DenyEntry, source: Source) -> Value {
    match entry {
        DenyEntry::Key(id) => json!({ "key_id": id.get(), "source": source.as_str() }),
        DenyEntry::Prefix(prefix) => json!({ "prefix": prefix.as_str(), "source": source.as_str() }),
    }
}
