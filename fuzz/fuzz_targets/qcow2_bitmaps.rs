#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::qcow2_bitmaps(data));
