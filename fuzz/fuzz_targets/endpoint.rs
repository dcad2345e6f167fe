//! libFuzzer's door to `src/targets/endpoint.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("endpoint", data));
