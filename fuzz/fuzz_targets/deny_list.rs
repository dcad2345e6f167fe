//! libFuzzer's door to `src/targets/deny_list.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("deny_list", data));
