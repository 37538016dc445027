//! How guest offsets, blocks and entries of the BAT belong together (sections 2.5 and 2.4).

use block::{Error, Result};

use crate::metadata::Metadata;

/// Sectors that one sector bitmap describes.
const SECTORS_PER_BITMAP: u64 = 1 << 23;
/// Bytes of a sector bitmap block.
pub const BITMAP_BLOCK: u64 = 1 << 20;

/// The arithmetic of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// Bytes of a logical sector.
    pub sector_size: u64,
    /// Blocks that one sector bitmap describes; one of its entries follows each so many entries of blocks.
    pub chunk_ratio: u64,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Whether every chunk, the last one too, has the entry of its sector bitmap.
    differencing: bool,
}

impl Geometry {
    /// The arithmetic of a disk, which `metadata` has been checked for.
    pub fn new(metadata: &Metadata) -> Self {
        let (block_size, sector_size) =
            (u64::from(metadata.block_size), u64::from(metadata.logical_sector_size));
        Self {
            block_size,
            disk_size: metadata.disk_size,
            sector_size,
            chunk_ratio: SECTORS_PER_BITMAP * sector_size / block_size,
            blocks: metadata.disk_size.div_ceil(block_size),
            differencing: metadata.parent.is_some(),
        }
    }

    /// Number of the BAT entry of a block.
    pub fn entry_of(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Number of the BAT entry of the sector bitmap that describes a block.
    pub fn bitmap_entry_of(&self, block: u64) -> u64 {
        (block / self.chunk_ratio + 1) * (self.chunk_ratio + 1) - 1
    }

    /// Blocks from `block` on whose entries follow each other without the entry of a sector bitmap in between.
    pub fn blocks_in_a_row(&self, block: u64) -> u64 {
        (self.chunk_ratio - block % self.chunk_ratio).min(self.blocks.saturating_sub(block))
    }

    /// The block that BAT entry `entry` belongs to; `None`: it is the entry of a sector bitmap.
    pub fn block_of(&self, entry: u64) -> Option<u64> {
        let (chunk, within) = (entry / (self.chunk_ratio + 1), entry % (self.chunk_ratio + 1));
        (within < self.chunk_ratio).then_some(chunk * self.chunk_ratio + within)
    }

    /// Entries that the BAT has to have.
    pub fn entries(&self) -> u64 {
        match (self.blocks.checked_sub(1), self.differencing) {
            (None, _) => 0,
            (Some(last), false) => self.entry_of(last) + 1,
            (Some(last), true) => self.bitmap_entry_of(last) + 1,
        }
    }

    /// The part of a sector bitmap block that describes `block`: its first byte, and how many.
    pub fn bitmap_part(&self, block: u64) -> (u64, u64) {
        let bytes = self.block_size / self.sector_size / 8;
        (block % self.chunk_ratio * bytes, bytes)
    }

    /// Bytes of the disk in `block`: less than a block at the end.
    pub fn len_of(&self, block: u64) -> u64 {
        self.block_size.min(self.disk_size.saturating_sub(block * self.block_size))
    }

    /// Checks that a BAT of `bat_len` bytes has an entry for each block.
    ///
    /// # Errors
    /// It has not.
    pub fn check_bat(&self, bat_len: u64) -> Result<()> {
        let needed = self.entries() * 8;
        if needed > bat_len {
            return Err(Error::invalid(format!(
                "the VHDX BAT has {bat_len:#x} bytes, and the disk needs {needed:#x}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(block_mib: u64, size: u64, differencing: bool) -> Geometry {
        let block_size = block_mib << 20;
        Geometry {
            block_size,
            disk_size: size,
            sector_size: 512,
            chunk_ratio: SECTORS_PER_BITMAP * 512 / block_size,
            blocks: size.div_ceil(block_size),
            differencing,
        }
    }

    #[test]
    fn bitmap_entries_are_interleaved() {
        let disk = geometry(256, 64 << 30, false);
        assert_eq!(disk.chunk_ratio, 16);
        assert_eq!((disk.entry_of(15), disk.entry_of(16), disk.entry_of(32)), (15, 17, 34));
        assert_eq!(
            (disk.bitmap_entry_of(0), disk.bitmap_entry_of(15), disk.bitmap_entry_of(16)),
            (16, 16, 33)
        );
        for block in 0..disk.blocks {
            assert_eq!(disk.block_of(disk.entry_of(block)), Some(block));
            assert_eq!(disk.block_of(disk.bitmap_entry_of(block)), None);
        }
        assert_eq!(disk.bitmap_part(17), (65536, 65536));
        assert_eq!([0, 3, 15, 16, 255].map(|block| disk.blocks_in_a_row(block)), [16, 13, 1, 16, 1]);
    }

    #[test]
    fn the_last_entry_is_of_a_block_or_of_the_bitmap_of_the_last_chunk() {
        assert_eq!(geometry(256, 4 << 30, false).entries(), 16);
        assert_eq!(geometry(256, (4 << 30) + 512, false).entries(), 18);
        assert_eq!(geometry(256, 4 << 30, true).entries(), 17);
        assert_eq!(geometry(256, (4 << 30) + 512, true).entries(), 34);
        assert_eq!(geometry(1, 0, true).entries(), 0);
        let end = geometry(1, (1 << 20) + 512, false);
        assert_eq!((end.len_of(0), end.len_of(1), end.len_of(2)), (1 << 20, 512, 0));
    }
}
