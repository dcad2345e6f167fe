//! Freshness: what the change feed has proven, shared by all who look records up.
//!
//! The rules are in [`crate::domain::freshness`]; here is the one place where the feed's task leaves what it knows and
//! every check reads it, without a lock on the way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;

use crate::domain::freshness::coverage::{Coverage, Known, Limits, View};
use crate::domain::freshness::shared::{SharedFilter, Stamp};
use crate::domain::key::KeyPrefix;
use crate::domain::record::UserId;
use crate::domain::row::CandidateRow;
use crate::domain::time::{Instant, Now, Timestamp};

/// How long records are used, from the settings.
#[derive(Debug, Clone, Copy)]
pub struct FreshnessSettings {
    /// How long after the last proof of the change feed.
    pub lease: Duration,
    /// How much longer where the store can't be asked.
    pub outage_grace: Duration,
    /// How long after being read where there is no change feed.
    pub without_feed: Duration,
    /// Longest time without being read again, whatever is proven.
    pub record_ttl: Duration,
}

/// How changes arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Not known yet.
    Starting,
    /// By the change feed, which may be interrupted at times.
    Feed,
    /// By reading again, for this reason.
    Ttl(String),
}

/// What the feed has proven.
pub struct Freshness {
    settings: FreshnessSettings,
    current: ArcSwap<Current>,
    /// `None` = no session of the feed has begun.
    filter: Mutex<Option<SharedFilter>>,
}

struct Current {
    mode: Mode,
    coverage: Coverage,
    /// The life of the server that the session is with.
    incarnation: Option<Box<str>>,
}

/// A query that is about to start.
#[derive(Debug)]
pub struct BegunReading {
    known: Known,
    incarnation: Option<Box<str>>,
}

impl BegunReading {
    /// What proves the records that the query found. A session of the feed proves nothing about another server.
    pub fn finish(self, stamp: Option<&Stamp>) -> Known {
        if stamp.map(|stamp| &stamp.incarnation) == self.incarnation.as_ref() {
            self.known
        } else {
            self.known.without_coverage()
        }
    }
}

impl Freshness {
    /// Nothing is proven yet.
    pub fn new(settings: FreshnessSettings) -> Self {
        let current = Current { mode: Mode::Starting, coverage: Coverage::new(0), incarnation: None };
        Self { settings, current: ArcSwap::from_pointee(current), filter: Mutex::new(None) }
    }

    /// The settings.
    pub fn settings(&self) -> FreshnessSettings {
        self.settings
    }

    /// What a look into memory goes by; to be taken before it.
    pub fn view(&self) -> View {
        let current = self.current.load();
        current.coverage.view(self.limits(&current.mode))
    }

    /// How changes arrive.
    pub fn mode(&self) -> Mode {
        self.current.load().mode.clone()
    }

    /// How long ago the feed has last proven that nothing was missed; `None` where it never has.
    pub fn lease_age(&self, now: Instant) -> Option<Duration> {
        let watermark = self.current.load().coverage.watermark();
        (watermark > Instant::from_boot(Duration::ZERO)).then(|| now.saturating_since(watermark))
    }

    /// Longest time from a change to its effect while the store can be asked, less the reading itself.
    pub fn window(&self) -> Duration {
        self.limits(&self.current.load().mode).window
    }

    /// Longest use of a record while the store can't be asked.
    pub fn outage_limit(&self) -> Duration {
        let limits = self.limits(&self.current.load().mode);
        limits.outage.max(limits.window)
    }

    /// To be called before a query starts.
    pub fn begin_reading(&self, now: Instant) -> BegunReading {
        let current = self.current.load();
        BegunReading { known: current.coverage.reading_at(now), incarnation: current.incarnation.clone() }
    }

    /// What proves records that another replica read, and until when they need not be read again; `None` where they
    /// are not to be believed.
    pub fn accept(
        &self,
        stamp: Option<&Stamp>,
        read_at: Timestamp,
        prefix: &KeyPrefix,
        rows: &[CandidateRow],
        now: Now,
    ) -> Option<Known> {
        let current = self.current.load();
        if current.mode != Mode::Feed {
            // By the wall clocks of two machines; there is nothing better. From the future: nobody knows how old.
            let age = (read_at <= now.wall).then(|| now.wall.saturating_since(read_at))?;
            return Some(Known::uncovered(now.instant.saturating_before(age)));
        }
        // Before the filter is asked: what it has not heard of by then is not covered.
        let known = current.coverage.accepting();
        let users: Option<Vec<UserId>> = rows.iter().map(|row| row.user_id.map(UserId::new)).collect();
        let filter = self.filter();
        filter.as_ref()?.accepts(stamp?, prefix, users?.into_iter()).then_some(known)
    }

    /// How long records are left in Redis.
    pub fn shared_lifetime(&self) -> Duration {
        match self.current.load().mode {
            Mode::Feed => self.settings.record_ttl,
            Mode::Starting | Mode::Ttl(_) => self.settings.record_ttl.min(self.settings.without_feed),
        }
    }

    /// A session of the feed has proven itself; what it covers counts from now on.
    pub fn publish(&self, coverage: Coverage, incarnation: Option<Box<str>>) {
        self.current.store(Arc::new(Current { mode: Mode::Feed, coverage, incarnation }));
    }

    /// There is no feed, for this reason. What the last session had proven stays proven.
    pub fn degrade(&self, reason: String) {
        let current = self.current.load();
        let (coverage, incarnation) = (current.coverage.clone(), current.incarnation.clone());
        self.current.store(Arc::new(Current { mode: Mode::Ttl(reason), coverage, incarnation }));
    }

    /// What shared records have to have seen.
    pub fn filter(&self) -> MutexGuard<'_, Option<SharedFilter>> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits(&self, mode: &Mode) -> Limits {
        let FreshnessSettings { lease, outage_grace, without_feed, record_ttl } = self.settings;
        let window = match mode {
            Mode::Feed => lease,
            Mode::Starting | Mode::Ttl(_) => without_feed.min(record_ttl),
        };
        Limits { window, outage: lease.saturating_add(outage_grace) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::freshness::coverage::Standing;
    use crate::domain::freshness::snapshot::Snapshot;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    fn freshness() -> Freshness {
        Freshness::new(FreshnessSettings {
            lease: Duration::from_secs(2),
            outage_grace: Duration::from_secs(30),
            without_feed: Duration::from_secs(5),
            record_ttl: Duration::from_mins(5),
        })
    }

    fn stamp(incarnation: &str, snapshot: &str) -> Stamp {
        Stamp { incarnation: incarnation.into(), snapshot: Snapshot::parse(snapshot).unwrap() }
    }

    fn with_feed() -> (Freshness, Coverage) {
        let (freshness, coverage) = (freshness(), Coverage::new(1));
        *freshness.filter() = Some(SharedFilter::new(stamp("here", "10:10:"), 10));
        coverage.advance(at(100));
        freshness.publish(coverage.clone(), Some("here".into()));
        (freshness, coverage)
    }

    #[test]
    fn without_a_feed_a_record_is_used_for_the_lifetime_without_one() {
        let freshness = freshness();
        let known = freshness.begin_reading(at(100)).finish(None);
        assert_eq!(freshness.view().standing(&known, at(105)), Standing::Fresh);
        assert_eq!(freshness.view().standing(&known, at(106)), Standing::Suspect);
        assert_eq!(freshness.view().standing(&known, at(133)), Standing::Expired);
    }

    #[test]
    fn the_feed_covers_what_was_read_from_its_own_server_only() {
        let (freshness, coverage) = with_feed();
        let known =
            |incarnation| freshness.begin_reading(at(101)).finish(Some(&stamp(incarnation, "11:11:")));
        let (ours, foreign) = (known("here"), known("there"));
        coverage.advance(at(200));
        assert_eq!(freshness.view().standing(&ours, at(202)), Standing::Fresh);
        assert_eq!(freshness.view().standing(&foreign, at(202)), Standing::Expired);
    }

    #[test]
    fn shared_records_are_taken_by_what_they_have_seen_and_are_as_old_as_the_watermark() {
        let (freshness, _) = with_feed();
        let prefix = KeyPrefix::new("kw_aaaaa").unwrap();
        let now = Now { wall: Timestamp::from_microseconds(0), instant: at(101) };
        let rows = [CandidateRow::sample("sha256:00")];
        let accept = |stamp: Option<Stamp>| freshness.accept(stamp.as_ref(), now.wall, &prefix, &rows, now);
        assert!(accept(None).is_none());
        assert!(accept(Some(stamp("here", "9:9:"))).is_none());
        assert!(accept(Some(stamp("there", "20:20:"))).is_none());
        let known = accept(Some(stamp("here", "20:20:"))).unwrap();
        assert_eq!(known.since(), at(100));
    }

    #[test]
    fn without_a_feed_shared_records_are_taken_by_their_age() {
        let freshness = freshness();
        let prefix = KeyPrefix::new("kw_aaaaa").unwrap();
        let now = Now { wall: Timestamp::from_microseconds(10_000_000), instant: at(100) };
        let accept =
            |read_at| freshness.accept(None, Timestamp::from_microseconds(read_at), &prefix, &[], now);
        assert_eq!(accept(7_000_000).unwrap().since(), at(97));
        assert!(accept(10_000_001).is_none(), "from the future");
    }

    #[test]
    fn what_was_proven_stays_proven_when_the_feed_goes() {
        let (freshness, _) = with_feed();
        let known = freshness.begin_reading(at(50)).finish(Some(&stamp("here", "11:11:")));
        freshness.degrade("triggers are missing".to_owned());
        assert_eq!(freshness.view().standing(&known, at(105)), Standing::Fresh);
        assert_eq!(freshness.view().standing(&known, at(106)), Standing::Suspect);
        let later = freshness.begin_reading(at(200)).finish(Some(&stamp("here", "11:11:")));
        assert_eq!(freshness.view().known_true_at(&later), at(200));
    }
}
