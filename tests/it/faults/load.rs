//! The load beside the fleet's own probes: callers through Envoy, keys that nobody has asked for before, and junk.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::support::grpc::Authorizer;
use crate::support::http::Request;
use crate::truth::fleet::{Clock, REPLICAS, ask, request};
use crate::truth::history::{Effect, Micros, Operation, Outcome, Probe};

/// Cold keys that are there: more than any run asks for.
const COLD_KEYS: usize = 40_000;
/// Numbers of cold keys begin where the fleet has none.
const COLD: usize = 1_000_000;
const CALLERS: usize = 4;
const CALLER_PERIOD: Duration = Duration::from_millis(40);
const COLD_PERIOD: Duration = Duration::from_millis(50);
const JUNK_PERIOD: Duration = Duration::from_millis(50);
/// Valid all the time, for the callers.
const STEADY: &str = "s0000000_a-secret-that-stays";

/// Rows for everything that is asked here.
pub(crate) fn rows() -> String {
    format!(
        "INSERT INTO users (id, username, hashed_password) VALUES (2, 'load', '-');
         INSERT INTO api_keys (name, key_hash, key_prefix, user_id)
         SELECT 'load', 'sha256:' || encode(sha256(secret::bytea), 'hex'), left(secret, 8), 2
         FROM (SELECT 'c' || lpad(n::text, 7, '0') || '_a-cold-secret' AS secret FROM generate_series(0, {COLD_KEYS} - 1) n
               UNION ALL SELECT '{STEADY}') AS secrets;"
    )
}

fn cold(number: usize) -> String {
    format!("c{number:07}_a-cold-secret")
}

/// What a caller of Envoy heard.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) start: Micros,
    pub(crate) end: Micros,
    /// `None` where there was no answer at all.
    pub(crate) status: Option<u16>,
}

/// What was heard so far.
#[derive(Default)]
struct Heard {
    calls: Mutex<Vec<Call>>,
    cold: Mutex<Vec<Probe>>,
    junk_allowed: AtomicUsize,
    junk: AtomicUsize,
}

/// The load, for as long as it lives.
pub(crate) struct Load {
    heard: Arc<Heard>,
    envoy: Arc<Mutex<SocketAddr>>,
    created: Operation,
    _tasks: JoinSet<()>,
}

impl Load {
    /// Begins; the rows are there since `created`.
    pub(crate) fn start(
        clock: Clock,
        replicas: &[Authorizer],
        envoy: SocketAddr,
        created: (Micros, Micros),
    ) -> Self {
        let heard = Arc::<Heard>::default();
        let envoy = Arc::new(Mutex::new(envoy));
        let mut tasks = JoinSet::new();
        for _ in 0..CALLERS {
            tasks.spawn(call(clock, Arc::clone(&envoy), Arc::clone(&heard)));
        }
        for (replica, authorizer) in replicas.iter().enumerate() {
            tasks.spawn(ask_cold(clock, replica, authorizer.clone(), Arc::clone(&heard)));
            tasks.spawn(ask_junk(replica, authorizer.clone(), Arc::clone(&heard)));
        }
        let created = Operation { key: COLD, start: created.0, end: created.1, effect: Effect::Create };
        Self { heard, envoy, created, _tasks: tasks }
    }

    /// From now on callers use another Envoy.
    pub(crate) fn call_at(&self, envoy: SocketAddr) {
        *self.envoy.lock().unwrap() = envoy;
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.heard.calls.lock().unwrap().clone()
    }

    pub(crate) fn cold(&self) -> Vec<Probe> {
        self.heard.cold.lock().unwrap().clone()
    }

    /// When each of the cold keys was created, for the judge.
    pub(crate) fn creations(&self) -> Vec<Operation> {
        self.cold().iter().map(|probe| Operation { key: probe.key, ..self.created }).collect()
    }

    /// Keys that do not exist: asked for, and allowed.
    pub(crate) fn junk(&self) -> (usize, usize) {
        (self.heard.junk.load(Ordering::Relaxed), self.heard.junk_allowed.load(Ordering::Relaxed))
    }
}

async fn call(clock: Clock, envoy: Arc<Mutex<SocketAddr>>, heard: Arc<Heard>) {
    let mut tick = interval(CALLER_PERIOD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let address = *envoy.lock().unwrap();
        let start = clock.now();
        let sent = Request::get("/v1/models").bearer(STEADY).try_send(address).await;
        let call = Call { start, end: clock.now(), status: sent.ok().map(|response| response.status) };
        heard.calls.lock().unwrap().push(call);
    }
}

async fn ask_cold(clock: Clock, replica: usize, authorizer: Authorizer, heard: Arc<Heard>) {
    let mut tick = interval(COLD_PERIOD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in (replica..COLD_KEYS).step_by(REPLICAS) {
        tick.tick().await;
        let start = clock.now();
        let outcome = ask(&authorizer, request(&cold(number))).await;
        let probe = Probe { replica, key: COLD + number, start, end: clock.now(), outcome };
        heard.cold.lock().unwrap().push(probe);
    }
}

/// Half have a prefix that nobody has, half that of another key.
async fn ask_junk(replica: usize, authorizer: Authorizer, heard: Arc<Heard>) {
    let mut tick = interval(JUNK_PERIOD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in (replica..).step_by(REPLICAS) {
        tick.tick().await;
        let secret = if number % 2 == 0 {
            format!("j{number:07}_nobody-has-this")
        } else {
            format!("{}-no", cold(number % COLD_KEYS))
        };
        let is_allowed = ask(&authorizer, request(&secret)).await == Outcome::Allow;
        heard.junk.fetch_add(1, Ordering::Relaxed);
        heard.junk_allowed.fetch_add(usize::from(is_allowed), Ordering::Relaxed);
    }
}
