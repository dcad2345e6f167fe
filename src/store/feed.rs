//! The change feed's session with the store, as messages: what changed, echoes of beats, and answers to them.
//!
//! What they prove is not known here ([`crate::domain::freshness::session`]). A session is opened once and never mends
//! itself: whatever goes wrong ends it, and the caller opens another, so that no gap is papered over.

use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::error::StoreError;
use crate::domain::freshness::change::Change;
use crate::domain::freshness::session::BeatAnswer;
use crate::domain::freshness::shared::Stamp;

/// Messages that may wait for the caller; beyond that the store has to.
const WAITING: usize = 1024;

/// A session that listens.
pub struct Feed {
    /// What the store said about itself after it had begun to listen.
    pub begun: Begun,
    messages: mpsc::Receiver<Message>,
    beats: mpsc::Sender<u64>,
    /// Ends with the session.
    _tasks: JoinSet<()>,
}

/// What a session begins with.
#[derive(Debug)]
pub struct Begun {
    /// The triggers and the server's process, as every beat has to find them again.
    pub found: BeatAnswer,
    /// The life of the server, and what had ended when listening was on.
    pub stamp: Option<Stamp>,
    /// The database itself, over restarts. Another one has other keys.
    pub database: Box<str>,
    /// Pause between beats.
    pub beat_every: Duration,
}

/// One message, in the order of the session.
#[derive(Debug)]
pub enum Message {
    /// Rows have changed.
    Changed(Change),
    /// The echo of a beat.
    Echo(u64),
    /// A beat's statement was answered.
    Answered(u64, BeatAnswer),
    /// The session has ended.
    Lost(StoreError),
}

/// Why there is no session.
#[derive(Debug, Error)]
pub enum NoFeed {
    /// The store can't be asked now.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It can, but changes are not announced; nothing but an operator changes that.
    #[error("{0}")]
    NotAnnounced(String),
}

/// The other ends of a feed's channels, for the tasks that serve it.
pub(super) struct Ends {
    pub(super) messages: mpsc::Sender<Message>,
    pub(super) beats: mpsc::Receiver<u64>,
}

impl Feed {
    pub(super) fn channels() -> (Ends, mpsc::Receiver<Message>, mpsc::Sender<u64>) {
        let (messages, receiver) = mpsc::channel(WAITING);
        let (beat_sender, beats) = mpsc::channel(1);
        (Ends { messages, beats }, receiver, beat_sender)
    }

    pub(super) fn new(
        begun: Begun,
        messages: mpsc::Receiver<Message>,
        beats: mpsc::Sender<u64>,
        tasks: JoinSet<()>,
    ) -> Self {
        Self { begun, messages, beats, _tasks: tasks }
    }

    /// Sends a beat; its echo and answer come as messages.
    pub fn beat(&self, number: u64) {
        // One beat at a time, so there is room; where the other end is gone, `Lost` is on its way.
        let _ = self.beats.try_send(number);
    }

    /// The next message. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Message {
        let ended = || Message::Lost(StoreError::unavailable("the session ended"));
        self.messages.recv().await.unwrap_or_else(ended)
    }

    /// A message that has come already.
    pub fn try_next(&mut self) -> Option<Message> {
        self.messages.try_recv().ok()
    }
}
