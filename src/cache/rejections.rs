//! Entries in Redis that were not believed: counted, and told of at most once a minute.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::seal::Rejection;
use crate::domain::time::Instant;
use crate::telemetry::metrics::CacheKind;

const LOG_EVERY: Duration = Duration::from_mins(1);

/// Counts rejections and decides which ones are logged.
#[derive(Debug, Default)]
pub(super) struct Rejections {
    total: AtomicU64,
    /// When the last one was logged, and how many there were by then.
    logged: Mutex<Option<(Instant, u64)>>,
}

impl Rejections {
    /// Counts one; logs it unless one was logged within the last minute. Returns whether it was logged.
    pub(super) fn note(&self, kind: CacheKind, rejection: Rejection, now: Instant) -> bool {
        let total = self.total.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let since_last = {
            let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
            if logged.is_some_and(|(at, _)| now.saturating_since(at) < LOG_EVERY) {
                return false;
            }
            let before = logged.replace((now, total)).map_or(0, |(_, count)| count);
            total.saturating_sub(before)
        };
        tracing::warn!(
            cache = ?kind,
            reason = %rejection,
            rejected = since_last,
            "entries in Redis were not believed: is another program writing there, or another secret in use?"
        );
        true
    }

    /// How many there were.
    pub(super) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_logged_once_a_minute_and_counted_in_full() {
        let rejections = Rejections::default();
        let at = |s| Instant::from_boot(Duration::from_secs(s));
        let logged: Vec<bool> = [0, 1, 59, 60, 61]
            .map(|s| rejections.note(CacheKind::Record, Rejection::BrokenSeal, at(s)))
            .to_vec();
        assert_eq!(logged, [true, false, false, true, false]);
        assert_eq!(rejections.total(), 5);
    }
}
