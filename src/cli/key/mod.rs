//! `keyward key …`: the keys, from birth to death.

mod change;
mod create;
mod import;
mod rows;
mod settings;
mod show;

use clap::{Args, Subcommand};

use super::arguments::key_id;
use super::failure::{Exit, Failure};
use super::flags::{SettingFlags, StoreSettings};
use super::output::Output;
use crate::domain::record::KeyId;

#[derive(Debug, Subcommand)]
pub(super) enum KeyCommand {
    /// Create a key and print its secret, once, on standard output
    #[command(after_help = "Examples:\n  keyward key create --user alice --name laptop --expires-in 30d\n  \
        keyward key create --user 7 --name ci --allowed-models gpt-4o,claude-* --allowed-ips 10.0.0.0/8 --output json\n  \
        keyward key create --user alice --name bot --preset chatbot")]
    Create(Box<create::Create>),
    /// List all keys, or those that fit
    #[command(
        after_help = "Examples:\n  keyward key list --user alice\n  keyward key list --expiring-within 7d\n  \
        keyward key list --unused-since 90d --output json"
    )]
    List(show::List),
    /// Show a key, less its secret, which nobody has but its user
    #[command(after_help = "Example:\n  keyward key show 7")]
    Show(OneKey),
    /// Change a key; what is not named stays
    #[command(
        after_help = "Examples:\n  keyward key update 7 --allowed-models gpt-4o --rate-limit-per-minute 60\n  \
        keyward key update 7 --clear allowed-ips,expires-at"
    )]
    Update(Box<change::Update>),
    /// Give a key another secret, and print it, once, on standard output
    #[command(after_help = "The key keeps its id, its settings and its public prefix.\n\n\
        Examples:\n  keyward key rotate 7 --grace 24h\n  keyward key rotate 7 --now")]
    Rotate(change::Rotate),
    /// Refuse a key, with all its secrets, from now on
    #[command(after_help = "Example:\n  keyward key revoke 7")]
    Revoke(OneKey),
    /// Remove a key for good
    #[command(after_help = "Example:\n  keyward key delete 7 --yes")]
    Delete(change::Delete),
    /// Create keys that exist elsewhere, from a file or standard input
    #[command(after_help = import::HELP)]
    Import(import::Import),
    /// Show what was changed about a key by command, when and by whom
    #[command(after_help = "Example:\n  keyward key history 7")]
    History(OneKey),
}

#[derive(Debug, Args)]
pub(super) struct OneKey {
    /// Id of the key
    #[arg(value_name = "ID", value_parser = key_id, allow_negative_numbers = true)]
    id: i64,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<StoreSettings>,
}

impl OneKey {
    fn id(&self) -> KeyId {
        KeyId::new(self.id)
    }
}

impl KeyCommand {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Self::Create(create) => create.run()?,
            Self::List(list) => list.run()?,
            Self::Show(one) => show::show(one)?,
            Self::Update(update) => update.run()?,
            Self::Rotate(rotate) => rotate.run()?,
            Self::Revoke(one) => change::revoke(one)?,
            Self::Delete(delete) => delete.run()?,
            Self::Import(import) => return import.run(),
            Self::History(one) => show::history(one)?,
        }
        Ok(Exit::Done)
    }
}
