//! The judge, judged: histories with one thing wrong, which it must find, and odd ones with nothing wrong.

use super::history::{
    Bounds, Effect, Figures, History, Interval, Micros, Operation, Outcome, Probe, RECOVERY, State,
};

const MS: Micros = 1_000;
const S: Micros = 1_000_000;

/// When the key below is revoked: long after all that was before has to be known.
const REVOKED: Micros = 100 * S;

const BOUNDS: Bounds = Bounds { healthy: S, feed_silent: 3 * S, cut_off: 30 * S, activation: 2 * S };

/// Key 7 was made at the beginning.
fn history() -> History {
    let mut history = History { bounds: vec![BOUNDS; 2], ..History::default() };
    history.change(Effect::Create, 0, MS);
    history
}

/// Key 7, revoked from 100.000 s to 100.002 s.
fn revoked() -> History {
    let mut history = history();
    history.change(Effect::Revoke, REVOKED, REVOKED + 2 * MS);
    history
}

const REVOKE_END: Micros = REVOKED + 2 * MS;

impl History {
    fn change(&mut self, effect: Effect, start: Micros, end: Micros) -> &mut Self {
        self.operations.push(Operation { key: 7, start, end, effect });
        self
    }

    /// A probe on replica 0 that takes a millisecond.
    fn probe(&mut self, start: Micros, outcome: Outcome) -> &mut Self {
        self.probe_until(start, start + MS, outcome)
    }

    fn probe_until(&mut self, start: Micros, end: Micros, outcome: Outcome) -> &mut Self {
        self.probes.push(Probe { replica: 0, key: 7, start, end, outcome });
        self
    }

    fn fault(&mut self, state: State, start: Micros, end: Micros) -> &mut Self {
        self.faults.push(Interval { replica: 0, state, start, end });
        self
    }

    fn wrong(&self) -> usize {
        self.judge().violations.len()
    }

    fn took(&self) -> Vec<Option<Micros>> {
        self.judge().latencies.iter().map(|latency| latency.took).collect()
    }
}

#[test]
fn an_allow_that_begins_at_the_bound_is_wrong_and_one_before_it_is_not() {
    let bound = REVOKE_END + BOUNDS.healthy;
    assert_eq!(revoked().probe(bound - 1, Outcome::Allow).wrong(), 0);
    assert_eq!(revoked().probe(bound, Outcome::Allow).wrong(), 1);
    assert_eq!(revoked().probe(bound + MS, Outcome::Allow).wrong(), 1);
}

#[test]
fn an_allow_that_overlaps_the_commit_is_right() {
    let mut history = revoked();
    history.probe_until(REVOKED - MS, REVOKE_END + MS, Outcome::Allow);
    // However late its answer comes: it may have been decided before.
    history.probe_until(REVOKED + MS, REVOKED + 60 * S, Outcome::Allow);
    assert_eq!(history.wrong(), 0);
}

#[test]
fn each_fault_has_its_own_bound_for_the_replica_that_has_it() {
    for (state, bound) in [(State::FeedSilent, BOUNDS.feed_silent), (State::CutOff, BOUNDS.cut_off)] {
        let mut history = revoked();
        history.fault(state, REVOKED - S, REVOKED + 50 * S);
        history.probe(REVOKE_END + bound - 1, Outcome::Allow);
        assert_eq!(history.wrong(), 0, "{state:?}");
        history.probe(REVOKE_END + bound, Outcome::Allow);
        assert_eq!(history.wrong(), 1, "{state:?}");
        let mut elsewhere = revoked();
        elsewhere.fault(state, REVOKED - S, REVOKED + 50 * S);
        elsewhere.faults[0].replica = 1;
        assert_eq!(elsewhere.probe(REVOKE_END + bound - 1, Outcome::Allow).wrong(), 1, "{state:?}");
    }
}

#[test]
fn a_fault_that_has_ended_is_felt_until_it_is_recovered_from() {
    let late = REVOKE_END + BOUNDS.feed_silent - 1;
    let ended = |at| {
        let mut history = revoked();
        history.fault(State::FeedSilent, 50 * S, at).probe(late, Outcome::Allow);
        history.wrong()
    };
    assert_eq!(ended(REVOKE_END - RECOVERY), 0);
    assert_eq!(ended(REVOKE_END - RECOVERY - 1), 1);
}

#[test]
fn a_fault_that_begins_after_the_bound_excuses_nothing() {
    let allowed_late = |fault: Micros| {
        let mut history = revoked();
        history.fault(State::CutOff, fault, fault + 50 * S).probe(fault + S, Outcome::Allow);
        history.wrong()
    };
    assert_eq!(allowed_late(REVOKE_END + BOUNDS.healthy), 0);
    assert_eq!(allowed_late(REVOKE_END + BOUNDS.healthy + 1), 1);
}

#[test]
fn one_fault_may_lead_into_the_next() {
    let mut history = revoked();
    history.fault(State::CutOff, REVOKED + 2 * S, REVOKED + 3 * S);
    history.fault(State::FeedSilent, REVOKED, REVOKED + S);
    assert_eq!(history.probe(REVOKE_END + BOUNDS.cut_off - 1, Outcome::Allow).wrong(), 0);
    assert_eq!(history.probe(REVOKE_END + BOUNDS.cut_off, Outcome::Allow).wrong(), 1);
}

#[test]
fn an_allow_that_comes_back_after_a_refusal_is_wrong_past_the_bound_and_counted_before_it() {
    let mut history = revoked();
    history.probe(REVOKE_END + 10 * MS, Outcome::Refused);
    history.probe(REVOKE_END + 20 * MS, Outcome::Allow);
    history.probe(REVOKE_END + 30 * MS, Outcome::Refused);
    assert_eq!((history.wrong(), history.took()), (0, vec![Some(30 * MS)]));
    history.probe(REVOKE_END + 5 * S, Outcome::Allow);
    assert_eq!((history.wrong(), history.took()), (1, vec![None]));
}

#[test]
fn a_restored_key_may_be_allowed_from_the_moment_at_which_its_restoring_began() {
    let mut history = revoked();
    history.change(Effect::Restore, REVOKED + 10 * S, REVOKED + 11 * S);
    history.probe_until(REVOKED + 9 * S, REVOKED + 10 * S, Outcome::Allow);
    assert_eq!(history.wrong(), 1, "its answer was there before");
    history.probe_until(REVOKED + 9 * S, REVOKED + 10 * S + 1, Outcome::Allow);
    history.probe(REVOKED + 20 * S, Outcome::Allow);
    assert_eq!(history.wrong(), 1);
    // Revoked once more: only the later revocation counts, as the earlier one was undone.
    history.change(Effect::Revoke, REVOKED + 30 * S, REVOKED + 31 * S);
    history.probe(REVOKED + 31 * S + BOUNDS.healthy - 1, Outcome::Allow);
    assert_eq!(history.wrong(), 1);
    history.probe(REVOKED + 31 * S + BOUNDS.healthy, Outcome::Allow);
    assert_eq!(history.wrong(), 2);
}

#[test]
fn a_second_revocation_does_not_prolong_the_first() {
    let mut history = revoked();
    history.change(Effect::Revoke, REVOKE_END + 900 * MS, REVOKE_END + 901 * MS);
    assert_eq!(history.probe(REVOKE_END + BOUNDS.healthy, Outcome::Allow).wrong(), 1);
}

#[test]
fn a_valid_key_is_not_refused_after_its_activation() {
    let mut history = history();
    history.probe(MS + BOUNDS.activation - 1, Outcome::Refused);
    assert_eq!(history.wrong(), 0);
    history.probe(MS + BOUNDS.activation, Outcome::Refused);
    assert_eq!(history.wrong(), 1);
    // Neither of these accuses anybody.
    history.probe(50 * S, Outcome::Unavailable).probe(51 * S, Outcome::Other);
    assert_eq!(history.wrong(), 1);
}

#[test]
fn a_restored_key_is_not_refused_after_its_activation_which_is_longer_in_a_fault() {
    let restored = REVOKED + 10 * S;
    let refused_at = |after: Micros, fault: Option<State>| {
        let mut history = revoked();
        history.change(Effect::Restore, restored - MS, restored);
        if let Some(state) = fault {
            history.fault(state, restored - S, restored + S);
        }
        history.probe(restored + after, Outcome::Refused);
        history.wrong()
    };
    assert_eq!(refused_at(BOUNDS.activation - 1, None), 0);
    assert_eq!(refused_at(BOUNDS.activation, None), 1);
    assert_eq!(refused_at(BOUNDS.activation, Some(State::FeedSilent)), 0);
    assert_eq!(refused_at(BOUNDS.feed_silent, Some(State::FeedSilent)), 1);
}

#[test]
fn a_refusal_whose_answer_comes_after_a_revocation_has_begun_is_right() {
    let mut history = revoked();
    assert_eq!(history.probe_until(REVOKED - 5 * S, REVOKED + 1, Outcome::Refused).wrong(), 0);
    assert_eq!(history.probe_until(REVOKED - 5 * S, REVOKED, Outcome::Refused).wrong(), 1);
}

#[test]
fn a_revocation_takes_until_the_first_refusal_that_lasts() {
    let mut history = revoked();
    history.probe(REVOKED - 5 * MS, Outcome::Allow);
    history.probe(REVOKE_END + 4 * MS, Outcome::Allow);
    assert_eq!(history.took(), [None]);
    history.probe(REVOKE_END + 9 * MS, Outcome::Refused);
    history.probe(REVOKE_END + 14 * MS, Outcome::Refused);
    // Allowed again because it is valid again.
    history.change(Effect::Restore, REVOKED + 10 * S, REVOKED + 10 * S);
    history.probe_until(REVOKED + 10 * S - MS, REVOKED + 10 * S + MS, Outcome::Allow);
    assert_eq!(history.took(), [Some(9 * MS)]);
    let latency = history.judge().latencies[0];
    assert_eq!((latency.replica, latency.state), (0, State::Healthy));
}

#[test]
fn a_refusal_before_the_reply_to_the_commit_took_no_time() {
    let mut history = revoked();
    history.probe(REVOKED + 1, Outcome::Refused).probe(REVOKE_END + MS, Outcome::Refused);
    assert_eq!(history.took(), [Some(0)]);
}

#[test]
fn figures_are_of_the_nearest_rank() {
    assert_eq!(Figures::of(Vec::new()), None);
    assert_eq!(Figures::of(vec![5]), Some(Figures { count: 1, p50: 5, p99: 5, max: 5 }));
    let hundred = Figures::of((1..=200).rev().collect());
    assert_eq!(hundred, Some(Figures { count: 200, p50: 100, p99: 198, max: 200 }));
}
