//! Shared records: which of those that other replicas read, and left in Redis, may be believed.
//!
//! Nobody can tell by a clock how old such a record is, and whoever wrote it may be long dead. But it says which
//! transactions its query had seen, and a session of the change feed knows which ones it must have seen: all that had
//! ended when the session began to listen, and every change to this prefix or its users that it has heard of since.

use std::collections::HashMap;

use super::change::Change;
use super::snapshot::{Snapshot, TransactionId};
use crate::domain::key::KeyPrefix;
use crate::domain::record::UserId;

/// Which server a record was read from, and what its query had seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// One life of one server: transactions are numbered anew after a restore, and lost ones again after a crash.
    pub incarnation: Box<str>,
    /// What the query had seen.
    pub snapshot: Snapshot,
}

/// What one session of the change feed demands of shared records.
#[derive(Debug)]
pub struct SharedFilter {
    incarnation: Box<str>,
    /// What had ended when listening was on; `None` = unknown, so nothing is accepted.
    horizon: Option<Snapshot>,
    prefixes: HashMap<KeyPrefix, Vec<TransactionId>>,
    users: HashMap<UserId, Vec<TransactionId>>,
    /// Changes remembered, at most `max_changes`.
    remembered: usize,
    max_changes: usize,
}

impl SharedFilter {
    /// For a session that listens since before `horizon` was taken. Remembers at most `max_changes` changes; beyond that
    /// it accepts nothing until it has a new horizon, which makes the old changes superfluous.
    pub fn new(begun: Stamp, max_changes: usize) -> Self {
        Self {
            incarnation: begun.incarnation,
            horizon: Some(begun.snapshot),
            prefixes: HashMap::new(),
            users: HashMap::new(),
            remembered: 0,
            max_changes,
        }
    }

    /// Remembers a change. To be called *before* the change is applied to memory: a reader whose fill the change does not
    /// drop must find it here.
    pub fn note(&mut self, change: &Change) {
        match change {
            Change::Keys { by, prefixes } => {
                for prefix in prefixes {
                    let changes = self.prefixes.entry(prefix.clone()).or_default();
                    self.remembered += remember(changes, *by);
                }
            }
            Change::User { by, id } => {
                self.remembered += remember(self.users.entry(*id).or_default(), *by);
            }
            Change::Anything => self.forget(),
        }
        if self.remembered > self.max_changes {
            self.forget();
        }
    }

    /// Whether the next horizon should be handed in.
    pub fn wants_horizon(&self) -> bool {
        self.horizon.is_none()
    }

    /// A snapshot that was asked for after every change noted so far had been heard of, so that it sees them all.
    pub fn renew(&mut self, horizon: Snapshot) {
        self.forget();
        self.horizon = Some(horizon);
    }

    /// Whether a record of this prefix, with keys of these users, is as new as all that this session knows.
    pub fn accepts(&self, stamp: &Stamp, prefix: &KeyPrefix, users: impl Iterator<Item = UserId>) -> bool {
        let Some(horizon) = &self.horizon else { return false };
        let sees_all = |changes: &Vec<TransactionId>| changes.iter().all(|by| stamp.snapshot.sees(*by));
        stamp.incarnation == self.incarnation
            && stamp.snapshot.includes(horizon)
            && self.prefixes.get(prefix).is_none_or(sees_all)
            && users.filter_map(|user| self.users.get(&user)).all(sees_all)
    }

    fn forget(&mut self) {
        self.horizon = None;
        self.prefixes = HashMap::new();
        self.users = HashMap::new();
        self.remembered = 0;
    }
}

/// How many more are remembered now. A transaction that changes many rows of one prefix is remembered once.
fn remember(changes: &mut Vec<TransactionId>, by: TransactionId) -> usize {
    if changes.contains(&by) {
        return 0;
    }
    changes.push(by);
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(snapshot: &str) -> Stamp {
        Stamp { incarnation: "here".into(), snapshot: Snapshot::parse(snapshot).unwrap() }
    }

    fn prefix(text: &str) -> KeyPrefix {
        KeyPrefix::new(text).unwrap()
    }

    fn keys(by: u64, name: &str) -> Change {
        Change::Keys { by: TransactionId::new(by), prefixes: vec![prefix(name)] }
    }

    fn accepts(filter: &SharedFilter, snapshot: &str) -> bool {
        filter.accepts(&stamp(snapshot), &prefix("kw_aaaaa"), [UserId::new(3)].into_iter())
    }

    #[test]
    fn what_was_read_before_the_session_began_to_listen_is_refused() {
        let filter = SharedFilter::new(stamp("100:110:100"), 10);
        assert!(accepts(&filter, "100:110:100"));
        assert!(accepts(&filter, "120:120:"));
        assert!(!accepts(&filter, "100:109:100"));
        assert!(!accepts(&filter, "100:120:100,105"));
    }

    #[test]
    fn a_change_heard_of_must_have_been_seen() {
        let mut filter = SharedFilter::new(stamp("100:100:"), 10);
        filter.note(&keys(105, "kw_aaaaa"));
        assert!(!accepts(&filter, "100:105:"));
        assert!(!accepts(&filter, "105:110:105"));
        assert!(accepts(&filter, "106:106:"));
        filter.note(&keys(107, "kw_bbbbb"));
        assert!(accepts(&filter, "106:106:"), "another prefix is another matter");
        filter.note(&Change::User { by: TransactionId::new(107), id: UserId::new(3) });
        assert!(!accepts(&filter, "106:106:"));
        assert!(accepts(&filter, "108:108:"));
        // A later change seen does not excuse an earlier one that is not.
        filter.note(&keys(109, "kw_aaaaa"));
        assert!(!accepts(&filter, "105:110:105"));
    }

    #[test]
    fn another_server_or_another_life_of_it_is_refused() {
        let filter = SharedFilter::new(stamp("100:100:"), 10);
        let elsewhere = Stamp { incarnation: "there".into(), ..stamp("200:200:") };
        assert!(!filter.accepts(&elsewhere, &prefix("kw_aaaaa"), std::iter::empty()));
    }

    #[test]
    fn after_an_unlisted_change_nothing_is_accepted_until_a_new_horizon() {
        let mut filter = SharedFilter::new(stamp("100:100:"), 10);
        filter.note(&Change::Anything);
        assert!(filter.wants_horizon() && !accepts(&filter, "500:500:"));
        filter.renew(stamp("300:300:").snapshot);
        assert!(!filter.wants_horizon() && accepts(&filter, "500:500:"));
        assert!(!accepts(&filter, "299:299:"));
    }

    #[test]
    fn more_changes_than_it_remembers_mean_a_new_horizon() {
        let mut filter = SharedFilter::new(stamp("100:100:"), 3);
        for by in 101..104 {
            filter.note(&keys(by, "kw_aaaaa"));
            filter.note(&keys(by, "kw_aaaaa"));
            assert!(!filter.wants_horizon(), "the same change again takes no place");
        }
        filter.note(&keys(104, "kw_aaaaa"));
        assert!(filter.wants_horizon() && !accepts(&filter, "500:500:"));
    }
}
