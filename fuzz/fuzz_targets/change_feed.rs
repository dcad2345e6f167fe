//! libFuzzer's door to `src/targets/change_feed.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("change_feed", data));
