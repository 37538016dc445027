//! Where the bytes of a file lie. Blocks behind the end of a file count: it can grow into them.

use block::Result;

use super::super::place::{FileExtent, Kept, Layout, Record};
use super::Xfs;
use super::inode::{Format, Inode};
use crate::bytes::corrupt;

/// The most extents of one file that are told.
const MOST_EXTENTS: usize = 1 << 16;
/// Blocks behind the end of a file that are looked at.
const BEHIND: u64 = 16;

impl Xfs {
    pub(super) fn layout_of(&self, inode: &Inode) -> Result<Layout> {
        inode.check_data()?;
        let place = self.inode_offset(inode.number)?;
        let len = self.superblock.inode_bytes;
        let inode_record = Record { copies: vec![place], block_len: len, within: 0, len, shared: false };
        let extents = match inode.format {
            Format::Local | Format::Other => {
                let (len, copies) = (inode.size(), vec![]);
                vec![FileExtent { offset: 0, len, kept: Kept::Inline, copies, shared: false, item: None }]
            }
            Format::Extents | Format::Tree => self.extents_of(inode)?,
        };
        Ok(Layout { unit: self.superblock.block_bytes, extents, inode: inode_record, checksums: vec![] })
    }

    fn extents_of(&self, inode: &Inode) -> Result<Vec<FileExtent>> {
        let size = self.superblock.block_bytes;
        let end = inode.size().div_ceil(size).saturating_add(BEHIND);
        let (mut extents, mut block) = (vec![], 0);
        for _ in 0..2 * MOST_EXTENTS {
            if block >= end {
                break;
            }
            let run = self.run(inode, block)?;
            if let Some(start) = run.start {
                let (first, last) = (self.offset_of(start)?, self.offset_of(start + run.blocks - 1)?);
                if last - first != (run.blocks - 1) * size {
                    return Err(corrupt(format!("an extent at {start:#x} that leaves its group")));
                }
            }
            if run.start.is_some() || run.unwritten {
                let kept = if run.unwritten { Kept::Unwritten } else { Kept::Written };
                let copies = run.start.map(|start| self.offset_of(start)).transpose()?.into_iter().collect();
                let len = run.blocks.saturating_mul(size);
                let shared = inode.may_share();
                extents.push(FileExtent {
                    offset: block.saturating_mul(size),
                    len,
                    kept,
                    copies,
                    shared,
                    item: None,
                });
            }
            block = block.saturating_add(run.blocks);
        }
        Ok(extents)
    }
}
