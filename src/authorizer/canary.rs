//! The canary: a key of our own that is switched off and on, to measure in production how long that takes.
//!
//! Each replica has one, writes it like any other program would, and asks its own decision core until the answer turns.
//! So the measurement goes the whole way: a commit, the trigger, the feed, memory, the decision. The time counts from
//! before the write is sent; the commit comes a little later, so what is measured is at least what it took.
//!
//! The key opens nothing: its secret never leaves the process, and it is good for one path that nobody serves.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

use super::Authorizer;
use super::freshness::Freshness;
use crate::clock;
use crate::domain::body::Body;
use crate::domain::decision::Decision;
use crate::domain::denial::Denial;
use crate::domain::key::PresentedKey;
use crate::domain::record::KeyId;
use crate::domain::request::{Request, RouteOptions};
use crate::store::admin::{KeyFilter, NewKey, NewUser, UserRef};
use crate::store::{Store, StoreError};
use crate::telemetry::metrics::Metrics;

/// The owner of all canary keys.
pub const USERNAME: &str = "keyward-canary";

/// The one path that the key is good for.
pub const PATH: &str = "/.well-known/keyward-canary";

/// How often the key is switched.
const TOGGLE_EVERY: Duration = Duration::from_secs(10);

/// How often the decision is asked for.
const ASK_EVERY: Duration = Duration::from_millis(1);

/// What a read may take beyond the bound.
const ONE_READ: Duration = Duration::from_secs(1);

/// Keys of replicas that are gone are removed once they have not been switched for so long.
const FORGOTTEN_AFTER: Duration = Duration::from_hours(1);

/// One replica's canary.
pub struct Canary {
    /// Where the key is written.
    pub store: Store,
    /// The decision core that is asked.
    pub authorizer: Arc<Authorizer>,
    /// Says which bound holds.
    pub freshness: Arc<Freshness>,
    /// Where the times go.
    pub metrics: Metrics,
    /// The key as it is written.
    pub new_key: NewKey,
    /// The key as it is presented.
    pub presented: PresentedKey,
}

impl Canary {
    /// Switches and measures until it is stopped, and removes the key at the end.
    pub async fn run(self, stop: CancellationToken) {
        let mut key = None;
        let mut is_active = true;
        let mut told = false;
        while !stop.is_cancelled() {
            let done = match key {
                None => self.create().await.map(|id| key = Some(id)),
                Some(id) => {
                    is_active = !is_active;
                    self.toggle(id, is_active).await
                }
            };
            match done {
                Ok(()) => told = false,
                // Deleted by somebody: make another one.
                Err(StoreError::NotFound(_)) => (key, is_active) = (None, true),
                Err(error) => {
                    is_active = true;
                    if !told {
                        let error = format!("{:#}", anyhow::Error::new(error));
                        tracing::warn!(error, "the canary can't write its key; nothing is measured");
                        told = true;
                    }
                }
            }
            tokio::select! {
                () = sleep(if key.is_some() { TOGGLE_EVERY } else { ONE_READ }) => {}
                () = stop.cancelled() => {}
            }
        }
        if let Some(id) = key {
            let _ = self.store.delete_key(id).await;
        }
    }

    async fn create(&self) -> Result<KeyId, StoreError> {
        let user = NewUser {
            username: USERNAME.to_owned(),
            email: format!("{USERNAME}@localhost"),
            role: "user".to_owned(),
            is_superuser: false,
        };
        match self.store.create_user(&user).await {
            // Another replica, or an earlier run.
            Ok(_) | Err(StoreError::Conflict(_)) => {}
            Err(error) => return Err(error),
        }
        self.remove_forgotten().await?;
        Ok(self.store.create_key(&self.new_key).await?.id)
    }

    async fn remove_forgotten(&self) -> Result<(), StoreError> {
        let now = clock::wall();
        let user = Some(UserRef::Username(USERNAME.to_owned()));
        for key in self.store.list_keys(&KeyFilter { user, ..KeyFilter::default() }).await? {
            if key.updated_at.is_some_and(|at| now.saturating_since(at) > FORGOTTEN_AFTER) {
                match self.store.delete_key(key.id).await {
                    Ok(()) | Err(StoreError::NotFound(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Switches the key and waits until the decision follows.
    async fn toggle(&self, id: KeyId, is_active: bool) -> Result<(), StoreError> {
        // Known before, so that what is measured is how a change takes effect and not a first look-up.
        self.decide().await;
        let began = clock::instant();
        self.store.set_key_active(id, is_active).await?;
        let bound = self.freshness.window().saturating_add(ONE_READ);
        let give_up = self.freshness.outage_limit().saturating_add(ONE_READ);
        let mut asking = interval(ASK_EVERY);
        let mut is_late = false;
        loop {
            asking.tick().await;
            let decision = self.decide().await;
            let took = clock::instant().saturating_since(began);
            match (decision, is_active) {
                (Decision::Deny(denied), false) if denied.reason == Denial::KeyInactive => {
                    self.metrics.revocation.observe(took.as_secs_f64());
                    return Ok(());
                }
                (Decision::Allow(_), true) => {
                    self.metrics.activation.observe(took.as_secs_f64());
                    return Ok(());
                }
                (Decision::Allow(_) | Decision::Deny(_), _) if took > bound && !is_late => {
                    is_late = true;
                    self.metrics.bound_violations.inc();
                    let (after, bound) =
                        (humantime::format_duration(took), humantime::format_duration(bound));
                    tracing::error!(%after, %bound, is_active, "a change has not taken effect within its bound");
                }
                _ if took > give_up => return Ok(()),
                _ => {}
            }
        }
    }

    async fn decide(&self) -> Decision {
        let request = Request {
            method: "GET",
            path: PATH,
            client: None,
            route: RouteOptions::default(),
            body: Body::default(),
        };
        self.authorizer.check(&self.presented, &request, ONE_READ).await.decision
    }
}
