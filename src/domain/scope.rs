//! Scopes: what a key carries and what a route asks for.

/// The scopes of a key; none unless the record lists some.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct ScopeSet(Box<[Box<str>]>);

impl ScopeSet {
    /// From the entries of the column.
    pub fn new(scopes: Vec<String>) -> Self {
        Self(scopes.into_iter().map(Into::into).collect())
    }

    /// In the order of the column.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|scope| &**scope)
    }

    /// Whether every scope of a route's comma list is here. Blanks around an item are ignored, empty items too.
    pub fn has_all(&self, required: &str) -> bool {
        required
            .split(',')
            .map(str::trim)
            .filter(|scope| !scope.is_empty())
            .all(|scope| self.iter().any(|own| own == scope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_required_scope_must_be_there() {
        let scopes = ScopeSet::new(vec!["chat".into(), "embed".into()]);
        assert!(scopes.has_all(""));
        assert!(scopes.has_all("chat"));
        assert!(scopes.has_all(" chat , embed,"));
        assert!(!scopes.has_all("chat,admin"));
        assert!(!scopes.has_all("Chat"));
        assert!(!ScopeSet::default().has_all("chat"));
    }
}
