//! `keyward deny …`: the emergency deny list of a running sidecar, through its admin port.

use clap::{Args, Subcommand, value_parser};
use serde_json::Value;

use super::admin_client::{Answer, ask};
use super::arguments::plain;
use super::block_on;
use super::cache::{Running, percent_encoded};
use super::failure::{Exit, Failure};
use super::output::{Record, note};

#[derive(Debug, Subcommand)]
pub(super) enum DenyCommand {
    /// Refuse a key or every key with a prefix, at once, whatever the store says
    #[command(after_help = "Example:\n  keyward deny add --key-id 42")]
    Add(Change),
    /// Refuse it no longer
    #[command(after_help = "Example:\n  keyward deny remove --prefix kw_1a2b3")]
    Remove(Change),
    /// Print who is refused, and whether the file or the admin port says so
    #[command(after_help = "Example:\n  keyward deny list --output json")]
    List(Running),
}

#[derive(Debug, Args)]
pub(super) struct Change {
    #[command(flatten)]
    entry: Entry,
    #[command(flatten)]
    running: Running,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Entry {
    /// One key
    #[arg(long, value_name = "N", value_parser = value_parser!(i64).range(1..))]
    key_id: Option<i64>,
    /// Every key with this prefix, as long as --key-prefix-length of the sidecar says
    #[arg(long, value_name = "P", value_parser = plain)]
    prefix: Option<String>,
}

impl DenyCommand {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Self::Add(change) => change.run("POST"),
            Self::Remove(change) => change.run("DELETE"),
            Self::List(running) => list(running),
        }
    }
}

impl Change {
    fn run(self, method: &str) -> Result<Exit, Failure> {
        // Exactly one is given; the parser sees to that.
        let query = match (self.entry.prefix, self.entry.key_id) {
            (Some(prefix), _) => format!("prefix={}", percent_encoded(&prefix)),
            (None, id) => format!("key_id={}", id.unwrap_or_default()),
        };
        self.running.run(method, &format!("/deny?{query}"))
    }
}

fn list(running: Running) -> Result<Exit, Failure> {
    let Running { output, settings } = running;
    let address = settings.load()?.settings.admin_listen;
    let Answer { body } = block_on(ask(address, "GET", "/deny"))?;
    let answer: Value = serde_json::from_str(&body)
        .map_err(|error| Failure::refused(anyhow::Error::new(error).context("read the answer of /deny")))?;
    let entries = answer.get("entries").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let field = |entry: &Value, name| entry.get(name).cloned().unwrap_or_default();
    let record = |entry: &Value| {
        ["key_id", "prefix", "source"]
            .into_iter()
            .fold(Record::default(), |record, name| record.with(name, field(entry, name)))
    };
    let records: Vec<Record> = entries.iter().map(record).collect();
    output.print_list(&["key_id", "prefix", "source"], &records)?;
    if let (Some(file), Some(error)) =
        (answer.get("file").and_then(Value::as_str), answer.get("file_error").and_then(Value::as_str))
    {
        note(&format!("note: {file} can't be used, what it said last is in force: {error}"));
    }
    Ok(Exit::Done)
}
