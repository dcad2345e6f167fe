//! Token buckets: one ([`Level`]), and very many in memory that does not grow ([`Buckets`]).
//!
//! The table has no list of who is in it, so it can't be filled: each name has a few places that it may be in, and where
//! all are taken, the bucket that lacks least gives way. So a flood of new names pushes out names as fresh as its own. An
//! empty bucket stays until it is nearly full again, and nobody is refused for what a stranger did. To have one's own
//! bucket forgotten takes as many wrong attempts on each of the other places of the set, under names that one has to find
//! by trying, as their hash is keyed: more requests than are won.

use std::time::Duration;

use super::time::Instant;

/// Places that a name may be in.
const WAYS: usize = 8;

/// How much a bucket holds, and how fast it fills.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    burst: u32,
    every: Duration,
}

impl Rate {
    /// `burst` tokens, all of which come back in `period`; at least one.
    pub fn new(burst: u32, period: Duration) -> Self {
        let burst = burst.max(1);
        Self { burst, every: period.checked_div(burst).unwrap_or(period) }
    }
}

/// One bucket: when it will be full again.
#[derive(Debug, Clone, Copy)]
pub struct Level(Instant);

impl Level {
    /// Nothing was taken.
    pub const FULL: Self = Self(Instant::from_boot(Duration::ZERO));

    /// Takes a token, but none of the last `kept`. Otherwise it says how long it takes until there is one.
    pub fn take(&mut self, rate: Rate, kept: u32, now: Instant) -> Result<(), Duration> {
        let full_again = self.0.max(now).saturating_add(rate.every);
        let most = rate.every.saturating_mul(rate.burst.saturating_sub(kept));
        match full_again.saturating_since(now).checked_sub(most) {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => {
                self.0 = full_again;
                Ok(())
            }
        }
    }

    /// Puts back what was taken.
    pub fn give_back(&mut self, rate: Rate) {
        self.0 = self.0.saturating_before(rate.every);
    }

    /// Whether it lacks nothing.
    pub fn is_full(self, now: Instant) -> bool {
        self.0 <= now
    }
}

/// A bucket for each name, as far as the memory reaches.
#[derive(Debug)]
pub struct Buckets {
    rate: Rate,
    sets: Vec<[Slot; WAYS]>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    name: u64,
    level: Level,
}

impl Buckets {
    /// Room for `places` names, rounded up to whole sets. A name is a hash under a random key.
    pub fn new(rate: Rate, places: usize) -> Self {
        let empty = [Slot { name: 0, level: Level::FULL }; WAYS];
        Self { rate, sets: vec![empty; places.div_ceil(WAYS).max(1)] }
    }

    /// Takes a token out of this name's bucket. Otherwise it says how long it takes until there is one.
    pub fn take(&mut self, name: u64, now: Instant) -> Result<(), Duration> {
        let rate = self.rate;
        let Some(set) = self.set(name) else { return Ok(()) };
        let taken = set.iter().position(|slot| slot.name == name);
        let fullest = || set.iter().enumerate().min_by_key(|(_, slot)| slot.level.0).map(|(at, _)| at);
        let Some(slot) = taken.or_else(fullest).and_then(|at| set.get_mut(at)) else { return Ok(()) };
        if slot.name != name {
            *slot = Slot { name, level: Level::FULL };
        }
        slot.level.take(rate, 0, now)
    }

    /// Puts back what was taken, unless the bucket is forgotten.
    pub fn give_back(&mut self, name: u64) {
        let rate = self.rate;
        let slot = self.set(name).and_then(|set| set.iter_mut().find(|slot| slot.name == name));
        if let Some(slot) = slot {
            slot.level.give_back(rate);
        }
    }

    /// Whether nothing is missing from this name's bucket.
    pub fn holds_all(&mut self, name: u64, now: Instant) -> bool {
        self.set(name)
            .and_then(|set| set.iter().find(|slot| slot.name == name))
            .is_none_or(|slot| slot.level.is_full(now))
    }

    fn set(&mut self, name: u64) -> Option<&mut [Slot; WAYS]> {
        let sets = u64::try_from(self.sets.len()).ok()?;
        let at = usize::try_from(name.checked_rem(sets)?).ok()?;
        self.sets.get_mut(at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn at(milliseconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(1000) + Duration::from_millis(milliseconds))
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_one_token_at_a_time() {
        let mut buckets = Buckets::new(Rate::new(20, MINUTE), 64);
        for _ in 0..20 {
            assert_eq!(buckets.take(7, at(0)), Ok(()));
        }
        assert_eq!(buckets.take(7, at(0)), Err(Duration::from_secs(3)));
        assert_eq!(buckets.take(7, at(2_000)), Err(Duration::from_secs(1)));
        assert_eq!(buckets.take(7, at(3_000)), Ok(()));
        assert_eq!(buckets.take(7, at(3_000)), Err(Duration::from_secs(3)));
        assert_eq!(buckets.take(8, at(0)), Ok(()), "another name");
    }

    #[test]
    fn what_is_put_back_can_be_taken_again_and_no_more_than_that() {
        let mut buckets = Buckets::new(Rate::new(1, MINUTE), 64);
        buckets.take(7, at(0)).unwrap();
        buckets.give_back(7);
        buckets.give_back(7);
        assert!(buckets.holds_all(7, at(0)));
        buckets.take(7, at(0)).unwrap();
        assert!(buckets.take(7, at(0)).is_err());
    }

    #[test]
    fn the_last_tokens_are_kept_for_those_who_may_have_them() {
        let (rate, mut level) = (Rate::new(4, MINUTE), Level::FULL);
        for _ in 0..3 {
            level.take(rate, 1, at(0)).unwrap();
        }
        assert!(level.take(rate, 1, at(0)).is_err());
        assert_eq!(level.take(rate, 0, at(0)), Ok(()));
        assert!(level.take(rate, 0, at(0)).is_err());
    }

    /// One set only, so that every new name meets the empty bucket.
    #[test]
    fn a_flood_of_new_names_neither_resets_an_empty_bucket_nor_refuses_a_stranger() {
        let mut buckets = Buckets::new(Rate::new(20, MINUTE), WAYS);
        while buckets.take(1, at(0)).is_ok() {}
        for name in 2..100_000 {
            assert_eq!(buckets.take(name, at(0)), Ok(()), "a stranger is refused");
        }
        assert!(buckets.take(1, at(0)).is_err(), "the flood has reset the bucket");
        assert_eq!(buckets.sets.len(), 1);
    }

    proptest! {
        /// Whatever the times, in no window do more pass than the burst and what came back in it.
        #[test]
        fn no_window_passes_more_than_burst_and_refill(
            burst in 1_u32..30,
            steps in proptest::collection::vec(0_u64..5_000, 1..300),
        ) {
            let mut buckets = Buckets::new(Rate::new(burst, MINUTE), 64);
            let (mut now, mut passed) = (0, 0_u64);
            for step in steps {
                now += step;
                passed += u64::from(buckets.take(7, at(now)).is_ok());
                prop_assert!(passed <= u64::from(burst) + now * u64::from(burst) / 60_000 + 1);
            }
        }

        /// The wait that a refusal names is enough, and a moment less is not.
        #[test]
        fn the_wait_is_exact(burst in 1_u32..30, start in 0_u64..60_000) {
            let mut buckets = Buckets::new(Rate::new(burst, MINUTE), 64);
            while buckets.take(7, at(0)).is_ok() {}
            if let Err(wait) = buckets.take(7, at(start)) {
                let then = at(start).saturating_add(wait);
                prop_assert!(buckets.take(7, then.saturating_before(Duration::from_nanos(1))).is_err());
                prop_assert!(buckets.take(7, then).is_ok());
            }
        }
    }
}
