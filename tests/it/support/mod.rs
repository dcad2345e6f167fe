//! The real parts that the tests run against: Keyward's binary, Envoy, an upstream, and clients that can send anything.
//!
//! Everything listens on loopback and is killed with the value that stands for it: on drop, also after a panic, and by
//! the kernel when the test process itself is killed. Nothing sleeps for a fixed time: what takes time is polled.

pub(crate) mod certificates;
pub(crate) mod collector;
pub(crate) mod door;
pub(crate) mod envoy;
pub(crate) mod grpc;
pub(crate) mod http;
pub(crate) mod http2;
pub(crate) mod keyward;
pub(crate) mod kustomize;
pub(crate) mod nginx;
pub(crate) mod pgbouncer;
pub(crate) mod port;
pub(crate) mod postgres;
pub(crate) mod process;
pub(crate) mod rate_limit;
pub(crate) mod redis;
pub(crate) mod upstream;

use std::time::Duration;

use envoy::Envoy;
use keyward::Keyward;
use upstream::Upstream;

/// How long anything may take to happen on a busy machine. A test that works never waits for this.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Asks again and again until there is an answer; `None` when patience has run out.
pub(crate) async fn eventually<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return Some(answer);
        }
        if tokio::time::Instant::now() >= give_up {
            return None;
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// A request's whole way: Envoy in front, Keyward beside it, an echo behind it.
pub(crate) struct Stack {
    pub(crate) keyward: Keyward,
    pub(crate) envoy: Envoy,
    pub(crate) upstream: Upstream,
}

impl Stack {
    /// Everything as shipped.
    pub(crate) async fn start() -> Self {
        Self::start_with(Keyward::new(), |envoy| envoy).await
    }

    /// With other settings of Keyward and changes to the shipped Envoy configuration.
    pub(crate) async fn start_with(
        keyward: keyward::Builder,
        change: impl FnOnce(envoy::Builder) -> envoy::Builder,
    ) -> Self {
        let keyward = keyward.start().await;
        let upstream = Upstream::start().await;
        let envoy = change(Envoy::new(keyward.grpc_addr(), upstream.addr())).start().await;
        Self { keyward, envoy, upstream }
    }
}
