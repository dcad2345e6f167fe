//! libFuzzer's door to `src/targets/check_text.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("check_text", data));
