//! A session of the change feed: heartbeats and their echoes, as a machine without I/O.
//!
//! A beat is a message that the session sends to itself through the store. Changes are delivered in the order of their
//! commits, so its echo proves that every change committed before it was *sent* has been delivered. It counts only
//! together with the beat's answer, which says that the triggers were still those of the session's beginning: a change
//! that no trigger announced is committed after the last beat that found them.

use std::time::Duration;

use thiserror::Error;

use super::change::Change;
use super::coverage::Coverage;
use super::shared::SharedFilter;
use super::snapshot::Snapshot;
use crate::domain::time::Instant;

/// What the store says about itself with each beat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeatAnswer {
    /// Which triggers announce changes, in which state; any change of them changes this text.
    pub triggers: Box<str>,
    /// The server's process behind the session.
    pub backend: i64,
    /// What the beat had seen, where the store has such a thing.
    pub snapshot: Option<Snapshot>,
}

/// Why a session proves nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Broken {
    /// No answer to a beat within the lease.
    #[error("a heartbeat was not answered in time")]
    Silent,
    /// An answer, but no echo.
    #[error(
        "notifications do not arrive; a pooler that shares sessions (pgbouncer in transaction mode) drops LISTEN"
    )]
    NotEchoed,
    /// Another process of the server answers than before.
    #[error("the session moved to another server process; a pooler that shares sessions drops LISTEN")]
    Moved,
    /// The triggers are not what they were.
    #[error("the triggers of the change feed were changed")]
    TriggersChanged,
}

/// One session, from the moment it listens.
#[derive(Debug)]
pub struct Session {
    coverage: Coverage,
    /// What the answers have to repeat.
    triggers: Box<str>,
    backend: i64,
    lease: Duration,
    sent: u64,
    beat: Option<Beat>,
    /// A beat sent after this one has seen every change noted so far.
    horizon_after: u64,
}

#[derive(Debug)]
struct Beat {
    number: u64,
    sent_at: Instant,
    is_echoed: bool,
    answer: Option<BeatAnswer>,
}

impl Session {
    /// A session of this number that listens and has found these triggers.
    pub fn new(number: u64, found: &BeatAnswer, lease: Duration) -> Self {
        Self {
            coverage: Coverage::new(number),
            triggers: found.triggers.clone(),
            backend: found.backend,
            lease,
            sent: 0,
            beat: None,
            horizon_after: 0,
        }
    }

    /// What it has proven so far.
    pub fn coverage(&self) -> &Coverage {
        &self.coverage
    }

    /// Whether the next beat may be sent: one at a time.
    pub fn may_beat(&self) -> bool {
        self.beat.is_none()
    }

    /// A beat is about to be sent; its number. `now` must be read before it is.
    pub fn send_beat(&mut self, now: Instant) -> u64 {
        self.sent = self.sent.saturating_add(1);
        self.beat = Some(Beat { number: self.sent, sent_at: now, is_echoed: false, answer: None });
        self.sent
    }

    /// The store has answered the beat's statement. Whether the session has proven something by it.
    pub fn answered(
        &mut self,
        number: u64,
        answer: BeatAnswer,
        filter: &mut Option<SharedFilter>,
    ) -> Result<bool, Broken> {
        if answer.backend != self.backend {
            return Err(Broken::Moved);
        }
        if answer.triggers != self.triggers {
            return Err(Broken::TriggersChanged);
        }
        if let Some(beat) = self.beat.as_mut().filter(|beat| beat.number == number) {
            beat.answer = Some(answer);
        }
        Ok(self.settle(filter))
    }

    /// A beat's echo has come, behind every change committed before it. Whether the session has proven something by it.
    pub fn echoed(&mut self, number: u64, filter: &mut Option<SharedFilter>) -> bool {
        if let Some(beat) = self.beat.as_mut().filter(|beat| beat.number == number) {
            beat.is_echoed = true;
        }
        self.settle(filter)
    }

    /// A change has come. To be called before it is applied to memory.
    pub fn heard(&mut self, change: &Change, filter: &mut Option<SharedFilter>) {
        if let Some(filter) = filter {
            filter.note(change);
            if filter.wants_horizon() {
                // A beat under way may have looked before this change was made.
                self.horizon_after = self.sent;
            }
        }
    }

    /// Whether it has been silent for longer than the lease, so that it should be given up.
    pub fn check(&self, now: Instant) -> Result<(), Broken> {
        match &self.beat {
            Some(beat) if now.saturating_since(beat.sent_at) > self.lease => {
                Err(if beat.answer.is_some() { Broken::NotEchoed } else { Broken::Silent })
            }
            Some(_) | None => Ok(()),
        }
    }

    fn settle(&mut self, filter: &mut Option<SharedFilter>) -> bool {
        let Some(Beat { number, sent_at, answer: Some(answer), .. }) =
            self.beat.take_if(|beat| beat.is_echoed && beat.answer.is_some())
        else {
            return false;
        };
        if let (Some(filter), Some(snapshot)) = (filter, answer.snapshot)
            && filter.wants_horizon()
            && number > self.horizon_after
        {
            filter.renew(snapshot);
        }
        self.coverage.advance(sent_at);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::freshness::shared::Stamp;

    const LEASE: Duration = Duration::from_secs(2);

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn answer(snapshot: &str) -> BeatAnswer {
        BeatAnswer { triggers: "t1".into(), backend: 7, snapshot: Snapshot::parse(snapshot) }
    }

    fn session() -> Session {
        Session::new(1, &answer("1:1:"), LEASE)
    }

    fn filter() -> SharedFilter {
        let begun = Stamp { incarnation: "here".into(), snapshot: Snapshot::parse("1:1:").unwrap() };
        SharedFilter::new(begun, 10)
    }

    #[test]
    fn a_beat_proves_up_to_its_sending_once_it_is_answered_and_echoed() {
        for echo_first in [true, false] {
            let mut session = session();
            let number = session.send_beat(at(10));
            let first = if echo_first {
                session.echoed(number, &mut None)
            } else {
                session.answered(number, answer("1:1:"), &mut None).unwrap()
            };
            assert!(!first && session.coverage().watermark() == at(0), "one of the two proves nothing");
            let second = if echo_first {
                session.answered(number, answer("1:1:"), &mut None).unwrap()
            } else {
                session.echoed(number, &mut None)
            };
            assert!(second && session.may_beat());
            assert_eq!(session.coverage().watermark(), at(10));
        }
    }

    #[test]
    fn an_echo_of_another_beat_proves_nothing() {
        let mut session = session();
        let number = session.send_beat(at(10));
        session.answered(number, answer("1:1:"), &mut None).unwrap();
        assert!(!session.echoed(number + 1, &mut None));
        assert!(!session.echoed(0, &mut None));
        assert_eq!(session.coverage().watermark(), at(0));
    }

    #[test]
    fn silence_breaks_a_session_and_the_missing_echo_is_told_apart() {
        let mut session = session();
        assert_eq!(session.check(at(100)), Ok(()), "nothing was sent");
        let number = session.send_beat(at(100));
        assert_eq!(session.check(at(102)), Ok(()));
        assert_eq!(session.check(at(103)), Err(Broken::Silent));
        session.answered(number, answer("1:1:"), &mut None).unwrap();
        assert_eq!(session.check(at(103)), Err(Broken::NotEchoed));
    }

    #[test]
    fn other_triggers_and_another_backend_break_a_session_without_proof() {
        let changed = [
            (BeatAnswer { triggers: "t2".into(), ..answer("1:1:") }, Broken::TriggersChanged),
            (BeatAnswer { backend: 8, ..answer("1:1:") }, Broken::Moved),
        ];
        for (answer, expected) in changed {
            let mut session = session();
            let number = session.send_beat(at(10));
            session.echoed(number, &mut None);
            assert_eq!(session.answered(number, answer, &mut None), Err(expected));
            assert_eq!(session.coverage().watermark(), at(0));
        }
    }

    /// The beat that is under way when a mass change arrives may have looked before it.
    #[test]
    fn a_new_horizon_comes_from_a_beat_sent_after_the_change() {
        let (mut session, mut filter) = (session(), Some(filter()));
        let early = session.send_beat(at(10));
        session.heard(&Change::Anything, &mut filter);
        session.echoed(early, &mut filter);
        session.answered(early, answer("5:5:"), &mut filter).unwrap();
        assert!(filter.as_ref().unwrap().wants_horizon());
        let late = session.send_beat(at(11));
        session.echoed(late, &mut filter);
        session.answered(late, answer("9:9:"), &mut filter).unwrap();
        assert!(!filter.as_ref().unwrap().wants_horizon());
    }
}
