//! One change of a file in place: what is to be written where.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use block::num::to_usize;
use block::{BlockDevice, Error, Result};
use guestdisk::detect::Kind;
use guestdisk::fs::{FileExtent, Kept, Layout, Record};

use super::HINT;
use crate::bytes::{
    be64, byte, copy_to, corrupt, le32, le64, low32, part, put_be32, put_be64, put_le32, put_le64,
};
use crate::crc::crc32c;

/// The largest file that is changed.
const MOST_SIZE: u64 = 1 << 30;
/// The largest block of a file system's own.
const MOST_BLOCK: u64 = 64 << 10;

/// Everything that one change writes.
#[derive(Debug, Default)]
pub(super) struct Patch {
    /// Contents, by their places.
    contents: Vec<(u64, Vec<u8>)>,
    /// Blocks of the file system's own: by the place of the first copy, those of all copies and the bytes.
    blocks: BTreeMap<u64, (Vec<u64>, Vec<u8>)>,
}

fn refuse<T>(reason: impl Into<String>) -> Result<T> {
    Err(Error::unsupported(reason).hint(HINT))
}

impl Patch {
    /// Makes up what gives a file of `size` bytes the contents `bytes`.
    pub(super) fn plan(
        device: &dyn BlockDevice,
        kind: Kind,
        layout: &Layout,
        size: u64,
        bytes: &[u8],
        now: i64,
    ) -> Result<Self> {
        let mut patch = Self::default();
        let len = bytes.len() as u64;
        if size.max(len) > MOST_SIZE {
            return refuse(format!("a file of {} bytes", size.max(len)));
        }
        let unit = layout.unit.clamp(512, MOST_BLOCK);
        let end = size.max(len).next_multiple_of(unit);
        check_cover(layout, len)?;
        // The new contents, then zeros to the end of the old ones.
        for extent in layout.extents.iter().filter(|extent| extent.kept == Kept::Written) {
            let until = extent.offset.saturating_add(extent.len).min(end);
            if until <= extent.offset {
                continue;
            }
            if extent.shared {
                return refuse("other files or snapshots may have the same bytes");
            }
            for copy in &extent.copies {
                block::device::check_range(*copy, until - extent.offset, device.size())?;
            }
            let mut piece = part(bytes, to_usize(extent.offset), to_usize(until - extent.offset)).to_vec();
            piece.resize(to_usize(until - extent.offset), 0);
            for copy in &extent.copies {
                patch.contents.push((*copy, piece.clone()));
            }
            patch.checksums(device, layout, extent, &piece)?;
        }
        match kind {
            Kind::Xfs => patch.xfs_inode(device, &layout.inode, len, now)?,
            Kind::Btrfs => {
                let cut = patch.btrfs_cut(device, layout, len)?;
                patch.btrfs_inode(device, &layout.inode, len, cut, now)?;
            }
            other => return refuse(format!("files on {other} cannot be changed in place")),
        }
        Ok(patch)
    }

    /// Writes it: contents first.
    pub(super) fn write(&self, device: &dyn BlockDevice) -> Result<()> {
        for (place, bytes) in &self.contents {
            device.write_at(bytes, *place)?;
        }
        for (copies, bytes) in self.blocks.values() {
            for place in copies {
                device.write_at(bytes, *place)?;
            }
        }
        Ok(())
    }

    /// The block that a record lies in, as it will be. `check` says whether it fits its checksum.
    fn block(
        &mut self,
        device: &dyn BlockDevice,
        record: &Record,
        check: impl FnOnce(&[u8]) -> bool,
    ) -> Result<&mut Vec<u8>> {
        let first = *record.copies.first().ok_or_else(|| corrupt("a record that lies nowhere"))?;
        let fits = record.within.checked_add(record.len).is_some_and(|end| end <= record.block_len);
        if !fits || record.block_len > MOST_BLOCK {
            return Err(corrupt(format!(
                "a record of {} bytes in a block of {}",
                record.len, record.block_len
            )));
        }
        if record.shared {
            return refuse("snapshots may have the same inode");
        }
        let entry = match self.blocks.entry(first) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut bytes = vec![0; to_usize(record.block_len)];
                for copy in &record.copies {
                    block::device::check_range(*copy, record.block_len, device.size())?;
                }
                device.read_at(&mut bytes, first)?;
                if !check(&bytes) {
                    return Err(corrupt(format!("the checksum of the block at {first:#x} is wrong")));
                }
                entry.insert((record.copies.clone(), bytes))
            }
        };
        Ok(&mut entry.1)
    }

    /// Notes the checksums of the sectors of an extent's first bytes.
    fn checksums(
        &mut self,
        device: &dyn BlockDevice,
        layout: &Layout,
        extent: &FileExtent,
        piece: &[u8],
    ) -> Result<()> {
        let range = extent.offset..extent.offset + piece.len() as u64;
        for run in &layout.checksums {
            let each = to_usize(run.each.max(512));
            let mut sums = vec![];
            for (index, at) in (0..run.record.len / 4).zip((run.offset..).step_by(each)) {
                if range.contains(&at) {
                    let sector = part(piece, to_usize(at - range.start), each);
                    if sector.len() != each {
                        return Err(corrupt("an extent that ends within a sector"));
                    }
                    sums.push((to_usize(4 * index), !crc32c(!0, sector)));
                }
            }
            if sums.is_empty() {
                continue;
            }
            let within = to_usize(run.record.within);
            let block = self.block(device, &run.record, tree_block_fits)?;
            for (at, sum) in sums {
                put_le32(block, within + at, sum);
            }
            seal_tree_block(block);
        }
        Ok(())
    }

    /// "On-disk Inode" of XFS: size, times, and the checksum of version 3.
    fn xfs_inode(&mut self, device: &dyn BlockDevice, record: &Record, size: u64, now: i64) -> Result<()> {
        const BIG_TIME: u64 = 8;
        const CHECKSUM: usize = 100;
        let has_checksum = |inode: &[u8]| byte(inode, 4) == 3;
        let checksum = |inode: &[u8]| {
            let mut copy = inode.to_vec();
            put_le32(&mut copy, CHECKSUM, 0);
            !crc32c(!0, &copy)
        };
        let inode = self.block(device, record, |inode| {
            !has_checksum(inode) || checksum(inode) == le32(inode, CHECKSUM)
        })?;
        put_be64(inode, 56, size);
        for at in [40, 48] {
            if has_checksum(inode) && be64(inode, 120) & BIG_TIME != 0 {
                let since = now.saturating_add(1 << 31).max(0).cast_unsigned();
                put_be64(inode, at, since.saturating_mul(1_000_000_000));
            } else {
                put_be32(inode, at, low32(now.cast_unsigned()));
                put_be32(inode, at + 4, 0);
            }
        }
        if has_checksum(inode) {
            let changes = be64(inode, 104).wrapping_add(1);
            put_be64(inode, 104, changes);
            let sum = checksum(inode);
            put_le32(inode, CHECKSUM, sum);
        }
        Ok(())
    }

    /// Makes the last extent of a file as long as is needed, as truncation does: what is behind it stays with the extent
    /// ("EXTENT_DATA"). Returns how many bytes were cut off.
    fn btrfs_cut(&mut self, device: &dyn BlockDevice, layout: &Layout, size: u64) -> Result<u64> {
        const LEN: usize = 45;
        let end = size.next_multiple_of(layout.unit.clamp(512, MOST_BLOCK));
        let mut cut = 0;
        for extent in &layout.extents {
            let surplus = extent.offset.saturating_add(extent.len).saturating_sub(end);
            if surplus == 0 {
                continue;
            }
            let kept = extent.len.saturating_sub(surplus);
            let item = extent.item.as_ref().filter(|_| kept > 0 && extent.kept == Kept::Written);
            let Some(item) = item else {
                return refuse("a whole extent of it would not be needed any more");
            };
            let block = self.block(device, item, tree_block_fits)?;
            put_le64(block, to_usize(item.within) + LEN, kept);
            seal_tree_block(block);
            cut += surplus;
        }
        Ok(cut)
    }

    /// "INODE_ITEM" of btrfs: size, bytes in use and times.
    fn btrfs_inode(
        &mut self,
        device: &dyn BlockDevice,
        record: &Record,
        size: u64,
        cut: u64,
        now: i64,
    ) -> Result<()> {
        let within = to_usize(record.within);
        if record.len < 160 {
            return Err(corrupt(format!("an inode of {} bytes", record.len)));
        }
        let block = self.block(device, record, tree_block_fits)?;
        let used = le64(block, within + 24).saturating_sub(cut);
        put_le64(block, within + 16, size);
        put_le64(block, within + 24, used);
        for at in [124, 136] {
            put_le64(block, within + at, now.cast_unsigned());
            put_le32(block, within + at + 8, 0);
        }
        seal_tree_block(block);
        Ok(())
    }
}

/// Expects bytes as they are for all of the new contents.
fn check_cover(layout: &Layout, len: u64) -> Result<()> {
    let mut covered = 0;
    for extent in &layout.extents {
        if covered >= len || extent.offset > covered {
            break;
        }
        match extent.kept {
            Kept::Written => covered = covered.max(extent.offset.saturating_add(extent.len)),
            Kept::Inline => return refuse("its bytes are kept among the file system's records"),
            Kept::Compressed => return refuse("it is compressed"),
            Kept::Unwritten => return refuse("a part of it is space that was never written"),
        }
    }
    if covered >= len {
        return Ok(());
    }
    refuse(format!("{len} bytes do not fit into the {covered} that it has space for"))
}

/// Whether the checksum at the start of a block of a tree is right ("Header").
fn tree_block_fits(block: &[u8]) -> bool {
    le32(block, 0) == tree_block_sum(block)
}

fn tree_block_sum(block: &[u8]) -> u32 {
    !crc32c(!0, part(block, 32, block.len()))
}

fn seal_tree_block(block: &mut [u8]) {
    let sum = tree_block_sum(block);
    copy_to(block, 0, &sum.to_le_bytes());
}
