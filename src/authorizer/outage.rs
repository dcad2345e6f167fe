//! Outage: whether the store is known to be silent, so that nobody waits for it in vain.
//!
//! After a few failures in a row only one question in a while is asked, and its answer ends the outage. Meanwhile what
//! is in memory is used as far as the grace reaches, and the rest is told to come back, both at once.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::domain::time::Instant;

/// Failures in a row that make an outage, if nothing at all was answered for a while: neither one slow query nor several
/// at once on a busy machine are one. Heartbeats are answers too, and come more often than that.
const FAILURES: u32 = 3;
const SILENCE: Duration = Duration::from_secs(1);

/// How often the store is tried during one.
const PROBE_EVERY: Duration = Duration::from_millis(250);

/// The store's health, as those see it who ask it.
#[derive(Debug, Default)]
pub struct Outage {
    failures: AtomicU32,
    /// Nanoseconds since boot.
    next_probe: AtomicU64,
    last_answer: AtomicU64,
}

impl Outage {
    /// Whether the store is silent and it is not time to try again.
    pub fn is_silent(&self, now: Instant) -> bool {
        self.is_outage(now) && now.as_nanoseconds() < self.next_probe.load(Ordering::Relaxed)
    }

    /// Whether the caller should ask the store: always in health, one caller in a while during an outage.
    pub fn may_ask(&self, now: Instant) -> bool {
        if !self.is_outage(now) {
            return true;
        }
        let due = self.next_probe.load(Ordering::Relaxed);
        let next = now.saturating_add(PROBE_EVERY).as_nanoseconds();
        now.as_nanoseconds() >= due
            && self.next_probe.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// It has answered, whatever it said.
    pub fn answered(&self, now: Instant) {
        self.failures.store(0, Ordering::Relaxed);
        self.last_answer.fetch_max(now.as_nanoseconds(), Ordering::Relaxed);
    }

    /// It could not be asked.
    pub fn failed(&self, now: Instant) {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        if before.saturating_add(1) == FAILURES {
            let next = now.saturating_add(PROBE_EVERY).as_nanoseconds();
            self.next_probe.store(next, Ordering::Relaxed);
        }
        if before >= u32::MAX / 2 {
            self.failures.store(FAILURES, Ordering::Relaxed);
        }
    }

    /// Whether the store is known to be silent, whoever may try it next.
    pub fn is_outage(&self, now: Instant) -> bool {
        let last_answer = Instant::from_nanoseconds(self.last_answer.load(Ordering::Relaxed));
        self.failures.load(Ordering::Relaxed) >= FAILURES && now.saturating_since(last_answer) > SILENCE
    }

    /// When it answered last; `None` where it never has.
    pub fn last_answer(&self) -> Option<Instant> {
        let nanoseconds = self.last_answer.load(Ordering::Relaxed);
        (nanoseconds > 0).then(|| Instant::from_nanoseconds(nanoseconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(milliseconds))
    }

    #[test]
    fn a_few_failures_in_a_row_are_an_outage_and_one_answer_ends_it() {
        let outage = Outage::default();
        outage.failed(at(1));
        outage.failed(at(2));
        outage.answered(at(3));
        outage.failed(at(2000));
        outage.failed(at(2001));
        assert!(!outage.is_silent(at(2002)) && outage.may_ask(at(2002)));
        outage.failed(at(2002));
        assert!(outage.is_silent(at(2003)) && !outage.may_ask(at(2003)));
        outage.answered(at(2004));
        assert!(!outage.is_silent(at(2005)) && outage.may_ask(at(2005)));
        assert_eq!(outage.last_answer(), Some(at(2004)));
    }

    #[test]
    fn failures_beside_answers_are_no_outage() {
        let outage = Outage::default();
        outage.answered(at(5000));
        (0..10).for_each(|moment| outage.failed(at(5001 + moment)));
        assert!(outage.may_ask(at(6000)) && !outage.is_silent(at(6000)));
        // Nothing was answered for a while, and the time to try again has come.
        assert!(outage.may_ask(at(6001)) && outage.is_silent(at(6001)));
    }

    #[test]
    fn during_an_outage_one_caller_in_a_while_asks() {
        let outage = Outage::default();
        for moment in 2000..2003 {
            outage.failed(at(moment));
        }
        let asked: Vec<u64> = (2003..3000).filter(|moment| outage.may_ask(at(*moment))).collect();
        assert_eq!(asked, [2252, 2502, 2752]);
    }
}
