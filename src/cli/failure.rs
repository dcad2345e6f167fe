//! How a command ends, and which exit code an error has.

use std::process::ExitCode;

use crate::config::Mistakes;
use crate::store::StoreError;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0
    Done,
    /// 1: refused or not found.
    Refused,
    /// 2: usage or settings.
    Usage,
    /// 3: a backend could not be reached.
    Unreachable,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Refused => 1,
            Exit::Usage => 2,
            Exit::Unreachable => 3,
        })
    }
}

/// A command that did not do what was asked.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    lines: Vec<String>,
}

impl Failure {
    /// Refused or not found.
    pub fn refused(error: anyhow::Error) -> Self {
        Self { exit: Exit::Refused, lines: vec![one_line(&error)] }
    }

    /// Wrong arguments or settings.
    pub fn usage(error: anyhow::Error) -> Self {
        Self { exit: Exit::Usage, lines: vec![one_line(&error)] }
    }

    /// A backend did not answer.
    pub fn unreachable(error: anyhow::Error) -> Self {
        Self { exit: Exit::Unreachable, lines: vec![one_line(&error)] }
    }

    /// For a command whose 1 is an answer: what is neither usage nor settings left the question open.
    pub(super) fn undecided(self) -> Self {
        match self.exit {
            Exit::Usage => self,
            Exit::Done | Exit::Refused | Exit::Unreachable => Self { exit: Exit::Unreachable, ..self },
        }
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// What went wrong: one line, or one for each mistake in the settings.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }
}

/// The error and its causes.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::refused(error)
    }
}

/// What the store says of something that was named, with the name.
pub(super) fn about<'a>(named: &'a str, see: &'a str) -> impl Fn(StoreError) -> Failure + 'a {
    move |error| match error {
        StoreError::NotFound(what) => {
            Failure::refused(anyhow::anyhow!("there is no {what} {named}; see `keyward {see} list`"))
        }
        other => other.into(),
    }
}

impl From<Mistakes> for Failure {
    fn from(mistakes: Mistakes) -> Self {
        Self { exit: Exit::Usage, lines: mistakes.lines().to_vec() }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let exit = match error {
            StoreError::Unavailable(..) | StoreError::Timeout | StoreError::NotPrimary => Exit::Unreachable,
            StoreError::MissingTables => {
                return Self::refused(anyhow::anyhow!(
                    "the store has no tables of Keyward yet: run `keyward migrate`"
                ));
            }
            StoreError::TooManyCandidates
            | StoreError::NotFound(_)
            | StoreError::Conflict(_)
            | StoreError::Refused(_)
            | StoreError::Schema(_) => Exit::Refused,
        };
        Self { exit, lines: vec![one_line(&anyhow::Error::new(error))] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_that_is_away_is_not_a_refusal() {
        assert_eq!(Failure::from(StoreError::Timeout).exit(), Exit::Unreachable);
        assert_eq!(Failure::from(StoreError::NotPrimary).exit(), Exit::Unreachable);
        assert_eq!(Failure::from(StoreError::NotFound("key")).exit(), Exit::Refused);
        assert_eq!(Failure::from(StoreError::Conflict("alice")).exit(), Exit::Refused);
        let missing = Failure::from(StoreError::MissingTables);
        assert_eq!(missing.exit(), Exit::Refused);
        assert!(missing.lines()[0].contains("keyward migrate"));
    }

    #[test]
    fn what_is_left_open_is_no_refusal() {
        let exit = |failure: Failure| failure.undecided().exit();
        assert_eq!(exit(Failure::refused(anyhow::anyhow!("no such file"))), Exit::Unreachable);
        assert_eq!(exit(Failure::unreachable(anyhow::anyhow!("gone"))), Exit::Unreachable);
        assert_eq!(exit(Failure::usage(anyhow::anyhow!("what?"))), Exit::Usage);
    }

    #[test]
    fn causes_are_on_the_same_line() {
        let error = anyhow::anyhow!("no route\nto host").context("connect to the store");
        assert_eq!(Failure::refused(error).lines(), ["connect to the store: no route to host"]);
    }
}
