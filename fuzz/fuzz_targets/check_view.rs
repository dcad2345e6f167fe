//! libFuzzer's door to `src/targets/check_view.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("check_view", data));
