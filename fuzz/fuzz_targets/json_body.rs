//! libFuzzer's door to `src/targets/json_body.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("json_body", data));
