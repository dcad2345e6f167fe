//! Facts for later Envoy filters: the dynamic metadata of the namespace `envoy.filters.http.ext_authz`.
//!
//! Ids are strings, because metadata numbers are doubles. A rate limit has the exact shape that Envoy's rate-limit
//! filter takes as an override (upper-case unit, whole number); anything else would silently mean "no override".

use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};

use super::protobuf::{field_length, put_bytes, put_head};
use crate::domain::allowlist::Allowlist;
use crate::domain::decision::{Denied, Tier};
use crate::domain::limit::RateLimits;
use crate::domain::model::ModelRule;
use crate::domain::policy::Permit;
use crate::domain::record::KeyPolicy;

/// What is said of a key and its owner in every request of its that is allowed.
pub fn of_key(permit: &Permit) -> Struct {
    let (key, owner) = (permit.key(), permit.owner());
    let mut facts = Facts::default();
    facts.text("key_id", &key.id.to_string());
    facts.text("key_name", &key.name);
    facts.text("key_prefix", &key.prefix);
    facts.text("user_id", &owner.id.map(|id| id.to_string()).unwrap_or_default());
    facts.text("username", &owner.username);
    facts.text("role", &owner.role);
    facts.0
}

/// What is said of rights in every request that is allowed by them.
pub fn of_rights(policy: &KeyPolicy) -> Struct {
    let mut facts = Facts::default();
    facts.list("scopes", policy.scopes.iter());
    match &policy.models {
        Allowlist::Unrestricted => facts.list("allowed_models", ["*"].into_iter()),
        Allowlist::Only(models) => {
            facts.list("allowed_models", models.iter().map(ModelRule::as_str));
        }
    }
    facts.set("rate_limit", Kind::StructValue(rate_limits(policy.rate_limits)));
    facts.0
}

/// What is said of an allowed request besides: fields of the same `Struct`, as they go over the wire.
pub fn put_of_request(to: &mut Vec<u8>, permit: &Permit, tier: Option<Tier>) {
    put_text(to, "model", permit.model());
    put_text(
        to,
        "shadow_reason",
        permit.shadow_denial().map(|denial| denial.reason.code()).unwrap_or_default(),
    );
    put_text(to, "tier", tier.map(Tier::as_str).unwrap_or_default());
}

/// An entry of `Struct.fields` whose `Value` is a text; none where that is empty.
fn put_text(to: &mut Vec<u8>, name: &str, text: &str) {
    const FIELDS: u32 = 1;
    const STRING_VALUE: u32 = 3;
    if text.is_empty() {
        return;
    }
    let value = field_length(STRING_VALUE, text.len());
    put_head(to, FIELDS, field_length(1, name.len()).saturating_add(field_length(2, value)));
    put_bytes(to, 1, name.as_bytes());
    put_head(to, 2, value);
    put_bytes(to, STRING_VALUE, text.as_bytes());
}

/// What is said of a denied one: the reason, and the key where it was proven.
pub fn of_denial(reason: &str, denied: Option<&Denied>) -> Struct {
    let mut facts = Facts::default();
    facts.text("reason", reason);
    if let Some(candidate) = denied.and_then(|denied| denied.candidate.as_ref()) {
        facts.text("key_id", &candidate.key.id.to_string());
    }
    facts.0
}

fn rate_limits(limits: RateLimits) -> Struct {
    let mut facts = Facts::default();
    let units =
        [("minute", "MINUTE", limits.minute), ("hour", "HOUR", limits.hour), ("day", "DAY", limits.day)];
    for (name, unit, limit) in units {
        if let Some(requests) = limit {
            let mut limit = Facts::default();
            limit.set("requests_per_unit", Kind::NumberValue(f64::from(requests)));
            limit.text("unit", unit);
            facts.set(name, Kind::StructValue(limit.0));
        }
    }
    facts.0
}

#[derive(Default)]
struct Facts(Struct);

impl Facts {
    fn set(&mut self, name: &str, kind: Kind) {
        self.0.fields.insert(name.to_owned(), Value { kind: Some(kind) });
    }

    /// Empty texts are left out: a rate-limit descriptor with an empty value is not sent at all.
    fn text(&mut self, name: &str, text: &str) {
        if !text.is_empty() {
            self.set(name, Kind::StringValue(text.to_owned()));
        }
    }

    fn list<'a>(&mut self, name: &str, items: impl Iterator<Item = &'a str>) {
        let values = items.map(|item| Value { kind: Some(Kind::StringValue(item.to_owned())) }).collect();
        self.set(name, Kind::ListValue(ListValue { values }));
    }
}
