//! libFuzzer's door to `src/targets/row.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("row", data));
