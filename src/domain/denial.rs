//! Why a request is denied: one variant per code of the contract.

/// A denial reason. The order is the contract's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Denial {
    /// No source held a credential.
    MissingCredentials,
    /// A source was empty or malformed, or two sources disagree.
    MalformedCredentials,
    /// Unknown prefix or wrong secret: one answer for both.
    InvalidApiKey,
    /// Proven, but switched off.
    KeyInactive,
    /// Proven, but past its date.
    KeyExpired,
    /// The owner is inactive or locked.
    UserInactive,
    /// A restriction of the key can't be read, so nothing is allowed.
    PolicyInvalid,
    /// The client's address is not in the key's list, or can't be told.
    IpNotAllowed,
    /// Method and path are not in the key's list.
    EndpointNotAllowed,
    /// The path could mean something else upstream.
    AmbiguousRequest,
    /// The route asks for a scope that the key does not have.
    ScopeMissing,
    /// The model is not in the key's list.
    ModelNotAllowed,
    /// The budget is used up.
    InsufficientQuota,
    /// This client has sent too many wrong secrets on one prefix.
    TooManyAttempts,
}

impl Denial {
    /// Every reason.
    pub const ALL: [Self; 14] = [
        Self::MissingCredentials,
        Self::MalformedCredentials,
        Self::InvalidApiKey,
        Self::KeyInactive,
        Self::KeyExpired,
        Self::UserInactive,
        Self::PolicyInvalid,
        Self::IpNotAllowed,
        Self::EndpointNotAllowed,
        Self::AmbiguousRequest,
        Self::ScopeMissing,
        Self::ModelNotAllowed,
        Self::InsufficientQuota,
        Self::TooManyAttempts,
    ];

    /// The stable word for it: `x-keyward-reason`, metrics, metadata, error bodies.
    pub const fn code(self) -> &'static str {
        match self {
            Self::MissingCredentials => "missing_credentials",
            Self::MalformedCredentials => "malformed_credentials",
            Self::InvalidApiKey => "invalid_api_key",
            Self::KeyInactive => "key_inactive",
            Self::KeyExpired => "key_expired",
            Self::UserInactive => "user_inactive",
            Self::PolicyInvalid => "policy_invalid",
            Self::IpNotAllowed => "ip_not_allowed",
            Self::EndpointNotAllowed => "endpoint_not_allowed",
            Self::AmbiguousRequest => "ambiguous_request",
            Self::ScopeMissing => "scope_missing",
            Self::ModelNotAllowed => "model_not_allowed",
            Self::InsufficientQuota => "insufficient_quota",
            Self::TooManyAttempts => "too_many_attempts",
        }
    }

    /// The HTTP status of the contract's table.
    pub const fn http_status(self) -> u16 {
        match self {
            Self::MissingCredentials
            | Self::MalformedCredentials
            | Self::InvalidApiKey
            | Self::KeyInactive
            | Self::KeyExpired => 401,
            Self::UserInactive
            | Self::PolicyInvalid
            | Self::IpNotAllowed
            | Self::EndpointNotAllowed
            | Self::ScopeMissing
            | Self::ModelNotAllowed => 403,
            Self::AmbiguousRequest => 400,
            Self::InsufficientQuota => 402,
            Self::TooManyAttempts => 429,
        }
    }

    /// What the caller reads: what is wrong and what to do, nothing about other keys.
    pub const fn message(self) -> &'static str {
        match self {
            Self::MissingCredentials => {
                "No API key was sent. Send it in the Authorization header: Authorization: Bearer YOUR_KEY."
            }
            Self::MalformedCredentials => {
                "The API key is malformed or was sent more than once. Send one key, without quotes or blanks, in one header."
            }
            Self::InvalidApiKey => "The API key is not valid. Check that it was copied whole.",
            Self::KeyInactive => {
                "This API key has been deactivated. Use another key or ask its owner to activate it."
            }
            Self::KeyExpired => "This API key has expired. Ask its owner for a new one.",
            Self::UserInactive => {
                "The account that this API key belongs to is not active. Ask an administrator to activate it."
            }
            Self::PolicyInvalid => {
                "This API key's restrictions can't be read, so nothing is allowed. Ask an administrator to mend them."
            }
            Self::IpNotAllowed => {
                "This API key may not be used from your address. Call from a network that it admits, or ask its owner to admit yours."
            }
            Self::EndpointNotAllowed => {
                "This API key may not be used for this endpoint. Use a key that admits it, or ask the owner of this one to admit it."
            }
            Self::AmbiguousRequest => {
                "The request's path is ambiguous. Send it in plain form, without dot segments, doubled slashes or encoded separators."
            }
            Self::ScopeMissing => {
                "This API key lacks a scope that this endpoint needs. Ask its owner to add it, or use another key."
            }
            Self::ModelNotAllowed => {
                "This API key may not be used for this model. Choose another model, or ask the owner of the key to admit this one."
            }
            Self::InsufficientQuota => {
                "The budget of this API key is used up. Ask its owner to raise it; repeating the request does not help."
            }
            Self::TooManyAttempts => {
                "Too many wrong API keys were sent from your address. Check the key, and wait as long as retry-after says."
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_every_reason_is_a_client_error() {
        let mut codes: Vec<_> = Denial::ALL.iter().map(|denial| denial.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Denial::ALL.len());
        assert!(Denial::ALL.iter().all(|denial| (400..500).contains(&denial.http_status())));
    }

    /// Two sentences, in characters that a gRPC message and every terminal can show.
    #[test]
    fn every_message_says_what_is_wrong_and_what_to_do() {
        for denial in Denial::ALL {
            let message = denial.message();
            let (wrong, todo) = message.split_once(". ").unwrap_or_default();
            assert!(!wrong.is_empty() && todo.ends_with('.'), "{denial:?}: {message}");
            assert!(message.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{denial:?}: {message}");
        }
    }
}
