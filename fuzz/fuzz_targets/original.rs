//! libFuzzer's door to `src/targets/original.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("original", data));
