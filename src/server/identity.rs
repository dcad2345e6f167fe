//! The headers that tell the upstream who is calling, and the names that nobody else may send.
//!
//! Every owned name is either set (overwriting what the caller sent) or removed, under its underscore spelling too:
//! WSGI and CGI upstreams read `x_keyward_user_id` and `x-keyward-user-id` as one name.

use std::borrow::Cow;
use std::fmt::Write;

use super::answer::{put_header, put_removal};
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

    /// What an allow says whatever the request: headers that are set and names that are removed.
    pub fn put_of_record(&self, to: &mut Vec<u8>, permit: &Permit, part: Part) -> Said {
        let mut said = Said::default();
        for (place, (header, name)) in self.sent.iter().enumerate() {
            if part_of(*header) == Some(part) {
                put(to, name, value(*header, permit), place, &mut said);
            }
        }
        said
    }

    /// What it says besides: the model, which names were too long, and the removal of whatever the caller sent under our
    /// prefix, in any mixture of dashes and underscores, and that is not overwritten.
    pub fn put_of_request(&self, to: &mut Vec<u8>, permit: &Permit, of_record: Said, headers: &Headers<'_>) {
        let mut said = of_record;
        for (place, (header, name)) in self.sent.iter().enumerate() {
            if part_of(*header).is_none() {
                put(to, name, text(permit.model()), place, &mut said);
            }
        }
        if said.too_long == 0 {
            put_removal(to, &self.overflow);
        } else {
            let places = self.sent.iter().enumerate();
            let names = places.filter(|(place, _)| said.too_long & bit(*place) != 0);
            let names: Vec<&str> = names.map(|(_, (header, _))| header.name()).collect();
            put_header(to, &self.overflow, &names.join(","));
        }
        self.put_spoofed(to, said, headers);
    }

    /// The removal of every owned name, where nothing is set.
    pub fn put_all_removed(&self, to: &mut Vec<u8>, headers: &Headers<'_>) {
        for (_, name) in &self.sent {
            put_removal(to, name);
        }
        put_removal(to, &self.overflow);
        self.put_spoofed(to, Said::default(), headers);
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

    fn put_spoofed(&self, to: &mut Vec<u8>, said: Said, headers: &Headers<'_>) {
        for (name, _) in headers.iter() {
            if starts_with_folded(name, &self.prefix) && !self.is_set(name, said) {
                put_removal(to, name);
            }
        }
    }

    fn is_set(&self, name: &str, said: Said) -> bool {
        let is_named = |own: &String| own.eq_ignore_ascii_case(name);
        match self.sent.iter().position(|(_, own)| is_named(own)) {
            Some(place) => said.set & bit(place) != 0,
            None => said.too_long != 0 && is_named(&self.overflow),
        }
    }
}

/// Which headers were set and which were too long to be, by their places in the configured list.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Said {
    /// Set.
    pub set: u32,
    /// Too long.
    pub too_long: u32,
}

impl Said {
    /// Both.
    pub fn and(self, other: Self) -> Self {
        Self { set: self.set | other.set, too_long: self.too_long | other.too_long }
    }
}

/// What a header is about, and so how many requests it is the same for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The key and its owner.
    Key,
    /// The key's rights, which other keys have too.
    Rights,
}

/// `None` where it depends on the request.
fn part_of(header: IdentityHeader) -> Option<Part> {
    match header {
        IdentityHeader::KeyId
        | IdentityHeader::KeyName
        | IdentityHeader::KeyPrefix
        | IdentityHeader::UserId
        | IdentityHeader::Username
        | IdentityHeader::UserEmail
        | IdentityHeader::Role
        | IdentityHeader::Superuser => Some(Part::Key),
        IdentityHeader::Scopes
        | IdentityHeader::AllowedModels
        | IdentityHeader::AllowedEndpoints
        | IdentityHeader::AllowedChatbots
        | IdentityHeader::RateLimitMinute
        | IdentityHeader::RateLimitHour
        | IdentityHeader::RateLimitDay
        | IdentityHeader::BudgetLimitCents
        | IdentityHeader::BudgetRemainingCents => Some(Part::Rights),
        IdentityHeader::Model => None,
    }
}

/// There are fewer headers than bits.
fn bit(place: usize) -> u32 {
    u32::try_from(place).ok().and_then(|place| 1_u32.checked_shl(place)).unwrap_or_default()
}

/// Sets a header, or removes it where there is nothing to say or too much.
fn put(to: &mut Vec<u8>, name: &str, value: Option<Cow<'_, str>>, place: usize, said: &mut Said) {
    match value {
        Some(value) if value.len() <= MAX_LIST_BYTES => {
            put_header(to, name, &value);
            said.set |= bit(place);
        }
        Some(_) => {
            put_removal(to, name);
            said.too_long |= bit(place);
        }
        None => put_removal(to, name),
    }
}

/// Whether `name` begins with `prefix`, letters in any case and `_` as good as `-`.
pub fn starts_with_folded(name: &str, prefix: &str) -> bool {
    let folded = |byte: u8| if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() >= prefix.len()
        && name.bytes().zip(prefix.bytes()).all(|(own, other)| folded(own) == folded(other))
}

/// The value of one header; `None` where there is nothing to say (no limit, no such column).
fn value(header: IdentityHeader, permit: &Permit) -> Option<Cow<'_, str>> {
    let (key, owner, policy) = (permit.key(), permit.owner(), permit.policy());
    let written = |text: String| Some(Cow::Owned(text));
    let cents = |amount: Option<Cents>| amount.and_then(|amount| written(amount.get().to_string()));
    let limit = |limit: Option<u32>| limit.and_then(|limit| written(limit.to_string()));
    match header {
        IdentityHeader::KeyId => written(key.id.to_string()),
        IdentityHeader::KeyName => text(&key.name),
        IdentityHeader::KeyPrefix => text(&key.prefix),
        IdentityHeader::UserId => owner.id.and_then(|id| written(id.to_string())),
        IdentityHeader::Username => text(&owner.username),
        IdentityHeader::UserEmail => text(&owner.email),
        IdentityHeader::Role => text(&owner.role),
        IdentityHeader::Superuser => written(owner.is_superuser.to_string()),
        IdentityHeader::Scopes => written(join(policy.scopes.iter())),
        IdentityHeader::AllowedModels => written(list(&policy.models, |rule| rule.as_str())),
        IdentityHeader::AllowedEndpoints => written(list(&policy.endpoints, |(text, _)| text)),
        IdentityHeader::AllowedChatbots => written(list(&policy.chatbots, |name| name)),
        IdentityHeader::RateLimitMinute => limit(policy.rate_limits.minute),
        IdentityHeader::RateLimitHour => limit(policy.rate_limits.hour),
        IdentityHeader::RateLimitDay => limit(policy.rate_limits.day),
        IdentityHeader::BudgetLimitCents => cents(policy.budget.limit()),
        IdentityHeader::BudgetRemainingCents => cents(policy.budget.remaining()),
        IdentityHeader::Model => text(permit.model()),
    }
}

fn text(value: &str) -> Option<Cow<'_, str>> {
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
pub fn encode(value: &str) -> Cow<'_, str> {
    if value.bytes().all(is_plain) {
        return Cow::Borrowed(value);
    }
    let mut encoded = String::with_capacity(value.len());
    encode_into(value, &mut encoded);
    Cow::Owned(encoded)
}

fn encode_into(value: &str, encoded: &mut String) {
    for byte in value.bytes() {
        if is_plain(byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
}

const fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && byte != b'%' && byte != b','
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
    use envoy_types::pb::envoy::service::auth::v3::OkHttpResponse;
    use proptest::prelude::*;
    use prost::Message;

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

    fn of(permit: &Permit, sent: &[(&str, &str)]) -> (Vec<(String, String)>, Vec<String>) {
        written(&IdentityHeaders::new("x-keyward-", IdentityHeader::ALL), permit, sent)
    }

    /// What Envoy reads: headers to set, names to remove.
    fn written(
        identity: &IdentityHeaders,
        permit: &Permit,
        sent: &[(&str, &str)],
    ) -> (Vec<(String, String)>, Vec<String>) {
        let pairs: Vec<_> =
            sent.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
        let mut bytes = Vec::new();
        let said = identity.put_of_record(&mut bytes, permit, Part::Key);
        let said = said.and(identity.put_of_record(&mut bytes, permit, Part::Rights));
        identity.put_of_request(&mut bytes, permit, said, &Headers::from_pairs(&pairs));
        let response = OkHttpResponse::decode(&*bytes).unwrap();
        let headers = response.headers.into_iter().map(|option| {
            assert_eq!(option.append_action(), HeaderAppendAction::OverwriteIfExistsOrAdd);
            let header = option.header.unwrap();
            (header.key, header.value)
        });
        (headers.collect(), response.headers_to_remove)
    }

    fn get<'a>(set: &'a [(String, String)], name: &str) -> Option<&'a str> {
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
            let (set, mut remove) = written(&headers, &permit, &[]);
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
