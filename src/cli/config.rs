//! `keyward config …`: what the settings are, and whether they are right.

use clap::Subcommand;
use serde_json::Value;

use super::failure::{Exit, Failure};
use super::flags::{AllSettings, SettingFlags};
use super::output::{Output, Record, note, print_json};
use crate::config::{self, Effective};

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Name every mistake in the settings; exit code 2 where there is one
    #[command(after_help = "Example:\n  keyward config check --config keyward.yaml")]
    Check {
        #[command(flatten)]
        settings: SettingFlags<AllSettings>,
    },
    /// Print every setting, its value and where it came from; passwords are hidden
    #[command(
        after_help = "Examples:\n  keyward config print --config keyward.yaml\n  keyward config print --output json"
    )]
    Print {
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        settings: SettingFlags<AllSettings>,
    },
    /// Print the JSON Schema of the settings file, for editors and CI
    #[command(after_help = "Example:\n  keyward config schema")]
    Schema,
}

impl ConfigCommand {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Self::Check { settings } => {
                settings.load()?;
                note("the settings are valid");
            }
            Self::Print { output, settings } => {
                let loaded = settings.load()?;
                let records: Vec<Record> = loaded.effective().iter().map(record).collect();
                output.print_list(&["setting", "origin", "source", "value"], &records)?;
            }
            Self::Schema => print_json(&config::schema())?,
        }
        Ok(Exit::Done)
    }
}

fn record(effective: &Effective) -> Record {
    Record::default()
        .with("setting", effective.setting.flag)
        .with("value", effective.value.as_str())
        .with("origin", effective.origin.layer())
        .with("source", effective.origin.place().map_or(Value::Null, Value::from))
}
