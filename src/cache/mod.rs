//! What is remembered, in memory and in Redis: records for a short time, verdicts for longer, decisions never.
//!
//! Knows no wire, no store and no policy. Memory is bounded by entries; Redis is not trusted, so what goes there is
//! sealed and what comes back may at most be a miss.

pub mod breaker;
#[doc(hidden)]
pub mod fuzzing;
pub mod interned;
pub mod records;
pub mod redis;
pub mod redis_url;
pub mod secrets;
pub mod verdict_name;
pub mod verdicts;

mod calls;
mod entry;
mod links;
mod names;
mod ration;
mod rejections;
mod seal;
