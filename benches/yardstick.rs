//! What Keyward is measured against, and its steps one at a time. `make bench` builds and drives it; by hand:
//!
//! - `yardstick constant`: a tonic server that decodes each check with envoy-types and gives always the answer that it has
//!   read from standard input (a `CheckResponse`). It prints its address.
//! - `yardstick step STEP TIMES CHECK STORE`: does a step of a hot check so many times, for callgrind to count. CHECK is a
//!   file with a `CheckRequest` in gRPC's frame, whose key is in STORE.
//! - `yardstick bcrypt COST TIMES`: microseconds for each verification, one a line.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement: a panic is how it fails, and its output is its result"
)]

use std::hint::black_box;
use std::io::Read;
use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::authorization_server::{Authorization, AuthorizationServer};
use envoy_types::pb::envoy::service::auth::v3::{CheckRequest, CheckResponse};
use hyper::HeaderMap;
use keyward::clock;
use keyward::domain::decision::Decision;
use keyward::server::answer::Answer;
use keyward::server::check_view::CheckView;
use keyward::server::door::{Begun, Door};
use keyward::server::options::ClientIpSource;
use keyward::server::request::Inbound;
use prost::Message;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tracing::Span;

#[path = "../tests/it/support/door.rs"]
mod door;

/// Keyward's own, so that it makes no difference.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What gRPC puts before a message.
const FRAME: usize = 5;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match &*arguments.iter().map(String::as_str).collect::<Vec<_>>() {
        ["constant"] => constant(),
        ["step", step, times, check, store] => steps(step, times.parse().unwrap(), check, store),
        ["bcrypt", cost, times] => verify(cost.parse().unwrap(), times.parse().unwrap()),
        _ => println!(
            "yardstick: driven by make bench (constant | step STEP TIMES CHECK STORE | bcrypt COST TIMES)"
        ),
    }
}

fn constant() {
    struct Constant(CheckResponse);

    #[tonic::async_trait]
    impl Authorization for Constant {
        async fn check(&self, _: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
            Ok(Response::new(self.0.clone()))
        }
    }

    let mut answer = Vec::new();
    std::io::stdin().read_to_end(&mut answer).unwrap();
    let answer = CheckResponse::decode(&*answer).unwrap();
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(
        async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            println!("{}", listener.local_addr().unwrap());
            let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
            Server::builder()
                .add_service(AuthorizationServer::new(Constant(answer)))
                .serve_with_incoming(incoming)
                .await
                .unwrap();
        },
    );
}

fn steps(step: &str, times: u32, check: &str, store: &str) {
    let framed = std::fs::read(check).unwrap();
    let message = framed.get(FRAME..).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let door = runtime.block_on(hot_door(store, message));
    let metadata = HeaderMap::new();
    let view = CheckView::read(message).unwrap();
    let inbound = Inbound::read(&view, &metadata, &ClientIpSource::Peer).unwrap();
    let now = clock::now();
    let Begun::Decided(checked) = door.begin(Some(&inbound), now) else {
        panic!("memory does not know the key")
    };
    assert!(matches!(checked.decision, Decision::Allow(_)), "{checked:?}");
    let repeat = |work: &dyn Fn()| (0..times).for_each(|_| work());
    match step {
        "decode" => repeat(&|| {
            let view = CheckView::read(black_box(message)).unwrap();
            black_box(Inbound::read(&view, &metadata, &ClientIpSource::Peer));
        }),
        "decode-with-envoy-types" => repeat(&|| {
            black_box(CheckRequest::decode(black_box(message)).unwrap());
        }),
        "decide" => repeat(&|| {
            black_box(door.begin(Some(black_box(&inbound)), now));
        }),
        "encode" => repeat(&|| {
            let answer = door.finish(&checked, Some(black_box(&inbound)), now.instant, &Span::none());
            black_box(answer.map(Answer::into_grpc).unwrap_or_default());
        }),
        other => panic!("there is no step {other}"),
    }
}

/// A door that has decided about this check before.
async fn hot_door(store: &str, message: &[u8]) -> Door {
    let door = door::door(store).await;
    let view = CheckView::read(message).unwrap();
    let inbound = Inbound::read(&view, &HeaderMap::new(), &ClientIpSource::Peer).unwrap();
    if let Begun::Open(presented) = door.begin(Some(&inbound), clock::now()) {
        door.ask(&presented, &inbound, Duration::from_mins(1), &Span::none()).await;
    }
    door
}

fn verify(cost: u32, times: u32) {
    let secret = "kw_a-secret-part-of-usual-length-0123456789";
    let hash = bcrypt::hash(secret, cost).unwrap();
    for _ in 0..times {
        let began = clock::instant();
        assert!(bcrypt::verify(black_box(secret), &hash).unwrap());
        println!("{}", clock::instant().saturating_since(began).as_micros());
    }
}
