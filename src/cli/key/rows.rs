//! Rows of an import: CSV or JSON lines to keys. Both are read as JSON objects first, so that a column means the same in
//! either.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read};
use std::num::NonZero;
use std::thread;

use anyhow::Context;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::super::arguments::{endpoint, moment, network, plain, user_ref};
use super::super::secret::{HashForm, hash};
use super::import::Format;
use super::settings::check_lists;
use crate::config::nearest::nearest;
use crate::domain::hash::KeyHash;
use crate::domain::key::{KeyPrefix, PrefixLength, PresentedKey};
use crate::domain::record::UserId;
use crate::domain::time::Timestamp;
use crate::store::admin::{KeySettings, NewKey, UserRef};

/// Longest line of JSON.
const MAX_LINE_BYTES: usize = 1 << 20;
/// One byte more, to tell.
const MAX_LINE: u64 = (1 << 20) + 1;

/// What is read.
const COLUMNS: [&str; 25] = [
    "name",
    "user",
    "user_id",
    "username",
    "key",
    "key_hash",
    "key_prefix",
    "is_active",
    "description",
    "scopes",
    "permissions",
    "allowed_models",
    "allowed_endpoints",
    "allowed_ips",
    "allowed_chatbots",
    "allowed_agents",
    "tags",
    "rate_limit_per_minute",
    "rate_limit_per_hour",
    "rate_limit_per_day",
    "is_unlimited",
    "budget_limit_cents",
    "budget_type",
    "expires_at",
    "expires_in",
];

/// What an export of keys has besides; it belongs to the database that it came from.
const IGNORED: [&str; 10] = [
    "id",
    "created_at",
    "updated_at",
    "last_used_at",
    "defects",
    "old_secrets",
    "total_requests",
    "total_tokens",
    "total_cost",
    "email",
];

/// How rows are read.
pub(super) struct RowReader {
    pub(super) prefix_length: PrefixLength,
    /// Owner of rows that name none.
    pub(super) user: Option<UserRef>,
    /// How plaintext is stored.
    pub(super) hash: HashForm,
    pub(super) now: Timestamp,
}

/// One row.
pub(super) struct Row {
    pub(super) line: u64,
    pub(super) key: Result<NewKey, String>,
}

/// A row whose plaintext is not hashed yet.
struct Draft {
    key: NewKey,
    plaintext: Option<Zeroizing<String>>,
}

/// The secret of a row: plaintext, or a hash.
struct Secret {
    plaintext: Option<Zeroizing<String>>,
    prefix: KeyPrefix,
    hash: Zeroizing<String>,
}

type Raw = (u64, Result<Map<String, Value>, String>);

/// The rows, block by block.
pub(super) struct Blocks {
    reader: RowReader,
    rows: Box<dyn Iterator<Item = anyhow::Result<Raw>>>,
    seen: HashSet<[u8; 32]>,
}

impl RowReader {
    /// Begins to read. A header line that names an unknown column is an error before any row is looked at.
    pub(super) fn read(self, format: Format, source: Box<dyn Read>) -> anyhow::Result<Blocks> {
        let rows: Box<dyn Iterator<Item = anyhow::Result<Raw>>> = match format {
            Format::Csv => Box::new(csv_rows(source)?),
            Format::Jsonl => Box::new(json_rows(source)),
        };
        Ok(Blocks { reader: self, rows, seen: HashSet::new() })
    }
}

impl Blocks {
    /// Up to so many rows; none at the end. An error where nothing more can be read.
    pub(super) fn next_block(&mut self, most: usize) -> anyhow::Result<Vec<Row>> {
        let mut drafts = Vec::new();
        while drafts.len() < most
            && let Some(row) = self.rows.next()
        {
            let (line, fields) = row?;
            let draft = fields.and_then(|fields| self.reader.draft(&fields));
            drafts.push((line, draft.and_then(|draft| self.once(draft))));
        }
        hash_all(drafts, self.reader.hash)
    }

    /// The store would only notice equal hashes, and bcrypt hashes of one key differ.
    fn once(&mut self, draft: Draft) -> Result<Draft, String> {
        let secret: &[u8] = match &draft.plaintext {
            Some(plaintext) => plaintext.as_bytes(),
            None => draft.key.hash.as_bytes(),
        };
        let is_new = self.seen.insert(Sha256::digest(secret).into());
        if is_new { Ok(draft) } else { Err("the same key stands in an earlier line".to_owned()) }
    }
}

/// bcrypt is slow on purpose: on all cores.
fn hash_all(drafts: Vec<(u64, Result<Draft, String>)>, form: HashForm) -> anyhow::Result<Vec<Row>> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let mut drafts = drafts;
    let share = drafts.len().div_ceil(threads).max(1);
    thread::scope(|scope| {
        let work = |share: &mut [(u64, Result<Draft, String>)]| -> anyhow::Result<()> {
            for (_, draft) in share {
                if let Ok(Draft { key, plaintext: Some(plaintext) }) = draft {
                    key.hash = hash(plaintext.as_bytes(), form)?;
                }
            }
            Ok(())
        };
        let handles: Vec<_> =
            drafts.chunks_mut(share).map(|share| scope.spawn(move || work(share))).collect();
        handles.into_iter().try_for_each(|handle| {
            handle.join().map_err(|_| anyhow::anyhow!("a thread that hashes keys ended early"))?
        })
    })?;
    Ok(drafts.into_iter().map(|(line, draft)| Row { line, key: draft.map(|draft| draft.key) }).collect())
}

fn csv_rows(source: Box<dyn Read>) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Raw>>> {
    let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(source);
    let header = reader.headers().context("read the header line")?.clone();
    anyhow::ensure!(!header.is_empty(), "there is no header line with the names of the columns");
    for name in &header {
        check_column(name).map_err(|reason| anyhow::anyhow!("header line: {reason}"))?;
    }
    Ok(reader.into_records().map(move |record| {
        let record = match record {
            Ok(record) => record,
            // Of this row alone; what can't be read at all ends the import.
            Err(error) if !error.is_io_error() => {
                let line = error.position().map_or(0, csv::Position::line);
                return Ok((line, Err("it is not UTF-8".to_owned())));
            }
            Err(error) => return Err(anyhow::Error::new(error).context("read the rows")),
        };
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != header.len() {
            return Ok((
                line,
                Err(format!("it has {} cells, the header has {}", record.len(), header.len())),
            ));
        }
        let fields = header
            .iter()
            .zip(&record)
            .filter(|(_, cell)| !cell.is_empty())
            .map(|(name, cell)| (name.to_owned(), Value::from(cell)))
            .collect();
        Ok((line, Ok(fields)))
    }))
}

fn json_rows(source: Box<dyn Read>) -> impl Iterator<Item = anyhow::Result<Raw>> {
    let (mut reader, mut line) = (BufReader::new(source), 0);
    std::iter::from_fn(move || {
        loop {
            let mut text = Zeroizing::new(Vec::new());
            let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut text);
            line += 1;
            match read.context("read the rows") {
                Err(error) => return Some(Err(error)),
                Ok(0) => return None,
                Ok(_) if text.trim_ascii().is_empty() => {}
                Ok(read) if read > MAX_LINE_BYTES => {
                    return Some(Err(anyhow::anyhow!("line {line} is longer than 1 MiB")));
                }
                Ok(_) => {
                    // Its own message may repeat what it could not read.
                    let fields = serde_json::from_slice::<Map<String, Value>>(&text)
                        .map_err(|_| "it is no JSON object".to_owned());
                    return Some(Ok((line, fields)));
                }
            }
        }
    })
}

fn check_column(name: &str) -> Result<(), String> {
    if COLUMNS.contains(&name) || IGNORED.contains(&name) {
        return Ok(());
    }
    let hint =
        nearest(name, COLUMNS.into_iter()).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
    Err(format!("unknown column {name:?}{hint}"))
}

impl RowReader {
    fn draft(&self, fields: &Map<String, Value>) -> Result<Draft, String> {
        for name in fields.keys() {
            check_column(name)?;
        }
        let fields = Fields(fields);
        let Secret { plaintext, prefix, hash } = self.secret(fields)?;
        let settings = self.settings(fields)?;
        let key = NewKey {
            user: self.owner(fields)?,
            name: fields.parsed("name", plain)?.ok_or("it has no name")?,
            prefix,
            hash,
            is_active: fields.flag("is_active")?.unwrap_or(true),
            settings,
        };
        Ok(Draft { key, plaintext })
    }

    fn secret(&self, fields: Fields<'_>) -> Result<Secret, String> {
        let named = fields.text("key_prefix")?.map(|text| text.to_string());
        let length = self.prefix_length.get();
        match (fields.text("key")?, fields.text("key_hash")?) {
            (Some(_), Some(_)) => Err("it has both key and key_hash; one is enough".to_owned()),
            (None, None) => Err("it has neither key nor key_hash".to_owned()),
            (Some(key), None) => {
                let presented = PresentedKey::parse(key.as_bytes()).map_err(|error| error.to_string())?;
                let prefix = presented.prefix(self.prefix_length).map_err(|error| error.to_string())?;
                if named.as_deref().is_some_and(|named| named != prefix) {
                    return Err(format!(
                        "key does not begin with key_prefix (its first {length} characters)"
                    ));
                }
                let prefix = KeyPrefix::new(prefix).ok_or("it has no prefix")?;
                Ok(Secret { plaintext: Some(key), prefix, hash: Zeroizing::default() })
            }
            (None, Some(hash)) => {
                let prefix = named.ok_or("a row with key_hash needs key_prefix, to be found by")?;
                if prefix.len() != length {
                    return Err(format!(
                        "key_prefix has {} characters; --key-prefix-length is {length}",
                        prefix.len()
                    ));
                }
                let hash = stored_hash(&hash)?;
                let prefix = KeyPrefix::new(&prefix).ok_or("key_prefix is empty")?;
                Ok(Secret { plaintext: None, prefix, hash })
            }
        }
    }

    fn owner(&self, fields: Fields<'_>) -> Result<UserRef, String> {
        if let Some(user) = fields.parsed("user", user_ref)? {
            return Ok(user);
        }
        // An export has both; the name is what another database has in common.
        if let Some(name) = fields.parsed("username", plain)? {
            return Ok(UserRef::Username(name));
        }
        if let Some(id) = fields.number("user_id")? {
            return Ok(UserRef::Id(UserId::new(id)));
        }
        self.user.clone().ok_or_else(|| "it names no user, and there is no --user".to_owned())
    }

    fn settings(&self, fields: Fields<'_>) -> Result<KeySettings, String> {
        let limit = |name| {
            let limit = fields.number(name)?.map(u32::try_from).transpose();
            limit.map_err(|_| format!("{name}: expected a number from 0 to 2147483647"))
        };
        let expires_at = match fields.parsed("expires_in", super::super::arguments::lifetime)? {
            Some(lifetime) => Some(self.now.saturating_add(lifetime)),
            None => fields.parsed("expires_at", moment)?,
        };
        let budget_type = fields.parsed("budget_type", plain)?;
        if budget_type.as_deref().is_some_and(|kind| !matches!(kind, "total" | "monthly")) {
            return Err("budget_type: expected total or monthly".to_owned());
        }
        let settings = KeySettings {
            description: fields.parsed("description", plain)?,
            scopes: fields.list("scopes", plain)?,
            permissions: fields.list("permissions", plain)?,
            allowed_models: fields.list("allowed_models", plain)?,
            allowed_endpoints: fields.list("allowed_endpoints", endpoint)?,
            allowed_ips: fields.list("allowed_ips", network)?,
            allowed_chatbots: fields.list("allowed_chatbots", plain)?,
            allowed_agents: fields.list("allowed_agents", plain)?,
            tags: fields.list("tags", plain)?,
            rate_limit_per_minute: limit("rate_limit_per_minute")?,
            rate_limit_per_hour: limit("rate_limit_per_hour")?,
            rate_limit_per_day: limit("rate_limit_per_day")?,
            is_unlimited: fields.flag("is_unlimited")?.unwrap_or(false),
            budget_limit_cents: fields.number("budget_limit_cents")?,
            budget_type,
            expires_at,
        };
        check_lists(&settings).map_err(|error| error.to_string())?;
        Ok(settings)
    }
}

/// bcrypt as it is; SHA-256 in the form that Keyward stores, from those that other products keep: `sha256:` and hex
/// (agentgateway), hex (`LiteLLM`), base64 (Unkey).
fn stored_hash(text: &str) -> Result<Zeroizing<String>, String> {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    let stored = if hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        format!("sha256:{}", hex.to_ascii_lowercase())
    } else if let Some(digest) = base64_digest(text) {
        digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    } else {
        text.to_owned()
    };
    match KeyHash::parse(&stored) {
        Ok(_) => Ok(Zeroizing::new(stored)),
        Err(error) => Err(format!("key_hash: {error}")),
    }
}

/// 32 bytes in base64, with or without padding, in either alphabet.
fn base64_digest(text: &str) -> Option<[u8; 32]> {
    let plain = text.trim_end_matches('=').replace('-', "+").replace('_', "/");
    base64::Engine::decode(&base64::engine::general_purpose::STANDARD_NO_PAD, plain).ok()?.try_into().ok()
}

/// The fields of one row. JSON null is as good as a column that is not there.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn text(self, name: &str) -> Result<Option<Zeroizing<String>>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => Ok(Some(Zeroizing::new(text.clone()))),
            Some(Value::Number(number)) => Ok(Some(Zeroizing::new(number.to_string()))),
            Some(_) => Err(format!("{name}: expected a text")),
        }
    }

    fn parsed<T>(self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
        let text = self.text(name)?;
        text.map(|text| parse(&text)).transpose().map_err(|reason| format!("{name}: {reason}"))
    }

    fn number(self, name: &str) -> Result<Option<i64>, String> {
        self.parsed(name, |text| {
            let number = text.parse().ok().filter(|number| (0..=i64::from(i32::MAX)).contains(number));
            number.ok_or_else(|| "expected a number from 0 to 2147483647".to_owned())
        })
    }

    fn flag(self, name: &str) -> Result<Option<bool>, String> {
        if let Some(Value::Bool(flag)) = self.get(name) {
            return Ok(Some(*flag));
        }
        self.parsed(name, |text| match text.to_ascii_lowercase().as_str() {
            "true" | "t" | "1" | "yes" => Ok(true),
            "false" | "f" | "0" | "no" => Ok(false),
            _ => Err("expected true or false".to_owned()),
        })
    }

    /// A JSON list, as such or as text, or a text with commas.
    fn list(self, name: &str, parse: impl Fn(&str) -> Result<String, String>) -> Result<Vec<String>, String> {
        let wrong = || format!("{name}: expected a list of texts");
        let entries: Vec<String> = match self.get(name) {
            None => return Ok(Vec::new()),
            Some(Value::String(text)) if text.trim_start().starts_with('[') => {
                serde_json::from_str(text).map_err(|_| wrong())?
            }
            Some(Value::String(text)) if text.trim().is_empty() => Vec::new(),
            Some(Value::String(text)) => text.split(',').map(str::to_owned).collect(),
            Some(value) => serde_json::from_value(value.clone()).map_err(|_| wrong())?,
        };
        entries.iter().map(|entry| parse(entry).map_err(|reason| format!("{name}: {reason}"))).collect()
    }
}
