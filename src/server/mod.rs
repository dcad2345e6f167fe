//! The front doors: gRPC `ext_authz`, HTTP forward-auth and the admin port. They turn wire into domain and back; no rule
//! is decided here.

pub mod admin;
pub mod answer;
pub mod check_view;
pub mod client_san;
pub mod connections;
pub mod credentials;
pub mod decisions;
mod deny;
pub mod door;
pub mod error_body;
pub mod explain;
pub mod forward_auth;
pub mod grpc;
pub mod headers;
pub mod identity;
pub mod listen;
pub mod mask;
pub mod metadata;
pub mod options;
// Open for the fuzz targets alone.
#[doc(hidden)]
pub mod original;
pub mod protobuf;
pub mod readiness;
pub mod report;
pub mod request;
pub mod response;
pub mod tls;
pub mod watch;
mod wire;
pub mod workers;
