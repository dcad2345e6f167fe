//! The change feed on Postgres: LISTEN on a session of its own.
//!
//! Notifications arrive in the order of the commits that sent them. So a notification that the session sends to itself
//! and gets back is behind every change committed before it; it goes over a channel that nobody else knows. Poolers that
//! share server sessions would break all of this in silence; they are told by a second session that meets the same
//! server process.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{AsyncMessage, Client, Connection, Socket, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::StoreError;
use super::feed::{Begun, Ends, Feed, Message, NoFeed};
use super::incarnation;
use super::postgres::PostgresStore;
use crate::domain::freshness::change::Change;
use crate::domain::freshness::session::BeatAnswer;
use crate::domain::freshness::shared::Stamp;
use crate::domain::freshness::snapshot::Snapshot;

/// The channel that the triggers write to.
const CHANGES: &str = "keyward_changes";

/// How often a second session is asked whether it meets the first one's process. A pooler that shares hands out the
/// session that was used last.
const POOLER_PROBES: usize = 3;

/// How many beats fit into a lease: one may be lost and the next one late.
const BEATS_PER_LEASE: u32 = 4;

/// The triggers that must be there: table, what they fire on (bits of `tgtype`), in words.
const NEEDED: [(&str, i32, &str); 6] = [
    ("api_keys", ROW | INSERT | DELETE | UPDATE, "changes of rows"),
    ("api_keys", TRUNCATE, "TRUNCATE"),
    ("users", ROW | DELETE | UPDATE, "changes of rows"),
    ("users", TRUNCATE, "TRUNCATE"),
    (OLD_SECRETS, ROW | INSERT | DELETE | UPDATE, "changes of rows"),
    (OLD_SECRETS, TRUNCATE, "TRUNCATE"),
];
/// Where it does not exist there are no old secrets, and nothing to announce.
const OLD_SECRETS: &str = "keyward_old_secrets";
const ROW: i32 = 1;
const INSERT: i32 = 4;
const DELETE: i32 = 8;
const UPDATE: i32 = 16;
const TRUNCATE: i32 = 32;

/// The triggers of this version, as they are now. `xmin` tells of every change to a trigger or its function, also of one
/// that was undone.
const TRIGGERS: &str = "\
    SELECT c.relname::text AS table, t.tgtype::int4 AS kind, t.tgenabled::text AS enabled, \
           concat_ws(':', c.oid, t.oid, t.xmin, t.tgenabled, t.tgtype, p.oid, p.xmin) AS state \
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_trigger t ON t.tgrelid = c.oid \
    JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid AND p.proname = 'keyward_notify_v1' \
    WHERE c.oid IN (to_regclass('api_keys'), to_regclass('users'), to_regclass('keyward_old_secrets'))";

impl PostgresStore {
    /// Begins to listen, and only then looks what there is.
    pub(super) async fn open_feed(&self, lease: Duration) -> Result<Feed, NoFeed> {
        let opening = self.open_feed_in_time(lease);
        // Connecting has its own limits; this one is for a server that accepts and then says nothing.
        tokio::time::timeout(self.connect_limit().saturating_add(lease), opening)
            .await
            .unwrap_or(Err(NoFeed::Store(StoreError::Timeout)))
    }

    async fn open_feed_in_time(&self, lease: Duration) -> Result<Feed, NoFeed> {
        let (ends, receiver, beat_sender) = Feed::channels();
        let own_channel = own_channel()?;
        let mut tasks = JoinSet::new();
        let messages = ends.messages.clone();
        let connector = self.feed_connector();
        let (client, driver) = connector
            .connect_with(&|connection| {
                tokio::spawn(drive(connection, messages.clone(), own_channel.clone()))
            })
            .await
            .map_err(StoreError::from)?;
        tasks.spawn(async move {
            // Aborted with the set, and the connection with it.
            let _abort = AbortOnDrop(driver);
            std::future::pending::<()>().await;
        });
        let statement_timeout = lease.as_millis().clamp(1, 86_400_000);
        client
            .batch_execute(&format!(
                "SET statement_timeout = {statement_timeout}; SET TIME ZONE 'UTC'; \
                 LISTEN {CHANGES}; LISTEN {own_channel}"
            ))
            .await
            .map_err(StoreError::from)?;
        let beat = Beat::prepare(client, own_channel).await?;
        let begun = beat.begin(lease).await?;
        self.refuse_pooler(&beat, begun.found.backend).await?;
        tasks.spawn(beat.serve(ends));
        Ok(Feed::new(begun, receiver, beat_sender, tasks))
    }

    /// A session of the pool must not meet the feed's process.
    async fn refuse_pooler(&self, beat: &Beat, backend: i64) -> Result<(), NoFeed> {
        for _ in 0..POOLER_PROBES {
            let again = backend_of(&beat.client).await?;
            let other = self
                .within(async {
                    let lease = self.lease().await?;
                    let result = backend_of(lease.client()?).await;
                    lease.settle(result)
                })
                .await?;
            if again != backend || other == backend {
                return Err(NoFeed::NotAnnounced(
                    "the store's URL leads through a pooler that shares sessions, which drops LISTEN; \
                     give serve a direct address of Postgres"
                        .to_owned(),
                ));
            }
        }
        Ok(())
    }
}

/// The session, ready to send beats.
struct Beat {
    client: Client,
    statement: Statement,
    channel: String,
}

impl Beat {
    async fn prepare(client: Client, channel: String) -> Result<Self, StoreError> {
        // The notification is sent when this statement commits, so its echo is behind what the statement has seen.
        let sql = format!(
            "SELECT pg_backend_pid()::int8, txid_current_snapshot()::text, \
             (SELECT coalesce(string_agg(state, ',' ORDER BY state), '') FROM ({TRIGGERS}) AS triggers), \
             pg_notify($1, $2)::text"
        );
        let statement = client.prepare(&sql).await?;
        Ok(Self { client, statement, channel })
    }

    async fn send(&self, number: u64) -> Result<BeatAnswer, StoreError> {
        let row = self.client.query_one(&self.statement, &[&self.channel, &number.to_string()]).await?;
        let snapshot: &str = row.try_get(1)?;
        Ok(BeatAnswer {
            backend: row.try_get(0)?,
            snapshot: Snapshot::parse(snapshot),
            triggers: row.try_get::<_, &str>(2)?.into(),
        })
    }

    /// Asks for what the session begins with, now that it listens.
    async fn begin(&self, lease: Duration) -> Result<Begun, NoFeed> {
        let sql = "SELECT pg_is_in_recovery(), to_regclass('keyward_old_secrets') IS NOT NULL";
        let first = self.client.query_one(sql, &[]).await.map_err(StoreError::from)?;
        if first.try_get(0).map_err(StoreError::from)? {
            return Err(NoFeed::Store(StoreError::NotPrimary));
        }
        let rows = self.client.query(TRIGGERS, &[]).await.map_err(StoreError::from)?;
        let mut triggers = Vec::new();
        for row in &rows {
            let read = || Ok::<_, tokio_postgres::Error>((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
            triggers.push(read().map_err(StoreError::from)?);
        }
        check_triggers(&triggers, first.try_get(1).map_err(StoreError::from)?)?;
        // The number is that of no beat.
        let found = self.send(0).await?;
        let identity = incarnation::read(&self.client).await.map_err(StoreError::from)?;
        let stamp = match (&identity.incarnation, &found.snapshot) {
            (Some(incarnation), Some(snapshot)) => {
                Some(Stamp { incarnation: incarnation.clone(), snapshot: snapshot.clone() })
            }
            _ => {
                return Err(NoFeed::NotAnnounced(
                    "the server does not tell its start time or its transactions to this role".to_owned(),
                ));
            }
        };
        let beat_every = lease.checked_div(BEATS_PER_LEASE).unwrap_or(lease);
        Ok(Begun { found, stamp, database: identity.database, beat_every })
    }

    async fn serve(self, mut ends: Ends) {
        while let Some(number) = ends.beats.recv().await {
            let message = match self.send(number).await {
                Ok(answer) => Message::Answered(number, answer),
                Err(error) => Message::Lost(error),
            };
            if ends.messages.send(message).await.is_err() {
                return;
            }
        }
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A name that nobody can guess, so that nobody sends an echo in our stead.
fn own_channel() -> Result<String, StoreError> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|error| StoreError::unavailable(error.to_string()))?;
    Ok(random.iter().fold("keyward_beat_".to_owned(), |name, byte| format!("{name}{byte:02x}")))
}

async fn backend_of(client: &Client) -> Result<i64, StoreError> {
    Ok(client.query_one("SELECT pg_backend_pid()::int8", &[]).await?.try_get(0)?)
}

/// Hands notifications on in their order until the connection ends.
async fn drive(
    mut connection: Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>,
    messages: mpsc::Sender<Message>,
    own_channel: String,
) {
    loop {
        let message = match std::future::poll_fn(|context| connection.poll_message(context)).await {
            Some(Ok(AsyncMessage::Notification(notification))) if notification.channel() == CHANGES => {
                Message::Changed(Change::parse(notification.payload()))
            }
            Some(Ok(AsyncMessage::Notification(notification))) if notification.channel() == own_channel => {
                match notification.payload().parse() {
                    Ok(number) => Message::Echo(number),
                    Err(_) => continue,
                }
            }
            Some(Ok(_)) => continue,
            Some(Err(error)) => Message::Lost(error.into()),
            None => Message::Lost(StoreError::unavailable("the connection was closed")),
        };
        let is_last = matches!(message, Message::Lost(_));
        if messages.send(message).await.is_err() || is_last {
            return;
        }
    }
}

/// Each needed trigger is there and fires whoever writes, replication included.
fn check_triggers(triggers: &[(String, i32, String)], has_old_secrets: bool) -> Result<(), NoFeed> {
    for (table, bits, what) in NEEDED {
        if table == OLD_SECRETS && !has_old_secrets {
            continue;
        }
        let mut fitting = triggers.iter().filter(|(on, kind, _)| on == table && kind & bits == bits);
        let Some((.., enabled)) = fitting.next() else {
            return Err(NoFeed::NotAnnounced(format!(
                "{what} in {table} are not announced: the trigger is missing; run `keyward migrate` as the owner of \
                 the tables"
            )));
        };
        if enabled != "A" {
            return Err(NoFeed::NotAnnounced(format!(
                "{what} in {table} are not announced: the trigger is disabled, or not for all writers; \
                 run `keyward migrate` as the owner of the tables"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_needed_trigger_has_to_be_there_and_to_fire_always() {
        let all: Vec<(String, i32, String)> = [
            ("api_keys", 29),
            ("api_keys", 32),
            ("users", 29),
            ("users", 32),
            (OLD_SECRETS, 29),
            (OLD_SECRETS, 32),
        ]
        .map(|(table, kind)| (table.to_owned(), kind, "A".to_owned()))
        .into();
        assert!(check_triggers(&all, true).is_ok());
        assert!(check_triggers(&all[..4], false).is_ok());
        for missing in 0..all.len() {
            let mut triggers = all.clone();
            triggers.remove(missing);
            assert!(check_triggers(&triggers, true).is_err(), "{missing}");
            for state in ["O", "D", "R"] {
                let mut triggers = all.clone();
                triggers[missing].2 = state.to_owned();
                assert!(check_triggers(&triggers, true).is_err(), "{missing} {state}");
            }
        }
    }
}
