//! The disk through which payloads go.

use std::fs::{File, OpenOptions};
use std::io::Result;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::sys;
use crate::wire::WINDOW;

/// Direct requests are aligned to this, in memory and on the disk.
const ALIGNMENT: usize = 4096;

/// The disk, past the page cache: the host changes it behind the kernel's back.
#[derive(Debug)]
pub(crate) struct Mailbox(File);

impl Mailbox {
    pub(crate) fn open(device: &Path) -> Result<Self> {
        OpenOptions::new().read(true).write(true).custom_flags(sys::O_DIRECT).open(device).map(Self)
    }

    /// The first `len` bytes of the host's half.
    pub(crate) fn read(&self, len: usize) -> Result<Vec<u8>> {
        let mut buffer = Aligned::new(len);
        self.0.read_exact_at(buffer.bytes(), 0)?;
        Ok(buffer.bytes()[..len].to_vec())
    }

    /// Writes to the init's half.
    pub(crate) fn write(&self, payload: &[u8]) -> Result<()> {
        let mut buffer = Aligned::new(payload.len());
        buffer.bytes()[..payload.len()].copy_from_slice(payload);
        self.0.write_all_at(buffer.bytes(), u64::from(WINDOW))
    }
}

/// Memory that begins and ends where direct requests may.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let len = len.next_multiple_of(ALIGNMENT);
        let memory = vec![0; len + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_long_enough() {
        for len in [0, 1, 4095, 4096, 4097, 100_000] {
            let mut buffer = Aligned::new(len);
            let bytes = buffer.bytes();
            assert!(bytes.len() >= len && bytes.len().is_multiple_of(ALIGNMENT));
            assert_eq!(bytes.as_ptr() as usize % ALIGNMENT, 0);
        }
    }
}
