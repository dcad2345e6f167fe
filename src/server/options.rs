//! What an operator chooses about the wire, as values. The front doors take these; they know no settings file.
//!
//! Every type reads its text with `FromStr`, whose error says what was expected, and prints it with `Display`; the two
//! are each other's inverse.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use thiserror::Error;

/// What was expected instead of the text.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("expected {0}")]
pub struct Unexpected(pub String);

fn unexpected<T>(what: &str) -> Result<T, Unexpected> {
    Err(Unexpected(what.to_owned()))
}

/// An enum whose variants are words: their texts, and a reader that names all of them when it fails.
macro_rules! words {
    ($(#[$meta:meta])* $type:ident { $($(#[$variant_meta:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $type { $($(#[$variant_meta])* $variant),+ }

        impl $type {
            /// Every variant, in the order of the contract.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word that an operator writes.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl FromStr for $type {
            type Err = Unexpected;

            fn from_str(text: &str) -> Result<Self, Unexpected> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => unexpected(&format!("one of {}", [$($word),+].join(", "))),
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

words! {
    /// Two sources that hold different keys.
    CredentialConflict {
        /// Refuse the request.
        Reject = "reject",
        /// Take the first source in the configured order.
        First = "first",
    }
}

words! {
    /// Whose body a denial has.
    ErrorFormat {
        /// The dialect of the caller's path and headers.
        Auto = "auto",
        /// `{"error": {"message", "type", "code"}}`
        OpenAi = "openai",
        /// `{"type": "error", "error": {…}}`
        Anthropic = "anthropic",
        /// `{"error": {"code", "message", "status"}}`
        Google = "google",
        /// RFC 9457.
        Problem = "problem",
    }
}

words! {
    /// What Envoy is told when a check can't be decided.
    OnUnavailable {
        /// A denial with status 503.
        Deny = "deny",
        /// gRPC UNAVAILABLE, so that Envoy's `failure_mode_allow` decides.
        Error = "error",
    }
}

words! {
    /// Which proxy asks over HTTP, and with it which part of its question names the original request. Everything else in
    /// the question is the caller's.
    HttpProfile {
        /// Envoy's `http_service`: method, path and body of the question itself.
        Envoy = "envoy",
        /// nginx's `auth_request`: `x-original-method`, and `x-original-uri` or `x-original-url`.
        Nginx = "nginx",
        /// Traefik's `forwardAuth`: `x-forwarded-method` and `x-forwarded-uri`.
        Traefik = "traefik",
        /// Caddy's `forward_auth`: `x-forwarded-method` and `x-forwarded-uri`.
        Caddy = "caddy",
    }
}

words! {
    /// A request header for the upstream, named without its prefix.
    IdentityHeader {
        /// `api_keys.id`
        KeyId = "key-id",
        /// `api_keys.name`
        KeyName = "key-name",
        /// `api_keys.key_prefix`
        KeyPrefix = "key-prefix",
        /// `users.id`
        UserId = "user-id",
        /// `users.username`
        Username = "username",
        /// `users.email`
        UserEmail = "user-email",
        /// The user's role.
        Role = "role",
        /// `true` or `false`
        Superuser = "superuser",
        /// Comma list.
        Scopes = "scopes",
        /// Comma list, `*` where unrestricted.
        AllowedModels = "allowed-models",
        /// Comma list, `*` where unrestricted.
        AllowedEndpoints = "allowed-endpoints",
        /// Comma list, `*` where unrestricted.
        AllowedChatbots = "allowed-chatbots",
        /// Requests.
        RateLimitMinute = "rate-limit-minute",
        /// Requests.
        RateLimitHour = "rate-limit-hour",
        /// Requests.
        RateLimitDay = "rate-limit-day",
        /// Cents.
        BudgetLimitCents = "budget-limit-cents",
        /// Cents.
        BudgetRemainingCents = "budget-remaining-cents",
        /// The model that the request asks for.
        Model = "model",
    }
}

/// Where a key may be carried.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CredentialSource {
    /// `authorization: Bearer KEY`
    Bearer,
    /// A header that holds the key alone; lower case.
    Header(String),
    /// A query parameter, by its exact name.
    Query(String),
}

const PLAIN_SOURCES: [&str; 3] = ["x-api-key", "api-key", "x-goog-api-key"];

impl FromStr for CredentialSource {
    type Err = Unexpected;

    fn from_str(text: &str) -> Result<Self, Unexpected> {
        if text == "bearer" {
            return Ok(Self::Bearer);
        }
        if PLAIN_SOURCES.contains(&text) {
            return Ok(Self::Header(text.to_owned()));
        }
        if let Some(name) = text.strip_prefix("header:") {
            return match header_name(name)?.as_str() {
                "authorization" => unexpected("bearer, which is what reads the authorization header"),
                name => Ok(Self::Header(name.to_owned())),
            };
        }
        if let Some(name) = text.strip_prefix("query:") {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
            return if !name.is_empty() && name.bytes().all(is_plain) {
                Ok(Self::Query(name.to_owned()))
            } else {
                unexpected("query:NAME with a name of letters, digits and -_.~")
            };
        }
        unexpected("bearer, x-api-key, api-key, x-goog-api-key, header:NAME or query:NAME")
    }
}

impl fmt::Display for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bearer => f.write_str("bearer"),
            Self::Header(name) if PLAIN_SOURCES.contains(&name.as_str()) => f.write_str(name),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Query(name) => write!(f, "query:{name}"),
        }
    }
}

/// Who the client is, for address lists.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ClientIpSource {
    /// Envoy's `source.address`.
    Peer,
    /// The N-th address from the right of `x-forwarded-for`.
    Xff(NonZeroUsize),
    /// A header that holds one address; lower case.
    Header(String),
    /// gRPC metadata that Envoy's `initial_metadata` sets; lower case.
    Metadata(String),
}

impl FromStr for ClientIpSource {
    type Err = Unexpected;

    fn from_str(text: &str) -> Result<Self, Unexpected> {
        if text == "peer" {
            return Ok(Self::Peer);
        }
        if let Some(position) = text.strip_prefix("xff:") {
            return position
                .parse()
                .map(Self::Xff)
                .or_else(|_| unexpected("xff:N with N counted from 1 at the right end"));
        }
        if let Some(name) = text.strip_prefix("header:") {
            return header_name(name).map(Self::Header);
        }
        if let Some(name) = text.strip_prefix("metadata:") {
            let name = header_name(name)?;
            // gRPC keeps this ending for binary values.
            return if name.ends_with("-bin") {
                unexpected("metadata:NAME with a name that does not end in -bin")
            } else {
                Ok(Self::Metadata(name))
            };
        }
        unexpected("peer, xff:N, header:NAME or metadata:NAME")
    }
}

impl fmt::Display for ClientIpSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer => f.write_str("peer"),
            Self::Xff(position) => write!(f, "xff:{position}"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Metadata(name) => write!(f, "metadata:{name}"),
        }
    }
}

/// A header name in lower case.
fn header_name(name: &str) -> Result<String, Unexpected> {
    if is_token(name) {
        Ok(name.to_ascii_lowercase())
    } else {
        unexpected("a header name of letters, digits and -_.!#$%&'*+^`|~")
    }
}

/// Whether the text is a `token` of RFC 9110, section 5.6.2: what header names consist of.
pub fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.!#$%&'*+^`|~".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trips<T: FromStr<Err = Unexpected> + fmt::Display>(texts: &[&str]) {
        for text in texts {
            assert_eq!(text.parse::<T>().unwrap().to_string(), *text);
        }
    }

    #[test]
    fn every_text_is_printed_as_it_is_written() {
        round_trips::<CredentialSource>(&["bearer", "x-api-key", "api-key", "header:x-k", "query:Key"]);
        round_trips::<ClientIpSource>(&["peer", "xff:1", "header:x-real-ip", "metadata:client"]);
        round_trips::<CredentialConflict>(&["reject", "first"]);
        round_trips::<HttpProfile>(&["envoy", "nginx", "traefik", "caddy"]);
        round_trips::<OnUnavailable>(&["deny", "error"]);
        round_trips::<ErrorFormat>(&["auto", "openai", "anthropic", "google", "problem"]);
        for header in IdentityHeader::ALL {
            assert_eq!(header.name().parse(), Ok(*header));
        }
    }

    #[test]
    fn header_names_are_lower_case_and_query_names_are_kept() {
        assert_eq!("header:X-Key".parse(), Ok(CredentialSource::Header("x-key".into())));
        assert_eq!("query:ApiKey".parse(), Ok(CredentialSource::Query("ApiKey".into())));
        assert_eq!("header:X-Real-IP".parse(), Ok(ClientIpSource::Header("x-real-ip".into())));
    }

    #[test]
    fn what_is_no_source_is_refused_with_what_is() {
        for text in
            ["", "Bearer", "basic", "header:", "header:a b", "header:Authorization", "query:", "query:a=b"]
        {
            assert!(text.parse::<CredentialSource>().is_err(), "{text:?}");
        }
        for text in ["", "xff", "xff:0", "xff:-1", "header:", "metadata:x-bin", "metadata:é"] {
            assert!(text.parse::<ClientIpSource>().is_err(), "{text:?}");
        }
        let error = "never".parse::<OnUnavailable>().unwrap_err();
        assert_eq!(error.to_string(), "expected one of deny, error");
    }
}
