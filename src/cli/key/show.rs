//! `keyward key list`, `show` and `history`, and how a key is printed.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::super::arguments::{lifetime, plain, user_ref};
use super::super::block_on;
use super::super::failure::{Failure, about};
use super::super::flags::{SettingFlags, StoreSettings};
use super::super::output::{Format, Output, Record, note, print, time};
use super::super::secret::NewSecret;
use super::super::store::{Missing, open};
use super::OneKey;
use crate::domain::record::UserId;
use crate::store::admin::{HistoryEntry, KeyFilter, KeyView, UserRef};

#[derive(Debug, Args)]
pub(in crate::cli) struct List {
    /// Only this user's
    #[arg(long, value_name = "ID|USERNAME", value_parser = user_ref)]
    user: Option<UserRef>,
    /// Only those with this public prefix
    #[arg(long, value_name = "PREFIX", value_parser = plain)]
    prefix: Option<String>,
    /// Only those that expire within this time, or have expired
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    expiring_within: Option<Duration>,
    /// Only those that were neither used nor created in this time
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    unused_since: Option<Duration>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<StoreSettings>,
}

impl List {
    pub(super) fn run(self) -> Result<(), Failure> {
        let now = crate::clock::wall();
        let filter = KeyFilter {
            user: self.user,
            prefix: self.prefix,
            expiring_until: self.expiring_within.map(|within| now.saturating_add(within)),
            unused_since: self.unused_since.map(|since| now.saturating_sub(since)),
        };
        let settings = self.settings.load()?.settings;
        let keys = block_on(async { Ok(open(&settings, Missing::Refuse).await?.list_keys(&filter).await?) })?;
        self.output.print_list(&COLUMNS, &keys.iter().map(record).collect::<Vec<_>>())
    }
}

pub(super) fn show(one: OneKey) -> Result<(), Failure> {
    let id = one.id();
    let settings = one.settings.load()?.settings;
    let named = id.to_string();
    let key = block_on(async {
        open(&settings, Missing::Refuse).await?.key(id).await.map_err(about(&named, "key"))
    })?;
    one.output.print_one(&whole_record(&key))
}

pub(super) fn history(one: OneKey) -> Result<(), Failure> {
    let id = one.id();
    let settings = one.settings.load()?.settings;
    let entries = block_on(async { Ok(open(&settings, Missing::Refuse).await?.key_history(id).await?) })?;
    let records: Vec<Record> = entries.iter().map(entry).collect();
    one.output.print_list(&["at", "actor", "action", "changes"], &records)
}

/// Prints a new secret. Alone on standard output, so that it can be piped to where it belongs; in JSON beside its key.
pub(super) fn print_secret(
    output: Output,
    told: &str,
    key: &KeyView,
    secret: &NewSecret,
) -> Result<(), Failure> {
    match output.output {
        Format::Json => output.print_one(&whole_record(key).with("key", secret.text.as_str())),
        Format::Table => {
            note(told);
            print(&secret.text)
        }
    }
}

const COLUMNS: [&str; 9] =
    ["id", "name", "key_prefix", "user_id", "username", "is_active", "expires_at", "last_used_at", "defects"];

/// One key with what is only read where one key is shown.
pub(super) fn whole_record(key: &KeyView) -> Record {
    let old_secrets: Vec<Value> = key
        .old_secrets
        .iter()
        .map(|old| json!({ "rotated_at": time(old.rotated_at), "expires_at": time(old.expires_at) }))
        .collect();
    record(key).with("old_secrets", old_secrets)
}

fn record(key: &KeyView) -> Record {
    let settings = &key.settings;
    Record::default()
        .with("id", key.id.get())
        .with("name", key.name.clone())
        .with("key_prefix", key.key_prefix.clone())
        .with("user_id", key.user_id.map(UserId::get))
        .with("username", key.username.clone())
        .with("is_active", key.is_active)
        .with("scopes", settings.scopes.clone())
        .with("permissions", settings.permissions.clone())
        .with("rate_limit_per_minute", settings.rate_limit_per_minute)
        .with("rate_limit_per_hour", settings.rate_limit_per_hour)
        .with("rate_limit_per_day", settings.rate_limit_per_day)
        .with("allowed_models", settings.allowed_models.clone())
        .with("allowed_endpoints", settings.allowed_endpoints.clone())
        .with("allowed_ips", settings.allowed_ips.clone())
        .with("allowed_chatbots", settings.allowed_chatbots.clone())
        .with("allowed_agents", settings.allowed_agents.clone())
        .with("is_unlimited", settings.is_unlimited)
        .with("budget_limit_cents", settings.budget_limit_cents)
        .with("budget_type", settings.budget_type.clone())
        .with("description", settings.description.clone())
        .with("tags", settings.tags.clone())
        .with("created_at", time(key.created_at))
        .with("updated_at", time(key.updated_at))
        .with("last_used_at", time(key.last_used_at))
        .with("expires_at", time(settings.expires_at))
        .with("defects", key.defects.clone())
}

fn entry(entry: &HistoryEntry) -> Record {
    let changes: Value =
        entry.changes.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    Record::default()
        .with("at", time(entry.at))
        .with("actor", entry.actor.clone())
        .with("action", entry.action.clone())
        .with("changes", changes)
}
