//! btrfs on one device (btrfs documentation, "On-disk Format").
//!
//! ```text
//!   superblock --> chunk tree    logical address -> place on the device
//!        |
//!        '-------> root tree --> file tree of a subvolume: inodes, directories, extents, by (object, type, offset)
//! ```
//!
//! Everything is an item in a tree of sorted keys. Addresses are logical: chunks say where they are on the device. Chunks
//! that are kept once or twice are read, of mirrors the copy that is here; striped ones need the other devices. Extents
//! may be compressed. A log tree, which holds what was synced since the last commit, is told of and not applied.

mod chunk;
mod extent;
mod place;
mod tree;

use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use parking_lot::Mutex;

use super::node::{Entry, FileKind, GoOn, Metadata, Node, Nodes};
use super::place::Layout;
use super::source::Source;
use crate::bytes::{self, byte, corrupt, le16, le32, le64, part};
use chunk::Chunks;
use tree::{Key, Root};

/// Where the superblock lies.
const SUPERBLOCK: u64 = 0x1_0000;
/// Incompatible features that are known or change nothing for a reader: all up to the zoned mode, and simple quotas.
const INCOMPAT_KNOWN: u64 = 0x1_1fff;
/// The tree of trees, and the file tree that is there from the beginning.
const TOP_SUBVOLUME: u64 = 5;
/// The most subvolumes whose roots are remembered.
const MOST_ROOTS: usize = 256;

const INODE_ITEM: u8 = 1;
const DIR_ITEM: u8 = 84;
const DIR_INDEX: u8 = 96;
const EXTENT_DATA: u8 = 108;
const ROOT_ITEM: u8 = 132;
const ROOT_REF: u8 = 156;

/// What a snapshot has in the place of a subvolume within the original: a directory that is empty.
const EMPTY: Node = Node { tree: 0, number: 0 };

/// The superblock's fields that are needed, checked.
#[derive(Debug, Clone)]
struct Superblock {
    root: Root,
    chunk_root: Root,
    root_directory: u64,
    node_bytes: u64,
    sector_bytes: u64,
    device: u64,
    devices: u64,
    has_log: bool,
    checksum_type: u16,
    system_chunks: Vec<u8>,
}

impl Superblock {
    fn parse(raw: &[u8]) -> Result<Self> {
        if part(raw, 0x40, 8) != b"_BHRfS_M" {
            return Err(corrupt(format!("the superblock at {SUPERBLOCK:#x} has no magic number")));
        }
        let unknown = le64(raw, 0xbc) & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(Error::unsupported(format!("btrfs with incompatible features {unknown:#x}")));
        }
        let superblock = Self {
            root: Root { address: le64(raw, 0x50), level: byte(raw, 0xc6) },
            chunk_root: Root { address: le64(raw, 0x58), level: byte(raw, 0xc7) },
            root_directory: le64(raw, 0x80),
            node_bytes: le32(raw, 0x94).into(),
            sector_bytes: le32(raw, 0x90).into(),
            device: le64(raw, 0xc9),
            devices: le64(raw, 0x88),
            has_log: le64(raw, 0x60) != 0,
            checksum_type: le16(raw, 0xc4),
            system_chunks: part(raw, 0x32b, (le32(raw, 0xa0) as usize).min(0x800)).to_vec(),
        };
        let size = |bytes: u64| bytes.is_power_of_two() && (4096..=65536).contains(&bytes);
        if !size(superblock.node_bytes) || !size(superblock.sector_bytes) {
            let Self { node_bytes, sector_bytes, .. } = superblock;
            return Err(corrupt(format!("nodes of {node_bytes} bytes, sectors of {sector_bytes}")));
        }
        Ok(superblock)
    }
}

/// A subvolume.
#[derive(Debug, Clone, Copy)]
struct Subvolume {
    root: Root,
    directory: u64,
    /// The last transaction of which there may be a snapshot.
    last_snapshot: u64,
}

/// A btrfs file system.
#[derive(Debug)]
pub(super) struct Btrfs {
    source: Source,
    superblock: Superblock,
    chunks: Chunks,
    /// Where paths begin.
    root: Node,
    subvolumes: Mutex<Vec<(u64, Subvolume)>>,
}

impl Btrfs {
    /// Opens the file system at its default subvolume, or at its top.
    pub(super) fn open(device: Arc<dyn BlockDevice>, top: bool, notes: &mut Vec<String>) -> Result<Self> {
        let superblock = Superblock::parse(&bytes::read_some(&*device, SUPERBLOCK, 4096)?)?;
        if superblock.has_log {
            notes.push(
                "the log tree is not applied: what was synced just before the end may be missing".into(),
            );
        }
        if superblock.devices > 1 {
            notes.push(format!("the file system spans {} devices, of which one is read", superblock.devices));
        }
        let chunks = Chunks::of_system(&superblock.system_chunks, superblock.device)?;
        let mut btrfs = Self {
            source: Source::new(device),
            superblock,
            chunks,
            root: Node { tree: TOP_SUBVOLUME, number: 0 },
            subvolumes: Mutex::default(),
        };
        btrfs.chunks = btrfs.all_chunks().context(|| "chunk tree".to_owned())?;
        let tree = if top { TOP_SUBVOLUME } else { btrfs.default_subvolume()? };
        btrfs.root = Node { tree, number: btrfs.subvolume(tree)?.directory };
        Ok(btrfs)
    }

    /// The subvolume that is mounted if nothing else is said: named in the root tree's directory.
    fn default_subvolume(&self) -> Result<u64> {
        let directory = self.superblock.root_directory;
        let (from, to) = Key::all(directory, DIR_ITEM);
        let mut found = None;
        self.walk(self.superblock.root, from, to, &mut |_, item| {
            let name_len = le16(item, 27).into();
            if part(item, 30, name_len) == b"default" {
                found = Some(Key::parse(item).object);
            }
            Ok(found.is_none())
        })?;
        Ok(found.unwrap_or(TOP_SUBVOLUME))
    }

    /// The root of a file tree.
    fn subvolume(&self, number: u64) -> Result<Subvolume> {
        if let Some((_, known)) = self.subvolumes.lock().iter().find(|(known, _)| *known == number) {
            return Ok(*known);
        }
        let (from, to) = Key::all(number, ROOT_ITEM);
        let mut found = None;
        self.walk(self.superblock.root, from, to, &mut |_, item| {
            let root = Root { address: le64(item, 176), level: byte(item, 238) };
            found = Some(Subvolume { root, directory: le64(item, 168), last_snapshot: le64(item, 200) });
            Ok(true)
        })?;
        let found = found.ok_or_else(|| corrupt(format!("there is no subvolume {number}")))?;
        let mut known = self.subvolumes.lock();
        if known.len() < MOST_ROOTS {
            known.push((number, found));
        }
        Ok(found)
    }

    fn root_of(&self, node: Node) -> Result<Root> {
        Ok(self.subvolume(node.tree)?.root)
    }

    /// The item of an inode.
    fn inode(&self, node: Node) -> Result<Vec<u8>> {
        let (from, to) = Key::all(node.number, INODE_ITEM);
        let mut found = None;
        self.walk(self.root_of(node)?, from, to, &mut |_, item| {
            found = Some(item.to_vec());
            Ok(false)
        })?;
        let inode = found.filter(|item| item.len() >= 160);
        inode.ok_or_else(|| corrupt(format!("there is no inode {} in subvolume {}", node.number, node.tree)))
    }
}

/// What names a node in a directory: an inode of the same subvolume, or another subvolume.
fn entries_of(item: &[u8], directory: Node) -> Result<Vec<(Vec<u8>, Key, u8)>> {
    let (mut entries, mut at) = (vec![], 0);
    while at < item.len() {
        let (data_len, name_len) = (usize::from(le16(item, at + 25)), usize::from(le16(item, at + 27)));
        let name = part(item, at + 30, name_len);
        if name.is_empty() || name.len() < name_len {
            return Err(corrupt(format!("a name of {name_len} bytes in directory {}", directory.number)));
        }
        entries.push((name.to_vec(), Key::parse(part(item, at, 17)), byte(item, at + 29)));
        at += 30 + name_len + data_len;
    }
    Ok(entries)
}

impl Btrfs {
    fn entry(&self, directory: Node, (name, location, kind): (Vec<u8>, Key, u8)) -> Result<Option<Entry>> {
        let node = match location.kind {
            INODE_ITEM => Node { tree: directory.tree, number: location.object },
            ROOT_ITEM if self.is_within(location.object, directory.tree)? => {
                let subvolume = self.subvolume(location.object)?;
                Node { tree: location.object, number: subvolume.directory }
            }
            ROOT_ITEM => EMPTY,
            _ => return Ok(None),
        };
        Ok(Some(Entry { name, node, kind: FileKind::of_entry(kind) }))
    }

    /// Whether a subvolume is known to lie within another: a copy of its name alone does not lead to it.
    fn is_within(&self, subvolume: u64, parent: u64) -> Result<bool> {
        let key = Key { object: parent, kind: ROOT_REF, offset: subvolume };
        Ok(self.floor(self.superblock.root, key)? == Some(key))
    }

    fn check_directory(&self, node: Node) -> Result<()> {
        match self.metadata(node)?.kind {
            FileKind::Directory => Ok(()),
            _ => Err(Error::new(ErrorKind::NotFound, format!("inode {}: not a directory", node.number))),
        }
    }
}

impl Nodes for Btrfs {
    fn work(&self) -> u64 {
        self.source.work()
    }

    fn root(&self) -> Node {
        self.root
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        if node == EMPTY {
            let kind = FileKind::Directory;
            return Ok(Metadata { kind, mode: 0o755, uid: 0, gid: 0, size: 0, mtime: 0, links: 1 });
        }
        let inode = self.inode(node)?;
        let mode = le32(&inode, 52);
        Ok(Metadata {
            kind: FileKind::of_mode(mode),
            mode: mode & 0o7777,
            uid: le32(&inode, 44),
            gid: le32(&inode, 48),
            size: le64(&inode, 16),
            mtime: le64(&inode, 136).cast_signed(),
            links: le32(&inode, 40),
        })
    }

    fn entries(&self, directory: Node, visit: &mut dyn FnMut(Entry) -> Result<GoOn>) -> Result<()> {
        self.check_directory(directory)?;
        if directory == EMPTY {
            return Ok(());
        }
        let (from, to) = Key::all(directory.number, DIR_INDEX);
        self.walk(self.root_of(directory)?, from, to, &mut |_, item| {
            for found in entries_of(item, directory)? {
                if let Some(entry) = self.entry(directory, found)?
                    && !visit(entry)?
                {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// By the hash of the name ("DIR_ITEM").
    fn lookup(&self, directory: Node, name: &[u8]) -> Result<Option<Entry>> {
        self.check_directory(directory)?;
        if directory == EMPTY {
            return Ok(None);
        }
        // CRC-32C that begins with all bits but the lowest, and is not inverted at the end.
        let hash = !crc32c::crc32c_append(1, name);
        let key = Key { object: directory.number, kind: DIR_ITEM, offset: hash.into() };
        let mut found = None;
        self.walk(self.root_of(directory)?, key, key, &mut |_, item| {
            found = entries_of(item, directory)?.into_iter().find(|(own, ..)| own == name);
            Ok(false)
        })?;
        found.map_or(Ok(None), |found| self.entry(directory, found))
    }

    fn read_at(&self, node: Node, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read_data(node, buf, offset).context(|| format!("inode {}", node.number))
    }

    fn layout(&self, node: Node) -> Result<Layout> {
        self.layout_of(node).context(|| format!("inode {}", node.number))
    }

    fn read_link(&self, node: Node) -> Result<Vec<u8>> {
        let size = self.metadata(node)?.size;
        if size > super::node::MOST_LINK {
            return Err(corrupt(format!("inode {}: a symbolic link of {size} bytes", node.number)));
        }
        let mut target = vec![0; to_usize(size)];
        self.read_at(node, &mut target, 0)?;
        Ok(target)
    }
}
