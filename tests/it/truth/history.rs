//! History: what was asked and answered, what was changed and what was broken, held against the bounds.
//!
//! Pure, so that the judge itself can be judged: it is fed bad histories by hand and has to find what is wrong with
//! them. All moments are microseconds of one monotonic clock, the test's own. Every doubt is resolved in favour of the
//! program under test: a change counts from the moment at which its reply arrived, a probe from the moment before it
//! was sent. What is flagged is therefore wrong on any reading.

use std::collections::BTreeMap;
use std::fmt;

/// Microseconds since the run began.
pub(crate) type Micros = u64;

/// After a fault has ended, its looser bound holds for this much longer.
pub(crate) const RECOVERY: Micros = 5_000_000;

/// What a caller of a check hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Allow,
    /// 401 or 403.
    Refused,
    /// 503.
    Unavailable,
    /// No answer that Envoy would understand.
    Other,
}

/// One check of one key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Probe {
    pub(crate) replica: usize,
    pub(crate) key: usize,
    /// Before it was sent.
    pub(crate) start: Micros,
    /// After its answer had arrived.
    pub(crate) end: Micros,
    pub(crate) outcome: Outcome,
}

/// What a change means for one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Create,
    Restore,
    Revoke,
}

/// A committed change.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operation {
    pub(crate) key: usize,
    /// Before the commit was sent.
    pub(crate) start: Micros,
    /// After its reply had arrived.
    pub(crate) end: Micros,
    pub(crate) effect: Effect,
}

/// How well a replica can know of changes, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    Healthy,
    /// The feed is dead, silent or late; Postgres can be asked.
    FeedSilent,
    /// Postgres can't be asked either.
    CutOff,
}

/// A time in which a replica was worse than healthy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Interval {
    pub(crate) replica: usize,
    pub(crate) state: State,
    pub(crate) start: Micros,
    pub(crate) end: Micros,
}

/// What one replica promises.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// From a revocation to its effect.
    pub(crate) healthy: Micros,
    pub(crate) feed_silent: Micros,
    pub(crate) cut_off: Micros,
    /// From a restored or new key to its effect, while healthy; in a worse state at least as long as a revocation.
    pub(crate) activation: Micros,
}

impl Bounds {
    pub(crate) fn revocation(&self, state: State) -> Micros {
        match state {
            State::Healthy => self.healthy,
            State::FeedSilent => self.feed_silent,
            State::CutOff => self.cut_off,
        }
    }

    fn of(&self, effect: Effect, state: State) -> Micros {
        match effect {
            Effect::Revoke => self.revocation(state),
            Effect::Create | Effect::Restore => self.revocation(state).max(self.activation),
        }
    }
}

/// Everything that happened.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) probes: Vec<Probe>,
    pub(crate) operations: Vec<Operation>,
    pub(crate) faults: Vec<Interval>,
    /// One for each replica.
    pub(crate) bounds: Vec<Bounds>,
}

/// An answer that was wrong on any reading.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Violation {
    pub(crate) probe: Probe,
    /// The change that the answer ignores.
    pub(crate) ignored: Operation,
    /// From when on it had to be obeyed.
    pub(crate) deadline: Deadline,
}

/// How long one revocation took on one replica.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) replica: usize,
    /// The worst state that the replica was in meanwhile.
    pub(crate) state: State,
    pub(crate) revoked_at: Micros,
    /// `None` where the key was restored, or the run ended, before a lasting refusal was seen.
    pub(crate) took: Option<Micros>,
}

/// What is to be said about a history.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub(crate) violations: Vec<Violation>,
    pub(crate) latencies: Vec<Latency>,
}

/// Where a bound ends, and which state makes it so.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Micros,
    pub(crate) state: State,
}

impl History {
    /// Judges all probes; sorting is the most expensive part.
    pub(crate) fn judge(&self) -> Verdict {
        let mut operations: BTreeMap<usize, Vec<Operation>> = BTreeMap::new();
        for operation in &self.operations {
            operations.entry(operation.key).or_default().push(*operation);
        }
        for (key, operations) in &mut operations {
            operations.sort_by_key(|operation| operation.start);
            let overlap = operations.windows(2).any(|pair| pair[0].end > pair[1].start);
            assert!(!overlap, "changes of key {key} overlap, so that nobody can tell which one was last");
        }
        let mut probes: BTreeMap<(usize, usize), Vec<Probe>> = BTreeMap::new();
        for probe in &self.probes {
            probes.entry((probe.replica, probe.key)).or_default().push(*probe);
        }
        let mut verdict = Verdict::default();
        for ((replica, key), mut probes) in probes {
            let Some(operations) = operations.get(&key) else { continue };
            probes.sort_by_key(|probe| probe.start);
            let deadlines = self.deadlines(replica, operations);
            verdict.violations.extend(probes.iter().filter_map(|probe| wrong(probe, operations, &deadlines)));
            self.measure(replica, operations, &probes, &mut verdict.latencies);
        }
        verdict.violations.sort_by_key(|violation| violation.probe.start);
        verdict
    }

    /// From when on each change has to be obeyed, and which change of a row of equal ones says so: a key that is
    /// revoked twice has to be refused from the first deadline on.
    fn deadlines(&self, replica: usize, operations: &[Operation]) -> Vec<(Operation, Deadline)> {
        let mut deadlines: Vec<(Operation, Deadline)> = Vec::with_capacity(operations.len());
        for operation in operations {
            let own = (*operation, self.deadline(replica, operation));
            let earlier = deadlines
                .last()
                .filter(|(before, _)| is_revoke(before) == is_revoke(operation))
                .filter(|(_, deadline)| deadline.at <= own.1.at);
            deadlines.push(earlier.copied().unwrap_or(own));
        }
        deadlines
    }

    /// The bound is that of the worst state on the way. A fault that begins after the bound excuses nothing.
    fn deadline(&self, replica: usize, operation: &Operation) -> Deadline {
        let bounds = &self.bounds[replica];
        let since = operation.end;
        let bound = |state| since + bounds.of(operation.effect, state);
        let mut deadline = Deadline { at: bound(State::Healthy), state: State::Healthy };
        // In the order of their beginnings, as each may make room for the next one.
        let mut faults: Vec<&Interval> =
            self.faults.iter().filter(|fault| fault.replica == replica).collect();
        faults.sort_by_key(|fault| fault.start);
        for fault in faults {
            let overlaps = fault.start <= deadline.at && since <= fault.end + RECOVERY;
            if overlaps && fault.state > deadline.state {
                deadline = Deadline { at: bound(fault.state).max(deadline.at), state: fault.state };
            }
        }
        deadline
    }

    /// The time from each revocation to the first refusal that no allow follows until the key is restored.
    fn measure(&self, replica: usize, operations: &[Operation], probes: &[Probe], into: &mut Vec<Latency>) {
        for (index, operation) in operations.iter().enumerate() {
            let again = index.checked_sub(1).is_some_and(|before| is_revoke(&operations[before]));
            if !is_revoke(operation) || again {
                continue;
            }
            let restored = operations[index..].iter().find(|later| !is_revoke(later));
            let until = restored.map_or(Micros::MAX, |restored| restored.start);
            let first = probes.partition_point(|probe| probe.start < operation.start);
            let after: Vec<&Probe> = probes[first..]
                .iter()
                .take_while(|probe| probe.start < until)
                .filter(|probe| probe.end <= until)
                .collect();
            if after.is_empty() {
                continue;
            }
            let last_allow = after.iter().rposition(|probe| probe.outcome == Outcome::Allow);
            let lasting = &after[last_allow.map_or(0, |last| last + 1)..];
            let effect = lasting
                .iter()
                .find(|probe| matches!(probe.outcome, Outcome::Refused | Outcome::Unavailable))
                .map(|probe| probe.start.max(operation.end));
            into.push(Latency {
                replica,
                state: self.worst(replica, operation.end, effect.unwrap_or(until)),
                revoked_at: operation.end,
                took: effect.map(|effect| effect - operation.end),
            });
        }
    }

    /// The worst state of a replica in this time, recovery included.
    pub(crate) fn worst(&self, replica: usize, from: Micros, to: Micros) -> State {
        let overlapping = self.faults.iter().filter(|fault| {
            fault.replica == replica && fault.start <= to && from <= fault.end.saturating_add(RECOVERY)
        });
        overlapping.map(|fault| fault.state).max().unwrap_or(State::Healthy)
    }
}

fn is_revoke(operation: &Operation) -> bool {
    operation.effect == Effect::Revoke
}

/// Only the last change that had begun before the answer arrived can be held against it: an answer may be as new as
/// its arrival.
fn wrong(probe: &Probe, operations: &[Operation], deadlines: &[(Operation, Deadline)]) -> Option<Violation> {
    let last = operations.partition_point(|operation| operation.start < probe.end).checked_sub(1)?;
    let (ignored, deadline) = deadlines[last];
    let contradicts = match probe.outcome {
        Outcome::Allow => is_revoke(&ignored),
        Outcome::Refused => !is_revoke(&ignored),
        Outcome::Unavailable | Outcome::Other => false,
    };
    (contradicts && probe.start >= deadline.at).then_some(Violation { probe: *probe, ignored, deadline })
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { probe, ignored, deadline } = self;
        write!(
            f,
            "replica {} answered {:?} for key {} to a probe from {} to {} ms: {} ms after {:?} from {} to {} ms, \
             which had to be obeyed from {} ms on ({:?})",
            probe.replica,
            probe.outcome,
            probe.key,
            Millis(probe.start),
            Millis(probe.end),
            Millis(probe.start.saturating_sub(ignored.end)),
            ignored.effect,
            Millis(ignored.start),
            Millis(ignored.end),
            Millis(deadline.at),
            deadline.state,
        )
    }
}

/// Microseconds, shown as milliseconds.
pub(crate) struct Millis(pub(crate) Micros);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}.{:03}", self.0 / 1000, self.0 % 1000))
    }
}

/// How a number of measurements is spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) count: usize,
    pub(crate) p50: Micros,
    pub(crate) p99: Micros,
    pub(crate) max: Micros,
}

impl Figures {
    /// `None` of nothing.
    pub(crate) fn of(mut values: Vec<Micros>) -> Option<Self> {
        values.sort_unstable();
        let count = values.len();
        // Nearest rank: the smallest value that so many percent do not exceed.
        let rank = |percent: usize| values.get((count * percent).div_ceil(100).checked_sub(1)?).copied();
        Some(Self { count, p50: rank(50)?, p99: rank(99)?, max: *values.last()? })
    }
}
