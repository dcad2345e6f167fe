//! The freshness protocol, explored in every state that it can get into, and with each of its rules broken in turn.
//!
//! One key changes in the store: the first commit enables it, the second revokes it. A replica reads it from the store
//! or takes it over from Redis, hears of changes by the change feed, and may be asked at any moment. Each step of each
//! party is an action of its own, so what is slow, frozen or lost needs no action: its next step just does not come.
//!
//! What makes the exploration complete:
//!
//! - *Time has no end.* The state holds ages instead of moments, and beyond lease and grace all ages are one
//!   ([`OLDEST`]). A replica compares its clock only with itself, so ages say all that the rules go by.
//! - *Sessions and beats have no limit.* The watermark of an ended session stands still, so a record under it is worth
//!   the later of two fixed moments. When a new session takes over, that moment is written into the record.
//! - *Epochs have no number.* A fill looks at its ticket's epoch to learn whether a change was applied since. Here,
//!   applying a change crosses the fill out. Tickets are taken at the last moment allowed, where they help least.
//! - *A dead session is none.* The replica does not notice the silence and goes by what the session had proven, until
//!   it listens anew; it may do so at any time, for any reason.
//! - *Any number of other replicas.* All that they do to this one is to leave in Redis, at any later time, what the
//!   store once said. So a GET may find any state that the key was ever in. Two replicas drawn in full with a slot for
//!   Redis reach no state of either that is not reached here, but far more pairs of states than can be explored.
//! - *One record at a time*: asked for, answered, remembered, or held by a check. A fill and the record in memory do
//!   not look at each other, so each behaves as it would alone. For the same reason a check may begin to read
//!   whatever is there already.
//!
//! What is left out: the answer that a check gets straight from its own read, which is as old as the read is long; a
//! record's own lifetime, which only causes more reads (and those may happen at any time here); prefixes without a
//! key; another life of the store (restore, failover), and changes that no trigger announces. Snapshots are sets of
//! transactions in truth, and a count of commits here; `domain::freshness::snapshot` and the simulation are about
//! those. A beat looks at the store at the moment of its sending; later, it would demand more. That the store queues
//! changes and echoes in the order of their commits is assumed, not shown. And this is the protocol as it is meant: that
//! the code follows it is for the simulation to say.

use stateright::{Model, Property};

use super::model_runs::{Mutant, properties};

/// How long ago something was, in ticks; at most [`OLDEST`].
pub(super) type Age = u8;

/// How many commits something has seen, or the number of a commit.
pub(super) type Count = u8;

/// Two ticks, so that there is an age between "now" and the last one that is fresh.
pub(super) const LEASE: Age = 2;

/// One tick is enough to tell "should be read again" from "must not be used".
pub(super) const GRACE: Age = 1;

/// No rule tells the ages beyond lease and grace apart.
pub(super) const OLDEST: Age = LEASE + GRACE + 1;

/// Enabled, then revoked. A record can be one change behind or several, and a change can be heard of before, between
/// or after others, which is all that the rules tell apart. (Three were tried: 8,546,419 states, the same result.)
const COMMITS: Count = 2;

/// The protocol, whole or with one rule broken.
pub(super) struct Protocol {
    pub(super) broken: Option<Mutant>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    /// How long ago each change was committed.
    commits: Vec<Age>,
    pub(super) replica: Replica,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Replica {
    /// `None` = there is none, or it is dead.
    feed: Option<Feed>,
    /// The age of the watermark of the last session that has proven itself.
    watermark: Option<Age>,
    /// What a record from Redis must have seen: the session's horizon and every change that it has delivered. Both
    /// are counts here, so the greater one demands it all. `None` = none is accepted.
    floor: Option<Count>,
    /// A delivered change of which one effect is still to come.
    pub(super) half_done: Option<Count>,
    /// The last change that was applied to memory.
    pub(super) applied: Count,
    pub(super) record: Option<Held>,
    /// The age of the timer's last step; only in [`Mutant::LeaseByTimer`].
    timer: Age,
}

/// A session that is alive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Feed {
    stage: Stage,
    /// What the store has sent and the replica has not looked at yet.
    queue: Vec<Message>,
    /// The one that is under way.
    beat: Option<Beat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Beat {
    sent: Age,
    /// What it had seen, if it was sent after every change noted so far; only where a horizon is wanted.
    horizon: Option<Count>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    /// LISTEN is in force.
    Listening,
    /// The horizon is known, so beats are sent and messages are looked at.
    Begun,
    /// The first echo has come.
    Proven,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Message {
    Changed(Count),
    /// Of the beat.
    Echo,
}

/// Where the replica's record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Held {
    /// The store has been asked.
    Asked(Known),
    /// On the way into memory.
    Answered(Tier, Record),
    /// In memory.
    Remembered(Record),
    /// With a check that wants to read it again. A change that is applied to memory does not reach it there.
    Suspected(Record),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Tier {
    Redis,
    Store,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Record {
    pub(super) seen: Count,
    pub(super) known: Known,
}

/// Since when and by what a record is known to be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Known {
    pub(super) age: Age,
    /// By [`Replica::watermark`], too.
    is_covered: bool,
}

/// What the replica may answer at this moment.
pub(super) enum Answer {
    /// From a fresh record.
    Fresh(Record),
    /// From one that has to be read again, if the store can't be asked.
    Outage(Record),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Tick,
    Commit,
    Listen,
    TakeHorizon,
    Beat,
    /// The store queues the beat's echo.
    Echo,
    /// There are too many changes (to other keys) to remember them, until there is a new horizon.
    Overflow,
    /// The message at this place in the queue has its effect; a change, the first of its two.
    Deliver(usize),
    /// A change has its second effect.
    FinishChange,
    /// Nothing more will come, whether or not the replica notices.
    LoseFeed,
    AskStore,
    StoreAnswers,
    /// Redis returns a record that has seen so many commits, and it is accepted.
    AcceptShared(Count),
    Remember,
    /// A check takes the record, wants to read it again, and waits.
    Suspect,
    /// Only in [`Mutant::TtlRearmedByUse`].
    Use,
    /// Only in [`Mutant::LeaseByTimer`].
    RunTimer,
}

impl Protocol {
    fn has(&self, mutant: Mutant) -> bool {
        self.broken == Some(mutant)
    }

    /// How long ago a record was known to be true.
    fn age(&self, replica: &Replica, known: Known) -> Age {
        let age = known.since(replica.watermark);
        if self.has(Mutant::LeaseByTimer) { age.saturating_sub(replica.timer) } else { age }
    }

    /// What it may answer without a successful read.
    pub(super) fn answer(&self, replica: &Replica) -> Option<Answer> {
        let (record, may_be_fresh) = match replica.record? {
            Held::Asked(_) | Held::Answered(Tier::Store, _) => return None,
            Held::Answered(Tier::Redis, record) | Held::Remembered(record) => (record, true),
            Held::Suspected(record) => (record, false),
        };
        match self.age(replica, record.known) {
            age if age <= LEASE && may_be_fresh => Some(Answer::Fresh(record)),
            age if age <= LEASE + GRACE => Some(Answer::Outage(record)),
            _ => None,
        }
    }

    /// What the task that follows the feed can do next: one thing after the other.
    fn feed_actions(&self, replica: &Replica, actions: &mut Vec<Action>) {
        if replica.half_done.is_some() {
            actions.push(Action::FinishChange);
            return;
        }
        let Some(feed) = &replica.feed else {
            actions.push(Action::Listen);
            return;
        };
        actions.push(Action::LoseFeed);
        if feed.stage == Stage::Listening {
            actions.push(Action::TakeHorizon);
            return;
        }
        for (place, message) in feed.queue.iter().enumerate() {
            if place == 0 || (*message == Message::Echo && self.has(Mutant::EchoOfAnotherSession)) {
                actions.push(Action::Deliver(place));
            }
        }
        match feed.beat {
            None => actions.push(Action::Beat),
            Some(_) if !feed.queue.contains(&Message::Echo) => actions.push(Action::Echo),
            Some(_) => {}
        }
        if replica.floor.is_some() {
            actions.push(Action::Overflow);
        }
    }

    /// What those who look the record up can do next.
    fn check_actions(&self, world: &World, actions: &mut Vec<Action>) {
        let replica = &world.replica;
        actions.push(Action::AskStore);
        if let (Some(_), Some(floor)) = (replica.watermark, replica.floor) {
            let lowest = if self.has(Mutant::RedisUnchecked) { 0 } else { floor };
            actions.extend((lowest..=world.seen()).map(Action::AcceptShared));
        }
        match replica.record {
            Some(Held::Asked(_)) => actions.push(Action::StoreAnswers),
            Some(Held::Answered(Tier::Store, _)) => actions.push(Action::Remember),
            Some(Held::Answered(Tier::Redis, _)) => actions.extend([Action::Remember, Action::Suspect]),
            Some(Held::Remembered(record)) => {
                actions.push(Action::Suspect);
                if self.has(Mutant::TtlRearmedByUse) && self.age(replica, record.known) <= LEASE {
                    actions.push(Action::Use);
                }
            }
            Some(Held::Suspected(_)) | None => {}
        }
    }

    /// Does one thing; `None` where it can't be done.
    fn act(&self, world: &mut World, action: Action) -> Option<()> {
        let seen = world.seen();
        let replica = &mut world.replica;
        match action {
            Action::Tick => self.tick(world),
            Action::Commit => {
                world.commits.push(0);
                let is_unheard =
                    |feed: &Feed| feed.stage == Stage::Listening && self.has(Mutant::HorizonBeforeListen);
                if let Some(feed) = replica.feed.as_mut().filter(|feed| !is_unheard(feed)) {
                    feed.queue.push(Message::Changed(seen + 1));
                }
            }
            Action::Listen => {
                replica.feed = Some(Feed { stage: Stage::Listening, queue: Vec::new(), beat: None });
                if self.has(Mutant::HorizonBeforeListen) {
                    replica.floor = Some(seen);
                }
            }
            Action::TakeHorizon => {
                replica.feed.as_mut()?.stage = Stage::Begun;
                if !self.has(Mutant::HorizonBeforeListen) {
                    replica.floor = Some(seen);
                }
            }
            Action::Beat => {
                let horizon = replica.floor.is_none().then_some(seen);
                replica.feed.as_mut()?.beat = Some(Beat { sent: 0, horizon });
            }
            Action::Echo => replica.feed.as_mut()?.queue.push(Message::Echo),
            Action::Overflow => replica.floor = None,
            Action::Deliver(place) => match replica.feed.as_mut()?.queue.remove(place) {
                Message::Echo => self.prove(replica)?,
                Message::Changed(change) => {
                    replica.half_done = Some(change);
                    self.change(replica, change, !self.has(Mutant::TombstoneAfterEpoch));
                }
            },
            Action::FinishChange => {
                let change = replica.half_done.take()?;
                self.change(replica, change, self.has(Mutant::TombstoneAfterEpoch));
            }
            Action::LoseFeed => replica.feed = None,
            Action::AskStore => {
                // By a session that has ended, too; its watermark stands still.
                let known = Known { age: 0, is_covered: replica.watermark.is_some() };
                replica.record = Some(Held::Asked(known));
            }
            Action::StoreAnswers => {
                let Some(Held::Asked(known)) = replica.record else { return None };
                replica.record = Some(Held::Answered(Tier::Store, Record { seen, known }));
            }
            Action::AcceptShared(seen) => {
                let watermark = replica.watermark?;
                let age = if self.has(Mutant::RedisStartedNow) { 0 } else { watermark };
                let record = Record { seen, known: Known { age, is_covered: true } };
                replica.record = Some(Held::Answered(Tier::Redis, record));
            }
            Action::Remember => {
                let Some(Held::Answered(_, mut record)) = replica.record else { return None };
                if self.has(Mutant::StampAtEnd) {
                    record.known.age = 0;
                }
                replica.record = Some(Held::Remembered(record));
            }
            Action::Suspect => {
                let (Held::Answered(_, mut record) | Held::Remembered(mut record)) = replica.record? else {
                    return None;
                };
                if !self.has(Mutant::ViewAfterLook) {
                    record.known.end_coverage(replica.watermark);
                }
                replica.record = Some(Held::Suspected(record));
            }
            Action::Use => replica.record.as_mut()?.known().age = 0,
            Action::RunTimer => replica.timer = 0,
        }
        Some(())
    }

    fn tick(&self, world: &mut World) {
        for age in world.replica.ages().chain(&mut world.commits) {
            *age = older(*age);
        }
        if self.has(Mutant::LeaseByTimer) {
            world.replica.timer = older(world.replica.timer);
        }
    }

    /// One of the two effects of a change: on records from Redis that come later, or on memory and the fills under way.
    fn change(&self, replica: &mut Replica, change: Count, is_remembered: bool) {
        if is_remembered {
            match (&mut replica.floor, &mut replica.feed) {
                (Some(floor), _) => *floor = change.max(*floor),
                // A beat under way may have looked before this change was made.
                (None, Some(Feed { beat: Some(beat), .. })) if !self.has(Mutant::HorizonOfAnyBeat) => {
                    beat.horizon = None;
                }
                (None, _) => {}
            }
            return;
        }
        replica.applied = replica.applied.max(change);
        let stays = match replica.record {
            Some(Held::Asked(_) | Held::Answered(..)) => self.has(Mutant::NoEpoch),
            Some(Held::Suspected(_)) => true,
            Some(Held::Remembered(_)) | None => false,
        };
        if !stays {
            replica.record = None;
        }
    }

    /// An echo has come. The first one of a session makes it the one that counts.
    fn prove(&self, replica: &mut Replica) -> Option<()> {
        let feed = replica.feed.as_mut()?;
        let Beat { sent, horizon } = feed.beat.take()?;
        replica.floor = replica.floor.or(horizon);
        if feed.stage == Stage::Proven {
            replica.watermark = Some(replica.watermark?.min(sent));
            return Some(());
        }
        feed.stage = Stage::Proven;
        let ended = replica.watermark.replace(sent);
        let Some(held) = &mut replica.record else { return Some(()) };
        let is_taken_over = match held {
            Held::Asked(_) | Held::Answered(Tier::Store, _) => self.has(Mutant::ResyncBeforeListen),
            Held::Remembered(_) => self.has(Mutant::CoverageShared),
            Held::Answered(Tier::Redis, _) | Held::Suspected(_) => false,
        };
        held.known().end_coverage(ended);
        held.known().is_covered = is_taken_over;
        Some(())
    }
}

impl World {
    fn seen(&self) -> Count {
        Count::try_from(self.commits.len()).unwrap()
    }

    /// How long ago a record was overtaken by a change that it has not seen; `None` where it is still true.
    pub(super) fn overtaken(&self, record: Record) -> Option<Age> {
        self.commits.get(usize::from(record.seen)).copied()
    }
}

impl Replica {
    fn ages(&mut self) -> impl Iterator<Item = &mut Age> {
        let beat = self.feed.iter_mut().filter_map(|feed| feed.beat.as_mut()).map(|beat| &mut beat.sent);
        let record = self.record.iter_mut().map(|held| &mut held.known().age);
        beat.chain(record).chain(&mut self.watermark)
    }
}

impl Held {
    fn known(&mut self) -> &mut Known {
        match self {
            Self::Asked(known) => known,
            Self::Answered(_, record) | Self::Remembered(record) | Self::Suspected(record) => {
                &mut record.known
            }
        }
    }
}

impl Known {
    fn since(self, watermark: Option<Age>) -> Age {
        watermark.filter(|_| self.is_covered).map_or(self.age, |watermark| watermark.min(self.age))
    }

    /// Whatever the watermark was good for is kept; what it proves later is not for this record.
    fn end_coverage(&mut self, watermark: Option<Age>) {
        *self = Self { age: self.since(watermark), is_covered: false };
    }
}

fn older(age: Age) -> Age {
    (age + 1).min(OLDEST)
}

/// The last commit revokes, the one before it allows, and so on.
pub(super) fn allows(seen: Count) -> bool {
    (COMMITS - seen) % 2 == 1
}

impl Model for Protocol {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World { commits: Vec::new(), replica: Replica::default() }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        actions.push(Action::Tick);
        if world.seen() < COMMITS {
            actions.push(Action::Commit);
        }
        if self.has(Mutant::LeaseByTimer) {
            actions.push(Action::RunTimer);
        }
        self.feed_actions(&world.replica, actions);
        self.check_actions(world, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut world = world.clone();
        self.act(&mut world, action)?;
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties()
    }
}
