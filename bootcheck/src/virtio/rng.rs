//! The entropy device (section 5.4): a guest that boots without it may wait for randomness for a long time.

use super::{Chain, Device, RingError};
use crate::memory::GuestRam;

/// Most bytes that one request gets.
const MAX_BYTES: u64 = 1 << 16;

/// The device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rng;

impl Device for Rng {
    fn id(&self) -> u16 {
        4
    }

    fn pci_class(&self) -> (u8, u8, u8) {
        // "Other" device; the class does not matter to any driver.
        (0xff, 0, 0)
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn config_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn serve(&self, chain: &Chain, ram: &GuestRam, buffer: &mut Vec<u8>) -> Result<u32, RingError> {
        let len = chain.writable_len().min(MAX_BYTES);
        buffer.resize(block::num::to_usize(len), 0);
        // A host without randomness: the guest gets none.
        if getrandom::fill(buffer).is_err() {
            return Ok(0);
        }
        chain.writer().write(ram, buffer)?;
        Ok(block::num::low_u32(len))
    }
}
