//! Metrics, logs and traces: a leaf that may name domain enums as labels and nothing else.

pub mod decision_log;
pub mod gauges;
pub mod labels;
pub mod logging;
pub mod metrics;
mod post;
mod process;
mod striped;
pub mod traces;
