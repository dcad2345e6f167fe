//! How often the store is asked for prefixes that it does not have.
//!
//! A look-up takes a token and gives it back where a key is found, so that only junk is counted and keys that are new
//! to memory are not, however many there are after a restart. A client has a bucket of its own, which refuses first; the
//! last quarter of what all have together is for clients that have asked for nothing in vain lately.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::domain::buckets::{Buckets, Level, Rate};
use crate::domain::source::Source;
use crate::domain::time::Instant;

/// Clients that are remembered, 24 bytes each.
const MAX_SOURCES: usize = 4096;
/// One client's share, and the share that is kept for those without junk.
const SHARE: u32 = 4;

const PERIOD: Duration = Duration::from_secs(1);

/// The bound. One for the process.
pub struct Lookups {
    state: Mutex<State>,
    rate: Rate,
    /// Tokens that only a client without junk gets.
    kept: u32,
    hasher: RandomState,
}

struct State {
    of_all: Level,
    of_one: Buckets,
}

/// One look-up under way. Its token comes back unless it was in vain.
pub struct Lookup<'a> {
    lookups: &'a Lookups,
    name: u64,
    is_in_vain: bool,
}

impl Lookups {
    /// So many in a second.
    pub fn new(per_second: u32) -> Self {
        let one = Rate::new(per_second.div_ceil(SHARE), PERIOD);
        Self {
            state: Mutex::new(State { of_all: Level::FULL, of_one: Buckets::new(one, MAX_SOURCES) }),
            rate: Rate::new(per_second, PERIOD),
            kept: per_second.checked_div(SHARE).unwrap_or_default(),
            hasher: RandomState::new(),
        }
    }

    /// A look-up for this client, if one may be made now.
    pub fn begin(&self, source: Source, now: Instant) -> Option<Lookup<'_>> {
        let name = self.hasher.hash_one(source);
        let mut state = self.lock();
        let kept = if state.of_one.holds_all(name, now) { 0 } else { self.kept };
        state.of_one.take(name, now).ok()?;
        if state.of_all.take(self.rate, kept, now).is_err() {
            state.of_one.give_back(name);
            return None;
        }
        Some(Lookup { lookups: self, name, is_in_vain: false })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lookup<'_> {
    /// The store has no such prefix.
    pub fn was_in_vain(mut self) {
        self.is_in_vain = true;
    }
}

impl Drop for Lookup<'_> {
    fn drop(&mut self) {
        if !self.is_in_vain {
            let mut state = self.lookups.lock();
            state.of_all.give_back(self.lookups.rate);
            state.of_one.give_back(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    const NOW: Instant = Instant::from_boot(Duration::from_secs(1000));

    fn client(number: u32) -> Source {
        Source::of(Some(IpAddr::V4(Ipv4Addr::from_bits(number))))
    }

    fn junk(lookups: &Lookups, source: Source) -> u32 {
        let mut passed = 0;
        while let Some(lookup) = lookups.begin(source, NOW) {
            lookup.was_in_vain();
            passed += 1;
        }
        passed
    }

    #[test]
    fn one_client_has_a_quarter_and_its_junk_leaves_the_others_theirs() {
        let lookups = Lookups::new(1000);
        assert_eq!(junk(&lookups, client(1)), 250);
        assert_eq!(junk(&lookups, client(2)), 250);
    }

    #[test]
    fn clients_without_junk_get_the_last_quarter_and_all_together_no_more_than_all() {
        let lookups = Lookups::new(1000);
        let passed: u32 = (1..=10).map(|number| junk(&lookups, client(number))).sum();
        // Each of the last ones has its first look-up in vain; then it is one with junk.
        assert!((750..=760).contains(&passed), "{passed}");
        assert!(lookups.begin(client(99), NOW).is_some());
        let many: u32 = (100..10_000).map(|number| junk(&lookups, client(number))).sum();
        assert_eq!(passed + many, 1000);
        assert!(lookups.begin(client(99), NOW).is_none());
    }

    #[test]
    fn lookups_that_find_a_key_are_free() {
        let lookups = Lookups::new(4);
        for _ in 0..100_000 {
            drop(lookups.begin(client(1), NOW).unwrap());
        }
    }
}
