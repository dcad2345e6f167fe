//! What a hot check costs, as a ratio: the CPU time of the whole Keyward process per check, against a tonic server that
//! decodes the same request with envoy-types and answers with a constant allow of the very same size.
//!
//! `cargo bench --bench hot_check` (or `make bench`). Both servers run one worker thread each and the same allocator, in
//! processes of their own; they are asked in turn by the same client, several pairs, and the median of the pair ratios is
//! printed. The constant server is also held against itself: that ratio says how much of the other one is noise.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::cast_precision_loss,
    clippy::print_stdout,
    reason = "a measurement: a panic is how it fails, and its output is its result"
)]

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::address::Address;
use envoy_types::pb::envoy::config::core::v3::{Address as CoreAddress, SocketAddress};
use envoy_types::pb::envoy::service::auth::v3::attribute_context::{
    HttpRequest, Peer, Request as RequestAttributes,
};
use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use envoy_types::pb::envoy::service::auth::v3::authorization_server::{Authorization, AuthorizationServer};
use envoy_types::pb::envoy::service::auth::v3::{AttributeContext, CheckRequest, CheckResponse};
use prost::Message;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PAIRS: usize = 9;
const CHECKS: usize = 40_000;
const CONNECTIONS: usize = 4;
const STREAMS: usize = 25;
/// Set in the process that is the constant server.
const CONSTANT: &str = "KEYWARD_BENCH_CONSTANT";

fn main() {
    if std::env::var_os(CONSTANT).is_some() {
        constant_server();
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
            .block_on(compare());
    }
}

async fn compare() {
    let folder = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", folder.path().join("bench.db").display());
    let keyward = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keyward"));
        command.args(arguments).args(["--store", &store]);
        command
    };
    run(&mut keyward(&["migrate"]));
    run(&mut keyward(&["user", "create", "--username", "bench", "--email", "bench@example.com"]));
    let created = run(&mut keyward(&[
        "key",
        "create",
        "--user",
        "bench",
        "--name",
        "bench",
        "--allowed-models",
        "gpt-4o*,claude-*",
        "--rate-limit-per-minute",
        "60",
        "--output",
        "json",
    ]));
    let created: serde_json::Value = serde_json::from_slice(&created).unwrap();
    let check = check_request(created["key"].as_str().unwrap());

    let (grpc, admin) = (free_address(), free_address());
    let serve = keyward(&[
        "serve",
        "--worker-threads",
        "1",
        "--log-level",
        "warn",
        "--record-ttl-without-feed",
        "300s",
    ])
    .args(["--grpc-listen", &grpc.to_string(), "--admin-listen", &admin.to_string()])
    .spawn()
    .unwrap();
    let keyward = Subject::connect("keyward", Running(serve), grpc).await;
    let answer = keyward.first_answer(&check).await;
    assert_eq!(answer.status.as_ref().unwrap().code, 0, "the check is not allowed: {answer:?}");

    let constant = start_constant(&answer).await;
    let again = start_constant(&answer).await;
    for subject in [&keyward, &constant, &again] {
        subject.cpu_for(&check, CHECKS / 4).await;
    }
    let (mut ratios, mut noise) = (Vec::new(), Vec::new());
    for pair in 1..=PAIRS {
        let base = constant.cpu_for(&check, CHECKS).await;
        let ours = keyward.cpu_for(&check, CHECKS).await;
        let twin = again.cpu_for(&check, CHECKS).await;
        ratios.push(ours / base);
        noise.push(twin / base);
        println!(
            "pair {pair}: constant {:.1} µs, keyward {:.1} µs ({:.2}x), constant again {:.1} µs ({:.2}x)",
            base * 1e6,
            ours * 1e6,
            ours / base,
            twin * 1e6,
            twin / base
        );
    }
    println!(
        "CPU per check, {CONNECTIONS} connections with {STREAMS} streams each, {CHECKS} checks a run, {PAIRS} pairs"
    );
    println!("keyward / constant server: median {:.2}", median(&mut ratios));
    println!("constant server / itself:  median {:.2}", median(&mut noise));
}

/// A server process under measurement, killed when dropped.
struct Subject {
    name: &'static str,
    process: Running,
    channels: Vec<Channel>,
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Subject {
    async fn connect(name: &'static str, process: Running, address: SocketAddr) -> Self {
        let endpoint = Channel::from_shared(format!("http://{address}")).unwrap();
        let mut channels = Vec::new();
        while channels.len() < CONNECTIONS {
            match endpoint.connect().await {
                Ok(channel) => channels.push(channel),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        Self { name, process, channels }
    }

    /// Asks until the answer is not "try again": the first check may find bcrypt slower than the deadline.
    async fn first_answer(&self, check: &CheckRequest) -> CheckResponse {
        let mut client = AuthorizationClient::new(self.channels[0].clone());
        for _ in 0..100 {
            let answer = client.check(check.clone()).await.unwrap().into_inner();
            if answer.status.as_ref().unwrap().code != 14 {
                return answer;
            }
        }
        panic!("{} stays unavailable", self.name);
    }

    /// Seconds of CPU (user and system) that the process took for each of so many checks.
    async fn cpu_for(&self, check: &CheckRequest, checks: usize) -> f64 {
        let before = self.cpu();
        let mut streams = tokio::task::JoinSet::new();
        for stream in 0..CONNECTIONS * STREAMS {
            let mut client = AuthorizationClient::new(self.channels[stream % CONNECTIONS].clone());
            let check = check.clone();
            streams.spawn(async move {
                for _ in 0..checks / (CONNECTIONS * STREAMS) {
                    let answer = client.check(check.clone()).await.unwrap().into_inner();
                    assert_eq!(answer.status.unwrap().code, 0);
                }
            });
        }
        while let Some(stream) = streams.join_next().await {
            stream.unwrap();
        }
        (self.cpu() - before) / checks as f64
    }

    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.0.id())).unwrap();
        // The command's name may hold blanks; fields 14 and 15 count from behind it.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks = |field: usize| fields[field].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / rustix::param::clock_ticks_per_second() as f64
    }
}

async fn start_constant(answer: &CheckResponse) -> Subject {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .env(CONSTANT, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&answer.encode_to_vec()).unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    Subject::connect("constant", Running(child), line.trim().parse().unwrap()).await
}

/// Reads its answer from standard input and prints its address.
fn constant_server() {
    struct Constant(CheckResponse);

    #[tonic::async_trait]
    impl Authorization for Constant {
        async fn check(&self, _: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
            Ok(Response::new(self.0.clone()))
        }
    }

    let mut answer = Vec::new();
    std::io::Read::read_to_end(&mut std::io::stdin(), &mut answer).unwrap();
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

/// About what Envoy sends for a chat completion: a kilobyte, with a small body, whose model is held against a list.
fn check_request(key: &str) -> CheckRequest {
    let authorization = format!("Bearer {key}");
    let prompt = "Why is the sky blue? Answer in one sentence. ".repeat(7);
    let body = format!(r#"{{"messages":[{{"role":"user","content":"{prompt}"}}],"model":"gpt-4o-mini"}}"#);
    let length = body.len().to_string();
    let headers = [
        (":authority", "llm.example.com"),
        (":method", "POST"),
        (":path", "/v1/chat/completions"),
        (":scheme", "https"),
        ("authorization", &authorization),
        ("accept", "application/json"),
        ("content-type", "application/json"),
        ("content-length", &length),
        ("x-envoy-auth-partial-body", "false"),
        ("user-agent", "OpenAI/Python 2.8.1"),
        ("x-forwarded-proto", "https"),
        ("x-request-id", "6f1f2f6e-5d2a-4e0b-9d1c-2b1a0c9d8e7f"),
        ("x-stainless-lang", "python"),
    ];
    let http = HttpRequest {
        id: "5577006791947779410".into(),
        method: "POST".into(),
        path: "/v1/chat/completions".into(),
        host: "llm.example.com".into(),
        scheme: "https".into(),
        protocol: "HTTP/1.1".into(),
        headers: headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        raw_body: body.into_bytes(),
        ..HttpRequest::default()
    };
    let peer = |address: &str| {
        let address =
            Address::SocketAddress(SocketAddress { address: address.into(), ..SocketAddress::default() });
        Some(Peer { address: Some(CoreAddress { address: Some(address) }), ..Peer::default() })
    };
    let attributes = AttributeContext {
        source: peer("10.1.2.3"),
        destination: peer("10.1.2.4"),
        request: Some(RequestAttributes { time: None, http: Some(http) }),
        ..AttributeContext::default()
    };
    CheckRequest { attributes: Some(attributes) }
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
