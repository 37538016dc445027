//! The block map.

use block::pages::Pages;
use block::{Result, Storage};

use crate::error::Error;
use crate::header::Header;

/// Nothing is stored: the parent's bytes, or zeros.
const FREE: u32 = u32::MAX;
/// Zeros, whatever the parent says ("discarded").
const ZERO: u32 = u32::MAX - 1;
/// Bytes of a page of the map in memory.
const PAGE: u64 = 4096;
/// Bytes of the map that are kept in memory: all of it, for disks of up to a TiB.
const CACHE: u64 = 4 << 20;

/// What the map says of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Not stored.
    Free,
    /// Zeros.
    Zero,
    /// The number of a block of data.
    Data(u32),
}

impl Entry {
    pub(crate) fn decode(word: [u8; 4]) -> Self {
        match u32::from_le_bytes(word) {
            FREE => Self::Free,
            ZERO => Self::Zero,
            number => Self::Data(number),
        }
    }

    fn encode(self) -> [u8; 4] {
        match self {
            Self::Free => FREE,
            Self::Zero => ZERO,
            Self::Data(number) => number,
        }
        .to_le_bytes()
    }
}

/// The map, and where blocks lie.
#[derive(Debug)]
pub(crate) struct Map {
    pages: Pages,
    start: u64,
    data: u64,
    size: u64,
    /// Blocks of the disk.
    pub(crate) blocks: u64,
    /// Guest bytes of a block.
    pub(crate) block_size: u64,
}

impl Map {
    pub(crate) fn new(header: &Header) -> Self {
        let start = u64::from(header.map_offset);
        Self {
            pages: Pages::new(start, start + header.map_bytes(), PAGE, CACHE),
            start,
            data: u64::from(header.data_offset),
            size: header.disk_size,
            blocks: header.needed_blocks(),
            block_size: u64::from(header.block_size),
        }
    }

    pub(crate) fn pages(&self) -> &Pages {
        &self.pages
    }

    /// What the map says of a block of the disk.
    pub(crate) fn entry(&self, storage: &dyn Storage, index: u64) -> Result<Entry> {
        self.pages.word(storage, self.start + 4 * index).map(Entry::decode)
    }

    /// Changes what the map says, in memory.
    pub(crate) fn set(&self, storage: &dyn Storage, index: u64, entry: Entry) -> Result<()> {
        self.pages.change(storage, self.start + 4 * index, 4, |word| word.copy_from_slice(&entry.encode()))
    }

    /// The host offset of a block of data.
    pub(crate) fn offset_of(&self, number: u32) -> u64 {
        self.data + u64::from(number) * self.block_size
    }

    /// Guest bytes of a block: fewer than the others' for the last one.
    pub(crate) fn used_len(&self, index: u64) -> u64 {
        self.block_size.min(self.size.saturating_sub(index * self.block_size))
    }

    /// The host offset of a block of the disk, if it lies before `limit`.
    pub(crate) fn check_place(&self, index: u64, number: u32, limit: u64) -> std::result::Result<u64, Error> {
        let offset = self.offset_of(number);
        if offset + self.used_len(index) > limit {
            return Err(Error::BlockOutsideFile { index, offset, file_len: limit });
        }
        Ok(offset)
    }

    /// Calls `each` with what the map says of the blocks from `index` on, until it says that it has seen enough or
    /// there are no more.
    pub(crate) fn walk(
        &self,
        storage: &dyn Storage,
        mut index: u64,
        mut each: impl FnMut(u64, Entry) -> Result<bool>,
    ) -> Result<()> {
        let mut buf = [0; block::num::to_usize(PAGE)];
        while index < self.blocks {
            let at = 4 * index;
            let len = (PAGE - at % PAGE).min(4 * (self.blocks - index));
            let words = &mut buf[..block::num::to_usize(len)];
            self.pages.read(storage, words, self.start + at)?;
            for word in words.as_chunks::<4>().0 {
                if !each(index, Entry::decode(*word))? {
                    return Ok(());
                }
                index += 1;
            }
        }
        Ok(())
    }
}
