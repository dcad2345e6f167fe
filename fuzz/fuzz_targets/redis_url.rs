//! libFuzzer's door to `src/targets/redis_url.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("redis_url", data));
