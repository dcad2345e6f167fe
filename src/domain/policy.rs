//! The rules, in the order of the contract, and the permit that only they can make.

use std::sync::Arc;

use super::allowlist::Allowlist;
use super::decision::Denied;
use super::denial::Denial;
use super::deny_list::DenyList;
use super::path;
use super::proof::Proven;
use super::record::{Candidate, KeyPolicy, KeyRecord, UserRecord};
use super::request::Request;
use super::time::Timestamp;

/// Evidence that policy allowed a proven key this request.
#[derive(Debug)]
pub struct Permit {
    candidate: Arc<Candidate>,
    policy: Arc<KeyPolicy>,
}

impl Permit {
    /// The key record.
    pub fn key(&self) -> &KeyRecord {
        &self.candidate.key
    }

    /// The key's owner.
    pub fn owner(&self) -> &UserRecord {
        &self.candidate.owner
    }

    /// The key's rights.
    pub fn policy(&self) -> &KeyPolicy {
        &self.policy
    }
}

/// Decides whether a proven key may make this request at this moment. There is no permit without a look at the deny
/// list.
pub fn evaluate(
    proven: Proven,
    deny_list: &DenyList,
    request: &Request<'_>,
    now: Timestamp,
) -> Result<Permit, Denied> {
    let candidate = proven.into_candidate();
    match permitting_policy(&candidate, deny_list, request, now) {
        Ok(policy) => Ok(Permit { policy: Arc::clone(policy), candidate }),
        Err(reason) => Err(Denied { reason, candidate: Some(candidate) }),
    }
}

/// The key's policy, if the key's state and every rule of that policy allow the request.
fn permitting_policy<'c>(
    candidate: &'c Candidate,
    deny_list: &DenyList,
    request: &Request<'_>,
    now: Timestamp,
) -> Result<&'c Arc<KeyPolicy>, Denial> {
    let Candidate { key, owner, policy } = candidate;
    if !key.is_active || deny_list.denies(key) {
        return Err(Denial::KeyInactive);
    }
    if key.expires_at.is_some_and(|end| now > end) {
        return Err(Denial::KeyExpired);
    }
    if !owner.may_act(now) {
        return Err(Denial::UserInactive);
    }
    let policy = policy.as_ref().map_err(|_| Denial::PolicyInvalid)?;
    let denial = address(policy, request)
        .or_else(|| endpoint(policy, request))
        .or_else(|| scopes(policy, owner, request))
        .or_else(|| model(policy, request))
        .or_else(|| policy.budget.is_used_up().then_some(Denial::InsufficientQuota));
    denial.map_or(Ok(policy), Err)
}

/// A list and no address is a denial: a client that can't be told is in no network.
fn address(policy: &KeyPolicy, request: &Request<'_>) -> Option<Denial> {
    let admitted = match &policy.networks {
        Allowlist::Unrestricted => true,
        only @ Allowlist::Only(_) => {
            request.client.is_some_and(|client| only.admits(|network| network.contains(client)))
        }
    };
    (!admitted).then_some(Denial::IpNotAllowed)
}

fn endpoint(policy: &KeyPolicy, request: &Request<'_>) -> Option<Denial> {
    if matches!(policy.endpoints, Allowlist::Unrestricted) {
        return None;
    }
    if path::is_ambiguous(request.path) {
        return Some(Denial::AmbiguousRequest);
    }
    let admitted = policy.endpoints.admits(|(_, rule)| rule.covers(request.method, request.path));
    (!admitted).then_some(Denial::EndpointNotAllowed)
}

fn scopes(policy: &KeyPolicy, owner: &UserRecord, request: &Request<'_>) -> Option<Denial> {
    let granted = owner.is_superuser || policy.scopes.has_all(request.route.required_scopes);
    (!granted).then_some(Denial::ScopeMissing)
}

fn model(policy: &KeyPolicy, request: &Request<'_>) -> Option<Denial> {
    let model = request.route.model;
    let admitted = model.is_empty() || policy.models.admits(|rule| rule.covers(model));
    (!admitted).then_some(Denial::ModelNotAllowed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::key::PrefixLength;
    use crate::domain::proof::Verdict;
    use crate::domain::request::RouteOptions;
    use crate::domain::row::CandidateRow;

    const HASH: &str = "$2b$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";
    const NOW: Timestamp = Timestamp::from_microseconds(1_000_000);

    fn decide(row: &CandidateRow, request: &Request<'_>) -> Result<(), Denial> {
        decide_with(&DenyList::default(), row, request)
    }

    fn decide_with(deny_list: &DenyList, row: &CandidateRow, request: &Request<'_>) -> Result<(), Denial> {
        let candidate = Arc::new(Candidate::from_row(row));
        let proven = Proven::from_verdict(&candidate, Verdict::Match).unwrap();
        evaluate(proven, deny_list, request, NOW).map(|_| ()).map_err(|denied| denied.reason)
    }

    fn request() -> Request<'static> {
        Request {
            method: "POST",
            path: "/v1/chat/completions",
            client: Some("10.1.2.3".parse().unwrap()),
            route: RouteOptions { required_scopes: "chat", model: "gpt-4o", ..RouteOptions::default() },
        }
    }

    /// A key with every restriction, each of them met by [`request`].
    fn restricted() -> CandidateRow {
        let mut row = CandidateRow::sample(HASH);
        row.expires_at = Some(NOW.as_microseconds());
        row.scopes = Some("[\"chat\"]".into());
        row.allowed_ips = Some("[\"10.0.0.0/8\"]".into());
        row.allowed_endpoints = Some("[\"POST /v1/chat/*\"]".into());
        row.allowed_models = Some("[\"gpt-*\"]".into());
        row.budget_limit_cents = Some(100);
        row.total_cost = Some(99);
        row
    }

    #[test]
    fn a_key_within_all_its_rights_is_allowed() {
        assert_eq!(decide(&restricted(), &request()), Ok(()));
    }

    /// Each row breaks one rule and all later ones, so the answer also shows the order.
    #[test]
    fn rules_are_applied_in_the_contract_s_order() {
        type Break = fn(&mut CandidateRow);
        let rules: [(Break, Denial); 9] = [
            (|row| row.is_active = None, Denial::KeyInactive),
            (|row| row.expires_at = Some(NOW.as_microseconds() - 1), Denial::KeyExpired),
            (|row| row.user_is_active = Some(false), Denial::UserInactive),
            (|row| row.rate_limit_per_day = Some(-1), Denial::PolicyInvalid),
            (|row| row.allowed_ips = Some("[\"192.0.2.0/24\"]".into()), Denial::IpNotAllowed),
            (|row| row.allowed_endpoints = Some("[\"GET /v1/models\"]".into()), Denial::EndpointNotAllowed),
            (|row| row.scopes = None, Denial::ScopeMissing),
            (|row| row.allowed_models = Some("[\"claude-*\"]".into()), Denial::ModelNotAllowed),
            (|row| row.total_cost = Some(100), Denial::InsufficientQuota),
        ];
        for (first, (_, expected)) in rules.iter().enumerate() {
            let mut row = restricted();
            for (break_rule, _) in rules.iter().skip(first) {
                break_rule(&mut row);
            }
            assert_eq!(decide(&row, &request()), Err(*expected));
        }
    }

    #[test]
    fn an_unknown_client_is_in_no_network() {
        let unknown = Request { client: None, ..request() };
        assert_eq!(decide(&restricted(), &unknown), Err(Denial::IpNotAllowed));
    }

    #[test]
    fn an_ambiguous_path_matters_only_to_keys_with_an_endpoint_list() {
        let odd = Request { path: "/v1/chat/../admin", ..request() };
        assert_eq!(decide(&restricted(), &odd), Err(Denial::AmbiguousRequest));
        let mut open = restricted();
        open.allowed_endpoints = None;
        assert_eq!(decide(&open, &odd), Ok(()));
    }

    #[test]
    fn a_superuser_s_key_has_all_scopes_but_nothing_else() {
        let mut row = restricted();
        row.scopes = None;
        row.is_superuser = Some(true);
        assert_eq!(decide(&row, &request()), Ok(()));
        row.is_active = Some(false);
        assert_eq!(decide(&row, &request()), Err(Denial::KeyInactive));
    }

    #[test]
    fn a_key_on_the_deny_list_is_as_good_as_revoked_whoever_owns_it() {
        let mut row = restricted();
        row.is_superuser = Some(true);
        let (id, prefix) = (row.key_id, row.key_prefix.clone().unwrap());
        let list = |text: String| DenyList::parse(text.as_bytes(), PrefixLength::DEFAULT).unwrap();
        for denying in [format!("key-id {id}"), format!("prefix {prefix}")] {
            assert_eq!(decide_with(&list(denying), &row, &request()), Err(Denial::KeyInactive));
        }
        let other = list(format!("key-id {}\nprefix zz_other", id + 1));
        assert_eq!(decide_with(&other, &row, &request()), Ok(()));
        // It is the first rule, so nothing about the others is told.
        row.expires_at = Some(0);
        assert_eq!(decide_with(&list(format!("key-id {id}")), &row, &request()), Err(Denial::KeyInactive));
    }

    #[test]
    fn a_mismatch_proves_nothing() {
        let candidate = Arc::new(Candidate::from_row(&restricted()));
        assert!(Proven::from_verdict(&candidate, Verdict::Mismatch).is_none());
    }

    proptest! {
        /// Adding a restriction never turns a denial into an allow.
        #[test]
        fn narrowing_never_allows(which in 0_usize..6, start in 0_usize..6, value in prop::sample::select(vec!["[\"x\"]", "[\"/v1/**\"]", "[\"10.0.0.0/8\"]", "{}"])) {
            let narrow = |row: &mut CandidateRow, which: usize| match which {
                0 => row.allowed_ips = Some(value.into()),
                1 => row.allowed_endpoints = Some(value.into()),
                2 => row.allowed_models = Some(value.into()),
                3 => row.is_active = Some(false),
                4 => row.budget_limit_cents = Some(0),
                _ => row.expires_at = Some(0),
            };
            let mut before = CandidateRow::sample(HASH);
            before.scopes = Some("[\"chat\"]".into());
            if start != which {
                narrow(&mut before, start);
            }
            let mut after = before.clone();
            narrow(&mut after, which);
            if decide(&before, &request()).is_err() {
                prop_assert!(decide(&after, &request()).is_err());
            }
        }
    }
}
