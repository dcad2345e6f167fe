//! Calls to Redis: one round trip each, under the breaker and a time limit. Knows nothing of what is asked.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use redis::aio::ConnectionLike as _;
use redis::{Cmd, FromRedisValue, Pipeline, Value};
use tokio::time::{Instant as Deadline, timeout_at};

use super::breaker::{BreakerState, CallOutcome, Leave, SharedBreaker, Transition};
use super::links::{FailureKind, Links};
use crate::clock;
use crate::telemetry::metrics::{FailureLabels, Metrics};

/// Time limit of each round trip that an operator waits for, and no check.
const OPERATOR_TIMEOUT: Duration = Duration::from_secs(2);

/// Connections, breaker and time limit.
pub(super) struct Calls {
    links: Links,
    /// Of one round trip, waiting for a connection included.
    timeout: Duration,
    breaker: SharedBreaker,
    metrics: Metrics,
    /// `keyward_redis_failures_total` of those calls that cost nothing: they come as fast as checks do.
    left_alone: Counter,
    /// For `/stats`.
    last_error: Mutex<Option<FailureKind>>,
}

/// What the answers to a call say about Redis' health.
#[derive(Clone, Copy)]
pub(super) enum Duty {
    /// An error other than a wrong type means that it can't serve.
    Read,
    /// Errors (read-only, out of memory, disk full) don't touch reading, which goes on.
    Write,
}

impl Duty {
    /// Whether this can be the answer to what was asked. Another one means that replies and requests are out of step,
    /// and the connection is of no use any more.
    fn expects(self, reply: &Value) -> bool {
        match (self, reply) {
            (_, Value::Nil | Value::ServerError(_))
            | (Self::Read, Value::BulkString(_))
            | (Self::Write, Value::Okay | Value::Int(_)) => true,
            (Self::Read | Self::Write, _) => false,
        }
    }
}

impl Calls {
    pub(super) fn new(links: Links, timeout: Duration, metrics: Metrics) -> Self {
        metrics.gauges.redis_enabled.set(1);
        let left_alone = FailureLabels { kind: FailureKind::LeftAlone.as_str() };
        let left_alone = metrics.redis_failures.get_or_create_owned(&left_alone);
        let (breaker, last_error) = (SharedBreaker::default(), Mutex::new(None));
        Self { links, timeout, breaker, metrics, left_alone, last_error }
    }

    pub(super) fn breaker(&self) -> BreakerState {
        self.breaker.state()
    }

    pub(super) fn last_error(&self) -> Option<FailureKind> {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many connections are up.
    pub(super) fn connections(&self) -> usize {
        self.links.up()
    }

    /// One round trip under the breaker and the time limit: one reply per command, errors among them.
    pub(super) async fn call(&self, request: &Pipeline, duty: Duty) -> Result<Vec<Value>, FailureKind> {
        let began = clock::instant();
        let Some(leave) = self.breaker.ask(began) else {
            self.left_alone.inc();
            return Err(FailureKind::LeftAlone);
        };
        let call = Call { calls: self, leave: Some(leave) };
        let replies = self.round_trip(request, duty).await;
        self.metrics.redis_duration.observe(clock::instant().saturating_since(began).as_secs_f64());
        let failure = match &replies {
            Err(kind) => Some(*kind),
            Ok(replies) => match duty {
                Duty::Read => replies.iter().any(cannot_serve).then_some(FailureKind::Refused),
                Duty::Write => None,
            },
        };
        call.end(failure);
        replies
    }

    async fn round_trip(&self, request: &Pipeline, duty: Duty) -> Result<Vec<Value>, FailureKind> {
        let deadline = Deadline::now() + self.timeout;
        let mut lent =
            timeout_at(deadline, self.links.lend()).await.map_err(|_| FailureKind::ConnectTimeout)??;
        let count = request.cmd_iter().count();
        match timeout_at(deadline, lent.connection.req_packed_commands(request, 0, count)).await {
            Ok(Ok(replies)) if replies.len() == count && replies.iter().all(|reply| duty.expects(reply)) => {
                Ok(replies)
            }
            Ok(Ok(_)) => {
                self.links.give_up(&lent);
                Err(FailureKind::Protocol)
            }
            Ok(Err(error)) => {
                self.links.give_up_all();
                Err(FailureKind::of_request(&error))
            }
            Err(_) => {
                self.links.give_up(&lent);
                Err(FailureKind::Timeout)
            }
        }
    }

    /// One command of an operator's: beside the breaker, with a longer time limit.
    pub(super) async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, FailureKind> {
        let deadline = Deadline::now() + OPERATOR_TIMEOUT;
        let mut lent =
            timeout_at(deadline, self.links.lend()).await.map_err(|_| FailureKind::ConnectTimeout)??;
        match timeout_at(deadline, command.query_async::<T>(&mut lent.connection)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => {
                self.links.give_up(&lent);
                Err(FailureKind::of_request(&error))
            }
            Err(_) => {
                self.links.give_up(&lent);
                Err(FailureKind::Timeout)
            }
        }
    }

    /// Counts and remembers why a call failed, for `/stats`.
    pub(super) fn remember(&self, kind: FailureKind) {
        self.metrics.redis_failures.get_or_create(&FailureLabels { kind: kind.as_str() }).inc();
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(kind);
    }
}

/// A call that is out. Dropped without an end (its caller went away), it is reported as cancelled.
struct Call<'a> {
    calls: &'a Calls,
    leave: Option<Leave>,
}

impl Call<'_> {
    fn end(mut self, failure: Option<FailureKind>) {
        if let Some(kind) = failure {
            self.calls.remember(kind);
        }
        let outcome = if failure.is_some() { CallOutcome::Failed } else { CallOutcome::Answered };
        self.report(outcome, failure);
    }

    fn report(&mut self, outcome: CallOutcome, failure: Option<FailureKind>) {
        let Some(leave) = self.leave.take() else { return };
        match self.calls.breaker.report(leave, outcome, clock::instant()) {
            Some(Transition::Opened) => {
                self.calls.metrics.redis_breaker_open.set(1);
                let error = failure.map(FailureKind::as_str);
                tracing::warn!(error, "Redis is left alone: it fails; cold keys go to the store");
            }
            Some(Transition::Closed) => {
                self.calls.metrics.redis_breaker_open.set(0);
                tracing::info!("Redis answers again and is used");
            }
            None => {}
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.report(CallOutcome::Cancelled, None);
    }
}

fn cannot_serve(reply: &Value) -> bool {
    matches!(reply, Value::ServerError(error) if error.code() != "WRONGTYPE")
}
