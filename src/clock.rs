//! The one place that reads a clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::domain::time::{Instant, Now, Timestamp};

/// Reads both clocks.
pub fn now() -> Now {
    Now { wall: wall(), instant: instant() }
}

/// The wall clock, UTC. A clock set before 1970 reads as 1970.
#[allow(clippy::disallowed_methods, reason = "this is the replacement that clippy.toml names")]
pub fn wall() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_microseconds(i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX))
}

/// Time since boot, suspended time included: tokio's and std's clocks stop while a machine sleeps.
pub fn instant() -> Instant {
    let reading = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(reading.tv_sec).unwrap_or(0);
    let nanoseconds = u32::try_from(reading.tv_nsec).unwrap_or(0);
    Instant::from_boot(Duration::new(seconds, nanoseconds))
}
