//! Places for new blocks.
//!
//! New blocks go behind everything that is there, one after the other, so that no space is given out twice: before the
//! first write to an image its whole table is read, and refused if two blocks overlap. (The table of the largest disk
//! has 4 MiB.) Blocks are placed so that their data begins at a multiple of 4 KiB, as Windows places them.

use std::collections::HashMap;

use block::num::align_up;
use block::{Error as BlockError, ErrorKind, Result, Storage};

use crate::container::Container;
use crate::error::Error;
use crate::footer::FOOTER_BYTES;
use crate::header::DynamicHeader;
use crate::table::{SECTOR, Table};

/// What the data of new blocks begins at a multiple of, in bytes.
const ALIGN: u64 = 4096;
/// The most blocks that are examined before writing.
const MAX_BLOCKS: u64 = 1 << 24;

/// The end of what is in use.
#[derive(Debug)]
pub(crate) struct Alloc {
    /// One past the last byte in use.
    next: u64,
    /// Bytes before this one may be anything; those behind it are zeros as long as nobody has written to them.
    junk_end: u64,
    /// Where the last footer is, if it is good.
    pub(crate) footer_at: Option<u64>,
    /// Places that were set aside for blocks.
    pub(crate) reserved: HashMap<u64, Place>,
}

/// A place for a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// From here to the bitmap there is nothing; what is there is the former footer.
    pub(crate) gap: u64,
    /// Host offset of the bitmap.
    pub(crate) offset: u64,
    /// Bytes before this one may be anything.
    pub(crate) junk_end: u64,
}

impl Alloc {
    /// Looks at all blocks of an image that is to be written.
    pub(crate) fn new(container: &Container, header: &DynamicHeader, table: &Table) -> Result<Self> {
        let storage = &*container.storage;
        if table.blocks > MAX_BLOCKS {
            return Err(Error::TooManyBlocks(header.entries).into());
        }
        let mut used = vec![];
        let limit = container.data_end();
        for index in 0..table.blocks {
            if let Some(offset) = table.place(storage, index, limit)? {
                used.push((offset, index));
            }
        }
        used.sort_unstable();
        for pair in used.windows(2) {
            let [(offset, index), (next, other)] = pair else { continue };
            if offset + table.used_len(*index) > *next {
                return Err(Error::BlocksOverlap { index: *other, offset: *next, other: *index }.into());
            }
        }
        let whole = table.bitmap_bytes + table.block_size;
        let blocks_end = used.last().map_or(0, |(offset, _)| offset + whole);
        let mut next = blocks_end.max(table.metadata_end()).next_multiple_of(SECTOR);
        let junk_end = if storage.fixed_len() { u64::MAX } else { container.file_len };
        if container.ends.end.is_none() && !storage.fixed_len() {
            // Somebody was stopped here. What they left behind is nobody's, but it is not ours to cut off either.
            next = next.max(container.file_len.next_multiple_of(SECTOR));
        }
        Ok(Self { next, junk_end, footer_at: container.ends.end, reserved: HashMap::new() })
    }

    /// Sets a place aside for a block. The caller writes the footer behind it before it uses the place.
    pub(crate) fn place(&mut self, table: &Table) -> Result<Place> {
        let gap = self.next;
        let offset = align_up(gap + table.bitmap_bytes, ALIGN).ok_or(Error::Full)? - table.bitmap_bytes;
        if offset / SECTOR >= u64::from(u32::MAX) {
            return Err(Error::Full.into());
        }
        self.next = offset + table.bitmap_bytes + table.block_size;
        Ok(Place { gap, offset, junk_end: self.junk_end })
    }

    /// One past the last byte that may be a block's.
    pub(crate) fn limit(&self) -> u64 {
        self.next
    }

    /// Makes sure that a footer stands behind all places.
    pub(crate) fn settle_footer(&mut self, storage: &dyn Storage, footer: &[u8]) -> Result<()> {
        if self.footer_at.is_some_and(|at| at >= self.next) {
            return Ok(());
        }
        let at = if storage.fixed_len() { storage.len()?.saturating_sub(FOOTER_BYTES) } else { self.next };
        if at < self.next {
            return Err(BlockError::new(ErrorKind::NoSpace, "the device has no room for another block"));
        }
        storage.write_at(footer, at)?;
        self.footer_at = Some(at);
        Ok(())
    }

    /// Gives back the places at the end that were not used. `true`: the file may be cut behind the footer, which is
    /// not written yet.
    pub(crate) fn release(&mut self, table: &Table) -> bool {
        let mut places: Vec<Place> = self.reserved.drain().map(|(_, place)| place).collect();
        places.sort_unstable_by_key(|place| std::cmp::Reverse(place.offset));
        let before = self.next;
        for place in places {
            if place.offset + table.bitmap_bytes + table.block_size != self.next {
                break;
            }
            self.next = place.gap;
        }
        if self.next < before {
            self.footer_at = None;
        }
        self.next < before
    }
}
