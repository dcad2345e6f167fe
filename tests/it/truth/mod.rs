//! The truth about revocation: real processes are probed without a pause while keys are revoked and things break, and
//! the history of all of it is held against the bounds.

mod admin;
mod fleet;
mod history;
mod history_tests;
mod proxy;
mod real;
mod report;
