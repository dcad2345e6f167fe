//! What a decision may read of one request, borrowed from the wire.

use std::net::IpAddr;

use super::body::Body;

/// One request as policy sees it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The method, as sent.
    pub method: &'a str,
    /// The path without its query; empty where the wire had none.
    pub path: &'a str,
    /// The client, found the way `--client-ip` says; `None` where it can't be told.
    pub client: Option<IpAddr>,
    /// What the Envoy route asks for.
    pub route: RouteOptions<'a>,
    /// The body, where Envoy passes it on.
    pub body: Body<'a>,
}

/// The route's `context_extensions`.
#[derive(Debug, Clone, Copy, Default)]
pub struct RouteOptions<'a> {
    /// `required_scopes`: comma list.
    pub required_scopes: &'a str,
    /// `model`: the fixed model of the route; empty where the route has none.
    pub model: &'a str,
    /// `anonymous: allow`: no key is fine, a bad key is not.
    pub allows_anonymous: bool,
    /// `consistency: strict`: the record is read from the store for this request.
    pub is_strict: bool,
}
