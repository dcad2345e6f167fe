//! The store as commands open it: for one question or change, in the name of whoever runs the command.

use std::sync::Arc;
use std::time::Duration;

use super::failure::Failure;
use crate::config::Settings;
use crate::store::{CLI_QUERY_TIMEOUT, Store, StoreOptions, StoreUrl};

/// What happens when the file of `SQLite` is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// It is created.
    Create,
    /// It is an error, because a misspelt path is likelier than a wish for an empty database.
    Refuse,
}

/// Opens the store for one command.
pub(super) async fn open(settings: &Settings, missing: Missing) -> Result<Store, Failure> {
    open_for(settings, missing, CLI_QUERY_TIMEOUT).await
}

/// Opens it for work that may take so long.
pub(super) async fn open_for(
    settings: &Settings,
    missing: Missing,
    query_timeout: Duration,
) -> Result<Store, Failure> {
    let url = StoreUrl::parse(settings.store.expose_secret());
    let url = url.map_err(|error| Failure::usage(anyhow::Error::new(error).context("read --store")))?;
    let create_if_missing = missing == Missing::Create;
    if let Some(path) = url.sqlite_path().filter(|path| !create_if_missing && !path.exists()) {
        return Err(Failure::unreachable(anyhow::anyhow!(
            "there is no database {}; `keyward migrate` creates one, --store (KEYWARD_STORE) names another",
            path.display()
        )));
    }
    let actor = Some(actor());
    Ok(Store::open(StoreOptions { url, connections: 1, query_timeout, create_if_missing, actor }).await?)
}

/// The operating system's user, for the table of changes.
fn actor() -> Arc<str> {
    whoami::username().unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw())).into()
}
