//! The three-state list of the contract: unrestricted, only these, or invalid.

use serde_json::Value;
use thiserror::Error;

/// Most entries of one list; a longer one is refused like any other that can't be read, so that a row can't slow the
/// decision down.
pub const MAX_LIST_ENTRIES: usize = 4096;

/// What a key may reach of one kind of thing. An invalid list is an error and so never one of these.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Allowlist<T> {
    /// NULL, JSON `null` or `[]`.
    Unrestricted,
    /// At least one entry; only those.
    Only(Box<[T]>),
}

impl<T> Allowlist<T> {
    /// Reads a JSON column, each entry with `parse`.
    pub fn from_json(column: Option<&str>, parse: impl Fn(&str) -> Option<T>) -> Result<Self, ListError> {
        let entries = strings_from_json(column)?;
        if entries.is_empty() {
            return Ok(Self::Unrestricted);
        }
        let parsed: Option<Box<[T]>> = entries.iter().map(|entry| parse(entry)).collect();
        parsed.map(Self::Only).ok_or(ListError::BadEntry)
    }

    /// Whether a thing is admitted that an entry is tested for with `matches`.
    pub fn admits(&self, matches: impl Fn(&T) -> bool) -> bool {
        match self {
            Self::Unrestricted => true,
            Self::Only(entries) => entries.iter().any(matches),
        }
    }
}

/// Reads a JSON column that holds a list of strings; NULL, JSON `null` and `[]` are the empty list.
pub fn strings_from_json(column: Option<&str>) -> Result<Vec<String>, ListError> {
    let Some(text) = column else {
        return Ok(Vec::new());
    };
    match serde_json::from_str(text) {
        Ok(Value::Null) => Ok(Vec::new()),
        Ok(Value::Array(items)) if items.len() > MAX_LIST_ENTRIES => Err(ListError::TooLong),
        Ok(Value::Array(items)) => items
            .into_iter()
            .map(|item| match item {
                Value::String(string) if !string.is_empty() => Ok(string),
                _ => Err(ListError::BadEntry),
            })
            .collect(),
        Ok(_) => Err(ListError::NotAList),
        Err(_) => Err(ListError::NotJson),
    }
}

/// Why a list can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ListError {
    /// The text is no JSON.
    #[error("is not JSON")]
    NotJson,
    /// JSON, but neither `null` nor an array.
    #[error("is not a list of strings")]
    NotAList,
    /// An entry is no string, is empty, or does not mean anything in this list.
    #[error("has an entry that can't be read")]
    BadEntry,
    /// Over [`MAX_LIST_ENTRIES`].
    #[error("has more than 4096 entries")]
    TooLong,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_and_empty_are_unrestricted_and_everything_odd_is_an_error() {
        let read = |column: Option<&str>| Allowlist::from_json(column, |s| Some(s.to_owned()));
        let only = |items: &[&str]| Ok(Allowlist::Only(items.iter().map(|s| (*s).to_owned()).collect()));
        for (column, expected) in [
            (None, Ok(Allowlist::Unrestricted)),
            (Some("null"), Ok(Allowlist::Unrestricted)),
            (Some("[]"), Ok(Allowlist::Unrestricted)),
            (Some(" [\"a\", \"b\"] "), only(&["a", "b"])),
            (Some(""), Err(ListError::NotJson)),
            (Some("{}"), Err(ListError::NotAList)),
            (Some("\"x\""), Err(ListError::NotAList)),
            (Some("1"), Err(ListError::NotAList)),
            (Some("false"), Err(ListError::NotAList)),
            (Some("[1]"), Err(ListError::BadEntry)),
            (Some("[null]"), Err(ListError::BadEntry)),
            (Some("[\"\"]"), Err(ListError::BadEntry)),
            (Some("[[\"a\"]]"), Err(ListError::BadEntry)),
            (Some("[\"a\""), Err(ListError::NotJson)),
        ] {
            assert_eq!(read(column), expected, "{column:?}");
        }
    }

    #[test]
    fn one_bad_entry_spoils_the_list() {
        let read = Allowlist::from_json(Some("[\"1\", \"x\"]"), |s| s.parse::<u8>().ok());
        assert_eq!(read, Err(ListError::BadEntry));
    }

    /// A row can't make every decision on its key slow.
    #[test]
    fn a_list_is_read_up_to_its_bound_and_refused_above() {
        let read = |entries: usize| {
            let column = serde_json::to_string(&vec!["a"; entries]).unwrap();
            Allowlist::from_json(Some(&column), |entry| Some(entry.to_owned()))
        };
        assert_eq!(
            read(MAX_LIST_ENTRIES),
            Ok(Allowlist::Only(vec!["a".to_owned(); MAX_LIST_ENTRIES].into()))
        );
        assert_eq!(read(MAX_LIST_ENTRIES + 1), Err(ListError::TooLong));
        assert_eq!(read(100_000), Err(ListError::TooLong));
    }
}
