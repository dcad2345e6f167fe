//! One computation per key for all who ask for it at the same time.
//!
//! The work runs in a task of its own, so it goes on when the first asker gives up; the work itself has to end (every
//! backend call in it has a deadline). The number of flights is bounded.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::Instrument;

/// Computations under way, by key.
pub struct Flights<K, V> {
    /// What followers wait on; an entry leaves when its work ends, in whatever way.
    running: Mutex<HashMap<K, watch::Receiver<Option<V>>>>,
    max: usize,
    /// Where the work runs: connections have threads of their own.
    runtime: Handle,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlightError {
    /// As many flights as there may be are under way.
    Full,
    /// The work ended without an answer: it panicked, or the runtime is shutting down.
    Lost,
}

impl<K, V> Flights<K, V>
where
    K: Hash + Eq + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// At most `max` at once.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { running: Mutex::new(HashMap::new()), max, runtime: Handle::current() })
    }

    /// Whether somebody waits for the answer to `key` already.
    pub fn is_under_way(&self, key: &K) -> bool {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).contains_key(key)
    }

    /// Waits for the answer to `key`; starts `work` for it unless somebody else has.
    pub async fn join<W, F>(self: &Arc<Self>, key: K, work: W) -> Result<V, FlightError>
    where
        W: FnOnce() -> F,
        F: Future<Output = V> + Send + 'static,
    {
        let mut answer = self.board(key, work)?;
        let landed = answer.wait_for(Option::is_some).await.map_err(|_| FlightError::Lost)?;
        landed.as_ref().cloned().ok_or(FlightError::Lost)
    }

    fn board<W, F>(self: &Arc<Self>, key: K, work: W) -> Result<watch::Receiver<Option<V>>, FlightError>
    where
        W: FnOnce() -> F,
        F: Future<Output = V> + Send + 'static,
    {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(answer) = running.get(&key) {
            return Ok(answer.clone());
        }
        if running.len() >= self.max {
            return Err(FlightError::Full);
        }
        let (announce, answer) = watch::channel(None);
        running.insert(key.clone(), answer.clone());
        let landing = Landing { flights: Arc::clone(self), key };
        // In the span of who asked first.
        let work = work().in_current_span();
        self.runtime.spawn(async move {
            let value = work.await;
            // Leave before announcing: whoever asks from now on asks anew.
            drop(landing);
            let _ = announce.send(Some(value));
        });
        Ok(answer)
    }
}

/// Takes the flight off the list, also when its work panics.
struct Landing<K: Hash + Eq, V> {
    flights: Arc<Flights<K, V>>,
    key: K,
}

impl<K: Hash + Eq, V> Drop for Landing<K, V> {
    fn drop(&mut self) {
        self.flights.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn all_who_ask_at_once_share_one_computation() {
        let flights: Arc<Flights<u8, u32>> = Flights::new(10);
        let (runs, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let ask = || {
            let (flights, runs, gate) = (Arc::clone(&flights), Arc::clone(&runs), Arc::clone(&gate));
            tokio::spawn(async move {
                let work = move || async move {
                    runs.fetch_add(1, Ordering::SeqCst);
                    gate.notified().await;
                    42
                };
                flights.join(1, work).await
            })
        };
        let askers: Vec<_> = (0..50).map(|_| ask()).collect();
        while runs.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        // The first asker gives up; the work goes on for the others.
        askers[0].abort();
        gate.notify_one();
        for asker in askers.into_iter().skip(1) {
            assert_eq!(asker.await.unwrap(), Ok(42));
        }
        assert_eq!(runs.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_panicking_computation_is_lost_and_can_be_tried_again() {
        let flights: Arc<Flights<u8, u32>> = Flights::new(10);
        assert_eq!(flights.join(1, || async { panic!("on purpose") }).await, Err(FlightError::Lost));
        assert_eq!(flights.join(1, || async { 7 }).await, Ok(7));
    }

    #[tokio::test]
    async fn the_number_of_flights_is_bounded() {
        let flights: Arc<Flights<u8, u32>> = Flights::new(1);
        let waiting = Arc::clone(&flights);
        let first = tokio::spawn(async move { waiting.join(1, std::future::pending::<u32>).await });
        while flights.running.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(flights.join(2, || async { 7 }).await, Err(FlightError::Full));
        first.abort();
    }
}
