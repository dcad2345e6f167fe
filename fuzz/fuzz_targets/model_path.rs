//! libFuzzer's door to `src/targets/model_path.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("model_path", data));
