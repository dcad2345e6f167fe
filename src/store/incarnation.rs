//! Incarnation: one life of one Postgres server, as a text that each session carries.
//!
//! Numbers of transactions can be compared only within it. A restored backup counts on from an earlier number, and after
//! a crash numbers that were lost are given out again; so the text changes with the server's identity and timeline, with
//! each start, and with each recovery from a crash (which resets the statistics).

use tokio_postgres::{Client, Error, SimpleQueryMessage};

/// The start time is what it takes; the others are added where the role may ask for them.
const START: &str = "'p' || extract(epoch FROM pg_postmaster_start_time())::text";
const SYSTEM: &str = "',s' || (SELECT system_identifier FROM pg_control_system())::text";
const TIMELINE: &str = "',t' || left(pg_walfile_name(pg_current_wal_lsn()), 8)";
const RECOVERY: &str = "',r' || (SELECT extract(epoch FROM stats_reset)::text FROM pg_stat_bgwriter)";

/// A server's identity, as far as it tells it.
#[derive(Debug)]
pub(super) struct Identity {
    /// `None` where the server does not even tell when it started.
    pub(super) incarnation: Option<Box<str>>,
    /// The same without what a restart changes.
    pub(super) database: Box<str>,
}

/// Notes it in the session, for the look-ups to read.
pub(super) async fn note(client: &Client) -> Result<(), Error> {
    let incarnation = read(client).await?.incarnation.unwrap_or_default();
    // Digits and letters of our own expressions, and still quoted.
    let literal = incarnation.replace('\'', "''");
    client.simple_query(&format!("SELECT set_config('keyward.incarnation', '{literal}', false)")).await?;
    Ok(())
}

/// Asks for it, in one round trip.
pub(super) async fn read(client: &Client) -> Result<Identity, Error> {
    let (start, system, timeline, recovery) = tokio::try_join!(
        ask(client, START),
        ask(client, SYSTEM),
        ask(client, TIMELINE),
        ask(client, RECOVERY),
    )?;
    let database = format!("{}{}", system.unwrap_or_default(), timeline.unwrap_or_default());
    let incarnation = start.map(|start| format!("{start}{database}{}", recovery.unwrap_or_default()).into());
    Ok(Identity { incarnation, database: database.into() })
}

/// `None` where the server refuses: the function is unknown to it, or not for this role.
async fn ask(client: &Client, expression: &str) -> Result<Option<String>, Error> {
    match client.simple_query(&format!("SELECT {expression}")).await {
        Ok(messages) => Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })),
        Err(error) if error.as_db_error().is_some() => Ok(None),
        Err(error) => Err(error),
    }
}
