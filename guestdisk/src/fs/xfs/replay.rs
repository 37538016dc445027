//! What mounting would do again (chapter "Journaling Log"): whether it is nothing but the superblock.
//!
//! A frozen file system has everything in its place on the disk. Its log is not finished all the same: it ends with
//! transactions that change the superblock alone, by which the kernel covers what came before ("log covering"), so that after
//! a power cut inodes without a name are looked for. The newest record says where what is not in its place yet begins, its
//! tail; if from there to the end only the superblock is logged, then the trees of free space are the truth.
//!
//! ```text
//!   record    header | h_len bytes of operations; the first word of each sector is in the header
//!   operation 12 bytes: transaction, length, who (0x69: a transaction), flags (1: start, 2: commit) | the bytes
//!   bytes     of a transaction: its header; then for each item what it is, and as many pieces as that says
//! ```

use block::Result;
use block::num::to_usize;

use super::log::{Log, MAGIC, SECTOR};
use crate::bytes::{be32, byte, le16, le64, part};

/// The most sectors from the tail to the end that are looked at: what a frozen file system leaves are a few.
const MOST: u64 = 256;
/// Sectors whose first words a header holds.
const HELD: usize = 64;
const HEADER: usize = 12;
const TRANSACTION: u8 = 0x69;
const START: u8 = 1;
const COMMIT: u8 = 2;
/// An item that changes a buffer (`XFS_LI_BUF`), on machines that count from the little end.
const BUFFER: u16 = 0x123c;

/// Whether from the tail that the record at `newest` names to the end of the log, `head`, only the superblock is logged.
pub(super) fn only_superblock(log: &Log<'_>, newest: u64, head: u64) -> Result<bool> {
    let tail = u64::from(be32(&log.sector(newest)?, 28));
    if tail >= log.sectors {
        return Ok(false);
    }
    let (mut at, mut left) = (tail, (head + log.sectors - tail) % log.sectors);
    if left == 0 || left > MOST {
        return Ok(false);
    }
    while left > 0 {
        let header = log.sector(at)?;
        let len = u64::from(be32(&header, 12));
        let used = 1 + len.div_ceil(SECTOR);
        // Larger headers come with records that hold more than this.
        if be32(&header, 0) != MAGIC || be32(&header, 320) > 32 << 10 || used > left || used > 1 + HELD as u64
        {
            return Ok(false);
        }
        let mut bytes = vec![];
        for index in 0..to_usize(used - 1) {
            let mut sector = log.sector((at + 1 + index as u64) % log.sectors)?;
            sector[..4].copy_from_slice(part(&header, 44 + index * 4, 4));
            bytes.extend(sector);
        }
        bytes.truncate(to_usize(len));
        if !changes_superblock_only(&bytes, be32(&header, 40), log.sector_bytes()) {
            return Ok(false);
        }
        at = (at + used) % log.sectors;
        left -= used;
    }
    Ok(true)
}

/// Whether the operations of a record, so many of them, are whole transactions that change the superblock.
fn changes_superblock_only(mut bytes: &[u8], operations: u32, sector_bytes: u64) -> bool {
    // What is expected: `None` outside of a transaction, then its header, then items and their pieces.
    let (mut open, mut header, mut pieces) = (None, false, 0_u16);
    // What follows them fills the last sector.
    for _ in 0..operations {
        let Some((operation, rest)) = bytes.split_at_checked(HEADER) else { return false };
        let (number, len) = (be32(operation, 0), be32(operation, 4) as usize);
        let Some((data, rest)) = rest.split_at_checked(len) else { return false };
        bytes = rest;
        if byte(operation, 8) != TRANSACTION {
            return false;
        }
        match (byte(operation, 9), open) {
            (START, None) if len == 0 => (open, header) = (Some(number), true),
            (COMMIT, Some(own)) if own == number && len == 0 && !header && pieces == 0 => open = None,
            (0, Some(own)) if own == number && header => header = false,
            (0, Some(own)) if own == number && pieces > 0 => pieces -= 1,
            (0, Some(own)) if own == number => {
                let sectors = u64::from(le16(data, 6));
                let is_superblock = le16(data, 0) == BUFFER
                    && le64(data, 8) == 0
                    && (1..=sector_bytes / SECTOR).contains(&sectors);
                if len < 24 || !is_superblock {
                    return false;
                }
                pieces = le16(data, 2).saturating_sub(1);
            }
            _ => return false,
        }
    }
    operations > 0 && open.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(number: u32, flags: u8, data: &[u8]) -> Vec<u8> {
        let mut bytes = number.to_be_bytes().to_vec();
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend([TRANSACTION, flags, 0, 0]);
        bytes.extend(data);
        bytes
    }

    fn buffer(place: u64, sectors: u16) -> Vec<u8> {
        let mut bytes = [BUFFER, 2, 0x9000, sectors].map(u16::to_le_bytes).concat();
        bytes.extend(place.to_le_bytes());
        bytes.extend([0; 8]);
        bytes
    }

    fn transaction(item: &[u8]) -> Vec<u8> {
        let parts = [(START, &[][..]), (0, &[0; 16]), (0, item), (0, &[0; 384]), (COMMIT, &[])];
        parts.iter().flat_map(|(flags, data)| operation(7, *flags, data)).collect()
    }

    #[test]
    fn the_superblock_and_nothing_else() {
        let good = transaction(&buffer(0, 1));
        assert!(changes_superblock_only(&good, 5, 512));
        assert!(changes_superblock_only(&[good.clone(), good.clone(), vec![0xff; 28]].concat(), 10, 512));
        assert!(changes_superblock_only(&transaction(&buffer(0, 8)), 5, 4096));
        // The header of the free space lies in the second sector.
        for item in [buffer(1, 1), buffer(0, 2), buffer(8, 1), vec![0x3b; 56], buffer(0, 0), vec![0; 3]] {
            assert!(!changes_superblock_only(&transaction(&item), 5, 512), "{item:?}");
        }
        for cut in 0..good.len() {
            assert!(!changes_superblock_only(&good[..cut], 5, 512), "{cut} bytes");
        }
        for operations in [0, 1, 2, 3, 4, 6] {
            assert!(!changes_superblock_only(&good, operations, 512), "{operations} operations");
        }
        assert!(!changes_superblock_only(&operation(7, COMMIT, &[]), 1, 512));
        assert!(!changes_superblock_only(&[good.clone(), operation(7, 4, &[])].concat(), 6, 512));
        let mut other = good;
        other[8] = 0xaa;
        assert!(!changes_superblock_only(&other, 5, 512));
    }
}
