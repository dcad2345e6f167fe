//! `last_used_at`: noted off the request's path, written in batches, at most once per key and interval over all
//! replicas.
//!
//! Memory keeps this replica from asking twice; a marker in Redis keeps the replicas from writing one after the
//! other. Nothing here can delay or fail a check: what does not fit is dropped and counted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use quick_cache::sync::Cache;
use tokio::sync::mpsc;
use tokio::time::{Instant as Tick, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::cache::redis::RedisCache;
use crate::domain::record::KeyId;
use crate::domain::time::{Instant, Now, Timestamp};
use crate::store::{Store, StoreError};
use crate::telemetry::metrics::Metrics;

/// Uses that may wait to be gathered.
const MAX_WAITING: usize = 10_000;
/// How long uses are gathered into one write.
const GATHER: Duration = Duration::from_secs(1);
/// Keys in one write.
const MAX_BATCH: usize = 1_000;
/// A store that refuses the write (a role with SELECT alone) is left alone for so long.
const AFTER_REFUSAL: Duration = Duration::from_hours(1);
/// What the way out may take.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// The side that checks call.
pub struct UseRecorder {
    /// When each key may be noted again.
    due: Cache<KeyId, Instant>,
    waiting: mpsc::Sender<(KeyId, Timestamp)>,
    interval: Duration,
    metrics: Metrics,
}

/// The side that writes; run it as a task.
pub struct UseWriter {
    waiting: mpsc::Receiver<(KeyId, Timestamp)>,
    /// Gathered and claimed, not yet written; at most [`MAX_BATCH`] and what one gathering adds.
    claimed: HashMap<KeyId, Timestamp>,
    store: Store,
    redis: Option<Arc<RedisCache>>,
    interval: Duration,
    metrics: Metrics,
    refused_until: Option<Tick>,
}

/// Makes the two sides. `max_keys` bounds what is remembered of keys already noted.
pub fn channel(
    store: Store,
    redis: Option<Arc<RedisCache>>,
    interval: Duration,
    max_keys: usize,
    metrics: Metrics,
) -> (UseRecorder, UseWriter) {
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    let recorder =
        UseRecorder { due: Cache::new(max_keys), waiting: sender, interval, metrics: metrics.clone() };
    let claimed = HashMap::new();
    (recorder, UseWriter { waiting: receiver, claimed, store, redis, interval, metrics, refused_until: None })
}

impl UseRecorder {
    /// Notes that a key was used.
    pub fn note(&self, key: KeyId, now: Now) {
        if self.due.get(&key).is_some_and(|due| now.instant < due) {
            return;
        }
        self.due.insert(key, now.instant.saturating_add(self.interval));
        if self.waiting.try_send((key, now.wall)).is_err() {
            self.metrics.last_used_dropped.inc();
        }
    }
}

impl UseWriter {
    /// Writes until told to stop, then writes what is left.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                first = self.waiting.recv() => match first {
                    Some(first) => self.gather(first, &stop).await,
                    None => break,
                },
            }
            self.write().await;
        }
        let mut rest = Vec::new();
        while let Ok(used) = self.waiting.try_recv() {
            rest.push(used);
        }
        let flush = async {
            self.claim(rest).await;
            self.write().await;
        };
        if timeout(FLUSH_LIMIT, flush).await.is_err() {
            tracing::warn!("last_used_at could not be flushed in time");
        }
    }

    async fn gather(&mut self, first: (KeyId, Timestamp), stop: &CancellationToken) {
        let until = Tick::now() + GATHER;
        let mut batch = vec![first];
        while batch.len() < MAX_BATCH {
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep_until(until) => break,
                used = self.waiting.recv() => match used {
                    Some(used) => batch.push(used),
                    None => break,
                },
            }
        }
        self.claim(batch).await;
    }

    /// Keeps those that no other replica has claimed.
    async fn claim(&mut self, batch: Vec<(KeyId, Timestamp)>) {
        let keys: Vec<KeyId> = batch.iter().map(|(key, _)| *key).collect();
        let ours = match &self.redis {
            Some(redis) if !keys.is_empty() => redis.claim_uses(&keys, self.interval).await,
            _ => None,
        };
        let ours = ours.unwrap_or_else(|| vec![true; keys.len()]);
        self.claimed.extend(batch.into_iter().zip(ours).filter_map(|(used, ours)| ours.then_some(used)));
    }

    async fn write(&mut self) {
        if self.claimed.is_empty() {
            return;
        }
        if self.refused_until.is_some_and(|until| Tick::now() < until) {
            self.drop_claimed();
            return;
        }
        let uses: Vec<(KeyId, Timestamp)> = self.claimed.iter().map(|(key, at)| (*key, *at)).collect();
        match self.store.record_uses(&uses).await {
            Ok(()) => {
                self.metrics.last_used_writes.inc_by(u64::try_from(uses.len()).unwrap_or(0));
                self.claimed.clear();
            }
            Err(error) if error.is_unavailable() => {
                // Kept for the next round, as far as there is room.
                if self.claimed.len() > MAX_WAITING {
                    self.drop_claimed();
                }
            }
            Err(error) => {
                if matches!(error, StoreError::Refused(_)) {
                    tracing::info!(%error, "the store does not let us write last_used_at; it is left alone for an hour");
                    self.refused_until = Some(Tick::now() + AFTER_REFUSAL);
                } else {
                    tracing::warn!(%error, "last_used_at could not be written");
                }
                self.drop_claimed();
            }
        }
    }

    fn drop_claimed(&mut self) {
        self.metrics.last_used_dropped.inc_by(u64::try_from(self.claimed.len()).unwrap_or(0));
        self.claimed.clear();
    }
}
