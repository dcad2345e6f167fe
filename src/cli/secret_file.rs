//! The cache secret's file while the sidecar runs: read again at SIGHUP, and when it changes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::spawn_blocking;

use crate::cache::redis::RedisCache;
use crate::cache::secrets::CacheSecrets;
use crate::telemetry::metrics::Metrics;

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// The file, and what works with its secrets.
#[derive(Clone)]
pub(super) struct SecretFile {
    path: PathBuf,
    redis: Arc<RedisCache>,
    metrics: Metrics,
}

impl SecretFile {
    /// `None` where there is no Redis.
    pub(super) fn new(
        path: Option<PathBuf>,
        redis: Option<Arc<RedisCache>>,
        metrics: Metrics,
    ) -> Option<Self> {
        Some(Self { path: path?, redis: redis?, metrics })
    }

    /// Takes over what the file holds. What can't be used changes nothing.
    pub(super) async fn reload(&self) -> Result<(), String> {
        let secrets = self.read().await?;
        if !self.redis.has_secrets(&secrets) {
            self.redis.replace_secrets(secrets);
            tracing::info!("cache secrets changed");
        }
        Ok(())
    }

    /// Looks for changes. One counts once two looks have seen it, because a file may be half written. Never returns; to
    /// be dropped at the end.
    pub(super) async fn watch(self) {
        let (mut seen, mut has_failed) = (None::<CacheSecrets>, false);
        loop {
            tokio::time::sleep(LOOK).await;
            match self.read().await {
                Ok(secrets) if self.redis.has_secrets(&secrets) => (seen, has_failed) = (None, false),
                Ok(secrets) if seen.as_ref().is_some_and(|seen| seen.is_same(&secrets)) => {
                    self.redis.replace_secrets(secrets);
                    self.metrics.count_reload(true);
                    tracing::info!("cache secrets changed");
                    (seen, has_failed) = (None, false);
                }
                Ok(secrets) => seen = Some(secrets),
                Err(error) => {
                    if !has_failed {
                        self.metrics.count_reload(false);
                        tracing::error!(
                            error,
                            "cache secrets can't be used; what was in force stays in force"
                        );
                    }
                    (seen, has_failed) = (None, true);
                }
            }
        }
    }

    async fn read(&self) -> Result<CacheSecrets, String> {
        let path = self.path.clone();
        // A slow disk is not to keep checks waiting.
        let read = spawn_blocking(move || CacheSecrets::read_again(&path))
            .await
            .map_err(|error| error.to_string())?;
        read.map_err(|error| format!("{:#}", anyhow::Error::new(error)))
    }
}
