//! Wrong secrets: how many one client may send on one prefix.
//!
//! The bucket belongs to the prefix *and* the client's address, and there is none for a prefix as a whole: that would be
//! a lock which any stranger could close on the owner. What strangers at many addresses can do to a prefix is bounded by
//! the fair queue before bcrypt ([`crate::domain::turns`]).

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock;
use crate::domain::buckets::{Buckets, Rate};
use crate::domain::key::KeyPrefix;
use crate::domain::source::Source;
use crate::domain::turns::Place;

/// Pairs of prefix and address that are remembered, 24 bytes each.
const MAX_PAIRS: usize = 32_768;

const PERIOD: Duration = Duration::from_mins(1);

/// Who has sent how many wrong secrets. One for the process.
pub struct Attempts {
    /// Never asked for a key that memory knows to be good. `None` where nothing is counted.
    buckets: Option<Mutex<Buckets>>,
    /// Random, so that nobody can choose whose neighbour they are.
    hasher: RandomState,
}

/// One presented key on its way.
pub struct Attempt<'a> {
    /// `None` where it does not count.
    attempts: Option<&'a Arc<Attempts>>,
    prefix: &'a str,
    source: Source,
    charge: Option<Arc<Charge>>,
}

/// A token that was taken before it is known whether the secret is wrong.
pub struct Charge {
    attempts: Arc<Attempts>,
    name: u64,
    is_given_back: AtomicBool,
}

impl Attempts {
    /// So many in a minute; 0 counts nothing.
    pub fn new(per_minute: u32) -> Arc<Self> {
        let buckets =
            (per_minute > 0).then(|| Mutex::new(Buckets::new(Rate::new(per_minute, PERIOD), MAX_PAIRS)));
        Arc::new(Self { buckets, hasher: RandomState::new() })
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Buckets) -> T) -> Option<T> {
        let buckets = self.buckets.as_ref()?;
        Some(ask(&mut buckets.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl<'a> Attempt<'a> {
    /// Nothing is counted yet.
    pub fn new(attempts: Option<&'a Arc<Attempts>>, prefix: &'a str, client: Option<IpAddr>) -> Self {
        Self { attempts, prefix, source: Source::of(client), charge: None }
    }

    /// Who asks.
    pub fn source(&self) -> Source {
        self.source
    }

    /// Whose turn its comparison takes.
    pub fn place(&self) -> Option<Place> {
        KeyPrefix::new(self.prefix).map(|prefix| Place { prefix, source: self.source })
    }

    /// Takes a token before anything is computed, so that guesses at the same time do not all pass; or says how long it
    /// takes until there is one.
    pub fn charge(&mut self) -> Result<(), Duration> {
        let Some(attempts) = self.attempts.filter(|_| self.charge.is_none()) else { return Ok(()) };
        let name = attempts.hasher.hash_one((self.prefix, self.source));
        match attempts.with(|buckets| buckets.take(name, clock::instant())) {
            None => Ok(()),
            Some(Err(wait)) => Err(wait),
            Some(Ok(())) => {
                let (attempts, is_given_back) = (Arc::clone(attempts), AtomicBool::new(false));
                self.charge = Some(Arc::new(Charge { attempts, name, is_given_back }));
                Ok(())
            }
        }
    }

    /// The secret is wrong. If it was not charged yet, it is now.
    pub fn count_wrong(&mut self) -> Result<(), Duration> {
        self.charge()
    }

    /// For the work that goes on when the caller gives up.
    pub fn shared_charge(&self) -> Option<Arc<Charge>> {
        self.charge.clone()
    }

    /// The secret is right, or nobody knows.
    pub fn give_back(&self) {
        if let Some(charge) = &self.charge {
            charge.give_back();
        }
    }
}

impl Charge {
    /// Once, however many say so.
    pub fn give_back(&self) {
        if !self.is_given_back.swap(true, Ordering::Relaxed) {
            self.attempts.with(|buckets| buckets.give_back(self.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt<'a>(attempts: &'a Arc<Attempts>, prefix: &'a str, client: &str) -> Attempt<'a> {
        Attempt::new(Some(attempts), prefix, Some(client.parse().unwrap()))
    }

    #[test]
    fn guesses_from_one_address_leave_other_addresses_and_prefixes_alone() {
        let attempts = Attempts::new(3);
        let guess = |prefix, from| attempt(&attempts, prefix, from).count_wrong();
        for _ in 0..3 {
            assert_eq!(guess("kw_aaaaa", "10.0.0.1"), Ok(()));
        }
        assert!(guess("kw_aaaaa", "10.0.0.1").unwrap_err() <= Duration::from_secs(20));
        assert_eq!(guess("kw_aaaaa", "10.0.0.2"), Ok(()));
        assert_eq!(guess("kw_bbbbb", "10.0.0.1"), Ok(()));
    }

    #[test]
    fn an_attempt_is_counted_once_and_given_back_once() {
        let attempts = Attempts::new(2);
        let new = || attempt(&attempts, "kw_aaaaa", "10.0.0.1");
        let mut first = new();
        first.charge().unwrap();
        first.count_wrong().unwrap();
        let mut second = new();
        second.charge().unwrap();
        assert!(new().charge().is_err());
        let shared = second.shared_charge().unwrap();
        shared.give_back();
        second.give_back();
        assert_eq!(new().charge(), Ok(()));
        assert!(new().charge().is_err(), "given back twice");
    }

    #[test]
    fn zero_counts_nothing() {
        let attempts = Attempts::new(0);
        for _ in 0..1000 {
            Attempt::new(Some(&attempts), "kw_aaaaa", None).charge().unwrap();
        }
    }
}
