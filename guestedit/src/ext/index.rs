//! Adding names to directories with a hash tree (kernel documentation, "Hash Tree Directories").
//!
//! ```text
//!   root (block 0: `.`, `..`, then hashes)  -->  nodes (none, one level, or two with large_dir)  -->  blocks of names
//! ```
//!
//! A block of names that is full is split in two at a hash in its middle. A node that is full is split likewise, and a
//! root that is full moves what it has to a new node below it.

use block::{Error, ErrorKind, Result};

use super::hash::Hasher;
use super::inode::Inode;
use super::map::Map;
use super::records::{self, Named};
use super::volume::Volume;
use crate::bytes::{byte, copy_to, corrupt, le16, le32, low32, part, put_le16, put_le32};
use crate::crc::crc32c;

/// Where the limit and the count stand: behind `.`, `..` and the tree's properties, or behind a record that hides the
/// node.
const ROOT_ENTRIES: usize = 0x20;
const NODE_ENTRIES: usize = 8;
const ROOT_LEVELS: usize = 0x1e;
const ENTRY: usize = 8;

/// A node on the way to a block of names.
struct Step {
    /// Where it lies on the device.
    block: u64,
    /// Where its entries begin: the first has the limit and the count in place of a hash.
    entries: usize,
    /// The entry that is followed.
    index: usize,
    count: usize,
    limit: usize,
}

impl Step {
    fn is_full(&self) -> bool {
        self.count >= self.limit
    }
}

impl Volume {
    /// Adds a name to a directory with a hash tree. The directory is not stored.
    pub(super) fn add_indexed(&mut self, dir: &mut Inode, named: &Named) -> Result<()> {
        // Every round that does not end makes the tree wider or deeper.
        for _ in 0..6 {
            let map = self.map(dir)?;
            let (hasher, levels) = self.root_of(&map)?;
            let hash = hasher.hash(&named.name);
            let (steps, leaf) = self.descend(&map, levels, hash)?;
            if self.add_to(dir, leaf, named)? {
                return Ok(());
            }
            if steps.last().is_some_and(|last| !last.is_full()) {
                return self.split_leaf(dir, map, &steps, leaf, named, hasher);
            }
            self.make_room(dir, map, &steps, levels)?;
        }
        Err(corrupt("a hash tree that never has room"))
    }

    /// What the root says of the tree: how names are hashed, and how many levels lie below it.
    fn root_of(&mut self, map: &Map) -> Result<(Hasher, u8)> {
        let root = self.tree_block(map, 0)?;
        let root = self.block(root)?;
        let (version, info, levels) = (byte(&root, 0x1c), byte(&root, 0x1d), byte(&root, ROOT_LEVELS));
        let hasher = Hasher::new(version, self.geometry.hash_unsigned, self.geometry.hash_seed);
        if le32(&root, 0x18) != 0 || info != 8 || levels > self.geometry.most_index_levels() {
            return Err(corrupt(format!("the root of a hash tree of {levels} levels")));
        }
        let hasher =
            hasher.ok_or_else(|| Error::unsupported(format!("hashes of names of the kind {version}")))?;
        Ok((hasher, levels))
    }

    fn tree_block(&self, map: &Map, logical: u64) -> Result<u64> {
        map.block(logical).ok_or_else(|| corrupt(format!("a hash tree refers to block {logical:#x}, a hole")))
    }

    /// Goes down to the block of names for a hash.
    fn descend(&mut self, map: &Map, levels: u8, hash: u32) -> Result<(Vec<Step>, u64)> {
        let (mut steps, mut block, mut entries) = (vec![], self.tree_block(map, 0)?, ROOT_ENTRIES);
        for _ in 0..=levels {
            let node = self.block(block)?;
            let (limit, count) = (usize::from(le16(&node, entries)), usize::from(le16(&node, entries + 2)));
            if count == 0 || count > limit || limit != self.limit(entries) {
                return Err(corrupt(format!("a node of a hash tree has {count} entries, {limit} fit")));
            }
            // The first has no hash: it stands for all that are smaller than the second's.
            let below = (1..count).take_while(|index| le32(&node, entries + ENTRY * index) <= hash);
            let index = below.last().unwrap_or(0);
            let child = u64::from(le32(&node, entries + ENTRY * index + 4) & 0x0fff_ffff);
            steps.push(Step { block, entries, index, count, limit });
            (block, entries) = (self.tree_block(map, child)?, NODE_ENTRIES);
        }
        Ok((steps, block))
    }

    /// How many entries fit.
    fn limit(&self, entries: usize) -> usize {
        let tail = if self.geometry.has_checksums() { ENTRY } else { 0 };
        (self.block_bytes() - entries - tail) / ENTRY
    }

    /// Stores a node with its checksum: over all that is in use, and the tail without the checksum itself.
    fn store_node(&mut self, dir: &Inode, number: u64, mut node: Vec<u8>, entries: usize) -> Result<()> {
        if self.geometry.has_checksums() {
            let count = usize::from(le16(&node, entries + 2));
            let tail = entries + ENTRY * self.limit(entries);
            let crc = crc32c(self.seed_of(dir), part(&node, 0, entries + ENTRY * count));
            let crc = crc32c(crc32c(crc, part(&node, tail, 4)), &[0; 4]);
            put_le32(&mut node, tail + 4, crc);
        }
        self.staged.put(number, node)
    }

    /// A node that is not the root, with these entries of (hash, block), the first hash of which is not stored.
    fn new_node(&self, list: &[(u32, u32)]) -> Vec<u8> {
        let mut node = vec![0; self.block_bytes()];
        let len = node.len();
        records::write_len(&mut node, 0, len);
        self.set_entries(&mut node, NODE_ENTRIES, list);
        node
    }

    fn set_entries(&self, node: &mut [u8], entries: usize, list: &[(u32, u32)]) {
        let limit = self.limit(entries);
        for (index, (hash, block)) in list.iter().enumerate() {
            put_le32(node, entries + ENTRY * index, *hash);
            put_le32(node, entries + ENTRY * index + 4, *block);
        }
        let small = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        put_le16(node, entries, small(limit));
        put_le16(node, entries + 2, small(list.len()));
    }

    fn entries(&mut self, step: &Step) -> Result<Vec<(u32, u32)>> {
        let node = self.block(step.block)?;
        let list = part(&node, step.entries, ENTRY * step.count).chunks_exact(ENTRY);
        Ok(list.enumerate().map(|(at, raw)| (if at == 0 { 0 } else { le32(raw, 0) }, le32(raw, 4))).collect())
    }

    /// Puts an entry behind the one that was followed, where there is room.
    fn add_entry(&mut self, dir: &Inode, step: &Step, hash: u32, block: u64) -> Result<()> {
        let mut list = self.entries(step)?;
        list.insert(step.index + 1, (hash, low32(block)));
        let mut node = self.block(step.block)?.to_vec();
        self.set_entries(&mut node, step.entries, &list);
        self.store_node(dir, step.block, node, step.entries)
    }

    /// Splits a block of names, of which there is one too many.
    fn split_leaf(
        &mut self,
        dir: &mut Inode,
        map: Map,
        steps: &[Step],
        leaf: u64,
        named: &Named,
        hasher: Hasher,
    ) -> Result<()> {
        let parent = steps.last().ok_or_else(|| corrupt("a hash tree without a root"))?;
        let block = self.block(leaf)?;
        let end = self.names_end(&block)?;
        let mut names = vec![(hasher.hash(&named.name), named.clone())];
        for record in records::records(&block, end)?.into_iter().filter(|record| record.inode != 0) {
            let name = record.name(&block).to_vec();
            names.push((hasher.hash(&name), Named { inode: record.inode, kind: record.kind, name }));
        }
        names.sort_by_key(|(hash, _)| *hash);
        let at = self.split_point(&names)?;
        let (low, high): (Vec<_>, Vec<_>) = (
            names[..at].iter().map(|(_, named)| named.clone()).collect(),
            names[at..].iter().map(|(_, named)| named.clone()).collect(),
        );
        // The lowest bit says that names with this hash begin in the block before.
        let continued = u32::from(names[at - 1].0 == names[at].0);
        let (low, high, hash) = (self.new_names(&low)?, self.new_names(&high)?, names[at].0 | continued);
        let (logical, number) = self.append_block(dir, map)?;
        self.store_names(dir, leaf, low)?;
        self.store_names(dir, number, high)?;
        self.add_entry(dir, parent, hash, logical)
    }

    /// Where both halves fit, as near to the middle as can be.
    fn split_point(&self, names: &[(u32, Named)]) -> Result<usize> {
        let size = |part: &[(u32, Named)]| {
            part.iter().map(|(_, one)| records::needed(one.name.len())).sum::<usize>()
        };
        let (all, room) = (size(names), self.new_names_end());
        let fits = |at: &usize| size(&names[..*at]) <= room && size(&names[*at..]) <= room;
        let best = (1..names.len()).filter(fits).min_by_key(|at| (2 * size(&names[..*at])).abs_diff(all));
        best.ok_or_else(|| corrupt("a block of names that cannot be split"))
    }

    /// Makes room in the lowest node on a way, in which there is none.
    fn make_room(&mut self, dir: &mut Inode, map: Map, steps: &[Step], levels: u8) -> Result<()> {
        // The lowest node that is full below one that is not, else the root grows.
        let split = (1..steps.len()).rev().find(|at| steps[*at].is_full() && !steps[*at - 1].is_full());
        if let Some(at) = split {
            let mut list = self.entries(&steps[at])?;
            let mut high = list.split_off(list.len() / 2);
            let hash = high.first().map_or(0, |first| first.0);
            if let Some(first) = high.first_mut() {
                first.0 = 0;
            }
            let (logical, number) = self.append_block(dir, map)?;
            let (low, high) = (self.new_node(&list), self.new_node(&high));
            self.store_node(dir, steps[at].block, low, NODE_ENTRIES)?;
            self.store_node(dir, number, high, NODE_ENTRIES)?;
            return self.add_entry(dir, &steps[at - 1], hash, logical);
        }
        if levels >= self.geometry.most_index_levels() {
            return Err(Error::new(ErrorKind::NoSpace, "the directory's hash tree is full"));
        }
        let root = steps.first().ok_or_else(|| corrupt("a hash tree without a root"))?;
        let list = self.entries(root)?;
        let (logical, number) = self.append_block(dir, map)?;
        let node = self.new_node(&list);
        self.store_node(dir, number, node, NODE_ENTRIES)?;
        let mut raw = self.block(root.block)?.to_vec();
        copy_to(&mut raw, ROOT_LEVELS, &[levels + 1]);
        self.set_entries(&mut raw, ROOT_ENTRIES, &[(0, low32(logical))]);
        self.store_node(dir, root.block, raw, ROOT_ENTRIES)
    }
}
