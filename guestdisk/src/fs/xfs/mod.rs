//! XFS, versions 4 and 5 ("XFS Algorithms & Data Structures", third edition).
//!
//! ```text
//!   allocation group 0                    allocation group 1
//!   +------------+--------------------+---+------------+-------------------- ..
//!   | superblock | free space, inodes |   | (copy)     |
//!   +------------+--------------------+---+------------+-------------------- ..
//! ```
//!
//! Block and inode numbers name their group in the upper bits. An inode ends with its fork: the bytes themselves, a list
//! of extents, or the root of a tree of them. Directories are read from one end of their data blocks to the other;
//! hashes are not needed for that. A log that was not finished is told of, and not replayed.

mod dir;
mod free;
mod inode;
mod log;
mod map;
mod place;
mod replay;

use std::ops::Range;
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};

use super::node::{Entry, FileKind, GoOn, Metadata, Node, Nodes};
use super::place::Layout;
use super::source::Source;
use crate::bytes::{self, be16, be32, be64, byte, corrupt};
use inode::{Format, Inode};

/// Incompatible features that change nothing for a reader or are known here: file types, sparse inodes, the second UUID,
/// big timestamps, a need of repair, large extent counts, exchanged ranges, parent pointers, a metadata directory.
const INCOMPAT_KNOWN: u32 = 0x1ff;
const INCOMPAT_FTYPE: u32 = 0x1;

/// The superblock's fields that are needed, checked (chapter "Superblocks").
#[derive(Debug, Clone)]
struct Superblock {
    block_bytes: u64,
    sector_bytes: u64,
    blocks: u64,
    group_blocks: u64,
    groups: u64,
    root: u64,
    inode_bytes: u64,
    /// Bits of a block number within its group.
    group_bits: u32,
    /// Bits of an inode number within its block.
    inode_bits: u32,
    directory_block_bytes: u64,
    version: u16,
    has_file_types: bool,
    needs_repair: bool,
    log_start: u64,
    log_blocks: u64,
}

impl Superblock {
    fn parse(raw: &[u8]) -> Result<Self> {
        if !raw.starts_with(b"XFSB") {
            return Err(corrupt("the superblock has no magic number"));
        }
        let (flags, version) = (be16(raw, 100), be16(raw, 100) & 15);
        if !matches!(version, 4 | 5) || version == 4 && flags & 0x2000 == 0 {
            return Err(Error::unsupported(format!("XFS of version {flags:#x}")));
        }
        let incompat = if version == 5 { be32(raw, 216) } else { 0 };
        if incompat & !INCOMPAT_KNOWN != 0 {
            let unknown = incompat & !INCOMPAT_KNOWN;
            return Err(Error::unsupported(format!("XFS with incompatible features {unknown:#x}")));
        }
        let (block_bits, directory_bits) = (byte(raw, 120), byte(raw, 192));
        let superblock = Self {
            block_bytes: be32(raw, 4).into(),
            sector_bytes: be16(raw, 102).into(),
            blocks: be64(raw, 8),
            group_blocks: be32(raw, 84).into(),
            groups: be32(raw, 88).into(),
            root: be64(raw, 56),
            inode_bytes: be16(raw, 104).into(),
            group_bits: byte(raw, 124).into(),
            inode_bits: byte(raw, 123).into(),
            directory_block_bytes: 1 << (u32::from(block_bits) + u32::from(directory_bits)).min(63),
            version,
            has_file_types: incompat & INCOMPAT_FTYPE != 0 || version == 4 && be32(raw, 200) & 0x200 != 0,
            needs_repair: incompat & 0x10 != 0,
            log_start: be64(raw, 48),
            log_blocks: be32(raw, 96).into(),
        };
        superblock.check(block_bits)
    }

    fn check(self, block_bits: u8) -> Result<Self> {
        let sound = matches!(self.block_bytes, 512..=65536)
            && matches!(self.sector_bytes, 512..=32768)
            && self.block_bytes == 1 << block_bits.min(63)
            && matches!(self.inode_bytes, 256..=2048)
            && self.inode_bytes.is_power_of_two()
            && self.inode_bytes <= self.block_bytes
            && self.inode_bytes << self.inode_bits.min(32) == self.block_bytes
            && self.directory_block_bytes <= 65536
            && self.group_blocks > 0
            && self.group_bits < 32
            && self.group_blocks <= 1 << self.group_bits
            && self.groups > 0;
        if sound { Ok(self) } else { Err(corrupt(format!("the superblock contradicts itself: {self:?}"))) }
    }
}

/// An XFS file system.
#[derive(Debug)]
pub(super) struct Xfs {
    source: Source,
    superblock: Superblock,
}

impl Xfs {
    pub(super) fn open(device: Arc<dyn BlockDevice>, notes: &mut Vec<String>) -> Result<Self> {
        let superblock = Superblock::parse(&bytes::read_some(&*device, 0, 512)?)?;
        let xfs = Self { source: Source::new(device), superblock };
        if xfs.superblock.needs_repair {
            notes.push("the file system says that it needs xfs_repair".into());
        }
        match log::is_settled(&xfs) {
            Ok(true) => {}
            Ok(false) => notes.push(
                "the log was not finished, and is not replayed: the newest changes may be missing or halfway"
                    .into(),
            ),
            Err(error) => notes.push(format!("the log cannot be read ({error})")),
        }
        Ok(xfs)
    }

    /// Where a block lies, of a number with its group in the upper bits.
    fn offset_of(&self, block: u64) -> Result<u64> {
        let superblock = &self.superblock;
        let (group, within) = (block >> superblock.group_bits, block & ((1 << superblock.group_bits) - 1));
        let linear = group.checked_mul(superblock.group_blocks).and_then(|first| first.checked_add(within));
        let linear = linear.filter(|linear| {
            group < superblock.groups && within < superblock.group_blocks && *linear < superblock.blocks
        });
        linear.and_then(|linear| linear.checked_mul(superblock.block_bytes)).ok_or_else(|| {
            corrupt(format!("block {block:#x} is none of the file system's {:#x}", superblock.blocks))
        })
    }

    /// Where an inode lies.
    fn inode_offset(&self, number: u64) -> Result<u64> {
        let superblock = &self.superblock;
        let (block, index) = (number >> superblock.inode_bits, number & ((1 << superblock.inode_bits) - 1));
        Ok(self.offset_of(block)? + index * superblock.inode_bytes)
    }

    fn inode(&self, number: u64) -> Result<Inode> {
        let raw = self.source.bytes(self.inode_offset(number)?, self.superblock.inode_bytes)?;
        Inode::parse(number, raw).context(|| format!("inode {number}"))
    }

    /// A symbolic link whose path does not fit into the inode (chapter "Symbolic Links"): each extent has a header in
    /// version 5.
    fn remote_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        let header = if self.superblock.version == 5 { 56 } else { 0 };
        let (size, mut target, mut block) = (to_usize(inode.size()), vec![], 0);
        while target.len() < size {
            let run = self.run(inode, block)?;
            let start = run.start.ok_or_else(|| corrupt("its path has a hole"))?;
            let room = run.blocks.min(64) * self.superblock.block_bytes;
            let len = room.saturating_sub(header).min((size - target.len()) as u64);
            target.extend(self.source.bytes(self.offset_of(start)? + header, len)?);
            block += run.blocks;
        }
        Ok(target)
    }
}

impl Nodes for Xfs {
    fn work(&self) -> u64 {
        self.source.work()
    }

    fn root(&self) -> Node {
        Node::new(self.superblock.root)
    }

    fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        self.free_ranges()
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        Ok(self.inode(node.number)?.metadata())
    }

    fn entries(&self, directory: Node, visit: &mut dyn FnMut(Entry) -> Result<GoOn>) -> Result<()> {
        let inode = self.inode(directory.number)?;
        if inode.metadata().kind != FileKind::Directory {
            return Err(Error::new(ErrorKind::NotFound, format!("inode {}: not a directory", inode.number)));
        }
        self.directory(&inode, visit).context(|| format!("inode {}", inode.number))
    }

    fn read_at(&self, node: Node, buf: &mut [u8], offset: u64) -> Result<()> {
        let inode = self.inode(node.number)?;
        self.read_data(&inode, buf, offset).context(|| format!("inode {}", inode.number))
    }

    fn layout(&self, node: Node) -> Result<Layout> {
        self.layout_of(&self.inode(node.number)?).context(|| format!("inode {}", node.number))
    }

    fn read_link(&self, node: Node) -> Result<Vec<u8>> {
        let inode = self.inode(node.number)?;
        if inode.size() > super::node::MOST_LINK {
            return Err(corrupt(format!(
                "inode {}: a symbolic link of {} bytes",
                inode.number,
                inode.size()
            )));
        }
        match inode.format {
            Format::Local => Ok(bytes::part(inode.fork(), 0, to_usize(inode.size())).to_vec()),
            _ => self.remote_link(&inode).context(|| format!("inode {}", inode.number)),
        }
    }
}
