//! libFuzzer's door to `src/targets/sealed_entry.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("sealed_entry", data));
