//! The headers of one check, in whichever of Envoy's two forms they came.
//!
//! By default Envoy sends a map (repeated headers joined with a comma, bytes that are not UTF-8 replaced by `!`); with
//! `encode_raw_headers` a list of raw values instead. Both are read, so that neither can hide a value from us.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::core::v3::HeaderValue;

/// Borrowed from the check; names in any case.
pub struct Headers<'a> {
    form: Form<'a>,
}

enum Form<'a> {
    Envoy {
        map: &'a HashMap<String, String>,
        list: &'a [HeaderValue],
    },
    #[cfg(test)]
    Pairs(&'a [(String, Vec<u8>)]),
}

impl<'a> Headers<'a> {
    /// From the check's `headers` and `header_map`.
    pub fn new(map: &'a HashMap<String, String>, list: &'a [HeaderValue]) -> Self {
        Self { form: Form::Envoy { map, list } }
    }

    #[cfg(test)]
    pub(super) fn from_pairs(pairs: &'a [(String, Vec<u8>)]) -> Self {
        Self { form: Form::Pairs(pairs) }
    }

    /// Every header: name as sent, value.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        let (map, list, pairs): (_, &'a [HeaderValue], &'a [(String, Vec<u8>)]) = match self.form {
            Form::Envoy { map, list } => (Some(map), list, &[]),
            #[cfg(test)]
            Form::Pairs(pairs) => (None, &[], pairs),
        };
        let from_map = map.into_iter().flatten().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let from_list = list.iter().map(|header| (header.key.as_str(), list_value(header)));
        from_map.chain(from_list).chain(pairs.iter().map(|(name, value)| (name.as_str(), value.as_slice())))
    }

    /// Every value of one header; the name in lower case.
    pub fn values<'n>(&self, name: &'n str) -> impl Iterator<Item = &'a [u8]> + use<'a, 'n> {
        self.iter().filter(move |(own, _)| own.eq_ignore_ascii_case(name)).map(|(_, value)| value)
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

fn list_value(header: &HeaderValue) -> &[u8] {
    if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value }
}
