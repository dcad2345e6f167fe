//! What is remembered, in memory and in Redis.
