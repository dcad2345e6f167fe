//! Entries: what is inside a seal.
//!
//! JSON, because the rows carry it anyway, read strictly: every field must be there and no other may be. An entry of
//! another version, or one that lost a field on the way, is rejected rather than read as less restricted.

use std::borrow::Cow;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::redis::StoredRecords;
use super::seal::Rejection;
use super::verdict_name::VerdictName;
use crate::domain::freshness::shared::Stamp;
use crate::domain::freshness::snapshot::Snapshot;
use crate::domain::key::KeyPrefix;
use crate::domain::row::CandidateRow;
use crate::domain::time::Timestamp;

/// How far the clock of the replica that wrote an entry may be ahead of ours.
const CLOCK_SKEW: Duration = Duration::from_secs(5);

const VERSION: u8 = 2;

#[derive(Serialize)]
struct RecordOut<'a> {
    version: u8,
    prefix: &'a str,
    read_at: i64,
    stamp: Option<StampText<'a>>,
    rows: &'a [CandidateRow],
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordIn<'a> {
    version: u8,
    prefix: String,
    read_at: i64,
    #[serde(borrow, deserialize_with = "Option::deserialize")]
    stamp: Option<StampText<'a>>,
    rows: Vec<CandidateRow>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StampText<'a> {
    incarnation: Cow<'a, str>,
    snapshot: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proof {
    version: u8,
    name: [u8; 32],
    proven_at: i64,
}

/// The records of a prefix, when and where they were read.
pub(super) fn encode_records(prefix: &KeyPrefix, records: &StoredRecords) -> Zeroizing<Vec<u8>> {
    let stamp = records.stamp.as_ref().map(|stamp| StampText {
        incarnation: Cow::Borrowed(&stamp.incarnation),
        snapshot: Cow::Owned(stamp.snapshot.to_string()),
    });
    encode(&RecordOut {
        version: VERSION,
        prefix: prefix.as_str(),
        read_at: records.read_at.as_microseconds(),
        stamp,
        rows: &records.rows,
    })
}

/// Reads what [`encode_records`] wrote, for the prefix that was asked for.
pub(super) fn decode_records(
    plaintext: &[u8],
    prefix: &KeyPrefix,
    now: Timestamp,
) -> Result<StoredRecords, Rejection> {
    let entry: RecordIn<'_> = serde_json::from_slice(plaintext).map_err(|_| Rejection::WrongForm)?;
    if entry.version != VERSION {
        return Err(Rejection::UnknownVersion);
    }
    if entry.prefix != prefix.as_str() {
        return Err(Rejection::OtherSubject);
    }
    let stamp = match entry.stamp {
        Some(text) => Some(Stamp {
            incarnation: text.incarnation.into(),
            snapshot: Snapshot::parse(&text.snapshot).ok_or(Rejection::WrongForm)?,
        }),
        None => None,
    };
    Ok(StoredRecords { rows: entry.rows, read_at: not_future(entry.read_at, now)?, stamp })
}

/// That the key and hash of this name were proven, and when.
pub(super) fn encode_proof(name: VerdictName, proven_at: Timestamp) -> Zeroizing<Vec<u8>> {
    encode(&Proof { version: VERSION, name: *name.as_bytes(), proven_at: proven_at.as_microseconds() })
}

/// Reads what [`encode_proof`] wrote. Which key and hash it is about is the reader's to check, by the name.
pub(super) fn decode_proof(plaintext: &[u8], now: Timestamp) -> Result<(VerdictName, Timestamp), Rejection> {
    let entry: Proof = serde_json::from_slice(plaintext).map_err(|_| Rejection::WrongForm)?;
    if entry.version != VERSION {
        return Err(Rejection::UnknownVersion);
    }
    Ok((VerdictName::from_bytes(entry.name), not_future(entry.proven_at, now)?))
}

fn not_future(microseconds: i64, now: Timestamp) -> Result<Timestamp, Rejection> {
    let moment = Timestamp::from_microseconds(microseconds);
    if moment > now.saturating_add(CLOCK_SKEW) { Err(Rejection::Future) } else { Ok(moment) }
}

/// Counts first and writes into one allocation of that size: a buffer that grows leaves copies that nobody wipes.
fn encode(entry: &impl Serialize) -> Zeroizing<Vec<u8>> {
    let mut counter = Counter(0);
    serde_json::to_writer(&mut counter, entry).expect("entries are structs of plain fields");
    let mut plaintext = Zeroizing::new(Vec::with_capacity(counter.0));
    serde_json::to_writer(&mut *plaintext, entry).expect("entries are structs of plain fields");
    plaintext
}

struct Counter(usize);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const NOW: Timestamp = Timestamp::from_microseconds(1_700_000_000_000_000);

    fn prefix() -> KeyPrefix {
        KeyPrefix::new("kw_01234").unwrap()
    }

    fn stored(rows: Vec<CandidateRow>, read_at: Timestamp) -> StoredRecords {
        let stamp =
            Stamp { incarnation: "here".into(), snapshot: Snapshot::parse("100:120:100,105").unwrap() };
        StoredRecords { rows, read_at, stamp: Some(stamp) }
    }

    fn sample() -> Value {
        let bytes = encode_records(&prefix(), &stored(vec![CandidateRow::sample("$2b$10$x")], NOW));
        serde_json::from_slice(&bytes).unwrap()
    }

    fn refusal(entry: &Value) -> Option<Rejection> {
        decode_records(entry.to_string().as_bytes(), &prefix(), NOW).err()
    }

    #[test]
    fn records_come_back_as_they_were() {
        let mut row = CandidateRow::sample("$2b$10$x");
        row.allowed_models = Some("[\"a\",\"\\u00e9\"]".into());
        row.expires_at = Some(i64::MAX);
        let rows = vec![row, CandidateRow::sample("sha256:00")];
        let stored = stored(rows.clone(), NOW);
        let back = decode_records(&encode_records(&prefix(), &stored), &prefix(), NOW).unwrap();
        assert_eq!((back.rows, back.read_at, back.stamp), (rows, NOW, stored.stamp));
        let unstamped = StoredRecords { rows: Vec::new(), read_at: NOW, stamp: None };
        let back = decode_records(&encode_records(&prefix(), &unstamped), &prefix(), NOW).unwrap();
        assert_eq!(back.stamp, None);
    }

    #[test]
    fn what_is_not_exactly_a_record_entry_is_rejected() {
        assert_eq!(refusal(&sample()), None);
        let changed = |pointer: &str, field: &str, value: Option<Value>| {
            let mut entry = sample();
            let object = entry.pointer_mut(pointer).and_then(Value::as_object_mut).unwrap();
            match value {
                Some(value) => object.insert(field.into(), value),
                None => object.remove(field),
            };
            refusal(&entry)
        };
        assert_eq!(changed("", "version", Some(json!(1))), Some(Rejection::UnknownVersion));
        assert_eq!(changed("", "prefix", Some(json!("kw_01235"))), Some(Rejection::OtherSubject));
        assert_eq!(changed("", "extra", Some(json!(1))), Some(Rejection::WrongForm));
        assert_eq!(changed("/rows/0", "extra", Some(json!(1))), Some(Rejection::WrongForm));
        assert_eq!(changed("/stamp", "snapshot", Some(json!("1:2"))), Some(Rejection::WrongForm));
        for (pointer, wrong) in
            [("", json!("text")), ("/stamp", json!({"a": 1})), ("/rows/0", json!({"a": 1}))]
        {
            let fields: Vec<String> =
                sample().pointer(pointer).and_then(Value::as_object).unwrap().keys().cloned().collect();
            for field in fields {
                assert_eq!(changed(pointer, &field, None), Some(Rejection::WrongForm), "without {field}");
                let refusal = changed(pointer, &field, Some(wrong.clone()));
                let expected = if field == "prefix" { Rejection::OtherSubject } else { Rejection::WrongForm };
                assert_eq!(refusal, Some(expected), "wrong type in {field}");
            }
        }
        assert_eq!(changed("", "read_at", Some(json!(1.5))), Some(Rejection::WrongForm));
        assert_eq!(changed("/rows/0", "is_active", Some(json!("False"))), Some(Rejection::WrongForm));
        let twice = sample().to_string().replacen('{', "{\"version\":2,", 1);
        assert_eq!(decode_records(twice.as_bytes(), &prefix(), NOW).err(), Some(Rejection::WrongForm));
        let behind = format!("{} {{}}", sample());
        assert_eq!(decode_records(behind.as_bytes(), &prefix(), NOW).err(), Some(Rejection::WrongForm));
    }

    #[test]
    fn entries_from_the_future_are_rejected_beyond_the_clock_skew() {
        let at = |microseconds: i64| {
            let moment = Timestamp::from_microseconds(NOW.as_microseconds() + microseconds);
            let records =
                decode_records(&encode_records(&prefix(), &stored(vec![], moment)), &prefix(), NOW).err();
            let proof = decode_proof(&encode_proof(VerdictName::from_bytes([1; 32]), moment), NOW).err();
            assert_eq!(records, proof);
            proof
        };
        assert_eq!(at(-1_000_000), None);
        assert_eq!(at(5_000_000), None);
        assert_eq!(at(5_000_001), Some(Rejection::Future));
    }

    #[test]
    fn proofs_come_back_as_they_were_and_nothing_else_is_one() {
        let name = VerdictName::from_bytes([9; 32]);
        let bytes = encode_proof(name, NOW);
        assert_eq!(decode_proof(&bytes, NOW).unwrap(), (name, NOW));
        let records = encode_records(&prefix(), &stored(vec![], NOW));
        assert_eq!(decode_proof(&records, NOW).err(), Some(Rejection::WrongForm));
        assert_eq!(decode_records(&bytes, &prefix(), NOW).err(), Some(Rejection::WrongForm));
        let newer = String::from_utf8(bytes.to_vec()).unwrap().replace("\"version\":2", "\"version\":3");
        assert_eq!(decode_proof(newer.as_bytes(), NOW).err(), Some(Rejection::UnknownVersion));
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode_records(&bytes, &prefix(), NOW).is_err());
            prop_assert!(decode_proof(&bytes, NOW).is_err());
        }
    }
}
