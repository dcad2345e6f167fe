//! Asking before something that can't be undone.

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;

use super::failure::Failure;

#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Confirmation {
    /// Do it without asking
    #[arg(long)]
    yes: bool,
}

/// Goes on with `--yes`, or when somebody at a terminal says so. `instead` says what else could be done.
pub(super) fn confirm(confirmation: Confirmation, what: &str, instead: &str) -> Result<(), Failure> {
    if confirmation.yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::usage(anyhow::anyhow!("this would {what}; add --yes to do it, or {instead}")));
    }
    let mut answer = String::new();
    let asked = write!(io::stderr(), "This will {what}. Go on? [y/N] ")
        .and_then(|()| io::stdin().lock().read_line(&mut answer));
    match asked {
        Ok(_) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        Ok(_) | Err(_) => Err(Failure::refused(anyhow::anyhow!("nothing was done; {instead}"))),
    }
}
