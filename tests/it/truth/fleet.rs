//! The fleet: three replicas on one Postgres and one Redis, each behind a proxy of its own, and the probes that ask
//! every one of them for every key without a pause.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use envoy_types::pb::envoy::service::auth::v3::CheckRequest;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::history::{Bounds, Micros, Outcome, Probe};
use super::proxy::Proxy;
use crate::support::eventually;
use crate::support::grpc::{Authorizer, Check, Encoding};
use crate::support::keyward::{Builder, Keyward};
use crate::support::postgres::Postgres;
use crate::support::redis::Redis;

pub(crate) const REPLICAS: usize = 3;
/// Keys that are probed at the same time.
pub(crate) const SLOTS: usize = 8;
/// From one probe of a key on a replica to the next one. Two cores answer about this many.
const PERIOD: Duration = Duration::from_millis(5);

pub(crate) const DATABASE: &str = "platform";

/// Where there is no feed, so that a run without one ends too.
const TTL: Duration = Duration::from_millis(500);
/// The settings of replicas 1 and 2: the shipped ones.
const LEASE: Duration = Duration::from_secs(2);
const GRACE: Duration = Duration::from_secs(30);
/// Those of replica 0, which is cut off until both have run out.
pub(crate) const SHORT_LEASE: Duration = Duration::from_secs(1);
pub(crate) const SHORT_GRACE: Duration = Duration::from_secs(3);
/// What a read may take where the lease has run out and the record has to be read again, by the contract.
const READ: Duration = Duration::from_secs(1);
/// New keys and restored rights, by the contract.
const ACTIVATION: Duration = Duration::from_secs(2);

/// How changes reach the replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freshness {
    Feed,
    Ttl,
}

/// What a fleet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Replica 0 has short settings, the others the shipped ones; each slot is probed every few milliseconds.
    Truth,
    /// All have the short settings and reach Redis through a proxy; latency is measured, so they are asked less often.
    Faults,
}

impl Purpose {
    fn is_short(self, replica: usize) -> bool {
        self == Self::Faults || replica == 0
    }

    fn period(self) -> Duration {
        match self {
            Self::Truth => PERIOD,
            Self::Faults => PERIOD * 8,
        }
    }
}

impl Freshness {
    /// What a replica promises with the settings that [`Fleet::start`] gives it.
    fn bounds(self, is_short: bool) -> Bounds {
        let (lease, grace) = if is_short { (SHORT_LEASE, SHORT_GRACE) } else { (LEASE, GRACE) };
        match self {
            Self::Feed => Bounds {
                healthy: micros(lease),
                feed_silent: micros(lease + READ),
                cut_off: micros(lease + grace),
                activation: micros(ACTIVATION),
            },
            Self::Ttl => Bounds {
                healthy: micros(TTL),
                feed_silent: micros(TTL),
                cut_off: micros(TTL),
                // By the memory of unknown prefixes.
                activation: micros(ACTIVATION.max(TTL)),
            },
        }
    }
}

/// The one clock of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn now(self) -> Micros {
        micros(self.0.elapsed())
    }
}

pub(crate) fn micros(duration: Duration) -> Micros {
    duration.as_micros().try_into().unwrap()
}

/// What a slot is probed with.
pub(crate) struct Target {
    pub(crate) key: usize,
    pub(crate) request: CheckRequest,
}

/// The last answer of a replica for a slot.
#[derive(Debug, Clone, Copy)]
struct Seen {
    key: usize,
    start: Micros,
    outcome: Outcome,
}

/// The keys that are probed, and what was last heard of them.
pub(crate) struct Slots {
    clock: Clock,
    targets: [Mutex<Arc<Target>>; SLOTS],
    seen: [[watch::Sender<Seen>; SLOTS]; REPLICAS],
}

impl Slots {
    fn new(clock: Clock) -> Self {
        let nothing = Seen { key: usize::MAX, start: 0, outcome: Outcome::Other };
        let nobody = Arc::new(Target { key: usize::MAX, request: request("") });
        Self {
            clock,
            targets: std::array::from_fn(|_| Mutex::new(Arc::clone(&nobody))),
            seen: std::array::from_fn(|_| std::array::from_fn(|_| watch::Sender::new(nothing))),
        }
    }

    pub(crate) fn target(&self, slot: usize) -> Arc<Target> {
        Arc::clone(&self.targets[slot].lock().unwrap())
    }

    /// From now on the slot is probed with this key.
    pub(crate) fn aim(&self, slot: usize, key: usize, secret: &str) {
        *self.targets[slot].lock().unwrap() = Arc::new(Target { key, request: request(secret) });
    }

    /// Waits until a probe of the slot's key that was sent after `since` is answered like this.
    pub(crate) async fn hear(
        &self,
        replica: usize,
        slot: usize,
        since: Micros,
        wanted: Outcome,
        limit: Duration,
    ) -> bool {
        let key = self.target(slot).key;
        let mut seen = self.seen[replica][slot].subscribe();
        let fits = |seen: &Seen| seen.key == key && seen.start >= since && seen.outcome == wanted;
        timeout(limit, seen.wait_for(fits)).await.is_ok()
    }

    /// Asks once for what a slot is aimed at.
    pub(crate) async fn probe(&self, authorizer: &Authorizer, replica: usize, target: &Target) -> Probe {
        let start = self.clock.now();
        let outcome = ask(authorizer, target.request.clone()).await;
        Probe { replica, key: target.key, start, end: self.clock.now(), outcome }
    }

    /// Probes one slot on one replica until it is told to stop.
    async fn probe_on(
        self: Arc<Self>,
        authorizer: Authorizer,
        replica: usize,
        slot: usize,
        period: Duration,
        stop: CancellationToken,
    ) -> Vec<Probe> {
        let mut probes = Vec::new();
        let mut tick = interval(period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !stop.is_cancelled() {
            tick.tick().await;
            let probe = self.probe(&authorizer, replica, &self.target(slot)).await;
            probes.push(probe);
            let seen = Seen { key: probe.key, start: probe.start, outcome: probe.outcome };
            self.seen[replica][slot].send_replace(seen);
        }
        probes
    }
}

/// What a caller with this key hears.
pub(crate) async fn ask(authorizer: &Authorizer, request: CheckRequest) -> Outcome {
    let Ok(answer) = authorizer.try_check(request).await else { return Outcome::Other };
    match answer.http_status() {
        _ if answer.allows() => Outcome::Allow,
        401 | 403 => Outcome::Refused,
        503 => Outcome::Unavailable,
        _ => Outcome::Other,
    }
}

pub(crate) fn request(secret: &str) -> CheckRequest {
    Check::new("GET", "/v1/models").bearer(secret).build(Encoding::Raw)
}

/// One sidecar.
pub(crate) struct Replica {
    pub(crate) keyward: Keyward,
    pub(crate) proxy: Proxy,
    /// All probes share its one connection.
    pub(crate) authorizer: Authorizer,
}

pub(crate) struct Fleet {
    pub(crate) replicas: Vec<Replica>,
    pub(crate) redis: Redis,
    /// Used where faults are what it is for.
    pub(crate) redis_proxy: Proxy,
    pub(crate) postgres: Postgres,
    pub(crate) freshness: Freshness,
    purpose: Purpose,
    pub(crate) clock: Clock,
    pub(crate) slots: Arc<Slots>,
    folder: TempDir,
    probing: JoinSet<Vec<Probe>>,
    stop: CancellationToken,
}

impl Fleet {
    /// All processes, ready, on tables without rows. Nothing is probed yet.
    pub(crate) async fn start(purpose: Purpose) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("secret"), "0123456789abcdef0123456789abcdef\n").unwrap();
        let redis = Redis::start().await;
        let redis_proxy = Proxy::start(redis.port()).await;
        let postgres = Postgres::start().await;
        postgres.create_database(DATABASE).await;
        let has_feed = {
            let migrating = Keyward::new().store(&postgres.url(DATABASE)).launch();
            migrating.cli_ok(&["migrate"]);
            String::from_utf8(migrating.cli_ok(&["serve", "--help"])).unwrap().contains("--lease")
        };
        let freshness = if has_feed { Freshness::Feed } else { Freshness::Ttl };
        let clock = Clock(Instant::now());
        let slots = Arc::new(Slots::new(clock));
        let mut fleet = Self {
            replicas: Vec::new(),
            redis,
            redis_proxy,
            postgres,
            freshness,
            purpose,
            clock,
            slots,
            folder,
            probing: JoinSet::new(),
            stop: CancellationToken::new(),
        };
        for replica in 0..REPLICAS {
            let proxy = Proxy::start(fleet.postgres.port()).await;
            let keyward = fleet.builder(replica, &proxy).start().await;
            if has_feed {
                let said = eventually(async || {
                    let said = keyward.admin("/readyz").await.text();
                    said.starts_with("ready: change feed").then_some(())
                });
                let log = keyward.log();
                assert!(said.await.is_some(), "there is a change feed and it is not used:\n{log}");
            }
            let authorizer = Authorizer::connect(keyward.grpc_addr()).await;
            fleet.replicas.push(Replica { keyward, proxy, authorizer });
        }
        fleet
    }

    fn builder(&self, replica: usize, proxy: &Proxy) -> Builder {
        let store = format!("postgres://postgres@127.0.0.1:{}/{DATABASE}", proxy.port());
        let redis = match self.purpose {
            Purpose::Truth => self.redis.url(),
            Purpose::Faults => format!("redis://127.0.0.1:{}", self.redis_proxy.port()),
        };
        let builder = Keyward::new().store(&store).redis(&redis, &self.folder.path().join("secret"));
        settings(builder, self.purpose.is_short(replica), self.freshness)
    }

    /// Kills a sidecar (SIGKILL) and starts another one in its place.
    pub(crate) async fn replace(&mut self, replica: usize) {
        let Replica { keyward, proxy, .. } = &self.replicas[replica];
        let builder = self.builder(replica, proxy).at(keyward.grpc_addr(), keyward.admin_addr());
        keyward.kill();
        self.replicas[replica].keyward = builder.start().await;
    }

    /// A session that goes through no proxy.
    pub(crate) async fn session(&self) -> tokio_postgres::Client {
        self.postgres.client(DATABASE).await
    }

    pub(crate) fn bounds(&self) -> Vec<Bounds> {
        (0..REPLICAS).map(|replica| self.freshness.bounds(self.purpose.is_short(replica))).collect()
    }

    /// Starts to probe; every slot has to be aimed by now.
    pub(crate) fn start_probing(&mut self) {
        for (index, replica) in self.replicas.iter().enumerate() {
            for slot in 0..SLOTS {
                let slots = Arc::clone(&self.slots);
                let (authorizer, stop) = (replica.authorizer.clone(), self.stop.clone());
                let probing = slots.probe_on(authorizer, index, slot, self.purpose.period(), stop);
                self.probing.spawn(probing);
            }
        }
    }

    /// Ends all probing and hands out what was heard.
    pub(crate) async fn stop_probing(&mut self) -> Vec<Probe> {
        self.stop.cancel();
        let mut probes = Vec::new();
        while let Some(heard) = self.probing.join_next().await {
            probes.extend(heard.unwrap());
        }
        probes
    }
}

fn settings(builder: Builder, is_short: bool, freshness: Freshness) -> Builder {
    // Only sha256 is proven here, so that a check that takes a second is one that can't be decided.
    let builder = builder.arg("--check-timeout", "1s");
    if freshness == Freshness::Ttl {
        return builder.arg("--record-ttl-without-feed", &format!("{}ms", TTL.as_millis()));
    }
    if !is_short {
        return builder;
    }
    let seconds = |duration: Duration| format!("{}s", duration.as_secs());
    builder.arg("--lease", &seconds(SHORT_LEASE)).arg("--outage-grace", &seconds(SHORT_GRACE))
}
