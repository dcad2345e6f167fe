//! Keyward authorizes API keys for Envoy.
//!
//! A request walks straight through the crate, and nothing lower knows anything higher. In reading order:
//!
//! 1. [`server::grpc`] takes Envoy's check, [`server::forward_auth`] another proxy's question; both ask [`server::door`],
//! 2. [`server::request`] and [`server::credentials`] read it: [`domain::request::Request`],
//!    [`domain::key::PresentedKey`],
//! 3. [`authorizer::Authorizer::check`] is the one path that it takes,
//! 4. [`authorizer::candidates`] finds the records behind the key's prefix: memory ([`cache::records`]), Redis
//!    ([`cache::redis`]), store ([`store`]),
//! 5. [`authorizer::proof`] proves the key against one of them: [`domain::proof::Proven`],
//! 6. [`domain::policy::evaluate`] applies the key's policy: [`domain::policy::Permit`],
//! 7. [`server::response`] turns the [`domain::decision::Decision`] into an answer.

pub mod authorizer;
pub mod cache;
pub mod cli;
pub mod clock;
pub mod config;
pub mod domain;
pub mod server;
pub mod store;
pub mod telemetry;
