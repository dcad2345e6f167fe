//! Whether this process should get traffic.

use std::sync::{Arc, Mutex, PoisonError};

use humantime::format_duration;

use crate::authorizer::freshness::{Freshness, Mode};
use crate::authorizer::outage::Outage;
use crate::domain::time::Instant;

/// The state behind `/readyz`.
pub struct Readiness {
    state: Mutex<State>,
    freshness: Arc<Freshness>,
    outage: Arc<Outage>,
}

#[derive(Debug, Clone)]
enum State {
    /// The store has not answered yet, or not said how changes arrive.
    Starting(String),
    /// It has.
    Started,
    /// On the way out, for good.
    Draining,
}

impl Readiness {
    /// Not ready yet.
    pub fn new(freshness: Arc<Freshness>, outage: Arc<Outage>) -> Self {
        let state = Mutex::new(State::Starting("the store has not answered yet".to_owned()));
        Self { state, freshness, outage }
    }

    /// How changes arrive, or why there should be no traffic.
    pub fn check(&self, now: Instant) -> Result<String, String> {
        match &*self.lock() {
            State::Started => self.check_store(now),
            State::Starting(reason) => Err(reason.clone()),
            State::Draining => Err("shutting down".to_owned()),
        }
    }

    /// Once lease and grace have run out, every answer would be a 503.
    fn check_store(&self, now: Instant) -> Result<String, String> {
        let proven = self.freshness.lease_age(now);
        let answered = self.outage.last_answer().map(|at| now.saturating_since(at));
        let silent = proven.into_iter().chain(answered).min().unwrap_or_default();
        if silent > self.freshness.outage_limit() {
            let seconds = std::time::Duration::from_secs(silent.as_secs());
            return Err(format!("the store has not answered for {}", format_duration(seconds)));
        }
        let window = format_duration(self.freshness.window());
        Ok(match self.freshness.mode() {
            Mode::Feed if proven.is_some_and(|age| age <= self.freshness.window()) => {
                format!("change feed, lease {window}")
            }
            Mode::Feed => format!("change feed interrupted, records are read again after {window}"),
            Mode::Starting => "starting".to_owned(),
            Mode::Ttl(reason) => format!("ttl mode, changes take effect within {window}: {reason}"),
        })
    }

    /// Says what start-up waits for.
    pub fn set_waiting(&self, reason: String) {
        let mut state = self.lock();
        if matches!(*state, State::Starting(_)) {
            *state = State::Starting(reason);
        }
    }

    /// The store has answered, and it is known how changes arrive.
    pub fn set_started(&self) {
        let mut state = self.lock();
        if !matches!(*state, State::Draining) {
            *state = State::Started;
        }
    }

    /// From now on there should be no new traffic.
    pub fn set_draining(&self) {
        *self.lock() = State::Draining;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::authorizer::freshness::FreshnessSettings;
    use crate::domain::freshness::coverage::Coverage;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn readiness() -> Readiness {
        let freshness = Freshness::new(FreshnessSettings {
            lease: Duration::from_secs(2),
            outage_grace: Duration::from_secs(30),
            without_feed: Duration::from_secs(5),
            record_ttl: Duration::from_mins(5),
        });
        Readiness::new(Arc::new(freshness), Arc::default())
    }

    #[test]
    fn draining_is_for_good() {
        let readiness = readiness();
        assert!(readiness.check(at(0)).is_err());
        readiness.set_waiting("no tables".to_owned());
        assert_eq!(readiness.check(at(0)), Err("no tables".to_owned()));
        readiness.set_started();
        readiness.set_waiting("no tables".to_owned());
        assert!(readiness.check(at(0)).is_ok());
        readiness.set_draining();
        readiness.set_started();
        assert!(readiness.check(at(0)).is_err());
    }

    #[test]
    fn it_says_how_changes_arrive_and_when_nothing_could_be_answered_any_more() {
        let readiness = readiness();
        readiness.set_started();
        let said = |second| readiness.check(at(second)).unwrap_or_else(|reason| format!("not: {reason}"));
        readiness.freshness.degrade("no triggers".to_owned());
        readiness.outage.answered(at(100));
        assert_eq!(said(101), "ttl mode, changes take effect within 5s: no triggers");
        let coverage = Coverage::new(1);
        coverage.advance(at(100));
        readiness.freshness.publish(coverage, None);
        assert_eq!(said(102), "change feed, lease 2s");
        assert_eq!(said(103), "change feed interrupted, records are read again after 2s");
        assert_eq!(said(133), "not: the store has not answered for 33s");
        readiness.outage.answered(at(133));
        assert_eq!(said(133), "change feed interrupted, records are read again after 2s");
    }
}
