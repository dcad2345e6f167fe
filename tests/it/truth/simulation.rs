//! A seeded simulation of the whole protocol: two replicas, their memories, Redis, a database with overlapping
//! transactions, and a change feed that is late, dies in silence, is cut and comes back, while replicas freeze, crash and
//! lose the database.
//!
//! What decides is the product's own code ([`Freshness`], [`RecordCache`], [`Session`], the filter for shared records);
//! the simulation is the world around it and the order in which `authorizer/candidates.rs` and `authorizer/feed.rs` call
//! it. Each mutant breaks that order or leaves out one rule, and has to be caught.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use keyward::authorizer::freshness::{BegunReading, Freshness, FreshnessSettings, Mode};
use keyward::cache::records::{FillTicket, RecordCache, Records, Remembered};
use keyward::domain::freshness::change::Change;
use keyward::domain::freshness::coverage::{Known, Standing, View};
use keyward::domain::freshness::session::{BeatAnswer, Session};
use keyward::domain::freshness::shared::{SharedFilter, Stamp};
use keyward::domain::freshness::snapshot::{Snapshot, TransactionId};
use keyward::domain::key::KeyPrefix;
use keyward::domain::record::Candidate;
use keyward::domain::row::CandidateRow;
use keyward::domain::time::{Instant, Now, Timestamp};

const KEYS: usize = 4;
const REPLICAS: usize = 2;
/// Milliseconds, like all times here.
const LEASE: u64 = 2_000;
const GRACE: u64 = 5_000;
const BEAT_EVERY: u64 = 500;
const TIMER_EVERY: u64 = 500;

/// What is left out or done in the wrong order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mutant {
    /// A fill does not look whether its prefix was invalidated meanwhile.
    NoEpoch,
    /// A record's age counts from the end of its query.
    StampAtEnd,
    /// What is read before LISTEN counts as covered by the session that listens afterwards.
    ResyncBeforeListen,
    /// Records from Redis are taken as they are.
    RedisUnchecked,
    /// The lease is looked at by a timer and not by each check.
    LeaseByTimer,
    /// Each use of a record makes it young again.
    RearmedByUse,
    /// Memory forgets first, and the change is noted for shared records later.
    NotedTooLate,
    /// A record that was held during a read is judged by what was proven since.
    ViewAfterLook,
}

pub(super) const MUTANTS: [Mutant; 8] = [
    Mutant::NoEpoch,
    Mutant::StampAtEnd,
    Mutant::ResyncBeforeListen,
    Mutant::RedisUnchecked,
    Mutant::LeaseByTimer,
    Mutant::RearmedByUse,
    Mutant::NotedTooLate,
    Mutant::ViewAfterLook,
];

/// What happened in a run without violation: a run in which nothing happens proves nothing.
#[derive(Debug, Default, Clone)]
pub(super) struct Tally {
    pub(super) events: u64,
    pub(super) revocations: u64,
    pub(super) allowed_from_memory: u64,
    pub(super) allowed_from_redis: u64,
    pub(super) allowed_in_outage: u64,
    pub(super) read_through: u64,
    pub(super) refused: u64,
    pub(super) unavailable: u64,
    pub(super) fills_dropped: u64,
    pub(super) sessions: u64,
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.revocations += other.revocations;
        self.allowed_from_memory += other.allowed_from_memory;
        self.allowed_from_redis += other.allowed_from_redis;
        self.allowed_in_outage += other.allowed_in_outage;
        self.read_through += other.read_through;
        self.refused += other.refused;
        self.unavailable += other.unavailable;
        self.fills_dropped += other.fills_dropped;
        self.sessions += other.sessions;
    }
}

/// `SplitMix64`: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(u64::try_from(length).unwrap())).unwrap()
    }

    fn one_in(&mut self, odds: u64) -> bool {
        self.below(odds) == 0
    }
}

/// A change of one key's right.
#[derive(Clone, Copy)]
struct Commit {
    at: u64,
    by: u64,
    allows: bool,
}

struct Transaction {
    number: u64,
    key: usize,
    allows: bool,
}

/// A message on its way to a session, in the order of commits.
enum OnTheWay {
    Changed { key: usize, by: u64 },
    Echo(u64),
}

#[derive(Default)]
struct Database {
    next: u64,
    open: Vec<Transaction>,
    history: [Vec<Commit>; KEYS],
    /// Of each replica, while it listens.
    queues: [Option<VecDeque<OnTheWay>>; REPLICAS],
}

impl Database {
    fn snapshot(&self) -> Snapshot {
        let mut under_way: Vec<u64> = self.open.iter().map(|open| open.number).collect();
        under_way.sort_unstable();
        let oldest = under_way.first().copied().unwrap_or(self.next);
        let list: Vec<String> = under_way.iter().map(ToString::to_string).collect();
        Snapshot::parse(&format!("{oldest}:{}:{}", self.next, list.join(","))).unwrap()
    }

    fn stamp(&self) -> Stamp {
        Stamp { incarnation: "the only one".into(), snapshot: self.snapshot() }
    }

    fn allows(&self, key: usize) -> Commit {
        *self.history[key].last().unwrap()
    }

    fn begin(&mut self, key: usize, allows: bool) {
        // Somebody else holds the row.
        if self.open.iter().any(|open| open.key == key) {
            return;
        }
        self.open.push(Transaction { number: self.next, key, allows });
        self.next += 1;
    }

    fn commit(&mut self, index: usize, now: u64) -> bool {
        let done = self.open.swap_remove(index);
        self.history[done.key].push(Commit { at: now, by: done.number, allows: done.allows });
        for queue in self.queues.iter_mut().flatten() {
            queue.push_back(OnTheWay::Changed { key: done.key, by: done.number });
        }
        !done.allows
    }
}

/// A record in Redis, and one on its way there.
#[derive(Clone)]
struct Shared {
    read: Commit,
    stamp: Stamp,
}

enum Stage {
    /// Redis has been asked; what it said is on its way back.
    Redis(Option<Shared>),
    /// The store is to be asked.
    Store,
    /// The query has been sent.
    Sent(BegunReading),
    /// Its answer is on its way back.
    Answered(BegunReading, Commit, Stamp),
}

/// A check that looks a record up.
struct Fill {
    key: usize,
    asked_at: u64,
    ticket: FillTicket,
    stage: Stage,
    /// What memory held, if only it were young enough, and the view that it was found with.
    suspect: Option<Arc<Records>>,
    view: View,
}

struct Link {
    session: Session,
    answers: VecDeque<(u64, BeatAnswer)>,
    next_beat: u64,
    is_published: bool,
    /// Nothing is delivered any more, and nobody notices.
    is_dead: bool,
}

struct Replica {
    memory: RecordCache,
    freshness: Freshness,
    link: Option<Link>,
    /// When it tries to connect again; with the mutant, when it listens at last.
    connect_at: u64,
    sessions: u64,
    frozen_until: u64,
    can_reach_store: bool,
    fills: Vec<Fill>,
    /// What its timer saw last.
    timer: u64,
    /// The newest change of each key that this process has heard of.
    heard: [u64; KEYS],
    /// With the mutant: changes that memory has forgotten and nobody has noted.
    to_note: Vec<Change>,
}

pub(super) struct Simulation {
    random: Random,
    mutant: Option<Mutant>,
    now: u64,
    database: Database,
    redis: HashMap<usize, Shared>,
    writes: Vec<(usize, Shared)>,
    replicas: Vec<Replica>,
    pub(super) tally: Tally,
}

fn instant(at: u64) -> Instant {
    Instant::from_boot(Duration::from_millis(at))
}

fn prefix(key: usize) -> KeyPrefix {
    KeyPrefix::new(&format!("kw_key_{key}")).unwrap()
}

/// A row of a key; read from JSON once, like those from Redis.
fn row(key: usize, read: Commit) -> CandidateRow {
    static ROW: LazyLock<CandidateRow> = LazyLock::new(|| {
        let row = serde_json::json!({
            "key_id": 7, "key_name": null, "key_hash": null, "key_prefix": null, "is_active": null,
            "expires_at": null, "scopes": null, "allowed_models": null, "allowed_endpoints": null,
            "allowed_ips": null, "allowed_chatbots": null, "allowed_agents": null,
            "rate_limit_per_minute": null, "rate_limit_per_hour": null, "rate_limit_per_day": null,
            "is_unlimited": null, "budget_limit_cents": null, "budget_type": null, "total_cost": null,
            "month_cost": null, "user_id": 1, "username": null, "email": null, "user_is_active": true,
            "is_superuser": null, "role": null, "account_locked": null, "account_locked_until": null,
            "unreadable": [],
        });
        serde_json::from_value(row).unwrap()
    });
    let mut row = ROW.clone();
    row.key_id = i64::try_from(key).unwrap();
    // Which change it is from, to see whether a later one was heard of.
    row.key_name = Some(read.by.to_string());
    row.is_active = Some(read.allows);
    row
}

fn records(key: usize, read: Commit, known: Known) -> Arc<Records> {
    let candidate = Arc::new(Candidate::from_row(&row(key, read)));
    Arc::new(Records { candidates: vec![candidate], known, read_again_at: instant(u64::MAX / 2_000_000) })
}

fn allows(records: &Records) -> bool {
    records.candidates[0].key.is_active
}

fn version(records: &Records) -> u64 {
    records.candidates[0].key.name.parse().unwrap()
}

impl Replica {
    fn new() -> Self {
        Self {
            memory: RecordCache::new(100),
            freshness: Freshness::new(FreshnessSettings {
                lease: Duration::from_millis(LEASE),
                outage_grace: Duration::from_millis(GRACE),
                without_feed: Duration::from_millis(LEASE),
                record_ttl: Duration::from_hours(1),
            }),
            link: None,
            connect_at: 0,
            sessions: 0,
            frozen_until: 0,
            can_reach_store: true,
            fills: Vec::new(),
            timer: 0,
            heard: [0; KEYS],
            to_note: Vec::new(),
        }
    }
}

impl Simulation {
    pub(super) fn new(seed: u64, mutant: Option<Mutant>) -> Self {
        let mut database = Database { next: 100, ..Database::default() };
        for history in &mut database.history {
            history.push(Commit { at: 0, by: 1, allows: true });
        }
        Self {
            random: Random(seed),
            mutant,
            now: 1_000_000,
            database,
            redis: HashMap::new(),
            writes: Vec::new(),
            replicas: (0..REPLICAS).map(|_| Replica::new()).collect(),
            tally: Tally::default(),
        }
    }

    /// One event; what went wrong in it.
    pub(super) fn step(&mut self) -> Result<(), String> {
        self.tally.events += 1;
        let replica = self.random.index(REPLICAS);
        match self.random.below(100) {
            0..=19 => {
                let most = if self.random.one_in(40) { 4_000 } else { 60 };
                self.now += 1 + self.random.below(most);
                Ok(())
            }
            20..=21 => {
                self.change();
                Ok(())
            }
            22 => {
                self.disturb(replica);
                Ok(())
            }
            23..=25 => {
                if !self.writes.is_empty() {
                    let index = self.random.index(self.writes.len());
                    let (key, shared) = self.writes.swap_remove(index);
                    self.redis.insert(key, shared);
                }
                Ok(())
            }
            _ if self.replicas[replica].frozen_until > self.now => Ok(()),
            26..=49 => {
                self.follow(replica);
                Ok(())
            }
            50..=69 => self.check(replica),
            _ => self.fill(replica),
        }
    }

    fn change(&mut self) {
        if !self.database.open.is_empty() && self.random.one_in(2) {
            let index = self.random.index(self.database.open.len());
            let is_revocation = self.database.commit(index, self.now);
            self.tally.revocations += u64::from(is_revocation);
        } else {
            let key = self.random.index(KEYS);
            let allows = !self.database.allows(key).allows;
            self.database.begin(key, allows);
        }
    }

    /// What breaks from outside.
    fn disturb(&mut self, index: usize) {
        let replica = &mut self.replicas[index];
        match self.random.below(40) {
            0..=3 => {
                if let Some(link) = &mut replica.link {
                    link.is_dead = true;
                }
            }
            4..=6 => {
                replica.link = None;
                self.database.queues[index] = None;
            }
            7 | 8 => replica.frozen_until = self.now + self.random.below(12_000),
            9..=11 => replica.can_reach_store = false,
            12 | 13 => replica.can_reach_store = true,
            14 => {
                // Its writes to Redis may arrive long after it is gone.
                *replica = Replica::new();
                self.database.queues[index] = None;
            }
            15 => self.redis.clear(),
            _ => {}
        }
    }

    /// One step of `authorizer/feed.rs`.
    fn follow(&mut self, index: usize) {
        let is_late = self.random.one_in(3);
        let replica = &mut self.replicas[index];
        if self.now >= replica.timer + TIMER_EVERY {
            replica.timer = self.now;
        }
        if let Some(change) = replica.to_note.pop()
            && let Some(filter) = replica.freshness.filter().as_mut()
        {
            filter.note(&change);
        }
        let Some(link) = &mut replica.link else {
            self.connect(index);
            return;
        };
        let is_reachable = replica.can_reach_store && !link.is_dead;
        if self.now >= link.next_beat {
            if link.session.check(instant(self.now)).is_err() {
                replica.link = None;
                self.database.queues[index] = None;
                return;
            }
            if link.session.may_beat() {
                let number = link.session.send_beat(instant(self.now));
                // The statement runs at once or never; its answer and its echo take their time.
                if is_reachable && let Some(queue) = &mut self.database.queues[index] {
                    queue.push_back(OnTheWay::Echo(number));
                    let snapshot = self.database.snapshot();
                    link.answers.push_back((number, answer(Some(snapshot))));
                    self.database.next += 1;
                }
            }
            link.next_beat = self.now + BEAT_EVERY;
            return;
        }
        if is_late || !is_reachable {
            return;
        }
        let mut proven = false;
        if let Some((number, answer)) = link.answers.pop_front() {
            proven = link.session.answered(number, answer, &mut replica.freshness.filter()).unwrap();
        } else if let Some(message) = self.database.queues[index].as_mut().and_then(VecDeque::pop_front) {
            match message {
                OnTheWay::Echo(number) => {
                    proven = link.session.echoed(number, &mut replica.freshness.filter());
                }
                OnTheWay::Changed { key, by } => {
                    let change = Change::Keys { by: TransactionId::new(by), prefixes: vec![prefix(key)] };
                    if self.mutant == Some(Mutant::NotedTooLate) {
                        replica.to_note.push(change);
                    } else {
                        link.session.heard(&change, &mut replica.freshness.filter());
                    }
                    replica.memory.invalidate(&prefix(key));
                    replica.heard[key] = by;
                }
            }
        }
        if proven && !link.is_published {
            link.is_published = true;
            let incarnation = self.database.stamp().incarnation;
            replica.freshness.publish(link.session.coverage().clone(), Some(incarnation));
        }
    }

    /// LISTEN first, then a look at what there is, then beats.
    fn connect(&mut self, index: usize) {
        let replica = &mut self.replicas[index];
        if !replica.can_reach_store {
            return;
        }
        if self.mutant == Some(Mutant::ResyncBeforeListen) && replica.connect_at < self.now {
            // The session counts from here, and listens only when it comes by again.
            replica.connect_at = self.now + 300;
        }
        let session_number = replica.sessions + 1;
        let session = Session::new(session_number, &answer(None), Duration::from_millis(LEASE));
        *replica.freshness.filter() = Some(SharedFilter::new(self.database.stamp(), 50));
        replica.sessions = session_number;
        self.tally.sessions += 1;
        let mut link = Link {
            session,
            answers: VecDeque::new(),
            next_beat: self.now,
            is_published: false,
            is_dead: false,
        };
        if self.mutant == Some(Mutant::ResyncBeforeListen) {
            link.is_published = true;
            let incarnation = self.database.stamp().incarnation;
            replica.freshness.publish(link.session.coverage().clone(), Some(incarnation));
            link.next_beat = replica.connect_at;
        } else {
            self.database.queues[index] = Some(VecDeque::new());
        }
        replica.link = Some(link);
    }

    /// A check arrives: memory answers, or a look-up begins.
    fn check(&mut self, index: usize) -> Result<(), String> {
        if self.mutant == Some(Mutant::ResyncBeforeListen) {
            let replica = &self.replicas[index];
            if replica.link.is_some()
                && self.database.queues[index].is_none()
                && self.now >= replica.connect_at
            {
                self.database.queues[index] = Some(VecDeque::new());
            }
        }
        let key = self.random.index(KEYS);
        let replica = &mut self.replicas[index];
        let now = if self.mutant == Some(Mutant::LeaseByTimer) { replica.timer } else { self.now };
        let view = replica.freshness.view();
        let name = prefix(key);
        match replica.memory.get(name.as_str(), &view, instant(now)) {
            Remembered::Fresh(found) => {
                if self.mutant == Some(Mutant::RearmedByUse) {
                    let ticket = replica.memory.begin_fill(&name);
                    let known = replica
                        .freshness
                        .begin_reading(instant(self.now))
                        .finish(Some(&self.database.stamp()));
                    let again = Records {
                        candidates: found.candidates.clone(),
                        known,
                        read_again_at: found.read_again_at,
                    };
                    replica.memory.fill(name, &ticket, Arc::new(again));
                }
                if version(&found) < replica.heard[key] {
                    return Err(format!(
                        "replica {index} had heard of change {} of key {key} and still uses {}",
                        replica.heard[key],
                        version(&found)
                    ));
                }
                self.tally.allowed_from_memory += u64::from(allows(&found));
                self.judge(index, key, self.now, allows(&found), LEASE)
            }
            remembered => {
                let suspect = match remembered {
                    Remembered::Suspect(records) => Some(records),
                    _ => None,
                };
                let ticket = replica.memory.begin_fill(&name);
                let stage = Stage::Redis(self.redis.get(&key).cloned());
                replica.fills.push(Fill { key, asked_at: self.now, ticket, stage, suspect, view });
                Ok(())
            }
        }
    }

    /// One step of `Candidates::fill` and `Candidates::read`.
    fn fill(&mut self, index: usize) -> Result<(), String> {
        if self.replicas[index].fills.is_empty() {
            return Ok(());
        }
        let chosen = self.random.index(self.replicas[index].fills.len());
        let mut fill = self.replicas[index].fills.swap_remove(chosen);
        let replica = &mut self.replicas[index];
        let now = instant(self.now);
        match std::mem::replace(&mut fill.stage, Stage::Store) {
            Stage::Redis(found) => {
                if let Some(shared) = found {
                    let stamp = if self.mutant == Some(Mutant::RedisUnchecked) {
                        Stamp { snapshot: Snapshot::parse("99999999:99999999:").unwrap(), ..shared.stamp }
                    } else {
                        shared.stamp
                    };
                    let wall = Timestamp::from_microseconds(0);
                    let rows = [row(fill.key, shared.read)];
                    let both = Now { wall, instant: now };
                    // Without a feed, age alone decides, by wall clocks that this world does not have.
                    let accepted = (replica.freshness.mode() == Mode::Feed)
                        .then(|| replica.freshness.accept(Some(&stamp), wall, &prefix(fill.key), &rows, both))
                        .flatten()
                        .filter(|known| replica.freshness.view().standing(known, now) == Standing::Fresh);
                    if let Some(known) = accepted {
                        self.tally.allowed_from_redis += u64::from(shared.read.allows);
                        self.keep(index, &fill, shared.read, known);
                        return self.judge(index, fill.key, fill.asked_at, shared.read.allows, LEASE);
                    }
                }
            }
            Stage::Store => fill.stage = Stage::Sent(replica.freshness.begin_reading(now)),
            Stage::Sent(reading) => {
                if !replica.can_reach_store {
                    return self.fail(index, &fill);
                }
                fill.stage = Stage::Answered(reading, self.database.allows(fill.key), self.database.stamp());
            }
            Stage::Answered(reading, read, stamp) => {
                let reading = if self.mutant == Some(Mutant::StampAtEnd) {
                    replica.freshness.begin_reading(now)
                } else {
                    reading
                };
                let known = reading.finish(Some(&stamp));
                self.keep(index, &fill, read, known);
                if self.writes.len() < 20 {
                    self.writes.push((fill.key, Shared { read, stamp }));
                }
                self.tally.read_through += 1;
                // It was read after it was asked for, so it is what the store said at some moment since.
                return Ok(());
            }
        }
        self.replicas[index].fills.push(fill);
        Ok(())
    }

    fn keep(&mut self, index: usize, fill: &Fill, read: Commit, known: Known) {
        let memory = &self.replicas[index].memory;
        let name = prefix(fill.key);
        let now = memory.begin_fill(&name);
        self.tally.fills_dropped += u64::from(now != fill.ticket);
        let ticket = if self.mutant == Some(Mutant::NoEpoch) { now } else { fill.ticket };
        memory.fill(name, &ticket, records(fill.key, read, known));
    }

    /// The store could not be asked.
    fn fail(&mut self, index: usize, fill: &Fill) -> Result<(), String> {
        let view = if self.mutant == Some(Mutant::ViewAfterLook) {
            self.replicas[index].freshness.view()
        } else {
            fill.view
        };
        let may_bridge =
            |records: &&Arc<Records>| view.standing(&records.known, instant(self.now)) != Standing::Expired;
        match fill.suspect.as_ref().filter(may_bridge) {
            // A refusal by it would be told as "unavailable".
            Some(records) if allows(records) => {
                self.tally.allowed_in_outage += 1;
                // The bound holds at the moment of the answer, however long the failing read took.
                self.judge(index, fill.key, self.now, true, LEASE + GRACE)
            }
            _ => {
                self.tally.unavailable += 1;
                Ok(())
            }
        }
    }

    /// An answer from what was remembered, to a check that began at `asked_at`: it has to have been true at some moment
    /// since `bound` before that.
    fn judge(
        &mut self,
        index: usize,
        key: usize,
        asked_at: u64,
        allowed: bool,
        bound: u64,
    ) -> Result<(), String> {
        self.tally.refused += u64::from(!allowed);
        let since = asked_at.saturating_sub(bound);
        let history = &self.database.history[key];
        let first = history.partition_point(|commit| commit.at < since).saturating_sub(1);
        if history[first..].iter().any(|commit| commit.allows == allowed) {
            return Ok(());
        }
        let last = history.last().unwrap();
        Err(format!(
            "replica {index} answered allowed={allowed} for key {key} at {asked_at}, {} ms after the change {}",
            asked_at - last.at,
            last.by
        ))
    }
}

fn answer(snapshot: Option<Snapshot>) -> BeatAnswer {
    BeatAnswer { triggers: "as they were".into(), backend: 1, snapshot }
}
