//! The emergency deny list: keys that are refused whatever their record says.
//!
//! Its text form has one entry a line, `key-id 42` or `prefix kw_abcde`, and comments behind `#`. A text with a line that
//! can't be read is refused as a whole: a misspelt entry that is skipped would let in whom it was meant to keep out.
//! Nothing here repeats what a bad line holds, because somebody in a hurry may have pasted a whole key.

use std::collections::HashSet;
use std::fmt;

use thiserror::Error;

use super::key::{KeyPrefix, PrefixLength, is_key_byte};
use super::record::{KeyId, KeyRecord};

/// Most entries of one list: far more than an emergency names, few enough to copy the list at each change.
pub const MAX_ENTRIES: usize = 100_000;

/// Largest text that is read: the entries with the longest prefixes, and about as much again for comments.
pub const MAX_BYTES: usize = 8 << 20;

/// Most bad lines that an error names; whoever mends those sees the next ones.
const MAX_NAMED_LINES: usize = 10;

/// One line of the list.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DenyEntry {
    /// One key.
    Key(KeyId),
    /// Every key with this prefix.
    Prefix(KeyPrefix),
}

impl DenyEntry {
    /// Every key with this prefix; a text that is the prefix of no key is refused.
    pub fn prefix(text: &str, length: PrefixLength) -> Result<Self, LineDefect> {
        if !text.bytes().all(is_key_byte) {
            return Err(LineDefect::Characters);
        }
        match KeyPrefix::new(text) {
            Some(prefix) if text.len() == length.get() => Ok(Self::Prefix(prefix)),
            _ => Err(LineDefect::Length { expected: length.get(), found: text.len() }),
        }
    }

    /// What a line says; `None` for a blank line or a comment.
    fn from_line(line: &str, length: PrefixLength) -> Result<Option<Self>, LineDefect> {
        let is_comment = |word: &str| word.starts_with('#');
        let mut words = line.split_whitespace();
        let Some(kind) = words.next().filter(|word| !is_comment(word)) else {
            return Ok(None);
        };
        // The second word is taken as it is: a prefix may begin with `#`.
        let entry = match (kind, words.next()) {
            ("key-id", Some(id)) => {
                id.parse().map(KeyId::new).map(Self::Key).map_err(|_| LineDefect::KeyId)?
            }
            ("prefix", Some(prefix)) => Self::prefix(prefix, length)?,
            _ => return Err(LineDefect::Form),
        };
        if words.next().is_none_or(is_comment) { Ok(Some(entry)) } else { Err(LineDefect::Form) }
    }
}

/// The line that says this.
impl fmt::Display for DenyEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(id) => write!(f, "key-id {id}"),
            Self::Prefix(prefix) => write!(f, "prefix {}", prefix.as_str()),
        }
    }
}

/// Keys that are refused.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DenyList {
    keys: HashSet<KeyId>,
    prefixes: HashSet<KeyPrefix>,
}

impl DenyList {
    /// Reads the text form.
    pub fn parse(text: &[u8], length: PrefixLength) -> Result<Self, DenyListError> {
        if text.len() > MAX_BYTES {
            return Err(DenyListError::TooLarge);
        }
        let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text);
        let mut list = Self::default();
        let mut defects = Vec::new();
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let entry = std::str::from_utf8(line).map_err(|_| LineDefect::Encoding);
            match entry.and_then(|line| DenyEntry::from_line(line, length)) {
                Ok(None) => {}
                Ok(Some(entry)) => {
                    if !list.insert(entry) {
                        return Err(DenyListError::TooMany);
                    }
                }
                Err(defect) if defects.len() < MAX_NAMED_LINES => defects.push((index + 1, defect)),
                Err(_) => return Err(DenyListError::Lines(LineDefects { defects, has_more: true })),
            }
        }
        if defects.is_empty() {
            Ok(list)
        } else {
            Err(DenyListError::Lines(LineDefects { defects, has_more: false }))
        }
    }

    /// Whether this key is refused.
    pub fn denies(&self, key: &KeyRecord) -> bool {
        // Nearly always there are none, and then nothing is hashed.
        (!self.keys.is_empty() && self.keys.contains(&key.id))
            || (!self.prefixes.is_empty() && self.prefixes.contains(&*key.prefix))
    }

    /// Whether it has this very entry.
    pub fn contains(&self, entry: &DenyEntry) -> bool {
        match entry {
            DenyEntry::Key(id) => self.keys.contains(id),
            DenyEntry::Prefix(prefix) => self.prefixes.contains(prefix),
        }
    }

    /// Adds an entry. `false` where the list is full and does not have it.
    #[must_use]
    pub fn insert(&mut self, entry: DenyEntry) -> bool {
        if self.len() >= MAX_ENTRIES && !self.contains(&entry) {
            return false;
        }
        match entry {
            DenyEntry::Key(id) => self.keys.insert(id),
            DenyEntry::Prefix(prefix) => self.prefixes.insert(prefix),
        };
        true
    }

    /// Removes an entry; `false` where it was not there.
    pub fn remove(&mut self, entry: &DenyEntry) -> bool {
        match entry {
            DenyEntry::Key(id) => self.keys.remove(id),
            DenyEntry::Prefix(prefix) => self.prefixes.remove(prefix),
        }
    }

    /// What either list has: at most twice [`MAX_ENTRIES`].
    pub fn union(&self, other: &Self) -> Self {
        Self {
            keys: self.keys.union(&other.keys).copied().collect(),
            prefixes: self.prefixes.union(&other.prefixes).cloned().collect(),
        }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.keys.len() + self.prefixes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.prefixes.is_empty()
    }

    /// Every entry, in order.
    pub fn entries(&self) -> Vec<DenyEntry> {
        let keys = self.keys.iter().copied().map(DenyEntry::Key);
        let mut entries: Vec<_> = keys.chain(self.prefixes.iter().cloned().map(DenyEntry::Prefix)).collect();
        entries.sort_unstable();
        entries
    }
}

/// The text with one more line at its end.
pub fn with_line(text: &str, entry: &DenyEntry) -> String {
    let line_end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    format!("{text}{line_end}{entry}\n")
}

/// The text without the lines that say this; all others stay as they are, byte for byte.
pub fn without_lines(text: &str, entry: &DenyEntry, length: PrefixLength) -> String {
    let says_it = |line: &&str| {
        let line = line.trim_start_matches('\u{feff}');
        matches!(DenyEntry::from_line(line, length), Ok(Some(own)) if own == *entry)
    };
    text.split_inclusive('\n').filter(|line| !says_it(line)).collect()
}

/// Why a text is no deny list.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DenyListError {
    /// Over [`MAX_BYTES`].
    #[error("it is larger than {} MiB; remove what need not be denied any more", MAX_BYTES >> 20)]
    TooLarge,
    /// Over [`MAX_ENTRIES`].
    #[error("it has more than {MAX_ENTRIES} entries; remove those that need not be denied any more")]
    TooMany,
    /// Lines that can't be read.
    #[error("{0}")]
    Lines(LineDefects),
}

/// The first bad lines, by number from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineDefects {
    defects: Vec<(usize, LineDefect)>,
    has_more: bool,
}

impl fmt::Display for LineDefects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (line, defect)) in self.defects.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}line {line}: {defect}")?;
        }
        if self.has_more { f.write_str("; and more lines") } else { Ok(()) }
    }
}

/// What is wrong with a line, as what was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LineDefect {
    /// Neither of the two forms.
    #[error("expected `key-id 42` or `prefix kw_abcde`, and a comment only behind #")]
    Form,
    /// No number behind `key-id`.
    #[error("expected a whole number behind `key-id`, such as `key-id 42`")]
    KeyId,
    /// A prefix with a character that no key has.
    #[error("expected a prefix of visible ASCII characters without comma and exclamation mark")]
    Characters,
    /// A prefix that is no key's, because keys are cut elsewhere.
    #[error(
        "expected a prefix of {expected} characters (--key-prefix-length); with {found} it is the prefix of no key"
    )]
    Length {
        /// `--key-prefix-length`
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// Bytes that are no text.
    #[error("expected text in UTF-8")]
    Encoding,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LENGTH: PrefixLength = PrefixLength::DEFAULT;

    fn parse(text: &str) -> Result<Vec<String>, String> {
        let list = DenyList::parse(text.as_bytes(), LENGTH).map_err(|error| error.to_string())?;
        Ok(list.entries().iter().map(ToString::to_string).collect())
    }

    fn prefix(text: &str) -> DenyEntry {
        DenyEntry::prefix(text, LENGTH).unwrap()
    }

    #[test]
    fn entries_stand_one_a_line_between_comments_and_blanks() {
        let text = "\u{feff}# leaked\n\nkey-id 42 # the build server\r\n\tprefix  kw_abcde\t# all of them\n  #x\nkey-id 7";
        assert_eq!(parse(text).unwrap(), ["key-id 7", "key-id 42", "prefix kw_abcde"]);
        assert_eq!(parse("").unwrap(), Vec::<String>::new());
        assert_eq!(parse("prefix #kw_abcd #c").unwrap(), ["prefix #kw_abcd"]);
    }

    #[test]
    fn every_bad_line_is_named_with_what_was_expected_and_not_repeated() {
        let text = "key-id 1\nkey-id one\nprefix kw_\nprefix kw_hunter2-and-the-rest\n\nkey 3\nkey-id 4 5\nprefix\nprefix kw_a,bcd\n";
        let error = parse(text).unwrap_err();
        let lines: Vec<&str> = error.split("; line ").collect();
        assert!(lines[0].starts_with("line 2: expected a whole number"), "{error}");
        assert!(lines[1].starts_with("3: expected a prefix of 8 characters"), "{error}");
        assert!(lines[2].starts_with("4: ") && lines[2].contains("with 23 "), "{error}");
        assert!(lines[3].starts_with("6: expected `key-id 42` or `prefix kw_abcde`"), "{error}");
        assert!(lines[4].starts_with("7: ") && lines[5].starts_with("8: "), "{error}");
        assert!(lines[6].starts_with("9: expected a prefix of visible"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
        let binary = DenyList::parse(b"key-id 1\nprefix kw_\xff\xffabc\n", LENGTH).unwrap_err().to_string();
        assert_eq!(binary, "line 2: expected text in UTF-8");
        let many = parse(&"x\n".repeat(1_000)).unwrap_err();
        assert!(many.contains("line 10: ") && !many.contains("line 11: ") && many.ends_with("more lines"));
    }

    #[test]
    fn a_list_is_bounded() {
        let of = |count: usize| (0..count).map(|id| format!("key-id {id}\n")).collect::<String>();
        assert_eq!(parse(&of(MAX_ENTRIES)).unwrap().len(), MAX_ENTRIES);
        assert!(parse(&of(MAX_ENTRIES + 1)).unwrap_err().contains("more than 100000 entries"));
        // The same entry again is none more.
        assert!(parse(&format!("{}key-id 1\n", of(MAX_ENTRIES))).is_ok());
        assert!(parse(&" ".repeat(MAX_BYTES)).is_ok());
        assert!(parse(&" ".repeat(MAX_BYTES + 1)).unwrap_err().contains("larger than 8 MiB"));
    }

    #[test]
    fn a_prefix_of_another_length_is_no_entry() {
        let length = PrefixLength::new(12).unwrap();
        assert!(DenyEntry::prefix("kw_abcdefghi", length).is_ok());
        let short = DenyEntry::prefix("kw_abcde", length).unwrap_err();
        assert_eq!(short, LineDefect::Length { expected: 12, found: 8 });
        assert!(DenyEntry::prefix("", length).is_err());
    }

    #[test]
    fn a_line_goes_and_all_others_stay_byte_for_byte() {
        let text = "# why\r\nkey-id 42 # a\n\nkey-id 7\nkey-id 042\nprefix kw_abcde";
        let key = DenyEntry::Key(KeyId::new(42));
        assert_eq!(without_lines(text, &key, LENGTH), "# why\r\n\nkey-id 7\nprefix kw_abcde");
        assert_eq!(without_lines("\u{feff}key-id 42\n#", &key, LENGTH), "#");
        assert_eq!(with_line(text, &key), format!("{text}\nkey-id 42\n"));
        assert_eq!(with_line("", &prefix("kw_abcde")), "prefix kw_abcde\n");
    }

    fn entry() -> impl Strategy<Value = DenyEntry> {
        prop_oneof![
            any::<i64>().prop_map(|id| DenyEntry::Key(KeyId::new(id))),
            "[\\x21-\\x7e&&[^,!]]{8}".prop_map(|text| prefix(&text)),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = DenyList::parse(&bytes, LENGTH);
        }

        #[test]
        fn nearly_right_lines_are_read_or_refused(text in "((key-id|prefix|#)[ \t]?[-0-9a-z_# ]{0,10}\r?\n?){0,8}") {
            if let Ok(list) = DenyList::parse(text.as_bytes(), LENGTH) {
                for entry in list.entries() {
                    let rest = DenyList::parse(without_lines(&text, &entry, LENGTH).as_bytes(), LENGTH).unwrap();
                    prop_assert!(!rest.contains(&entry));
                    prop_assert_eq!(rest.len() + 1, list.len());
                }
            }
        }

        #[test]
        fn what_is_written_is_read_back(entries in prop::collection::hash_set(entry(), 0..20)) {
            let text = entries.iter().fold(String::new(), |text, entry| with_line(&text, entry));
            let list = DenyList::parse(text.as_bytes(), LENGTH).unwrap();
            prop_assert_eq!(list.entries().into_iter().collect::<HashSet<_>>(), entries);
        }
    }
}
