//! ext2, ext3 and ext4 (kernel documentation, "ext4 Data Structures and Algorithms").
//!
//! ```text
//!   block 0    1 ...                                      group 0            group 1
//!   +------+------------+-------------------+---------------------------+--------------- ..
//!   | boot | superblock | group descriptors | bitmaps, inodes, data     |
//!   +------+------------+-------------------+---------------------------+--------------- ..
//!                          |                           ^
//!                          '-- where each group's inode table lies (flex_bg: anywhere)
//! ```
//!
//! An inode maps its blocks by a tree of extents, by the three indirect blocks of ext2, or holds its bytes itself. All
//! directories are read from one end to the other: the hash trees hide in blocks that look empty. A journal that was not
//! finished is replayed, in memory ([`journal`]); checksums are not looked at.

mod dir;
mod free;
mod inode;
mod journal;
mod map;
pub(crate) mod superblock;

use std::ops::Range;
use std::sync::Arc;

use block::{BlockDevice, Result};

use super::node::{Entry, FileKind, GoOn, Metadata, Node, Nodes};
use super::source::Source;
use crate::bytes::{corrupt, le16, le32};
use inode::Inode;
use superblock::Superblock;

/// The inode of the root directory.
const ROOT: u64 = 2;

/// An ext file system.
#[derive(Debug)]
pub(super) struct Ext {
    source: Source,
    superblock: Superblock,
}

impl Ext {
    /// Opens the file system and brings its journal to an end. What is to be said of that goes to `notes`.
    pub(super) fn open(device: Arc<dyn BlockDevice>, notes: &mut Vec<String>) -> Result<Self> {
        let superblock = Superblock::read(&*device)?;
        let ext = Self { source: Source::new(device), superblock };
        if !ext.superblock.needs_recovery() {
            return Ok(ext);
        }
        let Some(device) = journal::replay(&ext, notes)? else { return Ok(ext) };
        // The superblock may be among what the journal holds.
        let superblock = Superblock::read(&*device)?;
        Ok(Self { source: Source::new(device), superblock })
    }

    fn block_bytes(&self) -> u64 {
        self.superblock.block_bytes
    }

    /// One block of the file system.
    fn block(&self, number: u64) -> Result<Vec<u8>> {
        let offset = self.offset_of(number)?;
        self.source.bytes(offset, self.block_bytes())
    }

    /// Where a block lies, in bytes.
    fn offset_of(&self, number: u64) -> Result<u64> {
        let known = number != 0 && number < self.superblock.blocks;
        known.then(|| number.checked_mul(self.block_bytes())).flatten().ok_or_else(|| {
            corrupt(format!("block {number:#x} is none of the file system's {:#x}", self.superblock.blocks))
        })
    }

    /// Reads an inode.
    fn inode(&self, number: u64) -> Result<Inode> {
        let superblock = &self.superblock;
        if number == 0 || number > superblock.inodes {
            return Err(corrupt(format!("there is no inode {number} among {}", superblock.inodes)));
        }
        let index = number - 1;
        let (group, index) = (index / superblock.inodes_per_group, index % superblock.inodes_per_group);
        let table = self.inode_table(group)?;
        let offset = self.offset_of(table)? + index * superblock.inode_bytes;
        Inode::parse(number, self.source.bytes(offset, superblock.inode_bytes)?)
    }

    /// The first block of a group's inode table ("Block Group Descriptors").
    fn inode_table(&self, group: u64) -> Result<u64> {
        let descriptor = self.descriptor(group)?;
        let high = if descriptor.len() >= 64 { le32(&descriptor, 0x28) } else { 0 };
        Ok(u64::from(high) << 32 | u64::from(le32(&descriptor, 8)))
    }

    /// The descriptor of a group.
    fn descriptor(&self, group: u64) -> Result<Vec<u8>> {
        let superblock = &self.superblock;
        let per_block = superblock.block_bytes / superblock.descriptor_bytes;
        let block = superblock.descriptor_block(group / per_block);
        let offset = self.offset_of(block)? + group % per_block * superblock.descriptor_bytes;
        self.source.bytes(offset, superblock.descriptor_bytes)
    }
}

impl Nodes for Ext {
    fn work(&self) -> u64 {
        self.source.work()
    }

    fn root(&self) -> Node {
        Node::new(ROOT)
    }

    fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        self.free_ranges()
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        Ok(self.inode(node.number)?.metadata())
    }

    fn entries(&self, directory: Node, visit: &mut dyn FnMut(Entry) -> Result<GoOn>) -> Result<()> {
        let inode = self.inode(directory.number)?;
        self.directory(&inode, visit)
    }

    fn read_at(&self, node: Node, buf: &mut [u8], offset: u64) -> Result<()> {
        let inode = self.inode(node.number)?;
        self.read_data(&inode, buf, offset)
    }

    fn read_link(&self, node: Node) -> Result<Vec<u8>> {
        let inode = self.inode(node.number)?;
        if inode.metadata().size > super::node::MOST_LINK {
            return Err(corrupt(format!(
                "inode {}: a symbolic link of {} bytes",
                inode.number,
                inode.size()
            )));
        }
        let mut target = vec![0; block::num::to_usize(inode.size())];
        if inode.is_fast_link() {
            let held = inode.block_field();
            let len = target.len().min(held.len());
            target[..len].copy_from_slice(&held[..len]);
        } else {
            self.read_data(&inode, &mut target, 0)?;
        }
        Ok(target)
    }
}

/// Says which inode an error is about.
fn about<T>(result: Result<T>, inode: &Inode) -> Result<T> {
    use block::ResultExt as _;
    result.context(|| format!("inode {}", inode.number))
}

/// Whether the bits of `mask` are all in `flags`.
const fn has(flags: u32, mask: u32) -> bool {
    flags & mask == mask
}

/// The kind of an entry where the byte for it is in use.
fn entry_kind(superblock: &Superblock, byte: u8) -> FileKind {
    if superblock.has_file_types() { FileKind::of_entry(byte) } else { FileKind::Unknown }
}

/// The length of a record in a directory: 65536 does not fit into 16 bits ("Linear (Classic) Directories").
fn record_len(bytes: &[u8], at: usize, block_bytes: u64) -> usize {
    match le16(bytes, at) {
        0 | 0xffff if block_bytes == 65536 => 65536,
        len => len.into(),
    }
}
