//! Keyward as a whole: the real binary, a real Envoy, real stores.
//!
//! One folder of helpers, one file a subject. A test's name is the guarantee that it protects.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "in a test, and in what only tests use, a panic is the report"
)]

mod admission;
mod allocations;
mod attacks;
mod bad_rows;
mod caches;
mod change_feed;
mod check;
mod cli;
mod client_ip;
mod collisions;
mod config;
mod decision_log;
mod denials;
mod deny_list;
mod endpoint_corpus;
mod endpoint_paths;
mod envoy_config;
mod faults;
mod feed_triggers;
mod forward_auth;
mod forward_auth_proxies;
mod fuzz_corpora;
mod grpc_frames;
mod house;
mod http2_floods;
mod http_tls;
mod key_life;
mod lifecycle;
mod manifests;
mod models;
mod monitoring;
mod one_answer;
mod path;
mod policy_oracle;
mod postgres_serve;
mod program;
mod rate_limits;
mod redis_tier;
mod reload;
mod rolling;
mod sdks;
mod secrecy;
mod sockets;
mod sockets_tls;
mod stores;
mod stores_admin;
mod stores_postgres;
mod stores_sqlite;
mod supply;
mod support;
mod traces;
mod transcript;
mod truth;
mod verdicts;
mod wire;
