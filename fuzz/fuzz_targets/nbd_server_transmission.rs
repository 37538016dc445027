#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::nbd_server_transmission(data));
