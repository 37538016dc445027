//! The log (section 2.3): a ring of entries, each a list of changes to the file, guarded by a checksum.
//!
//! ```text
//!   entry:  | header | descriptors ..| .. descriptors | data sector | data sector | ..   all of them 4 KiB
//! ```
//!
//! An entry carries a number one greater than that of the entry before it, and says where the oldest entry is that
//! still counts (its *tail*). The entries that count are the *active sequence*: it ends in the greatest number and
//! begins with the tail of its last entry. Whatever was torn by a crash has a wrong checksum and is not part of it.
//!
//! * [`entry`] reads and builds one entry,
//! * [`scan`] finds the active sequence,
//! * [`replay`] makes its changes, in memory or on the disk.

pub mod entry;
pub mod replay;
pub mod scan;

use std::sync::Arc;

use block::num::{len_of, to_usize};
use block::{Result, Storage};

/// Bytes of what logs and changes are counted in.
pub const SECTOR: u64 = 4096;
/// The same, as the length of an array.
pub const SECTOR_LEN: usize = 4096;

/// The ring that the entries lie in.
#[derive(Debug, Clone)]
pub struct Ring {
    storage: Arc<dyn Storage>,
    offset: u64,
    length: u64,
}

impl Ring {
    /// `length` bytes at `offset` of `storage`, both multiples of 1 MiB.
    pub fn new(storage: Arc<dyn Storage>, offset: u64, length: u64) -> Self {
        Self { storage, offset, length }
    }

    /// Bytes of it.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The position `by` bytes further on (`by` at most the length).
    pub fn advance(&self, position: u64, by: u64) -> u64 {
        (position + by) % self.length
    }

    /// The parts of `len` bytes at `position`, at most the length of the ring: up to its end, and from its start.
    fn parts(&self, position: u64, len: usize) -> (u64, usize) {
        let first = to_usize((self.length - position).min(len as u64));
        (self.offset + position, first)
    }

    /// Whether `len` bytes at `position` are known to be zeros because they are a hole of the file.
    ///
    /// # Errors
    /// The host failed.
    pub fn is_hole(&self, position: u64, len: u64) -> Result<bool> {
        let at = self.offset + position;
        if at >= self.storage.len()? {
            return Ok(true);
        }
        let extent = self.storage.extent(at, len)?;
        Ok(!extent.data && extent.len >= len)
    }

    /// Fills `buf` from `position`, going on at the start behind the end.
    ///
    /// # Errors
    /// The host failed.
    pub fn read(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let (at, first) = self.parts(position, buf.len());
        let (head, rest) = buf.split_at_mut(first);
        self.storage.read_at(head, at)?;
        if rest.is_empty() { Ok(()) } else { self.storage.read_at(rest, self.offset) }
    }

    /// Writes `bytes` at `position`, going on at the start behind the end.
    ///
    /// # Errors
    /// The host failed.
    pub fn write(&self, bytes: &[u8], position: u64) -> Result<()> {
        debug_assert!(len_of(bytes) <= self.length);
        let (at, first) = self.parts(position, bytes.len());
        let (head, rest) = bytes.split_at(first);
        self.storage.write_at(head, at)?;
        if rest.is_empty() { Ok(()) } else { self.storage.write_at(rest, self.offset) }
    }
}
