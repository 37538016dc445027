//! How the refcounts change when a snapshot is created, applied or deleted: added up over all tables first, held
//! against the counters, and written only when everything is known to be right.
//!
//! Memory: 4 bytes and three bits for every cluster that a touched refcount block counts.

use std::collections::HashMap;

use block::num::to_usize;
use block::{Error as BlockError, ErrorKind, Result};

use crate::error::Error;
use crate::geometry::Geometry;
use crate::l2::Entry;
use crate::metadata::MetadataMap;
use crate::refcount::{read_counter, write_counter};

/// One bit for every cluster that a refcount block counts.
#[derive(Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(len: u64) -> Self {
        Self(vec![0; to_usize(len.div_ceil(64))])
    }

    fn get(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 != 0
    }

    fn set(&mut self, index: usize, on: bool) {
        let bit = 1 << (index % 64);
        if on { self.0[index / 64] |= bit } else { self.0[index / 64] &= !bit }
    }
}

/// What happens to the clusters that one refcount block counts.
#[derive(Debug)]
struct Block {
    index: u64,
    change: Vec<i32>,
    /// Holds a structure of the image, or an L2 table that is part of the change.
    metadata: Bits,
    /// The refcount will be 1.
    once: Bits,
    /// The refcount will be 0.
    gone: Bits,
}

/// The sum of all changes.
#[derive(Debug)]
pub(super) struct Tally<'a> {
    geometry: Geometry,
    map: &'a MetadataMap,
    blocks: Vec<Block>,
    places: HashMap<u64, usize>,
    /// The block that was touched last.
    last: Option<(u64, usize)>,
}

impl<'a> Tally<'a> {
    pub(super) fn new(geometry: Geometry, map: &'a MetadataMap) -> Self {
        Self { geometry, map, blocks: Vec::new(), places: HashMap::new(), last: None }
    }

    /// The refcount block that counts a cluster, and which of its counters.
    fn position(&self, cluster: u64) -> (u64, usize) {
        let bits = self.geometry.refcount_block_bits();
        (cluster >> bits, to_usize(cluster & ((1 << bits) - 1)))
    }

    fn find(&self, index: u64) -> Option<&Block> {
        match self.last {
            Some((last, place)) if last == index => self.blocks.get(place),
            _ => self.places.get(&index).and_then(|place| self.blocks.get(*place)),
        }
    }

    fn block(&mut self, index: u64) -> &mut Block {
        let place = match self.last {
            Some((last, place)) if last == index => place,
            _ => self.places.get(&index).copied().unwrap_or_else(|| self.new_block(index)),
        };
        self.last = Some((index, place));
        &mut self.blocks[place]
    }

    fn new_block(&mut self, index: u64) -> usize {
        let bits = self.geometry.refcount_block_bits();
        let counters = self.geometry.refcount_block_entries();
        let mut metadata = Bits::new(counters);
        let first = index << bits;
        self.map.visit(first, first + counters, |cluster| metadata.set(to_usize(cluster - first), true));
        self.blocks.push(Block {
            index,
            change: vec![0; to_usize(counters)],
            metadata,
            once: Bits::new(counters),
            gone: Bits::new(counters),
        });
        let place = self.blocks.len() - 1;
        self.places.insert(index, place);
        place
    }

    /// Notes that `by` references to a cluster come (or, below 0, go).
    pub(super) fn add(&mut self, cluster: u64, by: i32) -> Result<()> {
        let max = self.geometry.max_refcount();
        let (index, at) = self.position(cluster);
        let change = &mut self.block(index).change[at];
        *change = change.checked_add(by).ok_or(Error::RefcountRange {
            cluster,
            value: i128::from(*change) + i128::from(by),
            max,
        })?;
        Ok(())
    }

    /// Notes that a cluster holds an L2 table, where no guest data may be.
    pub(super) fn mark_table(&mut self, cluster: u64) {
        let (index, at) = self.position(cluster);
        self.block(index).metadata.set(at, true);
    }

    /// Notes the references of one L2 table, `by` times. `first_guest` is the guest offset of its first entry; `counted`
    /// says which refcount blocks there are, by index.
    pub(super) fn add_table(
        &mut self,
        bytes: &[u8],
        by: i32,
        first_guest: u64,
        decode: impl Fn(&[u8], u64) -> Result<Entry>,
        counted: impl Fn(u64) -> bool,
    ) -> Result<()> {
        let size = to_usize(self.geometry.l2_entry_size());
        let mut guest = first_guest;
        for raw in bytes.chunks_exact(size) {
            if raw.iter().any(|byte| *byte != 0) {
                let (offset, len) = match decode(raw, guest)? {
                    Entry::Plain { host: Some(host), .. } => (host, 1),
                    Entry::Plain { .. } => (0, 0),
                    Entry::Compressed { offset, len } => (offset, len),
                };
                if len > 0 {
                    self.add_data(offset, len, by, guest, &counted)?;
                }
            }
            guest += self.geometry.cluster_size();
        }
        Ok(())
    }

    /// Notes references to the clusters under `len` bytes of guest data.
    fn add_data(
        &mut self,
        offset: u64,
        len: u64,
        by: i32,
        guest: u64,
        counted: impl Fn(u64) -> bool,
    ) -> Result<()> {
        for cluster in self.geometry.cluster_of(offset)..=self.geometry.cluster_of(offset + len - 1) {
            let (index, at) = self.position(cluster);
            // Entries that lead anywhere must not cost the memory of all the blocks that could count anything.
            if self.find(index).is_none() && !counted(index) {
                return Err(Error::RefcountBlockMissing { cluster }.into());
            }
            if self.block(index).metadata.get(at) {
                let what = self.map.hit(cluster, cluster + 1).map_or("tables", |(_, kind)| kind.name());
                return Err(Error::DataOnMetadata { guest, offset, what }.into());
            }
            self.add(cluster, by)?;
        }
        Ok(())
    }

    /// The refcount blocks that change.
    pub(super) fn block_indices(&self) -> impl Iterator<Item = u64> {
        self.blocks.iter().filter(|block| block.change.iter().any(|by| *by != 0)).map(|block| block.index)
    }

    /// How often a cluster will be referred to, if that changes: 0, 1, or 2 for more than once. Known once
    /// [`settle`](Self::settle) has been called.
    pub(super) fn outcome(&self, cluster: u64) -> Option<u32> {
        let (index, at) = self.position(cluster);
        let block = self.find(index).filter(|block| block.change[at] != 0)?;
        Some(if block.gone.get(at) { 0 } else { 2 - u32::from(block.once.get(at)) })
    }

    /// Holds all changes against the counters; `counters` reads a refcount block.
    ///
    /// # Errors
    /// A counter would leave its range, or counts 0 references to what is referred to.
    pub(super) fn settle(&mut self, mut counters: impl FnMut(u64) -> Result<Vec<u8>>) -> Result<()> {
        for place in 0..self.blocks.len() {
            let index = self.blocks[place].index;
            if self.blocks[place].change.iter().any(|by| *by != 0) {
                let mut bytes = counters(index)?;
                self.apply(index, &mut bytes)?;
            }
        }
        Ok(())
    }

    /// Changes the counters of a refcount block.
    ///
    /// # Errors
    /// As [`settle`](Self::settle).
    pub(super) fn apply(&mut self, index: u64, bytes: &mut [u8]) -> Result<()> {
        let geometry = self.geometry;
        let Some(place) = self.places.get(&index) else { return Ok(()) };
        let block = &mut self.blocks[*place];
        for at in 0..block.change.len() {
            let by = block.change[at];
            if by == 0 {
                continue;
            }
            let old = read_counter(bytes, at as u64, geometry.refcount_order);
            let cluster = (index << geometry.refcount_block_bits()) + at as u64;
            let new = changed(&geometry, cluster, old, by)?;
            write_counter(bytes, at as u64, geometry.refcount_order, new);
            block.once.set(at, new == 1);
            block.gone.set(at, new == 0);
        }
        Ok(())
    }

    /// Calls `visit` with (first cluster, clusters) of every run that is referred to no more.
    pub(super) fn for_each_freed(&self, mut visit: impl FnMut(u64, u64)) {
        let bits = self.geometry.refcount_block_bits();
        for block in &self.blocks {
            let mut run: Option<(u64, u64)> = None;
            for at in (0..block.change.len()).filter(|at| block.change[*at] != 0 && block.gone.get(*at)) {
                let cluster = (block.index << bits) + at as u64;
                match &mut run {
                    Some((first, count)) if *first + *count == cluster => *count += 1,
                    _ => {
                        if let Some((first, count)) = run.replace((cluster, 1)) {
                            visit(first, count);
                        }
                    }
                }
            }
            if let Some((first, count)) = run {
                visit(first, count);
            }
        }
    }
}

/// A counter after a change.
fn changed(geometry: &Geometry, cluster: u64, old: u64, by: i32) -> Result<u64> {
    let value = i128::from(old) + i128::from(by);
    let max = geometry.max_refcount();
    match u64::try_from(value) {
        Ok(new) if new <= max && old > 0 => Ok(new),
        Ok(new) if new > max && old > 0 => {
            // QEMU's word for it, so that scripts find it.
            Err(BlockError::new(ErrorKind::Unsupported, "Invalid argument").hint(format!(
                "A cluster would be in use {value} times, and this image can count to {max} only (refcount_bits={})",
                1u32 << geometry.refcount_order
            )))
        }
        _ => Err(Error::RefcountRange { cluster, value, max }.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A few tables whose entries lead everywhere took gigabytes before they were found to be wrong.
    #[test]
    fn entries_that_nothing_counts_take_no_memory() {
        let geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false };
        let map = MetadataMap::new(&geometry, std::iter::empty());
        let mut tally = Tally::new(geometry, &map);
        let decode = |raw: &[u8], _| {
            let host = raw.first_chunk().map_or(0, |word| u64::from_be_bytes(*word));
            Ok(Entry::Plain { host: Some(host), copied: true, allocated: 1, zero: 0 })
        };
        let table: Vec<u8> = (1..=8192u64).flat_map(|i| (i << 31).to_be_bytes()).collect();
        assert!(tally.add_table(&table, 1, 0, decode, |index| index < 10).is_err());
        assert_eq!(tally.blocks.len(), 9);
    }
}
