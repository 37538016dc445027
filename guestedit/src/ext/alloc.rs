//! Taking and giving back blocks and inodes (kernel documentation, "Block and inode Bitmaps", "Lazy Block Group
//! Initialization").
//!
//! What is taken is marked at once, in memory. What is given back is only noted: its marks go when nothing on the device
//! refers to it any more ([`Volume::release`]), so that nothing can be put there before.

use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, Result};

use super::inode::Inode;
use super::superblock::field;
use super::volume::{Descriptor, Volume, descriptor};
use crate::bytes::{corrupt, high32, le32, low32, part, put_le32};
use crate::crc::crc32c;

/// Blocks that follow one another: the first, and how many.
pub(super) type Blocks = (u64, u64);

/// Runs of at least so many blocks are looked for first, then shorter ones.
const WANTED: [u64; 4] = [4096, 256, 16, 1];

fn no_space(what: &str) -> Error {
    Error::new(ErrorKind::NoSpace, format!("the guest's file system has no free {what} left"))
        .hint("Make room within the guest, or give it a larger disk.")
}

fn bit(bitmap: &[u8], index: u64) -> bool {
    bitmap.get(to_usize(index / 8)).is_none_or(|byte| byte >> (index % 8) & 1 == 1)
}

fn set_bits(bitmap: &mut [u8], first: u64, count: u64, on: bool) {
    for index in first..first + count {
        if let Some(byte) = bitmap.get_mut(to_usize(index / 8)) {
            let mask = 1 << (index % 8);
            *byte = if on { *byte | mask } else { *byte & !mask };
        }
    }
}

/// The first run of zeros at or behind `from`, cut off at `most`.
fn free_run(bitmap: &[u8], from: u64, end: u64, most: u64) -> Option<Blocks> {
    let mut at = from;
    while at < end && bit(bitmap, at) {
        let full = at.is_multiple_of(8) && bitmap.get(to_usize(at / 8)) == Some(&0xff);
        at += if full { 8 } else { 1 };
    }
    let len = (at..end).take_while(|index| !bit(bitmap, *index)).take(to_usize(most)).count();
    (len > 0).then_some((at, len as u64))
}

impl Volume {
    // Bitmaps.

    /// The block bitmap of a group; made up if it has never been written.
    fn block_bitmap(&mut self, found: &Descriptor) -> Result<Arc<Vec<u8>>> {
        let lazy = self.geometry.has_group_checksums();
        if !lazy || found.flags() & descriptor::FLAG_BLOCK_UNINIT == 0 {
            return self.block(found.block_bitmap());
        }
        let (start, len) = (self.geometry.group_start(found.group), self.geometry.group_len(found.group));
        let mut bitmap = vec![0; self.block_bytes()];
        set_bits(&mut bitmap, len, 8 * self.geometry.block - len, true);
        for (first, count) in &self.system {
            let (first, end) = ((*first).max(start), (first + count).min(start + len));
            if first < end {
                set_bits(&mut bitmap, first - start, end - first, true);
            }
        }
        let free = (0..len).filter(|index| !bit(&bitmap, *index)).count() as u64;
        if free != u64::from(found.get(descriptor::FREE_BLOCKS)) {
            return Err(corrupt(format!(
                "group {} has {free} free blocks, but its descriptor says {}",
                found.group,
                found.get(descriptor::FREE_BLOCKS)
            )));
        }
        Ok(Arc::new(bitmap))
    }

    fn store_block_bitmap(&mut self, found: &mut Descriptor, bitmap: Vec<u8>) -> Result<()> {
        if self.geometry.has_checksums() {
            let used = to_usize(self.geometry.blocks_per_group / 8);
            let checksum = crc32c(self.geometry.seed, part(&bitmap, 0, used));
            found.set(descriptor::BLOCK_BITMAP_CHECKSUM, checksum);
        }
        if self.geometry.has_group_checksums() {
            found.clear_flags(descriptor::FLAG_BLOCK_UNINIT);
        }
        self.accounts.insert(found.block_bitmap());
        self.staged.put(found.block_bitmap(), bitmap)?;
        self.store_descriptor(found)
    }

    fn inode_bitmap(&mut self, found: &Descriptor) -> Result<Arc<Vec<u8>>> {
        let lazy = self.geometry.has_group_checksums();
        if !lazy || found.flags() & descriptor::FLAG_INODE_UNINIT == 0 {
            return self.block(found.inode_bitmap());
        }
        let (count, bits) = (self.geometry.inodes_per_group, 8 * self.geometry.block);
        let mut bitmap = vec![0; self.block_bytes()];
        set_bits(&mut bitmap, count, bits - count, true);
        Ok(Arc::new(bitmap))
    }

    fn store_inode_bitmap(&mut self, found: &mut Descriptor, bitmap: Vec<u8>) -> Result<()> {
        if self.geometry.has_checksums() {
            let used = to_usize(self.geometry.inodes_per_group / 8);
            let checksum = crc32c(self.geometry.seed, part(&bitmap, 0, used));
            found.set(descriptor::INODE_BITMAP_CHECKSUM, checksum);
        }
        if self.geometry.has_group_checksums() {
            found.clear_flags(descriptor::FLAG_INODE_UNINIT);
        }
        self.accounts.insert(found.inode_bitmap());
        self.staged.put(found.inode_bitmap(), bitmap)?;
        self.store_descriptor(found)
    }

    // Counts.

    /// Free blocks by the word of the superblock, and free inodes.
    pub(super) fn free_counts(&mut self) -> Result<(u64, u64)> {
        let raw = self.superblock()?;
        let high = if self.geometry.is_wide() { le32(&raw, field::FREE_BLOCKS_HIGH) } else { 0 };
        let blocks = u64::from(high) << 32 | u64::from(le32(&raw, field::FREE_BLOCKS));
        Ok((blocks, le32(&raw, field::FREE_INODES).into()))
    }

    fn count_free(&mut self, blocks: i64, inodes: i64) -> Result<()> {
        let (old_blocks, old_inodes) = self.free_counts()?;
        let blocks = old_blocks.saturating_add_signed(blocks);
        let inodes = old_inodes.saturating_add_signed(inodes);
        let (wide, now) = (self.geometry.is_wide(), self.clock.now());
        self.edit_superblock(|raw| {
            put_le32(raw, field::FREE_BLOCKS, low32(blocks));
            if wide {
                put_le32(raw, field::FREE_BLOCKS_HIGH, high32(blocks));
            }
            put_le32(raw, field::FREE_INODES, low32(inodes));
            put_le32(raw, field::WRITE_TIME, low32(now.cast_unsigned()));
        })
    }

    // Blocks.

    /// Takes `count` blocks, in as few runs as there can be, near `goal`.
    pub(super) fn take_blocks(&mut self, goal: u64, count: u64) -> Result<Vec<Blocks>> {
        let (mut runs, mut left) = (vec![], count);
        let group_blocks = self.geometry.blocks_per_group;
        let goal = if self.check_block(goal, 1).is_ok() { goal } else { self.geometry.first_data_block };
        let home = (goal - self.geometry.first_data_block) / group_blocks;
        let all_at_once = count.min(group_blocks / 2);
        let lengths = std::iter::once(all_at_once).chain(WANTED.into_iter().filter(|len| *len < all_at_once));
        for wanted in lengths {
            for step in 0..self.geometry.groups {
                if left == 0 {
                    return Ok(runs);
                }
                let group = (home + step) % self.geometry.groups;
                let from = if step == 0 { goal - self.geometry.group_start(home) } else { 0 };
                left -= self.take_in_group(group, from, wanted, left, &mut runs)?;
            }
        }
        if left == 0 { Ok(runs) } else { Err(no_space("blocks")) }
    }

    /// Takes runs of at least `wanted` blocks in one group. Returns how many blocks that were.
    fn take_in_group(
        &mut self,
        group: u64,
        from: u64,
        wanted: u64,
        most: u64,
        runs: &mut Vec<Blocks>,
    ) -> Result<u64> {
        let mut found = self.descriptor(group)?;
        let free = u64::from(found.get(descriptor::FREE_BLOCKS));
        if free < wanted.min(most) || free == 0 {
            return Ok(0);
        }
        let old = self.block_bitmap(&found)?;
        let (start, len) = (self.geometry.group_start(group), self.geometry.group_len(group));
        let mut bitmap = None;
        let mut taken = 0;
        // From the goal to the end, then from the start.
        for (mut at, end) in [(from, len), (0, from)] {
            while taken < most.min(free) {
                let now = bitmap.as_deref().unwrap_or(&old[..]);
                let Some((first, count)) = free_run(now, at, end, most.min(free) - taken) else { break };
                at = first + count;
                if count < wanted.min(most - taken) {
                    continue;
                }
                if self.is_system(start + first, count) {
                    return Err(corrupt(format!("group {group} counts its own structures as free")));
                }
                set_bits(bitmap.get_or_insert_with(|| old.to_vec()), first, count, true);
                runs.push((start + first, count));
                taken += count;
            }
        }
        if let Some(bitmap) = bitmap {
            found.set(descriptor::FREE_BLOCKS, low32(free - taken));
            self.store_block_bitmap(&mut found, bitmap)?;
            self.count_free(-taken.cast_signed(), 0)?;
        }
        Ok(taken)
    }

    /// Takes one block for metadata.
    pub(super) fn take_block(&mut self, goal: u64) -> Result<u64> {
        let runs = self.take_blocks(goal, 1)?;
        let block = runs.first().ok_or_else(|| no_space("blocks"))?.0;
        self.fresh.insert(block);
        Ok(block)
    }

    /// Notes that nothing will refer to blocks any more once the operation has reached the device.
    pub(super) fn give_back(&mut self, first: u64, count: u64) -> Result<()> {
        self.check_block(first, count)?;
        let fault = if self.is_system(first, count) {
            Some("belong to the file system itself")
        } else if self.is_freed(first, count) {
            Some("have been freed already")
        } else if !self.are_taken(first, count)? {
            Some("are marked as free")
        } else {
            None
        };
        if let Some(fault) = fault {
            return Err(corrupt(format!("{count} blocks at {first:#x} of the file {fault}")));
        }
        self.freed.blocks.insert(first, count);
        self.freed.current.push(first);
        Ok(())
    }

    fn is_freed(&self, first: u64, count: u64) -> bool {
        let before = self.freed.blocks.range(..first + count).next_back();
        before.is_some_and(|(start, len)| start + len > first)
    }

    /// Cuts a run at the borders of groups.
    fn by_group(&self, first: u64, count: u64) -> Vec<(u64, Blocks)> {
        let (mut pieces, mut at) = (vec![], first);
        while at < first + count {
            let group = (at - self.geometry.first_data_block) / self.geometry.blocks_per_group;
            let start = self.geometry.group_start(group);
            let end = (start + self.geometry.blocks_per_group).min(first + count);
            pieces.push((group, (at - start, end - at)));
            at = end;
        }
        pieces
    }

    fn are_taken(&mut self, first: u64, count: u64) -> Result<bool> {
        for (group, (index, len)) in self.by_group(first, count) {
            let found = self.descriptor(group)?;
            let bitmap = self.block_bitmap(&found)?;
            if !(index..index + len).all(|index| bit(&bitmap, index)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    // Inodes.

    /// Takes an inode near a group. Returns its number.
    pub(super) fn take_inode(&mut self, home: u64, directory: bool) -> Result<u64> {
        let groups = self.geometry.groups;
        // Groups whose inodes have never been used come last.
        for fresh in [false, true] {
            for step in 0..groups {
                let found = self.descriptor((home + step) % groups)?;
                let uninit =
                    self.geometry.has_group_checksums() && found.flags() & descriptor::FLAG_INODE_UNINIT != 0;
                if found.get(descriptor::FREE_INODES) == 0 || uninit != fresh {
                    continue;
                }
                if let Some(number) = self.take_inode_in(found, directory)? {
                    return Ok(number);
                }
            }
        }
        Err(no_space("inodes"))
    }

    fn take_inode_in(&mut self, mut found: Descriptor, directory: bool) -> Result<Option<u64>> {
        let count = self.geometry.inodes_per_group;
        let mut bitmap = self.inode_bitmap(&found)?.to_vec();
        // The first ones are reserved.
        let from = if found.group == 0 { self.geometry.first_inode - 1 } else { 0 };
        let Some((index, _)) = free_run(&bitmap, from, count, 1) else { return Ok(None) };
        set_bits(&mut bitmap, index, 1, true);
        if self.geometry.has_group_checksums() {
            if found.flags() & descriptor::FLAG_BLOCK_UNINIT != 0 {
                let blocks = self.block_bitmap(&found)?.to_vec();
                self.store_block_bitmap(&mut found, blocks)?;
            }
            let unused = u64::from(found.get(descriptor::UNUSED_INODES));
            let unused = unused.min(count - index - 1);
            found.set(descriptor::UNUSED_INODES, low32(unused));
        }
        found.set(descriptor::FREE_INODES, found.get(descriptor::FREE_INODES).saturating_sub(1));
        if directory {
            found.set(descriptor::DIRECTORIES, found.get(descriptor::DIRECTORIES).saturating_add(1));
        }
        self.store_inode_bitmap(&mut found, bitmap)?;
        self.count_free(0, -1)?;
        Ok(Some(found.group * count + index + 1))
    }

    /// The group of an inode.
    pub(super) fn group_of(&self, inode: u64) -> u64 {
        inode.saturating_sub(1) / self.geometry.inodes_per_group
    }

    /// Where the blocks of an inode had best lie: in its group.
    pub(super) fn goal_of(&self, inode: &Inode) -> u64 {
        self.geometry.group_start(self.group_of(inode.number).min(self.geometry.groups - 1))
    }

    // What is not referred to any more.

    /// Marks as free what has been given back. Everything that referred to it has been written.
    pub(super) fn release(&mut self) -> Result<()> {
        let blocks: Vec<_> = self.freed.blocks.iter().map(|(first, count)| (*first, *count)).collect();
        let mut pieces: Vec<_> =
            blocks.into_iter().flat_map(|(first, count)| self.by_group(first, count)).collect();
        pieces.sort_unstable();
        for same in pieces.chunk_by(|one, other| one.0 == other.0) {
            self.release_in_group(same)?;
        }
        for number in self.freed.inodes.clone() {
            self.release_inode(number)?;
        }
        Ok(())
    }

    fn release_in_group(&mut self, pieces: &[(u64, Blocks)]) -> Result<()> {
        let Some((group, _)) = pieces.first() else { return Ok(()) };
        let mut found = self.descriptor(*group)?;
        let mut bitmap = self.block_bitmap(&found)?.to_vec();
        let mut count = 0;
        for (_, (index, len)) in pieces {
            set_bits(&mut bitmap, *index, *len, false);
            count += len;
        }
        let free = found.get(descriptor::FREE_BLOCKS).saturating_add(low32(count));
        found.set(descriptor::FREE_BLOCKS, free);
        self.store_block_bitmap(&mut found, bitmap)?;
        self.count_free(count.cast_signed(), 0)
    }

    fn release_inode(&mut self, number: u64) -> Result<()> {
        let mut inode = self.inode(number)?;
        let directory = inode.kind() == guestdisk::fs::FileKind::Directory;
        inode.set_links(0);
        inode.set_size(0);
        inode.set_blocks(0, self.geometry.block, true)?;
        inode.set_attribute_block(0);
        inode.clear_map(inode.has(super::inode::FLAG_EXTENTS));
        inode.set_dtime(low32(self.clock.now().cast_unsigned()));
        self.store(&mut inode)?;
        let mut found = self.descriptor(self.group_of(number))?;
        let mut bitmap = self.inode_bitmap(&found)?.to_vec();
        set_bits(&mut bitmap, (number - 1) % self.geometry.inodes_per_group, 1, false);
        found.set(descriptor::FREE_INODES, found.get(descriptor::FREE_INODES).saturating_add(1));
        if directory {
            found.set(descriptor::DIRECTORIES, found.get(descriptor::DIRECTORIES).saturating_sub(1));
        }
        self.store_inode_bitmap(&mut found, bitmap)?;
        self.count_free(0, 1)
    }

    /// Blocks and inodes that have been given back and not yet been released.
    pub(super) fn given_back(&self) -> (u64, u64) {
        (self.freed.blocks.values().sum(), self.freed.inodes.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeros() {
        let bitmap = [0xff, 0b1100_0011, 0, 0xff];
        assert_eq!(free_run(&bitmap, 0, 32, 100), Some((10, 4)));
        assert_eq!(free_run(&bitmap, 14, 32, 100), Some((16, 8)));
        assert_eq!(free_run(&bitmap, 16, 20, 100), Some((16, 4)));
        assert_eq!(free_run(&bitmap, 16, 32, 3), Some((16, 3)));
        assert_eq!(free_run(&bitmap, 24, 32, 100), None);
        assert_eq!(free_run(&bitmap, 0, 64, 1), Some((10, 1)));
    }

    #[test]
    fn bits_outside_count_as_taken() {
        let mut bitmap = [0; 2];
        set_bits(&mut bitmap, 3, 6, true);
        assert_eq!(bitmap, [0b1111_1000, 1]);
        set_bits(&mut bitmap, 4, 100, false);
        assert_eq!((bitmap, bit(&bitmap, 3), bit(&bitmap, 16)), ([0b1000, 0], true, true));
    }
}
