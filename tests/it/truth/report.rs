//! The report: what a run has measured, as a table, and whether it has measured enough to mean anything.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use super::fleet::micros;
use super::history::{Figures, History, Interval, Micros, Millis, Outcome, Probe, State, Verdict};

/// From one probe of a key to the next one there may be this much, on a machine that does other things too. A wrong
/// allow that lasts for longer can't go unseen.
const LONGEST_GAP: Micros = 1_000_000;

/// A part of the run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) start: Micros,
    /// The end of the run for the last one.
    pub(crate) end: Micros,
}

/// A run and what is said about it.
pub(crate) struct Report {
    /// One of each name.
    phases: Vec<Phase>,
    /// All of all rounds.
    spans: Vec<Phase>,
    rows: BTreeMap<(usize, State), Row>,
    gaps: Option<Figures>,
    probes: usize,
    pub(crate) verdict: Verdict,
}

#[derive(Default)]
struct Row {
    took: Vec<Micros>,
    /// Given back, or the run over, before a lasting refusal was seen.
    unseen: usize,
    unavailable: usize,
    violations: usize,
}

impl Report {
    /// Judges a history. `mute` are the times in which a replica could not answer as fast as it is asked.
    pub(crate) fn of(history: &History, phases: &[Phase], mute: &[Interval]) -> Self {
        let verdict = history.judge();
        let mut report = Self {
            phases: merged(phases),
            spans: phases.to_vec(),
            rows: BTreeMap::new(),
            gaps: Figures::of(gaps(&history.probes, mute)),
            probes: history.probes.len(),
            verdict: Verdict::default(),
        };
        let place = |at: Micros| {
            let phase = phases.iter().rev().find(|phase| phase.start <= at).map_or("", |phase| phase.name);
            report.phases.iter().position(|known| known.name == phase).unwrap_or(0)
        };
        let mut rows: BTreeMap<(usize, State), Row> = BTreeMap::new();
        // A replica that sleeps has no latency: nobody can ask it. What it says when it wakes up is judged all the same.
        let asleep = |replica, at| {
            mute.iter().any(|mute| {
                mute.state == State::Healthy
                    && mute.replica == replica
                    && (mute.start..mute.end).contains(&at)
            })
        };
        for latency in verdict.latencies.iter().filter(|latency| !asleep(latency.replica, latency.revoked_at))
        {
            let row = rows.entry((place(latency.revoked_at), latency.state)).or_default();
            match latency.took {
                Some(took) => row.took.push(took),
                None => row.unseen += 1,
            }
        }
        for violation in &verdict.violations {
            let row = rows.entry((place(violation.probe.start), violation.deadline.state)).or_default();
            row.violations += 1;
        }
        for probe in history.probes.iter().filter(|probe| probe.outcome == Outcome::Unavailable) {
            let state = history.worst(probe.replica, probe.start, probe.end);
            rows.entry((place(probe.start), state)).or_default().unavailable += 1;
        }
        report.rows = rows;
        report.verdict = verdict;
        report
    }

    /// How many revocations were measured in a phase while a replica was in this state.
    pub(crate) fn measured(&self, phase: &str, state: State) -> usize {
        let rows = self.rows.iter().filter(|((at, of), _)| self.phases[*at].name == phase && *of == state);
        rows.map(|(_, row)| row.took.len()).sum()
    }

    /// The longest that a revocation of a phase took on a replica.
    pub(crate) fn longest(&self, phase: &str, replica: usize) -> Micros {
        let spans = self.spans.iter().filter(|span| span.name == phase);
        let took = spans.flat_map(|span| {
            let within = self.verdict.latencies.iter().filter(|latency| {
                latency.replica == replica && (span.start..span.end).contains(&latency.revoked_at)
            });
            within.filter_map(|latency| latency.took)
        });
        took.max().unwrap_or(0)
    }

    /// Panics with everything that is wrong.
    pub(crate) fn assert_flawless(&self) {
        let mut said = String::new();
        for violation in self.verdict.violations.iter().take(20) {
            let _ = writeln!(said, "{violation}");
        }
        let count = self.verdict.violations.len();
        assert!(count == 0, "{count} answers were wrong:\n{said}");
        let gaps = self.gaps.expect("keys were probed");
        assert!(gaps.max <= LONGEST_GAP, "a key was not probed for {} ms", Millis(gaps.max));
    }
}

/// Phases of one name are one row, where there are several rounds.
fn merged(phases: &[Phase]) -> Vec<Phase> {
    let mut merged: Vec<Phase> = Vec::new();
    for phase in phases {
        if !merged.iter().any(|known| known.name == phase.name) {
            merged.push(*phase);
        }
    }
    merged
}

/// The times between two probes of one key on one replica.
fn gaps(probes: &[Probe], mute: &[Interval]) -> Vec<Micros> {
    let mut starts: BTreeMap<(usize, usize), Vec<Micros>> = BTreeMap::new();
    for probe in probes {
        starts.entry((probe.replica, probe.key)).or_default().push(probe.start);
    }
    // What was due in a mute time is caught up with soon after it.
    let caught_up = micros(std::time::Duration::from_secs(1));
    let mut gaps = Vec::new();
    for ((replica, _), mut starts) in starts {
        starts.sort_unstable();
        let heard = starts.windows(2).map(|pair| (pair[0], pair[1])).filter(|(from, to)| {
            !mute
                .iter()
                .any(|mute| mute.replica == replica && mute.start <= *to && *from <= mute.end + caught_up)
        });
        gaps.extend(heard.map(|(from, to)| to - from));
    }
    gaps
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<20} {:<11} {:>11} {:>10} {:>10} {:>10} {:>7} {:>6} {:>10}",
            "phase", "state", "revocations", "p50 ms", "p99 ms", "max ms", "unseen", "503", "violations"
        )?;
        let mut all = Row::default();
        for ((phase, state), row) in &self.rows {
            let state = format!("{state:?}");
            line(f, self.phases[*phase].name, &state, row)?;
            all.took.extend(&row.took);
            all.unseen += row.unseen;
            all.unavailable += row.unavailable;
            all.violations += row.violations;
        }
        line(f, "total", "", &all)?;
        if let Some(gaps) = self.gaps {
            let (p50, p99, max) = (Millis(gaps.p50), Millis(gaps.p99), Millis(gaps.max));
            write!(f, "{} probes; between two of a key on a replica: ", self.probes)?;
            writeln!(f, "p50 {p50} ms, p99 {p99} ms, max {max} ms")?;
        }
        Ok(())
    }
}

fn line(f: &mut fmt::Formatter<'_>, phase: &str, state: &str, row: &Row) -> fmt::Result {
    let figures = Figures::of(row.took.clone());
    let shown = |figure: fn(Figures) -> Micros| {
        figures.map_or_else(|| "-".to_owned(), |figures| Millis(figure(figures)).to_string())
    };
    writeln!(
        f,
        "{phase:<20} {state:<11} {:>11} {:>10} {:>10} {:>10} {:>7} {:>6} {:>10}",
        row.took.len(),
        shown(|figures| figures.p50),
        shown(|figures| figures.p99),
        shown(|figures| figures.max),
        row.unseen,
        row.unavailable,
        row.violations
    )
}
