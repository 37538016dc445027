//! From one state of an image's tables to another, in one step.
//!
//! Creating, applying or deleting a snapshot changes the active tables, the refcounts and the snapshot table together,
//! and each of them alone would contradict the others: a cluster that is shared must not have the COPIED flag, one that
//! is not shared must have it. So nothing of the old state is changed in place:
//!
//! ```text
//!   L2 tables whose flags change, L1 table, snapshot table, refcount blocks, refcount table:
//!                      written to free clusters                                             | sync
//!   header:            names all of the new ones, one write inside one sector               | sync
//! ```
//!
//! A crash finds the old state or the new one, both without as much as a leak. The space of what the old state had
//! to itself is free with the same write. (QEMU changes tables in place, flag by flag; a crash there leaves flags that
//! contradict the refcounts.) The price is free space for the changed L2 tables while it happens: 1/8192 of the data
//! with clusters of 64 KiB.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use block::codec::Writer;
use block::num::{low_u32, to_usize};
use block::{BlockDevice as _, Result};

use super::tally::Tally;
use super::{Snapshot, encode_table};
use crate::alloc::{Meta, Run};
use crate::device::Qcow2;
use crate::error::Error;
use crate::l2::{COMPRESSED, COPIED, Entry, L1_RESERVED, OFFSET_MASK, RawEntry};
use crate::metadata::{Kind, MetadataMap};

/// Specification, "Header": size, crypt_method, l1_size, l1_table_offset, refcount_table_offset,
/// refcount_table_clusters, nb_snapshots, snapshots_offset follow each other from here, all in one sector.
const SIZE_AT: u64 = 24;

/// What becomes of the COPIED flags of the active tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flags {
    /// A snapshot shares everything: there are none.
    Clear,
    /// They follow the refcounts that change.
    Follow,
}

/// The state that is to be.
#[derive(Debug)]
pub(super) struct Target {
    /// The active L1 table; `None`: as it is.
    pub(super) l1: Option<Vec<u64>>,
    pub(super) size: u64,
    /// The snapshots; `None`: as they are.
    pub(super) snapshots: Option<Vec<Snapshot>>,
}

/// A change under way. Holds the metadata lock; the caller holds all stripes and the flush lock, and has flushed.
pub(super) struct Change<'a> {
    image: &'a Qcow2,
    map: &'a MetadataMap,
    /// Bytes of the file when it began: nothing of the old state lies behind that.
    file_len: u64,
    meta: parking_lot::MutexGuard<'a, Meta>,
    pub(super) tally: Tally<'a>,
    /// What has been allocated for the new state.
    runs: Vec<Run>,
}

/// Where the refcounts of the new state are.
struct NewRefcounts {
    table: Run,
    /// Block index to host offset, for the blocks that move.
    blocks: BTreeMap<u64, u64>,
}

impl<'a> Change<'a> {
    pub(super) fn begin(image: &'a Qcow2) -> Result<Self> {
        let map = image.map()?;
        let file_len = image.storage.len()?;
        let mut meta = image.meta.lock();
        meta.may_grow_table = true;
        Ok(Self { image, map, file_len, meta, tally: Tally::new(image.geometry, map), runs: Vec::new() })
    }

    /// Notes references of whole L1 tables, each with how often: of the L2 tables and of everything in them. What
    /// several of them share is not looked at if that makes no difference.
    ///
    /// # Errors
    /// An entry that breaks a rule, that leads out of the file, or onto other structures.
    pub(super) fn count(&mut self, tables: &[(&[u64], i32)]) -> Result<()> {
        let mut uses: BTreeMap<u64, (i32, u64)> = BTreeMap::new();
        for (l1, by) in tables {
            let mut seen = BTreeSet::new();
            for (index, entry) in (0..).zip(l1.iter()).filter(|(_, entry)| **entry != 0) {
                let Some(table) = self.l2_offset(index, *entry)? else { continue };
                if !seen.insert(table) {
                    return Err(Error::L2TableShared { l1_index: index, offset: table }.into());
                }
                uses.entry(table).or_insert((0, index)).0 += by;
                self.tally.mark_table(self.image.geometry.cluster_of(table));
            }
        }
        let mut bytes = vec![0; to_usize(self.image.geometry.cluster_size())];
        for (table, (by, index)) in uses.into_iter().filter(|(_, (by, _))| *by != 0) {
            self.tally.add(self.image.geometry.cluster_of(table), by)?;
            self.image.storage.read_at(&mut bytes, table)?;
            let guest = index * self.image.geometry.l2_coverage();
            let decode = |raw: &[u8], guest| decode(self.image, raw, guest);
            let refcounts = &self.meta.refcounts;
            let inside = |block: u64| block + self.image.geometry.cluster_size() <= self.file_len;
            let counted = |index| refcounts.block_offset(index).is_some_and(inside);
            self.tally.add_table(&bytes, by, guest, decode, counted)?;
        }
        Ok(())
    }

    /// Where the L2 table of an L1 entry is.
    fn l2_offset(&self, index: u64, entry: u64) -> Result<Option<u64>> {
        let geometry = &self.image.geometry;
        let offset = entry & OFFSET_MASK;
        if entry & L1_RESERVED != 0 || geometry.in_cluster(offset) != 0 {
            return Err(Error::L1Entry { index, entry }.into());
        }
        if offset == 0 {
            return Ok(None);
        }
        let file_len = self.file_len;
        if offset + geometry.cluster_size() > file_len {
            return Err(Error::L2TableOutsideFile { l1_index: index, offset, file_len }.into());
        }
        let cluster = geometry.cluster_of(offset);
        match self.map.hit(cluster, cluster + 1) {
            None | Some((_, Kind::L2Table)) => Ok(Some(offset)),
            Some(_) => Err(Error::L2TableShared { l1_index: index, offset }.into()),
        }
    }

    /// Holds what has been counted against the refcounts. Nothing has been changed so far.
    ///
    /// # Errors
    /// A refcount would leave its range, or is wrong already.
    pub(super) fn settle(&mut self) -> Result<()> {
        let (storage, meta) = (&*self.image.storage, &mut self.meta);
        self.tally.settle(|index| meta.refcounts.copy_block(storage, index))
    }

    /// The active L1 table for the L2 tables that `l1` names: those whose flags are wrong are replaced by copies.
    ///
    /// # Errors
    /// The refcounts contradict the tables; no space; the host failed.
    pub(super) fn renew(&mut self, l1: &[u64], flags: Flags) -> Result<Vec<u64>> {
        let mut renewed = Vec::with_capacity(l1.len());
        let mut bytes = vec![0; to_usize(self.image.geometry.cluster_size())];
        for entry in l1 {
            let table = entry & OFFSET_MASK;
            if table == 0 {
                renewed.push(0);
                continue;
            }
            self.image.storage.read_at(&mut bytes, table)?;
            renewed.push(match self.fix_flags(&mut bytes, flags)? {
                true => self.copy_of(table, &bytes)? | COPIED,
                false => table | if self.flag(table, entry & COPIED != 0, flags)? { COPIED } else { 0 },
            });
        }
        Ok(renewed)
    }

    /// Puts a changed L2 table elsewhere; the old one loses the active disk's reference.
    fn copy_of(&mut self, table: u64, bytes: &[u8]) -> Result<u64> {
        let run = self.allocate(1)?;
        self.image.slices.forget_table(run.offset, self.image.geometry.cluster_size());
        self.write(bytes, run.offset)?;
        self.tally.add(self.image.geometry.cluster_of(table), -1)?;
        Ok(run.offset)
    }

    /// Whether an entry for a host cluster has the COPIED flag in the new state.
    fn flag(&self, offset: u64, now: bool, flags: Flags) -> Result<bool> {
        let cluster = self.image.geometry.cluster_of(offset);
        match (flags, self.tally.outcome(cluster)) {
            (Flags::Clear, _) => Ok(false),
            (Flags::Follow, None) => Ok(now),
            (Flags::Follow, Some(0)) => {
                let max = self.image.geometry.max_refcount();
                Err(Error::RefcountRange { cluster, value: 0, max }.into())
            }
            (Flags::Follow, Some(count)) => Ok(count == 1),
        }
    }

    /// Sets and clears the flags of an L2 table. True: something has changed.
    fn fix_flags(&self, bytes: &mut [u8], flags: Flags) -> Result<bool> {
        let mut changed = false;
        for raw in bytes.chunks_exact_mut(to_usize(self.image.geometry.l2_entry_size())) {
            let Some(word) = raw.first_chunk_mut::<8>() else { continue };
            let old = u64::from_be_bytes(*word);
            if old & COMPRESSED != 0 || old & OFFSET_MASK == 0 {
                continue;
            }
            if self.flag(old & OFFSET_MASK, old & COPIED != 0, flags)? != (old & COPIED != 0) {
                *word = (old ^ COPIED).to_be_bytes();
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Notes that a structure of the old state is not part of the new one.
    pub(super) fn drop_structure(&mut self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.image.geometry;
        if len == 0 {
            return Ok(());
        }
        (geometry.cluster_of(offset)..geometry.clusters_for(offset + len))
            .try_for_each(|cluster| self.tally.add(cluster, -1))
    }

    fn allocate(&mut self, clusters: u64) -> Result<Run> {
        let run = self.meta.allocate_contiguous(&*self.image.storage, self.map, clusters)?;
        self.map.claim(self.image.geometry.cluster_of(run.offset), run.clusters);
        self.runs.push(run);
        Ok(run)
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.image.storage.write_at(bytes, offset)?;
        self.image.grown_to(offset + bytes.len() as u64);
        Ok(())
    }

    /// Writes a structure into whole clusters of its own.
    fn place(&mut self, mut bytes: Vec<u8>) -> Result<u64> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let clusters = self.image.geometry.clusters_for(bytes.len() as u64);
        bytes.resize(to_usize(self.image.geometry.offset_of(clusters)), 0);
        let run = self.allocate(clusters)?;
        self.write(&bytes, run.offset)?;
        Ok(run.offset)
    }

    /// Makes `target` the state of the image. Durable when this returns.
    ///
    /// # Errors
    /// No space, or the host failed: the image is as it was. Should the header be the thing that could not be
    /// written, the next flush or write to a cluster in use writes the old one again before anything else.
    pub(super) fn commit(mut self, target: Target) -> Result<()> {
        match self.prepare(&target) {
            Ok((fields, refcounts)) => self.switch(target, &fields, &refcounts),
            Err(error) => {
                self.abandon();
                Err(error)
            }
        }
    }

    /// Gives everything back that was allocated for the new state.
    pub(super) fn abandon(&mut self) {
        for run in std::mem::take(&mut self.runs) {
            self.forget(run);
        }
        self.meta.may_grow_table = false;
    }

    fn forget(&mut self, run: Run) {
        self.runs.retain(|known| *known != run);
        self.map.disclaim(self.image.geometry.cluster_of(run.offset), run.clusters);
        self.meta.undo(&*self.image.storage, run);
    }

    /// Writes all of the new state but the header. Returns that one's fields.
    fn prepare(&mut self, target: &Target) -> Result<(Fields, NewRefcounts)> {
        let mut fields = Fields::of(self.image, &self.meta);
        if let Some(l1) = &target.l1 {
            if l1.len() as u64 * 8 > crate::geometry::MAX_L1_BYTES {
                return Err(Error::L1TooLarge { entries: low_u32(l1.len() as u64) }.into());
            }
            if !l1.is_empty() {
                fields.l1_offset = self.place(l1.iter().flat_map(|entry| entry.to_be_bytes()).collect())?;
            }
            fields.l1_size = low_u32(l1.len() as u64);
        }
        if let Some(snapshots) = &target.snapshots {
            fields.snapshots_offset = self.place(encode_table(snapshots, fields.size)?)?;
            fields.snapshots = low_u32(snapshots.len() as u64);
        }
        fields.size = target.size;
        let refcounts = self.move_refcounts()?;
        fields.refcount_table = (refcounts.table.offset, low_u32(refcounts.table.clusters));
        self.write_refcounts(&refcounts)?;
        self.image.storage.sync()?;
        Ok((fields, refcounts))
    }

    /// Finds places for the refcount table and all blocks that change. Each of them changes counters itself, until
    /// no more blocks are touched.
    fn move_refcounts(&mut self) -> Result<NewRefcounts> {
        let mut blocks = BTreeMap::new();
        let mut table: Option<Run> = None;
        let mut dropped: Option<(u64, u64)> = None;
        loop {
            let now = (self.meta.refcounts.table_offset, u64::from(self.meta.refcounts.table_clusters));
            if dropped != Some(now) {
                // It has moved meanwhile: what was to be dropped is gone already.
                if let Some((offset, clusters)) = dropped.replace(now) {
                    self.add_run(offset, clusters, 1)?;
                }
                self.add_run(now.0, now.1, -1)?;
            }
            let run = match table {
                Some(run) if run.clusters == now.1 => run,
                other => {
                    if let Some(too_short) = other {
                        self.forget(too_short);
                    }
                    table = Some(self.allocate(now.1)?);
                    continue;
                }
            };
            let touched: BTreeSet<u64> =
                self.tally.block_indices().chain(self.meta.refcounts.dirty_indices()).collect();
            let new: Vec<u64> = touched.into_iter().filter(|index| !blocks.contains_key(index)).collect();
            if new.is_empty() {
                return Ok(NewRefcounts { table: run, blocks });
            }
            for index in new {
                let cluster = index << self.image.geometry.refcount_block_bits();
                let old = self.meta.refcounts.block_offset(index);
                let old = old.ok_or(Error::RefcountBlockMissing { cluster })?;
                blocks.insert(index, self.allocate(1)?.offset);
                self.add_run(old, 1, -1)?;
            }
        }
    }

    fn add_run(&mut self, offset: u64, clusters: u64, by: i32) -> Result<()> {
        let first = self.image.geometry.cluster_of(offset);
        (first..first + clusters).try_for_each(|cluster| self.tally.add(cluster, by))
    }

    fn write_refcounts(&mut self, new: &NewRefcounts) -> Result<()> {
        for (index, offset) in &new.blocks {
            let mut bytes = self.meta.refcounts.copy_block(&*self.image.storage, *index)?;
            self.tally.apply(*index, &mut bytes)?;
            self.write(&bytes, *offset)?;
        }
        let mut table = self.meta.refcounts.encode_table();
        table.resize(to_usize(self.image.geometry.offset_of(new.table.clusters)), 0);
        for (index, offset) in &new.blocks {
            table[to_usize(*index) * 8..][..8].copy_from_slice(&offset.to_be_bytes());
        }
        self.write(&table, new.table.offset)
    }

    /// The step itself, and the same in memory.
    fn switch(mut self, target: Target, fields: &Fields, refcounts: &NewRefcounts) -> Result<()> {
        let image = self.image;
        let mut header = image.header.lock();
        let bytes = fields.encode(header.crypt_method);
        if let Err(error) = image.storage.write_at(&bytes, SIZE_AT).and_then(|()| image.storage.sync()) {
            // The disk may name either state. The old one stays in use, and what belongs to the new one stays out
            // of use until the next flush has written the header again.
            image.header_lost.store(true, Ordering::Release);
            self.meta.may_grow_table = false;
            for run in &self.runs {
                self.meta.free_later(run.offset, image.geometry.offset_of(run.clusters));
            }
            return Err(error);
        }
        let old_size = std::mem::replace(&mut header.size, fields.size);
        (header.l1_size, header.l1_table_offset) = (fields.l1_size, fields.l1_offset);
        (header.refcount_table_offset, header.refcount_table_clusters) = fields.refcount_table;
        (header.nb_snapshots, header.snapshots_offset) = (fields.snapshots, fields.snapshots_offset);
        drop(header);
        image.size.store(fields.size, Ordering::Release);
        self.meta.refcounts.relocate(fields.refcount_table, &refcounts.blocks);
        self.meta.may_grow_table = false;
        if let Some(l1) = target.l1 {
            self.replace_l1(l1);
        }
        if let Some(snapshots) = target.snapshots {
            let snapshots = snapshots.into_iter().map(|snapshot| snapshot.completed(old_size)).collect();
            *image.snapshots.write() = snapshots;
        }
        self.give_back();
        Ok(())
    }

    /// L2 tables that are not active any more must not stay in the cache: their clusters may become others.
    fn replace_l1(&mut self, l1: Vec<u64>) {
        let kept: BTreeSet<u64> = l1.iter().map(|entry| entry & OFFSET_MASK).collect();
        let old = std::mem::replace(&mut *self.image.l1.write(), l1);
        for table in old.iter().map(|entry| entry & OFFSET_MASK).filter(|table| !kept.contains(table)) {
            self.image.slices.forget_table(table, self.image.geometry.cluster_size());
        }
    }

    /// Lets the allocator and the host know what is free now.
    fn give_back(&mut self) {
        let (image, map, meta) = (self.image, self.map, &mut self.meta);
        image.compressed_epoch.fetch_add(1, Ordering::AcqRel);
        self.tally.for_each_freed(|first, clusters| {
            map.disclaim(first, clusters);
            meta.note_freed(first, clusters);
            let (offset, len) = (image.geometry.offset_of(first), image.geometry.offset_of(clusters));
            // A hole that cannot be made costs space, nothing else.
            let _ = image.storage.discard_range(offset, len);
        });
    }
}

/// The fields of the header that change.
#[derive(Debug)]
struct Fields {
    size: u64,
    l1_size: u32,
    l1_offset: u64,
    refcount_table: (u64, u32),
    snapshots: u32,
    snapshots_offset: u64,
}

impl Fields {
    fn of(image: &Qcow2, meta: &Meta) -> Self {
        let header = image.header.lock();
        Self {
            size: image.size(),
            l1_size: header.l1_size,
            l1_offset: header.l1_table_offset,
            refcount_table: (meta.refcounts.table_offset, meta.refcounts.table_clusters),
            snapshots: header.nb_snapshots,
            snapshots_offset: header.snapshots_offset,
        }
    }

    fn encode(&self, crypt_method: u32) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.be_u64(self.size).be_u32(crypt_method).be_u32(self.l1_size).be_u64(self.l1_offset);
        writer.be_u64(self.refcount_table.0).be_u32(self.refcount_table.1);
        writer.be_u32(self.snapshots).be_u64(self.snapshots_offset);
        writer.into_bytes()
    }
}

/// Decodes an L2 entry as it is in the file.
fn decode(image: &Qcow2, raw: &[u8], guest: u64) -> Result<Entry> {
    let word =
        |at: usize| raw.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b));
    let raw = RawEntry { word: word(0), bitmap: word(8) };
    Entry::decode(raw, &image.geometry, image.version, false)
        .map_err(|reason| Error::L2Entry { guest, reason }.into())
}
