//! Decision to answer: the only file that builds one.
//!
//! In Envoy a response is an allow if its `status.code` is 0, whatever else it holds, and an empty message has code 0.
//! So nothing here uses a default: `Responder::allow` needs a permit, and every other way out goes through
//! `Responder::refuse`, whose code is never 0.

use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{CheckResponse, DeniedHttpResponse, OkHttpResponse};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::rpc;
use prost::Message;

use super::answer::{AllowWriter, Answer, put_query_removal, put_removal};
use super::credentials::{KNOWN_CARRIERS, query_spellings};
use super::error_body::{self, Refusal};
use super::identity::{IdentityHeaders, Part, Said, starts_with_folded};
use super::metadata;
use super::options::{CredentialSource, ErrorFormat, IdentityHeader, OnUnavailable};
use super::request::Inbound;
use crate::authorizer::Checked;
use crate::domain::decision::{Decision, Denied, Tier};
use crate::domain::denial::Denial;
use crate::domain::policy::Permit;
use crate::domain::prepared::Written;

/// What an operator chooses about answers.
#[derive(Debug, Clone)]
pub struct ResponseOptions {
    /// `--response-header-prefix`
    pub header_prefix: String,
    /// `--response-headers`
    pub headers: Vec<IdentityHeader>,
    /// `--credential-sources`
    pub credential_sources: Vec<CredentialSource>,
    /// `--forward-credentials`
    pub forward_credentials: bool,
    /// `--error-format`
    pub error_format: ErrorFormat,
    /// `--on-unavailable`
    pub on_unavailable: OnUnavailable,
}

/// Headers by which some frameworks route a request to another path or method than its own.
const OVERRIDES: [&str; 5] =
    ["x-original-url", "x-rewrite-url", "x-http-method-override", "x-http-method", "x-method-override"];

/// Builds answers; what is the same in all of them is made once.
pub struct Responder {
    identity: IdentityHeaders,
    /// Headers that carry credentials: known ones and configured ones; empty with `--forward-credentials`.
    carriers: Vec<String>,
    /// The removal, in every allow, of carriers and of owned names that are never sent, as it goes over the wire.
    always_removed: Vec<u8>,
    reason_header: String,
    options: ResponseOptions,
}

/// The check could not be decided and the operator wants Envoy's failure mode to decide.
#[derive(Debug)]
pub struct LeftToEnvoy;

impl Responder {
    /// Makes what every answer shares.
    pub fn new(options: ResponseOptions) -> Self {
        let identity = IdentityHeaders::new(&options.header_prefix, &options.headers);
        let carriers =
            if options.forward_credentials { Vec::new() } else { carriers(&options.credential_sources) };
        let mut always_removed = Vec::new();
        for name in carriers.iter().chain(identity.never_sent()) {
            put_removal(&mut always_removed, name);
        }
        let reason_header = format!("{}reason", options.header_prefix);
        Self { identity, carriers, always_removed, reason_header, options }
    }

    /// Every header that only Keyward may send upstream.
    pub fn owned_headers(&self) -> impl Iterator<Item = String> {
        self.identity.owned()
    }

    /// The answer to a check. `inbound` is `None` for a check without an HTTP request.
    pub fn respond(&self, checked: &Checked, inbound: Option<&Inbound<'_>>) -> Result<Answer, LeftToEnvoy> {
        match (&checked.decision, inbound) {
            (Decision::Allow(permit), Some(inbound)) => Ok(self.allow(permit, checked.tier, inbound)),
            (Decision::Anonymous, Some(inbound)) => Ok(self.allow_anonymous(inbound)),
            (Decision::Deny(denied), _) => Ok(Answer::of(&self.deny(denied, inbound))),
            (Decision::Unavailable(_), _) => match self.options.on_unavailable {
                OnUnavailable::Deny => Ok(Answer::of(&self.refuse(UNAVAILABLE, None, inbound))),
                OnUnavailable::Error => Err(LeftToEnvoy),
            },
            // Nothing can be allowed that was not asked for over HTTP.
            (Decision::Allow(_) | Decision::Anonymous, None) => {
                Ok(Answer::of(&self.deny(&Denied::unproven(Denial::MissingCredentials), None)))
            }
        }
    }

    fn allow(&self, permit: &Permit, tier: Option<Tier>, inbound: &Inbound<'_>) -> Answer {
        let of_key = permit.candidate().prepared.get_or_write(|| self.write(permit, Part::Key));
        let of_rights = permit.policy().prepared.get_or_write(|| self.write(permit, Part::Rights));
        let ((key_headers, key_facts), (rights_headers, rights_facts)) = (of_key.parts(), of_rights.parts());
        let mut allow = AllowWriter {
            prepared: [&self.always_removed, key_headers, rights_headers],
            prepared_facts: [key_facts, rights_facts],
            ..AllowWriter::default()
        };
        let said = |written: &Written| Said { set: written.set, too_long: written.too_long };
        let said = said(of_key).and(said(of_rights));
        self.identity.put_of_request(&mut allow.response, permit, said, inbound.headers);
        self.put_removals(&mut allow.response, inbound);
        if permit.is_by_path() {
            let names = inbound.headers.iter().map(|(name, _)| name);
            names
                .filter(|name| takes_the_place_of_the_path(name))
                .for_each(|name| put_removal(&mut allow.response, name));
        }
        metadata::put_of_request(&mut allow.facts, permit, tier);
        allow.finish()
    }

    /// What every allow of this key, or by these rights, says.
    fn write(&self, permit: &Permit, part: Part) -> Written {
        let mut headers = Vec::new();
        let said = self.identity.put_of_record(&mut headers, permit, part);
        let facts = match part {
            Part::Key => metadata::of_key(permit),
            Part::Rights => metadata::of_rights(permit.policy()),
        };
        Written::new(&headers, &facts.encode_to_vec(), said.set, said.too_long)
    }

    fn allow_anonymous(&self, inbound: &Inbound<'_>) -> Answer {
        let mut allow = AllowWriter { prepared: [&self.always_removed, &[], &[]], ..AllowWriter::default() };
        self.identity.put_all_removed(&mut allow.response, inbound.headers);
        self.put_removals(&mut allow.response, inbound);
        allow.finish()
    }

    /// Carriers as an upstream may spell them (`x_api_key`), and those in the query.
    fn put_removals(&self, to: &mut Vec<u8>, inbound: &Inbound<'_>) {
        if self.options.forward_credentials {
            return;
        }
        for (name, _) in inbound.headers.iter() {
            let is_carrier =
                |carrier: &String| name.len() == carrier.len() && starts_with_folded(name, carrier);
            if name.contains('_') && self.carriers.iter().any(is_carrier) {
                put_removal(to, name);
            }
        }
        for spelling in query_spellings(&self.options.credential_sources, inbound.target) {
            put_query_removal(to, spelling);
        }
    }

    fn deny(&self, denied: &Denied, inbound: Option<&Inbound<'_>>) -> CheckResponse {
        let reason = denied.reason;
        let refusal =
            Refusal { status: reason.http_status(), code: reason.code(), message: denied.message() };
        self.refuse(refusal, Some(denied), inbound)
    }

    fn refuse(
        &self,
        refusal: Refusal,
        denied: Option<&Denied>,
        inbound: Option<&Inbound<'_>>,
    ) -> CheckResponse {
        let grpc_status = grpc_status(refusal.status);
        let mut headers = vec![overwrite(self.reason_header.clone(), refusal.code.to_owned())];
        let mut header = |name: &str, value: &str| headers.push(overwrite(name.to_owned(), value.to_owned()));
        match refusal.status {
            401 => header("www-authenticate", "Bearer realm=\"keyward\""),
            429 => {
                let wait = denied.and_then(|denied| denied.retry_after).unwrap_or(Duration::from_secs(1));
                header("retry-after", &whole_seconds(wait).to_string());
            }
            503 => header("retry-after", "1"),
            _ => {}
        }
        if !is_worth_repeating(refusal.status) {
            header("x-should-retry", "false");
        }
        if let Some(id) = inbound.and_then(Inbound::request_id) {
            // OpenAI's SDKs show the one with an error, Anthropic's the other.
            header("x-request-id", id);
            header("request-id", id);
        }
        let body = if inbound.is_some_and(Inbound::is_grpc) {
            // Envoy makes the body the grpc-message, and this header its status.
            header("grpc-status", &grpc_status.to_string());
            refusal.message.to_owned()
        } else {
            let written = error_body::write(refusal, self.options.error_format, inbound);
            header("content-type", written.content_type);
            written.body
        };
        let status = HttpStatus { code: i32::from(refusal.status) };
        CheckResponse {
            status: Some(rpc::Status {
                code: grpc_status,
                message: refusal.code.to_owned(),
                details: Vec::new(),
            }),
            dynamic_metadata: Some(metadata::of_denial(refusal.code, denied)),
            http_response: Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
                status: Some(status),
                headers,
                body,
            })),
        }
    }
}

const UNAVAILABLE: Refusal = Refusal {
    status: 503,
    code: "unavailable",
    message: "The request can't be authorized right now. Try again in a moment.",
};

/// What an answer allows; `None` for a denial.
pub fn allowed(response: &CheckResponse) -> Option<&OkHttpResponse> {
    match (&response.status, &response.http_response) {
        (Some(rpc::Status { code: 0, .. }), Some(HttpResponse::OkResponse(allow))) => Some(allow),
        _ => None,
    }
}

/// The codes of `google.rpc.Code` for the contract's statuses; never 0, which would be an allow.
const fn grpc_status(http_status: u16) -> i32 {
    match http_status {
        400 => 3,
        401 => 16,
        402 | 429 => 8,
        503 => 14,
        _ => 7,
    }
}

/// Rounded up: a caller that waits less is refused again.
fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs().saturating_add(u64::from(wait.subsec_nanos() > 0)).max(1)
}

/// Whether the same request may pass a little later; SDKs are told where it can't.
const fn is_worth_repeating(http_status: u16) -> bool {
    matches!(http_status, 429 | 503)
}

fn carriers(sources: &[CredentialSource]) -> Vec<String> {
    let configured = sources.iter().filter_map(|source| match source {
        CredentialSource::Header(name) if !KNOWN_CARRIERS.contains(&name.as_str()) => Some(name.clone()),
        CredentialSource::Header(_) | CredentialSource::Bearer | CredentialSource::Query(_) => None,
    });
    let known: Vec<String> = KNOWN_CARRIERS.iter().map(|name| (*name).to_owned()).collect();
    let all: Vec<String> = known.into_iter().chain(configured).collect();
    let underscored = all.iter().filter(|name| name.contains('-')).map(|name| name.replace('-', "_"));
    all.iter().cloned().chain(underscored).collect()
}

/// Explicitly, because the default action appends on some Envoy versions.
fn overwrite(name: String, value: String) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue { key: name, value, raw_value: Vec::new() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..HeaderValueOption::default()
    }
}

/// In any spelling that an upstream may take for one of them.
fn takes_the_place_of_the_path(name: &str) -> bool {
    OVERRIDES.iter().any(|own| name.len() == own.len() && starts_with_folded(name, own))
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::service::auth::v3::attribute_context::{HttpRequest, Request};
    use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest};
    use hyper::HeaderMap;

    use super::super::check_view::CheckView;
    use super::super::options::ClientIpSource;
    use super::*;
    use crate::domain::decision::Cause;

    fn responder(on_unavailable: OnUnavailable) -> Responder {
        Responder::new(ResponseOptions {
            header_prefix: "x-keyward-".into(),
            headers: IdentityHeader::ALL.to_vec(),
            credential_sources: vec![CredentialSource::Bearer],
            forward_credentials: false,
            error_format: ErrorFormat::Auto,
            on_unavailable,
        })
    }

    /// What Envoy makes of a response: code 0 is an allow whatever else it says.
    fn is_allow(response: &CheckResponse) -> bool {
        response.status.as_ref().is_none_or(|status| status.code == 0)
    }

    #[test]
    fn no_denial_reads_as_an_allow() {
        let responder = responder(OnUnavailable::Deny);
        for reason in Denial::ALL {
            let checked = Checked { decision: Decision::Deny(Denied::unproven(reason)), tier: None };
            let response = responder.respond(&checked, None).unwrap().read().unwrap();
            assert!(!is_allow(&response), "{reason:?}");
            let Some(HttpResponse::DeniedResponse(denied)) = response.http_response else {
                panic!("{reason:?}")
            };
            assert_eq!(denied.status.unwrap().code, i32::from(reason.http_status()));
        }
    }

    #[test]
    fn without_an_http_request_nothing_is_allowed() {
        let checked = Checked { decision: Decision::Anonymous, tier: None };
        assert!(!is_allow(&responder(OnUnavailable::Deny).respond(&checked, None).unwrap().read().unwrap()));
    }

    #[test]
    fn unavailable_is_a_503_or_left_to_envoy() {
        let checked = Checked { decision: Decision::Unavailable(Cause::Store), tier: None };
        let response = responder(OnUnavailable::Deny).respond(&checked, None).unwrap().read().unwrap();
        let Some(HttpResponse::DeniedResponse(denied)) = &response.http_response else { panic!() };
        assert_eq!(denied.status.as_ref().unwrap().code, 503);
        assert!(!is_allow(&response));
        assert!(responder(OnUnavailable::Error).respond(&checked, None).is_err());
    }

    /// The headers, and the parameters of the query, that an allow without a key takes out of a request.
    fn removed(responder: &Responder, path: &str, headers: &[&str]) -> (Vec<String>, Vec<String>) {
        let http = HttpRequest {
            path: path.into(),
            headers: headers.iter().map(|name| ((*name).into(), "x".into())).collect(),
            ..HttpRequest::default()
        };
        let attributes = AttributeContext {
            request: Some(Request { time: None, http: Some(http) }),
            ..AttributeContext::default()
        };
        let bytes = CheckRequest { attributes: Some(attributes) }.encode_to_vec();
        let view = CheckView::read(&bytes).unwrap();
        let inbound = Inbound::read(&view, &HeaderMap::new(), &ClientIpSource::Peer);
        let checked = Checked { decision: Decision::Anonymous, tier: None };
        let response = responder.respond(&checked, inbound.as_ref()).unwrap().read().unwrap();
        let allow = allowed(&response).unwrap();
        (allow.headers_to_remove.clone(), allow.query_parameters_to_remove.clone())
    }

    fn with_sources(credential_sources: &[CredentialSource], forward_credentials: bool) -> Responder {
        let options = responder(OnUnavailable::Deny).options;
        let credential_sources = credential_sources.to_vec();
        Responder::new(ResponseOptions { credential_sources, forward_credentials, ..options })
    }

    #[test]
    fn what_carries_keys_does_not_go_upstream_however_it_is_spelled() {
        let header = |name: &str| CredentialSource::Header(name.into());
        let sources = [header("x-team-key"), header("x-api-key"), CredentialSource::Query("key".into())];
        let sent = ["x_api-key", "x-api_key", "x-team_key", "x_teams_key", "accept_language", "x-other"];
        let (headers, query) = removed(&with_sources(&sources, false), "/v1?a=b&key=1&k%65y=2", &sent);
        for name in [
            "authorization",
            "x-api-key",
            "api-key",
            "x-goog-api-key",
            "x-team-key",
            "x_team_key",
            "x_api-key",
        ] {
            let times = headers.iter().filter(|other| *other == name).count();
            assert_eq!(times, 1, "{name} in {headers:?}");
        }
        for name in ["x_teams_key", "accept_language", "x-other", "authorization_", ""] {
            assert!(headers.iter().all(|other| other != name), "{name} was taken away: {headers:?}");
        }
        assert_eq!(query, ["key", "k%65y"]);

        let (headers, query) = removed(&with_sources(&sources, true), "/v1?key=1", &sent);
        assert!(!headers.iter().any(|name| name.contains("api") || name.contains("team")), "{headers:?}");
        assert_eq!(query, [""; 0]);
    }

    #[test]
    fn statuses_of_http_become_those_of_grpc() {
        let statuses = [400, 401, 402, 403, 429, 503].map(|status| (status, grpc_status(status)));
        assert_eq!(statuses, [(400, 3), (401, 16), (402, 8), (403, 7), (429, 8), (503, 14)]);
        assert_ne!(grpc_status(200), 0);
    }

    #[test]
    fn headers_that_replace_the_path_are_known_however_they_are_spelled() {
        for name in ["x-original-url", "X-Original-URL", "x_rewrite_url", "x-http-method-override"] {
            assert!(takes_the_place_of_the_path(name), "{name}");
        }
        for name in ["x-original-uri", "x-original-url-2", "x-original", "accept", ""] {
            assert!(!takes_the_place_of_the_path(name), "{name}");
        }
    }

    #[test]
    fn a_wait_is_rounded_up_to_whole_seconds() {
        let waits = [0, 1, 999, 1000, 1001, 59_000].map(|wait| whole_seconds(Duration::from_millis(wait)));
        assert_eq!(waits, [1, 1, 1, 1, 2, 59]);
    }
}
