//! Freshness: how long a record may be used, and what proves that nothing has changed since it was read.
//!
//! The rules of guarantees 3 and 4, pure: time and messages are arguments. `docs/consistency.md` states the bound and
//! proves it from what is here.
//!
//! - [`coverage`]: what one session with the store has proven, and so how old a record may be said to be;
//! - [`session`]: that session's own life: heartbeats, echoes, changes;
//! - [`change`]: what a change message says;
//! - [`snapshot`]: which transactions a query has seen;
//! - [`shared`]: which records that others read may be believed.

pub mod change;
pub mod coverage;
pub mod session;
pub mod shared;
pub mod snapshot;
