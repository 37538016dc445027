//! The refcount structures made anew.
//!
//! Blocks and table are written to clusters that nothing refers to, in full, and are durable before the header's
//! two fields switch over to them with one write inside one sector. What was there before is not touched until
//! then, and free afterwards.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use block::Result;
use block::codec::Writer;
use block::num::{low_u32, to_usize};

use super::Check;
use super::compare::StoredRefcounts;
use super::counts::EXCLUSIVE;
use crate::error::Error;
use crate::geometry::MAX_REFCOUNT_TABLE_BYTES;
use crate::refcount::write_counter;

/// Where the refcount table's fields are in the header: offset (48) and clusters (56).
const TABLE_FIELDS_AT: u64 = 48;

/// Places of refcount structures that have not been written yet.
#[derive(Debug)]
pub(super) struct NewRefcounts {
    /// First cluster of the table.
    table: u64,
    table_clusters: u64,
    /// Clusters of the blocks by their index.
    blocks: BTreeMap<u64, u64>,
}

impl Check<'_> {
    /// Finds places for a table and blocks that count everything, themselves included, but not the present ones.
    pub(super) fn place_refcounts(&mut self) -> Result<NewRefcounts> {
        self.uncount_refcounts();
        let bits = self.geometry.refcount_block_bits();
        let mut blocks = BTreeMap::new();
        self.place_blocks(self.used_groups(), &mut blocks)?;
        let mut table_clusters = 0;
        loop {
            table_clusters = self.table_clusters_for(&blocks)?.max(table_clusters);
            let table = self.place(table_clusters, EXCLUSIVE)?;
            let mut wanted: BTreeSet<u64> = (table >> bits..=(table + table_clusters - 1) >> bits).collect();
            wanted.extend(self.ghosts.counted.drain(..).map(|cluster| cluster >> bits));
            self.place_blocks(wanted, &mut blocks)?;
            if self.table_clusters_for(&blocks)? <= table_clusters {
                return Ok(NewRefcounts { table, table_clusters, blocks });
            }
            // The blocks that count the table do not fit into it: a longer one, somewhere else.
            self.unplace(table, table_clusters);
        }
    }

    /// The present structures will not be there any more.
    pub(super) fn uncount_refcounts(&mut self) {
        let first = self.geometry.cluster_of(self.header.refcount_table_offset);
        let table = (first, first + u64::from(self.header.refcount_table_clusters));
        self.exclusive.retain(|range| *range != table);
        for cluster in std::mem::take(&mut self.stored.counted) {
            self.counts.sub(cluster, 1);
            let inside = |(start, end): &(u64, u64)| (*start..*end).contains(&cluster);
            if (table.0..table.1).contains(&cluster) && !self.exclusive.iter().any(inside) {
                self.counts.unmark(cluster, EXCLUSIVE);
            }
        }
    }

    /// Indices of the blocks that count something.
    fn used_groups(&self) -> BTreeSet<u64> {
        let bits = self.geometry.refcount_block_bits();
        let mut slots = vec![0; 1 << bits];
        let mut used = |index: &u64| {
            self.counts.slots(index << bits, &mut slots);
            slots.iter().any(|slot| *slot != 0)
        };
        self.counts.groups(bits, std::iter::empty()).into_iter().filter(|index| used(index)).collect()
    }

    /// Finds a place for every block of `wanted`, and for those that count these places.
    fn place_blocks(&mut self, mut wanted: BTreeSet<u64>, blocks: &mut BTreeMap<u64, u64>) -> Result<()> {
        while let Some(index) = wanted.pop_first() {
            if let Entry::Vacant(block) = blocks.entry(index) {
                let place = *block.insert(self.place(1, 0)?);
                let bits = self.geometry.refcount_block_bits();
                wanted.insert(place >> bits);
                wanted.extend(self.ghosts.counted.drain(..).map(|cluster| cluster >> bits));
            }
        }
        Ok(())
    }

    fn table_clusters_for(&self, blocks: &BTreeMap<u64, u64>) -> Result<u64> {
        let last = blocks.last_key_value().map_or(0, |(index, _)| *index);
        let clusters = self.geometry.clusters_for((last + 1) * 8);
        match self.geometry.offset_of(clusters) <= MAX_REFCOUNT_TABLE_BYTES {
            true => Ok(clusters),
            false => Err(Error::CannotRepair("its refcount table would have to be too large").into()),
        }
    }

    /// Writes the new structures and lets the header name them.
    pub(super) fn write_refcounts(&mut self, new: &NewRefcounts) -> Result<()> {
        self.say(|| "Rebuilding refcount structure".to_owned());
        for (index, place) in &new.blocks {
            let block = self.encode_block(*index);
            self.storage.write_at(&block, self.geometry.offset_of(*place))?;
        }
        let table_offset = self.geometry.offset_of(new.table);
        let mut table = vec![0; to_usize(self.geometry.offset_of(new.table_clusters))];
        for (index, place) in &new.blocks {
            let entry = self.geometry.offset_of(*place).to_be_bytes();
            table[to_usize(*index * 8)..][..8].copy_from_slice(&entry);
        }
        self.storage.write_at(&table, table_offset)?;
        self.storage.sync()?;
        let mut fields = Writer::new();
        fields.be_u64(table_offset).be_u32(low_u32(new.table_clusters));
        self.storage.write_at(&fields.into_bytes(), TABLE_FIELDS_AT)?;
        self.storage.sync()?;
        self.stored = StoredRefcounts::default();
        for (index, place) in &new.blocks {
            self.stored.blocks.insert(*index, self.geometry.offset_of(*place));
        }
        Ok(())
    }

    /// A refcount block with the computed counts.
    pub(super) fn encode_block(&self, index: u64) -> Vec<u8> {
        let bits = self.geometry.refcount_block_bits();
        let mut slots = vec![0; 1 << bits];
        self.counts.slots(index << bits, &mut slots);
        let mut block = vec![0; to_usize(self.geometry.cluster_size())];
        for (within, slot) in (0..).zip(slots).filter(|(_, slot)| *slot != 0) {
            let count = self.counts.decode((index << bits) + within, slot);
            write_counter(&mut block, within, self.geometry.refcount_order, count.references);
        }
        block
    }
}
