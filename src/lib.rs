//! Keyward authorizes API keys for Envoy.

pub mod authorizer;
pub mod cache;
pub mod clock;
pub mod domain;
pub mod server;
pub mod store;
pub mod telemetry;
