//! The connections of a door: accepted, shaken hands with, served, aged, and closed in order.
//!
//! tonic's own server can't give each connection an age of its own, and its grace aborts what is in flight; axum's has no
//! TLS. So the connections are hyper's. Ageing and shutting down both are a GOAWAY, or the end of keep-alive: what has
//! begun is answered, and the client opens another connection for what comes next. Nothing here ever cuts off a request.

use std::fmt::Display;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::grpc::GrpcServices;
use super::listen::{Accepted, Listener};
use super::tls::Tls;
use super::wire::Wire;
use super::workers::Workers;

/// Checks that one connection may have open: Envoy opens that many.
const MAX_CONCURRENT_STREAMS: u32 = 1024;
/// How large the headers of a call may be, in bytes: Envoy sends some hundred, and more where it hands on a caller's trace.
const MAX_HEADER_LIST: u32 = 16 << 10;
/// What a connection, or one call of it, may send ahead of being read, in bytes: a check with a body of a mebibyte.
const WINDOW: u32 = 1 << 20;
/// Answers to one call that may wait for its peer, in bytes: an allow is a few kibibytes.
const MAX_SEND_BUFFER: usize = 64 << 10;
/// Calls that a peer may open and reset before they are looked at; more end the connection (CVE-2023-44487).
const MAX_RESETS: usize = 20;
/// Calls that we may have to reset for errors of the peer; more end the connection.
const MAX_ERRORS: usize = 256;
/// How long a peer may take to say that it speaks HTTP/2, and how much of that has to be there: the preface and the head of
/// its settings. From then on it is asked whether it is still there.
const HELLO: Duration = Duration::from_secs(10);
const HELLO_LENGTH: usize = 24 + 9;
/// How often a peer is asked over HTTP/2 whether it is still there.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long it may take to answer.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause after an accept that failed for want of something, most likely file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What answers behind a door.
#[derive(Clone)]
pub enum Services {
    /// gRPC, over HTTP/2 without a word about it.
    Grpc(GrpcServices),
    /// HTTP/1.
    Http(Router),
}

/// What every connection of a door gets.
#[derive(Clone)]
pub struct Connections {
    /// What answers.
    pub services: Services,
    /// How hands are shaken; `None` for none at all.
    pub tls: Option<Arc<Tls>>,
    /// What serves them.
    pub workers: Arc<Workers>,
    /// `--max-connection-age`
    pub max_age: Option<Duration>,
}

impl Connections {
    /// Accepts until it is told to stop, then ends when the last connection has ended.
    pub async fn serve(self, listener: Listener, stop: CancellationToken) {
        let tracker = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok(accepted) => self.start(accepted, &tracker, &stop),
                Err(error) if is_of_the_connection(&error) => {
                    tracing::debug!(%error, "connection not accepted");
                }
                Err(error) => {
                    tracing::warn!(%error, "connections can't be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        // Who has been let in by the kernel would be thrown out with the socket; they are served and told to go.
        for accepted in listener.close() {
            self.start(accepted, &tracker, &stop);
        }
        tracker.close();
        tracker.wait().await;
    }

    fn start(&self, accepted: Accepted, tracker: &TaskTracker, stop: &CancellationToken) {
        let (this, stop) = (self.clone(), stop.clone());
        let serving = async move {
            match accepted.move_here() {
                Ok(Accepted::Tcp(stream, peer)) => this.secure(stream, peer, stop).await,
                Ok(Accepted::Unix(stream)) => this.secure(stream, "unix", stop).await,
                Err(error) => tracing::warn!(%error, "a connection can't be served"),
            }
        };
        self.workers.run(tracker.track_future(serving));
    }

    async fn secure<S>(self, stream: S, peer: impl Display, stop: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Some(tls) = self.tls else {
            return run(stream, self.services, self.max_age, peer, stop).await;
        };
        match tls.accept(stream).await {
            Ok(stream) => run(stream, self.services, self.max_age, peer, stop).await,
            Err(error) => tls.report(&peer, &error),
        }
    }
}

async fn run<S>(
    stream: S,
    services: Services,
    max_age: Option<Duration>,
    peer: impl Display,
    stop: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (stream, wire) = Wire::pair(stream);
    let stream = TokioIo::new(stream);
    let time_to_go = async {
        tokio::select! {
            () = come_of_age(max_age) => {}
            () = stop.cancelled() => {}
        }
    };
    let ended = match services {
        Services::Grpc(services) => {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
                .max_header_list_size(MAX_HEADER_LIST)
                .initial_connection_window_size(WINDOW)
                .initial_stream_window_size(WINDOW)
                .max_send_buf_size(MAX_SEND_BUFFER)
                .max_pending_accept_reset_streams(MAX_RESETS)
                .max_local_error_reset_streams(MAX_ERRORS)
                .keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_TIMEOUT);
            let answer = service_fn(move |request| services.clone().call(request));
            let connection = builder.serve_connection(stream, answer);
            let served = to_the_end(connection, &wire, http2::Connection::graceful_shutdown, time_to_go);
            tokio::select! {
                biased;
                ended = served => ended,
                () = no_hello(&wire) => return tracing::debug!(%peer, "a client has not said that it speaks HTTP/2"),
            }
        }
        Services::Http(router) => {
            let connection = http1::Builder::new().serve_connection(stream, TowerToHyperService::new(router));
            to_the_end(connection, &wire, http1::Connection::graceful_shutdown, time_to_go).await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

/// Serves a connection; once it is time to go, to the end of what has begun.
async fn to_the_end<C, S, T>(
    connection: C,
    wire: &Wire<S>,
    go: fn(Pin<&mut C>),
    time_to_go: impl Future<Output = ()>,
) -> T
where
    C: Future<Output = T>,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = poll_fn(|context| wire.turn(connection.as_mut(), context)) => Some(ended),
        () = time_to_go => None,
    };
    if let Some(ended) = ended {
        return ended;
    }
    go(connection.as_mut());
    poll_fn(|context| wire.turn(connection.as_mut(), context)).await
}

/// Ends where a peer has not said hello in time, and never otherwise.
async fn no_hello<S: AsyncRead + AsyncWrite + Unpin>(wire: &Wire<S>) {
    tokio::time::sleep(HELLO).await;
    if wire.heard() >= HELLO_LENGTH {
        std::future::pending::<()>().await;
    }
}

async fn come_of_age(max_age: Option<Duration>) {
    match max_age {
        Some(age) => tokio::time::sleep(jittered(age, getrandom::u32().unwrap_or(u32::MAX / 2))).await,
        None => std::future::pending().await,
    }
}

/// Ten per cent more or less, so that connections that were opened together do not all come back together.
fn jittered(age: Duration, random: u32) -> Duration {
    age.mul_f64(0.9 + 0.2 * f64::from(random) / f64::from(u32::MAX))
}

/// The one that was to be accepted is gone, which says nothing about the next.
fn is_of_the_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_ten_per_cent_more_or_less() {
        let age = Duration::from_secs(100);
        assert_eq!(jittered(age, 0), Duration::from_secs(90));
        assert_eq!(jittered(age, u32::MAX).as_millis(), 110_000);
    }
}
