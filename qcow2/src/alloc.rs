//! Giving out and taking back host clusters.
//!
//! Everything here happens under the image's metadata lock and touches refcounts in memory only (and new
//! refcount blocks, which nothing refers to yet). When they reach the disk is decided by
//! [`flush`](crate::flush).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use block::num::to_usize;
use block::{Error as BlockError, ErrorKind, Result, Storage};

use crate::cache::Slice;
use crate::error::Error;
use crate::geometry::{Geometry, MAX_REFCOUNT_TABLE_BYTES};
use crate::l2::MAX_HOST_OFFSET;
use crate::metadata::MetadataMap;
use crate::refcount::Refcounts;

/// A run of host clusters just given out, each with refcount 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Offset of the first.
    pub(crate) offset: u64,
    /// How many.
    pub(crate) clusters: u64,
    /// Nothing has ever been written there: the file reads as zeros.
    pub(crate) fresh: bool,
}

/// What the metadata lock protects.
#[derive(Debug)]
pub(crate) struct Meta {
    pub(crate) geometry: Geometry,
    pub(crate) refcounts: Refcounts,
    /// No cluster below this one is free.
    free_hint: u64,
    /// No cluster from this one on has ever been written.
    fresh_from: u64,
    /// L2 slices changed since the last flush, by host offset.
    pub(crate) dirty_slices: HashMap<u64, Arc<Slice>>,
    /// L1 entries changed since the last flush.
    pub(crate) dirty_l1: BTreeSet<u64>,
    /// Clusters that nothing refers to once the present tables are on disk: (offset, clusters).
    pub(crate) pending_free: Vec<(u64, u64)>,
    /// Host clusters set aside for guest clusters, (offset, fresh).
    pub(crate) reserved: HashMap<u64, (u64, bool)>,
    /// Where the next compressed cluster can go: a byte inside a partly filled host cluster.
    compressed_tail: Option<u64>,
    /// The dirty bit is set in the header (lazy refcounts).
    pub(crate) marked_dirty: bool,
    /// The refcount table may be moved now: no flush is under way. See [`Meta::ensure_block`].
    pub(crate) may_grow_table: bool,
    /// An allocation failed because the refcount table has no entry for this block.
    pub(crate) growth_needed: Option<u64>,
    /// Writing the header has failed: on disk it may name the old tables or the new ones, or say either size. The
    /// next flush writes it again before anything else. See [`Qcow2::settle_header`](crate::Qcow2).
    pub(crate) header_unsure: bool,
}

impl Meta {
    /// The state of a just opened image whose container has `file_len` bytes, or is of fixed length.
    pub(crate) fn new(
        geometry: Geometry,
        refcounts: Refcounts,
        file_len: Option<u64>,
        marked_dirty: bool,
    ) -> Self {
        Self {
            geometry,
            refcounts,
            free_hint: 0,
            fresh_from: file_len.map_or(u64::MAX, |len| geometry.clusters_for(len)),
            dirty_slices: HashMap::new(),
            dirty_l1: BTreeSet::new(),
            pending_free: Vec::new(),
            reserved: HashMap::new(),
            compressed_tail: None,
            marked_dirty,
            may_grow_table: false,
            growth_needed: None,
            header_unsure: false,
        }
    }

    /// Gives out up to `max` clusters that follow each other (at least one).
    pub(crate) fn allocate(&mut self, storage: &dyn Storage, map: &MetadataMap, max: u64) -> Result<Run> {
        loop {
            let first = self.next_free(storage, map)?;
            if self.ensure_block(storage, map, first)? {
                continue; // the new block has taken clusters: look again
            }
            let end = self.free_run_end(storage, map, first, first + max)?;
            return self.take(storage, first, end);
        }
    }

    /// Gives out exactly `count` clusters that follow each other.
    pub(crate) fn allocate_contiguous(
        &mut self,
        storage: &dyn Storage,
        map: &MetadataMap,
        count: u64,
    ) -> Result<Run> {
        if count >= self.geometry.refcount_block_entries() / 2 {
            return self.allocate_beyond(storage, map, count);
        }
        let mut from = self.next_free(storage, map)?;
        loop {
            let mut made_block = false;
            let mut cluster = from;
            while cluster < from + count {
                made_block |= self.ensure_block(storage, map, cluster)?;
                cluster = (self.refcounts.block_index(cluster) + 1) << self.geometry.refcount_block_bits();
            }
            if made_block {
                continue;
            }
            let end = self.free_run_end(storage, map, from, from + count)?;
            if end - from == count {
                let hint = self.free_hint;
                let run = self.take(storage, from, end)?;
                self.free_hint = if hint < from { hint } else { end };
                return Ok(run);
            }
            from = self.free_from(storage, map, end + 1)?;
        }
    }

    /// The same behind everything that is counted, for runs that few refcount blocks can count: a new block usually
    /// lies in the range that it counts, and would lie in the way of a run that takes all of it. Here the new blocks
    /// lie side by side in front of the run.
    fn allocate_beyond(&mut self, storage: &dyn Storage, map: &MetadataMap, count: u64) -> Result<Run> {
        let bits = self.geometry.refcount_block_bits();
        let blocks = (1..).find(|blocks| (blocks + count) <= blocks << bits).unwrap_or(count);
        let limit = MAX_HOST_OFFSET >> self.geometry.cluster_bits;
        let mut index = self.refcounts.first_unused_block();
        loop {
            let first = index << bits;
            let end = first + blocks + count;
            if end > limit {
                let text = "the image file has reached the format's largest size";
                return Err(BlockError::new(ErrorKind::NoSpace, text));
            }
            if let Some((past, _)) = map.hit(first, end) {
                index = (past >> bits) + 1;
                continue;
            }
            if index + blocks > self.refcounts.table_len() {
                if !self.may_grow_table {
                    self.growth_needed = Some(index + blocks - 1);
                    return Err(BlockError::new(ErrorKind::NoSpace, "the refcount table is full"));
                }
                self.grow_refcount_table(storage, map, index + blocks - 1)?;
                index = self.refcounts.first_unused_block();
                continue;
            }
            (0..blocks).for_each(|i| self.refcounts.add_block(index + i, self.geometry.offset_of(first + i)));
            map.claim(first, blocks);
            let hint = self.free_hint;
            self.take(storage, first, first + blocks)?;
            let run = self.take(storage, first + blocks, end)?;
            self.free_hint = hint;
            return Ok(run);
        }
    }

    /// Marks `first..end` as used, once each.
    fn take(&mut self, storage: &dyn Storage, first: u64, end: u64) -> Result<Run> {
        for cluster in first..end {
            if let Err(error) = self.refcounts.set(storage, cluster, 1) {
                // Nobody will ever give back what has been counted so far.
                let _ = (first..cluster).try_for_each(|taken| self.refcounts.set(storage, taken, 0));
                return Err(error);
            }
        }
        let fresh = first >= self.fresh_from;
        self.fresh_from = self.fresh_from.max(end);
        self.free_hint = end;
        Ok(Run { offset: self.geometry.offset_of(first), clusters: end - first, fresh })
    }

    fn next_free(&mut self, storage: &dyn Storage, map: &MetadataMap) -> Result<u64> {
        let found = self.free_from(storage, map, self.free_hint)?;
        self.free_hint = found;
        Ok(found)
    }

    /// The first free cluster from `from` on that holds no metadata.
    fn free_from(&mut self, storage: &dyn Storage, map: &MetadataMap, mut from: u64) -> Result<u64> {
        let limit = MAX_HOST_OFFSET >> self.geometry.cluster_bits;
        loop {
            let Some(found) = self.refcounts.find_free(storage, from, limit)? else {
                return Err(BlockError::new(
                    ErrorKind::NoSpace,
                    "the image file has reached the format's largest size",
                ));
            };
            match map.hit(found, found + 1) {
                Some((past, _)) => from = past,
                None => return Ok(found),
            }
        }
    }

    /// One past the last free cluster of the run at `first`, at most `limit`.
    fn free_run_end(
        &mut self,
        storage: &dyn Storage,
        map: &MetadataMap,
        first: u64,
        limit: u64,
    ) -> Result<u64> {
        let mut end = first;
        while end < limit
            && self.refcounts.block_offset(self.refcounts.block_index(end)).is_some()
            && self.refcounts.get(storage, end)? == 0
            && map.hit(end, end + 1).is_none()
        {
            end += 1;
        }
        Ok(end)
    }

    /// Makes sure that a refcount block counts `cluster`. `Ok(true)`: one was made.
    ///
    /// When the refcount table is too short for that it has to move, which must not happen while a flush is
    /// writing blocks: the request fails with nothing changed and `growth_needed` set, and the caller comes
    /// again with the flush lock held.
    fn ensure_block(&mut self, storage: &dyn Storage, map: &MetadataMap, cluster: u64) -> Result<bool> {
        let index = self.refcounts.block_index(cluster);
        if self.refcounts.block_offset(index).is_some() {
            return Ok(false);
        }
        if index >= self.refcounts.table_len() {
            if !self.may_grow_table {
                self.growth_needed = Some(index);
                return Err(BlockError::new(ErrorKind::NoSpace, "the refcount table is full"));
            }
            self.grow_refcount_table(storage, map, index)?;
            return Ok(true);
        }
        self.add_block(map, index, storage)?;
        Ok(true)
    }

    /// Makes the block with this index. It lies in the range that it counts, which is free altogether.
    fn add_block(&mut self, map: &MetadataMap, index: u64, storage: &dyn Storage) -> Result<()> {
        let bits = self.geometry.refcount_block_bits();
        let (mut first, end) = (index << bits, (index + 1) << bits);
        while let Some((past, _)) = map.hit(first, first + 1) {
            first = past;
        }
        if first >= end {
            return Err(Error::NoRoomForRefcountBlock { index }.into());
        }
        self.refcounts.add_block(index, self.geometry.offset_of(first));
        self.refcounts.set(storage, first, 1)?;
        self.fresh_from = self.fresh_from.max(first + 1);
        map.claim(first, 1);
        Ok(())
    }

    /// Moves the refcount table to a place where it has entries for block `index` and some more. The new
    /// table is durable before the header names it.
    ///
    /// The longer table may itself find room only where a still longer one would count it: then that one is made
    /// at once, never one inside the other, which would leave the shorter one in the header.
    pub(crate) fn grow_refcount_table(
        &mut self,
        storage: &dyn Storage,
        map: &MetadataMap,
        mut index: u64,
    ) -> Result<()> {
        let may_grow = std::mem::replace(&mut self.may_grow_table, false);
        let grown = loop {
            self.growth_needed = None;
            let grown = self.move_refcount_table(storage, map, index);
            match self.growth_needed.take() {
                Some(further) if grown.is_err() && further > index => index = further,
                _ => break grown,
            }
        };
        self.may_grow_table = may_grow;
        grown
    }

    fn move_refcount_table(&mut self, storage: &dyn Storage, map: &MetadataMap, index: u64) -> Result<()> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let wanted = (index + 1).max(self.refcounts.table_len() + self.refcounts.table_len() / 2);
        let clusters =
            wanted.div_ceil(per_cluster).min(MAX_REFCOUNT_TABLE_BYTES >> self.geometry.cluster_bits);
        if index >= clusters * per_cluster {
            return Err(BlockError::new(
                ErrorKind::NoSpace,
                "the refcount table has reached its largest size",
            ));
        }
        self.refcounts.grow_table(clusters * per_cluster);
        let written = self.write_longer_table(storage, map, clusters);
        let run = written.inspect_err(|_| self.forget_longer_table())?;
        map.claim(self.geometry.cluster_of(run.offset), run.clusters);
        self.refcounts.table_written();
        let old = (self.refcounts.table_offset, u64::from(self.refcounts.table_clusters));
        self.refcounts.table_offset = run.offset;
        self.refcounts.table_clusters = block::num::low_u32(clusters);
        // Specification, "Header": refcount_table_offset (48) and refcount_table_clusters (56), one sector.
        let mut fields = block::codec::Writer::new();
        fields.be_u64(run.offset).be_u32(block::num::low_u32(clusters));
        if let Err(error) = storage.write_at(&fields.into_bytes(), 48).and_then(|()| storage.sync()) {
            // Which table the disk names now is not known. Both are complete; the longer one is kept up to date
            // from here on, and named again before anything relies on that.
            self.header_unsure = true;
            self.free_later(old.0, self.geometry.offset_of(old.1));
            return Err(error);
        }
        map.disclaim(self.geometry.cluster_of(old.0), old.1);
        self.release(storage, old.0, old.1)?;
        Ok(())
    }

    /// Writes the refcount table, as it is in memory, and all blocks to a new place. Durable when this returns.
    fn write_longer_table(&mut self, storage: &dyn Storage, map: &MetadataMap, clusters: u64) -> Result<Run> {
        let run = self.allocate_contiguous(storage, map, clusters)?;
        let blocks = self.refcounts.take_dirty_blocks();
        let table = self.refcounts.encode_table();
        let written = blocks
            .iter()
            .try_for_each(|(_, offset, bytes)| storage.write_at(bytes, *offset))
            .and_then(|()| storage.write_at(&table, run.offset))
            .and_then(|()| storage.sync());
        self.refcounts.blocks_written(blocks.iter().map(|(index, _, _)| *index), written.is_ok());
        written.inspect_err(|_| self.undo(storage, run))?;
        Ok(run)
    }

    /// The refcount table has not become longer on disk, so it must not stay longer in memory: a flush would write
    /// entries past its end. Blocks past the end count nothing but the table that failed and themselves.
    fn forget_longer_table(&mut self) {
        let len = self.geometry.offset_of(self.refcounts.table_clusters.into()) / 8;
        self.refcounts.cut_table(len);
        self.free_hint = self.free_hint.min(len << self.geometry.refcount_block_bits());
    }

    /// Lowers the refcounts of `clusters` clusters at `offset` by one, at once. The caller knows that no
    /// table on disk refers to them any more (or never did). Returns the runs that have become free.
    pub(crate) fn release(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        clusters: u64,
    ) -> Result<Vec<(u64, u64)>> {
        let first = self.geometry.cluster_of(offset);
        let mut freed: Vec<(u64, u64)> = Vec::new();
        for cluster in first..first + clusters {
            let count = self.refcounts.get(storage, cluster)?;
            if count == 0 {
                return Err(
                    Error::RefcountRange { cluster, value: -1, max: self.geometry.max_refcount() }.into()
                );
            }
            self.refcounts.set(storage, cluster, count - 1)?;
            if count == 1 {
                self.free_hint = self.free_hint.min(cluster);
                self.drop_tail_in(cluster);
                match freed.last_mut() {
                    Some((start, n)) if self.geometry.cluster_of(*start) + *n == cluster => *n += 1,
                    _ => freed.push((self.geometry.offset_of(cluster), 1)),
                }
            }
        }
        Ok(freed)
    }

    /// Clusters have become free by other means than [`release`](Self::release).
    pub(crate) fn note_freed(&mut self, first: u64, clusters: u64) {
        self.free_hint = self.free_hint.min(first);
        let tail = self.compressed_tail.map(|tail| self.geometry.cluster_of(tail));
        if tail.is_some_and(|tail| (first..first + clusters).contains(&tail)) {
            self.compressed_tail = None;
        }
    }

    /// Gives back a run that was never linked.
    pub(crate) fn undo(&mut self, storage: &dyn Storage, run: Run) {
        // An error leaves a leak, which is the lesser evil: the caller is already reporting one.
        let _ = self.release(storage, run.offset, run.clusters);
    }

    /// Notes that the host clusters under `len` bytes at `offset` lose a reference with the next flush.
    pub(crate) fn free_later(&mut self, offset: u64, len: u64) {
        let first = self.geometry.cluster_of(offset);
        let end = self.geometry.clusters_for(offset + len);
        match self.pending_free.last_mut() {
            Some((start, n)) if self.geometry.cluster_of(*start) + *n == first => *n += end - first,
            _ => self.pending_free.push((self.geometry.offset_of(first), end - first)),
        }
        for cluster in first..end {
            self.drop_tail_in(cluster);
        }
    }

    /// No further compressed data goes into `cluster`.
    fn drop_tail_in(&mut self, cluster: u64) {
        if self.compressed_tail.is_some_and(|tail| self.geometry.cluster_of(tail) == cluster) {
            self.compressed_tail = None;
        }
    }

    /// Gives out `len` bytes for a compressed cluster, behind the previous one if it can be, and counts the
    /// reference on every host cluster that they touch.
    pub(crate) fn allocate_bytes(
        &mut self,
        storage: &dyn Storage,
        map: &MetadataMap,
        len: u64,
    ) -> Result<u64> {
        let tail = self.compressed_tail;
        let extended = match tail {
            Some(tail) if self.extend_tail(storage, map, tail, len)? => Some(tail),
            _ => None,
        };
        let offset = match extended {
            Some(tail) => tail,
            None => self.allocate(storage, map, 1)?.offset,
        };
        let end = offset + len;
        self.compressed_tail = (self.geometry.in_cluster(end) != 0).then_some(end);
        Ok(offset)
    }

    /// Counts a reference for `len` bytes at `tail` on the cluster they start in and, where they run over,
    /// on the next, which must be free. `Ok(false)`: it cannot be; nothing has changed.
    fn extend_tail(&mut self, storage: &dyn Storage, map: &MetadataMap, tail: u64, len: u64) -> Result<bool> {
        let cluster = self.geometry.cluster_of(tail);
        let count = self.refcounts.get(storage, cluster)?;
        if count == 0 || count >= self.geometry.max_refcount() {
            return Ok(false);
        }
        if self.geometry.cluster_of(tail + len - 1) != cluster {
            let next = cluster + 1;
            self.ensure_block(storage, map, next)?;
            if self.free_run_end(storage, map, next, next + 1)? == next {
                return Ok(false);
            }
            let hint = self.free_hint;
            self.take(storage, next, next + 1)?;
            self.free_hint = if hint == next { next + 1 } else { hint };
        }
        self.refcounts.set(storage, cluster, count + 1)?;
        Ok(true)
    }

    /// The host clusters set aside for guest clusters from `guest` on, as far as they follow each other.
    pub(crate) fn take_reserved(&mut self, guest: u64, max: u64) -> Option<Run> {
        let (offset, mut fresh) = self.reserved.remove(&guest)?;
        let mut clusters = 1;
        while clusters < max {
            let expected = offset + self.geometry.offset_of(clusters);
            match self.reserved.get(&(guest + clusters)) {
                Some((next, next_fresh)) if *next == expected => fresh &= *next_fresh,
                _ => break,
            }
            self.reserved.remove(&(guest + clusters));
            clusters += 1;
        }
        Some(Run { offset, clusters, fresh })
    }

    /// One past the last host byte ever given out.
    pub(crate) fn allocation_end(&self) -> u64 {
        if self.fresh_from == u64::MAX { 0 } else { self.geometry.offset_of(self.fresh_from) }
    }

    /// The file now ends before cluster `end`: what comes after it will be new.
    pub(crate) fn cut_at(&mut self, end: u64) {
        if self.fresh_from != u64::MAX {
            self.fresh_from = end;
        }
        self.free_hint = self.free_hint.min(end);
        self.compressed_tail = None;
    }

    /// Whether enough has piled up that a writer should flush before going on.
    pub(crate) fn wants_flush(&self, max_dirty_slices: usize) -> bool {
        self.dirty_slices.len() >= max_dirty_slices
            || self.refcounts.wants_flush()
            || self.pending_free.len() >= to_usize(1 << 14)
    }

    /// Whether tables in memory and on disk agree.
    pub(crate) fn is_clean(&self) -> bool {
        self.dirty_slices.is_empty()
            && self.dirty_l1.is_empty()
            && self.pending_free.is_empty()
            && self.refcounts.is_clean()
            && !self.header_unsure
    }
}
