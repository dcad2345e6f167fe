//! libFuzzer's door to `src/targets/store_url.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("store_url", data));
