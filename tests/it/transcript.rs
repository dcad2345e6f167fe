//! Transcripts: commands in Markdown files, with what they print. `KEYWARD_REGENERATE=1` writes the files anew.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::keyward::Keyward;
use crate::support::process::without_settings;

/// Runs the commands of a file's `console` blocks, in one folder, and compares what they print.
fn follow(file: &str, folder: &Path, environment: &[(&str, String)]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let written = std::fs::read_to_string(&path).unwrap();
    let mut wording = Wording::default();
    let mut played = String::new();
    let mut is_console = false;
    for line in written.lines() {
        if let Some(command) = line.strip_prefix("$ ").filter(|_| is_console) {
            writeln!(played, "{line}").unwrap();
            played += &wording.stable(&run(command, folder, environment));
            continue;
        }
        if line.starts_with("```") {
            is_console = line == "```console";
        }
        if !is_console || line == "```console" {
            writeln!(played, "{line}").unwrap();
        }
    }
    if std::env::var_os("KEYWARD_REGENERATE").is_some() {
        std::fs::write(&path, played).unwrap();
        return;
    }
    for (line, (written, played)) in written.lines().zip(played.lines()).enumerate() {
        assert_eq!(without_widths(played), without_widths(written), "{file}:{}", line + 1);
    }
    assert_eq!(played.lines().count(), written.lines().count(), "{file}");
}

/// Both outputs, and how it ended where that was not well.
fn run(command: &str, folder: &Path, environment: &[(&str, String)]) -> String {
    let binaries = Path::new(env!("CARGO_BIN_EXE_keyward")).parent().unwrap();
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("bash");
    shell.args(["-o", "pipefail", "-c", &format!("exec 2>&1; {command}")]);
    without_settings(&mut shell);
    shell.env("PATH", path).env("COLUMNS", "120").envs(environment.iter().cloned());
    let output = shell.current_dir(folder).stdin(Stdio::null()).output().unwrap();
    let mut text = String::from_utf8(output.stdout).unwrap();
    match output.status.code() {
        // A command whose reader went away.
        Some(0) => {}
        code => writeln!(text, "[exit code {}]", code.unwrap_or(-1)).unwrap(),
    }
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// What differs from run to run, in words that do not.
#[derive(Default)]
struct Wording {
    /// Secrets and prefixes, with what stands for them.
    known: BTreeMap<String, String>,
    secrets: usize,
}

impl Wording {
    fn stable(&mut self, text: &str) -> String {
        let is_key = |c: char| c.is_ascii_alphanumeric() || c == '_';
        for word in text.split(|c: char| !is_key(c)) {
            if word.starts_with("kw_") && word.len() == 48 && !self.known.contains_key(word) {
                self.secrets += 1;
                let number = self.secrets;
                let prefix =
                    self.known.entry(word[..8].to_owned()).or_insert_with(|| format!("kw_EXAM{number}"));
                let example = format!("{prefix}ThisIsWhatTheSecretLooksLikeXonce_Check{number}");
                self.known.insert(word.to_owned(), example);
            }
        }
        // The longest first: a prefix is the beginning of its secret.
        let mut known: Vec<_> = self.known.iter().collect();
        known.sort_by_key(|(found, _)| std::cmp::Reverse(found.len()));
        let text = known.into_iter().fold(text.to_owned(), |text, (found, said)| text.replace(found, said));
        let user = whoami::username().unwrap();
        let lines = text.lines().map(|line| {
            let line = stable_moments(line);
            if line.contains("key ") || line.contains("\"actor\"") {
                line.replace(&user, "ops")
            } else {
                line
            }
        });
        lines.map(|line| format!("{line}\n")).collect()
    }
}

/// Moments of today, and the like, as one that does not change.
fn stable_moments(line: &str) -> String {
    let mut line = line.to_owned();
    let mut from = 0;
    while let Some(at) = line[from..].find("20").map(|at| at + from) {
        from = at + 2;
        let is_moment = line[at..].split(['"', ' ', ',']).next().filter(|text| text.contains('T'));
        let Some(text) = is_moment.filter(|text| text.parse::<jiff::Timestamp>().is_ok()).map(str::to_owned)
        else {
            // As the store writes it.
            let stored = line.get(at..at + 26).filter(|text| text.parse::<jiff::civil::DateTime>().is_ok());
            if let Some(stored) = stored.map(str::to_owned) {
                line = line.replace(&stored, "2030-01-31 12:00:00.000000");
            }
            continue;
        };
        let fixed = if text.starts_with("2099") { continue } else { "2030-01-31T12:00:00Z" };
        line = line.replace(&text, fixed);
    }
    line
}

/// Columns are as wide as what differs.
fn without_widths(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn the_guide_to_keys_is_what_the_commands_print() {
    let folder = tempfile::tempdir().unwrap();
    follow("docs/keys.md", folder.path(), &[]);
}

#[test]
fn bad_input_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let nobody = ("KEYWARD_ADMIN_LISTEN", "127.0.0.1:1".to_owned());
    follow("tests/transcripts/errors.md", folder.path(), &[nobody]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_prints_what_it_printed() {
    let keyward = Keyward::new().start().await;
    let (file, admin) = (keyward.sqlite_file(), keyward.admin_addr().to_string());
    follow("tests/transcripts/commands.md", file.parent().unwrap(), &[("KEYWARD_ADMIN_LISTEN", admin)]);
}
