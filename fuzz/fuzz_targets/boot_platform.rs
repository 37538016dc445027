#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bootcheck::fuzz::fuzz_platform(data));
