//! Where the blocks of a file lie: extent trees and indirect blocks.

use block::Result;
use block::num::to_usize;

use super::inode::{Inode, Layout};
use super::{Ext, about};
use crate::bytes::{corrupt, le16, le32, part};

/// Extent trees are never deeper (kernel documentation, "Extent Tree").
const MOST_DEPTH: u16 = 5;
/// Extents of more blocks than this are space set aside, which reads as zeros.
const UNWRITTEN: u16 = 32768;

/// Consecutive blocks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first block on the device; `None` for a hole.
    pub(super) start: Option<u64>,
    /// How many blocks, at least one.
    pub(super) blocks: u64,
}

impl Ext {
    /// Fills `buf` from `offset` of a file, zeros where it has holes.
    pub(super) fn read_data(&self, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<()> {
        if about(inode.layout(), inode)? == Layout::Inline {
            let (head, tail) = inode.inline();
            let bytes = [head, tail].concat();
            let found = part(&bytes, to_usize(offset), buf.len());
            buf[..found.len()].copy_from_slice(found);
            buf[found.len()..].fill(0);
            return Ok(());
        }
        let (size, mut done) = (self.block_bytes(), 0);
        while done < buf.len() {
            let at = offset + done as u64;
            let wanted = (at % size + (buf.len() - done) as u64).div_ceil(size);
            let run = about(self.run(inode, at / size, wanted), inode)?;
            let len = to_usize(run.blocks.saturating_mul(size) - at % size).min(buf.len() - done);
            let piece = &mut buf[done..done + len];
            match run.start {
                Some(start) => {
                    // The last block is checked, too: nobody else has.
                    self.offset_of(start + run.blocks - 1)?;
                    self.source.read(piece, self.offset_of(start)? + at % size)?;
                }
                None => piece.fill(0),
            }
            done += len;
        }
        Ok(())
    }

    /// The run that begins with this block of the file, of at most so many blocks.
    pub(super) fn run(&self, inode: &Inode, block: u64, most: u64) -> Result<Run> {
        let run = match inode.layout()? {
            Layout::Extents => self.extent(inode, block)?,
            Layout::Indirect => self.indirect_run(inode, block, most)?,
            Layout::Inline => Run { start: None, blocks: 1 },
        };
        Ok(Run { blocks: run.blocks.min(most).max(1), ..run })
    }

    /// Goes down the extent tree to the leaf for a block.
    fn extent(&self, inode: &Inode, block: u64) -> Result<Run> {
        let mut node = inode.block_field().to_vec();
        let (mut end, mut above) = (u64::MAX, MOST_DEPTH + 1);
        loop {
            let (entries, depth) = (usize::from(le16(&node, 2)), le16(&node, 6));
            if le16(&node, 0) != 0xf30a || 12 + 12 * entries > node.len() || depth >= above {
                return Err(corrupt(format!(
                    "a node of its extent tree is damaged (depth {depth}, {entries} entries)"
                )));
            }
            let entries = part(&node, 12, 12 * entries).chunks_exact(12);
            // The last entry that does not begin behind the block, and where the one after it begins.
            let mut best = None;
            for entry in entries {
                let first = u64::from(le32(entry, 0));
                if first > block {
                    end = end.min(first);
                    break;
                }
                best = Some(entry);
            }
            let Some(entry) = best else { return Ok(Run { start: None, blocks: end - block }) };
            if depth == 0 {
                return Ok(leaf(entry, block, end));
            }
            let child = u64::from(le16(entry, 8)) << 32 | u64::from(le32(entry, 4));
            node = self.block(child)?;
            above = depth;
        }
    }

    /// The run of blocks that follow one another, by the pointers of ext2.
    fn indirect_run(&self, inode: &Inode, block: u64, most: u64) -> Result<Run> {
        let start = self.pointer(inode, block)?;
        let mut blocks = 1;
        while blocks < most.min(4096) {
            let next = self.pointer(inode, block + blocks)?;
            if next != start.map(|start| start + blocks) {
                break;
            }
            blocks += 1;
        }
        Ok(Run { start, blocks })
    }

    /// The block that a file's block lies in ("Direct/Indirect Block Addressing"); `None` for a hole.
    fn pointer(&self, inode: &Inode, block: u64) -> Result<Option<u64>> {
        let per_block = self.block_bytes() / 4;
        if block < 12 {
            return Ok(nonzero(le32(inode.block_field(), to_usize(4 * block))));
        }
        let (mut index, mut span) = (block - 12, per_block);
        for level in 0..3 {
            if index < span {
                let root = le32(inode.block_field(), 48 + 4 * level);
                return self.descend(root, index, span / per_block);
            }
            index -= span;
            span = span.saturating_mul(per_block);
        }
        Err(corrupt(format!("block {block:#x} is more than pointers can reach")))
    }

    /// Follows pointers, each of which stands for `span` blocks at the level below.
    fn descend(&self, mut pointer: u32, mut index: u64, mut span: u64) -> Result<Option<u64>> {
        let per_block = self.block_bytes() / 4;
        loop {
            if pointer == 0 {
                return Ok(None);
            }
            let offset = self.offset_of(pointer.into())? + 4 * (index / span);
            let mut bytes = [0; 4];
            self.source.read(&mut bytes, offset)?;
            pointer = u32::from_le_bytes(bytes);
            if span == 1 {
                return Ok(nonzero(pointer));
            }
            index %= span;
            span /= per_block;
        }
    }
}

/// The run in an extent from `block` on. `end` is where the next one begins.
fn leaf(entry: &[u8], block: u64, end: u64) -> Run {
    let (first, len) = (u64::from(le32(entry, 0)), le16(entry, 4));
    let start = u64::from(le16(entry, 6)) << 32 | u64::from(le32(entry, 8));
    let (blocks, written) = if len > UNWRITTEN { (len - UNWRITTEN, false) } else { (len, true) };
    let within = block - first;
    match u64::from(blocks).checked_sub(within) {
        None | Some(0) => Run { start: None, blocks: end - block },
        Some(left) => Run { start: written.then_some(start + within), blocks: left },
    }
}

fn nonzero(pointer: u32) -> Option<u64> {
    (pointer != 0).then_some(pointer.into())
}
