//! The fuzz targets by name, for libFuzzer's doors in `fuzz_targets/`.
//!
//! What they do is in `targets/`, which Keyward's own tests include too, so that the corpora are replayed without
//! libFuzzer.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a panic is how a target reports")]

mod targets;

/// Runs one target on one input. Panics where it has found something.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = targets::ALL.iter().find(|(own, _)| *own == name).expect("a known target");
    target(data);
}
