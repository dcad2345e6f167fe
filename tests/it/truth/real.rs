//! The run: revocations in every form, on real processes, while everything that can break is broken.
//!
//! `KEYWARD_TRUTH_ROUNDS=20 cargo nextest run --no-capture -E 'test(truth::real)'` runs it for longer; the table says
//! what was measured.

use std::cell::Cell;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::admin::{Admin, Form, Return};
use super::fleet::{Fleet, Freshness, Purpose, REPLICAS, SHORT_GRACE, SLOTS, ask, micros, request};
use super::history::{History, Interval, Micros, Outcome, Probe, RECOVERY, State};
use super::proxy::Mode;
use super::report::{Phase, Report};
use crate::support::eventually;

/// Waits that may end with the limit: back and forth within a phase leaves some.
const MOST_UNHEARD: usize = 6;

/// The replica that is cut off, the one with the short settings.
const ALONE: usize = 0;
/// The one whose listener is frozen.
const FROZEN: usize = 1;
/// The one whose feed falls silent.
const SILENCED: usize = 2;
/// The one that is stopped.
const SLEEPER: usize = 2;
const EVERYBODY: [usize; REPLICAS] = [0, 1, 2];
/// Revoked keys at a time; the others are watched for being refused wrongly.
const BATCH: usize = 5;
/// A refusal is watched for this long before the right is given back.
const LINGER: Micros = 50_000;
/// Longer than any bound but the longest: past it there is something wrong, which the judge will name.
const LIMIT: Duration = Duration::from_secs(6);
/// How often the feed's session is killed while it is.
const KILL_INTERVAL: Duration = Duration::from_millis(300);
/// Checks that are waiting in the socket of a sidecar that wakes up.
const WAITING: usize = 20;

/// Where a revocation takes less, the replica was not deaf.
const FELT: Micros = 400_000;

struct Away {
    slot: usize,
    form: Form,
    since: Micros,
}

/// What happened around a replica that was cut off.
struct CutOff {
    cut: Micros,
    healed: Micros,
    /// Keys that were valid and known all the time.
    untouched: Vec<usize>,
    /// Answers for keys that nobody knows.
    unknown: Vec<Outcome>,
}

struct Run {
    fleet: Fleet,
    admin: Admin,
    phases: Vec<Phase>,
    faults: Vec<Interval>,
    /// When a replica could not answer as fast as it was asked.
    mute: Vec<Interval>,
    away: Vec<Away>,
    next_slot: usize,
    /// Probes beyond those of the fleet.
    probes: Vec<Probe>,
    cuts: Vec<CutOff>,
    kills: i64,
    /// First answers of sidecars that woke up.
    woken: usize,
    /// Waits that ended with the limit.
    unheard: Cell<usize>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_replica_allows_a_revoked_key_past_the_bound_whatever_happens_to_its_feed() {
    let rounds = std::env::var("KEYWARD_TRUTH_ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    let mut run = Run::start().await;
    for round in 0..rounds {
        run.healthy().await;
        run.redis_killed().await;
        run.sidecar_stopped().await;
        if run.fleet.freshness == Freshness::Feed {
            run.listener_killed().await;
            run.listener_frozen().await;
            run.feed_silenced().await;
        }
        run.cut_off(if round % 2 == 0 { Mode::Refuse } else { Mode::Blackhole }).await;
    }
    run.truncated().await;
    let freshness = run.fleet.freshness;
    let history = run.end().await;
    let report = Report::of(&history, &run.phases, &run.mute);
    let elapsed = Duration::from_micros(run.fleet.clock.now());
    println!("{freshness:?}, {rounds} round(s), {REPLICAS} replicas, {SLOTS} keys at a time, {elapsed:.1?}");
    let (woken, kills) = (run.woken, run.kills);
    println!(
        "{report}{woken} first answers of woken sidecars, none an allow; {kills} sessions of the feed killed"
    );
    report.assert_flawless();
    run.assert_it_happened(&report, rounds);
    run.assert_cut_offs(&history);
}

impl Run {
    async fn start() -> Self {
        let mut fleet = Fleet::start(Purpose::Truth).await;
        let admin = Admin::start(fleet.session().await, fleet.clock, fleet.slots.clone()).await;
        fleet.start_probing();
        let mut run = Self {
            fleet,
            admin,
            phases: Vec::new(),
            faults: Vec::new(),
            mute: Vec::new(),
            away: Vec::new(),
            next_slot: 0,
            probes: Vec::new(),
            cuts: Vec::new(),
            kills: 0,
            woken: 0,
            unheard: Cell::new(0),
        };
        run.begin("starting");
        for slot in 0..SLOTS {
            assert!(run.hear(&EVERYBODY, slot, 0, Outcome::Allow).await, "slot {slot} is never allowed");
        }
        run
    }

    async fn end(&mut self) -> History {
        let mut probes = self.fleet.stop_probing().await;
        probes.append(&mut self.probes);
        let (operations, faults) = (self.admin.operations.clone(), self.faults.clone());
        History { probes, operations, faults, bounds: self.fleet.bounds() }
    }

    fn begin(&mut self, name: &'static str) {
        let now = self.now();
        if let Some(last) = self.phases.last_mut() {
            last.end = now;
        }
        self.phases.push(Phase { name, start: now, end: Micros::MAX });
    }

    fn now(&self) -> Micros {
        self.fleet.clock.now()
    }

    async fn sleep_until(&self, at: Micros) {
        sleep(Duration::from_micros(at.saturating_sub(self.now()))).await;
    }

    async fn hear(&self, replicas: &[usize], slot: usize, since: Micros, wanted: Outcome) -> bool {
        let mut all = true;
        for replica in replicas {
            all &= self.fleet.slots.hear(*replica, slot, since, wanted, LIMIT).await;
        }
        // Each costs the limit; a product that does not do what it says is told soon.
        let unheard = self.unheard.get() + usize::from(!all);
        self.unheard.set(unheard);
        assert!(unheard <= MOST_UNHEARD, "{unheard} changes were not seen by every replica within {LIMIT:?}");
        all
    }

    /// Takes one right after the other away, each when these replicas know of the one before.
    async fn revoke(&mut self, forms: &[Form], quick: &[usize]) {
        for form in forms {
            let slot = self.next_slot;
            self.next_slot = (slot + 1) % SLOTS;
            assert!(self.away.iter().all(|away| away.slot != slot), "more revocations than slots");
            let since = self.admin.revoke(slot, *form).await;
            self.hear(quick, slot, since, Outcome::Refused).await;
            self.away.push(Away { slot, form: *form, since });
        }
    }

    /// Waits until these replicas refuse everything that is revoked.
    async fn all_refused(&self, replicas: &[usize]) {
        for away in &self.away {
            self.hear(replicas, away.slot, away.since, Outcome::Refused).await;
        }
    }

    /// Gives all rights back and waits until everybody knows.
    async fn settle(&mut self) {
        let lingered = self.now() + LINGER;
        for away in &self.away {
            self.hear(&EVERYBODY, away.slot, lingered, Outcome::Refused).await;
        }
        let returning = std::mem::take(&mut self.away);
        let since = self.now();
        for away in &returning {
            if let Return::Replaced = self.admin.give_back(away.slot, away.form).await {
                // So that everybody remembers that there is no such key.
                self.hear(&EVERYBODY, away.slot, since, Outcome::Refused).await;
                self.admin.create(away.slot).await;
            }
        }
        for away in &returning {
            self.hear(&EVERYBODY, away.slot, since, Outcome::Allow).await;
        }
    }

    async fn healthy(&mut self) {
        self.begin("healthy");
        for forms in Form::ALL.chunks(BATCH) {
            self.revoke(forms, &EVERYBODY).await;
            self.settle().await;
        }
    }

    async fn redis_killed(&mut self) {
        self.begin("redis killed");
        self.fleet.redis.kill();
        self.revoke(&[Form::Deactivate, Form::Delete], &EVERYBODY).await;
        self.settle().await;
        self.fleet.redis.restart().await;
        self.revoke(&[Form::LockUser, Form::Expire], &EVERYBODY).await;
        self.settle().await;
    }

    /// What a sidecar says first when it wakes up must be right already, although it has slept through a revocation.
    async fn sidecar_stopped(&mut self) {
        self.begin("sidecar stopped");
        let stopped = self.now();
        self.fleet.replicas[SLEEPER].keyward.freeze();
        self.revoke(&[Form::Deactivate, Form::DeactivateUser], &[0, 1]).await;
        let bound = self.fleet.bounds()[SLEEPER].revocation(State::Healthy);
        let last = self.away.iter().map(|away| away.since).max().unwrap();
        // It sleeps for longer than what it knew is good for, and for three seconds at least.
        self.sleep_until((last + bound + 1000).max(stopped + 3_000_000)).await;
        let mut waiting = JoinSet::new();
        for away in &self.away {
            for _ in 0..WAITING {
                let slots = self.fleet.slots.clone();
                let target = slots.target(away.slot);
                let authorizer = self.fleet.replicas[SLEEPER].authorizer.clone();
                waiting.spawn(async move { slots.probe(&authorizer, SLEEPER, &target).await });
            }
        }
        // They have to lie in its socket by then, which nothing tells.
        sleep(Duration::from_millis(50)).await;
        self.fleet.replicas[SLEEPER].keyward.resume();
        self.silence(SLEEPER, State::Healthy, stopped);
        let first = waiting.join_all().await;
        assert!(first.iter().all(|probe| probe.outcome != Outcome::Allow), "woke up with an old truth");
        self.woken += first.len();
        self.probes.extend(first);
        self.all_refused(&EVERYBODY).await;
        self.settle().await;
    }

    /// Notes a time in which a replica did not answer.
    fn silence(&mut self, replica: usize, state: State, start: Micros) {
        let end = self.now();
        self.mute.push(Interval { replica, state, start, end });
    }

    fn fault(&mut self, replica: usize, state: State, start: Micros) {
        let end = self.now();
        self.faults.push(Interval { replica, state, start, end });
    }

    async fn listener_killed(&mut self) {
        self.begin("listener killed");
        let (start, stop) = (self.now(), CancellationToken::new());
        let (session, stopped) = (self.fleet.session().await, stop.clone());
        let killer = tokio::spawn(async move {
            let mut kills = 0;
            let mut tick = interval(KILL_INTERVAL);
            while !stopped.is_cancelled() {
                tick.tick().await;
                let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                            WHERE application_name = 'keyward-feed'";
                kills += session.query_one(kill, &[]).await.unwrap().get::<_, i64>(0);
            }
            kills
        });
        for forms in [[Form::Deactivate, Form::Expire], [Form::LockUser, Form::ReplaceHash]] {
            self.revoke(&forms, &EVERYBODY).await;
            self.settle().await;
        }
        // Seven kills at least, however fast the rest was.
        self.sleep_until(start + 7 * micros(KILL_INTERVAL)).await;
        stop.cancel();
        self.kills += killer.await.unwrap();
        for replica in EVERYBODY {
            self.fault(replica, State::FeedSilent, start);
        }
    }

    async fn listener_frozen(&mut self) {
        self.begin("listener frozen");
        let listeners = self.listeners(FROZEN).await;
        let start = self.now();
        for (pid, _) in &listeners {
            kill_process(*pid, Signal::STOP).unwrap();
        }
        self.revoke_unheard_by(FROZEN, &[0, 2], start).await;
        for (pid, _) in &listeners {
            // Its sidecar may have given it up meanwhile.
            let _ = kill_process(*pid, Signal::CONT);
        }
        self.fault(FROZEN, State::FeedSilent, start);
        self.settle().await;
    }

    async fn feed_silenced(&mut self) {
        self.begin("feed silenced");
        let listeners = self.listeners(SILENCED).await;
        let start = self.now();
        for (_, port) in &listeners {
            self.fleet.replicas[SILENCED].proxy.silence(*port);
        }
        self.revoke_unheard_by(SILENCED, &[0, 1], start).await;
        self.fleet.replicas[SILENCED].proxy.unsilence();
        self.fault(SILENCED, State::FeedSilent, start);
        self.settle().await;
    }

    /// Revocations that a replica can find out only by reading again.
    async fn revoke_unheard_by(&mut self, deaf: usize, others: &[usize], start: Micros) {
        self.revoke(&[Form::Deactivate, Form::Delete, Form::LockUser], others).await;
        self.all_refused(&[deaf]).await;
        // Once more when the lease has run out for certain: it is by its own reading, or by a new session, from now on.
        self.sleep_until(start + self.fleet.bounds()[deaf].healthy).await;
        self.revoke(&[Form::Expire], &EVERYBODY).await;
    }

    /// The sessions on which a replica hears of changes: their processes and their ports at the proxy.
    async fn listeners(&self, replica: usize) -> Vec<(Pid, u16)> {
        let session = self.fleet.session().await;
        let proxy = &self.fleet.replicas[replica].proxy;
        let found = eventually(async || {
            let sql = "SELECT pid, client_port FROM pg_stat_activity \
                       WHERE application_name = 'keyward-feed' AND client_port > 0";
            let rows = session.query(sql, &[]).await.unwrap();
            let all = rows.iter().map(|row| {
                let port = u16::try_from(row.get::<_, i32>(1)).unwrap();
                (Pid::from_raw(row.get::<_, i32>(0)).unwrap(), port)
            });
            let ours: Vec<_> = all.filter(|(_, port)| proxy.has_port(*port)).collect();
            (!ours.is_empty()).then_some(ours)
        });
        found.await.expect("a replica with a feed has a session for it")
    }

    async fn cut_off(&mut self, mode: Mode) {
        self.begin("cut off");
        let cut = self.now();
        self.fleet.replicas[ALONE].proxy.switch(mode);
        self.revoke(&[Form::Deactivate, Form::Delete, Form::LockUser], &[1, 2]).await;
        let untouched: Vec<usize> =
            (0..SLOTS).filter(|slot| self.away.iter().all(|away| away.slot != *slot)).collect();
        // Past the bound of the last revocation, and a second of being unavailable; meanwhile strangers come by.
        let last = self.away.iter().map(|away| away.since).max().unwrap();
        let until = last + self.fleet.bounds()[ALONE].revocation(State::CutOff) + 1_000_000;
        let mut unknown = Vec::new();
        while self.now() < until {
            let stranger = request(&format!("u{:07}_nobody-has-this", unknown.len()));
            unknown.push(ask(&self.fleet.replicas[ALONE].authorizer, stranger).await);
            sleep(Duration::from_millis(100)).await;
        }
        self.fleet.replicas[ALONE].proxy.switch(Mode::Pass);
        let healed = self.now();
        self.fault(ALONE, State::CutOff, cut);
        let deadline = Instant::now() + Duration::from_micros(RECOVERY);
        for slot in &untouched {
            let back = self.hear(&[ALONE], *slot, healed, Outcome::Allow);
            assert!(
                tokio::time::timeout_at(deadline, back).await == Ok(true),
                "slot {slot} stays unavailable"
            );
        }
        self.silence(ALONE, State::CutOff, cut);
        let untouched = untouched.iter().map(|slot| self.fleet.slots.target(*slot).key).collect();
        self.cuts.push(CutOff { cut, healed, untouched, unknown });
        self.settle().await;
    }

    async fn truncated(&mut self) {
        self.begin("truncated");
        let since = self.admin.truncate().await;
        for slot in 0..SLOTS {
            self.hear(&EVERYBODY, slot, since, Outcome::Refused).await;
            self.hear(&EVERYBODY, slot, since + LINGER, Outcome::Refused).await;
        }
    }

    fn assert_it_happened(&self, report: &Report, rounds: usize) {
        let others = rounds * (REPLICAS - 1);
        let mut wanted = vec![
            ("healthy", State::Healthy, others * (Form::ALL.len() - 2)),
            ("redis killed", State::Healthy, others * 4),
            ("sidecar stopped", State::Healthy, others * 2),
            ("cut off", State::CutOff, rounds * 3),
        ];
        if self.fleet.freshness == Freshness::Feed {
            wanted.push(("listener killed", State::FeedSilent, others * 4));
            wanted.push(("listener frozen", State::FeedSilent, rounds * 4));
            wanted.push(("feed silenced", State::FeedSilent, rounds * 4));
            let kills = i64::try_from(rounds * 7).unwrap();
            assert!(self.kills >= kills, "the feed was killed only {} times", self.kills);
            // A fault that is not felt was none: what is heard at once was heard by the feed.
            for (phase, replica) in
                [("listener frozen", FROZEN), ("feed silenced", SILENCED), ("cut off", ALONE)]
            {
                let longest = report.longest(phase, replica);
                assert!(longest >= FELT, "{phase}: replica {replica} heard within {longest} µs");
            }
        }
        for (phase, state, least) in wanted {
            // Where a phase follows another round's cut-off, some of it counts as recovery from that.
            let measured = report.measured(phase, state)
                + if state == State::Healthy { report.measured(phase, State::CutOff) } else { 0 };
            assert!(
                measured >= least,
                "{phase}, {state:?}: {measured} revocations measured of {least} at least"
            );
        }
    }

    /// A replica that is cut off answers from what it knows for as long as it may, then says so, and accuses nobody.
    fn assert_cut_offs(&self, history: &History) {
        let bound = self.fleet.bounds()[0].revocation(State::CutOff);
        for CutOff { cut, healed, untouched, unknown } in &self.cuts {
            let unavailable = |outcome: &Outcome| *outcome == Outcome::Unavailable;
            assert!(unknown.len() > 3 && unknown.iter().all(unavailable), "unknown keys: {unknown:?}");
            let known: Vec<&Probe> = history
                .probes
                .iter()
                .filter(|probe| probe.replica == 0 && untouched.contains(&probe.key))
                .filter(|probe| probe.start >= *cut && probe.end <= *healed)
                .collect();
            assert!(!known.is_empty());
            let answers = |outcome| known.iter().filter(move |probe| probe.outcome == outcome);
            assert_eq!(answers(Outcome::Refused).count() + answers(Outcome::Other).count(), 0);
            if self.fleet.freshness == Freshness::Ttl {
                // The other replicas' records come through Redis, as young as need be.
                continue;
            }
            let last_allow = answers(Outcome::Allow).map(|probe| probe.start).max().unwrap_or(0);
            let first_503 = answers(Outcome::Unavailable).map(|probe| probe.start).min();
            let first_503 = first_503.expect("a replica that is cut off becomes unavailable");
            assert!(
                first_503 >= cut + micros(SHORT_GRACE),
                "unavailable {} µs after",
                first_503.saturating_sub(*cut)
            );
            assert!(last_allow < cut + bound, "still allowed {} µs after", last_allow - cut);
        }
    }
}
