//! `keyward cache …`: the caches of a running sidecar, through its admin port.

use clap::{Args, Subcommand, value_parser};
use serde_json::Value;

use super::admin_client::{Answer, ask};
use super::arguments::plain;
use super::block_on;
use super::failure::{Exit, Failure};
use super::flags::{AdminSettings, SettingFlags};
use super::output::{Format, Output, Record};

#[derive(Debug, Subcommand)]
pub(super) enum CacheCommand {
    /// Print what the caches hold and how they are used
    #[command(after_help = "Example:\n  keyward cache stats --output json")]
    Stats(Running),
    /// Forget what is known of one prefix, key or user; the next check reads it from the store
    #[command(
        after_help = "Examples:\n  keyward cache invalidate --prefix kw_1a2b3\n  keyward cache invalidate --key-id 7"
    )]
    Invalidate {
        #[command(flatten)]
        selector: Selector,
        #[command(flatten)]
        running: Running,
    },
    /// Forget everything; the next check of each key reads the store and computes its bcrypt
    #[command(after_help = "Example:\n  keyward cache flush --admin-listen 127.0.0.1:9193")]
    Flush(Running),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Selector {
    /// Every key with this prefix
    #[arg(long, value_name = "P", value_parser = plain)]
    prefix: Option<String>,
    /// One key
    #[arg(long, value_name = "N", value_parser = value_parser!(i64).range(1..))]
    key_id: Option<i64>,
    /// Every key of this user
    #[arg(long, value_name = "N", value_parser = value_parser!(i64).range(1..))]
    user_id: Option<i64>,
}

#[derive(Debug, Args)]
pub(super) struct Running {
    #[command(flatten)]
    pub(super) output: Output,
    #[command(flatten)]
    pub(super) settings: SettingFlags<AdminSettings>,
}

impl CacheCommand {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self {
            Self::Stats(running) => running.run("GET", "/stats"),
            Self::Invalidate { selector, running } => {
                running.run("POST", &format!("/cache/invalidate?{}", selector.query()))
            }
            Self::Flush(running) => running.run("POST", "/cache/flush"),
        }
    }
}

impl Selector {
    /// Exactly one is given; the parser sees to that.
    fn query(&self) -> String {
        match (&self.prefix, self.key_id, self.user_id) {
            (Some(prefix), _, _) => format!("prefix={}", percent_encoded(prefix)),
            (None, Some(id), _) => format!("key_id={id}"),
            (None, None, id) => format!("user_id={}", id.unwrap_or_default()),
        }
    }
}

impl Running {
    pub(super) fn run(self, method: &str, path: &str) -> Result<Exit, Failure> {
        let address = self.settings.load()?.settings.admin_listen;
        let Answer { body } = block_on(ask(address, method, path))?;
        let record = match serde_json::from_str(&body) {
            Ok(value) => {
                let mut record = Record::default();
                match self.output.output {
                    Format::Table => flatten("", &value, &mut record),
                    Format::Json => record = top_level(value),
                }
                record
            }
            Err(_) => {
                Record::default().with("answer", if body.trim().is_empty() { "done" } else { body.trim() })
            }
        };
        self.output.print_one(&record)?;
        Ok(Exit::Done)
    }
}

fn top_level(value: Value) -> Record {
    match value {
        Value::Object(fields) => {
            fields.into_iter().fold(Record::default(), |record, (name, value)| record.with(&name, value))
        }
        other => Record::default().with("answer", other),
    }
}

/// `{"a": {"b": 1}}` is shown as `a.b 1`.
fn flatten(path: &str, value: &Value, record: &mut Record) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(&path, value, record);
            }
        }
        other => {
            let name = if path.is_empty() { "answer" } else { path };
            *record = std::mem::take(record).with(name, other.clone());
        }
    }
}

/// RFC 3986: everything but the unreserved characters.
pub(super) fn percent_encoded(text: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    let encode =
        |byte: u8| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_can_not_add_to_the_query() {
        assert_eq!(percent_encoded("kw_1-a.b~"), "kw_1-a.b~");
        assert_eq!(percent_encoded("a&key_id=7 %é"), "a%26key_id%3D7%20%25%C3%A9");
    }

    #[test]
    fn nested_numbers_are_named_by_their_path() {
        let mut record = Record::default();
        flatten("", &serde_json::json!({"a": {"b": 1}, "c": [1]}), &mut record);
        assert_eq!(serde_json::to_string(&record).unwrap(), r#"{"a.b":1,"c":[1]}"#);
    }
}
