//! Metrics and logs: a leaf that may name domain enums as labels and nothing else.

pub mod decision_log;
pub mod logging;
pub mod metrics;
