//! `keyward completions` and `keyward man`: what shells and `man` want to know of the command line.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::failure::{Exit, Failure};
use super::output::{note, print_bytes};

/// The name of the program.
const PROGRAM: &str = "keyward";

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell that is to complete
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), PROGRAM, &mut script);
        print_bytes(&script)?;
        Ok(Exit::Done)
    }
}

#[derive(Debug, Args)]
pub(super) struct Manual {
    /// Write the page of every command into this folder, as keyward-key-create.1 and so on
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
}

impl Manual {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let command = super::Cli::command();
        match self.to {
            None => {
                let mut page = Vec::new();
                Man::new(command).render(&mut page).context("write the manual")?;
                print_bytes(&page)?;
            }
            Some(folder) => {
                std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
                clap_mangen::generate_to(command.disable_help_subcommand(true), &folder)
                    .with_context(|| format!("write the manual into {}", folder.display()))?;
                note(&format!("the manual was written into {}", folder.display()));
            }
        }
        Ok(Exit::Done)
    }
}
