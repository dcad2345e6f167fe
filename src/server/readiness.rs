//! Whether this process should get traffic.

use std::sync::{Mutex, PoisonError};

/// The state behind `/readyz`.
#[derive(Debug)]
pub struct Readiness {
    state: Mutex<State>,
}

#[derive(Debug, Clone)]
enum State {
    /// The store has not answered yet.
    Starting(String),
    /// It has; the text says how changes arrive.
    Ready(String),
    /// On the way out, for good.
    Draining,
}

impl Readiness {
    /// Not ready yet.
    pub fn new() -> Self {
        Self { state: Mutex::new(State::Starting("the store has not answered yet".to_owned())) }
    }

    /// How changes arrive, or why there should be no traffic.
    pub fn check(&self) -> Result<String, String> {
        match &*self.lock() {
            State::Ready(mode) => Ok(mode.clone()),
            State::Starting(reason) => Err(reason.clone()),
            State::Draining => Err("shutting down".to_owned()),
        }
    }

    /// Says what start-up waits for.
    pub fn set_waiting(&self, reason: String) {
        let mut state = self.lock();
        if matches!(*state, State::Starting(_)) {
            *state = State::Starting(reason);
        }
    }

    /// The store has answered.
    pub fn set_ready(&self, mode: String) {
        let mut state = self.lock();
        if !matches!(*state, State::Draining) {
            *state = State::Ready(mode);
        }
    }

    /// From now on there should be no new traffic.
    pub fn set_draining(&self) {
        *self.lock() = State::Draining;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_is_for_good() {
        let readiness = Readiness::new();
        assert!(readiness.check().is_err());
        readiness.set_waiting("no tables".to_owned());
        assert_eq!(readiness.check(), Err("no tables".to_owned()));
        readiness.set_ready("ttl mode".to_owned());
        readiness.set_waiting("no tables".to_owned());
        assert_eq!(readiness.check(), Ok("ttl mode".to_owned()));
        readiness.set_draining();
        readiness.set_ready("ttl mode".to_owned());
        assert!(readiness.check().is_err());
    }
}
