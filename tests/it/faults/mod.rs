//! What breaks around Keyward and inside of its machine, one thing after the other, under load and with rights that change
//! meanwhile; what every caller heard is judged.
//!
//! `make test` runs a short set, `make faults` all of them, and writes docs/reliability.md.

mod backends;
mod caches;
mod catalogue;
mod load;
mod machine;
mod page;
mod run;
mod site;
