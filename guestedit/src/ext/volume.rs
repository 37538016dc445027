//! The file system as blocks, descriptors and inodes, each stored with its checksum (kernel documentation, "Checksums").

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Result};

use super::inode::Inode;
use super::superblock::{Geometry, LEN, OFFSET, field};
use crate::bytes::{copy_to, corrupt, high16, le16, le32, low16, part, put_le16, put_le32};
use crate::crc::{crc16, crc32c};
use crate::staged::Staged;
use crate::types::Clock;

/// Fields of a group descriptor ("Block Group Descriptors"), each with the place of its upper half.
pub(super) mod descriptor {
    pub(in crate::ext) const FREE_BLOCKS: (usize, usize) = (0xc, 0x2c);
    pub(in crate::ext) const FREE_INODES: (usize, usize) = (0xe, 0x2e);
    pub(in crate::ext) const DIRECTORIES: (usize, usize) = (0x10, 0x30);
    pub(in crate::ext) const UNUSED_INODES: (usize, usize) = (0x1c, 0x32);
    pub(in crate::ext) const BLOCK_BITMAP_CHECKSUM: (usize, usize) = (0x18, 0x38);
    pub(in crate::ext) const INODE_BITMAP_CHECKSUM: (usize, usize) = (0x1a, 0x3a);
    pub(in crate::ext) const FLAGS: usize = 0x12;
    pub(in crate::ext) const CHECKSUM: usize = 0x1e;
    pub(in crate::ext) const FLAG_INODE_UNINIT: u16 = 1;
    pub(in crate::ext) const FLAG_BLOCK_UNINIT: u16 = 2;
}

/// A group descriptor.
#[derive(Debug, Clone)]
pub(super) struct Descriptor {
    pub(super) group: u64,
    raw: Vec<u8>,
}

impl Descriptor {
    fn wide(&self) -> bool {
        self.raw.len() >= 64
    }

    fn block_at(&self, low: usize, high: usize) -> u64 {
        let high = if self.wide() { le32(&self.raw, high) } else { 0 };
        u64::from(high) << 32 | u64::from(le32(&self.raw, low))
    }

    pub(super) fn block_bitmap(&self) -> u64 {
        self.block_at(0, 0x20)
    }

    pub(super) fn inode_bitmap(&self) -> u64 {
        self.block_at(4, 0x24)
    }

    pub(super) fn inode_table(&self) -> u64 {
        self.block_at(8, 0x28)
    }

    pub(super) fn get(&self, (low, high): (usize, usize)) -> u32 {
        let high = if self.wide() { le16(&self.raw, high) } else { 0 };
        u32::from(high) << 16 | u32::from(le16(&self.raw, low))
    }

    pub(super) fn set(&mut self, (low, high): (usize, usize), value: u32) {
        put_le16(&mut self.raw, low, low16(value));
        if self.wide() {
            put_le16(&mut self.raw, high, high16(value));
        }
    }

    pub(super) fn flags(&self) -> u16 {
        le16(&self.raw, descriptor::FLAGS)
    }

    pub(super) fn clear_flags(&mut self, mask: u16) {
        let flags = self.flags() & !mask;
        put_le16(&mut self.raw, descriptor::FLAGS, flags);
    }
}

/// What is given back only when nothing on the device refers to it any more.
#[derive(Debug, Default)]
pub(super) struct Freed {
    /// Blocks, by the first of each run, with its length.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// Runs that the operation under way has added, in order.
    pub(super) current: Vec<u64>,
    /// Inodes.
    pub(super) inodes: Vec<u64>,
    /// How many of them finished operations have added.
    pub(super) accepted_inodes: usize,
}

/// An ext file system as blocks.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) staged: Staged,
    pub(super) geometry: Geometry,
    pub(super) clock: Clock,
    /// Blocks of the file system's own structures: sorted, disjoint runs of first block and length.
    pub(super) system: Vec<(u64, u64)>,
    pub(super) freed: Freed,
    /// Blocks that keep account of others: superblock, descriptors, bitmaps.
    pub(super) accounts: HashSet<u64>,
    /// Blocks that have been taken since the last sync and hold metadata.
    pub(super) fresh: HashSet<u64>,
    /// Blocks of metadata that have been looked at, and how many may be before it is too much for one operation.
    work: u64,
    budget: u64,
}

/// Blocks that one operation may look at. A directory of a million names has about twenty thousand.
const MOST_WORK: u64 = 1 << 20;

impl Volume {
    pub(super) fn open(device: Arc<dyn BlockDevice>, clock: Clock) -> Result<Self> {
        let mut raw = vec![0; LEN];
        block::device::check_range(OFFSET, LEN as u64, device.size())?;
        device.read_at(&mut raw, OFFSET)?;
        let geometry = Geometry::parse(&raw, device.size())?;
        Ok(Self {
            staged: Staged::new(device, geometry.block),
            geometry,
            clock,
            system: vec![],
            freed: Freed::default(),
            accounts: HashSet::new(),
            fresh: HashSet::new(),
            work: 0,
            budget: u64::MAX,
        })
    }

    pub(super) fn block_bytes(&self) -> usize {
        to_usize(self.geometry.block)
    }

    /// One block of the file system.
    pub(super) fn block(&mut self, number: u64) -> Result<Arc<Vec<u8>>> {
        self.check_block(number, 1)?;
        self.work += 1;
        if self.work > self.budget {
            return Err(block::Error::unsupported("it takes too much work to find what is asked for"));
        }
        self.staged.get(number)
    }

    /// Refuses blocks outside the file system.
    pub(super) fn check_block(&self, first: u64, count: u64) -> Result<()> {
        let geometry = &self.geometry;
        let end = first.checked_add(count).filter(|end| *end <= geometry.blocks);
        if first < geometry.first_data_block.max(1) || end.is_none() {
            return Err(corrupt(format!(
                "{count} blocks at {first:#x} are none of the file system's {:#x}",
                geometry.blocks
            )));
        }
        Ok(())
    }

    /// Finds the blocks of the file system's own structures.
    pub(super) fn survey(&mut self) -> Result<()> {
        let geometry = self.geometry.clone();
        let table = (geometry.inodes_per_group * geometry.inode_bytes).div_ceil(geometry.block);
        let mut runs = vec![];
        self.accounts.insert(geometry.superblock_place().0);
        for group in 0..geometry.groups {
            let descriptor = self.descriptor(group)?;
            self.accounts.insert(geometry.descriptor_place(group).0);
            let head = geometry.head_blocks(group).min(geometry.group_len(group));
            runs.push((geometry.group_start(group), head));
            for (first, count) in [
                (descriptor.block_bitmap(), 1),
                (descriptor.inode_bitmap(), 1),
                (descriptor.inode_table(), table),
            ] {
                self.check_block(first, count)
                    .map_err(|error| error.context(format!("the descriptor of group {group}")))?;
                runs.push((first, count));
            }
        }
        runs.sort_unstable();
        for (first, count) in runs.into_iter().filter(|run| run.1 > 0) {
            match self.system.last_mut() {
                Some(last) if first < last.0 + last.1 => {
                    return Err(corrupt(format!("two structures of the file system share block {first:#x}")));
                }
                Some(last) if first == last.0 + last.1 => last.1 += count,
                _ => self.system.push((first, count)),
            }
        }
        Ok(())
    }

    /// Whether blocks are among the file system's own structures.
    pub(super) fn is_system(&self, first: u64, count: u64) -> bool {
        is_in(&self.system, first, count)
    }

    // Superblock and descriptors.

    /// Changes the superblock.
    pub(super) fn edit_superblock(&mut self, change: impl FnOnce(&mut [u8])) -> Result<()> {
        let (block, at) = self.geometry.superblock_place();
        let has_checksums = self.geometry.has_checksums();
        let bytes = self.staged.edit(block)?;
        let raw = bytes.get_mut(at..at + LEN).ok_or_else(|| corrupt("the superblock lies outside"))?;
        change(raw);
        if has_checksums {
            let checksum = crc32c(!0, part(raw, 0, field::CHECKSUM));
            put_le32(raw, field::CHECKSUM, checksum);
        }
        Ok(())
    }

    /// The superblock as it is now.
    pub(super) fn superblock(&mut self) -> Result<Vec<u8>> {
        let (block, at) = self.geometry.superblock_place();
        Ok(part(&self.staged.get(block)?, at, LEN).to_vec())
    }

    pub(super) fn descriptor(&mut self, group: u64) -> Result<Descriptor> {
        let (block, at) = self.geometry.descriptor_place(group);
        let raw = part(&self.block(block)?, at, to_usize(self.geometry.descriptor_bytes)).to_vec();
        Ok(Descriptor { group, raw })
    }

    pub(super) fn store_descriptor(&mut self, found: &mut Descriptor) -> Result<()> {
        if self.geometry.has_group_checksums() {
            let checksum = self.descriptor_checksum(found);
            put_le16(&mut found.raw, descriptor::CHECKSUM, checksum);
        }
        let (block, at) = self.geometry.descriptor_place(found.group);
        copy_to(self.staged.edit(block)?, at, &found.raw);
        Ok(())
    }

    fn descriptor_checksum(&self, found: &Descriptor) -> u16 {
        let geometry = &self.geometry;
        let group = u32::try_from(found.group).unwrap_or(u32::MAX).to_le_bytes();
        let (head, tail) = (part(&found.raw, 0, descriptor::CHECKSUM), part(&found.raw, 0x20, usize::MAX));
        if geometry.has_checksums() {
            let crc = crc32c(crc32c(crc32c(geometry.seed, &group), head), &[0, 0]);
            return low16(crc32c(crc, tail));
        }
        let crc = crc16(crc16(crc16(!0, &geometry.uuid), &group), head);
        if geometry.is_wide() { crc16(crc, tail) } else { crc }
    }

    // Inodes.

    /// Where an inode lies: its block, and where in it.
    fn inode_place(&mut self, number: u64) -> Result<(u64, usize)> {
        let geometry = &self.geometry;
        if number == 0 || number > geometry.inodes {
            return Err(corrupt(format!("there is no inode {number} among {}", geometry.inodes)));
        }
        let (group, index) =
            ((number - 1) / geometry.inodes_per_group, (number - 1) % geometry.inodes_per_group);
        let (offset, block) = (index * geometry.inode_bytes, geometry.block);
        let table = self.descriptor(group)?.inode_table();
        Ok((table + offset / block, to_usize(offset % block)))
    }

    pub(super) fn inode(&mut self, number: u64) -> Result<Inode> {
        let (block, at) = self.inode_place(number)?;
        let raw = part(&self.block(block)?, at, to_usize(self.geometry.inode_bytes)).to_vec();
        Ok(Inode::new(number, raw))
    }

    pub(super) fn store(&mut self, inode: &mut Inode) -> Result<()> {
        if self.geometry.has_checksums() {
            inode.update_checksum(self.geometry.seed);
        }
        let (block, at) = self.inode_place(inode.number)?;
        copy_to(self.staged.edit(block)?, at, inode.raw());
        Ok(())
    }

    /// What the checksums of an inode's blocks begin with.
    pub(super) fn seed_of(&self, inode: &Inode) -> u32 {
        inode.seed(self.geometry.seed)
    }

    // Operations.

    /// Whatever comes is as much work as it is.
    pub(super) fn unbounded(&mut self) {
        self.budget = u64::MAX;
    }

    /// An operation begins.
    pub(super) fn begin(&mut self) {
        self.budget = self.work.saturating_add(MOST_WORK);
    }

    /// The operation is done.
    pub(super) fn accept(&mut self) {
        self.staged.accept();
        self.freed.current.clear();
        self.freed.accepted_inodes = self.freed.inodes.len();
    }

    /// The operation failed.
    pub(super) fn abandon(&mut self) {
        self.staged.abandon();
        for first in self.freed.current.drain(..) {
            self.freed.blocks.remove(&first);
        }
        self.freed.inodes.truncate(self.freed.accepted_inodes);
    }
}

/// Whether some of these blocks are among sorted runs.
pub(super) fn is_in(runs: &[(u64, u64)], first: u64, count: u64) -> bool {
    let after = runs.partition_point(|run| run.0 < first + count);
    after.checked_sub(1).and_then(|index| runs.get(index)).is_some_and(|run| run.0 + run.1 > first)
}
