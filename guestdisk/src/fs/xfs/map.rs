//! Where the blocks of a file lie (chapter "Data Extents").

use block::Result;
use block::num::to_usize;

use super::Xfs;
use super::inode::{Format, Inode};
use crate::bytes::{be16, be32, be64, corrupt, part};

/// Trees are never deeper (`XFS_BTREE_MAXLEVELS`).
const MOST_DEPTH: u16 = 9;

/// Consecutive blocks of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// The first block, with its group in the upper bits; `None` for a hole.
    pub(super) start: Option<u64>,
    /// How many blocks, at least one.
    pub(super) blocks: u64,
    /// A hole that is none: the blocks are set aside.
    pub(super) unwritten: bool,
}

/// A record of 128 bits.
struct Extent {
    first: u64,
    start: u64,
    blocks: u64,
    unwritten: bool,
}

impl Extent {
    fn parse(raw: &[u8]) -> Self {
        let (high, low) = (be64(raw, 0), be64(raw, 8));
        Self {
            first: high >> 9 & ((1 << 54) - 1),
            start: (high & 0x1ff) << 43 | low >> 21,
            blocks: low & 0x1f_ffff,
            unwritten: high >> 63 == 1,
        }
    }
}

impl Xfs {
    /// Fills `buf` from `offset` of a file, zeros where it has holes.
    pub(super) fn read_data(&self, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<()> {
        inode.check_data()?;
        if inode.format == Format::Local {
            let found = part(inode.fork(), to_usize(offset), buf.len());
            buf[..found.len()].copy_from_slice(found);
            buf[found.len()..].fill(0);
            return Ok(());
        }
        let (size, mut done) = (self.superblock.block_bytes, 0);
        while done < buf.len() {
            let at = offset + done as u64;
            let run = self.run(inode, at / size)?;
            let len = to_usize(run.blocks.saturating_mul(size) - at % size).min(buf.len() - done);
            let piece = &mut buf[done..done + len];
            match run.start {
                Some(start) => {
                    // Extents lie within one group: the last block says whether this one does.
                    let needed = (at % size + len as u64).div_ceil(size);
                    let (first, last) = (self.offset_of(start)?, self.offset_of(start + needed - 1)?);
                    if last - first != (needed - 1) * size {
                        return Err(corrupt(format!("an extent at {start:#x} that leaves its group")));
                    }
                    self.source.read(piece, first + at % size)?;
                }
                None => piece.fill(0),
            }
            done += len;
        }
        Ok(())
    }

    /// The run that begins with this block of the file.
    pub(super) fn run(&self, inode: &Inode, block: u64) -> Result<Run> {
        let fork = inode.fork();
        match inode.format {
            Format::Extents => {
                let len = to_usize(inode.extents().min(4096)) * 16;
                Ok(find(part(fork, 0, len), block, u64::MAX))
            }
            Format::Tree => self.tree(fork, block),
            Format::Local | Format::Other => Err(corrupt("it has no extents")),
        }
    }

    /// Goes down the tree whose root is the fork ("B+tree Extent List").
    fn tree(&self, fork: &[u8], block: u64) -> Result<Run> {
        let (mut level, mut end) = (be16(fork, 0), u64::MAX);
        if !(1..=MOST_DEPTH).contains(&level) {
            return Err(corrupt(format!("its extent tree has {level} levels")));
        }
        let mut node = Node { bytes: fork.to_vec(), header: 4, records: be16(fork, 2) };
        loop {
            let Some(child) = node.child(block, &mut end)? else {
                return Ok(Run { start: None, blocks: end - block, unwritten: false });
            };
            node = self.tree_block(child, level - 1)?;
            level -= 1;
            if level == 0 {
                let len = usize::from(node.records) * 16;
                return Ok(find(part(&node.bytes, node.header, len), block, end));
            }
        }
    }

    fn tree_block(&self, number: u64, level: u16) -> Result<Node> {
        let bytes = self.source.bytes(self.offset_of(number)?, self.superblock.block_bytes)?;
        let header = match be32(&bytes, 0) {
            0x424d_4150 => 24,
            0x424d_4133 => 72,
            other => {
                return Err(corrupt(format!(
                    "a block of its extent tree at {number:#x} begins with {other:#x}"
                )));
            }
        };
        if be16(&bytes, 4) != level {
            return Err(corrupt(format!(
                "a block of its extent tree at {number:#x} has level {}",
                be16(&bytes, 4)
            )));
        }
        let records = be16(&bytes, 6);
        Ok(Node { bytes, header, records })
    }
}

/// A node of the tree: keys, and room for more of them, then block numbers.
struct Node {
    bytes: Vec<u8>,
    header: usize,
    records: u16,
}

impl Node {
    /// The child for a block, and in `end` where the one after it begins. `None`: the block lies before all of them.
    fn child(&self, block: u64, end: &mut u64) -> Result<Option<u64>> {
        let room = self.bytes.len().saturating_sub(self.header) / 16;
        let records = usize::from(self.records);
        if records == 0 || records > room {
            return Err(corrupt(format!("a node of its extent tree has {records} records, {room} fit")));
        }
        let key = |index: usize| be64(&self.bytes, self.header + 8 * index);
        let mut best = None;
        for index in 0..records {
            if key(index) > block {
                *end = (*end).min(key(index));
                break;
            }
            best = Some(index);
        }
        Ok(best.map(|index| be64(&self.bytes, self.header + 8 * (room + index))))
    }
}

/// Finds a block in a list of extents, after which something else begins at `end`.
fn find(records: &[u8], block: u64, end: u64) -> Run {
    for extent in records.chunks_exact(16).map(Extent::parse) {
        if extent.first > block {
            return Run { start: None, blocks: extent.first.min(end) - block, unwritten: false };
        }
        let within = block - extent.first;
        if within < extent.blocks {
            let start = (!extent.unwritten).then_some(extent.start + within);
            return Run { start, blocks: extent.blocks - within, unwritten: extent.unwritten };
        }
    }
    Run { start: None, blocks: (end - block).max(1), unwritten: false }
}
