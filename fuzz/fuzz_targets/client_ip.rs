//! libFuzzer's door to `src/targets/client_ip.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| keyward_fuzz::run("client_ip", data));
