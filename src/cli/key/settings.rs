//! What an operator may set on a key, as arguments; `create` and `update` share them.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::super::arguments::{count, endpoint, lifetime, moment, network, plain};
use super::super::failure::Failure;
use crate::domain::time::Timestamp;
use crate::server::identity::{MAX_LIST_BYTES, encode};
use crate::store::admin::KeySettings;

#[derive(Debug, Args)]
pub(super) struct SettingsArguments {
    /// For people
    #[arg(long, value_parser = plain)]
    description: Option<String>,
    /// Models that may be used; none listed: all
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = plain)]
    allowed_models: Vec<String>,
    /// Endpoints that may be called, such as '/v1/models,POST /v1/chat/*'; none listed: all
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = endpoint)]
    allowed_endpoints: Vec<String>,
    /// Addresses and networks that may call; none listed: all
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = network)]
    allowed_ips: Vec<String>,
    /// Chatbots, told to the upstream; none listed: all
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = plain)]
    allowed_chatbots: Vec<String>,
    /// Agents, kept for the platform; none listed: all
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = plain)]
    allowed_agents: Vec<String>,
    /// Scopes that routes may ask for; none listed: none
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = plain)]
    scopes: Vec<String>,
    /// Permissions, kept for the platform
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = plain)]
    permissions: Vec<String>,
    /// For people
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = plain)]
    tags: Vec<String>,
    /// Requests, told to the upstream and to Envoy's rate limit
    #[arg(long, value_name = "N", value_parser = count, allow_negative_numbers = true)]
    rate_limit_per_minute: Option<u32>,
    /// Requests, told to the upstream and to Envoy's rate limit
    #[arg(long, value_name = "N", value_parser = count, allow_negative_numbers = true)]
    rate_limit_per_hour: Option<u32>,
    /// Requests, told to the upstream and to Envoy's rate limit
    #[arg(long, value_name = "N", value_parser = count, allow_negative_numbers = true)]
    rate_limit_per_day: Option<u32>,
    /// Cents that may be spent before 402
    #[arg(long, value_name = "N", value_parser = count, allow_negative_numbers = true)]
    budget_limit_cents: Option<u32>,
    /// What the budget is for
    #[arg(long, value_enum, value_name = "PERIOD")]
    budget_type: Option<BudgetType>,
    /// No budget applies
    #[arg(long)]
    is_unlimited: bool,
    /// Last moment of the key: RFC 3339, or a date, which means 00:00 UTC
    #[arg(long, value_name = "TIME", value_parser = moment, conflicts_with = "expires_in")]
    expires_at: Option<Timestamp>,
    /// How long the key is good for, such as 30d
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    expires_in: Option<Duration>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BudgetType {
    /// For the key's whole life
    Total,
    /// For each month, UTC
    Monthly,
}

impl SettingsArguments {
    /// As the store takes them. An end in the past is refused: it is a slip, and there is `revoke`.
    pub(super) fn settings(self, now: Timestamp) -> Result<KeySettings, Failure> {
        let expires_at =
            self.expires_at.or_else(|| self.expires_in.map(|lifetime| now.saturating_add(lifetime)));
        if expires_at.is_some_and(|end| end <= now) {
            return Err(Failure::usage(anyhow::anyhow!(
                "--expires-at is in the past; to end a key now, revoke it"
            )));
        }
        let settings = KeySettings {
            description: self.description,
            scopes: self.scopes,
            permissions: self.permissions,
            allowed_models: self.allowed_models,
            allowed_endpoints: self.allowed_endpoints,
            allowed_ips: self.allowed_ips,
            allowed_chatbots: self.allowed_chatbots,
            allowed_agents: self.allowed_agents,
            tags: self.tags,
            rate_limit_per_minute: self.rate_limit_per_minute,
            rate_limit_per_hour: self.rate_limit_per_hour,
            rate_limit_per_day: self.rate_limit_per_day,
            is_unlimited: self.is_unlimited,
            budget_limit_cents: self.budget_limit_cents.map(i64::from),
            budget_type: self.budget_type.map(|period| match period {
                BudgetType::Total => "total".to_owned(),
                BudgetType::Monthly => "monthly".to_owned(),
            }),
            expires_at,
        };
        check_lists(&settings).map_err(Failure::usage)?;
        Ok(settings)
    }
}

/// A list that is told to the upstream has to fit into a header.
pub(super) fn check_lists(settings: &KeySettings) -> anyhow::Result<()> {
    for (name, list) in [
        ("scopes", &settings.scopes),
        ("allowed_models", &settings.allowed_models),
        ("allowed_endpoints", &settings.allowed_endpoints),
        ("allowed_chatbots", &settings.allowed_chatbots),
    ] {
        let length: usize = list.iter().map(|entry| encode(entry).len() + 1).sum();
        anyhow::ensure!(
            length <= MAX_LIST_BYTES,
            "{name} is too long to be told to the upstream in a header: {length} bytes, at most {MAX_LIST_BYTES}; \
             use patterns with *"
        );
    }
    Ok(())
}

/// What a kind of key is given where its operator names nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Preset {
    /// Chat, completions, embeddings and the list of models; 60 requests a minute, 10000 a day
    Default,
    /// Chat and the list of models alone; 10 requests a minute, 500 a day
    Restricted,
    /// Chat alone; 120 requests a minute
    Chatbot,
    /// Chat, responses, embeddings, files and the list of models; 300 requests a minute
    Agent,
}

impl Preset {
    /// Fills in what was not named.
    pub(super) fn fill(self, settings: &mut KeySettings) {
        let (scopes, endpoints, minute, day): (&[&str], &[&str], u32, Option<u32>) = match self {
            Self::Default => (&["chat", "completions", "embeddings", "models"], &[], 60, Some(10_000)),
            Self::Restricted => {
                (&["chat", "models"], &["GET /v1/models", "POST /v1/chat/completions"], 10, Some(500))
            }
            Self::Chatbot => (&["chat"], &["POST /v1/chat/completions", "POST /v1/responses"], 120, None),
            Self::Agent => (&["chat", "responses", "embeddings", "files", "models"], &[], 300, None),
        };
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        if settings.scopes.is_empty() {
            settings.scopes = texts(scopes);
        }
        if settings.allowed_endpoints.is_empty() {
            settings.allowed_endpoints = texts(endpoints);
        }
        settings.rate_limit_per_minute.get_or_insert(minute);
        settings.rate_limit_per_day = settings.rate_limit_per_day.or(day);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::endpoint::EndpointRule;

    #[test]
    fn presets_fill_in_what_was_not_named_and_nothing_else() {
        for preset in Preset::value_variants() {
            let mut settings = KeySettings { scopes: vec!["own".into()], ..KeySettings::default() };
            settings.rate_limit_per_minute = Some(0);
            preset.fill(&mut settings);
            assert_eq!(
                (settings.scopes.as_slice(), settings.rate_limit_per_minute),
                (&["own".to_owned()][..], Some(0))
            );
            assert!(settings.allowed_endpoints.iter().all(|text| EndpointRule::parse(text).is_some()));
        }
    }

    #[test]
    fn a_list_that_no_header_holds_is_refused_by_name() {
        let models = |count: usize| KeySettings {
            allowed_models: (0..count).map(|_| "a-model".to_owned()).collect(),
            ..KeySettings::default()
        };
        assert!(check_lists(&models(1024)).is_ok());
        let error = check_lists(&models(1025)).unwrap_err().to_string();
        assert!(error.starts_with("allowed_models is too long"), "{error}");
    }
}
