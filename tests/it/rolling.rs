//! Two replicas behind one Envoy, restarted one after the other under load. `make roll` prints what happened.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinSet;

use crate::support::envoy::Envoy;
use crate::support::eventually;
use crate::support::http::Request;
use crate::support::keyward::{Builder, Keyward};
use crate::support::postgres::Postgres;
use crate::support::upstream::Upstream;

/// Callers at once.
const CALLERS: usize = 8;

/// How often each replica is restarted.
fn rounds() -> usize {
    std::env::var("KEYWARD_ROLL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// Answers so far, by status and reason.
#[derive(Clone, Default)]
struct Answers(Arc<Mutex<BTreeMap<String, usize>>>);

impl Answers {
    fn add(&self, what: String) {
        *self.0.lock().unwrap().entry(what).or_default() += 1;
    }

    fn count(&self) -> usize {
        self.0.lock().unwrap().values().sum()
    }

    fn failed(&self) -> BTreeMap<String, usize> {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|(what, _)| *what != "200")
            .map(|(w, n)| (w.clone(), *n))
            .collect()
    }
}

/// Asks without a pause, each caller on a connection after the other.
fn load(envoy: &Envoy, secret: &str, stop: &Arc<AtomicBool>, answers: &Answers) -> JoinSet<()> {
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (address, secret) = (envoy.addr(), secret.to_owned());
        let (stop, answers) = (Arc::clone(stop), answers.clone());
        callers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let sent = Request::get("/v1/models").bearer(&secret).try_send(address).await;
                answers.add(match sent {
                    Ok(response) if response.status == 200 => "200".to_owned(),
                    Ok(response) => format!("{} {}", response.status, response.reason()),
                    Err(error) => format!("no answer: {error}"),
                });
            }
        });
    }
    callers
}

async fn becomes_healthy(envoy: &Envoy, hosts: u64) {
    let healthy =
        eventually(async || (envoy.stat("cluster.keyward.membership_healthy").await == hosts).then_some(()));
    assert!(healthy.await.is_some(), "Envoy never sees {hosts} healthy replicas");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_loses_no_request() {
    let postgres = Postgres::start().await;
    let url = postgres.create_platform().await;
    // As shipped, but for how long one is drained and how often Envoy looks, so that the test is short.
    let replica = || Keyward::new().store(&url).arg("--drain-delay", "1s");
    let mut replicas = vec![replica().start().await, replica().start().await];
    replicas[0].create_user("ada", &[]);
    let key = replicas[0].create_key("ada", "ci", &["--hash", "sha256"]);
    let upstream = Upstream::start().await;
    let second = format!(
        "# @keyward\n              - endpoint:\n                  address:\n                    \
         socket_address: {{address: 127.0.0.1, port_value: {}}}",
        replicas[1].grpc_addr().port()
    );
    let envoy = Envoy::new(replicas[0].grpc_addr(), upstream.addr())
        .replace("# @keyward", &second)
        .replace("          interval: 1s\n", "          interval: 0.1s\n")
        .start()
        .await;
    becomes_healthy(&envoy, 2).await;

    let (stop, answers) = (Arc::new(AtomicBool::new(false)), Answers::default());
    let mut callers = load(&envoy, &key.secret, &stop, &answers);
    let mut told = Vec::new();
    for round in 0..rounds() {
        for which in 0..replicas.len() {
            let before = answers.count();
            let (grpc, admin) = (replicas[which].grpc_addr(), replicas[which].admin_addr());
            let old = replicas.remove(which);
            let status = old.sigterm_and_wait().await;
            assert!(status.success(), "{status}");
            let new: Builder = replica().at(grpc, admin);
            replicas.insert(which, new.start().await);
            becomes_healthy(&envoy, 2).await;
            let asked = answers.count() - before;
            assert!(asked > 5, "there was no load to speak of: {asked}");
            told.push(format!("round {}, replica {}: {asked} requests meanwhile", round + 1, which + 1));
        }
    }
    stop.store(true, Ordering::Relaxed);
    while callers.join_next().await.is_some() {}
    for line in &told {
        println!("{line}");
    }
    println!("{} requests, failed: {:?}", answers.count(), answers.failed());
    assert!(answers.failed().is_empty(), "{:?} of {}", answers.failed(), answers.count());
    let retries = envoy.stat("cluster.keyward.upstream_rq_retry").await;
    println!("checks that Envoy asked again: {retries}");
}
