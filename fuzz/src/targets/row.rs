//! A row as JSON, given its meaning: a restriction that can't be read must never read as none.

use keyward::domain::allowlist::Allowlist;
use keyward::domain::record::{AccountLock, Candidate, KeyPolicy};
use keyward::domain::row::CandidateRow;
use keyward::domain::time::Timestamp;
use serde_json::Value;

pub(crate) fn run(data: &[u8]) {
    let Ok(row) = serde_json::from_slice::<CandidateRow>(data) else { return };
    // serde takes a list for a struct too, field by field.
    let fields = match serde_json::from_slice(data) {
        Ok(Value::Object(fields)) => fields.len(),
        Ok(Value::Array(fields)) => fields.len(),
        other => panic!("a row of {other:?}"),
    };
    assert_eq!(fields, 29, "a row has all of its fields");
    let written = serde_json::to_vec(&row).expect("a row is plain");
    assert!(serde_json::from_slice::<CandidateRow>(&written).expect("what is written is read") == row);

    let candidate = Candidate::from_row(&row);
    assert_eq!(candidate.key.is_active, row.is_active == Some(true));
    assert_eq!(candidate.owner.is_active, row.user_id.is_some() && row.user_is_active == Some(true));
    assert_eq!(candidate.key.expires_at.map(Timestamp::as_microseconds), row.expires_at);
    assert_eq!(candidate.owner.is_superuser, row.is_superuser == Some(true));
    let may_be_locked = row.account_locked == Some(true) || row.account_locked_until.is_some();
    assert_eq!(candidate.owner.lock == AccountLock::Open, !may_be_locked);
    assert!(candidate.key.hash.is_err() || row.key_hash.is_some());
    let has_defect = candidate.key.hash.is_err() || candidate.policy.is_err();
    assert_eq!(candidate.defects().is_some(), has_defect);
    match &candidate.policy {
        Ok(policy) => hold(policy, &row),
        Err(_) => assert!(is_defective(&row), "a good row is refused"),
    }
}

fn hold(policy: &KeyPolicy, row: &CandidateRow) {
    assert!(row.unreadable.is_empty());
    let counts = [
        (count(&policy.models), &row.allowed_models),
        (count(&policy.endpoints), &row.allowed_endpoints),
        (count(&policy.networks), &row.allowed_ips),
        (count(&policy.chatbots), &row.allowed_chatbots),
        (count(&policy.agents), &row.allowed_agents),
    ];
    for (count, column) in counts {
        assert_eq!(entries(column.as_deref()).map(|entries| entries.len()), Some(count), "{column:?}");
    }
    let limits = [
        (policy.rate_limits.minute, row.rate_limit_per_minute),
        (policy.rate_limits.hour, row.rate_limit_per_hour),
        (policy.rate_limits.day, row.rate_limit_per_day),
    ];
    for (limit, column) in limits {
        assert_eq!(limit.map(i64::from), column.map(|value| value.min(i64::from(u32::MAX))));
    }
    let is_bounded = row.budget_limit_cents.is_some() && row.is_unlimited != Some(true);
    assert_eq!(policy.budget.limit().is_some(), is_bounded);
    if let (true, Some(limit)) = (is_bounded, row.budget_limit_cents) {
        let monthly = row.budget_type.as_deref() == Some("monthly");
        let total = row.total_cost.unwrap_or(0);
        let spent = if monthly { row.month_cost.unwrap_or(total) } else { total };
        assert_eq!(policy.budget.is_used_up(), spent >= limit);
    }
}

/// 0 where there is no restriction.
fn count<T>(list: &Allowlist<T>) -> usize {
    match list {
        Allowlist::Unrestricted => 0,
        Allowlist::Only(entries) => {
            assert!(!entries.is_empty());
            entries.len()
        }
    }
}

/// `None` where the column is no list of texts.
fn entries(column: Option<&str>) -> Option<Vec<String>> {
    match serde_json::from_str(column.unwrap_or("null")).ok()? {
        Value::Null => Some(Vec::new()),
        Value::Array(items) => items
            .into_iter()
            .map(|item| match item {
                Value::String(text) if !text.is_empty() => Some(text),
                _ => None,
            })
            .collect(),
        _ => None,
    }
}

/// Something that is reason enough to refuse a row. Of lists of endpoints and networks, any entry could be.
fn is_defective(row: &CandidateRow) -> bool {
    let lists = [&row.scopes, &row.allowed_models, &row.allowed_chatbots, &row.allowed_agents];
    let parsed = [&row.allowed_endpoints, &row.allowed_ips];
    let limits =
        [row.rate_limit_per_minute, row.rate_limit_per_hour, row.rate_limit_per_day, row.budget_limit_cents];
    !row.unreadable.is_empty()
        || lists.iter().any(|list| entries(list.as_deref()).is_none_or(|entries| entries.len() > 4096))
        || parsed.iter().any(|list| entries(list.as_deref()).is_none_or(|entries| !entries.is_empty()))
        || limits.iter().any(|limit| limit.is_some_and(|limit| limit < 0))
        || !matches!(row.budget_type.as_deref(), None | Some("total" | "monthly"))
}
