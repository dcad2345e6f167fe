//! The simulation, run: without a mutant nothing may go wrong, with each of them something has to.

use super::simulation::{MUTANTS, Mutant, Simulation, Tally};

/// Events of one run; a fresh world each time, so that early states are seen often.
const EVENTS: u64 = 20_000;

/// A million events at least; more where asked for.
fn seeds() -> u64 {
    std::env::var("KEYWARD_TRUTH_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
}

fn run(seed: u64, mutant: Option<Mutant>, total: &mut Tally) -> Result<(), String> {
    let mut simulation = Simulation::new(seed, mutant);
    let outcome = (0..EVENTS).try_for_each(|_| simulation.step());
    total.add(&simulation.tally);
    outcome.map_err(|violation| format!("seed {seed}, event {}: {violation}", simulation.tally.events))
}

#[test]
fn no_replica_uses_what_the_bound_forbids_in_a_million_simulated_events() {
    let mut total = Tally::default();
    for seed in 0..seeds() {
        if let Err(violation) = run(seed, None, &mut total) {
            panic!("{violation}");
        }
    }
    println!("simulation: {total:?}, violations 0");
    assert!(total.events >= 1_000_000 || seeds() < 50);
    // Everything that the bound is about has happened, and often.
    let happened = [
        total.revocations,
        total.allowed_from_memory,
        total.allowed_from_redis,
        total.allowed_in_outage,
        total.read_through,
        total.refused,
        total.unavailable,
        total.fills_dropped,
        total.sessions,
    ];
    assert!(happened.iter().all(|count| *count > 500), "{total:?}");
}

#[test]
fn every_mutant_of_the_rules_is_caught_by_the_simulation() {
    let mut survivors = Vec::new();
    for mutant in MUTANTS {
        let mut total = Tally::default();
        // Ends when it is caught. Which prefixes share a shard differs from run to run, so a rare one gets more time than
        // the rules have: one in twenty runs did not catch it within theirs.
        match (0..10 * seeds()).find_map(|seed| run(seed, Some(mutant), &mut total).err()) {
            Some(violation) => {
                println!("simulation: {mutant:?} caught after {} events: {violation}", total.events);
            }
            None => survivors.push(mutant),
        }
    }
    assert!(survivors.is_empty(), "not caught: {survivors:?}");
}
