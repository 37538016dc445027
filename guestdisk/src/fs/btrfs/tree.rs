//! Trees of items with sorted keys ("B-tree").
//!
//! Whatever the disk says, a walk ends: a node has to lie one level below the one that names it, begin with the key under
//! which it is named, and hold rising keys that stay below the next name. So no node can be visited twice.

use block::Result;
use block::num::to_usize;

use super::super::node::GoOn;
use super::Btrfs;
use crate::bytes::{byte, corrupt, le32, le64, part};

/// The bytes in front of a node's items.
const HEADER: usize = 0x65;
/// The highest level of a root.
const MOST_LEVEL: u8 = 7;

/// What items are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) object: u64,
    pub(super) kind: u8,
    pub(super) offset: u64,
}

impl Key {
    const LAST: Self = Self { object: u64::MAX, kind: u8::MAX, offset: u64::MAX };

    pub(super) fn parse(raw: &[u8]) -> Self {
        Self { object: le64(raw, 0), kind: byte(raw, 8), offset: le64(raw, 9) }
    }

    /// The first and last keys of a kind of items of an object.
    pub(super) fn all(object: u64, kind: u8) -> (Self, Self) {
        (Self { object, kind, offset: 0 }, Self { object, kind, offset: u64::MAX })
    }
}

/// The root of a tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct Root {
    pub(super) address: u64,
    pub(super) level: u8,
}

/// A node whose keys have been checked.
struct Block {
    bytes: Vec<u8>,
    keys: Vec<Key>,
    level: u8,
}

impl Block {
    fn record_len(level: u8) -> usize {
        if level == 0 { 25 } else { 33 }
    }

    fn record(&self, index: usize) -> &[u8] {
        let len = Self::record_len(self.level);
        part(&self.bytes, HEADER + index * len, len)
    }

    /// The node that an entry of an inner one names.
    fn child(&self, index: usize) -> Root {
        Root { address: le64(self.record(index), 17), level: self.level - 1 }
    }

    /// The bytes of a leaf's item.
    fn item(&self, index: usize) -> Result<&[u8]> {
        let (offset, len) = (le32(self.record(index), 17) as usize, le32(self.record(index), 21) as usize);
        let item = part(&self.bytes, HEADER + offset, len);
        if item.len() < len {
            return Err(corrupt(format!("an item of {len} bytes at {offset:#x} of its leaf")));
        }
        Ok(item)
    }
}

/// An item, and where it lies.
pub(super) struct Found<'a> {
    pub(super) key: Key,
    pub(super) item: &'a [u8],
    /// The logical address of its leaf.
    pub(super) leaf: u64,
    /// Where the item begins in its leaf.
    pub(super) within: usize,
    /// The transaction that wrote the leaf.
    pub(super) generation: u64,
}

/// The keys that a node may have: from the first, which it has to have if there is one, to below the other.
#[derive(Clone, Copy)]
struct Bounds {
    first: Option<Key>,
    end: Option<Key>,
}

const ANY: Bounds = Bounds { first: None, end: None };

impl Btrfs {
    fn read_node(&self, root: Root, bounds: Bounds) -> Result<Block> {
        let mut bytes = vec![0; to_usize(self.superblock.node_bytes)];
        self.read_logical(&mut bytes, root.address)?;
        let (address, count, level) = (le64(&bytes, 0x30), le32(&bytes, 0x60) as usize, byte(&bytes, 0x64));
        let room = (bytes.len() - HEADER) / Block::record_len(level);
        if address != root.address || level != root.level || level > MOST_LEVEL || count > room {
            return Err(corrupt(format!(
                "the node at {:#x} says that it is at {address:#x}, of level {level} (not {}), with {count} items",
                root.address, root.level
            )));
        }
        let records = bytes[HEADER..].chunks_exact(Block::record_len(level)).take(count);
        let keys: Vec<_> = records.map(Key::parse).collect();
        let rising = keys.windows(2).all(|pair| pair[0] < pair[1]);
        let first_fits = bounds.first.is_none_or(|first| keys.first() == Some(&first));
        let last_fits = keys.last().is_none_or(|last| bounds.end.is_none_or(|end| *last < end));
        if !rising || !first_fits || !last_fits {
            return Err(corrupt(format!("the keys of the node at {:#x} are out of order", root.address)));
        }
        Ok(Block { bytes, keys, level })
    }

    /// Visits the items with keys from `from` to `to`, both included, in their order, until it has been enough.
    pub(super) fn walk(
        &self,
        root: Root,
        from: Key,
        to: Key,
        visit: &mut dyn FnMut(Key, &[u8]) -> Result<GoOn>,
    ) -> Result<()> {
        self.walk_places(root, from, to, &mut |found| visit(found.key, found.item))
    }

    /// The same, with the places of the items.
    pub(super) fn walk_places(
        &self,
        root: Root,
        from: Key,
        to: Key,
        visit: &mut dyn FnMut(&Found<'_>) -> Result<GoOn>,
    ) -> Result<()> {
        self.walk_node(root, ANY, (from, to), visit).map(drop)
    }

    fn walk_node(
        &self,
        root: Root,
        bounds: Bounds,
        (from, to): (Key, Key),
        visit: &mut dyn FnMut(&Found<'_>) -> Result<GoOn>,
    ) -> Result<GoOn> {
        let node = self.read_node(root, bounds)?;
        // An inner node's entry before `from` may lead to it.
        let before = node.keys.partition_point(|key| *key < from);
        let exact = node.keys.get(before) == Some(&from);
        let start = if node.level == 0 || exact { before } else { before.saturating_sub(1) };
        for (index, key) in node.keys.iter().enumerate().skip(start).take_while(|(_, key)| **key <= to) {
            let go_on = if node.level == 0 {
                let within = HEADER + le32(node.record(index), 17) as usize;
                let (leaf, generation) = (root.address, le64(&node.bytes, 0x50));
                visit(&Found { key: *key, item: node.item(index)?, leaf, within, generation })?
            } else {
                let end = node.keys.get(index + 1).copied().or(bounds.end);
                self.walk_node(node.child(index), Bounds { first: Some(*key), end }, (from, to), visit)?
            };
            if !go_on {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The last key that is not after `key`.
    pub(super) fn floor(&self, root: Root, key: Key) -> Result<Option<Key>> {
        let (mut root, mut bounds) = (root, ANY);
        loop {
            let node = self.read_node(root, bounds)?;
            let after = node.keys.partition_point(|own| *own <= key);
            let Some(index) = after.checked_sub(1) else { return Ok(None) };
            if node.level == 0 {
                return Ok(Some(node.keys[index]));
            }
            let end = node.keys.get(after).copied().or(bounds.end).or(Some(Key::LAST));
            root = node.child(index);
            bounds = Bounds { first: Some(node.keys[index]), end };
        }
    }
}
