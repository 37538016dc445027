//! Whether the log was finished (chapter "Journaling Log"): its last record then says that the file system was unmounted.
//!
//! The log is a ring of sectors, each of which begins with the number of the round in which it was written. The first
//! sector of an older round follows the newest record.

use block::Result;

use super::Xfs;
use crate::bytes::{be32, byte, corrupt};

const SECTOR: u64 = 512;
/// The first word of a record.
const MAGIC: u32 = 0xfeed_babe;
/// The most sectors of a record.
const MOST_RECORD: u64 = 1024;

pub(super) fn is_clean(xfs: &Xfs) -> Result<bool> {
    let superblock = &xfs.superblock;
    if superblock.log_start == 0 {
        return Err(corrupt("it lies on another device"));
    }
    let start = xfs.offset_of(superblock.log_start)?;
    let log = Log { xfs, start, sectors: superblock.log_blocks * superblock.block_bytes / SECTOR };
    log.is_clean()
}

struct Log<'a> {
    xfs: &'a Xfs,
    start: u64,
    sectors: u64,
}

impl Log<'_> {
    fn sector(&self, number: u64) -> Result<Vec<u8>> {
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

    fn is_clean(&self) -> Result<bool> {
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
            return Ok(be32(&sector, 40) == 1 && byte(&first, 9) & 0x20 != 0);
        }
        // A log that was never written is full of zeros.
        Ok(self.round(0)? == 0)
    }
}
