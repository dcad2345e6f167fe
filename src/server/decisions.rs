//! A decision as a line of the decision log. `docs/decision-log.md` promises the names.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

use super::credentials;
use super::mask::Mask;
use super::options::{CredentialConflict, CredentialSource};
use super::request::Inbound;
use crate::authorizer::Checked;
use crate::clock;
use crate::domain::decision::{Decision, Tier};
use crate::domain::key::PresentedKey;
use crate::domain::key_format::KeyForm;
use crate::domain::record::Candidate;
use crate::domain::rules::Rule;
use crate::domain::time::Timestamp;
use crate::telemetry::decision_log::DecisionLog;

/// Longest path that is written.
const MAX_PATH_BYTES: usize = 1024;
/// Longest of the other texts that a caller chose.
const MAX_WORD_BYTES: usize = 128;

/// The prefix of a key that nobody has proven is shown where at least so much stays unseen: what was sent may be a short
/// password.
const MIN_UNSEEN_BYTES: usize = 16;

/// Writes decisions down.
pub struct DecisionRecorder {
    /// Where to.
    pub log: Arc<DecisionLog>,
    /// `--credential-sources`
    pub credential_sources: Vec<CredentialSource>,
    /// `--credential-conflict`
    pub credential_conflict: CredentialConflict,
    /// What keys look like.
    pub form: KeyForm,
}

/// Every name is in every line; what is not known is null.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    request_id: Option<String>,
    method: Option<String>,
    path: Option<String>,
    client: Option<String>,
    key_id: Option<String>,
    key_prefix: Option<&'a str>,
    user_id: Option<String>,
    decision: &'static str,
    reason: &'static str,
    rule: Option<&'static str>,
    shadow_reason: Option<&'static str>,
    model: Option<String>,
    tier: Option<&'static str>,
    duration_us: u64,
}

/// What is said of the key behind a decision.
struct About<'a> {
    key_id: Option<String>,
    key_prefix: Option<&'a str>,
    user_id: Option<String>,
}

impl DecisionRecorder {
    /// Writes one down, if it is wanted.
    pub fn record(&self, checked: &Checked, inbound: Option<&Inbound<'_>>, took: Duration) {
        if !self.log.wants(is_plain_allow(&checked.decision)) {
            return;
        }
        // Read a second time: most deployments write no lines, and their checks need not carry the key to here.
        let key = inbound.and_then(|inbound| {
            let (sources, conflict) = (&self.credential_sources, self.credential_conflict);
            credentials::find(sources, conflict, inbound.headers, inbound.target).ok().flatten()
        });
        if let Ok(line) = self.line(checked, inbound, key.as_ref(), clock::wall(), took) {
            self.log.write(line);
        }
    }

    fn line(
        &self,
        checked: &Checked,
        inbound: Option<&Inbound<'_>>,
        key: Option<&PresentedKey>,
        at: Timestamp,
        took: Duration,
    ) -> serde_json::Result<Vec<u8>> {
        let mask =
            inbound.map(|inbound| Mask::new(&self.form, key, inbound.headers, &self.credential_sources));
        let masked = |text: Option<&str>, limit: usize| {
            let text = text.filter(|text| !text.is_empty())?;
            Some(mask.as_ref()?.text(text, limit))
        };
        let (decision, reason) = words(&checked.decision);
        let (mut rule, mut shadow_reason, mut model) = (None, None, None);
        let about = match &checked.decision {
            Decision::Allow(permit) => {
                rule = permit.shadow_denial().map(|denial| denial.rule.name());
                shadow_reason = permit.shadow_denial().map(|denial| denial.reason.code());
                model = Some(permit.model());
                About {
                    key_id: Some(permit.key().id.to_string()),
                    key_prefix: Some(&permit.key().prefix),
                    user_id: permit.owner().id.map(|id| id.to_string()),
                }
            }
            Decision::Deny(denied) => {
                rule = denied.rule.map(Rule::name);
                denied.candidate.as_ref().map_or_else(|| self.unproven(key), |candidate| proven(candidate))
            }
            Decision::Anonymous | Decision::Unavailable(_) => self.unproven(key),
        };
        let line = Line {
            time: time(at),
            request_id: masked(inbound.and_then(Inbound::request_id), MAX_WORD_BYTES),
            method: masked(inbound.map(|inbound| inbound.request.method), MAX_WORD_BYTES),
            path: masked(inbound.and_then(|inbound| inbound.target.split(['?', '#']).next()), MAX_PATH_BYTES),
            client: inbound.and_then(|inbound| inbound.request.client).map(|client| client.to_string()),
            key_id: about.key_id,
            key_prefix: about.key_prefix,
            user_id: about.user_id,
            decision,
            reason,
            rule,
            shadow_reason,
            model: masked(model, MAX_WORD_BYTES),
            tier: checked.tier.map(Tier::as_str),
            duration_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        };
        let mut bytes = Vec::with_capacity(512);
        line.serialize(&mut Serializer::with_formatter(&mut bytes, Ascii))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    fn unproven<'k>(&self, key: Option<&'k PresentedKey>) -> About<'k> {
        let length = self.form.prefix_length;
        let prefix = key
            .filter(|key| key.length() >= length.get().saturating_add(MIN_UNSEEN_BYTES))
            .and_then(|key| key.prefix(length).ok());
        About { key_id: None, key_prefix: prefix, user_id: None }
    }
}

/// The words for a decision and its reason, in metrics and in the decision log.
pub fn words(decision: &Decision) -> (&'static str, &'static str) {
    match decision {
        Decision::Allow(_) => ("allow", "ok"),
        Decision::Anonymous => ("allow", "anonymous"),
        Decision::Deny(denied) => ("deny", denied.reason.code()),
        Decision::Unavailable(cause) => ("unavailable", cause.as_str()),
    }
}

fn is_plain_allow(decision: &Decision) -> bool {
    match decision {
        Decision::Allow(permit) => permit.shadow_denial().is_none(),
        Decision::Anonymous => true,
        Decision::Deny(_) | Decision::Unavailable(_) => false,
    }
}

fn proven(candidate: &Candidate) -> About<'_> {
    About {
        key_id: Some(candidate.key.id.to_string()),
        key_prefix: Some(&candidate.key.prefix),
        user_id: candidate.owner.id.map(|id| id.to_string()),
    }
}

/// RFC 3339 in UTC, always with six digits behind the point.
fn time(at: Timestamp) -> String {
    let at = jiff::Timestamp::from_microsecond(at.as_microseconds()).unwrap_or_default();
    format!("{at:.6}")
}

/// JSON in visible ASCII alone: what a caller sent must not move a terminal's cursor or turn a line around.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, to: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|char: char| !char.is_ascii() || char.is_ascii_control()) {
            let (plain, odd) = rest.split_at_checked(at).unwrap_or((rest, ""));
            to.write_all(plain.as_bytes())?;
            let mut odd = odd.chars();
            if let Some(char) = odd.next() {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    write!(to, "\\u{unit:04x}")?;
                }
            }
            rest = odd.as_str();
        }
        to.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_six_digits() {
        let text = |microseconds| time(Timestamp::from_microseconds(microseconds));
        assert_eq!(text(1_700_000_000_000_000), "2023-11-14T22:13:20.000000Z");
        assert_eq!(text(1_700_000_000_000_001), "2023-11-14T22:13:20.000001Z");
    }

    #[test]
    fn a_line_is_visible_ascii_and_reads_back() {
        for text in
            ["plain", "tab\tline\nquote\"back\\slash", "\u{1b}[2J\u{7f}\u{9b}31m", "ü 名 🦀 \u{202e}", ""]
        {
            let mut bytes = Vec::new();
            text.serialize(&mut Serializer::with_formatter(&mut bytes, Ascii)).unwrap();
            assert!(bytes.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' '), "{bytes:?}");
            assert_eq!(serde_json::from_slice::<String>(&bytes).unwrap(), text);
        }
    }
}
