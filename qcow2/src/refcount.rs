//! Refcounts: one counter for every cluster of the file (specification, "Refcount table and blocks").
//!
//! Counters are big-endian integers of 1 to 64 bits; below 8 bits they are packed into bytes from the least
//! significant bit up. Blocks are cached; a changed block stays until a flush has written it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use block::num::to_usize;
use block::{Result, Storage};

use crate::error::Error;
use crate::geometry::Geometry;

/// Bits of a refcount table entry that hold the block's offset.
const TABLE_OFFSET_MASK: u64 = !0x1ff;

/// Reads counter `index` of a block whose counters have `1 << order` bits.
pub(crate) fn read_counter(block: &[u8], index: u64, order: u32) -> u64 {
    let at = to_usize(index);
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let mask = (1u64 << (1 << order)) - 1;
        return (u64::from(block[at / to_usize(per_byte)]) >> shift) & mask;
    }
    let width = 1usize << (order - 3);
    block[at * width..][..width].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes counter `index`; `value` fits the width.
pub(crate) fn write_counter(block: &mut [u8], index: u64, order: u32, value: u64) {
    let at = to_usize(index);
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let mask = ((1u64 << (1 << order)) - 1) << shift;
        let byte = &mut block[at / to_usize(per_byte)];
        *byte = ((u64::from(*byte) & !mask) | (value << shift)).to_be_bytes()[7];
        return;
    }
    let width = 1usize << (order - 3);
    block[at * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

#[derive(Debug)]
struct Block {
    bytes: Vec<u8>,
    dirty: bool,
    writing: bool,
    used: bool,
}

/// The refcounts of an image. Belongs to the metadata lock.
#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    /// Offsets of the refcount blocks, 0 where there is none.
    table: Vec<u64>,
    /// Where the table lies.
    pub(crate) table_offset: u64,
    /// Its clusters.
    pub(crate) table_clusters: u32,
    /// Table entries that a flush has to write.
    dirty_entries: BTreeSet<u64>,
    blocks: HashMap<u64, Block>,
    ring: VecDeque<u64>,
    capacity: usize,
    dirty_blocks: usize,
}

impl Refcounts {
    /// The refcounts of an image whose table is `table`, with a cache of about `bytes`.
    pub(crate) fn new(
        geometry: Geometry,
        table: Vec<u64>,
        table_offset: u64,
        table_clusters: u32,
        bytes: u64,
    ) -> Self {
        let capacity = to_usize(bytes / geometry.cluster_size()).max(4);
        Self {
            geometry,
            table,
            table_offset,
            table_clusters,
            dirty_entries: BTreeSet::new(),
            blocks: HashMap::new(),
            ring: VecDeque::new(),
            capacity,
            dirty_blocks: 0,
        }
    }

    /// Reads and checks a refcount table.
    pub(crate) fn read_table(
        storage: &dyn Storage,
        geometry: &Geometry,
        offset: u64,
        clusters: u32,
    ) -> Result<Vec<u64>> {
        let mut bytes = vec![0; to_usize(u64::from(clusters) << geometry.cluster_bits)];
        storage.read_at(&mut bytes, offset)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_be_bytes(*chunk)).collect())
    }

    /// Which block counts a host cluster.
    pub(crate) fn block_index(&self, cluster: u64) -> u64 {
        cluster >> self.geometry.refcount_block_bits()
    }

    /// Blocks that the table has room for.
    pub(crate) fn table_len(&self) -> u64 {
        self.table.len() as u64
    }

    /// Offset of a block, if there is one.
    pub(crate) fn block_offset(&self, index: u64) -> Option<u64> {
        match self.table.get(to_usize(index)) {
            None | Some(0) => None,
            Some(entry) => Some(entry & TABLE_OFFSET_MASK),
        }
    }

    /// One past the last block that there is.
    pub(crate) fn first_unused_block(&self) -> u64 {
        self.table.iter().rposition(|entry| *entry != 0).map_or(0, |last| last as u64 + 1)
    }

    /// Whether more blocks are changed than the cache should hold.
    pub(crate) fn wants_flush(&self) -> bool {
        self.dirty_blocks >= self.capacity
    }

    fn evict(&mut self) {
        let mut tries = 2 * self.ring.len();
        while self.blocks.len() >= self.capacity && tries > 0 {
            tries -= 1;
            let Some(index) = self.ring.pop_front() else { return };
            match self.blocks.get_mut(&index) {
                None => {}
                Some(block) if block.used || block.dirty || block.writing => {
                    block.used = false;
                    self.ring.push_back(index);
                }
                Some(_) => {
                    self.blocks.remove(&index);
                }
            }
        }
    }

    fn insert(&mut self, index: u64, block: Block) {
        self.evict();
        self.blocks.insert(index, block);
        self.ring.push_back(index);
    }

    /// Brings a block into the cache. `Ok(false)`: there is no such block, all its counters are 0.
    fn load(&mut self, storage: &dyn Storage, index: u64) -> Result<bool> {
        if self.blocks.contains_key(&index) {
            return Ok(true);
        }
        let Some(offset) = self.block_offset(index) else { return Ok(false) };
        if self.geometry.in_cluster(offset) != 0 {
            return Err(Error::RefcountTableEntry { index, entry: offset }.into());
        }
        let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
        storage.read_at(&mut bytes, offset)?;
        self.insert(index, Block { bytes, dirty: false, writing: false, used: false });
        Ok(true)
    }

    /// The counters of a block; `None` if there is no such block and all of them are 0.
    pub(crate) fn block(&mut self, storage: &dyn Storage, index: u64) -> Result<Option<&[u8]>> {
        self.load(storage, index)?;
        Ok(self.blocks.get(&index).map(|block| block.bytes.as_slice()))
    }

    /// The refcount of a host cluster.
    pub(crate) fn get(&mut self, storage: &dyn Storage, cluster: u64) -> Result<u64> {
        let index = self.block_index(cluster);
        if !self.load(storage, index)? {
            return Ok(0);
        }
        let within = cluster & (self.geometry.refcount_block_entries() - 1);
        let order = self.geometry.refcount_order;
        Ok(self.blocks.get_mut(&index).map_or(0, |block| {
            block.used = true;
            read_counter(&block.bytes, within, order)
        }))
    }

    /// Sets the refcount of a host cluster whose block exists.
    pub(crate) fn set(&mut self, storage: &dyn Storage, cluster: u64, value: u64) -> Result<()> {
        let index = self.block_index(cluster);
        self.load(storage, index)?;
        let within = cluster & (self.geometry.refcount_block_entries() - 1);
        let order = self.geometry.refcount_order;
        let Some(block) = self.blocks.get_mut(&index) else {
            return Err(Error::RefcountBlockMissing { cluster }.into());
        };
        write_counter(&mut block.bytes, within, order, value);
        if !block.dirty {
            block.dirty = true;
            self.dirty_blocks += 1;
        }
        Ok(())
    }

    /// The first cluster at or after `from`, below `limit`, whose counter is 0. Looks at one block after
    /// the other; clusters without a block are free.
    pub(crate) fn find_free(
        &mut self,
        storage: &dyn Storage,
        mut from: u64,
        limit: u64,
    ) -> Result<Option<u64>> {
        let bits = self.geometry.refcount_block_bits();
        let order = self.geometry.refcount_order;
        while from < limit {
            let index = from >> bits;
            if !self.load(storage, index)? {
                return Ok(Some(from));
            }
            let end = ((index + 1) << bits).min(limit);
            if let Some(block) = self.blocks.get_mut(&index) {
                block.used = true;
                let first = from & ((1 << bits) - 1);
                let count = end - from;
                if let Some(hit) = (first..first + count).find(|i| read_counter(&block.bytes, *i, order) == 0)
                {
                    return Ok(Some((index << bits) + hit));
                }
            }
            from = end;
        }
        Ok(None)
    }

    /// Counts clusters below `end` whose counter is not 0, until there are `enough` of them.
    pub(crate) fn count_used(&mut self, storage: &dyn Storage, end: u64, enough: u64) -> Result<u64> {
        let bits = self.geometry.refcount_block_bits();
        let order = self.geometry.refcount_order;
        let mut used = 0;
        for index in 0..=(end >> bits) {
            if used >= enough || !self.load(storage, index)? {
                continue;
            }
            if let Some(block) = self.blocks.get(&index) {
                let counters = (end - (index << bits)).min(1 << bits);
                used += (0..counters).filter(|i| read_counter(&block.bytes, *i, order) != 0).count() as u64;
            }
        }
        Ok(used)
    }

    /// One past the last cluster below `end` whose counter is not 0. Goes from block to block: a file that claims to be
    /// enormous costs no more than its refcount table.
    pub(crate) fn used_end(&mut self, storage: &dyn Storage, end: u64) -> Result<u64> {
        let bits = self.geometry.refcount_block_bits();
        let order = self.geometry.refcount_order;
        let mut end = end.min(self.table_len() << bits);
        while end > 0 {
            let index = (end - 1) >> bits;
            let first = index << bits;
            if self.load(storage, index)?
                && let Some(block) = self.blocks.get(&index)
                && let Some(last) =
                    (0..end - first).rev().find(|i| read_counter(&block.bytes, *i, order) != 0)
            {
                return Ok(first + last + 1);
            }
            end = first;
        }
        Ok(0)
    }

    /// Adds an empty block for index `index` at `offset` (its own counter still to be set).
    pub(crate) fn add_block(&mut self, index: u64, offset: u64) {
        self.table[to_usize(index)] = offset;
        self.dirty_entries.insert(index);
        let bytes = vec![0; to_usize(self.geometry.cluster_size())];
        self.insert(index, Block { bytes, dirty: true, writing: false, used: true });
        self.dirty_blocks += 1;
    }

    /// Whether the block with this index counts nothing but the cluster `own`, once.
    pub(crate) fn counts_only(&mut self, storage: &dyn Storage, index: u64, own: u64) -> Result<bool> {
        let bits = self.geometry.refcount_block_bits();
        let (first, end) = (index << bits, (index + 1) << bits);
        for cluster in first..end {
            if self.get(storage, cluster)? != u64::from(cluster == own) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes a block out of the table. What it counted counts as free.
    pub(crate) fn drop_block(&mut self, index: u64) {
        self.table[to_usize(index)] = 0;
        self.dirty_entries.insert(index);
        self.ring.retain(|other| *other != index);
        if self.blocks.remove(&index).is_some_and(|block| block.dirty) {
            self.dirty_blocks -= 1;
        }
    }

    /// Makes room for table entries up to `len` (in memory).
    pub(crate) fn grow_table(&mut self, len: u64) {
        self.table.resize(to_usize(len), 0);
    }

    /// Forgets entries from `len` on, and their blocks.
    pub(crate) fn cut_table(&mut self, len: u64) {
        self.table.truncate(to_usize(len));
        self.dirty_entries.retain(|index| *index < len);
        self.blocks.retain(|index, _| *index < len);
        self.ring.retain(|index| *index < len);
        self.dirty_blocks = self.blocks.values().filter(|block| block.dirty).count();
    }

    /// The table as it is on disk.
    pub(crate) fn encode_table(&self) -> Vec<u8> {
        self.table.iter().flat_map(|entry| entry.to_be_bytes()).collect()
    }

    /// The table has been written in full: no entry is dirty.
    pub(crate) fn table_written(&mut self) {
        self.dirty_entries.clear();
    }

    /// Takes the changed blocks for writing: (index, offset, contents).
    pub(crate) fn take_dirty_blocks(&mut self) -> Vec<(u64, u64, Vec<u8>)> {
        let mut taken: Vec<_> = Vec::with_capacity(self.dirty_blocks);
        for (index, block) in self.blocks.iter_mut().filter(|(_, block)| block.dirty) {
            block.dirty = false;
            block.writing = true;
            let offset = self.table[to_usize(*index)] & TABLE_OFFSET_MASK;
            taken.push((*index, offset, block.bytes.clone()));
        }
        self.dirty_blocks = 0;
        taken.sort_unstable_by_key(|(_, offset, _)| *offset);
        taken
    }

    /// The blocks that have changed since they were written, and those that the table on disk does not name yet.
    pub(crate) fn dirty_indices(&self) -> impl Iterator<Item = u64> {
        let dirty = self.blocks.iter().filter(|(_, block)| block.dirty).map(|(index, _)| *index);
        dirty.chain(self.dirty_entries.iter().copied())
    }

    /// The contents of a block, changes included, without a place in the cache.
    pub(crate) fn copy_block(&self, storage: &dyn Storage, index: u64) -> Result<Vec<u8>> {
        if let Some(block) = self.blocks.get(&index) {
            return Ok(block.bytes.clone());
        }
        let cluster = index << self.geometry.refcount_block_bits();
        let offset = self.block_offset(index).ok_or(Error::RefcountBlockMissing { cluster })?;
        if self.geometry.in_cluster(offset) != 0 {
            return Err(Error::RefcountTableEntry { index, entry: offset }.into());
        }
        let mut bytes = vec![0; to_usize(self.geometry.cluster_size())];
        storage.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// The table is at another place (offset, clusters) now, and so are some blocks (index to offset), among them all
    /// that had changed. All of it is on disk.
    pub(crate) fn relocate(&mut self, table: (u64, u32), blocks: &BTreeMap<u64, u64>) {
        (self.table_offset, self.table_clusters) = table;
        for (index, offset) in blocks {
            self.table[to_usize(*index)] = *offset;
            self.blocks.remove(index);
        }
        self.ring.retain(|index| !blocks.contains_key(index));
        self.dirty_entries.clear();
        self.dirty_blocks = self.blocks.values().filter(|block| block.dirty).count();
    }

    /// Blocks taken for writing are in the file (or are not, and are dirty again).
    pub(crate) fn blocks_written(&mut self, indices: impl Iterator<Item = u64>, ok: bool) {
        for index in indices {
            if let Some(block) = self.blocks.get_mut(&index) {
                block.writing = false;
                if !ok && !block.dirty {
                    block.dirty = true;
                    self.dirty_blocks += 1;
                }
            }
        }
    }

    /// Takes the changed table entries for writing: (index, entry).
    pub(crate) fn take_dirty_entries(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.dirty_entries)
            .into_iter()
            .map(|index| (index, self.table[to_usize(index)]))
            .collect()
    }

    /// Entries taken could not be written.
    pub(crate) fn entries_not_written(&mut self, entries: &[(u64, u64)]) {
        self.dirty_entries.extend(entries.iter().map(|(index, _)| *index));
    }

    /// Whether a flush has anything to write.
    pub(crate) fn is_clean(&self) -> bool {
        self.dirty_blocks == 0 && self.dirty_entries.is_empty()
    }

    /// Offsets of all blocks, for the overlap map.
    pub(crate) fn block_offsets(&self) -> impl Iterator<Item = u64> {
        self.table.iter().map(|entry| entry & TABLE_OFFSET_MASK).filter(|offset| *offset != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_every_width_keep_to_themselves() {
        for order in 0..=6u32 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = vec![0; 64];
            let count = (64 * 8) >> order;
            for i in 0..count {
                write_counter(&mut block, i, order, if i % 3 == 0 { max } else { i & max });
            }
            for i in 0..count {
                let expected = if i % 3 == 0 { max } else { i & max };
                assert_eq!(read_counter(&block, i, order), expected, "order {order} index {i}");
            }
        }
    }

    #[test]
    fn narrow_counters_start_at_the_least_significant_bit() {
        let mut block = vec![0; 2];
        write_counter(&mut block, 1, 0, 1);
        assert_eq!(block, [0b10, 0]);
        write_counter(&mut block, 2, 2, 0xa);
        assert_eq!(block, [0b10, 0x0a]);
    }
}
