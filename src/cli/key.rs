//! `keyward key …`: the keys.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum, value_parser};

use super::arguments::{endpoint, lifetime, moment, network, plain, user_ref};
use super::block_on;
use super::failure::{Exit, Failure};
use super::flags::{NewKeySettings, SettingFlags, StoreSettings};
use super::output::{Format, Output, Record, note, print, time};
use super::secret::{HashForm, NewSecret};
use super::user::{Missing, open};
use crate::domain::record::KeyId;
use crate::domain::time::Timestamp;
use crate::store::admin::{KeySettings, KeyView, NewKey, UserRef};

#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// Create a key and print its secret, once, on standard output
    #[command(after_help = "Examples:\n  keyward key create --user alice --name laptop --expires-in 30d\n  \
        keyward key create --user 7 --name ci --allowed-models gpt-4o,claude-* --allowed-ips 10.0.0.0/8 --output json")]
    Create(Box<Create>),
    /// List all keys, or those of one user
    #[command(after_help = "Example:\n  keyward key list --user alice")]
    List {
        /// Only this user's
        #[arg(long, value_name = "ID|USERNAME", value_parser = user_ref)]
        user: Option<UserRef>,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        settings: SettingFlags<StoreSettings>,
    },
    /// Show a key, less its secret, which nobody has but its user
    #[command(after_help = "Example:\n  keyward key show 7")]
    Show(OneKey),
    /// Refuse a key from now on
    #[command(after_help = "Example:\n  keyward key revoke 7")]
    Revoke(OneKey),
}

#[derive(Debug, Args)]
pub(super) struct OneKey {
    /// Id of the key
    #[arg(value_name = "ID", value_parser = value_parser!(i64).range(1..))]
    id: i64,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<StoreSettings>,
}

/// Most that the columns hold.
const MOST: i64 = 2_147_483_647;

#[derive(Debug, Args)]
pub(super) struct Create {
    /// Owner
    #[arg(long, value_name = "ID|USERNAME", value_parser = user_ref)]
    user: UserRef,
    /// For people
    #[arg(long, value_parser = plain)]
    name: String,
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
    /// For people
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = plain)]
    tags: Vec<String>,
    /// Requests, told to the upstream and to Envoy's rate limit
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(0..=MOST))]
    rate_limit_per_minute: Option<u32>,
    /// Requests, told to the upstream and to Envoy's rate limit
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(0..=MOST))]
    rate_limit_per_hour: Option<u32>,
    /// Requests, told to the upstream and to Envoy's rate limit
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(0..=MOST))]
    rate_limit_per_day: Option<u32>,
    /// Cents that may be spent before 402
    #[arg(long, value_name = "N", value_parser = value_parser!(i64).range(0..=MOST))]
    budget_limit_cents: Option<i64>,
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
    /// How the secret is stored
    #[arg(long, value_enum, value_name = "FORM", default_value = "bcrypt")]
    hash: HashForm,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<NewKeySettings>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BudgetType {
    /// For the key's whole life
    Total,
    /// For each month, UTC
    Monthly,
}

impl KeyCommand {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Self::Create(create) => create.run()?,
            Self::List { user, output, settings } => {
                let settings = settings.load()?.settings;
                let keys = block_on(async {
                    Ok(open(&settings, Missing::Refuse).await?.list_keys(user.as_ref()).await?)
                })?;
                output.print_list(&COLUMNS, &keys.iter().map(record).collect::<Vec<_>>())?;
            }
            Self::Show(one) => one.run(Then::Show)?,
            Self::Revoke(one) => one.run(Then::Revoke)?,
        }
        Ok(Exit::Done)
    }
}

#[derive(PartialEq, Eq)]
enum Then {
    Show,
    Revoke,
}

impl OneKey {
    fn run(self, then: Then) -> Result<(), Failure> {
        let settings = self.settings.load()?.settings;
        let id = KeyId::new(self.id);
        let key = block_on(async {
            let store = open(&settings, Missing::Refuse).await?;
            if then == Then::Revoke {
                store.set_key_active(id, false).await?;
            }
            Ok(store.key(id).await?)
        })?;
        self.output.print_one(&record(&key))
    }
}

impl Create {
    fn run(self) -> Result<(), Failure> {
        let now = crate::clock::wall();
        let expires_at =
            self.expires_at.or_else(|| self.expires_in.map(|lifetime| now.saturating_add(lifetime)));
        if expires_at.is_some_and(|end| end <= now) {
            return Err(Failure::usage(anyhow::anyhow!("--expires-at is in the past")));
        }
        let settings = self.settings.load()?.settings;
        let secret = NewSecret::generate(&settings.new_key_prefix, settings.key_prefix_length)
            .map_err(Failure::usage)?;
        let key = NewKey {
            user: self.user,
            name: self.name,
            prefix: secret.prefix.clone(),
            hash: secret.hash(self.hash)?,
            settings: KeySettings {
                description: self.description,
                scopes: self.scopes,
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
                budget_limit_cents: self.budget_limit_cents,
                budget_type: self.budget_type.map(|period| match period {
                    BudgetType::Total => "total".to_owned(),
                    BudgetType::Monthly => "monthly".to_owned(),
                }),
                expires_at,
            },
        };
        let created =
            block_on(async { Ok(open(&settings, Missing::Refuse).await?.create_key(&key).await?) })?;
        match self.output.output {
            Format::Json => self.output.print_one(&record(&created).with("key", secret.text.as_str())),
            // The secret is alone on standard output, so that it can be piped to where it belongs.
            Format::Table => {
                let prefix = secret.prefix.as_str();
                note(&format!("created key {} ({prefix}…); this is its secret, shown once:", created.id));
                print(&secret.text)
            }
        }
    }
}

const COLUMNS: [&str; 9] =
    ["id", "name", "key_prefix", "user_id", "username", "is_active", "expires_at", "last_used_at", "defects"];

fn record(key: &KeyView) -> Record {
    let settings = &key.settings;
    Record::default()
        .with("id", key.id.get())
        .with("name", key.name.clone())
        .with("key_prefix", key.key_prefix.clone())
        .with("user_id", key.user_id.map(crate::domain::record::UserId::get))
        .with("username", key.username.clone())
        .with("is_active", key.is_active)
        .with("scopes", settings.scopes.clone())
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
