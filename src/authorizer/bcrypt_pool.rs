//! The threads that compute bcrypt: a fixed number, a bounded and fair queue, and work that is finished once begun.
//!
//! bcrypt takes milliseconds to a second of pure CPU, so it has no place on the threads that answer checks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::clock;
use crate::domain::decision::Cause;
use crate::domain::key::PresentedKey;
use crate::domain::proof::Verdict;
use crate::domain::record::Candidate;
use crate::domain::turns::{Full, Place, TurnLimits, Turns};
use crate::telemetry::metrics::Metrics;

/// Comparisons that may wait for each thread. At a cost of 10 the last of them waits four seconds, longer than any
/// check, but its verdict is kept and serves the retry.
const QUEUE_PER_THREAD: usize = 64;
/// How many of them may be behind one prefix: a quarter.
const PREFIX_PER_THREAD: usize = 16;

/// The pool. Its threads end when it is dropped and the queue has run dry.
pub struct BcryptPool {
    queue: Arc<Queue>,
    metrics: Metrics,
}

struct Queue {
    state: Mutex<State>,
    /// Told of each job, and of the end.
    changed: Condvar,
}

struct State {
    turns: Turns<Job>,
    is_closed: bool,
}

struct Job {
    key: PresentedKey,
    candidate: Arc<Candidate>,
    answer: oneshot::Sender<Result<Verdict, Cause>>,
}

impl Queue {
    fn new(limits: TurnLimits) -> Self {
        let state = State { turns: Turns::new(limits), is_closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next job; `None` once the pool is gone.
    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.turns.pop() {
                return Some(job);
            }
            if state.is_closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl BcryptPool {
    /// Starts `threads` threads.
    pub fn start(threads: usize, metrics: Metrics) -> std::io::Result<Self> {
        let limit = threads.saturating_mul(QUEUE_PER_THREAD);
        let limits = TurnLimits { total: limit, per_prefix: threads.saturating_mul(PREFIX_PER_THREAD) };
        metrics.bcrypt_threads.set(i64::try_from(threads).unwrap_or(i64::MAX));
        metrics.bcrypt_queue_limit.set(i64::try_from(limit).unwrap_or(i64::MAX));
        // Made before the threads, so that those that have started end if another can't.
        let pool = Self { queue: Arc::new(Queue::new(limits)), metrics };
        for number in 0..threads {
            let (queue, metrics) = (Arc::clone(&pool.queue), pool.metrics.clone());
            thread::Builder::new().name(format!("verify-{number}")).spawn(move || {
                while let Some(job) = queue.next() {
                    verify(job, &metrics);
                }
            })?;
        }
        Ok(pool)
    }

    /// Compares a key with a candidate's bcrypt hash. A full queue is `Overload` at once.
    pub async fn verify(
        &self,
        place: Place,
        key: PresentedKey,
        candidate: Arc<Candidate>,
    ) -> Result<Verdict, Cause> {
        let (answer, verdict) = oneshot::channel();
        self.metrics.bcrypt_queue_depth.inc();
        let pushed = self.queue.lock().turns.push(place, Job { key, candidate, answer });
        match pushed {
            Ok(None) => {}
            Ok(Some(displaced)) => self.reject(displaced),
            Err(Full(job)) => self.reject(job),
        }
        self.queue.changed.notify_one();
        verdict.await.unwrap_or(Err(Cause::Verification))
    }

    fn reject(&self, job: Job) {
        self.metrics.bcrypt_queue_depth.dec();
        self.metrics.bcrypt_rejected.inc();
        let _ = job.answer.send(Err(Cause::Overload));
    }
}

impl Drop for BcryptPool {
    fn drop(&mut self) {
        self.queue.lock().is_closed = true;
        self.queue.changed.notify_all();
    }
}

fn verify(job: Job, metrics: &Metrics) {
    metrics.bcrypt_queue_depth.dec();
    let Ok(hash) = &job.candidate.key.hash else {
        let _ = job.answer.send(Ok(Verdict::Mismatch));
        return;
    };
    metrics.bcrypt_busy_threads.inc();
    let started = clock::instant();
    // The crate has panicked on odd hashes before (RUSTSEC-2026-0199); ours are checked, but a panic must cost one
    // request and not the thread.
    let compared =
        catch_unwind(AssertUnwindSafe(|| bcrypt::verify(job.key.expose_secret(), hash.expose_secret())));
    metrics.bcrypt_busy_threads.dec();
    metrics.bcrypt_computed.inc();
    metrics.bcrypt_duration.observe(clock::instant().saturating_since(started).as_secs_f64());
    let verdict = match compared {
        Ok(Ok(true)) => Ok(Verdict::Match),
        Ok(Ok(false)) => Ok(Verdict::Mismatch),
        Ok(Err(_)) | Err(_) => Err(Cause::Verification),
    };
    let _ = job.answer.send(verdict);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::key::KeyPrefix;
    use crate::domain::row::CandidateRow;
    use crate::domain::source::Source;

    fn candidate(secret: &[u8]) -> Arc<Candidate> {
        let hash = bcrypt::hash(secret, 4).unwrap();
        Arc::new(Candidate::from_row(&CandidateRow::sample(&hash)))
    }

    fn place() -> Place {
        Place { prefix: KeyPrefix::new("kw_01234").unwrap(), source: Source::of(None) }
    }

    #[tokio::test]
    async fn a_key_of_72_bytes_is_compared_to_its_last_byte() {
        let pool = BcryptPool::start(1, Metrics::new()).unwrap();
        let mut secret = [b'k'; 72];
        let candidate = candidate(&secret);
        let key = PresentedKey::parse(&secret).unwrap();
        assert_eq!(pool.verify(place(), key, Arc::clone(&candidate)).await, Ok(Verdict::Match));
        secret[71] = b'x';
        let key = PresentedKey::parse(&secret).unwrap();
        assert_eq!(pool.verify(place(), key, candidate).await, Ok(Verdict::Mismatch));
    }

    #[tokio::test]
    async fn a_full_queue_is_overload_at_once() {
        let limits = TurnLimits { total: 0, per_prefix: 0 };
        let pool = BcryptPool { queue: Arc::new(Queue::new(limits)), metrics: Metrics::new() };
        let key = PresentedKey::parse(b"kw_0123456789").unwrap();
        assert_eq!(pool.verify(place(), key, candidate(b"kw_0123456789")).await, Err(Cause::Overload));
        assert_eq!(pool.metrics.bcrypt_queue_depth.get(), 0);
        assert_eq!(pool.metrics.bcrypt_rejected.get(), 1);
    }

    /// Whoever has to make room is told, and does not wait for a verdict that never comes.
    #[tokio::test]
    async fn whoever_makes_room_is_overloaded_at_once() {
        let limits = TurnLimits { total: 2, per_prefix: 2 };
        let pool = Arc::new(BcryptPool { queue: Arc::new(Queue::new(limits)), metrics: Metrics::new() });
        let ask = |source: &str| {
            let (pool, source) = (Arc::clone(&pool), Source::of(Some(source.parse().unwrap())));
            let key = PresentedKey::parse(b"kw_0123456789").unwrap();
            let candidate = candidate(b"kw_0123456789");
            tokio::spawn(async move { pool.verify(Place { source, ..place() }, key, candidate).await })
        };
        let (_first, second) = (ask("10.0.0.1"), ask("10.0.0.1"));
        while pool.metrics.bcrypt_queue_depth.get() < 2 {
            tokio::task::yield_now().await;
        }
        let _owner = ask("10.0.0.2");
        assert_eq!(second.await.unwrap(), Err(Cause::Overload));
        assert_eq!(pool.metrics.bcrypt_queue_depth.get(), 2);
    }
}
