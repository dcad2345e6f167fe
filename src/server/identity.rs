//! The headers that tell the upstream who is calling, and the names that nobody else may send.
//!
//! Every owned name is either set (overwriting what the caller sent) or removed, under its underscore spelling too:
//! WSGI and CGI upstreams read `x_keyward_user_id` and `x-keyward-user-id` as one name.

use std::fmt::Write;

use super::headers::Headers;
use super::options::IdentityHeader;
use crate::domain::allowlist::Allowlist;
use crate::domain::limit::Cents;
use crate::domain::policy::Permit;

/// A list that is longer is not sent; its name goes into the overflow header. Envoy refuses requests over 60 KiB of
/// headers, and upstreams refuse sooner.
pub const MAX_LIST_BYTES: usize = 8 * 1024;

/// Owned names that are no identity header: the list of those that were too long, and the reason of a denial.
const OTHER_OWNED: [&str; 2] = ["overflow", "reason"];

/// The names under one prefix, made once.
pub struct IdentityHeaders {
    prefix: String,
    /// What is sent, with its full name.
    sent: Vec<(IdentityHeader, String)>,
    overflow: String,
    /// Owned names that are never sent, and the underscore spelling of all.
    never_sent: Vec<String>,
}

/// A header to set: full name, encoded value.
pub type HeaderPair = (String, String);

impl IdentityHeaders {
    /// `prefix` as `--response-header-prefix`, `sent` as `--response-headers`.
    pub fn new(prefix: &str, sent: &[IdentityHeader]) -> Self {
        let full = |name: &str| format!("{prefix}{name}");
        let owned = || IdentityHeader::ALL.iter().map(|header| header.name()).chain(OTHER_OWNED);
        let is_sent = |name: &str| sent.iter().any(|header| header.name() == name);
        let unsent = owned().filter(|name| !is_sent(name) && *name != "overflow").map(full);
        let underscored = owned().map(full).map(|name| name.replace('-', "_"));
        Self {
            prefix: prefix.to_owned(),
            sent: sent.iter().map(|header| (*header, full(header.name()))).collect(),
            overflow: full("overflow"),
            never_sent: unsent.chain(underscored).collect(),
        }
    }

    /// The headers of an allow, and the owned names among `headers` to be removed besides [`Self::never_sent`].
    pub fn of(&self, permit: &Permit, headers: &Headers<'_>) -> (Vec<HeaderPair>, Vec<String>) {
        let mut set = Vec::with_capacity(self.sent.len());
        let mut remove = Vec::new();
        let mut overflow = String::new();
        for (header, name) in &self.sent {
            match value(*header, permit) {
                Some(value) if value.len() <= MAX_LIST_BYTES => set.push((name.clone(), value)),
                Some(_) => {
                    let separator = if overflow.is_empty() { "" } else { "," };
                    let _ = write!(overflow, "{separator}{}", header.name());
                    remove.push(name.clone());
                }
                None => remove.push(name.clone()),
            }
        }
        if overflow.is_empty() {
            remove.push(self.overflow.clone());
        } else {
            set.push((self.overflow.clone(), overflow));
        }
        self.add_spoofed(headers, &set, &mut remove);
        (set, remove)
    }

    /// What is removed where nothing is set: every owned name.
    pub fn all(&self, headers: &Headers<'_>) -> Vec<String> {
        let mut remove: Vec<String> = self.sent.iter().map(|(_, name)| name.clone()).collect();
        remove.push(self.overflow.clone());
        self.add_spoofed(headers, &[], &mut remove);
        remove
    }

    /// Every name that nobody else may send, in its own spelling.
    pub fn owned(&self) -> impl Iterator<Item = String> {
        let names = IdentityHeader::ALL.iter().map(|header| header.name()).chain(OTHER_OWNED);
        names.map(|name| format!("{}{name}", self.prefix))
    }

    /// Owned names that are removed from every request.
    pub fn never_sent(&self) -> &[String] {
        &self.never_sent
    }

    /// Whatever the caller sent under our prefix, in any mixture of dashes and underscores, and that is not about to
    /// be overwritten.
    fn add_spoofed(&self, headers: &Headers<'_>, set: &[HeaderPair], remove: &mut Vec<String>) {
        for (name, _) in headers.iter() {
            let is_ours = starts_with_folded(name, &self.prefix);
            if is_ours && !set.iter().any(|(own, _)| own.eq_ignore_ascii_case(name)) {
                remove.push(name.to_owned());
            }
        }
    }
}

/// Whether `name` begins with `prefix`, letters in any case and `_` as good as `-`.
pub fn starts_with_folded(name: &str, prefix: &str) -> bool {
    let folded = |byte: u8| if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() >= prefix.len()
        && name.bytes().zip(prefix.bytes()).all(|(own, other)| folded(own) == folded(other))
}

/// The value of one header; `None` where there is nothing to say (no limit, no such column).
fn value(header: IdentityHeader, permit: &Permit) -> Option<String> {
    let (key, owner, policy) = (permit.key(), permit.owner(), permit.policy());
    let cents = |amount: Option<Cents>| amount.map(|amount| amount.get().to_string());
    let limit = |limit: Option<u32>| limit.map(|limit| limit.to_string());
    match header {
        IdentityHeader::KeyId => Some(key.id.to_string()),
        IdentityHeader::KeyName => text(&key.name),
        IdentityHeader::KeyPrefix => text(&key.prefix),
        IdentityHeader::UserId => owner.id.map(|id| id.to_string()),
        IdentityHeader::Username => text(&owner.username),
        IdentityHeader::UserEmail => text(&owner.email),
        IdentityHeader::Role => text(&owner.role),
        IdentityHeader::Superuser => Some(owner.is_superuser.to_string()),
        IdentityHeader::Scopes => Some(join(policy.scopes.iter())),
        IdentityHeader::AllowedModels => Some(list(&policy.models, |rule| rule.as_str())),
        IdentityHeader::AllowedEndpoints => Some(list(&policy.endpoints, |(text, _)| text)),
        IdentityHeader::AllowedChatbots => Some(list(&policy.chatbots, |name| name)),
        IdentityHeader::RateLimitMinute => limit(policy.rate_limits.minute),
        IdentityHeader::RateLimitHour => limit(policy.rate_limits.hour),
        IdentityHeader::RateLimitDay => limit(policy.rate_limits.day),
        IdentityHeader::BudgetLimitCents => cents(policy.budget.limit()),
        IdentityHeader::BudgetRemainingCents => cents(policy.budget.remaining()),
        IdentityHeader::Model => text(permit.model()),
    }
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| encode(value))
}

fn list<T>(list: &Allowlist<T>, text: impl Fn(&T) -> &str) -> String {
    match list {
        Allowlist::Unrestricted => "*".to_owned(),
        Allowlist::Only(entries) => join(entries.iter().map(text)),
    }
}

fn join<'a>(items: impl Iterator<Item = &'a str>) -> String {
    let mut joined = String::new();
    for item in items {
        if !joined.is_empty() {
            joined.push(',');
        }
        encode_into(item, &mut joined);
    }
    joined
}

/// Percent-encodes every byte outside visible ASCII, and `%` and `,`, so that a value is one line and a list has as
/// many items as it had.
pub fn encode(value: &str) -> String {
    let mut encoded = String::with_capacity(value.len());
    encode_into(value, &mut encoded);
    encoded
}

fn encode_into(value: &str, encoded: &mut String) {
    for byte in value.bytes() {
        if byte.is_ascii_graphic() && byte != b'%' && byte != b',' {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::body::Body;
    use crate::domain::deny_list::DenyList;
    use crate::domain::policy;
    use crate::domain::proof::{Proven, Verdict};
    use crate::domain::record::Candidate;
    use crate::domain::request::{Request, RouteOptions};
    use crate::domain::row::CandidateRow;
    use crate::domain::rules::PolicyRules;
    use crate::domain::time::Timestamp;

    fn permit(change: impl FnOnce(&mut CandidateRow)) -> Permit {
        let mut row = CandidateRow::sample("sha256:00");
        change(&mut row);
        let proven = Proven::from_verdict(&Arc::new(Candidate::from_row(&row)), Verdict::Match).unwrap();
        let request = Request {
            method: "GET",
            path: "/",
            client: None,
            route: RouteOptions::default(),
            body: Body::default(),
        };
        policy::evaluate(
            proven,
            &DenyList::default(),
            &PolicyRules::default(),
            &request,
            Timestamp::from_microseconds(0),
        )
        .unwrap()
    }

    fn of(permit: &Permit, sent: &[(&str, &str)]) -> (Vec<HeaderPair>, Vec<String>) {
        let pairs: Vec<_> =
            sent.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
        IdentityHeaders::new("x-keyward-", IdentityHeader::ALL).of(permit, &Headers::from_pairs(&pairs))
    }

    fn get<'a>(set: &'a [HeaderPair], name: &str) -> Option<&'a str> {
        set.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    #[test]
    fn values_are_encoded_and_lists_joined() {
        let permit = permit(|row| {
            row.key_name = Some("a b\r\nx: 100%,é".into());
            row.allowed_models = Some("[\"gpt-4o\", \"a,b\", \"ü\"]".into());
            row.rate_limit_per_minute = Some(60);
            row.budget_limit_cents = Some(500);
            row.total_cost = Some(120);
        });
        let (set, remove) = of(&permit, &[]);
        assert_eq!(get(&set, "x-keyward-key-name"), Some("a%20b%0D%0Ax:%20100%25%2C%C3%A9"));
        assert_eq!(get(&set, "x-keyward-allowed-models"), Some("gpt-4o,a%2Cb,%C3%BC"));
        assert_eq!(get(&set, "x-keyward-allowed-endpoints"), Some("*"));
        assert_eq!(get(&set, "x-keyward-scopes"), Some(""));
        assert_eq!(get(&set, "x-keyward-rate-limit-minute"), Some("60"));
        assert_eq!(get(&set, "x-keyward-budget-remaining-cents"), Some("380"));
        assert_eq!(get(&set, "x-keyward-rate-limit-hour"), None);
        assert!(remove.contains(&"x-keyward-rate-limit-hour".to_owned()));
    }

    #[test]
    fn a_list_over_8_kib_is_named_and_not_sent() {
        let many: Vec<String> = (0..2_000).map(|number| format!("\"model-{number}\"")).collect();
        let permit = permit(|row| row.allowed_models = Some(format!("[{}]", many.join(","))));
        let (set, remove) = of(&permit, &[]);
        assert_eq!(get(&set, "x-keyward-overflow"), Some("allowed-models"));
        assert_eq!(get(&set, "x-keyward-allowed-models"), None);
        assert!(remove.contains(&"x-keyward-allowed-models".to_owned()));
    }

    #[test]
    fn nothing_the_caller_sent_under_an_owned_name_survives() {
        let spoofed = [
            ("x-keyward-user-id", "1"),
            ("X-Keyward_User-Id", "1"),
            ("x_keyward_role", "admin"),
            ("x-keyward-anything", "1"),
            ("x-keyward-model", "gpt"),
            ("x-other", "1"),
        ];
        let permit = permit(|_| ());
        let headers = IdentityHeaders::new("x-keyward-", IdentityHeader::ALL);
        let (set, mut remove) = of(&permit, &spoofed);
        remove.extend(headers.never_sent().iter().cloned());
        for (name, _) in spoofed {
            let survives = get(&set, name).is_none() && !remove.iter().any(|own| own == name);
            assert_eq!(survives, name == "x-other", "{name}");
        }
        // Envoy removes after it sets, so a name in both would be lost.
        assert!(set.iter().all(|(name, _)| !remove.contains(name)));
    }

    #[test]
    fn every_owned_name_is_set_or_removed_whatever_is_configured() {
        let permit = permit(|_| ());
        for sent in [&[][..], &[IdentityHeader::KeyId][..], IdentityHeader::ALL] {
            let headers = IdentityHeaders::new("x-keyward-", sent);
            let (set, mut remove) = headers.of(&permit, &Headers::from_pairs(&[]));
            remove.extend(headers.never_sent().iter().cloned());
            let owned = IdentityHeader::ALL.iter().map(|header| header.name()).chain(OTHER_OWNED);
            for name in owned.map(|name| format!("x-keyward-{name}")) {
                assert_eq!(get(&set, &name).is_some(), !remove.contains(&name), "{name}");
                assert!(remove.contains(&name.replace('-', "_")));
            }
        }
    }

    proptest! {
        #[test]
        fn an_encoded_value_is_one_visible_line_and_can_be_read_back(value in "\\PC*|[\\x00-\\xff]*") {
            let encoded = encode(&value);
            prop_assert!(encoded.bytes().all(|byte| byte.is_ascii_graphic() && byte != b','));
            prop_assert_eq!(crate::domain::path::decode(&encoded).unwrap(), value.into_bytes());
        }
    }
}
