//! The model, run: what has to hold in all of its states, what has to be possible, and that each rule is needed.

use stateright::{Checker, HasDiscoveries, Model, Property};

use super::model::{Answer, GRACE, Held, LEASE, OLDEST, Protocol, Tier, World, allows};

const BOUND: &str = "no change is ignored for longer than the lease";
const OUTAGE_BOUND: &str =
    "no change is ignored for longer than lease and grace while the store can't be asked";
const APPLIED: &str = "nothing from before a change that was applied is fresh";

/// A rule of the protocol that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutant {
    /// A fill is kept although a change was applied since its ticket was taken.
    NoEpoch,
    /// A record counts from the end of its read.
    StampAtEnd,
    /// A session covers reads that began before it listened.
    ResyncBeforeListen,
    /// Records from Redis are accepted whatever they have seen.
    RedisUnchecked,
    /// Ages are counted to the last step of a timer, which a frozen process does not run.
    LeaseByTimer,
    /// Each use of a record renews it.
    TtlRearmedByUse,
    /// An echo may come ahead of changes that were committed before it.
    EchoOfAnotherSession,
    /// A new session's watermark covers what is in memory already.
    CoverageShared,
    /// An accepted record counts from now instead of from the watermark.
    RedisStartedNow,
    /// A change is applied to memory before it is remembered against records from Redis.
    TombstoneAfterEpoch,
    /// A session's horizon is taken before it listens.
    HorizonBeforeListen,
    /// A new horizon is taken from a beat that may not have seen a change which was not remembered.
    HorizonOfAnyBeat,
    /// A check that holds a record while its read fails goes by the watermark of that time, not of when it looked.
    ViewAfterLook,
}

impl Mutant {
    pub(super) const ALL: [Self; 13] = [
        Self::NoEpoch,
        Self::StampAtEnd,
        Self::ResyncBeforeListen,
        Self::RedisUnchecked,
        Self::LeaseByTimer,
        Self::TtlRearmedByUse,
        Self::EchoOfAnotherSession,
        Self::CoverageShared,
        Self::RedisStartedNow,
        Self::TombstoneAfterEpoch,
        Self::HorizonBeforeListen,
        Self::HorizonOfAnyBeat,
        Self::ViewAfterLook,
    ];
}

/// The bounds are asked of every change, not only of revocations.
pub(super) fn properties() -> Vec<Property<Protocol>> {
    vec![
        Property::always(BOUND, |protocol, world: &World| match protocol.answer(&world.replica) {
            Some(Answer::Fresh(record)) => world.overtaken(record).is_none_or(|age| age <= LEASE),
            Some(Answer::Outage(_)) | None => true,
        }),
        Property::always(OUTAGE_BOUND, |protocol, world: &World| match protocol.answer(&world.replica) {
            Some(Answer::Fresh(record) | Answer::Outage(record)) => {
                world.overtaken(record).is_none_or(|age| age <= LEASE + GRACE)
            }
            None => true,
        }),
        Property::always(APPLIED, |protocol, world: &World| match protocol.answer(&world.replica) {
            Some(Answer::Fresh(record)) => record.seen >= world.replica.applied,
            Some(Answer::Outage(_)) | None => true,
        }),
        // Without these, the rules could be kept by never answering.
        Property::sometimes(
            "memory allows, until the last moment of the bound",
            |protocol, world: &World| {
                matches!(world.replica.record, Some(Held::Remembered(_)))
                    && matches!(protocol.answer(&world.replica), Some(Answer::Fresh(record))
                        if allows(record.seen) && world.overtaken(record) == Some(LEASE))
            },
        ),
        Property::sometimes(
            "a watermark keeps a record fresh that was read long ago",
            |protocol, world: &World| {
                matches!(protocol.answer(&world.replica), Some(Answer::Fresh(record))
                    if allows(record.seen) && record.known.age == OLDEST)
            },
        ),
        Property::sometimes("a record from Redis allows", |protocol, world: &World| {
            matches!(world.replica.record, Some(Held::Answered(Tier::Redis, _)))
                && matches!(protocol.answer(&world.replica), Some(Answer::Fresh(record)) if allows(record.seen))
        }),
        Property::sometimes(
            "a revocation is about to drop a fresh record from memory",
            |protocol, world: &World| {
                matches!(world.replica.record, Some(Held::Remembered(_)))
                    && world.replica.half_done.is_some_and(|change| !allows(change))
                    && matches!(protocol.answer(&world.replica), Some(Answer::Fresh(record)) if allows(record.seen))
            },
        ),
        Property::sometimes("grace allows, until the last moment of the bound", |protocol, world: &World| {
            matches!(protocol.answer(&world.replica), Some(Answer::Outage(record))
                    if allows(record.seen) && world.overtaken(record) == Some(LEASE + GRACE))
        }),
    ]
}

#[test]
fn the_protocol_keeps_its_bound_in_every_state_of_the_model() {
    let checker = Protocol { broken: None }.checker().threads(2).spawn_bfs().join();
    println!("{} states, all of them", checker.unique_state_count());
    checker.assert_properties();
}

#[test]
fn every_mutant_of_the_rules_is_caught_by_the_model() {
    for mutant in Mutant::ALL {
        let checker = Protocol { broken: Some(mutant) }.checker().threads(2);
        let checker = checker.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let failures = [BOUND, OUTAGE_BOUND, APPLIED].map(|property| (property, checker.discovery(property)));
        let caught = failures.into_iter().find_map(|(property, path)| Some((property, path?.into_actions())));
        let (property, actions) = caught.unwrap_or_else(|| panic!("{mutant:?} was not caught"));
        println!("{mutant:?}: not so any more that {property}, after {} steps: {actions:?}", actions.len());
    }
}
