//! Sector bitmaps (section 2.4): which sectors of a partly present block are the file's own.
//!
//! They are only read here: a block that is written becomes present as a whole, and its bits do not count any more.

use std::collections::HashMap;
use std::sync::Arc;

use block::num::to_usize;
use block::{Result, Storage};
use parking_lot::Mutex;

/// Bytes of bitmaps that are kept.
const MAX_BYTES: usize = 8 << 20;

/// The bits of a block: bit n of byte m for sector 8 m + n.
#[derive(Debug)]
pub(crate) struct Bits(Vec<u8>);

impl Bits {
    /// Whether sector `first` is present, and how many of the `max` sectors from there on (at least 1) are as it is.
    pub(crate) fn run(&self, first: u64, max: u64) -> (bool, u64) {
        let present = self.bit(first);
        let whole = if present { 0xff } else { 0 };
        let end = first + max;
        let mut at = first + 1;
        while at < end {
            if at.is_multiple_of(8) && self.0.get(to_usize(at / 8)) == Some(&whole) {
                at += 8;
            } else if self.bit(at) == present {
                at += 1;
            } else {
                break;
            }
        }
        (present, at.min(end) - first)
    }

    fn bit(&self, sector: u64) -> bool {
        self.0.get(to_usize(sector / 8)).is_some_and(|byte| byte >> (sector % 8) & 1 == 1)
    }
}

/// The bitmaps that have been read last.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps(Mutex<HashMap<u64, Arc<Bits>>>);

impl Bitmaps {
    /// The bits of `block`, which lie in `len` bytes at `offset`.
    pub(crate) fn get(&self, storage: &dyn Storage, block: u64, offset: u64, len: u64) -> Result<Arc<Bits>> {
        if let Some(bits) = self.0.lock().get(&block) {
            return Ok(Arc::clone(bits));
        }
        let mut bytes = vec![0; to_usize(len)];
        storage.read_at(&mut bytes, offset)?;
        let bits = Arc::new(Bits(bytes));
        let mut kept = self.0.lock();
        if (kept.len() + 1) * to_usize(len) > MAX_BYTES {
            kept.clear();
        }
        kept.insert(block, Arc::clone(&bits));
        Ok(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_a_bit_differs() {
        let bits = Bits(vec![0b0000_0111, 0, 0xff, 0xff, 0b0000_0001]);
        assert_eq!(bits.run(0, 40), (true, 3));
        assert_eq!(bits.run(1, 1), (true, 1));
        assert_eq!(bits.run(3, 40), (false, 13));
        assert_eq!(bits.run(16, 24), (true, 17));
        assert_eq!(bits.run(16, 10), (true, 10));
        assert_eq!(bits.run(33, 7), (false, 7));
        assert_eq!(bits.run(100, 5), (false, 5), "past the end nothing is present");
    }
}
