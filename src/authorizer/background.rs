//! Work that nobody waits for: writes to Redis. Bounded, and finished on the way out.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

/// Most writes under way; each takes at most the Redis deadline, and one too many is simply not written.
const MAX_TASKS: usize = 256;

/// Owns the tasks. Cloning shares them.
#[derive(Clone)]
pub struct Background {
    tasks: TaskTracker,
    places: Arc<Semaphore>,
}

impl Background {
    /// Without tasks.
    pub fn new() -> Self {
        Self { tasks: TaskTracker::new(), places: Arc::new(Semaphore::new(MAX_TASKS)) }
    }

    /// Runs `task`, or drops it where too many are under way.
    pub fn run(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
            self.tasks.spawn(async move {
                task.await;
                drop(place);
            });
        }
    }

    /// Waits for what is under way, but not for ever.
    pub async fn finish(&self, limit: Duration) {
        self.tasks.close();
        let _ = tokio::time::timeout(limit, self.tasks.wait()).await;
    }
}

impl Default for Background {
    fn default() -> Self {
        Self::new()
    }
}
