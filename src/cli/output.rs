//! What commands print: records, as a table for people or as JSON for programs, on standard output alone.

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

use super::failure::Failure;
use crate::domain::time::Timestamp;

/// `--output`
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Output {
    /// How the result is printed
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "table")]
    pub(super) output: Format,
}

/// A form of printing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    Table,
    /// For programs: an object, or an array of objects for a list
    Json,
}

/// Named values in a fixed order; the names are columns of the schema and stay as they are.
#[derive(Debug, Clone, Default)]
pub(super) struct Record(Vec<(String, Value)>);

impl Record {
    /// Adds a value.
    pub(super) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.push((name.to_owned(), value.into()));
        self
    }

    fn get(&self, name: &str) -> &Value {
        self.0.iter().find(|(own, _)| own == name).map_or(&Value::Null, |(_, value)| value)
    }
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Output {
    /// Prints a list; the table has these columns, JSON has every field.
    pub(super) fn print_list(self, columns: &[&str], records: &[Record]) -> Result<(), Failure> {
        match self.output {
            Format::Json => print_json(&records),
            Format::Table => {
                let mut table = Table::new();
                table.set_header(columns.iter().map(|column| column.to_uppercase()));
                for record in records {
                    table.add_row(columns.iter().map(|column| cell(record.get(column))));
                }
                print(&plain(table))
            }
        }
    }

    /// Prints one record; the table has a line for each field.
    pub(super) fn print_one(self, record: &Record) -> Result<(), Failure> {
        match self.output {
            Format::Json => print_json(record),
            Format::Table => {
                let mut table = Table::new();
                for (name, value) in &record.0 {
                    table.add_row([cell(&Value::from(name.as_str())), cell(value)]);
                }
                print(&plain(table))
            }
        }
    }
}

/// Columns with two blanks between them, which `cut`, `awk` and people can read; on a terminal no wider than that.
fn plain(mut table: Table) -> String {
    if let Some(width) = terminal_width() {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    table.load_style(presets::NOTHING);
    for column in table.column_iter_mut() {
        column.set_padding((0, 1));
    }
    table.trim_fmt()
}

/// Columns of the terminal that standard output is; `None` where it is none.
fn terminal_width() -> Option<u16> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    Some(size.ws_col).filter(|columns| *columns > 0)
}

/// Stored texts may hold anything; none of it reaches the terminal as a control sequence.
fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => return "-".to_owned(),
        Value::String(text) => to_the_second(text),
        Value::Array(items) if items.is_empty() => return "-".to_owned(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        Value::Object(fields) if fields.is_empty() => return "-".to_owned(),
        Value::Object(fields) => {
            let named = fields.iter().map(|(name, value)| format!("{name}={}", cell(value)));
            named.collect::<Vec<_>>().join(" ")
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    };
    visible(&text)
}

/// Foreign text without control characters.
pub(super) fn visible(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().collect() } else { String::from(c) };
    text.chars().map(escape).collect()
}

/// A moment without its fraction, which is for programs; any other text as it is.
fn to_the_second(text: &str) -> String {
    match text.split_once('.') {
        Some((second, fraction))
            if fraction
                .strip_suffix('Z')
                .is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
                && text.parse::<jiff::Timestamp>().is_ok() =>
        {
            format!("{second}Z")
        }
        _ => text.to_owned(),
    }
}

pub(super) fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::new)?;
    print(&text)
}

/// Prints lines to standard output.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    print_bytes(format!("{text}\n").as_bytes())
}

/// Prints bytes to standard output. A reader that went away (`| head`) is no error.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::refused(anyhow::Error::new(error).context("write to standard output")))
        }
        _ => Ok(()),
    }
}

/// Prints a line for people to standard error; who does not read it misses nothing.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// RFC 3339 in UTC, `infinity`, or JSON null.
pub(super) fn time(moment: Option<Timestamp>) -> Value {
    let Some(moment) = moment else {
        return Value::Null;
    };
    if moment == Timestamp::INFINITY {
        return Value::from("infinity");
    }
    if moment == Timestamp::NEGATIVE_INFINITY {
        return Value::from("-infinity");
    }
    match jiff::Timestamp::from_microsecond(moment.as_microseconds()) {
        Ok(time) => Value::from(time.to_string()),
        Err(_) => Value::from("out of range"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_the_order_of_the_fields() {
        let record = Record::default().with("id", 7).with("active", true).with("a", Value::Null);
        assert_eq!(serde_json::to_string(&record).unwrap(), r#"{"id":7,"active":true,"a":null}"#);
    }

    #[test]
    fn control_characters_are_escaped_in_tables() {
        assert_eq!(cell(&Value::from("a\x1b[31m\nb")), "a\\u{1b}[31m\\nb");
        assert_eq!(cell(&Value::from(vec!["a", "b"])), "a,b");
        assert_eq!(cell(&Value::Null), "-");
        assert_eq!(cell(&serde_json::json!({"a": ["x", "y"], "b": null})), "a=x,y b=-");
    }

    #[test]
    fn moments_in_tables_have_no_fraction_and_other_texts_keep_theirs() {
        assert_eq!(cell(&Value::from("2030-01-31T12:00:00.123456Z")), "2030-01-31T12:00:00Z");
        for text in ["2030-01-31T12:00:00Z", "1.5Z", "v1.2", "a.b"] {
            assert_eq!(cell(&Value::from(text)), text);
        }
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(time(Some(Timestamp::from_microseconds(0))), Value::from("1970-01-01T00:00:00Z"));
        assert_eq!(time(Some(Timestamp::INFINITY)), Value::from("infinity"));
        assert_eq!(time(None), Value::Null);
    }
}
