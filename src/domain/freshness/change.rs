//! Changes: what a message of the change feed says.
//!
//! The triggers send JSON (`migrations/postgres_feed.sql`). A message has no authority: the worst that a forged one does
//! is to make a record be read again. So whatever can't be understood means "anything may have changed".

use serde::Deserialize;

use super::snapshot::TransactionId;
use crate::domain::key::KeyPrefix;
use crate::domain::record::UserId;

const VERSION: u64 = 1;

/// What changed, and by which transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Keys with these prefixes.
    Keys {
        /// Who changed them.
        by: TransactionId,
        /// The prefixes before and after.
        prefixes: Vec<KeyPrefix>,
    },
    /// A user, and so all their keys.
    User {
        /// Who changed them.
        by: TransactionId,
        /// The user.
        id: UserId,
    },
    /// So much that it is not listed, or something that is not understood.
    Anything,
}

#[derive(Deserialize)]
struct Message {
    v: u64,
    x: String,
    u: Option<i64>,
    #[serde(default)]
    p: Vec<String>,
    #[serde(default)]
    flush: bool,
}

impl Change {
    /// Reads a payload.
    pub fn parse(payload: &str) -> Self {
        Self::parse_known(payload).unwrap_or(Self::Anything)
    }

    fn parse_known(payload: &str) -> Option<Self> {
        let message: Message = serde_json::from_str(payload).ok()?;
        if message.v != VERSION || message.flush {
            return None;
        }
        let by = TransactionId::new(message.x.parse().ok()?);
        match message.u {
            Some(id) if message.p.is_empty() => Some(Self::User { by, id: UserId::new(id) }),
            Some(_) => None,
            None => {
                // A prefix that no key of ours can have is nobody's.
                let prefixes = message.p.iter().filter_map(|prefix| KeyPrefix::new(prefix)).collect();
                Some(Self::Keys { by, prefixes })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_name_prefixes_or_a_user() {
        let prefix = |text| KeyPrefix::new(text).unwrap();
        assert_eq!(
            Change::parse(r#"{"v":1,"x":"77","u":null,"p":["kw_aaaaa","kw_\"b,:"]}"#),
            Change::Keys {
                by: TransactionId::new(77),
                prefixes: vec![prefix("kw_aaaaa"), prefix("kw_\"b,:")]
            }
        );
        assert_eq!(
            Change::parse(r#"{"v" : 1, "x" : "18446744073709551615", "u" : -3, "p" : []}"#),
            Change::User { by: TransactionId::new(u64::MAX), id: UserId::new(-3) }
        );
    }

    #[test]
    fn what_is_not_understood_may_be_anything() {
        for payload in [
            "",
            "flush",
            r#"{"v":1,"x":"77","flush":true}"#,
            r#"{"v":2,"x":"77","u":3}"#,
            r#"{"v":1,"x":77,"u":3}"#,
            r#"{"v":1,"x":"-1","u":3}"#,
            r#"{"v":1,"u":3}"#,
            r#"{"v":1,"x":"77","u":3,"p":["kw_aaaaa"]}"#,
            r#"{"v":1,"x":"77","p":[7]}"#,
        ] {
            assert_eq!(Change::parse(payload), Change::Anything, "{payload}");
        }
    }

    proptest! {
        #[test]
        fn any_payload_is_read_without_a_panic(payload in ".{0,200}") {
            let _ = Change::parse(&payload);
        }
    }
}
