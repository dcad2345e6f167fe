//! The deny file, against a plain reading; and lines that come and go.

use std::collections::BTreeSet;

use keyward::domain::deny_list::{DenyEntry, DenyList, with_line, without_lines};
use keyward::domain::key::PrefixLength;
use keyward::domain::record::KeyId;

const LENGTH: PrefixLength = PrefixLength::DEFAULT;

pub(crate) fn run(data: &[u8]) {
    let parsed = DenyList::parse(data, LENGTH);
    let Some(wanted) = naive(data) else {
        let defect = parsed.expect_err("a line that can't be read").to_string();
        assert!(!defect.is_empty());
        return;
    };
    let list = parsed.expect("every line can be read");
    let entries = list.entries();
    let shown: BTreeSet<String> = entries.iter().map(ToString::to_string).collect();
    assert_eq!((shown, entries.len()), (wanted, list.len()));
    let text = std::str::from_utf8(data).expect("a list is text");
    let written: String = entries.iter().map(|entry| format!("{entry}\n")).collect();
    assert_eq!(DenyList::parse(written.as_bytes(), LENGTH).as_ref(), Ok(&list), "what is written is read");

    let new = DenyEntry::Key(KeyId::new(4_711));
    let more = DenyList::parse(with_line(text, &new).as_bytes(), LENGTH).expect("one line more");
    let expected: BTreeSet<_> = entries.iter().chain([&new]).cloned().collect();
    assert_eq!(more.entries(), expected.into_iter().collect::<Vec<_>>());
    for entry in entries.iter().take(3) {
        let fewer =
            DenyList::parse(without_lines(text, entry, LENGTH).as_bytes(), LENGTH).expect("fewer lines");
        let expected: Vec<_> = entries.iter().filter(|own| *own != entry).cloned().collect();
        assert_eq!(fewer.entries(), expected, "without {entry}");
    }
}

/// The entries as lines; `None` where a line is none.
fn naive(data: &[u8]) -> Option<BTreeSet<String>> {
    let text = std::str::from_utf8(data).ok()?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut entries = BTreeSet::new();
    for line in text.split('\n') {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            [comment, ..] if comment.starts_with('#') => {}
            [kind, entry, rest @ ..] if rest.first().is_none_or(|word| word.starts_with('#')) => {
                let is_prefix = entry.len() == 8
                    && entry.bytes().all(|byte| (0x21..=0x7e).contains(&byte) && !b",!".contains(&byte));
                match *kind {
                    "key-id" => drop(entries.insert(format!("key-id {}", entry.parse::<i64>().ok()?))),
                    "prefix" if is_prefix => drop(entries.insert(format!("prefix {entry}"))),
                    _ => return None,
                }
            }
            _ => return None,
        }
    }
    Some(entries)
}
