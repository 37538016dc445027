#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::file_system(data));
