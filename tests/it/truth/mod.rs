//! The revocation bound, proven: a simulation, an exhaustive model, and real processes whose history is judged.

mod admin;
mod fleet;
mod history;
mod history_tests;
mod model;
mod model_runs;
mod proxy;
mod real;
mod report;
mod simulation;
mod simulation_runs;
