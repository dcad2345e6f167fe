//! The revocation bound, proven: a simulation, and real processes whose history is judged.

mod admin;
mod fleet;
mod history;
mod history_tests;
mod proxy;
mod real;
mod report;
mod simulation;
mod simulation_runs;
