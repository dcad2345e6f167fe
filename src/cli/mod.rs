//! The commands, one file each. A command reads its arguments, asks the store or the running sidecar, and prints.
//!
//! `anyhow` stays on this floor; [`failure::Failure`] alone decides which exit code an error has.

mod admin_client;
mod arguments;
mod cache;
mod check;
mod config;
mod confirm;
mod deny;
mod doors;
mod failure;
mod flags;
mod health;
mod key;
mod manual;
mod migrate;
mod output;
mod own_memory;
mod parts;
mod reload;
mod secret;
mod secret_file;
mod serve;
mod store;
mod user;

pub use failure::{Exit, Failure};

use clap::{Parser, Subcommand};

use flags::{AllSettings, SettingFlags};

/// Authorizes API keys for Envoy.
#[derive(Debug, Parser)]
#[command(
    name = "keyward",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 done, 1 refused or not found, 2 usage or settings, 3 a backend could not be reached.\n\n\
                  Examples:\n  \
                  keyward migrate && keyward user create --username alice --email alice@example.com\n  \
                  keyward key create --user alice --name laptop\n  \
                  keyward serve"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sidecar
    #[command(
        after_help = "Example:\n  keyward serve --config keyward.yaml --grpc-listen unix:/run/keyward.sock"
    )]
    Serve {
        #[command(flatten)]
        settings: SettingFlags<AllSettings>,
    },
    /// Create what is missing in the store: tables, indexes, change-feed triggers; harmless when repeated
    #[command(after_help = "Examples:\n  keyward migrate --store sqlite:keyward.db\n  \
                            keyward migrate --print --store postgres://localhost/platform")]
    Migrate(migrate::Migrate),
    /// Create, list, show, enable and disable the owners of keys
    #[command(after_help = "Example:\n  keyward user list --output json")]
    User {
        #[command(subcommand)]
        command: user::UserCommand,
    },
    /// Create, list, show, change, rotate, revoke, delete and import keys
    #[command(after_help = "Example:\n  keyward key create --user alice --name laptop --expires-in 30d")]
    Key {
        #[command(subcommand)]
        command: key::KeyCommand,
    },
    /// Decide one described request and tell why; the key comes from standard input
    #[command(after_help = "Exit codes: 0 allow, 1 deny, 2 usage or settings, 3 could not decide.\n\n\
                            Examples, each with the key on standard input (< key.txt):\n  \
                            keyward check --key-stdin --path /v1/models --method GET\n  \
                            keyward check --key-stdin --body request.json --ip 10.1.2.3\n  \
                            keyward check --key-stdin --running --model gpt-4o --output json")]
    Check(Box<check::Check>),
    /// Read and clear the caches of a running sidecar
    #[command(after_help = "Example:\n  keyward cache stats")]
    Cache {
        #[command(subcommand)]
        command: cache::CacheCommand,
    },
    /// Refuse keys at once, by the emergency deny list of a running sidecar
    #[command(after_help = "Example:\n  keyward deny add --prefix kw_1a2b3")]
    Deny {
        #[command(subcommand)]
        command: deny::DenyCommand,
    },
    /// Ask a running sidecar whether it is ready; for probes, where there is no curl
    #[command(after_help = "Exit codes: 0 ready, 1 not ready, 2 usage or settings, 3 no answer.\n\n\
                            Examples:\n  keyward health\n  keyward health --live --admin-listen 127.0.0.1:9193")]
    Health(health::Health),
    /// Check and print the settings
    #[command(after_help = "Example:\n  keyward config check --config keyward.yaml")]
    Config {
        #[command(subcommand)]
        command: config::ConfigCommand,
    },
    /// Print the completions for a shell
    #[command(after_help = "Examples:\n  keyward completions bash\n  \
                            In ~/.bashrc: source <(keyward completions bash)")]
    Completions(manual::Completions),
    /// Print the manual page, or write those of all commands
    #[command(after_help = "Examples:\n  keyward man\n  keyward man --to /usr/local/share/man/man1\n  \
                            Read it at once: keyward man | man -l -")]
    Man(manual::Manual),
}

impl Cli {
    /// Runs the command to its end.
    pub fn run(self) -> Result<Exit, Failure> {
        match self.command {
            Command::Serve { settings } => serve::run(settings),
            Command::Migrate(command) => command.run(),
            Command::User { command } => command.run(),
            Command::Key { command } => command.run(),
            Command::Check(check) => check.run(),
            Command::Cache { command } => command.run(),
            Command::Deny { command } => command.run(),
            Command::Health(health) => health.run(),
            Command::Config { command } => command.run(),
            Command::Completions(command) => command.run(),
            Command::Man(command) => command.run(),
        }
    }
}

/// Runs one command's questions; one thread is enough for them.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime
        .map_err(|error| Failure::refused(anyhow::Error::new(error).context("start the runtime")))?
        .block_on(work)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn each(command: &clap::Command, path: &str, visit: &mut impl FnMut(&str, &clap::Command)) {
        visit(path, command);
        for inner in command.get_subcommands() {
            each(inner, &format!("{path} {}", inner.get_name()), visit);
        }
    }

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    /// An example that the parser refuses is worse than none.
    #[test]
    fn every_command_has_help_and_an_example_that_parses() {
        each(&Cli::command(), "keyward", &mut |path, command| {
            assert!(command.get_about().is_some(), "{path} has no help");
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Example"), "{path} has no example");
            let lines = after.lines().map(str::trim).filter(|line| line.starts_with("keyward "));
            for example in lines.flat_map(|line| line.split(" && ")) {
                let words = example.split(' ').map(|word| word.trim_matches('\''));
                assert!(Cli::try_parse_from(words).is_ok(), "{path}: {example}");
            }
        });
    }

    #[test]
    fn every_argument_has_help() {
        each(&Cli::command(), "keyward", &mut |path, command| {
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{path} {}", argument.get_id());
            }
        });
    }
}
