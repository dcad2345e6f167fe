//! libFuzzer's door to `src/targets/multipart_body.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("multipart_body", data));
