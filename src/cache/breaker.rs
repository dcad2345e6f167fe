//! The breaker: decides when Redis is left alone.
//!
//! Closed: every call goes. After [`FAILURES`] failures in a row, or as soon as nothing but failures has come back for
//! [`FAILING_FOR`], it opens and no call goes. Once per [`PROBE_EVERY`] one caller may probe (half-open); a probe that is
//! answered closes it. The state machine is pure, time is an argument; [`SharedBreaker`] adds the lock.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::domain::time::Instant;

/// Failures in a row that open the breaker.
pub const FAILURES: u32 = 5;

/// How long failures alone may come back, where they are too rare to be counted up to [`FAILURES`].
pub const FAILING_FOR: Duration = Duration::from_millis(500);

/// How often an open breaker lets one call through.
pub const PROBE_EVERY: Duration = Duration::from_secs(1);

/// What the breaker does with calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// All calls go.
    Closed,
    /// No call goes.
    Open,
    /// One call is out to see whether Redis answers again.
    HalfOpen,
}

/// What a report changed, for those who log it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// Calls stop.
    Opened,
    /// Calls go again.
    Closed,
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallOutcome {
    /// Redis answered in time.
    Answered,
    /// It did not, or said that it can't serve.
    Failed,
    /// The caller went away before either was known.
    Cancelled,
}

/// Leave to make one call; its end must be reported.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Leave {
    /// How often the breaker had changed when the leave was given: later reports say nothing about today's state.
    epoch: u64,
}

/// The state machine. Not shared; see [`SharedBreaker`].
#[derive(Debug)]
pub struct Breaker {
    state: State,
    epoch: u64,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Closed { failures: u32, failing_since: Option<Instant> },
    Open { probe_at: Instant },
    HalfOpen,
}

const HEALTHY: State = State::Closed { failures: 0, failing_since: None };

impl Breaker {
    /// Closed.
    pub const fn new() -> Self {
        Self { state: HEALTHY, epoch: 0 }
    }

    /// What it does with calls now.
    pub const fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen => BreakerState::HalfOpen,
        }
    }

    /// Asks for leave to call; `None` = leave Redis alone.
    pub fn ask(&mut self, now: Instant) -> Option<Leave> {
        match self.state {
            State::Closed { .. } => {}
            State::Open { probe_at } if now >= probe_at => self.change(State::HalfOpen),
            State::Open { .. } | State::HalfOpen => return None,
        }
        Some(Leave { epoch: self.epoch })
    }

    /// Reports the end of a call. Calls that began before the last change say nothing any more.
    pub fn report(&mut self, leave: Leave, outcome: CallOutcome, now: Instant) -> Option<Transition> {
        if leave.epoch != self.epoch {
            return None;
        }
        match (self.state, outcome) {
            (State::Closed { .. }, CallOutcome::Answered) => {
                self.state = HEALTHY;
                None
            }
            (State::Closed { failures, failing_since }, CallOutcome::Failed) => {
                let since = failing_since.unwrap_or(now);
                let failures = failures.saturating_add(1);
                if failures >= FAILURES || now.saturating_since(since) >= FAILING_FOR {
                    self.open(now);
                    Some(Transition::Opened)
                } else {
                    self.state = State::Closed { failures, failing_since: Some(since) };
                    None
                }
            }
            (State::HalfOpen, CallOutcome::Answered) => {
                self.change(HEALTHY);
                Some(Transition::Closed)
            }
            (State::HalfOpen, CallOutcome::Failed) => {
                self.open(now);
                None
            }
            // Nothing was learnt: the next caller may probe.
            (State::HalfOpen, CallOutcome::Cancelled) => {
                self.change(State::Open { probe_at: now });
                None
            }
            (State::Closed { .. }, CallOutcome::Cancelled) | (State::Open { .. }, _) => None,
        }
    }

    fn open(&mut self, now: Instant) {
        self.change(State::Open { probe_at: now.saturating_add(PROBE_EVERY) });
    }

    fn change(&mut self, state: State) {
        self.state = state;
        self.epoch += 1;
    }
}

impl Default for Breaker {
    fn default() -> Self {
        Self::new()
    }
}

/// A breaker behind a lock that is held for a few instructions and never across an await.
#[derive(Debug, Default)]
pub struct SharedBreaker(Mutex<Breaker>);

impl SharedBreaker {
    /// As [`Breaker::ask`].
    pub fn ask(&self, now: Instant) -> Option<Leave> {
        self.lock().ask(now)
    }

    /// As [`Breaker::report`].
    pub fn report(&self, leave: Leave, outcome: CallOutcome, now: Instant) -> Option<Transition> {
        self.lock().report(leave, outcome, now)
    }

    /// As [`Breaker::state`].
    pub fn state(&self) -> BreakerState {
        self.lock().state()
    }

    fn lock(&self) -> MutexGuard<'_, Breaker> {
        // No code under the lock can panic half-way, so a poisoned state is still a state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(milliseconds: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(milliseconds))
    }

    fn call(breaker: &mut Breaker, outcome: CallOutcome, ms: u64) -> Option<Transition> {
        let leave = breaker.ask(at(ms)).expect("leave");
        breaker.report(leave, outcome, at(ms))
    }

    fn opened(ms: u64) -> Breaker {
        let mut breaker = Breaker::new();
        for i in 1..=FAILURES {
            let expected = (i == FAILURES).then_some(Transition::Opened);
            assert_eq!(call(&mut breaker, CallOutcome::Failed, ms), expected, "failure {i}");
        }
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_an_answer_starts_the_count_again() {
        opened(0);
        let mut breaker = Breaker::new();
        for _ in 0..3 {
            for _ in 1..FAILURES {
                assert_eq!(call(&mut breaker, CallOutcome::Failed, 0), None);
            }
            assert_eq!(call(&mut breaker, CallOutcome::Answered, 0), None);
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn rare_failures_open_it_after_half_a_second() {
        let mut breaker = Breaker::new();
        assert_eq!(call(&mut breaker, CallOutcome::Failed, 0), None);
        assert_eq!(call(&mut breaker, CallOutcome::Failed, 499), None);
        assert_eq!(call(&mut breaker, CallOutcome::Failed, 500), Some(Transition::Opened));
    }

    #[test]
    fn one_probe_per_second_and_an_answer_closes_it() {
        let mut breaker = opened(0);
        assert_eq!(breaker.ask(at(999)), None);
        let probe = breaker.ask(at(1000)).expect("probe");
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        assert_eq!(breaker.ask(at(1000)), None, "one probe at a time");
        assert_eq!(breaker.report(probe, CallOutcome::Failed, at(1020)), None);
        assert_eq!((breaker.state(), breaker.ask(at(2019))), (BreakerState::Open, None));
        assert_eq!(call(&mut breaker, CallOutcome::Answered, 2020), Some(Transition::Closed));
        assert_eq!(call(&mut breaker, CallOutcome::Failed, 2020), None, "the count starts again");
    }

    #[test]
    fn a_cancelled_probe_leaves_the_next_caller_to_probe() {
        let mut breaker = opened(0);
        assert_eq!(call(&mut breaker, CallOutcome::Cancelled, 1000), None);
        assert_eq!(call(&mut breaker, CallOutcome::Answered, 1000), Some(Transition::Closed));
    }

    #[test]
    fn calls_from_before_a_change_change_nothing() {
        let mut breaker = Breaker::new();
        let early: Vec<_> = (0..10).map(|_| breaker.ask(at(0)).unwrap()).collect();
        for _ in 0..FAILURES {
            call(&mut breaker, CallOutcome::Failed, 0);
        }
        for leave in early {
            assert_eq!(breaker.report(leave, CallOutcome::Answered, at(1)), None);
        }
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    /// An answer that was on its way before Redis froze must not pass for the probe's.
    #[test]
    fn a_late_answer_is_not_the_probes() {
        let mut breaker = Breaker::new();
        let early = breaker.ask(at(0)).unwrap();
        for _ in 0..FAILURES {
            call(&mut breaker, CallOutcome::Failed, 0);
        }
        let probe = breaker.ask(at(1000)).unwrap();
        assert_eq!(breaker.report(early, CallOutcome::Answered, at(1001)), None);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        assert_eq!(breaker.report(probe, CallOutcome::Answered, at(1002)), Some(Transition::Closed));
    }

    proptest! {
        /// Whatever happens, an open breaker lets at most one call a second through, and answers always close it.
        #[test]
        fn it_never_floods_and_never_sticks(steps in prop::collection::vec((0_u64..400, 0_u8..3), 1..200)) {
            let mut breaker = Breaker::new();
            let (mut ms, mut last_failed_probe) = (0, None::<u64>);
            for (pause, outcome) in steps {
                ms += pause;
                let was_open = breaker.state() == BreakerState::Open;
                let Some(leave) = breaker.ask(at(ms)) else { continue };
                if was_open && let Some(last) = last_failed_probe {
                    prop_assert!(ms - last >= 1000);
                }
                let outcome = [CallOutcome::Answered, CallOutcome::Failed, CallOutcome::Cancelled][usize::from(outcome)];
                let transition = breaker.report(leave, outcome, at(ms));
                if was_open && outcome == CallOutcome::Failed { last_failed_probe = Some(ms); }
                if transition.is_some() { last_failed_probe = None; }
            }
            ms += 1000;
            if breaker.state() != BreakerState::Closed {
                prop_assert_eq!(call(&mut breaker, CallOutcome::Answered, ms), Some(Transition::Closed));
            }
            prop_assert_eq!(breaker.state(), BreakerState::Closed);
        }
    }
}
