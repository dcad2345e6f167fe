//! Where the faults happen: the fleet of the truth runs, a real Envoy before it, load, and an administrator.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::load::{self, Load};
use crate::support::envoy::{self, Envoy};
use crate::support::process::Process;
use crate::support::upstream::Upstream;
use crate::truth::admin::{Admin, Form};
use crate::truth::fleet::{Fleet, Purpose, REPLICAS, SLOTS};
use crate::truth::history::{History, Interval, Micros, Outcome, Probe, State};

/// How long each fault lasts: past lease and grace, so that their ends are seen.
const LASTS: Duration = Duration::from_secs(6);
/// Before and after it.
const BEFORE: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(6);
/// From one change of rights to the next.
const CHANGE: Duration = Duration::from_millis(350);
/// How long anything may take to be heard at the start.
const LIMIT: Duration = Duration::from_secs(20);
/// Slots that are never taken a right, so that what is heard of them is about the fault alone.
pub(crate) const STEADY_SLOTS: usize = 4;

/// What a fault keeps while it lasts, beyond what it has changed.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) tasks: JoinSet<()>,
    pub(crate) processes: Vec<Process>,
    pub(crate) sessions: Vec<tokio_postgres::Client>,
    pub(crate) connections: Vec<TcpStream>,
    pub(crate) listeners: Vec<rustix::process::Pid>,
    pub(crate) redis: Option<redis::aio::MultiplexedConnection>,
}

/// When a fault was there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) before: Micros,
    pub(crate) broken: Micros,
    pub(crate) healed: Micros,
    pub(crate) after: Micros,
}

pub(crate) struct Site {
    pub(crate) fleet: Fleet,
    pub(crate) held: Held,
    pub(crate) load: Load,
    pub(crate) envoy: Envoy,
    pub(crate) upstream: Upstream,
    admin: Admin,
    faults: Vec<Interval>,
    /// The next slot of those that lose their right.
    next: usize,
}

impl Site {
    pub(crate) async fn start() -> Self {
        let mut fleet = Fleet::start(Purpose::Faults).await;
        let admin = Admin::start(fleet.session().await, fleet.clock, fleet.slots.clone()).await;
        let began = fleet.clock.now();
        fleet.session().await.batch_execute(&load::rows()).await.unwrap();
        let created = (began, fleet.clock.now());
        let upstream = Upstream::start().await;
        let envoy = before(&fleet, &upstream).start().await;
        fleet.start_probing();
        for slot in 0..SLOTS {
            for replica in 0..REPLICAS {
                let heard = fleet.slots.hear(replica, slot, 0, Outcome::Allow, LIMIT).await;
                assert!(heard, "slot {slot} is never allowed by replica {replica}");
            }
        }
        let authorizers: Vec<_> = fleet.replicas.iter().map(|replica| replica.authorizer.clone()).collect();
        let load = Load::start(fleet.clock, &authorizers, envoy.addr(), created);
        let held = Held::default();
        Self { fleet, held, load, envoy, upstream, admin, faults: Vec::new(), next: STEADY_SLOTS }
    }

    /// Another Envoy takes the place of the one that is there.
    pub(crate) async fn replace_envoy(&mut self) {
        let envoy = before(&self.fleet, &self.upstream).start().await;
        self.load.call_at(envoy.addr());
        self.envoy = envoy;
    }

    /// After Postgres was gone.
    pub(crate) async fn admin_again(&mut self) {
        let session = self.fleet.session().await;
        self.admin.go_on_in(session);
    }

    /// One fault from before to after, and when it was.
    pub(crate) async fn go_through(&mut self, faults: &[super::catalogue::Fault]) -> Times {
        let now = |site: &Self| site.fleet.clock.now();
        let before = now(self);
        sleep(BEFORE).await;
        let broken = now(self);
        for fault in faults {
            self.cause(*fault).await;
        }
        if faults.iter().all(|fault| fault.case().takes_changes) {
            self.change_rights().await;
        } else {
            sleep(LASTS).await;
        }
        for fault in faults.iter().rev() {
            self.end(*fault).await;
        }
        let healed = now(self);
        let state = faults.iter().map(|fault| fault.case().state).max().unwrap_or(State::Healthy);
        if state > State::Healthy {
            let of = |replica| Interval { replica, state, start: broken, end: healed };
            self.faults.extend((0..REPLICAS).map(of));
        }
        sleep(AFTER).await;
        Times { before, broken, healed, after: now(self) }
    }

    /// Takes a right and leaves it taken past every bound, and takes and gives others meanwhile.
    async fn change_rights(&mut self) {
        let end = tokio::time::Instant::now() + LASTS;
        let lasting = self.next_slot();
        self.admin.revoke(lasting, Form::Deactivate).await;
        while tokio::time::Instant::now() + CHANGE * 2 < end {
            let slot = self.next_slot();
            if slot == lasting {
                continue;
            }
            for form in [Form::LockUser, Form::Expire] {
                self.admin.revoke(slot, form).await;
                sleep(CHANGE).await;
                self.admin.give_back(slot, form).await;
                sleep(CHANGE).await;
            }
        }
        tokio::time::sleep_until(end).await;
        self.admin.give_back(lasting, Form::Deactivate).await;
    }

    fn next_slot(&mut self) -> usize {
        let slot = self.next;
        self.next = if slot + 1 < SLOTS { slot + 1 } else { STEADY_SLOTS };
        slot
    }

    /// The keys that are valid all the time.
    pub(crate) fn steady_keys(&self) -> Vec<usize> {
        (0..STEADY_SLOTS).map(|slot| self.fleet.slots.target(slot).key).collect()
    }

    /// Everything that was heard of keys, for the judge.
    pub(crate) async fn history(&mut self) -> History {
        let mut probes: Vec<Probe> = self.fleet.stop_probing().await;
        probes.extend(self.load.cold());
        let mut operations = self.admin.operations.clone();
        operations.extend(self.load.creations());
        History { probes, operations, faults: self.faults.clone(), bounds: self.fleet.bounds() }
    }
}

/// An Envoy before all replicas, as shipped, but that it looks after them more often.
fn before(fleet: &Fleet, upstream: &Upstream) -> envoy::Builder {
    let others: String = fleet.replicas[1..]
        .iter()
        .map(|replica| {
            let port = replica.keyward.grpc_addr().port();
            format!(
                "\n              - endpoint:\n                  address:\n                    \
                 socket_address: {{address: 127.0.0.1, port_value: {port}}}"
            )
        })
        .collect();
    Envoy::new(fleet.replicas[0].keyward.grpc_addr(), upstream.addr())
        .replace("# @keyward", &format!("# @keyward{others}"))
        .replace("          interval: 1s\n", "          interval: 0.1s\n")
}
