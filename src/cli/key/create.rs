//! `keyward key create`.

use clap::Args;

use super::super::arguments::{plain, user_ref};
use super::super::block_on;
use super::super::failure::{Failure, about};
use super::super::flags::{NewKeySettings, SettingFlags};
use super::super::output::Output;
use super::super::secret::{HashForm, NewSecret};
use super::super::store::{Missing, open};
use super::settings::{Preset, SettingsArguments};
use super::show::print_secret;
use crate::store::admin::{NewKey, UserRef};

#[derive(Debug, Args)]
pub(in crate::cli) struct Create {
    /// Owner
    #[arg(long, value_name = "ID|USERNAME", value_parser = user_ref)]
    user: UserRef,
    /// For people
    #[arg(long, value_parser = plain)]
    name: String,
    /// Rights and limits for a kind of key, where nothing else is named
    #[arg(long, value_enum, value_name = "KIND")]
    preset: Option<Preset>,
    #[command(flatten)]
    arguments: SettingsArguments,
    /// How the secret is stored
    #[arg(long, value_enum, value_name = "FORM", default_value = "bcrypt")]
    hash: HashForm,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<NewKeySettings>,
}

impl Create {
    pub(super) fn run(self) -> Result<(), Failure> {
        let mut key_settings = self.arguments.settings(crate::clock::wall())?;
        if let Some(preset) = self.preset {
            preset.fill(&mut key_settings);
        }
        let settings = self.settings.load()?.settings;
        let secret = NewSecret::generate(&settings.new_key_prefix, settings.key_prefix_length)
            .map_err(Failure::usage)?;
        let key = NewKey {
            user: self.user,
            name: self.name,
            prefix: secret.prefix.clone(),
            hash: secret.hash(self.hash)?,
            is_active: true,
            settings: key_settings,
        };
        let owner = key.user.to_string();
        let created = block_on(async {
            let store = open(&settings, Missing::Refuse).await?;
            store.create_key(&key).await.map_err(about(&owner, "user"))
        })?;
        let prefix = secret.prefix.as_str();
        let told = format!("created key {} ({prefix}…); this is its secret, shown once:", created.id);
        print_secret(self.output, &told, &created, &secret)
    }
}
