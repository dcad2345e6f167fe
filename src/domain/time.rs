//! Time as values. The clock is elsewhere ([`crate::clock`]); here an instant is always an argument.

use std::time::Duration;

/// A moment in UTC, microseconds since 1970, as PostgreSQL's `timestamp without time zone` is read by the contract.
/// The two ends stand for `-infinity` and `infinity`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// PostgreSQL's `infinity`.
    pub const INFINITY: Self = Self(i64::MAX);
    /// PostgreSQL's `-infinity`.
    pub const NEGATIVE_INFINITY: Self = Self(i64::MIN);

    /// From microseconds since 1970-01-01 00:00 UTC.
    pub const fn from_microseconds(microseconds: i64) -> Self {
        Self(microseconds)
    }

    /// Microseconds since 1970-01-01 00:00 UTC.
    pub const fn as_microseconds(self) -> i64 {
        self.0
    }

    /// This moment and then some; stays at the ends.
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }

    /// This moment less some; stays at the ends.
    pub fn saturating_sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }

    /// How long ago `earlier` was; zero where it is not earlier.
    pub fn saturating_since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// Time since the machine started, suspended time included (`CLOCK_BOOTTIME`). Ages and lifetimes are measured on this
/// clock alone: it never goes back and does not stop while a virtual machine sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    /// From a reading of the clock.
    pub const fn from_boot(since_boot: Duration) -> Self {
        Self(since_boot)
    }

    /// From nanoseconds since boot.
    pub const fn from_nanoseconds(nanoseconds: u64) -> Self {
        Self(Duration::from_nanos(nanoseconds))
    }

    /// Nanoseconds since boot; 584 years of them.
    pub fn as_nanoseconds(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    /// This instant and then some.
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }

    /// So long before this instant; stays at the start of time.
    pub fn saturating_before(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(duration))
    }

    /// How long ago `earlier` was; zero where it is not earlier.
    pub fn saturating_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// One reading of both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For expiry and lock dates.
    pub wall: Timestamp,
    /// For ages and lifetimes.
    pub instant: Instant,
}
