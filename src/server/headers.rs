//! The headers of one check, in whichever of Envoy's two forms they came.
//!
//! By default Envoy sends a map (repeated headers joined with a comma, bytes that are not UTF-8 replaced by `!`); with
//! `encode_raw_headers` a list of raw values instead. Both are read, so that neither can hide a value from us.

/// Room for so many is made at once.
const USUAL_COUNT: usize = 32;

/// Borrowed from the check, in its order; names in any case. There is no `Debug`: they hold the key.
#[derive(Default)]
pub struct Headers<'a> {
    list: Vec<(&'a str, &'a [u8])>,
}

impl<'a> Headers<'a> {
    /// Adds one.
    pub(super) fn push(&mut self, name: &'a str, value: &'a [u8]) {
        if self.list.capacity() == 0 {
            self.list.reserve_exact(USUAL_COUNT);
        }
        self.list.push((name, value));
    }

    #[cfg(test)]
    pub(super) fn from_pairs(pairs: &'a [(String, Vec<u8>)]) -> Self {
        Self { list: pairs.iter().map(|(name, value)| (name.as_str(), value.as_slice())).collect() }
    }

    /// Every header: name as sent, value.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.list.iter().copied()
    }

    /// Every value of one header; the name in lower case.
    pub fn values(&self, name: &str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        self.list.iter().filter(move |(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    }

    /// The value of a header that is text and was sent once.
    pub fn text(&self, name: &str) -> Option<&'a str> {
        let mut values = self.values(name);
        match (values.next(), values.next()) {
            (Some(value), None) => std::str::from_utf8(value).ok(),
            _ => None,
        }
    }
}
