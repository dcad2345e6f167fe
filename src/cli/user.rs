//! `keyward user …`: the owners of keys.

use clap::Subcommand;

use super::arguments::{email, plain, user_ref, username};
use super::block_on;
use super::failure::{Exit, Failure, about};
use super::flags::{SettingFlags, StoreSettings};
use super::output::{Output, Record, time};
use super::store::{Missing, open};
use crate::store::admin::{NewUser, UserRef, UserView};

#[derive(Debug, Subcommand)]
pub(super) enum UserCommand {
    /// Create a user; without a password, so that nobody can log in as them elsewhere
    #[command(
        after_help = "Example:\n  keyward user create --username alice --email alice@example.com --role admin"
    )]
    Create {
        /// Unique name; not a number
        #[arg(long, value_parser = username)]
        username: String,
        /// Unique address
        #[arg(long, value_parser = email)]
        email: String,
        /// Told to the upstream
        #[arg(long, default_value = "user", value_parser = plain)]
        role: String,
        /// The user's keys have all scopes
        #[arg(long)]
        superuser: bool,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        settings: SettingFlags<StoreSettings>,
    },
    /// List all users
    #[command(after_help = "Example:\n  keyward user list --output json")]
    List {
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        settings: SettingFlags<StoreSettings>,
    },
    /// Show a user
    #[command(after_help = "Example:\n  keyward user show alice")]
    Show(OneUser),
    /// Let a user's keys work again
    #[command(after_help = "Example:\n  keyward user enable alice")]
    Enable(OneUser),
    /// Refuse all keys of a user
    #[command(after_help = "Example:\n  keyward user disable 7")]
    Disable(OneUser),
}

#[derive(Debug, clap::Args)]
pub(super) struct OneUser {
    /// Id or username
    #[arg(value_name = "ID|USERNAME", value_parser = user_ref)]
    user: UserRef,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<StoreSettings>,
}

impl UserCommand {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Self::Create { username, email, role, superuser, output, settings } => {
                let settings = settings.load()?.settings;
                let user = NewUser { username, email, role, is_superuser: superuser };
                let created = block_on(async {
                    Ok(open(&settings, Missing::Refuse).await?.create_user(&user).await?)
                })?;
                output.print_one(&record(&created))?;
            }
            Self::List { output, settings } => {
                let settings = settings.load()?.settings;
                let users =
                    block_on(async { Ok(open(&settings, Missing::Refuse).await?.list_users().await?) })?;
                output.print_list(&COLUMNS, &users.iter().map(record).collect::<Vec<_>>())?;
            }
            Self::Show(one) => one.run(None)?,
            Self::Enable(one) => one.run(Some(true))?,
            Self::Disable(one) => one.run(Some(false))?,
        }
        Ok(Exit::Done)
    }
}

impl OneUser {
    /// Switches the user, where asked to, and shows them as they are then.
    fn run(self, switch_to: Option<bool>) -> Result<(), Failure> {
        let settings = self.settings.load()?.settings;
        let named = self.user.to_string();
        let user = block_on(async {
            let store = open(&settings, Missing::Refuse).await?;
            match switch_to {
                Some(is_active) => store.set_user_active(&self.user, is_active).await,
                None => store.user(&self.user).await,
            }
            .map_err(about(&named, "user"))
        })?;
        self.output.print_one(&record(&user))
    }
}

const COLUMNS: [&str; 7] = ["id", "username", "email", "role", "is_active", "is_superuser", "created_at"];

fn record(user: &UserView) -> Record {
    Record::default()
        .with("id", user.id.get())
        .with("username", user.username.as_str())
        .with("email", user.email.as_str())
        .with("role", user.role.clone())
        .with("is_active", user.is_active)
        .with("is_superuser", user.is_superuser)
        .with("created_at", time(user.created_at))
}
