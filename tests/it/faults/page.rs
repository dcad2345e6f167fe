//! docs/reliability.md: what a run has shown, as a table.

use std::fmt::Write as _;
use std::path::Path;

use crate::truth::history::{Figures, Micros, Millis};

const FILE: &str = "docs/reliability.md";
const BEGIN: &str = "<!-- faults: written by make faults -->\n";
const END: &str = "<!-- /faults -->";
/// Set by `make faults` where all of them are run.
const ASKED: &str = "KEYWARD_FAULTS_WRITE";

/// One fault, or two at once.
pub(crate) struct Row {
    pub(crate) numbers: String,
    pub(crate) what: String,
    pub(crate) may_be_unavailable: bool,
    /// Of keys that are known and valid: how long a check took before, and while the fault was there.
    pub(crate) before: Option<Figures>,
    pub(crate) known: Option<Figures>,
    pub(crate) checks: usize,
    pub(crate) unavailable: usize,
    pub(crate) cold_unavailable: usize,
    pub(crate) cold: usize,
    pub(crate) failed_calls: usize,
    pub(crate) calls: usize,
    pub(crate) wrong: usize,
    pub(crate) recovery: Micros,
    pub(crate) recovered: bool,
}

pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| | fault | checks | wrong | known keys not answered | new keys not answered | through Envoy not 200 | \
         p99 before → while | well again after |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for row in rows {
        let p99 =
            |figures: Option<Figures>| figures.map_or_else(|| "-".into(), |f| Millis(f.p99).to_string());
        let _ = writeln!(
            text,
            "| {} | {} | {} | **{}** | {} | {} of {} | {} of {} | {} → {} ms | {} ms |",
            row.numbers,
            row.what,
            row.checks,
            row.wrong,
            row.unavailable,
            row.cold_unavailable,
            row.cold,
            row.failed_calls,
            row.calls,
            p99(row.before),
            p99(row.known),
            row.recovery / 1000,
        );
    }
    text
}

/// Puts the table into the page.
pub(crate) fn write_if_asked(rows: &[Row]) {
    let Some(circumstances) = std::env::var_os(ASKED) else { return };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the page has a place for the table");
    let (_, after) = rest.split_once(END).expect("the place has an end");
    let table = table(rows);
    let page = format!("{before}{BEGIN}\n{table}\n{}\n{END}{after}", circumstances.display());
    std::fs::write(path, page).unwrap();
}
