//! The revocation bound, proven: a simulation, an exhaustive model, and real processes whose history is judged.

pub(crate) mod admin;
pub(crate) mod fleet;
pub(crate) mod history;
mod history_tests;
mod model;
mod model_runs;
pub(crate) mod proxy;
mod real;
mod report;
mod simulation;
mod simulation_runs;
