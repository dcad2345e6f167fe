//! The truth: Postgres or SQLite, read and written in the contract's schema.

pub mod admin;
