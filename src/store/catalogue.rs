//! Catalogue: which of the contract's tables and columns this database has.
//!
//! The platform's databases differ by age, so every statement is built from what is there. A column that is not there
//! reads as NULL; the few without which no key can be found or proven are required.

use std::collections::BTreeMap;

use super::error::StoreError;

/// The tables that are looked for.
pub(super) const TABLES: [&str; 6] =
    ["api_keys", "users", "roles", "usage_tracking", "keyward_old_secrets", "keyward_history"];

const REQUIRED: [(&str, &str); 5] = [
    ("api_keys", "id"),
    ("api_keys", "key_hash"),
    ("api_keys", "key_prefix"),
    ("api_keys", "user_id"),
    ("users", "id"),
];

/// Columns with their types. Postgres types are as `regtype` prints them, domains resolved; SQLite's say nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Catalogue {
    tables: BTreeMap<String, BTreeMap<String, String>>,
}

/// The columns of `usage_tracking`, where they fit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UsageColumns {
    pub(super) key: &'static str,
    pub(super) cost: &'static str,
    pub(super) at: &'static str,
}

impl Catalogue {
    pub(super) fn insert(&mut self, table: &str, column: String, kind: String) {
        self.tables.entry(table.to_owned()).or_default().insert(column, kind);
    }

    /// Refuses a database without our tables, or whose tables are something else.
    pub(super) fn checked(self) -> Result<Self, StoreError> {
        if !self.tables.contains_key("api_keys") || !self.tables.contains_key("users") {
            return Err(StoreError::MissingTables);
        }
        for (table, column) in REQUIRED {
            if !self.has(table, column) {
                return Err(StoreError::Schema(format!("{table} has no column {column}")));
            }
        }
        Ok(self)
    }

    pub(super) fn has(&self, table: &str, column: &str) -> bool {
        self.kind(table, column).is_some()
    }

    /// The column's type.
    pub(super) fn kind(&self, table: &str, column: &str) -> Option<&str> {
        self.tables.get(table)?.get(column).map(String::as_str)
    }

    /// Whether `users.role_id` leads to names.
    pub(super) fn has_roles(&self) -> bool {
        self.has("users", "role_id") && self.has("roles", "id") && self.has("roles", "name")
    }

    /// Whether rotated secrets can be kept and read.
    pub(super) fn has_old_secrets(&self) -> bool {
        let columns = ["key_id", "key_hash", "key_prefix", "current_hash", "rotated_at", "expires_at"];
        columns.iter().all(|column| self.has("keyward_old_secrets", column))
    }

    /// Whether there are rotated secrets that can't be read: the table's place is taken by a column without a name.
    pub(super) fn has_hidden_old_secrets(&self) -> bool {
        self.has("keyward_old_secrets", "") && !self.has_old_secrets()
    }

    /// Whether `migrate` has made the table of changes.
    pub(super) fn has_history(&self) -> bool {
        self.has("keyward_history", "id")
    }

    /// Spending by month, where the table has what it takes.
    pub(super) fn usage(&self) -> Option<UsageColumns> {
        let first =
            |names: &[&'static str]| names.iter().copied().find(|name| self.has("usage_tracking", name));
        Some(UsageColumns {
            key: first(&["api_key_id", "key_id"])?,
            cost: first(&["cost_cents", "cost", "total_cost"])?,
            at: first(&["created_at", "timestamp", "date"])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalogue(columns: &[(&str, &str)]) -> Catalogue {
        let mut catalogue = Catalogue::default();
        for (table, column) in columns {
            catalogue.insert(table, (*column).to_owned(), "integer".to_owned());
        }
        catalogue
    }

    #[test]
    fn both_tables_and_the_columns_that_find_a_key_are_required() {
        assert!(catalogue(&REQUIRED).checked().is_ok());
        assert!(matches!(catalogue(&REQUIRED[..4]).checked(), Err(StoreError::MissingTables)));
        for missing in 0..4 {
            let mut columns = REQUIRED.to_vec();
            columns.remove(missing);
            assert!(matches!(catalogue(&columns).checked(), Err(StoreError::Schema(_))), "{missing}");
        }
    }

    #[test]
    fn usage_is_used_only_where_its_columns_fit() {
        assert_eq!(catalogue(&[("usage_tracking", "cost"), ("usage_tracking", "date")]).usage(), None);
        let fitting = [("usage_tracking", "key_id"), ("usage_tracking", "cost"), ("usage_tracking", "date")];
        let expected = UsageColumns { key: "key_id", cost: "cost", at: "date" };
        assert_eq!(catalogue(&fitting).usage(), Some(expected));
    }
}
