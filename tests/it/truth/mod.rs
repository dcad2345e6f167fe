//! The revocation bound, proven: a simulation, an exhaustive model, and real processes.

mod simulation;
mod simulation_runs;
