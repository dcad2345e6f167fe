//! The entries of `allowed_models`.

/// One model name or pattern, kept as written; it is handed to the upstream with the key's rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRule(Box<str>);

impl ModelRule {
    /// Any text that is not empty.
    pub fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| Self(text.into()))
    }

    /// The rule as stored.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
