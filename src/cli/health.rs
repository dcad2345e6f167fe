//! `keyward health`: what the running sidecar says of itself, as an exit code that a probe understands.
//!
//! The image has no shell and no curl, so the binary asks itself; that way the admin port can stay on loopback.

use std::time::Duration;

use clap::Args;

use super::admin_client::page_within;
use super::arguments::lifetime;
use super::block_on;
use super::failure::{Exit, Failure};
use super::flags::{AdminSettings, SettingFlags};
use super::output::{print, visible};

/// The answer is one line; what else might listen there is not worth more.
const MOST_LINES: usize = 3;

#[derive(Debug, Args)]
pub(super) struct Health {
    /// Ask whether the process runs (/livez) and not whether it can answer checks (/readyz)
    #[arg(long)]
    live: bool,
    /// How long to wait for the answer
    // Under a probe's usual limit of a second: a probe that is cut off says nothing, this one says why.
    #[arg(long, value_name = "DURATION", default_value = "900ms", value_parser = lifetime)]
    timeout: Duration,
    #[command(flatten)]
    settings: SettingFlags<AdminSettings>,
}

impl Health {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let listen = self.settings.load()?.settings.admin_listen;
        let path = if self.live { "/livez" } else { "/readyz" };
        let (status, body) = block_on(page_within(listen, self.timeout, path))?;
        let said: Vec<String> = body.lines().take(MOST_LINES).map(visible).collect();
        print(&if said.is_empty() { status.to_string() } else { said.join("\n") })?;
        Ok(if status.is_success() { Exit::Done } else { Exit::Refused })
    }
}
