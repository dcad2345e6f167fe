//! Snapshots: which transactions a query has seen, as PostgreSQL says it (`txid_current_snapshot()`).
//!
//! Form: `xmin:xmax:xip,xip,…`. A transaction is seen if it is below `xmax` and not among the ones still under way.
//! Numbers are 64 bit and never come round again within one life of a server.

use std::fmt;

/// Longest list of transactions under way that is read; a server has fewer sessions than that.
const MAX_IN_PROGRESS: usize = 65_536;

/// The number of a transaction that changed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionId(u64);

/// Which transactions a query has seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The first number not given out yet, or one below it.
    next: u64,
    /// Under way, ascending, all below `next`.
    in_progress: Box<[u64]>,
}

impl TransactionId {
    /// From the number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
}

impl Snapshot {
    /// Reads PostgreSQL's text; `None` where it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let oldest: u64 = parts.next()?.parse().ok()?;
        let next: u64 = parts.next()?.parse().ok()?;
        let list = parts.next()?;
        let mut in_progress = Vec::new();
        for number in list.split(',').filter(|_| !list.is_empty()) {
            let number: u64 = number.parse().ok()?;
            let ascending = in_progress.last().is_none_or(|last| *last < number);
            if !ascending || number < oldest || number >= next || in_progress.len() >= MAX_IN_PROGRESS {
                return None;
            }
            in_progress.push(number);
        }
        (oldest <= next).then(|| Self { next, in_progress: in_progress.into() })
    }

    /// How far the numbering had come. It never goes back while a server's history goes on.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Whether the transaction had ended when the snapshot was taken.
    pub fn sees(&self, transaction: TransactionId) -> bool {
        transaction.0 < self.next && self.in_progress.binary_search(&transaction.0).is_err()
    }

    /// Whether everything that `other` sees is seen here too.
    pub fn includes(&self, other: &Self) -> bool {
        let unseen_but_seen_there =
            |number: &u64| *number < other.next && other.in_progress.binary_search(number).is_err();
        if self.in_progress.iter().any(unseen_but_seen_there) {
            return false;
        }
        // From `self.next` on nothing is seen here, so there nothing may have ended either.
        let beyond = other.next.saturating_sub(self.next);
        let under_way_beyond = other.in_progress.iter().filter(|number| **number >= self.next).count();
        u64::try_from(under_way_beyond).is_ok_and(|count| count == beyond)
    }
}

/// As it was read.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.in_progress.first().unwrap_or(&self.next), self.next)?;
        for (index, number) in self.in_progress.iter().enumerate() {
            write!(f, "{}{number}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        Snapshot::parse(text).unwrap()
    }

    #[test]
    fn a_transaction_is_seen_once_it_has_ended() {
        let taken = snapshot("10:20:10,14");
        let seen: Vec<u64> = (8..22).filter(|number| taken.sees(TransactionId(*number))).collect();
        assert_eq!(seen, [8, 9, 11, 12, 13, 15, 16, 17, 18, 19]);
    }

    #[test]
    fn what_is_no_snapshot_is_refused() {
        for text in [
            "",
            "1",
            "1:2",
            "a:2:",
            "1:2:x",
            "2:1:",
            "10:20:20",
            "10:20:9",
            "10:20:12,12",
            "10:20:14,12",
            "1:2:,",
        ] {
            assert_eq!(Snapshot::parse(text), None, "{text}");
        }
    }

    #[test]
    fn overlapping_snapshots_include_each_other_only_where_all_is_seen() {
        assert!(snapshot("10:20:").includes(&snapshot("10:20:")));
        assert!(snapshot("20:20:").includes(&snapshot("10:20:14")));
        assert!(!snapshot("10:20:14").includes(&snapshot("20:20:")));
        assert!(!snapshot("10:20:").includes(&snapshot("10:21:")));
        // 20 was under way there, and here it had not begun: neither sees it.
        assert!(snapshot("20:20:").includes(&snapshot("20:21:20")));
        // Each has seen one that the other has not.
        assert!(!snapshot("10:20:10").includes(&snapshot("12:20:12")));
        assert!(!snapshot("12:20:12").includes(&snapshot("10:20:10")));
    }

    fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        (0_u64..30, prop::collection::btree_set(0_u64..30, 0..6)).prop_map(|(next, under_way)| {
            let in_progress: Vec<u64> = under_way.into_iter().filter(|number| *number < next).collect();
            Snapshot { next, in_progress: in_progress.into() }
        })
    }

    fn seen(snapshot: &Snapshot) -> BTreeSet<u64> {
        (0..40).filter(|number| snapshot.sees(TransactionId(*number))).collect()
    }

    proptest! {
        #[test]
        fn includes_is_inclusion_of_what_is_seen(a in any_snapshot(), b in any_snapshot()) {
            prop_assert_eq!(a.includes(&b), seen(&a).is_superset(&seen(&b)));
        }

        #[test]
        fn a_snapshot_is_read_as_it_was_written(taken in any_snapshot()) {
            prop_assert_eq!(Snapshot::parse(&taken.to_string()), Some(taken));
        }

        #[test]
        fn any_text_is_refused_without_a_panic(text in ".{0,60}") {
            let _ = Snapshot::parse(&text);
        }
    }
}
