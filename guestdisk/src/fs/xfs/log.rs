//! Whether the log was finished (chapter "Journaling Log"): its last record then says that the file system was unmounted. Or
//! whether nothing that matters would be done again: the file system was frozen (see `replay`).
//!
//! The log is a ring of sectors, each of which begins with the number of the round in which it was written. The first
//! sector of an older round follows the newest record.

use block::Result;

use super::{Xfs, replay};
use crate::bytes::{be32, byte, corrupt};

pub(super) const SECTOR: u64 = 512;
/// The first word of a record.
pub(super) const MAGIC: u32 = 0xfeed_babe;
/// The most sectors of a record.
const MOST_RECORD: u64 = 1024;

/// Whether everything is in its place on the disk but the superblock.
pub(super) fn is_settled(xfs: &Xfs) -> Result<bool> {
    let superblock = &xfs.superblock;
    if superblock.log_start == 0 {
        return Err(corrupt("it lies on another device"));
    }
    let start = xfs.offset_of(superblock.log_start)?;
    let log = Log { xfs, start, sectors: superblock.log_blocks * superblock.block_bytes / SECTOR };
    log.is_settled()
}

pub(super) struct Log<'a> {
    xfs: &'a Xfs,
    start: u64,
    /// How many sectors it has.
    pub(super) sectors: u64,
}

impl Log<'_> {
    pub(super) fn sector(&self, number: u64) -> Result<Vec<u8>> {
        self.xfs.source.bytes(self.start + number * SECTOR, SECTOR)
    }

    /// The round in which a sector was written.
    fn round(&self, number: u64) -> Result<u32> {
        let sector = self.sector(number)?;
        Ok(if be32(&sector, 0) == MAGIC { be32(&sector, 4) } else { be32(&sector, 0) })
    }

    /// The sector after the newest record.
    fn head(&self) -> Result<u64> {
        let newest = self.round(0)?;
        let (mut low, mut high) = (0, self.sectors);
        // All sectors below `low` are of the newest round, `high` is not.
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.round(middle)? == newest { low = middle } else { high = middle }
        }
        Ok(high)
    }

    /// Bytes of a sector of the file system, which may be more than those of the log.
    pub(super) fn sector_bytes(&self) -> u64 {
        self.xfs.superblock.sector_bytes
    }

    fn is_settled(&self) -> Result<bool> {
        let head = self.head()?;
        for back in 1..=MOST_RECORD.min(self.sectors) {
            let number = (head + self.sectors - back) % self.sectors;
            let sector = self.sector(number)?;
            if be32(&sector, 0) != MAGIC {
                continue;
            }
            // A record is its header, more headers where it is large, and operations. The one of an unmount has one.
            let headers = u64::from(be32(&sector, 320)).div_ceil(32 << 10).clamp(1, 8);
            let first = self.sector((number + headers) % self.sectors)?;
            let unmounted = be32(&sector, 40) == 1 && byte(&first, 9) & 0x20 != 0;
            return if unmounted { Ok(true) } else { replay::only_superblock(self, number, head) };
        }
        // A log that was never written is full of zeros.
        Ok(self.round(0)? == 0)
    }
}
