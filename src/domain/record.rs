//! Key and user records as parsed values: built once when a row is read, never per request.

use std::fmt;
use std::sync::Arc;

use super::allowlist::{Allowlist, ListError, strings_from_json};
use super::endpoint::EndpointRule;
use super::hash::{HashDefect, KeyHash};
use super::limit::{Budget, Cents, RateLimits};
use super::model::ModelRule;
use super::network::NetworkRule;
use super::prepared::PreparedAnswer;
use super::row::CandidateRow;
use super::scope::ScopeSet;
use super::time::Timestamp;

/// `api_keys.id`. Printable, not computable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(i64);

/// `users.id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId(i64);

impl KeyId {
    /// From the column or an operator's argument.
    pub const fn new(id: i64) -> Self {
        Self(id)
    }
    /// The column's value.
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl UserId {
    /// From the column or an operator's argument.
    pub const fn new(id: i64) -> Self {
        Self(id)
    }
    /// The column's value.
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key record with its owner, found by the presented key's prefix and not yet proven.
#[derive(Debug)]
pub struct Candidate {
    /// The key.
    pub key: KeyRecord,
    /// The key's user; a key without an owner row has an inactive one.
    pub owner: Arc<UserRecord>,
    /// What the key may do, or why that can't be told: such a key is refused.
    pub policy: Result<Arc<KeyPolicy>, PolicyDefects>,
    /// What every allow of this candidate says of key and owner.
    pub prepared: PreparedAnswer,
}

/// A row of `api_keys`, less its policy.
#[derive(Debug)]
pub struct KeyRecord {
    /// `id`
    pub id: KeyId,
    /// `name`, empty where NULL
    pub name: Box<str>,
    /// `key_prefix`
    pub prefix: Box<str>,
    /// `key_hash`; a defective one matches no key.
    pub hash: Result<KeyHash, HashDefect>,
    /// `is_active`; NULL counts as inactive.
    pub is_active: bool,
    /// `expires_at`, UTC; the key is good up to and including this moment.
    pub expires_at: Option<Timestamp>,
}

/// A row of `users`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UserRecord {
    /// `id`; `None` where the key's owner row is missing.
    pub id: Option<UserId>,
    /// `username`
    pub username: Box<str>,
    /// `email`
    pub email: Box<str>,
    /// `role`, or the name behind `role_id`
    pub role: Box<str>,
    /// `is_active`; NULL counts as inactive.
    pub is_active: bool,
    /// `is_superuser`
    pub is_superuser: bool,
    /// `account_locked` and `account_locked_until` together.
    pub lock: AccountLock,
}

/// Whether an account is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccountLock {
    /// Not locked.
    Open,
    /// Locked without an end.
    Locked,
    /// Locked up to this moment.
    Until(Timestamp),
}

impl UserRecord {
    /// Active and not locked at this moment.
    pub fn may_act(&self, now: Timestamp) -> bool {
        self.is_active
            && match self.lock {
                AccountLock::Open => true,
                AccountLock::Locked => false,
                AccountLock::Until(end) => now > end,
            }
    }
}

/// What a key may do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyPolicy {
    /// `scopes`
    pub scopes: ScopeSet,
    /// `allowed_models`
    pub models: Allowlist<ModelRule>,
    /// `allowed_endpoints`, in its two forms: as stored for the upstream, and parsed for us.
    pub endpoints: Allowlist<(Box<str>, EndpointRule)>,
    /// `allowed_ips`
    pub networks: Allowlist<NetworkRule>,
    /// `allowed_chatbots`
    pub chatbots: Allowlist<Box<str>>,
    /// `allowed_agents`
    pub agents: Allowlist<Box<str>>,
    /// `rate_limit_per_…`
    pub rate_limits: RateLimits,
    /// `budget_…`, `is_unlimited`, `total_cost`
    pub budget: Budget,
    /// What every allow of a key with these rights says of them.
    pub prepared: PreparedAnswer,
}

/// The columns that could not be read, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyDefects(Vec<String>);

impl fmt::Display for PolicyDefects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl Candidate {
    /// Gives a row its meaning. Nothing here fails: what can't be read disables this key and leaves the others alone.
    pub fn from_row(row: &CandidateRow) -> Self {
        Self {
            key: key_record(row),
            owner: Arc::new(user_record(row)),
            policy: key_policy(row).map(Arc::new),
            prepared: PreparedAnswer::default(),
        }
    }

    /// Everything about this row that an operator should mend.
    pub fn defects(&self) -> Option<String> {
        let hash = self.key.hash.as_ref().err().map(ToString::to_string);
        let policy = self.policy.as_ref().err().map(ToString::to_string);
        match (hash, policy) {
            (Some(hash), Some(policy)) => Some(format!("{hash}; {policy}")),
            (hash, policy) => hash.or(policy),
        }
    }
}

fn key_record(row: &CandidateRow) -> KeyRecord {
    KeyRecord {
        id: KeyId(row.key_id),
        name: text(row.key_name.as_deref()),
        prefix: text(row.key_prefix.as_deref()),
        hash: row.key_hash.as_deref().map_or(Err(HashDefect::Missing), KeyHash::parse),
        is_active: row.is_active == Some(true),
        expires_at: row.expires_at.map(Timestamp::from_microseconds),
    }
}

fn user_record(row: &CandidateRow) -> UserRecord {
    let until = row.account_locked_until.map(Timestamp::from_microseconds);
    let lock = match (row.account_locked, until) {
        // A lock whose end has passed is no lock, so the end decides where there is one.
        (_, Some(end)) => AccountLock::Until(end),
        (Some(true), None) => AccountLock::Locked,
        (Some(false) | None, None) => AccountLock::Open,
    };
    UserRecord {
        id: row.user_id.map(UserId),
        username: text(row.username.as_deref()),
        email: text(row.email.as_deref()),
        role: text(row.role.as_deref()),
        is_active: row.user_id.is_some() && row.user_is_active == Some(true),
        is_superuser: row.is_superuser == Some(true),
        lock,
    }
}

fn key_policy(row: &CandidateRow) -> Result<KeyPolicy, PolicyDefects> {
    let mut defects: Vec<String> =
        row.unreadable.iter().map(|column| format!("{column} has a value of a wrong type")).collect();
    let plain = |entry: &str| Some(Box::from(entry));
    let endpoint = |entry: &str| Some((entry.into(), EndpointRule::parse(entry)?));

    let scopes = kept(&mut defects, "scopes", strings_from_json(row.scopes.as_deref()));
    let models = list(&mut defects, "allowed_models", row.allowed_models.as_deref(), ModelRule::parse);
    let endpoints = list(&mut defects, "allowed_endpoints", row.allowed_endpoints.as_deref(), endpoint);
    let networks = list(&mut defects, "allowed_ips", row.allowed_ips.as_deref(), NetworkRule::parse);
    let chatbots = list(&mut defects, "allowed_chatbots", row.allowed_chatbots.as_deref(), plain);
    let agents = list(&mut defects, "allowed_agents", row.allowed_agents.as_deref(), plain);
    let minute = limit(&mut defects, "rate_limit_per_minute", row.rate_limit_per_minute);
    let hour = limit(&mut defects, "rate_limit_per_hour", row.rate_limit_per_hour);
    let day = limit(&mut defects, "rate_limit_per_day", row.rate_limit_per_day);
    let budget = budget(&mut defects, row);

    match (scopes, models, endpoints, networks, chatbots, agents, budget) {
        (
            Some(scopes),
            Some(models),
            Some(endpoints),
            Some(networks),
            Some(chatbots),
            Some(agents),
            Some(budget),
        ) if defects.is_empty() => {
            let rate_limits = RateLimits { minute, hour, day };
            let scopes = ScopeSet::new(scopes);
            let prepared = PreparedAnswer::default();
            Ok(KeyPolicy {
                scopes,
                models,
                endpoints,
                networks,
                chatbots,
                agents,
                rate_limits,
                budget,
                prepared,
            })
        }
        _ => Err(PolicyDefects(defects)),
    }
}

fn kept<T>(defects: &mut Vec<String>, column: &str, read: Result<T, ListError>) -> Option<T> {
    read.map_err(|error| defects.push(format!("{column} {error}"))).ok()
}

fn list<T>(
    defects: &mut Vec<String>,
    column: &str,
    json: Option<&str>,
    parse: impl Fn(&str) -> Option<T>,
) -> Option<Allowlist<T>> {
    kept(defects, column, Allowlist::from_json(json, parse))
}

/// Negative is invalid; more than `u32` holds is as good as the most that it holds.
fn limit(defects: &mut Vec<String>, column: &str, value: Option<i64>) -> Option<u32> {
    let value = value?;
    if value < 0 {
        defects.push(format!("{column} is negative"));
        return None;
    }
    Some(u32::try_from(value).unwrap_or(u32::MAX))
}

fn budget(defects: &mut Vec<String>, row: &CandidateRow) -> Option<Budget> {
    let monthly = match row.budget_type.as_deref() {
        None | Some("total") => false,
        Some("monthly") => true,
        Some(_) => {
            defects.push("budget_type is neither total nor monthly".to_owned());
            return None;
        }
    };
    let Some(limit) = row.budget_limit_cents else {
        return Some(Budget::Unlimited);
    };
    if limit < 0 {
        defects.push("budget_limit_cents is negative".to_owned());
        return None;
    }
    if row.is_unlimited == Some(true) {
        return Some(Budget::Unlimited);
    }
    let total = row.total_cost.unwrap_or(0);
    let spent = if monthly { row.month_cost.unwrap_or(total) } else { total };
    Some(Budget::Limited { limit: Cents::new(limit), spent: Cents::new(spent) })
}

fn text(column: Option<&str>) -> Box<str> {
    column.unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";

    fn with(change: impl FnOnce(&mut CandidateRow)) -> Candidate {
        let mut row = CandidateRow::sample(HASH);
        change(&mut row);
        Candidate::from_row(&row)
    }

    #[test]
    fn null_is_inactive_and_a_missing_owner_too() {
        assert!(with(|_| ()).key.is_active);
        assert!(!with(|row| row.is_active = None).key.is_active);
        let now = Timestamp::from_microseconds(0);
        assert!(with(|_| ()).owner.may_act(now));
        assert!(!with(|row| row.user_is_active = None).owner.may_act(now));
        assert!(!with(|row| row.user_id = None).owner.may_act(now));
    }

    #[test]
    fn a_lock_in_the_past_is_no_lock() {
        let now = Timestamp::from_microseconds(1_000);
        let locked = |flag, until| {
            !with(|row| {
                row.account_locked = flag;
                row.account_locked_until = until;
            })
            .owner
            .may_act(now)
        };
        assert!(!locked(None, None));
        assert!(locked(Some(true), None));
        assert!(locked(Some(true), Some(1_000)));
        assert!(!locked(Some(true), Some(999)));
        assert!(locked(Some(false), Some(2_000)));
        assert!(!locked(Some(false), Some(999)));
    }

    /// Every restriction column with every wrong shape: the key has no policy, and the reason names the column.
    #[test]
    fn a_wrong_type_in_any_restriction_makes_the_policy_invalid() {
        type Set = fn(&mut CandidateRow, Option<String>);
        let columns: [(&str, Set); 6] = [
            ("scopes", |row, value| row.scopes = value),
            ("allowed_models", |row, value| row.allowed_models = value),
            ("allowed_endpoints", |row, value| row.allowed_endpoints = value),
            ("allowed_ips", |row, value| row.allowed_ips = value),
            ("allowed_chatbots", |row, value| row.allowed_chatbots = value),
            ("allowed_agents", |row, value| row.allowed_agents = value),
        ];
        for (column, set) in columns {
            for wrong in ["{}", "\"x\"", "1", "true", "[1]", "[null]", "[[]]", "", "["] {
                let candidate = with(|row| set(row, Some(wrong.to_owned())));
                let defects = candidate.policy.expect_err(column).to_string();
                assert!(defects.contains(column), "{column} = {wrong}: {defects}");
            }
            for open in ["null", "[]"] {
                assert!(with(|row| set(row, Some(open.to_owned()))).policy.is_ok(), "{column} = {open}");
            }
        }
    }

    #[test]
    fn negative_limits_bad_networks_and_unreadable_columns_are_invalid() {
        assert!(with(|row| row.rate_limit_per_minute = Some(-1)).policy.is_err());
        assert!(with(|row| row.rate_limit_per_day = Some(0)).policy.is_ok());
        assert!(with(|row| row.budget_limit_cents = Some(-1)).policy.is_err());
        assert!(with(|row| row.budget_type = Some("weekly".into())).policy.is_err());
        assert!(with(|row| row.allowed_ips = Some("[\"10.0.0.1\", \"nonsense\"]".into())).policy.is_err());
        assert!(with(|row| row.unreadable = vec!["is_superuser".into()]).policy.is_err());
    }

    #[test]
    fn monthly_budgets_use_the_month_where_it_is_known() {
        let budget = |month_cost| {
            with(|row| {
                row.budget_limit_cents = Some(100);
                row.budget_type = Some("monthly".into());
                row.total_cost = Some(900);
                row.month_cost = month_cost;
            })
            .policy
            .unwrap()
            .budget
        };
        assert_eq!(budget(Some(40)).remaining(), Some(Cents::new(60)));
        assert!(budget(None).is_used_up());
    }

    #[test]
    fn a_bad_hash_disables_that_key_and_says_so() {
        let candidate = with(|row| row.key_hash = Some("$2x$10$".into()));
        assert!(candidate.key.hash.is_err());
        assert!(candidate.defects().unwrap().contains("$2x$"));
        assert!(with(|_| ()).defects().is_none());
    }
}
