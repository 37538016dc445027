//! Blocks that hold nothing (kernel documentation, "Block and Inode Bitmaps").
//!
//! Whoever skips them loses a file if a bitmap lies. So every doubt counts as "in use": a file system that knows of errors
//! or was not unmounted, features that are not known, a group whose bitmap and descriptor disagree.

use std::ops::Range;

use block::Result;
use block::num::to_usize;

use super::Ext;
use crate::bytes::{le16, le32};
use crate::ranges::Ranges;

/// The descriptor's flag for a group whose bitmap was never written: only what mke2fs put there is in use.
const BLOCK_UNINIT: u16 = 2;

/// What the descriptor of a group says.
struct Group {
    bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free: u64,
    uninitialised: bool,
}

impl Ext {
    /// Bytes of the device that hold nothing; `None` if the bitmaps are not to be trusted.
    pub(super) fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        let superblock = &self.superblock;
        if !superblock.bitmaps_can_be_trusted() {
            return Ok(None);
        }
        let count = superblock.groups();
        let mut groups = vec![];
        for number in 0..count {
            groups.push(self.group(number)?);
        }
        let mut free = Ranges::default();
        let own = self.own_blocks(&groups);
        for (number, group) in (0..).zip(&groups) {
            let (first, end) = superblock.group_blocks(number);
            match group.uninitialised {
                true => free_but(first..end, &own, &mut free),
                false => self.by_bitmap(group, first..end, &mut free)?,
            }
        }
        let bytes = superblock.block_bytes;
        let ranges = free.into_iter().map(|range| range.start * bytes..range.end * bytes);
        Ok(Some(ranges.collect()))
    }

    fn group(&self, number: u64) -> Result<Group> {
        let descriptor = self.descriptor(number)?;
        let is_long = descriptor.len() >= 64;
        let wide = |low: usize, high: usize| {
            let high = if is_long { le32(&descriptor, high) } else { 0 };
            u64::from(high) << 32 | u64::from(le32(&descriptor, low))
        };
        let free_high = if is_long { le16(&descriptor, 0x2c) } else { 0 };
        let flags = if self.superblock.has_group_checksums() { le16(&descriptor, 0x12) } else { 0 };
        Ok(Group {
            bitmap: wide(0, 0x20),
            inode_bitmap: wide(4, 0x24),
            inode_table: wide(8, 0x28),
            free: u64::from(free_high) << 16 | u64::from(le16(&descriptor, 0x0c)),
            uninitialised: flags & BLOCK_UNINIT != 0,
        })
    }

    /// The blocks of all groups' own structures, which may lie in any group (flex_bg), sorted.
    fn own_blocks(&self, groups: &[Group]) -> Vec<Range<u64>> {
        let superblock = &self.superblock;
        let table = superblock.inode_table_blocks();
        let mut own = vec![];
        for (number, group) in (0..).zip(groups) {
            own.extend([group.bitmap..group.bitmap + 1, group.inode_bitmap..group.inode_bitmap + 1]);
            own.push(group.inode_table..group.inode_table.saturating_add(table));
            let (first, _) = superblock.group_blocks(number);
            own.push(first..first + superblock.blocks_in_front(number));
        }
        own.sort_by_key(|range| range.start);
        own
    }

    /// Adds the blocks whose bits are clear, if they are as many as the descriptor says.
    fn by_bitmap(&self, group: &Group, blocks: Range<u64>, free: &mut Ranges) -> Result<()> {
        let bitmap = self.block(group.bitmap)?;
        let is_free = |index: u64| {
            let byte = bitmap.get(to_usize(index / 8)).copied().unwrap_or(0xff);
            byte >> (index % 8) & 1 == 0
        };
        let count = blocks.end - blocks.start;
        if (0..count).filter(|index| is_free(*index)).count() as u64 != group.free {
            return Ok(());
        }
        for index in (0..count).filter(|index| is_free(*index)) {
            free.push(blocks.start + index..blocks.start + index + 1);
        }
        Ok(())
    }
}

/// Adds all of `blocks` but those in `used`, which is sorted.
fn free_but(blocks: Range<u64>, used: &[Range<u64>], free: &mut Ranges) {
    let mut at = blocks.start;
    for range in used.iter().filter(|range| range.end > blocks.start && range.start < blocks.end) {
        if range.start > at {
            free.push(at..range.start);
        }
        at = at.max(range.end);
    }
    if at < blocks.end {
        free.push(at..blocks.end);
    }
}
