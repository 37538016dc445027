//! Where the bytes of a file lie, with their checksums.
//!
//! What is older than the last snapshot of a subvolume may belong to that snapshot as well, and an extent with more than one
//! reference to other files.

use block::{Error, Result};

use super::super::node::Node;
use super::super::place::{Checksums, FileExtent, Kept, Layout, Record};
use super::tree::{Found, Key, Root};
use super::{Btrfs, EXTENT_DATA, INODE_ITEM, ROOT_ITEM};
use crate::bytes::{byte, corrupt, le64};

const EXTENT_TREE: u64 = 2;
const CHECKSUM_TREE: u64 = 7;
const EXTENT_ITEM: u8 = 168;
const EXTENT_CSUM: u8 = 128;
/// The object that checksums belong to.
const CHECKSUMS: u64 = 0u64.wrapping_sub(10);
const FLAG_NODATASUM: u64 = 1;
/// The most extents of one file that are told.
const MOST_EXTENTS: usize = 1 << 16;

/// An extent with its logical address.
struct Placed {
    extent: FileExtent,
    logical: u64,
}

impl Btrfs {
    pub(super) fn layout_of(&self, node: Node) -> Result<Layout> {
        let subvolume = self.subvolume(node.tree)?;
        let (from, to) = Key::all(node.number, INODE_ITEM);
        let mut inode = None;
        self.walk_places(subvolume.root, from, to, &mut |found| {
            inode = Some((
                self.record(found, 0, found.item.len(), subvolume.last_snapshot)?,
                le64(found.item, 64),
            ));
            Ok(false)
        })?;
        let (inode, flags) = inode.ok_or_else(|| corrupt("it has no inode"))?;
        let placed = self.placed(node, subvolume.root, subvolume.last_snapshot)?;
        let mut checksums = vec![];
        if flags & FLAG_NODATASUM == 0 {
            if self.superblock.checksum_type != 0 {
                let kind = self.superblock.checksum_type;
                return Err(Error::unsupported(format!("checksums of the kind {kind}")));
            }
            let root = self.tree_root(CHECKSUM_TREE)?;
            for one in placed.iter().filter(|one| one.extent.kept == Kept::Written) {
                self.checksums_of(root, one, &mut checksums)?;
            }
        }
        let extents = placed.into_iter().map(|one| one.extent).collect();
        Ok(Layout { unit: self.superblock.sector_bytes, extents, inode, checksums })
    }

    /// The root of a tree that is no subvolume.
    fn tree_root(&self, tree: u64) -> Result<Root> {
        let (from, to) = Key::all(tree, ROOT_ITEM);
        let mut found = None;
        self.walk(self.superblock.root, from, to, &mut |_, item| {
            found = Some(Root { address: le64(item, 176), level: byte(item, 238) });
            Ok(true)
        })?;
        found.ok_or_else(|| corrupt(format!("there is no tree {tree}")))
    }

    /// A part of an item as a record. What is older than `snapshot` may be shared.
    fn record(&self, found: &Found<'_>, from: usize, len: usize, snapshot: u64) -> Result<Record> {
        let block_len = self.superblock.node_bytes;
        Ok(Record {
            copies: self.chunks.copies(found.leaf, block_len)?,
            block_len,
            within: (found.within + from) as u64,
            len: len as u64,
            shared: snapshot != 0 && found.generation <= snapshot,
        })
    }

    fn placed(&self, node: Node, root: Root, snapshot: u64) -> Result<Vec<Placed>> {
        let extent_root = self.tree_root(EXTENT_TREE)?;
        let (from, to) = Key::all(node.number, EXTENT_DATA);
        let mut placed = vec![];
        self.walk_places(root, from, to, &mut |found| {
            let item = found.item;
            let (inline, compressed) = (byte(item, 20) == 0, byte(item, 16) != 0);
            let (logical, size) = (le64(item, 21), le64(item, 29));
            if !inline && logical == 0 {
                return Ok(true);
            }
            let kept = match (inline, compressed, byte(item, 20)) {
                (true, ..) => Kept::Inline,
                (_, true, _) => Kept::Compressed,
                (_, _, 1) => Kept::Written,
                _ => Kept::Unwritten,
            };
            let plain = matches!(kept, Kept::Written | Kept::Unwritten);
            let old = snapshot != 0 && (le64(item, 0) <= snapshot || found.generation <= snapshot);
            let shared = old || !inline && self.references(extent_root, logical, size)? != 1;
            let len = if inline { le64(item, 8) } else { le64(item, 45) };
            let start =
                logical.checked_add(le64(item, 37)).ok_or_else(|| corrupt("an extent without end"))?;
            let copies = if plain { self.chunks.copies(start, len)? } else { vec![] };
            if placed.len() >= MOST_EXTENTS {
                return Err(Error::unsupported(format!("a file of more than {MOST_EXTENTS} extents")));
            }
            let item = Some(self.record(found, 0, item.len(), snapshot)?);
            let extent = FileExtent { offset: found.key.offset, len, kept, copies, shared, item };
            placed.push(Placed { extent, logical: start });
            Ok(true)
        })?;
        Ok(placed)
    }

    /// How often files refer to an extent.
    fn references(&self, root: Root, logical: u64, len: u64) -> Result<u64> {
        let key = Key { object: logical, kind: EXTENT_ITEM, offset: len };
        let mut count = 0;
        self.walk(root, key, key, &mut |_, item| {
            count = le64(item, 0);
            Ok(false)
        })?;
        Ok(count)
    }

    /// The checksums of an extent, each sector of which has to have one.
    fn checksums_of(&self, root: Root, one: &Placed, list: &mut Vec<Checksums>) -> Result<()> {
        let sector = self.superblock.sector_bytes;
        let key = |offset| Key { object: CHECKSUMS, kind: EXTENT_CSUM, offset };
        let end = one.logical.checked_add(one.extent.len).ok_or_else(|| corrupt("an extent without end"))?;
        let first = self.floor(root, key(one.logical))?.filter(|first| first.object == CHECKSUMS);
        let mut next = one.logical;
        self.walk_places(
            root,
            first.unwrap_or(key(one.logical)),
            key(end.saturating_sub(1)),
            &mut |found| {
                let item_end = found.key.offset.saturating_add(found.item.len() as u64 / 4 * sector);
                if found.key.kind != EXTENT_CSUM || item_end <= next || found.key.offset > next {
                    return Ok(true);
                }
                let skipped = (next - found.key.offset) / sector;
                let count = (item_end.min(end) - next).div_ceil(sector);
                let (from, len) = (block::num::to_usize(4 * skipped), block::num::to_usize(4 * count));
                let record = self.record(found, from, len, 0)?;
                list.push(Checksums {
                    offset: one.extent.offset + (next - one.logical),
                    each: sector,
                    record,
                });
                next += count * sector;
                Ok(next < end)
            },
        )?;
        if next < end {
            return Err(corrupt(format!("the bytes at {next:#x} have no checksum")));
        }
        Ok(())
    }
}
