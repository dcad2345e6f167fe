//! Links: the connections to Redis.
//!
//! A few multiplexed connections, each carrying many requests at once; no request waits for a free one. A connection is
//! made by a task of its own, so that one that takes longer than a request's time limit is there for the next request.
//!
//! A reply can't reach another's request: redis-rs counts replies off against requests in the order they were sent and
//! keeps the place of a request whose caller has gone. A connection that did not answer in time, or broke, is given up
//! all the same; requests that are still out on it keep it until they end. Should replies be swapped before they get
//! here, the seal notices, because an entry is bound to its name.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, ErrorKind, RedisConnectionInfo, RedisError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::ration::Rationed;
use crate::clock;
use crate::domain::time::Instant;

/// Longest time that making one connection may take, TLS and login included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a lane that could not connect is left alone while another one is up (`maxclients` reached, for example).
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// Why Redis did not answer. The words are for logs, metrics and `/stats`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FailureKind {
    /// The breaker is open: Redis was not asked.
    LeftAlone,
    /// No connection within the time limit.
    ConnectTimeout,
    /// No connection: refused, unreachable, TLS, unknown host.
    Connect,
    /// Redis refused user or password.
    Login,
    /// No reply within the time limit.
    Timeout,
    /// The connection broke.
    Dropped,
    /// The reply was no Redis protocol, or not a reply to what was asked.
    Protocol,
    /// Redis answered that it can't (loading, no permission, read-only, …).
    Refused,
}

impl FailureKind {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::LeftAlone => "breaker_open",
            Self::ConnectTimeout => "connect_timeout",
            Self::Connect => "connect",
            Self::Login => "login",
            Self::Timeout => "timeout",
            Self::Dropped => "connection_dropped",
            Self::Protocol => "protocol",
            Self::Refused => "refused",
        }
    }

    pub(super) fn of_request(error: &RedisError) -> Self {
        if error.is_timeout() {
            Self::Timeout
        } else if matches!(error.kind(), ErrorKind::Parse | ErrorKind::UnexpectedReturnType) {
            Self::Protocol
        } else if error.is_io_error() || error.is_connection_dropped() {
            Self::Dropped
        } else {
            Self::Refused
        }
    }

    fn of_connecting(error: &RedisError) -> Self {
        if error.is_timeout() {
            Self::ConnectTimeout
        } else if error.kind() == ErrorKind::AuthenticationFailed
            || matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"))
        {
            Self::Login
        } else {
            Self::Connect
        }
    }
}

/// The connections.
pub(super) struct Links {
    /// Knows address and login.
    client: Client,
    config: AsyncConnectionConfig,
    /// One connection each. Locks are held for a look or an exchange, never two at a time, never across an await.
    lanes: Box<[Mutex<Option<Link>>]>,
    /// Whose turn it is.
    turn: AtomicUsize,
    /// Gives each connection a number, so that only the one that failed is given up, not its successor.
    next_id: AtomicU64,
}

struct Link {
    id: u64,
    state: watch::Receiver<LinkState>,
    /// Connects, then ends; ends at once when the link is given up.
    _connecting: AbortOnDropHandle<()>,
}

#[derive(Clone)]
enum LinkState {
    Connecting,
    Ready(Arc<Up>),
    Failed { kind: FailureKind, at: Instant },
}

/// A connection that is up. Ends when nobody holds it any more.
struct Up {
    connection: MultiplexedConnection,
    /// Reads and writes, where redis-rs does not run that itself (TLS).
    _driver: Option<AbortOnDropHandle<()>>,
}

/// A connection, lent for one request.
pub(super) struct Lent {
    lane: usize,
    id: u64,
    pub(super) connection: MultiplexedConnection,
    /// Keeps the connection for this request after it was given up.
    _up: Arc<Up>,
}

impl Lent {
    fn new(lane: usize, id: u64, up: &Arc<Up>) -> Self {
        Self { lane, id, connection: up.connection.clone(), _up: Arc::clone(up) }
    }
}

impl Links {
    pub(super) fn new(client: Client, connections: usize) -> Self {
        // The time limit of a request is its caller's; a second one here would only add a timer.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(None);
        Self {
            client,
            config,
            lanes: (0..connections.max(1)).map(|_| Mutex::new(None)).collect(),
            turn: AtomicUsize::new(0),
            next_id: AtomicU64::new(0),
        }
    }

    /// A connection: of the lane whose turn it is, or of any lane that is up, or the first one that comes up. The caller
    /// limits the time; dropping the future leaves the connecting going on for the next caller.
    pub(super) async fn lend(&self) -> Result<Lent, FailureKind> {
        let count = self.lanes.len();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % count;
        let others_up = (1..count).any(|offset| self.ready((turn + offset) % count).is_some());
        let (id, mut state) = self.started(turn, others_up)?;
        if let LinkState::Ready(up) = &*state.borrow() {
            return Ok(Lent::new(turn, id, up));
        }
        if let Some(lent) = (1..count).find_map(|offset| self.ready((turn + offset) % count)) {
            return Ok(lent);
        }
        let settled = state.wait_for(|state| !matches!(state, LinkState::Connecting)).await;
        match settled.as_deref() {
            Ok(LinkState::Ready(up)) => Ok(Lent::new(turn, id, up)),
            Ok(LinkState::Failed { kind, .. }) => Err(*kind),
            Ok(LinkState::Connecting) | Err(_) => Err(FailureKind::Connect),
        }
    }

    /// Gives up the connection that was lent; what others still wait for on it goes on.
    pub(super) fn give_up(&self, lent: &Lent) {
        if let Some(mut lane) = self.lane(lent.lane)
            && lane.as_ref().is_some_and(|link| link.id == lent.id)
        {
            *lane = None;
        }
    }

    /// Gives up all connections that are up: where one was found broken, the others are likely to be.
    pub(super) fn give_up_all(&self) {
        for index in 0..self.lanes.len() {
            if let Some(mut lane) = self.lane(index)
                && lane.as_ref().is_some_and(|link| matches!(*link.state.borrow(), LinkState::Ready(_)))
            {
                *lane = None;
            }
        }
    }

    /// How many connections are up.
    pub(super) fn up(&self) -> usize {
        (0..self.lanes.len()).filter(|lane| self.ready(*lane).is_some()).count()
    }

    fn ready(&self, index: usize) -> Option<Lent> {
        let lane = self.lane(index)?;
        let link = lane.as_ref()?;
        match &*link.state.borrow() {
            LinkState::Ready(up) => Some(Lent::new(index, link.id, up)),
            LinkState::Connecting | LinkState::Failed { .. } => None,
        }
    }

    /// The link of a lane; started where there is none, and anew where the last one failed.
    fn started(
        &self,
        index: usize,
        others_up: bool,
    ) -> Result<(u64, watch::Receiver<LinkState>), FailureKind> {
        let mut lane = self.lane(index).ok_or(FailureKind::Connect)?;
        if let Some(link) = lane.as_ref() {
            let usable = match &*link.state.borrow() {
                LinkState::Connecting | LinkState::Ready(_) => true,
                LinkState::Failed { at, .. } => {
                    others_up && clock::instant().saturating_since(*at) < RECONNECT_AFTER
                }
            };
            if usable {
                return Ok((link.id, link.state.clone()));
            }
        }
        let link = self.connect();
        let started = (link.id, link.state.clone());
        *lane = Some(link);
        Ok(started)
    }

    fn connect(&self) -> Link {
        let (settle, state) = watch::channel(LinkState::Connecting);
        let (client, config) = (self.client.clone(), self.config.clone());
        let connecting = tokio::spawn(async move {
            let state = match tokio::time::timeout(CONNECT_TIMEOUT, bring_up(&client, config)).await {
                Ok(Ok(up)) => LinkState::Ready(Arc::new(up)),
                Ok(Err(error)) => {
                    LinkState::Failed { kind: FailureKind::of_connecting(&error), at: clock::instant() }
                }
                Err(_) => LinkState::Failed { kind: FailureKind::ConnectTimeout, at: clock::instant() },
            };
            settle.send_replace(state);
        });
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        Link { id, state, _connecting: AbortOnDropHandle::new(connecting) }
    }

    fn lane(&self, index: usize) -> Option<MutexGuard<'_, Option<Link>>> {
        // No code under the lock leaves a half-made link, so a poisoned lane is still a lane.
        self.lanes.get(index).map(|lane| lane.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Connects and logs in.
async fn bring_up(client: &Client, config: AsyncConnectionConfig) -> Result<Up, RedisError> {
    let info = client.get_connection_info();
    match info.addr() {
        ConnectionAddr::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            // Requests share a connection: with Nagle's algorithm one would wait for the acknowledgement of another.
            stream.set_nodelay(true)?;
            drive(info.redis_settings(), stream, config).await
        }
        ConnectionAddr::Unix(path) => {
            drive(info.redis_settings(), UnixStream::connect(path).await?, config).await
        }
        // TLS is redis-rs' own; what an authenticated server sends is not rationed.
        _ => {
            let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
            Ok(Up { connection, _driver: None })
        }
    }
}

async fn drive<S>(
    login: &RedisConnectionInfo,
    stream: S,
    config: AsyncConnectionConfig,
) -> Result<Up, RedisError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (connection, driver) =
        MultiplexedConnection::new_with_config(login, Rationed::new(stream), config).await?;
    Ok(Up { connection, _driver: Some(AbortOnDropHandle::new(tokio::spawn(driver))) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::labels::REDIS_FAILURES;

    #[test]
    fn every_kind_of_failure_has_a_series_from_the_start() {
        let kinds = [
            FailureKind::LeftAlone,
            FailureKind::ConnectTimeout,
            FailureKind::Connect,
            FailureKind::Login,
            FailureKind::Timeout,
            FailureKind::Dropped,
            FailureKind::Protocol,
            FailureKind::Refused,
        ];
        assert_eq!(kinds.map(FailureKind::as_str), REDIS_FAILURES);
    }
}
