//! PostgreSQL's snapshots, one a line, against sets of numbers.

use std::collections::BTreeSet;

use keyward::domain::freshness::snapshot::{Snapshot, TransactionId};

use super::lines;

pub(crate) fn run(data: &[u8]) {
    let Some((one, other)) = lines(data) else { return };
    let (Some(one), Some(other)) = (read(one), read(other)) else { return };
    // Up to where the fuzzer's numbers usually end; beyond it, all of them are alike.
    let end = one.0.position().max(other.0.position());
    if end > 4096 {
        let _ = one.0.includes(&other.0);
        return;
    }
    let seen = |(_, seen): &(Snapshot, Naive)| {
        (0..=end).filter(|number| seen.sees(*number)).collect::<BTreeSet<_>>()
    };
    let (by_one, by_other) = (seen(&one), seen(&other));
    for number in 0..=end {
        assert_eq!(one.0.sees(TransactionId::new(number)), by_one.contains(&number), "{number}");
    }
    assert_eq!(one.0.includes(&other.0), by_other.is_subset(&by_one), "{} and {}", one.0, other.0);
}

struct Naive {
    next: u64,
    in_progress: BTreeSet<u64>,
}

impl Naive {
    fn sees(&self, number: u64) -> bool {
        number < self.next && !self.in_progress.contains(&number)
    }
}

/// Both readings of one text, which have to agree on whether it is one.
fn read(text: &str) -> Option<(Snapshot, Naive)> {
    let parsed = Snapshot::parse(text);
    let naive = naive(text);
    assert_eq!(parsed.is_some(), naive.is_some(), "{text:?}");
    let parsed = parsed?;
    assert_eq!(Snapshot::parse(&parsed.to_string()).as_ref(), Some(&parsed), "what is printed is read again");
    Some((parsed, naive?))
}

fn naive(text: &str) -> Option<Naive> {
    let parts: Vec<&str> = text.split(':').collect();
    let [oldest, next, list] = parts.as_slice() else { return None };
    let (oldest, next): (u64, u64) = (oldest.parse().ok()?, next.parse().ok()?);
    let mut numbers: Vec<u64> = Vec::new();
    if !list.is_empty() {
        for number in list.split(',') {
            numbers.push(number.parse().ok()?);
        }
    }
    let in_progress: BTreeSet<u64> = numbers.iter().copied().collect();
    let ascending = numbers.iter().eq(in_progress.iter());
    let within = numbers.iter().all(|number| (oldest..next).contains(number));
    (oldest <= next && ascending && within).then_some(Naive { next, in_progress })
}
