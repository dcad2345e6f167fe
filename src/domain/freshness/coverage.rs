//! Coverage: up to which moment a session has heard of every change, and what follows for a record.
//!
//! A record is *known true* at the moment its query started. If the session of the change feed was listening then, and
//! has since proven that it heard every change up to its watermark without dropping the record, the record is known
//! true at the watermark too. It is used only while that moment is young enough; nothing re-arms it but proof.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::domain::time::Instant;

/// What one session of the change feed has proven: every change committed before its watermark has been applied here.
///
/// Each session has its own. When a session ends, its watermark stands still for ever, and so what it covered ages.
#[derive(Debug, Clone)]
pub struct Coverage {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Sessions are numbered in the order of their beginning.
    session: u64,
    /// Nanoseconds since boot.
    watermark: AtomicU64,
}

impl Coverage {
    /// Of the session of this number, which has proven nothing yet.
    pub fn new(session: u64) -> Self {
        Self { shared: Arc::new(Shared { session, watermark: AtomicU64::new(0) }) }
    }

    /// Every change committed before `to` has been applied. Never goes back.
    ///
    /// To be called after the changes were applied: a reader that sees the new watermark sees their effects.
    pub fn advance(&self, to: Instant) {
        self.shared.watermark.fetch_max(to.as_nanoseconds(), Ordering::AcqRel);
    }

    /// Every change committed before this moment has been applied; the start of time where nothing is proven.
    pub fn watermark(&self) -> Instant {
        Instant::from_nanoseconds(self.shared.watermark.load(Ordering::Acquire))
    }

    /// Reads the watermark for a look into memory.
    pub fn view(&self, limits: Limits) -> View {
        View { session: self.shared.session, watermark: self.watermark(), limits }
    }

    /// For a query of our own that starts at `now`.
    pub fn reading_at(&self, now: Instant) -> Known {
        Known { since: now, coverage: self.clone() }
    }

    /// For a record that another replica read and this session's filter accepted ([`super::shared`]): it holds every
    /// change this session knows of, and the session knows of all before its watermark. To be called before the filter
    /// is asked.
    pub fn accepting(&self) -> Known {
        Known { since: self.watermark(), coverage: self.clone() }
    }
}

/// What a reader goes by: taken *before* it looks into memory.
///
/// The order matters. If the watermark were read after the record, a change and the echo behind it could both be
/// applied in between, and the record that the change removed would look proven by the echo. So whoever keeps a record
/// keeps the view that it was found with, and judges it by that view ever after.
#[derive(Debug, Clone, Copy)]
pub struct View {
    session: u64,
    watermark: Instant,
    limits: Limits,
}

/// How long a record is used after the last moment at which it was known to be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Without being read again: the lease, or where there is no change feed the record's lifetime without one.
    pub window: Duration,
    /// Where it can't be read again because the store can't be asked: lease and outage grace.
    pub outage: Duration,
}

/// Whether a record may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// As it is.
    Fresh,
    /// Only where the store can't be asked, and only to allow: it has to be read again.
    Suspect,
    /// No more.
    Expired,
}

/// Since when and by what a record is known to be true. Made before its query starts, so it can't be stamped late.
#[derive(Debug, Clone)]
pub struct Known {
    since: Instant,
    coverage: Coverage,
}

impl View {
    /// The last moment at which a record was known to be true.
    pub fn known_true_at(&self, known: &Known) -> Instant {
        let covered = match known.coverage.shared.session.cmp(&self.session) {
            std::cmp::Ordering::Equal => self.watermark,
            // That session has ended, so its watermark stands still.
            std::cmp::Ordering::Less => known.coverage.watermark(),
            // It began after this view was taken, which says nothing about it.
            std::cmp::Ordering::Greater => known.since,
        };
        known.since.max(covered)
    }

    /// Whether a record may be used at `now`.
    pub fn standing(&self, known: &Known, now: Instant) -> Standing {
        let age = now.saturating_since(self.known_true_at(known));
        if age <= self.limits.window {
            Standing::Fresh
        } else if age <= self.limits.outage.max(self.limits.window) {
            Standing::Suspect
        } else {
            Standing::Expired
        }
    }

    /// Whether the session in force goes on proving a record.
    pub fn covers(&self, known: &Known) -> bool {
        // Session 0 is none.
        self.session != 0 && known.coverage.shared.session == self.session
    }

    /// Every change committed before this moment had been applied when the view was taken.
    pub fn watermark(&self) -> Instant {
        self.watermark
    }
}

impl Known {
    /// Without the help of any session: true at this moment, and nothing proves more.
    pub fn uncovered(since: Instant) -> Self {
        Self { since, coverage: Coverage::new(0) }
    }

    /// The start of the query that read the record, or the watermark at which it was accepted.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The same without the session's help: where the answer came from another server than the session's.
    pub fn without_coverage(self) -> Self {
        Self::uncovered(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { window: Duration::from_secs(2), outage: Duration::from_secs(32) };

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn view(coverage: &Coverage) -> View {
        coverage.view(LIMITS)
    }

    #[test]
    fn a_record_is_used_for_the_window_after_its_query_began_and_no_longer() {
        let coverage = Coverage::new(1);
        let known = coverage.reading_at(at(100));
        let standing = |now| view(&coverage).standing(&known, at(now));
        assert_eq!(standing(102), Standing::Fresh);
        assert_eq!(standing(103), Standing::Suspect);
        assert_eq!(standing(132), Standing::Suspect);
        assert_eq!(standing(133), Standing::Expired);
    }

    #[test]
    fn the_watermark_of_its_session_keeps_a_record_fresh() {
        let coverage = Coverage::new(1);
        let known = coverage.reading_at(at(100));
        coverage.advance(at(200));
        assert_eq!(view(&coverage).standing(&known, at(202)), Standing::Fresh);
        assert_eq!(view(&coverage).standing(&known, at(203)), Standing::Suspect);
        coverage.advance(at(150));
        assert_eq!(view(&coverage).watermark(), at(200), "a watermark never goes back");
    }

    /// Between two sessions anything may have changed unheard.
    #[test]
    fn another_session_proves_nothing_about_earlier_records() {
        let (first, second) = (Coverage::new(1), Coverage::new(2));
        let known = first.reading_at(at(100));
        first.advance(at(110));
        second.advance(at(140));
        assert!(view(&first).covers(&known) && !view(&second).covers(&known));
        assert!(!view(&Coverage::new(0)).covers(&Known::uncovered(at(100))));
        assert_eq!(view(&second).known_true_at(&known), at(110));
        assert_eq!(view(&second).standing(&known, at(140)), Standing::Suspect);
    }

    /// The reader's view is from before the session that read the record; that session's proofs may be younger than
    /// the reader's look into memory.
    #[test]
    fn a_view_taken_earlier_does_not_use_a_later_proof() {
        let (first, second) = (Coverage::new(1), Coverage::new(2));
        let early = view(&first);
        let known = second.reading_at(at(100));
        second.advance(at(200));
        assert_eq!(early.known_true_at(&known), at(100));
        let early = view(&second);
        second.advance(at(300));
        assert_eq!(early.known_true_at(&known), at(200), "the view's own reading counts");
    }

    #[test]
    fn an_accepted_record_is_as_old_as_the_watermark_and_not_new() {
        let coverage = Coverage::new(1);
        coverage.advance(at(100));
        let known = coverage.accepting();
        assert_eq!(view(&coverage).standing(&known, at(101)), Standing::Fresh);
        assert_eq!(view(&coverage).standing(&known, at(103)), Standing::Suspect);
    }

    #[test]
    fn without_coverage_only_the_query_counts() {
        let coverage = Coverage::new(1);
        let known = coverage.reading_at(at(100)).without_coverage();
        coverage.advance(at(200));
        assert_eq!(view(&coverage).known_true_at(&known), at(100));
    }

    #[test]
    fn without_grace_nothing_is_suspect_and_a_longer_window_is_not_cut_short() {
        let coverage = Coverage::new(1);
        let standing = |outage, now| {
            let limits = Limits { window: Duration::from_secs(5), outage: Duration::from_secs(outage) };
            let view = coverage.view(limits);
            view.standing(&coverage.reading_at(at(100)), at(now))
        };
        assert_eq!(standing(2, 104), Standing::Fresh);
        assert_eq!(standing(2, 106), Standing::Expired);
        assert_eq!(standing(5, 106), Standing::Expired);
    }
}
