//! `keyward migrate`: creates what is missing in the store.

use clap::Args;

use super::block_on;
use super::failure::{Exit, Failure};
use super::flags::{SettingFlags, StoreSettings};
use super::output::{note, print};
use super::store::{Missing, open};
use crate::store;

#[derive(Debug, Args)]
pub(super) struct Migrate {
    /// Print the SQL instead of running it
    #[arg(long)]
    print: bool,
    #[command(flatten)]
    settings: SettingFlags<StoreSettings>,
}

impl Migrate {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let settings = self.settings.load()?.settings;
        if self.print {
            let is_sqlite = settings.store.expose_secret().starts_with("sqlite:");
            let sql = store::migration_sql(if is_sqlite { "sqlite" } else { "postgres" });
            print(sql.trim_end())?;
            return Ok(Exit::Done);
        }
        block_on(async {
            open(&settings, Missing::Create).await?.migrate().await?;
            note(&format!("{} is up to date", settings.store));
            Ok(Exit::Done)
        })
    }
}
