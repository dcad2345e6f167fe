//! The threads that compute bcrypt: a fixed number, a bounded queue, and work that is finished once begun.
//!
//! bcrypt takes milliseconds to a second of pure CPU, so it has no place on the threads that answer checks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::clock;
use crate::domain::decision::Cause;
use crate::domain::key::PresentedKey;
use crate::domain::proof::Verdict;
use crate::domain::record::Candidate;
use crate::telemetry::metrics::Metrics;

/// Comparisons that may wait for each thread. At a cost of 10 the last of them waits four seconds, longer than any
/// check, but its verdict is kept and serves the retry.
const QUEUE_PER_THREAD: usize = 64;

/// The pool. Its threads end when it is dropped and the queue has run dry.
pub struct BcryptPool {
    queue: SyncSender<Job>,
    metrics: Metrics,
}

struct Job {
    key: PresentedKey,
    candidate: Arc<Candidate>,
    answer: oneshot::Sender<Result<Verdict, Cause>>,
}

impl BcryptPool {
    /// Starts `threads` threads.
    pub fn start(threads: usize, metrics: Metrics) -> std::io::Result<Self> {
        let limit = threads.saturating_mul(QUEUE_PER_THREAD);
        let (queue, jobs) = sync_channel(limit);
        metrics.bcrypt_threads.set(i64::try_from(threads).unwrap_or(i64::MAX));
        metrics.bcrypt_queue_limit.set(i64::try_from(limit).unwrap_or(i64::MAX));
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..threads {
            let (jobs, metrics) = (Arc::clone(&jobs), metrics.clone());
            thread::Builder::new()
                .name(format!("verify-{number}"))
                .spawn(move || while verify_next(&jobs, &metrics).is_some() {})?;
        }
        Ok(Self { queue, metrics })
    }

    /// Compares a key with a candidate's bcrypt hash. A full queue is `Overload` at once.
    pub async fn verify(&self, key: PresentedKey, candidate: Arc<Candidate>) -> Result<Verdict, Cause> {
        let (answer, verdict) = oneshot::channel();
        self.metrics.bcrypt_queue_depth.inc();
        if let Err(error) = self.queue.try_send(Job { key, candidate, answer }) {
            self.metrics.bcrypt_queue_depth.dec();
            return Err(match error {
                TrySendError::Full(_) => Cause::Overload,
                TrySendError::Disconnected(_) => Cause::Verification,
            });
        }
        verdict.await.unwrap_or(Err(Cause::Verification))
    }
}

/// Takes one job and does it; `None` once the pool is gone.
fn verify_next(jobs: &Mutex<Receiver<Job>>, metrics: &Metrics) -> Option<()> {
    // The lock is held while waiting, so the threads take turns at the queue and compute side by side.
    let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()?;
    metrics.bcrypt_queue_depth.dec();
    let Ok(hash) = &job.candidate.key.hash else {
        let _ = job.answer.send(Ok(Verdict::Mismatch));
        return Some(());
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
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::row::CandidateRow;

    fn candidate(secret: &[u8]) -> Arc<Candidate> {
        let hash = bcrypt::hash(secret, 4).unwrap();
        Arc::new(Candidate::from_row(&CandidateRow::sample(&hash)))
    }

    #[tokio::test]
    async fn a_key_of_72_bytes_is_compared_to_its_last_byte() {
        let pool = BcryptPool::start(1, Metrics::new()).unwrap();
        let mut secret = [b'k'; 72];
        let candidate = candidate(&secret);
        let key = PresentedKey::parse(&secret).unwrap();
        assert_eq!(pool.verify(key, Arc::clone(&candidate)).await, Ok(Verdict::Match));
        secret[71] = b'x';
        let key = PresentedKey::parse(&secret).unwrap();
        assert_eq!(pool.verify(key, candidate).await, Ok(Verdict::Mismatch));
    }

    #[tokio::test]
    async fn a_full_queue_is_overload_at_once() {
        let (queue, _jobs) = sync_channel(0);
        let pool = BcryptPool { queue, metrics: Metrics::new() };
        let key = PresentedKey::parse(b"kw_0123456789").unwrap();
        assert_eq!(pool.verify(key, candidate(b"kw_0123456789")).await, Err(Cause::Overload));
        assert_eq!(pool.metrics.bcrypt_queue_depth.get(), 0);
    }
}
