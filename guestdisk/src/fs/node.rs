//! What every file system has: nodes with metadata, directories of names, bytes.

use std::fmt::Debug;
use std::ops::Range;

use block::num::to_usize;
use block::{Error, ErrorKind, Result};

use super::place::Layout;

/// A file, directory or anything else of a file system, by its number (and its tree where there are several).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node {
    /// The tree that the number counts in: a subvolume of btrfs, else 0.
    pub tree: u64,
    /// The inode number, or what the file system has in its place.
    pub number: u64,
}

impl Node {
    pub(crate) const fn new(number: u64) -> Self {
        Self { tree: 0, number }
    }
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// Bytes.
    File,
    /// Names of other nodes.
    Directory,
    /// The path of another node.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// Something that has no name here.
    Unknown,
}

impl FileKind {
    /// By the upper four bits of a Unix mode.
    pub(crate) fn of_mode(mode: u32) -> Self {
        match mode >> 12 & 15 {
            1 => Self::Fifo,
            2 => Self::CharDevice,
            4 => Self::Directory,
            6 => Self::BlockDevice,
            8 => Self::File,
            10 => Self::Symlink,
            12 => Self::Socket,
            _ => Self::Unknown,
        }
    }

    /// By the type byte of a directory entry, which ext4, XFS and btrfs share.
    pub(crate) fn of_entry(byte: u8) -> Self {
        match byte {
            1 => Self::File,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            6 => Self::Socket,
            7 => Self::Symlink,
            _ => Self::Unknown,
        }
    }
}

/// What is known of a node besides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metadata {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes; of a directory, whatever the file system says.
    pub size: u64,
    /// Last change of the contents, in seconds since 1970 UTC.
    pub mtime: i64,
    /// Names that it has.
    pub links: u32,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) node: Node,
    /// `Unknown` where only the node itself knows.
    pub(crate) kind: FileKind,
}

/// Whether to go on with the next entry.
pub(crate) type GoOn = bool;

/// A file system by the numbers of its nodes. [`FileSystem`](super::FileSystem) makes paths of it.
pub(crate) trait Nodes: Debug + Send + Sync {
    /// The directory that paths begin in.
    fn root(&self) -> Node;

    /// Bytes of the device that hold nothing, in order; `None` if that cannot be known for certain.
    fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        Ok(None)
    }

    /// How much has been read so far, in pages.
    fn work(&self) -> u64;

    fn metadata(&self, node: Node) -> Result<Metadata>;

    /// Calls `visit` with every entry but `.` and `..`, until it says that it has seen enough.
    fn entries(&self, directory: Node, visit: &mut dyn FnMut(Entry) -> Result<GoOn>) -> Result<()>;

    /// The entry of this name.
    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Entry>> {
        let mut found = None;
        self.entries(directory, &mut |entry| {
            if self.same_name(&entry.name, name) {
                found = Some(entry);
            }
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    /// Whether two names are the same to the file system.
    fn same_name(&self, one: &[u8], other: &[u8]) -> bool {
        one == other
    }

    /// Fills `buf` from `offset`, which together lie within the node's size.
    fn read_at(&self, node: Node, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Where a file's bytes lie, and what speaks of them.
    fn layout(&self, node: Node) -> Result<Layout> {
        let _ = node;
        Err(Error::unsupported("where the bytes of its files lie is not told for this file system"))
    }

    /// The path that a symbolic link holds.
    fn read_link(&self, node: Node) -> Result<Vec<u8>> {
        let size = self.metadata(node)?.size;
        if size > MOST_LINK {
            return Err(Error::new(ErrorKind::Corrupt, format!("a symbolic link of {size} bytes")));
        }
        let mut target = vec![0; to_usize(size)];
        self.read_at(node, &mut target, 0)?;
        Ok(target)
    }
}

/// The most bytes of a symbolic link: as many as Linux takes.
pub(crate) const MOST_LINK: u64 = 4096;
