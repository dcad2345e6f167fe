//! What the change feed announces: whatever is not understood has to mean that anything may have changed.

use keyward::domain::freshness::change::Change;
use keyward::domain::freshness::snapshot::TransactionId;
use keyward::domain::key::KeyPrefix;
use keyward::domain::record::UserId;
use serde_json::Value;

pub(crate) fn run(data: &[u8]) {
    let Ok(payload) = std::str::from_utf8(data) else { return };
    let change = Change::parse(payload);
    let Ok(Value::Object(message)) = serde_json::from_str(payload) else {
        let is_list = matches!(serde_json::from_str(payload), Ok(Value::Array(_)));
        assert!(is_list || change == Change::Anything, "{payload:?}");
        return;
    };
    match change {
        Change::Anything => {
            let known = ["v", "x", "u", "p"].iter().filter(|name| message.contains_key(**name)).count();
            let is_plain = known == message.len() && is_written_by_us(&message);
            assert!(!is_plain || payload.matches(':').count() > known, "understood: {payload:?}");
        }
        Change::User { by, id } => {
            assert_eq!(message["u"].as_i64().map(UserId::new), Some(id));
            hold(&message, by);
            assert!(prefixes(&message).is_empty());
        }
        Change::Keys { by, prefixes: found } => {
            assert!(message.get("u").is_none_or(Value::is_null));
            hold(&message, by);
            assert_eq!(found, prefixes(&message));
        }
    }
}

fn hold(message: &serde_json::Map<String, Value>, by: TransactionId) {
    assert_eq!(message["v"], 1);
    assert!(message.get("flush").is_none_or(|flush| flush == false));
    let number: u64 = message["x"].as_str().and_then(|text| text.parse().ok()).expect("a number as text");
    assert_eq!(by, TransactionId::new(number));
}

fn prefixes(message: &serde_json::Map<String, Value>) -> Vec<KeyPrefix> {
    let list = message.get("p").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(|prefix| KeyPrefix::new(prefix.as_str().expect("a text"))).collect()
}

/// A message as the triggers write it: all four, a user or prefixes.
fn is_written_by_us(message: &serde_json::Map<String, Value>) -> bool {
    let Some(list) = message.get("p").and_then(Value::as_array) else { return false };
    message.get("v") == Some(&Value::from(1))
        && message.get("x").and_then(Value::as_str).is_some_and(|x| x.parse::<u64>().is_ok())
        && message.get("u").is_some_and(|user| user.is_null() || (user.is_i64() && list.is_empty()))
        && list.iter().all(Value::is_string)
}
