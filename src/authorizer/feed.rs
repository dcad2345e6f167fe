//! Following the change feed: one session after the other, for as long as the process lives.
//!
//! The order is what makes it safe: a session listens first, then says what it found, then beats; only an echoed beat
//! makes its coverage count ([`Freshness::publish`]). A change is noted for shared records first and applied to memory
//! then, both before any later message is looked at.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant as Tick, sleep, sleep_until};

use super::candidates::Candidates;
use super::freshness::{Freshness, Mode};
use super::outage::Outage;
use crate::clock;
use crate::domain::freshness::change::Change;
use crate::domain::freshness::session::{BeatAnswer, Broken, Session};
use crate::domain::freshness::shared::SharedFilter;
use crate::domain::freshness::snapshot::Snapshot;
use crate::store::Store;
use crate::store::feed::{Begun, Feed, Message, NoFeed};
use crate::telemetry::metrics::Metrics;

/// Changes that are remembered against shared records, about 100 bytes each.
const MAX_CHANGES: usize = 100_000;

/// Changes that are applied together; a change to a user looks through all of memory, so many at once look once.
const BATCH: usize = 1024;

/// Pauses between attempts to open a session: the first, and the longest.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(1);

/// How often is looked whether changes are announced by now, where they are not.
const RETRY_UNANNOUNCED: Duration = Duration::from_secs(2);

/// Follows the feed of one store.
pub struct FeedFollower {
    /// The store.
    pub store: Store,
    /// Whose memory the changes are applied to.
    pub candidates: Arc<Candidates>,
    /// Where what is proven is left.
    pub freshness: Arc<Freshness>,
    /// A session that opens is an answer of the store.
    pub outage: Arc<Outage>,
    /// Counters.
    pub metrics: Metrics,
}

/// How far the history of the store had come when it was last looked at.
#[derive(Default)]
struct History {
    sessions: u64,
    database: Option<Box<str>>,
    position: u64,
}

impl History {
    fn note_position(&mut self, found: &BeatAnswer) {
        self.position = found.snapshot.as_ref().map_or(0, Snapshot::position);
    }
}

impl FeedFollower {
    /// Never returns; to be dropped at the end.
    pub async fn run(self) {
        let mut history = History::default();
        let mut retry = RETRY_FIRST;
        let mut told = String::new();
        loop {
            let pause = match self.store.open_feed(self.freshness.settings().lease).await {
                Ok(feed) => {
                    self.outage.answered(clock::instant());
                    self.note_history(&feed.begun, &mut history);
                    let (proven, reason) = self.follow(feed, &mut history).await;
                    self.metrics.change_feed_up.set(0);
                    if proven {
                        (retry, told) = (RETRY_FIRST, String::new());
                        self.metrics.change_feed_lost.inc();
                        tracing::warn!(reason, "the change feed was interrupted");
                    } else if told != reason {
                        tracing::warn!(reason, "the change feed could not be established");
                        told = reason;
                    }
                    if self.is_degraded() { RETRY_UNANNOUNCED } else { retry }
                }
                Err(NoFeed::NotAnnounced(reason)) => {
                    self.outage.answered(clock::instant());
                    self.degrade(&reason);
                    RETRY_UNANNOUNCED
                }
                Err(NoFeed::Store(error)) => {
                    let reason = format!("{:#}", anyhow::Error::new(error));
                    if told != reason {
                        tracing::warn!(reason, "the change feed can't be opened");
                        told = reason;
                    }
                    retry
                }
            };
            retry = retry.saturating_mul(2).min(RETRY_LAST);
            sleep(jittered(pause)).await;
        }
    }

    /// Another database, or one whose history was undone, has other keys: nothing from before is used, not even while
    /// the store can't be asked.
    fn note_history(&self, begun: &Begun, history: &mut History) {
        history.sessions = history.sessions.saturating_add(1);
        let is_other = history.database.as_ref().is_some_and(|known| *known != begun.database);
        let position = begun.found.snapshot.as_ref().map_or(0, Snapshot::position);
        if is_other || position < history.position {
            tracing::warn!(
                "the store's history is another one (failover, restored backup, or a file put in its place): \
                 everything that was remembered is dropped; changes that were not replicated are undone"
            );
            self.candidates.memory().clear();
        }
        history.database = Some(begun.database.clone());
        history.note_position(&begun.found);
    }

    /// Follows one session to its end; whether it had proven anything, and why it ended.
    async fn follow(&self, mut feed: Feed, history: &mut History) -> (bool, String) {
        let lease = self.freshness.settings().lease;
        let mut session = Session::new(history.sessions, &feed.begun.found, lease);
        *self.freshness.filter() =
            feed.begun.stamp.clone().map(|stamp| SharedFilter::new(stamp, MAX_CHANGES));
        let mut is_proven = false;
        let mut next_beat = Tick::now();
        let mut pending = None;
        loop {
            let message = if let Some(message) = pending.take() {
                message
            } else {
                match next_message(&mut feed, &mut session, &mut next_beat).await {
                    Ok(message) => message,
                    Err(broken) => return (is_proven, self.broken(broken)),
                }
            };
            let progress = match message {
                Message::Changed(change) => {
                    let mut changes = vec![change];
                    while changes.len() < BATCH && pending.is_none() {
                        match feed.try_next() {
                            Some(Message::Changed(change)) => changes.push(change),
                            other => {
                                pending = other;
                                break;
                            }
                        }
                    }
                    self.apply(&mut session, &changes);
                    false
                }
                Message::Echo(number) => session.echoed(number, &mut self.freshness.filter()),
                Message::Answered(number, answer) => {
                    history.note_position(&answer);
                    self.outage.answered(clock::instant());
                    match session.answered(number, answer, &mut self.freshness.filter()) {
                        Ok(progress) => progress,
                        Err(broken) => return (is_proven, self.broken(broken)),
                    }
                }
                Message::Lost(error) => return (is_proven, format!("{:#}", anyhow::Error::new(error))),
            };
            if progress && !is_proven {
                is_proven = true;
                let incarnation = feed.begun.stamp.as_ref().map(|stamp| stamp.incarnation.clone());
                self.freshness.publish(session.coverage().clone(), incarnation);
                self.metrics.change_feed_up.set(1);
                tracing::info!(lease = %humantime::format_duration(lease), "the change feed is up");
            }
        }
    }

    /// Noted first, then applied: a reader whose fill is not dropped by the second finds the first.
    fn apply(&self, session: &mut Session, changes: &[Change]) {
        {
            let mut filter = self.freshness.filter();
            for change in changes {
                session.heard(change, &mut filter);
            }
        }
        let memory = self.candidates.memory();
        let mut users = HashSet::new();
        for change in changes {
            match change {
                Change::Keys { prefixes, .. } => prefixes.iter().for_each(|prefix| memory.invalidate(prefix)),
                Change::User { id, .. } => {
                    users.insert(*id);
                }
                Change::Anything => memory.clear(),
            }
        }
        if !users.is_empty() {
            memory.invalidate_users(&users);
        }
        self.metrics.changes.inc_by(u64::try_from(changes.len()).unwrap_or(u64::MAX));
    }

    /// What a broken session means for those that follow.
    fn broken(&self, broken: Broken) -> String {
        let reason = broken.to_string();
        match broken {
            // Opening another one would go the same way until somebody changes the URL.
            Broken::NotEchoed | Broken::Moved => self.degrade(&reason),
            Broken::Silent | Broken::TriggersChanged => {}
        }
        reason
    }

    fn degrade(&self, reason: &str) {
        if self.freshness.mode() != Mode::Ttl(reason.to_owned()) {
            self.freshness.degrade(reason.to_owned());
            let within = humantime::format_duration(self.freshness.window());
            tracing::warn!(reason, %within, "no change feed: ttl mode");
        }
    }

    fn is_degraded(&self) -> bool {
        matches!(self.freshness.mode(), Mode::Ttl(_))
    }
}

/// The next message; beats are sent while it is awaited.
async fn next_message(
    feed: &mut Feed,
    session: &mut Session,
    next_beat: &mut Tick,
) -> Result<Message, Broken> {
    loop {
        tokio::select! {
            // What has come is looked at first: after a freeze, the echo may be among it.
            biased;
            message = feed.next() => return Ok(message),
            () = sleep_until(*next_beat) => {
                session.check(clock::instant())?;
                if session.may_beat() {
                    feed.beat(session.send_beat(clock::instant()));
                }
                *next_beat = Tick::now() + jittered(feed.begun.beat_every);
            }
        }
    }
}

/// Up to a tenth less, so that replicas that began together do not go on together.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0_u8];
    // Without randomness they do, and that is all.
    let _ = getrandom::fill(&mut random);
    pause.saturating_sub(pause.saturating_mul(u32::from(random[0])) / 2560)
}
