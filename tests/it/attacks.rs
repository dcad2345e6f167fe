//! docs/attacks.md says what is tried and which test holds it; that this is true is held here.

use std::collections::BTreeSet;
use std::path::Path;

/// How many cases each letter has.
const CASES: [(&str, usize); 11] = [
    ("A", 22),
    ("B", 27),
    ("C", 19),
    ("D", 34),
    ("E", 11),
    ("F", 8),
    ("G", 8),
    ("H", 13),
    ("I", 11),
    ("J", 11),
    ("K", 9),
];
const FAULTS: usize = 57;

struct Row {
    number: String,
    held_by: String,
}

impl Row {
    fn tests(&self) -> impl Iterator<Item = (&str, &str)> {
        self.held_by.split('`').filter_map(|word| word.split_once("::"))
    }

    fn is_held(&self) -> bool {
        self.tests().next().is_some()
    }
}

fn page() -> String {
    std::fs::read_to_string(root().join("docs/attacks.md")).unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every row that begins with a number.
fn rows(page: &str) -> Vec<Row> {
    let cells = page.lines().filter_map(|line| {
        let cells: Vec<&str> = line.strip_prefix("| ")?.strip_suffix(" |")?.split(" | ").collect();
        let number = *cells.first()?;
        let is_number = number.starts_with(|first: char| first.is_ascii_uppercase())
            && number.len() > 1
            && number[1..].bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| Row { number: number.to_owned(), held_by: (*cells.last().unwrap()).to_owned() })
    });
    cells.collect()
}

#[test]
fn every_case_is_listed_once_in_its_order() {
    let attacks =
        CASES.iter().flat_map(|(letter, count)| (1..=*count).map(move |at| format!("{letter}{at}")));
    let expected: Vec<String> = attacks.chain((1..=FAULTS).map(|at| format!("X{at}"))).collect();
    let listed: Vec<String> = rows(&page()).into_iter().map(|row| row.number).collect();
    assert_eq!(listed, expected);
}

#[test]
fn every_test_that_is_named_is_there() {
    for row in rows(&page()) {
        assert!(
            row.is_held() || row.held_by.starts_with("none"),
            "{}: neither a test nor a reason",
            row.number
        );
        for (file, function) in row.tests() {
            let path =
                if file.starts_with("src/") { root().join(file) } else { root().join("tests/it").join(file) };
            let text = std::fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {file}: {error}", row.number));
            let is_there = text.contains(&format!("fn {function}("));
            assert!(is_there, "{}: {file} has no {function}", row.number);
        }
    }
}

#[test]
fn the_counts_at_the_head_are_those_of_the_tables() {
    let page = page();
    let (faults, attacks): (Vec<Row>, Vec<Row>) =
        rows(&page).into_iter().partition(|row| row.number.starts_with('X'));
    let said = |rows: &[Row], what| {
        let held = rows.iter().filter(|row| row.is_held()).count();
        format!("{} {what}: {held} with a test, {} without.", rows.len(), rows.len() - held)
    };
    let expected = format!("{} {}", said(&attacks, "attacks"), said(&faults, "faults"));
    assert!(page.contains(&expected), "the head should say: {expected}");
    // A test that is named for everything holds nothing.
    let tests: BTreeSet<_> =
        attacks.iter().flat_map(|row| row.tests().map(|(_, test)| test.to_owned())).collect();
    assert!(tests.len() > 100, "{} tests for all attacks", tests.len());
}
