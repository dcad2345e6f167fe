//! SIGHUP: what can change while the sidecar runs is read again, and what can't is named.
//!
//! The decision log is opened anew (for whoever rotates it), the deny file and the cache secret are read at once, and the
//! settings are read again for the log level. Whatever of it fails, the last good state stays in force.

use std::sync::Arc;

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::signal::unix::Signal;
use tokio::task::spawn_blocking;

use super::flags::{AllSettings, SettingFlags};
use super::secret_file::SecretFile;
use super::serve::shown;
use crate::authorizer::deny::DenyControl;
use crate::config::Settings;
use crate::telemetry::decision_log::DecisionLog;
use crate::telemetry::logging::Level;
use crate::telemetry::metrics::Metrics;

/// What a reload touches.
pub(super) struct Reloading {
    /// Where settings come from.
    pub(super) flags: SettingFlags<AllSettings>,
    /// The settings that this process works with.
    pub(super) in_force: Settings,
    /// The same, for `/config`.
    pub(super) shown: Arc<ArcSwap<Value>>,
    pub(super) level: Level,
    pub(super) deny: Arc<DenyControl>,
    pub(super) decision_log: Option<Arc<DecisionLog>>,
    pub(super) secret_file: Option<SecretFile>,
    pub(super) metrics: Metrics,
}

impl Reloading {
    /// Reloads at each signal. Never returns; to be dropped at the end.
    pub(super) async fn follow(mut self, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            let failures = self.reload().await;
            self.metrics.count_reload(failures.is_empty());
            if failures.is_empty() {
                tracing::info!("reloaded");
            } else {
                let failures = failures.join("; ");
                tracing::error!(error = failures, "reload failed; what was in force stays in force");
            }
        }
    }

    /// What could not be reloaded, and why.
    async fn reload(&mut self) -> Vec<String> {
        let mut failures = Vec::new();
        if let Err(failure) = self.reload_settings().await {
            failures.push(failure);
        }
        if let Some(trouble) = self.deny.reload().await {
            failures.push(format!("--deny-file: {trouble}"));
        }
        if let Some(file) = &self.secret_file
            && let Err(error) = file.reload().await
        {
            failures.push(format!("--cache-secret-file: {error}"));
        }
        if let Some(log) = &self.decision_log
            && let Err(error) = log.reopen().await
        {
            failures.push(format!("--decision-log: {error}"));
        }
        failures
    }

    async fn reload_settings(&mut self) -> Result<(), String> {
        let flags = self.flags.clone();
        // A slow disk is not to keep checks waiting.
        let loaded = spawn_blocking(move || flags.reload()).await.map_err(|error| error.to_string())?;
        let new = loaded.map_err(|mistakes| mistakes.lines().join("; "))?.settings;
        if new.log_level != self.in_force.log_level {
            if !self.level.set(&new.log_level) {
                return Err("the log level could not be changed".to_owned());
            }
            tracing::info!(level = new.log_level, "log level changed");
            self.in_force.log_level.clone_from(&new.log_level);
            self.shown.store(Arc::new(shown(&self.in_force)));
        }
        let waiting: Vec<String> =
            self.in_force.differing(&new).iter().map(|setting| format!("--{}", setting.flag)).collect();
        if !waiting.is_empty() {
            tracing::warn!(settings = waiting.join(","), "needs a restart: these settings have changed");
        }
        Ok(())
    }
}
