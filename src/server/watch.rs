//! Watching the store: what makes this process ready, and what makes it not.

use std::sync::Arc;
use std::time::Duration;

use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::readiness::Readiness;
use crate::authorizer::freshness::{Freshness, Mode};
use crate::authorizer::outage::Outage;
use crate::clock;
use crate::store::Store;

/// The name under which Envoy's health check asks for this service.
const SERVICE_NAME: &str = "envoy.service.auth.v3.Authorization";
/// Pauses between attempts to reach a store that does not answer.
const RETRY_STORE: Duration = Duration::from_millis(250);
/// Pauses while the change feed is awaited.
const STARTING: Duration = Duration::from_millis(5);
/// How often a store that answers is looked at anew.
const WATCH_STORE: Duration = Duration::from_secs(10);

/// Looks at the store from time to time, also when nobody asks for a key: each answer looks at the tables anew (a
/// restriction column that is added while we run has to be read from then on), ends an outage, and makes us ready.
pub struct StoreWatch {
    /// The store.
    pub store: Store,
    /// Whether it is known how changes arrive.
    pub freshness: Arc<Freshness>,
    /// Told of each answer and failure.
    pub outage: Arc<Outage>,
    /// Told what start-up waits for.
    pub readiness: Arc<Readiness>,
    /// What gRPC clients are told.
    pub health: HealthReporter,
}

impl StoreWatch {
    /// Never returns; to be dropped at the end.
    pub async fn run(self) {
        let mut trouble = None;
        let mut said = None;
        let mut looked_at = None;
        loop {
            let now = clock::instant();
            if trouble.is_some() || looked_at.is_none_or(|at| now.saturating_since(at) >= WATCH_STORE) {
                looked_at = Some(now);
                trouble = self.look(trouble).await;
            }
            if trouble.is_none() && self.freshness.mode() != Mode::Starting {
                self.readiness.set_started();
            }
            let ready = self.readiness.check(clock::instant());
            if said != Some(ready.is_ok()) {
                match &ready {
                    Ok(mode) => tracing::info!(mode, "ready"),
                    Err(reason) => tracing::info!(reason, "not ready"),
                }
                let status = if ready.is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
                set_health(&self.health, status).await;
                said = Some(ready.is_ok());
            }
            // Ready as soon as it can be: start to ready is part of every rollout.
            let is_starting = said.is_none_or(|ready| !ready) && trouble.is_none();
            tokio::time::sleep(if is_starting { STARTING } else { RETRY_STORE }).await;
        }
    }

    /// What the store has against being asked, logged once each time it changes.
    async fn look(&self, before: Option<String>) -> Option<String> {
        match self.store.ping().await {
            Ok(()) => {
                self.outage.answered(clock::instant());
                if before.is_some() {
                    tracing::info!(store = self.store.kind(), "the store answers");
                }
                None
            }
            Err(error) => {
                self.outage.failed(clock::instant());
                let error = format!("{:#}", anyhow::Error::new(error));
                if before.as_ref() != Some(&error) {
                    tracing::warn!(error, "the store does not answer");
                }
                self.readiness.set_waiting(error.clone());
                Some(error)
            }
        }
    }
}

/// Tells gRPC clients, by the service's name and for the server as a whole.
pub async fn set_health(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(SERVICE_NAME, status).await;
}
