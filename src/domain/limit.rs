//! Rate limits and budgets.

/// Requests allowed per unit of time; `None` = no limit of that unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RateLimits {
    /// `rate_limit_per_minute`
    pub minute: Option<u32>,
    /// `rate_limit_per_hour`
    pub hour: Option<u32>,
    /// `rate_limit_per_day`
    pub day: Option<u32>,
}

/// An amount of money in cents of the platform's currency. Spending may run below zero after refunds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cents(i64);

impl Cents {
    /// From the column.
    pub const fn new(cents: i64) -> Self {
        Self(cents)
    }

    /// The number of cents.
    pub const fn get(self) -> i64 {
        self.0
    }
}

/// What a key may spend and has spent in its period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Budget {
    /// `is_unlimited`, or no limit set.
    Unlimited,
    /// `budget_limit_cents` against the spending of the period, as old as the record that it came with.
    Limited {
        /// Never negative: a negative limit makes the policy invalid.
        limit: Cents,
        /// Since the first of the month for `monthly`, otherwise in total.
        spent: Cents,
    },
}

impl Budget {
    /// Whether nothing is left (`total_cost >= budget_limit_cents`).
    pub fn is_used_up(self) -> bool {
        match self {
            Self::Unlimited => false,
            Self::Limited { limit, spent } => spent >= limit,
        }
    }

    /// The limit; `None` = unlimited.
    pub fn limit(self) -> Option<Cents> {
        match self {
            Self::Unlimited => None,
            Self::Limited { limit, .. } => Some(limit),
        }
    }

    /// What is left, never below zero; `None` = unlimited.
    pub fn remaining(self) -> Option<Cents> {
        match self {
            Self::Unlimited => None,
            Self::Limited { limit, spent } => Some(Cents(limit.0.saturating_sub(spent.0).max(0))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_ends_exactly_at_its_limit() {
        let of = |limit, spent| Budget::Limited { limit: Cents(limit), spent: Cents(spent) };
        assert!(!of(100, 99).is_used_up());
        assert!(of(100, 100).is_used_up());
        assert!(of(0, 0).is_used_up());
        assert_eq!(of(100, 150).remaining(), Some(Cents(0)));
        assert_eq!(of(100, -5).remaining(), Some(Cents(105)));
        assert_eq!(Budget::Unlimited.remaining(), None);
    }
}
