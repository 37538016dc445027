//! A container in memory, for tests and temporary overlays.

use parking_lot::RwLock;

use crate::device::ZeroMode;
use crate::error::Result;
use crate::num::to_usize;
use crate::storage::{HostExtent, Storage};

/// Bytes in memory. Grows when written past its end.
#[derive(Debug, Default)]
pub struct MemStorage {
    bytes: RwLock<Vec<u8>>,
}

impl MemStorage {
    /// An empty container.
    pub fn new() -> Self {
        Self::default()
    }

    /// A container that holds `bytes`.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes: RwLock::new(bytes) }
    }

    /// A copy of the contents.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.bytes.read().clone()
    }

    /// The part of `offset..offset + len` that exists, as indices.
    fn existing(bytes: &[u8], offset: u64, len: u64) -> std::ops::Range<usize> {
        let end = offset.saturating_add(len).min(bytes.len() as u64);
        to_usize(offset.min(end))..to_usize(end)
    }
}

impl Storage for MemStorage {
    fn len(&self) -> Result<u64> {
        Ok(self.bytes.read().len() as u64)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.bytes.write().resize(to_usize(len), 0);
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let bytes = self.bytes.read();
        let existing = &bytes[Self::existing(&bytes, offset, buf.len() as u64)];
        let (head, tail) = buf.split_at_mut(existing.len());
        head.copy_from_slice(existing);
        tail.fill(0);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut bytes = self.bytes.write();
        let end = to_usize(offset) + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[to_usize(offset)..end].copy_from_slice(buf);
        Ok(())
    }

    fn zero_range(&self, offset: u64, len: u64, _mode: ZeroMode) -> Result<()> {
        let mut bytes = self.bytes.write();
        let end = to_usize(offset + len);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[to_usize(offset)..end].fill(0);
        Ok(())
    }

    fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        let mut bytes = self.bytes.write();
        let range = Self::existing(&bytes, offset, len);
        bytes[range].fill(0);
        Ok(())
    }

    fn allocate_range(&self, offset: u64, len: u64) -> Result<()> {
        let mut bytes = self.bytes.write();
        let end = to_usize(offset + len);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn extent(&self, _offset: u64, max_len: u64) -> Result<HostExtent> {
        Ok(HostExtent { data: true, len: max_len })
    }

    fn read_only(&self) -> bool {
        false
    }

    fn name(&self) -> String {
        "memory".to_owned()
    }
}
