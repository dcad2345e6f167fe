//! Runs the built program with an environment of its own.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// How a run ended.
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

/// The program in this directory, with nothing in its environment.
pub(crate) fn keyward(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keyward"));
    command.args(arguments).current_dir(directory).env_clear().stdin(Stdio::null());
    command
}

/// Runs it to its end.
pub(crate) fn run(directory: &Path, arguments: &[&str]) -> Ended {
    keyward(directory, arguments).output().unwrap().into()
}
