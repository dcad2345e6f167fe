//! `keyward key import`: keys that exist elsewhere, row by row.
//!
//! Rows are read in blocks. A block goes into the store in one transaction; where the store refuses, the block is halved
//! until the row that it refuses stands alone, so that good rows go in and a bad one is named.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::super::arguments::user_ref;
use super::super::block_on;
use super::super::failure::{Exit, Failure};
use super::super::flags::{NewKeySettings, SettingFlags};
use super::super::output::{Output, Record, note};
use super::super::secret::HashForm;
use super::super::store::{Missing, open_for};
use super::rows::{Row, RowReader};
use crate::store::admin::{ImportMode, NewKey, UserRef};
use crate::store::{Store, StoreError};

pub(super) const HELP: &str = "\
Columns (CSV: by the header line; JSON lines: by field): name; user, user_id or username; key (plaintext), or key_hash and \
key_prefix; is_active and every setting of `key create`, by the names of the columns. Lists are JSON, or texts with commas. \
What `key list --output json` prints besides is ignored. A key_hash is bcrypt, sha256:HEX, or a SHA-256 in hex or base64.

Examples:
  keyward key import keys.csv --dry-run
  keyward key import --format jsonl --user alice --hash sha256 --atomic";

/// Rows in one transaction.
const BLOCK: usize = 500;

/// A block takes a while in a busy store, and with --atomic it is everything.
const BLOCK_TIMEOUT: Duration = Duration::from_mins(10);

#[derive(Debug, Args)]
pub(in crate::cli) struct Import {
    /// File to read; without it, or with -, standard input
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// How the rows are written; from the file's ending where that says it
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Owner of rows that name none
    #[arg(long, value_name = "ID|USERNAME", value_parser = user_ref)]
    user: Option<UserRef>,
    /// How plaintext keys are stored
    #[arg(long, value_enum, value_name = "FORM", default_value = "bcrypt")]
    hash: HashForm,
    /// Check every row, against the store too, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// All rows or none
    #[arg(long)]
    atomic: bool,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: SettingFlags<NewKeySettings>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Comma-separated, with a header line
    Csv,
    /// One JSON object a line
    Jsonl,
}

impl Import {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let settings = self.settings.clone().load()?.settings;
        let format = self.format().map_err(Failure::usage)?;
        // A dry run needs no costly hash.
        let hash = if self.dry_run { HashForm::Sha256 } else { self.hash };
        let rows = RowReader {
            prefix_length: settings.key_prefix_length,
            user: self.user.clone(),
            hash,
            now: crate::clock::wall(),
        };
        let source = self.source()?;
        let mut blocks = rows.read(format, source).map_err(Failure::usage)?;
        let mode = if self.dry_run { ImportMode::DryRun } else { ImportMode::Commit };
        let mut report = Report::new();
        block_on(async {
            let store = open_for(&settings, Missing::Refuse, BLOCK_TIMEOUT).await?;
            let block_size = if self.atomic { usize::MAX } else { BLOCK };
            loop {
                let block = blocks.next_block(block_size)?;
                if block.is_empty() {
                    return Ok(());
                }
                report.take_block(&store, block, mode, self.atomic).await?;
            }
        })
        .inspect_err(|_| report.note_progress(true))?;
        self.print(report)
    }

    fn format(&self) -> anyhow::Result<Format> {
        let ending =
            self.file.as_deref().and_then(|file| file.extension()).and_then(|ending| ending.to_str());
        match (self.format, ending) {
            (Some(format), _) => Ok(format),
            (None, Some("csv")) => Ok(Format::Csv),
            (None, Some("jsonl" | "ndjson")) => Ok(Format::Jsonl),
            (None, _) => anyhow::bail!("say how the rows are written: --format csv, or --format jsonl"),
        }
    }

    fn source(&self) -> Result<Box<dyn Read>, Failure> {
        match &self.file {
            Some(path) if path.as_os_str() != "-" => {
                let file = File::open(path).with_context(|| format!("read {}", path.display()));
                Ok(Box::new(file.map_err(Failure::usage)?))
            }
            _ => Ok(Box::new(io::stdin())),
        }
    }

    fn print(self, report: Report) -> Result<Exit, Failure> {
        let errors: Vec<serde_json::Value> = report
            .refused
            .iter()
            .map(|(line, reason)| serde_json::json!({ "line": line, "reason": reason }))
            .collect();
        let exit = if errors.is_empty() { Exit::Done } else { Exit::Refused };
        let record = Record::default()
            .with("rows", report.rows)
            .with("imported", if self.dry_run { 0 } else { report.taken })
            .with("good", report.taken)
            .with("refused", report.refused.len())
            .with("dry_run", self.dry_run)
            .with("errors", errors);
        self.output.print_one(&record)?;
        Ok(exit)
    }
}

const GIVEN_UP: &str = "nothing was imported, because of --atomic";

/// What became of the rows.
struct Report {
    rows: usize,
    taken: usize,
    /// Line and reason.
    refused: Vec<(u64, String)>,
    is_terminal: bool,
    noted: usize,
}

impl Report {
    fn new() -> Self {
        Self { rows: 0, taken: 0, refused: Vec::new(), is_terminal: io::stderr().is_terminal(), noted: 0 }
    }

    /// Rows that can't be read are refused; the others go into the store.
    async fn take_block(
        &mut self,
        store: &Store,
        block: Vec<Row>,
        mode: ImportMode,
        atomic: bool,
    ) -> Result<(), Failure> {
        self.rows += block.len();
        let (mut lines, mut keys) = (Vec::new(), Vec::new());
        for Row { line, key } in block {
            match key {
                Ok(key) => {
                    lines.push(line);
                    keys.push(key);
                }
                Err(reason) => self.refuse(line, reason),
            }
        }
        if atomic && !self.refused.is_empty() {
            note(GIVEN_UP);
            return Ok(());
        }
        let mut open = vec![(lines, Arc::<[NewKey]>::from(keys))];
        while let Some((lines, keys)) = open.pop() {
            if keys.is_empty() {
                continue;
            }
            match store.import_keys(&keys, mode).await {
                Ok(()) => self.taken += keys.len(),
                Err((_, error)) if error.is_unavailable() => return Err(error.into()),
                Err((index, error)) if atomic => {
                    self.refuse(lines.get(index).copied().unwrap_or_default(), reason(&error, &keys, index));
                    note(GIVEN_UP);
                    return Ok(());
                }
                Err((index, error)) if keys.len() == 1 => {
                    self.refuse(lines.first().copied().unwrap_or_default(), reason(&error, &keys, index));
                }
                Err(_) => {
                    // The first half last, so that it is taken up first.
                    let (first, second) = keys.split_at(keys.len() / 2);
                    let (first_lines, second_lines) = lines.split_at(lines.len() / 2);
                    open.push((second_lines.to_vec(), second.into()));
                    open.push((first_lines.to_vec(), first.into()));
                }
            }
            self.note_progress(false);
        }
        Ok(())
    }

    fn refuse(&mut self, line: u64, reason: String) {
        note(&format!("line {line}: {reason}"));
        self.refused.push((line, reason));
    }

    /// On a terminal every block, otherwise every 10,000 rows: long imports are seen to go on.
    fn note_progress(&mut self, is_last: bool) {
        const SELDOM: usize = 10_000;
        if self.is_terminal && self.rows > BLOCK {
            let _ = write!(io::stderr(), "\r{} rows, {} good ", self.rows, self.taken);
            if is_last {
                note("");
            }
        } else if is_last || self.rows / SELDOM > self.noted / SELDOM {
            note(&format!("{} rows read, {} good so far", self.rows, self.taken));
        }
        self.noted = self.rows;
    }
}

/// The store's reason, with the name of what the row names.
fn reason(error: &StoreError, keys: &[NewKey], index: usize) -> String {
    match (error, keys.get(index).map(|key| &key.user)) {
        (StoreError::NotFound(_), Some(UserRef::Username(name))) => format!("there is no user {name:?}"),
        (StoreError::NotFound(_), Some(UserRef::Id(id))) => format!("there is no user with id {id}"),
        _ => error.to_string(),
    }
}
