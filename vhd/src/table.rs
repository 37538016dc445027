//! The block allocation table, and where blocks may lie.

use block::pages::Pages;
use block::{Result, Storage};

use crate::container::Container;
use crate::error::Error;
use crate::header::DynamicHeader;

/// An entry of a block that is not there.
pub(crate) const UNUSED: u32 = u32::MAX;
/// Bytes of a page of the table in memory.
const PAGE: u64 = 4096;
/// Bytes of the table that are kept in memory: all of it, for the largest disk with blocks of 2 MiB.
const CACHE: u64 = 4 << 20;
/// Sectors are counted in these.
pub(crate) const SECTOR: u64 = 512;

/// The table, and the rules for its entries.
#[derive(Debug)]
pub(crate) struct Table {
    pages: Pages,
    start: u64,
    /// Blocks of the disk.
    pub(crate) blocks: u64,
    /// Bytes of the disk.
    size: u64,
    /// Guest bytes of a block.
    pub(crate) block_size: u64,
    /// Bytes of the bitmap in front of a block.
    pub(crate) bitmap_bytes: u64,
    metadata: Vec<(u64, u64, &'static str)>,
}

impl Table {
    pub(crate) fn new(container: &Container, header: &DynamicHeader) -> Self {
        let blocks = container.blocks(header);
        let start = header.table_offset;
        Self {
            pages: Pages::new(start, start + 4 * blocks, PAGE, CACHE),
            start,
            blocks,
            size: container.size,
            block_size: u64::from(header.block_size),
            bitmap_bytes: header.bitmap_bytes(),
            metadata: container.metadata(header),
        }
    }

    /// The pages of the table.
    pub(crate) fn pages(&self) -> &Pages {
        &self.pages
    }

    /// The sector at which a block lies, as the table says.
    pub(crate) fn entry(&self, storage: &dyn Storage, index: u64) -> Result<Option<u32>> {
        let entry = u32::from_be_bytes(self.pages.word(storage, self.start + 4 * index)?);
        Ok((entry != UNUSED).then_some(entry))
    }

    /// Where a block lies: the host offset of its bitmap. `limit`: one past the last byte that may be a block's.
    pub(crate) fn place(&self, storage: &dyn Storage, index: u64, limit: u64) -> Result<Option<u64>> {
        let Some(sector) = self.entry(storage, index)? else { return Ok(None) };
        Ok(Some(self.check_place(index, sector, limit)?))
    }

    /// The offset that an entry means, if a block may lie there.
    pub(crate) fn check_place(&self, index: u64, sector: u32, limit: u64) -> std::result::Result<u64, Error> {
        let offset = u64::from(sector) * SECTOR;
        let end = offset + self.used_len(index);
        if end > limit {
            return Err(Error::BlockOutsideFile { index, offset, file_len: limit });
        }
        match self.metadata.iter().find(|(from, to, _)| offset < *to && *from < end) {
            Some((_, _, what)) => Err(Error::BlockOnMetadata { index, offset, what }),
            None => Ok(offset),
        }
    }

    /// Bytes of a block in the file, bitmap included, as far as the disk reaches.
    pub(crate) fn used_len(&self, index: u64) -> u64 {
        self.bitmap_bytes + self.block_size.min(self.size.saturating_sub(index * self.block_size))
    }

    /// Says where a block lies.
    pub(crate) fn set(&self, storage: &dyn Storage, index: u64, offset: u64) -> Result<()> {
        let sector =
            u32::try_from(offset / SECTOR).ok().filter(|sector| *sector != UNUSED).ok_or(Error::Full)?;
        self.pages.change(storage, self.start + 4 * index, 4, |word| {
            word.copy_from_slice(&sector.to_be_bytes());
        })
    }

    /// How many blocks from `index` on, at most `max`, are not there.
    pub(crate) fn unused_run(&self, storage: &dyn Storage, index: u64, max: u64) -> Result<u64> {
        let (mut run, mut buf) = (0, [0; to_usize_page()]);
        while run < max {
            // Up to the end of a page.
            let at = 4 * (index + run);
            let len = (PAGE - at % PAGE).min(4 * (max - run));
            let words = &mut buf[..block::num::to_usize(len)];
            self.pages.read(storage, words, self.start + at)?;
            let words = words.as_chunks::<4>().0;
            let unused = words.iter().take_while(|word| **word == UNUSED.to_be_bytes()).count();
            run += unused as u64;
            if unused < words.len() {
                break;
            }
        }
        Ok(run)
    }

    /// One past the last byte of the structures.
    pub(crate) fn metadata_end(&self) -> u64 {
        self.metadata.iter().map(|(_, end, _)| *end).max().unwrap_or(0)
    }
}

const fn to_usize_page() -> usize {
    block::num::to_usize(PAGE)
}
