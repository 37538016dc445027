//! Free blocks (chapter "Allocation Groups", "AG Free Space B+trees").
//!
//! Each group has a tree of its free extents by their number. Only the leaves matter, which form a list. As with ext, a
//! doubt means "in use": a log with something left to do, a group whose tree has not as many blocks as its header says.

use std::ops::Range;

use block::Result;

use super::{Xfs, log};
use crate::bytes::{be16, be32, corrupt};
use crate::ranges::Ranges;

/// No block.
const NULL: u32 = 0xffff_ffff;
/// Deeper than any tree of 32-bit numbers.
const MOST_LEVELS: u32 = 16;

impl Xfs {
    /// Bytes of the device that hold nothing; `None` if the log has something left to do.
    pub(super) fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        if self.superblock.needs_repair || !matches!(log::is_settled(self), Ok(true)) {
            return Ok(None);
        }
        let mut ranges = vec![];
        for group in 0..self.superblock.groups {
            let bytes = self.superblock.block_bytes;
            let base = group * self.superblock.group_blocks * bytes;
            let free = self.group_free(group, base)?;
            ranges.extend(free.into_iter().map(|range| base + range.start * bytes..base + range.end * bytes));
        }
        Ok(Some(ranges))
    }

    /// The free blocks of a group, counted within it.
    fn group_free(&self, group: u64, base: u64) -> Result<Ranges> {
        // The header is in the group's second sector, of which there are 512 bytes at least.
        let sector = self.superblock.sector_bytes;
        let header = self.source.bytes(base + sector, 512)?;
        if !header.starts_with(b"XAGF") {
            return Err(corrupt(format!("allocation group {group} has no free space header")));
        }
        let (length, root, levels) = (be32(&header, 12), be32(&header, 16), be32(&header, 28));
        let expected = be32(&header, 52);
        if levels == 0 || levels > MOST_LEVELS {
            return Err(corrupt(format!("allocation group {group} has a tree of {levels} levels")));
        }
        let mut block = root;
        for level in (1..levels).rev() {
            let node = self.free_tree_block(base, block, length)?;
            if u32::from(be16(&node, 4)) != level || be16(&node, 6) == 0 {
                return Err(corrupt(format!("block {block:#x} of group {group} is not of level {level}")));
            }
            // Keys of 8 bytes, as many as fit with pointers of 4 bytes; then the pointers.
            let most = (self.superblock.block_bytes - self.tree_header()) / 12;
            block = be32(&node, block::num::to_usize(self.tree_header() + most * 8));
        }
        let mut free = Ranges::default();
        let (mut sum, mut seen) = (0_u64, 0);
        while block != NULL {
            seen += 1;
            if seen > length {
                return Err(corrupt(format!("the free space of group {group} runs in circles")));
            }
            let leaf = self.free_tree_block(base, block, length)?;
            if be16(&leaf, 4) != 0 {
                return Err(corrupt(format!("block {block:#x} of group {group} is no leaf")));
            }
            let first = block::num::to_usize(self.tree_header());
            let records = leaf.get(first..).unwrap_or_default().chunks_exact(8);
            for record in records.take(be16(&leaf, 6).into()) {
                let (start, count) = (u64::from(be32(record, 0)), u64::from(be32(record, 4)));
                if start + count > u64::from(length) {
                    return Err(corrupt(format!("group {group} has free blocks outside of it")));
                }
                sum += count;
                free.push(start..start + count);
            }
            block = be32(&leaf, 12);
        }
        Ok(if sum == u64::from(expected) { free.sorted() } else { Ranges::default() })
    }

    /// Bytes in front of the records of a block of a tree.
    fn tree_header(&self) -> u64 {
        if self.superblock.version == 5 { 56 } else { 16 }
    }

    fn free_tree_block(&self, base: u64, block: u32, length: u32) -> Result<Vec<u8>> {
        let wrong = || corrupt(format!("block {block:#x} is none of a tree of free space"));
        if block >= length {
            return Err(wrong());
        }
        let bytes = self.superblock.block_bytes;
        let node = self.source.bytes(base + u64::from(block) * bytes, bytes)?;
        let magic: &[u8] = if self.superblock.version == 5 { b"AB3B" } else { b"ABTB" };
        if node.starts_with(magic) { Ok(node) } else { Err(wrong()) }
    }
}
