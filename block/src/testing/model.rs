//! A disk that is obviously right, to compare others with.
//!
//! A test turns arbitrary numbers into operations, does each to the model and to the disk under test, and
//! compares. With proptest:
//!
//! ```ignore
//! proptest! {
//!     #[test]
//!     fn agrees(raw in proptest::collection::vec(any::<[u64; 3]>(), 1..50)) {
//!         let mut model = Model::new(SIZE);
//!         for raw in raw {
//!             let op = Op::from_raw(raw, SIZE);
//!             op.run(&device)?;
//!             model.apply(&op);
//!         }
//!         model.compare(&device);
//!     }
//! }
//! ```

use crate::device::{BlockDevice, ZeroMode};
use crate::error::Result;
use crate::num::to_usize;
use crate::testing::Random;

/// One thing to do to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Writes the noise with number `seed`.
    Write {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Which noise. 0 writes zeros, by an ordinary write.
        seed: u64,
    },
    /// Writes zeros.
    Zero {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// How.
        mode: ZeroMode,
    },
    /// Discards.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Reads (the model's [`compare_range`](Model::compare_range) does it).
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Flushes.
    Flush,
    /// Closes the disk and opens it again: left to the test.
    Reopen,
}

impl Op {
    /// Turns three arbitrary numbers into an operation on a disk of `size` bytes. Half of the places are
    /// multiples of 512, lengths are mostly small, sometimes up to a quarter of the disk.
    pub fn from_raw(raw: [u64; 3], size: u64) -> Self {
        let [what, place, extra] = raw;
        let mut random = Random::new(extra);
        let align = [1, 512, 4096, 512][to_usize(random.below(4))];
        let offset = (place.checked_rem(size).unwrap_or(0) / align) * align;
        let longest = [512, 4096, 65536, size / 4][to_usize(random.below(4))];
        let len = (random.below(longest.max(1)) + 1).next_multiple_of(align).min(size - offset);
        let mode = ZeroMode { may_unmap: random.once_in(2), no_fallback: false };
        match what % 16 {
            0..=7 => Self::Write { offset, len, seed: random.next_u64() * u64::from(!random.once_in(8)) },
            8..=10 => Self::Zero { offset, len, mode },
            11 => Self::Discard { offset, len },
            12 | 13 => Self::Read { offset, len },
            14 => Self::Flush,
            _ => Self::Reopen,
        }
    }

    /// `count` operations, the same for the same `seed`.
    pub fn sequence(count: usize, size: u64, seed: u64) -> Vec<Self> {
        let mut random = Random::new(seed);
        let raw = std::iter::repeat_with(|| [random.next_u64(), random.next_u64(), random.next_u64()]);
        raw.take(count).map(|raw| Self::from_raw(raw, size)).collect()
    }

    /// What a write writes.
    pub fn contents(len: u64, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(len)];
        if seed != 0 {
            Random::new(seed).fill(&mut bytes);
        }
        bytes
    }

    /// Does it to a disk. Reads are read and dropped; a reopen does nothing.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn run(&self, device: &dyn BlockDevice) -> Result<()> {
        match *self {
            Self::Write { offset, len, seed } => device.write_at(&Self::contents(len, seed), offset),
            Self::Zero { offset, len, mode } => device.write_zeroes_at(offset, len, mode),
            Self::Discard { offset, len } => device.discard_at(offset, len),
            Self::Read { offset, len } => device.read_at(&mut vec![0; to_usize(len)], offset),
            Self::Flush => device.flush(),
            Self::Reopen => Ok(()),
        }
    }
}

/// The bytes that a disk must show. Discarded bytes may show what they were or zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Model {
    bytes: Vec<u8>,
    discarded: Vec<bool>,
}

impl Model {
    /// A disk of `size` zeros.
    pub fn new(size: u64) -> Self {
        Self::from_bytes(vec![0; to_usize(size)])
    }

    /// A disk that shows `bytes`.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { discarded: vec![false; bytes.len()], bytes }
    }

    /// What the disk shows where nothing is discarded.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let range = to_usize(offset)..to_usize(offset) + data.len();
        self.bytes[range.clone()].copy_from_slice(data);
        self.discarded[range].fill(false);
    }

    /// Does what [`Op::run`] does to a disk.
    pub fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write { offset, len, seed } => self.write(offset, &Op::contents(len, seed)),
            Op::Zero { offset, len, .. } => self.write(offset, &vec![0; to_usize(len)]),
            Op::Discard { offset, len } => {
                self.discarded[to_usize(offset)..to_usize(offset + len)].fill(true);
            }
            Op::Read { .. } | Op::Flush | Op::Reopen => {}
        }
    }

    /// Cuts off, or adds zeros.
    pub fn resize(&mut self, size: u64) {
        self.bytes.resize(to_usize(size), 0);
        self.discarded.resize(to_usize(size), false);
    }

    /// The first byte from `offset` on that `shown` shows and must not.
    pub fn find_difference(&self, shown: &[u8], offset: u64) -> Option<u64> {
        let start = to_usize(offset);
        let expected = &self.bytes[start..start + shown.len()];
        if shown == expected {
            return None;
        }
        let discarded = &self.discarded[start..];
        let wrong =
            (0..shown.len()).find(|&i| shown[i] != expected[i] && !(discarded[i] && shown[i] == 0))?;
        Some(offset + wrong as u64)
    }

    /// Reads a range of a disk and compares.
    ///
    /// # Errors
    /// A sentence about the first difference or the disk's failure.
    pub fn compare_range(
        &self,
        device: &dyn BlockDevice,
        offset: u64,
        len: u64,
    ) -> std::result::Result<(), String> {
        let mut shown = vec![0; to_usize(len)];
        device
            .read_at(&mut shown, offset)
            .map_err(|error| format!("reading {len} at {offset:#x}: {error}"))?;
        match self.find_difference(&shown, offset) {
            None => Ok(()),
            Some(at) => Err(format!(
                "byte {at:#x} is {:#04x}, expected {:#04x}",
                shown[to_usize(at - offset)],
                self.bytes[to_usize(at)]
            )),
        }
    }

    /// Compares size and contents of a whole disk.
    ///
    /// # Errors
    /// As [`compare_range`](Self::compare_range).
    pub fn compare(&self, device: &dyn BlockDevice) -> std::result::Result<(), String> {
        let size = self.bytes.len() as u64;
        if device.size() != size {
            return Err(format!("the size is {}, expected {size}", device.size()));
        }
        self.compare_range(device, 0, size)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::mem::MemStorage;
    use crate::raw::{Raw, RawOptions};

    #[test]
    fn a_memory_disk_agrees_and_a_changed_byte_is_noticed() {
        const SIZE: u64 = 200_000;
        let storage = Arc::new(MemStorage::from_bytes(vec![0; to_usize(SIZE)]));
        let device = Raw::open(Arc::clone(&storage) as _, RawOptions::default()).unwrap();
        let mut model = Model::new(SIZE);
        let ops = Op::sequence(300, SIZE, 1);
        let kinds = [
            ops.iter().any(|op| matches!(op, Op::Write { .. })),
            ops.iter().any(|op| matches!(op, Op::Zero { .. })),
            ops.iter().any(|op| matches!(op, Op::Discard { .. })),
            ops.iter().any(|op| matches!(op, Op::Flush)),
        ];
        assert_eq!(kinds, [true; 4]);
        for op in &ops {
            op.run(&device).unwrap();
            model.apply(op);
            model.compare(&device).unwrap();
        }
        let mut byte = [0];
        storage.read_at(&mut byte, 777).unwrap();
        storage.write_at(&[byte[0] ^ 0x55], 777).unwrap();
        model.write(777, &byte);
        assert!(model.compare(&device).unwrap_err().contains("0x309"));
    }

    use crate::Storage;

    #[test]
    fn discarded_bytes_show_the_old_or_zero_and_nothing_else() {
        let mut model = Model::from_bytes(vec![5; 8]);
        model.apply(&Op::Discard { offset: 2, len: 4 });
        assert_eq!(model.find_difference(&[5; 8], 0), None);
        assert_eq!(model.find_difference(&[5, 5, 0, 5, 0, 0, 5, 5], 0), None);
        assert_eq!(model.find_difference(&[5, 5, 0, 7, 0, 0, 5, 5], 0), Some(3));
        assert_eq!(model.find_difference(&[0, 5], 1), Some(1));
    }
}
