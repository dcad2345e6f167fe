//! Entries in Redis: nothing opens that was not sealed here, for this and under this name; and what is inside is read
//! strictly.
//!
//! The input is tried twice: as what was found in Redis, and as what is inside of a good seal.

use std::sync::OnceLock;

use keyward::cache::fuzzing::{Sealer, decode_proof, decode_records, encode_records};
use keyward::domain::key::KeyPrefix;
use keyward::domain::time::Timestamp;
use serde_json::Value;

const NOW: Timestamp = Timestamp::from_microseconds(1_700_000_000_000_000);
const LATEST: i64 = 1_700_000_005_000_000;

pub(crate) fn run(data: &[u8]) {
    static SEALER: OnceLock<(Sealer, Sealer)> = OnceLock::new();
    let (own, stranger) = SEALER.get_or_init(|| {
        let of = |secret: &[u8]| Sealer::new(secret).expect("a secret of 32 bytes");
        (of(b"0123456789abcdef0123456789abcdef"), of(b"fedcba9876543210fedcba9876543210"))
    });
    let prefix = |text: &str| KeyPrefix::new(text).expect("a prefix");
    let (here, there) = (prefix("kw_01234"), prefix("kw_01235"));
    assert!(own.open_records(&here, data).is_none(), "a forged entry");

    let sealed = own.seal_records(&here, data).expect("it is small");
    let opened = own.open_records(&here, &sealed);
    assert_eq!(opened.as_deref().map(Vec::as_slice), Some(data));
    assert!(own.open_records(&there, &sealed).is_none(), "under another name");
    assert!(own.open_as_proof(&here, &sealed).is_none(), "for another purpose");
    assert!(stranger.open_records(&here, &sealed).is_none(), "with another secret");
    let mut damaged = sealed;
    let sum = data.iter().fold(data.len(), |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte)));
    let at = sum % damaged.len();
    damaged[at] ^= 1 << (sum % 8);
    assert!(own.open_records(&here, &damaged).is_none(), "damaged at {at}");
    damaged.truncate(at);
    assert!(own.open_records(&here, &damaged).is_none(), "cut at {at}");

    records(data, &here);
    proof(data);
}

fn records(data: &[u8], prefix: &KeyPrefix) {
    let Some(records) = decode_records(data, prefix, NOW) else { return };
    let value: Value = serde_json::from_slice(data).expect("an entry is JSON");
    assert_eq!(fields(&value), 5);
    if let Value::Object(entry) = &value {
        assert_eq!((&entry["version"], &entry["prefix"]), (&Value::from(2), &Value::from("kw_01234")));
        assert_eq!(entry["rows"].as_array().map(Vec::len), Some(records.rows.len()));
        assert_eq!(entry["stamp"].is_null(), records.stamp.is_none());
    }
    assert!(records.read_at.as_microseconds() <= LATEST, "from the future");
    let written = encode_records(prefix, &records);
    let again = decode_records(&written, prefix, NOW).expect("what is written is read");
    assert!(again.rows == records.rows && again.read_at == records.read_at && again.stamp == records.stamp);
}

fn proof(data: &[u8]) {
    let Some((name, at)) = decode_proof(data, NOW) else { return };
    let value: Value = serde_json::from_slice(data).expect("an entry is JSON");
    assert_eq!(fields(&value), 3);
    if let Value::Object(entry) = &value {
        assert_eq!((&entry["version"], &entry["name"]), (&Value::from(2), &Value::from(name.to_vec())));
        assert_eq!(entry["proven_at"], at.as_microseconds());
    }
    assert!(at.as_microseconds() <= LATEST, "from the future");
}

fn fields(value: &Value) -> usize {
    match value {
        Value::Object(fields) => fields.len(),
        // serde takes a list for a struct too, field by field.
        Value::Array(fields) => fields.len(),
        other => panic!("an entry of {other:?}"),
    }
}
