//! Buffers at aligned addresses, which `O_DIRECT` demands, without `unsafe`: a little more than needed is
//! allocated and the aligned part of it is used.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// A heap buffer of zeros to start with, whose first byte lies at a multiple of a given power of two.
pub struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zero bytes at an address that is a multiple of `align` bytes (a power of two).
    pub fn new(len: usize, align: usize) -> Self {
        debug_assert!(align.is_power_of_two());
        let memory = vec![0; len + align - 1];
        let start = memory.as_ptr().addr().wrapping_neg() & (align - 1);
        Self { memory, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// Whether the first byte of `buf` lies at a multiple of `align` (a power of two).
#[inline]
pub fn is_aligned_address(buf: &[u8], align: usize) -> bool {
    buf.as_ptr().addr() & (align - 1) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_stay_so_when_moved() {
        for align in [1, 2, 512, 4096, 1 << 16] {
            for len in [0, 1, 511, 4096, 100_000] {
                let mut buf = AlignedBuf::new(len, align);
                assert!(is_aligned_address(&buf, align));
                buf.fill(7);
                let moved = Box::new(buf);
                assert!(is_aligned_address(&moved, align));
                assert_eq!(moved.len(), len);
                assert!(moved.iter().all(|&byte| byte == 7));
            }
        }
    }
}
