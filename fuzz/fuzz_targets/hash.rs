//! libFuzzer's door to `src/targets/hash.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("hash", data));
