//! Threads that serve connections, each its own from the first byte to the last.
//!
//! A check that memory decides never leaves its thread: no other core is woken and no cache line moves, which a pool of
//! threads that share their work can't promise. What has to be asked is asked on the runtime that all of them share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{io, thread};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The threads. They end when this is dropped, and what they were doing ends with them.
pub struct Workers {
    workers: Vec<Worker>,
    _end: DropGuard,
}

struct Worker {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts so many threads, at least one.
    pub fn start(count: usize) -> io::Result<Self> {
        let end = CancellationToken::new();
        let mut workers = Vec::new();
        for _ in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            workers.push(Worker { runtime: runtime.handle().clone(), connections: Arc::default() });
            let end = end.clone();
            thread::Builder::new()
                .name("keyward-checks".to_owned())
                .spawn(move || runtime.block_on(end.cancelled()))?;
        }
        Ok(Self { workers, _end: end.drop_guard() })
    }

    /// Runs a connection on the thread that has fewest.
    pub fn run(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let idlest = self.workers.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed));
        let Some(Worker { runtime, connections }) = idlest else { return };
        let counted = Counted::one_more(connections);
        runtime.spawn(async move {
            connection.await;
            drop(counted);
        });
    }
}

/// Counts a connection for as long as it lives, however it ends.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn one_more(connections: &Arc<AtomicUsize>) -> Self {
        connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connections))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::{mpsc, oneshot};

    use super::*;

    #[tokio::test]
    async fn connections_are_spread_and_go_where_there_are_fewest() {
        let workers = Workers::start(2).unwrap();
        let (tell, mut told) = mpsc::unbounded_channel();
        let run = || {
            let (tell, (end, ended)) = (tell.clone(), oneshot::channel::<()>());
            workers.run(async move {
                let _ = tell.send(thread::current().id());
                let _ = ended.await;
            });
            end
        };
        let (first_end, second_end) = (run(), run());
        let (first, second) = (told.recv().await.unwrap(), told.recv().await.unwrap());
        assert_ne!(first, second);
        assert_ne!(first, thread::current().id());
        drop(second_end);
        while workers.workers.iter().map(|it| it.connections.load(Ordering::Relaxed)).sum::<usize>() > 1 {
            tokio::task::yield_now().await;
        }
        let third_end = run();
        assert_eq!(told.recv().await.unwrap(), second);
        drop((first_end, third_end));
    }

    #[tokio::test]
    async fn threads_end_with_their_owner_and_so_does_what_they_did() {
        let workers = Workers::start(0).unwrap();
        let (still_there, gone) = oneshot::channel::<()>();
        workers.run(async move {
            let _still_there = still_there;
            std::future::pending::<()>().await;
        });
        drop(workers);
        assert!(gone.await.is_err());
    }
}
