//! Who is next: a bounded queue that is fair between prefixes, and inside a prefix between clients.
//!
//! Prefixes take turns, one job each; inside a prefix its clients do. So guesses on one prefix delay another prefix's
//! first verification by one job, and guesses from one address delay another address's by one. Where the queue is full, a
//! newcomer takes the place of the last job of whoever has most waiting, so that a full queue can't be held shut by one.

use std::collections::VecDeque;

use super::key::KeyPrefix;
use super::source::Source;

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub struct TurnLimits {
    /// In all.
    pub total: usize,
    /// Behind one prefix.
    pub per_prefix: usize,
}

/// Whose turn a job takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The prefix whose candidate is compared.
    pub prefix: KeyPrefix,
    /// Who asks.
    pub source: Source,
}

/// What is waiting.
#[derive(Debug)]
pub struct Turns<J> {
    limits: TurnLimits,
    length: usize,
    /// The front is next. A lane is never empty.
    prefixes: VecDeque<(KeyPrefix, Lane<J>)>,
}

#[derive(Debug)]
struct Lane<J> {
    length: usize,
    /// The same again.
    sources: VecDeque<(Source, VecDeque<J>)>,
}

/// No place, and nobody who has to give theirs up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full<J>(pub J);

impl<J> Turns<J> {
    /// Nothing waits.
    pub fn new(limits: TurnLimits) -> Self {
        Self { limits, length: 0, prefixes: VecDeque::new() }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Puts a job at the end of its line; returned is the job that had to make room for it.
    pub fn push(&mut self, place: Place, job: J) -> Result<Option<J>, Full<J>> {
        let Place { prefix, source } = place;
        let own = self.prefixes.iter().position(|(other, _)| *other == prefix);
        let behind_prefix = own.and_then(|at| self.prefixes.get(at)).map_or(0, |(_, lane)| lane.length);
        let displaced = if behind_prefix >= self.limits.per_prefix {
            let lane = own.and_then(|at| self.prefixes.get_mut(at)).map(|(_, lane)| lane);
            match lane.and_then(|lane| lane.displace_for(source)) {
                None => return Err(Full(job)),
                displaced => displaced,
            }
        } else if self.length >= self.limits.total {
            match self.displace_for(&prefix, behind_prefix, source) {
                None => return Err(Full(job)),
                displaced => displaced,
            }
        } else {
            None
        };
        if displaced.is_none() {
            self.length = self.length.saturating_add(1);
        }
        // What made room may have been the last of its lane, which is gone then.
        if let Some((_, lane)) = self.prefixes.iter_mut().find(|(other, _)| *other == prefix) {
            lane.push(source, job);
        } else {
            let mut lane = Lane { length: 0, sources: VecDeque::new() };
            lane.push(source, job);
            self.prefixes.push_back((prefix, lane));
        }
        Ok(displaced)
    }

    /// The next job.
    pub fn pop(&mut self) -> Option<J> {
        let (prefix, mut lane) = self.prefixes.pop_front()?;
        let job = lane.pop();
        if lane.length > 0 {
            self.prefixes.push_back((prefix, lane));
        }
        self.length = self.length.saturating_sub(usize::from(job.is_some()));
        job
    }

    fn displace_for(&mut self, prefix: &KeyPrefix, own: usize, source: Source) -> Option<J> {
        let (longest, lane) = self.prefixes.iter_mut().max_by_key(|(_, lane)| lane.length)?;
        if longest == prefix {
            return lane.displace_for(source);
        }
        (lane.length > own.saturating_add(1)).then(|| lane.pop_last_of_longest()).flatten()
    }
}

impl<J> Lane<J> {
    fn push(&mut self, source: Source, job: J) {
        self.length = self.length.saturating_add(1);
        match self.sources.iter_mut().find(|(other, _)| *other == source) {
            Some((_, jobs)) => jobs.push_back(job),
            None => self.sources.push_back((source, VecDeque::from([job]))),
        }
    }

    fn pop(&mut self) -> Option<J> {
        let (source, mut jobs) = self.sources.pop_front()?;
        let job = jobs.pop_front()?;
        if !jobs.is_empty() {
            self.sources.push_back((source, jobs));
        }
        self.length = self.length.saturating_sub(1);
        Some(job)
    }

    fn displace_for(&mut self, source: Source) -> Option<J> {
        let own = self.sources.iter().find(|(other, _)| *other == source).map_or(0, |(_, jobs)| jobs.len());
        let longest = self.sources.iter().map(|(_, jobs)| jobs.len()).max()?;
        (longest > own.saturating_add(1)).then(|| self.pop_last_of_longest()).flatten()
    }

    /// Whoever has most waiting loses what they asked for last.
    fn pop_last_of_longest(&mut self) -> Option<J> {
        let at = self.sources.iter().enumerate().max_by_key(|(_, (_, jobs))| jobs.len()).map(|(at, _)| at)?;
        let (_, jobs) = self.sources.get_mut(at)?;
        let job = jobs.pop_back()?;
        if jobs.is_empty() {
            self.sources.remove(at);
        }
        self.length = self.length.saturating_sub(1);
        Some(job)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use proptest::prelude::*;

    use super::*;

    fn place(prefix: u8, client: u8) -> Place {
        let client = IpAddr::V4(Ipv4Addr::new(10, 0, 0, client));
        Place { prefix: KeyPrefix::new(&format!("kw_{prefix}")).unwrap(), source: Source::of(Some(client)) }
    }

    fn turns(total: usize, per_prefix: usize) -> Turns<(u8, u8, u32)> {
        Turns::new(TurnLimits { total, per_prefix })
    }

    fn flood(turns: &mut Turns<(u8, u8, u32)>, prefix: u8, client: u8) {
        for number in 0..1000 {
            let _ = turns.push(place(prefix, client), (prefix, client, number));
        }
    }

    #[test]
    fn guesses_on_one_prefix_delay_another_by_one_turn() {
        let mut turns = turns(64, 16);
        flood(&mut turns, 1, 1);
        assert_eq!(turns.len(), 16);
        turns.push(place(2, 2), (2, 2, 0)).unwrap();
        assert_eq!(turns.pop(), Some((1, 1, 0)));
        assert_eq!(turns.pop(), Some((2, 2, 0)));
    }

    #[test]
    fn guesses_from_one_address_delay_the_owner_at_another_by_one_turn() {
        let mut turns = turns(64, 16);
        flood(&mut turns, 1, 1);
        assert!(turns.push(place(1, 2), (1, 2, 0)).unwrap().is_some(), "the flood makes room");
        assert_eq!(turns.pop(), Some((1, 1, 0)));
        assert_eq!(turns.pop(), Some((1, 2, 0)));
    }

    #[test]
    fn a_full_queue_makes_room_for_a_prefix_that_has_less_waiting() {
        let mut turns = turns(32, 16);
        flood(&mut turns, 1, 1);
        flood(&mut turns, 2, 1);
        assert_eq!(turns.len(), 32);
        assert!(turns.push(place(3, 1), (3, 1, 0)).unwrap().is_some());
        assert_eq!((turns.len(), turns.push(place(1, 1), (1, 1, 9)).is_err()), (32, true));
    }

    proptest! {
        /// No job is lost or doubled, no bound is passed, and whoever is served twice was not ahead of one who waited all
        /// the while.
        #[test]
        fn bounds_hold_and_nobody_is_served_twice_before_one_who_waits(
            asks in proptest::collection::vec((0_u8..6, 0_u8..4, any::<bool>()), 1..400),
        ) {
            let mut turns = turns(12, 5);
            let (mut waiting, mut served): (Vec<(u8, u8, u32)>, Vec<u8>) = (Vec::new(), Vec::new());
            for (number, (prefix, client, pops)) in (0_u32..).zip(asks) {
                let job = (prefix, client, number);
                if let Ok(displaced) = turns.push(place(prefix, client), job) {
                    waiting.push(job);
                    if let Some(displaced) = displaced {
                        prop_assert!(waiting.contains(&displaced));
                        waiting.retain(|other| *other != displaced);
                    }
                }
                prop_assert!(turns.len() == waiting.len() && turns.len() <= 12);
                prop_assert_eq!(turns.is_empty(), waiting.is_empty());
                for prefix in 0..6 {
                    prop_assert!(waiting.iter().filter(|(own, ..)| *own == prefix).count() <= 5);
                }
                if pops && let Some(job) = turns.pop() {
                    prop_assert!(waiting.contains(&job));
                    waiting.retain(|other| *other != job);
                    served.push(job.0);
                }
            }
            // With nobody new, six prefixes at most take turns: the same one does not come again before the others.
            let mut order = Vec::new();
            while let Some(job) = turns.pop() {
                order.push(job.0);
                waiting.retain(|other| *other != job);
            }
            prop_assert!(waiting.is_empty());
            for (at, prefix) in order.iter().enumerate() {
                let again = order[at + 1..].iter().position(|other| other == prefix);
                let until = again.map_or(order.len(), |again| at + 1 + again);
                let between = &order[at + 1..until];
                for later in &order[until.min(order.len())..] {
                    prop_assert!(again.is_none() || between.contains(later) || later == prefix);
                }
            }
        }
    }
}
