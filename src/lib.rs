//! Keyward authorizes API keys for Envoy.

pub mod cache;
pub mod cli;
pub mod clock;
pub mod config;
pub mod domain;
pub mod store;
pub mod telemetry;
