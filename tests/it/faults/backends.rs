//! Faults of Postgres.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{interval, sleep};

use super::catalogue::Fault;
use super::site::Site;
use crate::support::eventually;
use crate::truth::fleet::{DATABASE, REPLICAS};
use crate::truth::proxy::Mode;

/// The sessions of Keyward's that hear of changes.
const FEEDS: &str = "application_name = 'keyward-feed'";

impl Site {
    pub(super) async fn harm_postgres(&mut self, fault: Fault) {
        match fault {
            Fault::PostgresKilled => self.fleet.postgres.kill(),
            Fault::PostgresRestarted => {
                self.fleet.postgres.kill();
                self.fleet.postgres.start_again().await;
                self.admin_again().await;
            }
            Fault::PostgresFrozen => self.fleet.postgres.freeze(),
            Fault::ListenerFrozen => {
                let found = eventually(async || {
                    let found = self.feeds().await;
                    (found.len() >= REPLICAS).then_some(found)
                });
                self.held.listeners = found.await.expect("every replica has a session for its feed");
                self.signal_listeners(Signal::STOP);
            }
            Fault::ListenerKilled => {
                let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {FEEDS}");
                self.repeat(end, Duration::from_millis(500)).await;
            }
            Fault::PostgresSilent => self.switch_all(Mode::Blackhole),
            Fault::PostgresSlow => self.switch_all(Mode::Delay(Duration::from_millis(500))),
            Fault::OneCutOff => self.fleet.replicas[0].proxy.switch(Mode::Refuse),
            Fault::TableLocked => {
                let session = self.fleet.session().await;
                session.batch_execute("BEGIN; LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE").await.unwrap();
                self.held.sessions.push(session);
            }
            Fault::SlotsExhausted => self.take_all_slots().await,
            Fault::PostgresReadOnly => {
                let session = self.fleet.session().await;
                let turn = format!("ALTER DATABASE {DATABASE} SET default_transaction_read_only = on");
                session.batch_execute(&turn).await.unwrap();
                end_sidecars_sessions(&session).await;
            }
            Fault::MassUpdate => {
                let update = "UPDATE api_keys SET description = clock_timestamp()::text".to_owned();
                self.repeat(update, Duration::from_millis(500)).await;
            }
            other => panic!("{other:?} is no fault of Postgres"),
        }
    }

    pub(super) async fn heal_postgres(&mut self, fault: Fault) {
        match fault {
            Fault::PostgresKilled => {
                self.fleet.postgres.start_again().await;
                self.admin_again().await;
            }
            Fault::PostgresFrozen => self.fleet.postgres.resume(),
            Fault::ListenerFrozen => self.signal_listeners(Signal::CONT),
            Fault::PostgresReadOnly => {
                let session = self.fleet.session().await;
                // Two, because the first one does not hold within its own transaction.
                let back = format!("ALTER DATABASE {DATABASE} RESET default_transaction_read_only");
                for statement in ["SET default_transaction_read_only = off", &back] {
                    session.batch_execute(statement).await.unwrap();
                }
                end_sidecars_sessions(&session).await;
            }
            _ => {}
        }
        self.switch_all(Mode::Pass);
    }

    fn switch_all(&self, mode: Mode) {
        for replica in &self.fleet.replicas {
            replica.proxy.switch(mode);
        }
    }

    async fn feeds(&self) -> Vec<Pid> {
        let sql = format!("SELECT pid FROM pg_stat_activity WHERE {FEEDS}");
        let rows = self.fleet.session().await.query(&sql, &[]).await.unwrap();
        rows.iter().filter_map(|row| Pid::from_raw(row.get::<_, i32>(0))).collect()
    }

    fn signal_listeners(&self, signal: Signal) {
        for pid in &self.held.listeners {
            // It may have ended meanwhile.
            let _ = kill_process(*pid, signal);
        }
    }

    async fn repeat(&mut self, sql: String, period: Duration) {
        let session = self.fleet.session().await;
        // Once here, so that a statement that fails is heard of.
        session.batch_execute(&sql).await.unwrap();
        self.held.tasks.spawn(async move {
            let mut tick = interval(period);
            loop {
                tick.tick().await;
                let _ = session.batch_execute(&sql).await;
            }
        });
    }

    async fn take_all_slots(&mut self) {
        loop {
            let url = self.fleet.postgres.url(DATABASE);
            match tokio_postgres::connect(&url, tokio_postgres::NoTls).await {
                Ok((session, connection)) => {
                    tokio::spawn(connection);
                    self.held.sessions.push(session);
                }
                Err(_) if self.held.sessions.len() > 10 => return,
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

async fn end_sidecars_sessions(session: &tokio_postgres::Client) {
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'keyward%'";
    session.batch_execute(end).await.unwrap();
}
