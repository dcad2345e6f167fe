//! The change feed on SQLite: looking whether the file has changed.
//!
//! `PRAGMA data_version` differs once any other connection has committed, of this process or another. Our own notes of
//! last uses count too; so triggers count the changes that can change a decision, and where they are not exactly what
//! these tables need, every write matters. Beat and echo are one look: whatever was committed before it is seen by it.

use std::collections::BTreeMap;
use std::time::Duration;

use rusqlite::{Connection, Transaction};
use tokio::task::JoinSet;

use super::catalogue::Catalogue;
use super::error::StoreError;
use super::feed::{Begun, Ends, Feed, Message, NoFeed};
use super::sqlite::{Session, SqliteStore};
use crate::domain::freshness::change::Change;
use crate::domain::freshness::session::BeatAnswer;

/// Pause between looks: a change takes effect within two of them.
const LOOK_EVERY: Duration = Duration::from_millis(40);

/// The columns whose change can change a decision. The others change with the traffic.
const DECIDING: [(&str, &[&str]); 3] = [
    (
        "api_keys",
        &[
            "id",
            "name",
            "key_hash",
            "key_prefix",
            "user_id",
            "is_active",
            "permissions",
            "scopes",
            "rate_limit_per_minute",
            "rate_limit_per_hour",
            "rate_limit_per_day",
            "allowed_models",
            "allowed_endpoints",
            "allowed_ips",
            "allowed_chatbots",
            "allowed_agents",
            "is_unlimited",
            "budget_limit_cents",
            "budget_type",
            "expires_at",
        ],
    ),
    (
        "users",
        &[
            "id",
            "username",
            "email",
            "is_active",
            "is_superuser",
            "role",
            "role_id",
            "account_locked",
            "account_locked_until",
        ],
    ),
    ("keyward_old_secrets", &["key_id", "key_hash", "key_prefix", "current_hash", "expires_at"]),
];

/// What one look has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Look {
    /// Device and inode: a file put in the place of another is another database.
    file: (u64, u64),
    data_version: i64,
    /// `None` where changes are not counted.
    changes: Option<i64>,
}

impl SqliteStore {
    /// There is always a feed: the file can always be looked at.
    pub(super) async fn open_feed(&self, lease: Duration) -> Result<Feed, NoFeed> {
        let (ends, receiver, beat_sender) = Feed::channels();
        let look = self.read(|session| look(session, None)).await?;
        let begun = Begun {
            found: answer(&look),
            stamp: None,
            database: format!("{:?}", look.file).into(),
            beat_every: lease.checked_div(4).unwrap_or(lease).min(LOOK_EVERY),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(self.clone(), look, ends));
        Ok(Feed::new(begun, receiver, beat_sender, tasks))
    }
}

async fn serve(store: SqliteStore, mut last: Look, mut ends: Ends) {
    while let Some(number) = ends.beats.recv().await {
        let before = last.clone();
        let messages = match store.read(move |session| look(session, Some(&before))).await {
            Ok(look) => {
                let is_changed = look.data_version != last.data_version
                    && (look.changes.is_none() || look.changes != last.changes);
                last = look;
                let changed = is_changed.then_some(Message::Changed(Change::Anything));
                let found = [Message::Echo(number), Message::Answered(number, answer(&last))];
                changed.into_iter().chain(found).collect()
            }
            Err(error) => vec![Message::Lost(error)],
        };
        for message in messages {
            if ends.messages.send(message).await.is_err() {
                return;
            }
        }
    }
}

/// The file stands for the triggers: what they do is looked at with each change.
fn answer(look: &Look) -> BeatAnswer {
    BeatAnswer { triggers: format!("{:?}", look.file).into(), backend: 0, snapshot: None }
}

fn look(session: &mut Session, last: Option<&Look>) -> Result<Look, StoreError> {
    let file = session.file()?;
    session.read(|transaction, plan| {
        let data_version = transaction.query_row("PRAGMA data_version", (), |row| row.get(0))?;
        if let Some(last) = last.filter(|last| (last.file, last.data_version) == (file, data_version)) {
            return Ok(last.clone());
        }
        Ok(Look { file, data_version, changes: counted_changes(transaction, &plan.catalogue)? })
    })
}

/// How many changes the triggers have counted, where they are what these tables need.
fn counted_changes(transaction: &Transaction<'_>, catalogue: &Catalogue) -> Result<Option<i64>, StoreError> {
    if found_triggers(transaction)? != wanted_triggers(catalogue) {
        return Ok(None);
    }
    Ok(transaction.query_row("SELECT max(changes) FROM keyward_feed", (), |row| row.get(0))?)
}

/// Creates the triggers, anew where these tables need others by now.
pub(super) fn migrate(transaction: &Transaction<'_>, catalogue: &Catalogue) -> Result<(), StoreError> {
    let (found, wanted) = (found_triggers(transaction)?, wanted_triggers(catalogue));
    if found == wanted {
        return Ok(());
    }
    for name in found.keys() {
        transaction.execute_batch(&format!("DROP TRIGGER {name}"))?;
    }
    for sql in wanted.values() {
        transaction.execute_batch(sql)?;
    }
    Ok(())
}

/// The script for a database that `migrate` has made itself, for those who want to read it.
pub(super) fn migration_sql() -> String {
    let mut catalogue = Catalogue::default();
    for (table, columns) in DECIDING {
        for column in columns.iter().filter(|column| **column != "role_id") {
            catalogue.insert(table, (*column).to_owned(), String::new());
        }
    }
    wanted_triggers(&catalogue).into_values().map(|sql| format!("{sql};\n")).collect()
}

fn found_triggers(connection: &Connection) -> Result<BTreeMap<String, String>, StoreError> {
    let sql = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND name GLOB 'keyward_feed_*'";
    let mut statement = connection.prepare_cached(sql)?;
    let rows = statement.query_map((), |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Name and text. A list of columns and not a comparison: a change of nothing to nothing is counted, and harmless.
fn wanted_triggers(catalogue: &Catalogue) -> BTreeMap<String, String> {
    let mut triggers = BTreeMap::new();
    for (table, columns) in DECIDING {
        let present: Vec<&str> =
            columns.iter().copied().filter(|column| catalogue.has(table, column)).collect();
        if present.is_empty() {
            continue;
        }
        let update = format!("UPDATE OF {}", present.join(", "));
        for (word, event) in [("inserted", "INSERT"), ("deleted", "DELETE"), ("updated", &update)] {
            let name = format!("keyward_feed_{table}_{word}");
            let sql = format!(
                "CREATE TRIGGER {name} AFTER {event} ON {table} \
                 BEGIN UPDATE keyward_feed SET changes = changes + 1; END"
            );
            triggers.insert(name, sql);
        }
    }
    triggers
}
