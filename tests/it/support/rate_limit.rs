//! A rate limit service in the protocol that Envoy speaks: writes down what it is asked and answers as it is told.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use envoy_types::pb::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::{
    Code, DescriptorStatus, RateLimit, rate_limit::Unit,
};
use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_service_server::{
    RateLimitService, RateLimitServiceServer,
};
use envoy_types::pb::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use envoy_types::pb::envoy::r#type::v3::RateLimitUnit;
use envoy_types::pb::google::protobuf::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// How long a limit that is used up stays so, by what the service says.
pub(crate) const RESET_SECONDS: i64 = 17;

/// What the service is to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reply {
    Ok,
    /// Every descriptor is over its limit.
    OverLimit,
    /// None, ever.
    Silence,
    /// A gRPC error.
    Broken,
}

/// One limit that the service was asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    /// In the order of Envoy's actions.
    pub(crate) entries: Vec<(String, String)>,
    /// The number, and the unit's name in the protocol; `None` where the service is to look for a limit of its own.
    pub(crate) limit: Option<(u32, &'static str)>,
}

/// The listening service; ends with the value.
pub(crate) struct RateLimiter {
    addr: SocketAddr,
    state: Arc<State>,
    _server: JoinSet<()>,
}

struct State {
    asked: Mutex<Vec<RateLimitRequest>>,
    reply: Mutex<Reply>,
}

impl RateLimiter {
    pub(crate) async fn start(reply: Reply) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen on loopback");
        let addr = listener.local_addr().expect("a listener has an address");
        let state = Arc::new(State { asked: Mutex::default(), reply: Mutex::new(reply) });
        let service = RateLimitServiceServer::new(Service(Arc::clone(&state)));
        let mut server = JoinSet::new();
        server.spawn(async move {
            let incoming = TcpListenerStream::new(listener);
            Server::builder().add_service(service).serve_with_incoming(incoming).await.expect("serve");
        });
        Self { addr, state, _server: server }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on.
    pub(crate) fn reply(&self, reply: Reply) {
        *self.state.reply.lock().expect("no holder of this lock panics") = reply;
    }

    /// What it was asked since the last time this was called: a list of limits a request.
    pub(crate) fn take_asked(&self) -> Vec<Vec<Asked>> {
        let requests = std::mem::take(&mut *self.state.asked.lock().expect("no holder of this lock panics"));
        let asked = |request: RateLimitRequest| {
            assert_eq!(request.domain, "keyward");
            request.descriptors.into_iter().map(Asked::from).collect()
        };
        requests.into_iter().map(asked).collect()
    }
}

impl From<RateLimitDescriptor> for Asked {
    fn from(descriptor: RateLimitDescriptor) -> Self {
        let limit = descriptor.limit.map(|limit| {
            let unit = RateLimitUnit::try_from(limit.unit).expect("a unit of the protocol");
            (limit.requests_per_unit, unit.as_str_name())
        });
        let entries = descriptor.entries.into_iter().map(|entry| (entry.key, entry.value)).collect();
        Self { entries, limit }
    }
}

struct Service(Arc<State>);

#[tonic::async_trait]
impl RateLimitService for Service {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let request = request.into_inner();
        let statuses = request.descriptors.iter();
        let status = |code: Code| -> Vec<_> { statuses.map(|asked| status_of(asked, code)).collect() };
        let reply = *self.0.reply.lock().expect("no holder of this lock panics");
        let answer = match reply {
            Reply::Ok => Some(RateLimitResponse {
                overall_code: Code::Ok.into(),
                statuses: status(Code::Ok),
                ..RateLimitResponse::default()
            }),
            Reply::OverLimit => Some(RateLimitResponse {
                overall_code: Code::OverLimit.into(),
                statuses: status(Code::OverLimit),
                ..RateLimitResponse::default()
            }),
            Reply::Silence | Reply::Broken => None,
        };
        self.0.asked.lock().expect("no holder of this lock panics").push(request);
        match answer {
            Some(answer) => Ok(Response::new(answer)),
            None if reply == Reply::Silence => std::future::pending().await,
            None => Err(Status::internal("as told")),
        }
    }
}

/// As the reference service answers to a limit that comes with the question.
fn status_of(asked: &RateLimitDescriptor, code: Code) -> DescriptorStatus {
    let current_limit = asked.limit.as_ref().map(|limit| {
        let unit = RateLimitUnit::try_from(limit.unit).expect("a unit of the protocol");
        RateLimit {
            name: String::new(),
            requests_per_unit: limit.requests_per_unit,
            unit: Unit::from_str_name(unit.as_str_name()).expect("both enums have the same names").into(),
        }
    });
    DescriptorStatus {
        code: code.into(),
        current_limit,
        duration_until_reset: Some(Duration { seconds: RESET_SECONDS, nanos: 0 }),
        ..DescriptorStatus::default()
    }
}
