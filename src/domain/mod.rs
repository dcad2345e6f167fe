//! The ground floor: keys, records, policy and decisions as values and pure functions.
//!
//! Nothing here does I/O, awaits, logs, knows protobuf or reads a clock; time is an argument. Everything else in the
//! crate leans on this floor and this floor leans on nothing. How an allow comes about is three constructors:
//! [`proof::Proven::from_verdict`], [`policy::evaluate`] (which alone makes a [`policy::Permit`]) and
//! [`decision::Decision::Allow`], which holds one.

pub mod allowlist;
pub mod body;
pub mod buckets;
pub mod decision;
pub mod denial;
pub mod deny_list;
pub mod endpoint;
pub mod explain;
pub mod freshness;
pub mod hash;
mod json_body;
mod json_scan;
pub mod key;
pub mod key_format;
pub mod limit;
pub mod model;
pub mod model_path;
mod multipart_body;
pub mod network;
pub mod path;
pub mod policy;
pub mod prepared;
pub mod proof;
pub mod record;
pub mod request;
pub mod row;
pub mod rules;
pub mod scope;
pub mod source;
pub mod time;
pub mod turns;
