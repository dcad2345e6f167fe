//! `keyward key update`, `rotate`, `revoke` and `delete`.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap::builder::PossibleValuesParser;

use super::super::arguments::{key_id, lifetime, plain};
use super::super::block_on;
use super::super::confirm::{Confirmation, confirm};
use super::super::failure::{Failure, about};
use super::super::flags::{NewKeySettings, SettingFlags, StoreSettings};
use super::super::output::{Output, note};
use super::super::secret::{HashForm, NewSecret};
use super::super::store::{Missing, open};
use super::OneKey;
use super::settings::SettingsArguments;
use super::show::{print_secret, whole_record};
use crate::domain::key::KeyPrefix;
use crate::domain::record::KeyId;
use crate::store::admin::{KeyChange, KeySettings, Rotation};

#[derive(Debug, Args)]
pub(in crate::cli) struct Update {
    /// Id of the key
    #[arg(value_name = "ID", value_parser = key_id, allow_negative_numbers = true)]
    id: i64,
    /// For people
    #[arg(long, value_parser = plain)]
    name: Option<String>,
    /// Whether the key may be used: true takes a revocation back
    #[arg(long, value_name = "BOOL")]
    is_active: Option<bool>,
    #[command(flatten)]
    arguments: SettingsArguments,
    /// What becomes empty: unrestricted, without limit, without end
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = PossibleValuesParser::new(CLEARABLE.map(|Clearable(flag, ..)| flag)))]
    clear: Vec<String>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<StoreSettings>,
}

/// What can be cleared: its flag, its column, and whether it is set.
struct Clearable(&'static str, &'static str, fn(&KeySettings) -> bool);

const CLEARABLE: [Clearable; 16] = [
    Clearable("description", "description", |settings| settings.description.is_some()),
    Clearable("scopes", "scopes", |settings| !settings.scopes.is_empty()),
    Clearable("permissions", "permissions", |settings| !settings.permissions.is_empty()),
    Clearable("allowed-models", "allowed_models", |settings| !settings.allowed_models.is_empty()),
    Clearable("allowed-endpoints", "allowed_endpoints", |settings| !settings.allowed_endpoints.is_empty()),
    Clearable("allowed-ips", "allowed_ips", |settings| !settings.allowed_ips.is_empty()),
    Clearable("allowed-chatbots", "allowed_chatbots", |settings| !settings.allowed_chatbots.is_empty()),
    Clearable("allowed-agents", "allowed_agents", |settings| !settings.allowed_agents.is_empty()),
    Clearable("tags", "tags", |settings| !settings.tags.is_empty()),
    Clearable("rate-limit-per-minute", "rate_limit_per_minute", |settings| {
        settings.rate_limit_per_minute.is_some()
    }),
    Clearable("rate-limit-per-hour", "rate_limit_per_hour", |settings| {
        settings.rate_limit_per_hour.is_some()
    }),
    Clearable("rate-limit-per-day", "rate_limit_per_day", |settings| settings.rate_limit_per_day.is_some()),
    Clearable("is-unlimited", "is_unlimited", |settings| settings.is_unlimited),
    Clearable("budget-limit-cents", "budget_limit_cents", |settings| settings.budget_limit_cents.is_some()),
    Clearable("budget-type", "budget_type", |settings| settings.budget_type.is_some()),
    Clearable("expires-at", "expires_at", |settings| settings.expires_at.is_some()),
];

impl Update {
    pub(super) fn run(self) -> Result<(), Failure> {
        let id = KeyId::new(self.id);
        let is_cleared = |flag: &str| self.clear.iter().any(|cleared| cleared == flag);
        let cleared = CLEARABLE.iter().filter(|Clearable(flag, ..)| is_cleared(flag));
        let clear = cleared.map(|Clearable(_, column, _)| *column).collect();
        let change = KeyChange {
            name: self.name,
            is_active: self.is_active,
            settings: self.arguments.settings(crate::clock::wall())?,
            clear,
        };
        check(&change).map_err(Failure::usage)?;
        let settings = self.settings.load()?.settings;
        let key = block_on(async {
            let store = open(&settings, Missing::Refuse).await?;
            store.update_key(id, &change).await.map_err(about(&id.to_string(), "key"))?;
            Ok(store.key(id).await?)
        })?;
        self.output.print_one(&whole_record(&key))
    }
}

/// Something changes, and nothing in two ways.
fn check(change: &KeyChange) -> anyhow::Result<()> {
    let set = set_columns(&change.settings);
    let is_empty =
        change.name.is_none() && change.is_active.is_none() && change.clear.is_empty() && set.is_empty();
    anyhow::ensure!(
        !is_empty,
        "nothing to change; name a setting, or --clear one (keyward key update --help)"
    );
    match change.clear.iter().find(|column| set.contains(column)) {
        Some(both) => anyhow::bail!("{both} is both set and cleared; do one"),
        None => Ok(()),
    }
}

fn set_columns(settings: &KeySettings) -> Vec<&'static str> {
    let set = CLEARABLE.iter().filter(|Clearable(_, _, is_set)| is_set(settings));
    set.map(|Clearable(_, column, _)| *column).collect()
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Rotate {
    /// Id of the key
    #[arg(value_name = "ID", value_parser = key_id, allow_negative_numbers = true)]
    id: i64,
    /// How long the secret that is replaced stays good, such as 24h; without it, it ends at once
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    grace: Option<Duration>,
    /// End what earlier rotations have kept; makes no new secret
    #[arg(long, conflicts_with_all = ["grace", "hash"])]
    now: bool,
    /// How the new secret is stored
    #[arg(long, value_enum, value_name = "FORM", default_value = "bcrypt")]
    hash: HashForm,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<NewKeySettings>,
}

impl Rotate {
    pub(super) fn run(self) -> Result<(), Failure> {
        let id = KeyId::new(self.id);
        let settings = self.settings.load()?.settings;
        let keep_until = self.grace.map(|grace| crate::clock::wall().saturating_add(grace));
        if self.now {
            let key = block_on(async {
                let store = open(&settings, Missing::Refuse).await?;
                if store.end_old_secrets(id).await.map_err(about(&id.to_string(), "key"))? == 0 {
                    return Err(Failure::refused(anyhow::anyhow!(
                        "key {id} has no old secrets; to replace its secret at once, leave --now out"
                    )));
                }
                Ok(store.key(id).await?)
            })?;
            return self.output.print_one(&whole_record(&key));
        }
        let (key, secret) = block_on(async {
            let store = open(&settings, Missing::Refuse).await?;
            let key = store.key(id).await.map_err(about(&id.to_string(), "key"))?;
            let prefix = key.key_prefix.as_deref().and_then(KeyPrefix::new);
            let prefix = prefix.with_context(|| format!("key {id} has no prefix"))?;
            let secret = NewSecret::for_prefix(&prefix, settings.key_prefix_length)
                .with_context(|| format!("rotate key {id}"))?;
            let hash = secret.hash(self.hash)?;
            store.rotate_key(&Rotation { id, prefix, hash, keep_until }).await?;
            Ok((store.key(id).await?, secret))
        })?;
        let old = match self.grace {
            Some(grace) => format!("the old one stays good for {}", humantime::format_duration(grace)),
            None => "the old one is refused from now on".to_owned(),
        };
        print_secret(
            self.output,
            &format!("rotated key {id}; {old}; this is its secret, shown once:"),
            &key,
            &secret,
        )
    }
}

pub(super) fn revoke(one: OneKey) -> Result<(), Failure> {
    let id = one.id();
    let settings = one.settings.load()?.settings;
    let key = block_on(async {
        let store = open(&settings, Missing::Refuse).await?;
        store.set_key_active(id, false).await.map_err(about(&id.to_string(), "key"))?;
        Ok(store.key(id).await?)
    })?;
    one.output.print_one(&whole_record(&key))
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Delete {
    #[command(flatten)]
    confirmation: Confirmation,
    #[command(flatten)]
    one: OneKey,
}

impl Delete {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Self { confirmation, one } = self;
        let id = one.id();
        let settings = one.settings.load()?.settings;
        let key = block_on(async {
            let store = open(&settings, Missing::Refuse).await?;
            let key = store.key(id).await.map_err(about(&id.to_string(), "key"))?;
            let what = format!(
                "delete key {id} ({}…, {}, of {}) for good",
                key.key_prefix.as_deref().unwrap_or("no prefix"),
                key.name.as_deref().unwrap_or("no name"),
                key.username.as_deref().unwrap_or("nobody"),
            );
            confirm(confirmation, &what, "to refuse it and keep it, use `keyward key revoke`")?;
            store.delete_key(id).await?;
            Ok(key)
        })?;
        note(&format!("deleted key {id}"));
        one.output.print_one(&whole_record(&key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_cleared_is_what_can_be_set() {
        for Clearable(flag, column, is_set) in CLEARABLE {
            assert_eq!(flag.replace('-', "_"), column);
            assert!(!is_set(&KeySettings::default()), "{flag}");
        }
    }

    #[test]
    fn a_change_changes_something_and_nothing_in_two_ways() {
        let models = KeySettings { allowed_models: vec!["a".into()], ..KeySettings::default() };
        let change = |settings: &KeySettings, clear: &[&'static str]| KeyChange {
            settings: settings.clone(),
            clear: clear.to_vec(),
            ..KeyChange::default()
        };
        assert!(check(&change(&KeySettings::default(), &[])).is_err());
        assert!(check(&change(&models, &[])).is_ok());
        assert!(check(&change(&models, &["scopes"])).is_ok());
        assert!(check(&change(&models, &["allowed_models"])).is_err());
        assert!(check(&KeyChange { is_active: Some(true), ..KeyChange::default() }).is_ok());
    }
}
