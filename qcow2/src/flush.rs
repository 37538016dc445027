//! The order in which tables reach the disk.
//!
//! Reads and writes work on tables in memory. A flush writes what has changed in phases, with a sync of
//! the file between them, so that the disk is consistent after every one of them and in between:
//!
//! ```text
//!   0  guest data (written when it was written), refcount blocks, new zeroed L2 tables     | sync
//!   1  refcount table entries of new refcount blocks                                       | sync
//!   2  L2 entries, L1 entries                                                              | sync
//!   3  refcounts of what phase 2 has stopped referring to go down; the space can be given out again
//! ```
//!
//! What a table on disk refers to is therefore always on disk and counted; a crash can leave clusters
//! counted that nothing refers to (leaks), never the reverse. Inside phase 2 any subset of the sectors may
//! reach the disk: an L1 entry that arrives before the entries of its new table names a table of zeros.
//!
//! Phases work on copies taken at one moment under the metadata lock, so writers go on meanwhile; what they
//! change is the next flush's. With lazy refcounts the dirty bit is set before the first change, phases 0
//! and 1 leave refcounts out, and [`close`](block::BlockDevice::close) writes them and clears the bit.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::codec::Writer;
use block::num::to_usize;
use block::{Result, Storage};
use parking_lot::MutexGuard;

use crate::alloc::Meta;
use crate::cache::Slice;
use crate::device::Qcow2;
use crate::features::incompatible;
use crate::header::Header;

/// Specification, "Header": position of incompatible_features.
const INCOMPATIBLE_AT: u64 = 72;
/// Position of size, which crypt_method, l1_size, l1_table_offset, refcount_table_offset and
/// refcount_table_clusters follow, all in one sector.
const SIZE_AT: u64 = 24;

/// Copies of the changed tables, as they were at one moment.
#[derive(Debug)]
struct Batch {
    /// (index, offset, contents)
    blocks: Vec<(u64, u64, Vec<u8>)>,
    /// (index, entry)
    table_entries: Vec<(u64, u64)>,
    slices: HashMap<u64, Arc<Slice>>,
    /// (offset, contents)
    slice_bytes: Vec<(u64, Vec<u8>)>,
    /// (index, entry), ascending
    l1: Vec<(u64, u64)>,
    freed: Vec<(u64, u64)>,
}

impl Qcow2 {
    /// Makes all completed writes durable.
    pub(crate) fn flush_all(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.write_tables(!self.lazy_refcounts)
    }

    /// Flushes, gives back what was reserved, and clears the dirty bit.
    pub(crate) fn close_cleanly(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.release_reserved()?;
        let stored = self.store_bitmaps();
        self.write_tables(true)?;
        let _flushing = self.flush_lock.lock();
        let mut meta = self.meta.lock();
        let marked = self.header.lock().has(incompatible::DIRTY);
        if marked && meta.is_clean() && !self.header_lost.load(Ordering::Acquire) {
            self.storage.sync()?;
            // Not relied on from here on, even if clearing it fails: it may have been cleared all the same.
            meta.marked_dirty = false;
            self.change_incompatible(|bits| bits & !incompatible::DIRTY)?;
        }
        stored
    }

    pub(crate) fn release_reserved(&self) -> Result<()> {
        let mut meta = self.meta.lock();
        let mut result = Ok(());
        for (_, (offset, _)) in std::mem::take(&mut meta.reserved) {
            result = result.and(meta.release(&*self.storage, offset, 1).map(drop));
        }
        result
    }

    /// Rewrites the incompatible feature bits (one field, so that a crash leaves the old or the new value). If that
    /// fails, a bit counts as set that may be set on disk.
    fn change_incompatible(&self, change: impl FnOnce(u64) -> u64) -> Result<()> {
        let mut header = self.header.lock();
        let bits = change(header.incompatible);
        let written = self.storage.write_at(&bits.to_be_bytes(), INCOMPATIBLE_AT);
        let written = written.and_then(|()| self.storage.sync());
        header.incompatible = if written.is_ok() { bits } else { bits | header.incompatible };
        written
    }

    /// Writes the header's size and the places of its tables once more if that has failed before. Until then nothing
    /// may be written to the tables, since the disk may name others.
    pub(crate) fn settle_header(&self) -> Result<()> {
        let mut meta = self.meta.lock();
        let lost = self.header_lost.load(Ordering::Acquire);
        if !meta.header_unsure && !lost {
            return Ok(());
        }
        let header = self.header.lock();
        if lost {
            self.rewrite_header(&header, (meta.refcounts.table_offset, meta.refcounts.table_clusters))?;
            meta.header_unsure = false;
            self.header_lost.store(false, Ordering::Release);
            return Ok(());
        }
        let mut fields = Writer::new();
        fields.be_u64(header.size).be_u32(header.crypt_method);
        fields.be_u32(header.l1_size).be_u64(header.l1_table_offset);
        fields.be_u64(meta.refcounts.table_offset).be_u32(meta.refcounts.table_clusters);
        self.storage.write_at(&fields.into_bytes(), SIZE_AT)?;
        self.storage.sync()?;
        meta.header_unsure = false;
        Ok(())
    }

    /// Before bytes are written to a cluster that is in use: while the disk may name the tables of a change that has
    /// failed, the cluster may be shared there, with a snapshot that would get bytes that were written after it.
    ///
    /// # Errors
    /// The header could still not be written: nothing may be written in place then.
    pub(crate) fn settle_before_write(&self) -> Result<()> {
        if !self.header_lost.load(Ordering::Acquire) {
            return Ok(());
        }
        let _flushing = self.flush_lock.lock();
        self.settle_header()
    }

    /// With lazy refcounts: says in the header that refcounts may be out of date, before they are.
    pub(crate) fn mark_dirty(&self, meta: &mut Meta) -> Result<()> {
        if self.lazy_refcounts && !meta.marked_dirty {
            self.change_incompatible(|bits| bits | incompatible::DIRTY)?;
            meta.marked_dirty = true;
        }
        Ok(())
    }

    /// Says in the header that the image contradicts itself, so that nobody writes to it before it has been
    /// repaired. The error that led here is already on its way to the user.
    pub(crate) fn mark_corrupt(&self) {
        if self.version >= 3 {
            let _ = self.change_incompatible(|bits| bits | incompatible::CORRUPT);
        }
    }

    /// Lets a writer wait for a flush when too many changed tables have piled up in memory.
    pub(crate) fn throttle(&self) -> Result<()> {
        let wants = self.meta.lock().wants_flush(self.slices.max_dirty());
        if wants { self.write_tables(true) } else { Ok(()) }
    }

    /// Takes the metadata lock for an allocation. When the refcount table has to move for it, that is done
    /// between two attempts, while no flush is under way. An attempt that fails must change nothing.
    pub(crate) fn with_meta<T>(&self, mut attempt: impl FnMut(&mut Meta) -> Result<T>) -> Result<T> {
        loop {
            let mut meta = self.meta.lock();
            self.mark_dirty(&mut meta)?;
            let result = attempt(&mut meta);
            let Some(index) = meta.growth_needed.take() else { return result };
            if result.is_ok() {
                return result;
            }
            drop(meta);
            let _flushing = self.flush_lock.lock();
            // The table's new place must get into this state's header.
            self.settle_header()?;
            let mut meta = self.meta.lock();
            meta.growth_needed = None;
            if index >= meta.refcounts.table_len() {
                let map = self.map()?;
                meta.may_grow_table = true;
                let grown = meta.grow_refcount_table(&*self.storage, map, index);
                meta.may_grow_table = false;
                grown?;
            }
        }
    }

    /// Writes the changed tables in order.
    fn write_tables(&self, refcounts: bool) -> Result<()> {
        let _flushing = self.flush_lock.lock();
        self.write_tables_locked(refcounts)
    }

    /// The same for a caller that holds the flush lock.
    pub(crate) fn write_tables_locked(&self, refcounts: bool) -> Result<()> {
        self.settle_header()?;
        let mut batch = {
            let mut meta = self.meta.lock();
            if meta.is_clean() {
                drop(meta);
                return self.sync_all();
            }
            self.take_batch(&mut meta, refcounts)
        };
        let result = self.write_batch(&mut batch);
        let mut meta = self.meta.lock();
        match result {
            Ok(()) => {
                meta.refcounts.blocks_written(batch.blocks.iter().map(|b| b.0), true);
                for slice in batch.slices.values() {
                    slice.written();
                }
                self.settle(meta, batch.freed, refcounts)
            }
            Err(error) => {
                restore(&mut meta, batch);
                Err(error)
            }
        }
    }

    fn sync_all(&self) -> Result<()> {
        if self.external {
            self.data.sync()?;
        }
        self.storage.sync()
    }

    fn take_batch(&self, meta: &mut Meta, refcounts: bool) -> Batch {
        let (blocks, table_entries) = match refcounts {
            true => (meta.refcounts.take_dirty_blocks(), meta.refcounts.take_dirty_entries()),
            false => (Vec::new(), Vec::new()),
        };
        let slices = std::mem::take(&mut meta.dirty_slices);
        let mut slice_bytes: Vec<_> =
            slices.iter().map(|(offset, slice)| (*offset, slice.begin_write())).collect();
        slice_bytes.sort_unstable_by_key(|(offset, _)| *offset);
        let table = self.l1.read();
        let l1 = std::mem::take(&mut meta.dirty_l1).into_iter().map(|i| (i, table[to_usize(i)])).collect();
        let freed = std::mem::take(&mut meta.pending_free);
        Batch { blocks, table_entries, slices, slice_bytes, l1, freed }
    }

    fn write_batch(&self, batch: &mut Batch) -> Result<()> {
        for (_, offset, bytes) in &batch.blocks {
            self.storage.write_at(bytes, *offset)?;
        }
        self.sync_all()?;
        if !batch.table_entries.is_empty() {
            self.write_table_entries(&batch.table_entries)?;
            self.storage.sync()?;
        }
        if batch.slice_bytes.is_empty() && batch.l1.is_empty() {
            return Ok(());
        }
        for (offset, bytes) in batch.slice_bytes.drain(..) {
            self.storage.write_at(&bytes, offset)?;
        }
        let l1_offset = self.header.lock().l1_table_offset;
        write_entries(&*self.storage, l1_offset, &batch.l1)?;
        self.storage.sync()
    }

    /// Writes refcount table entries where the table is now: it may have moved since they were taken (and
    /// then holds them already).
    fn write_table_entries(&self, entries: &[(u64, u64)]) -> Result<()> {
        let meta = self.meta.lock();
        write_entries(&*self.storage, meta.refcounts.table_offset, entries)
    }

    /// Phase 3: what the tables on disk have let go is free. The space is given back to the host before the
    /// clusters can be given out again.
    fn settle(&self, mut meta: MutexGuard<'_, Meta>, freed: Vec<(u64, u64)>, refcounts: bool) -> Result<()> {
        if freed.is_empty() {
            return Ok(());
        }
        let unused = self.referred_to_once(&mut meta, &freed);
        drop(meta);
        let discarded = unused.and_then(|runs| {
            runs.into_iter().try_for_each(|(offset, len)| self.storage.discard_range(offset, len))
        });
        let mut meta = self.meta.lock();
        if let Err(error) = discarded {
            meta.pending_free.extend(freed); // the next flush tries again
            return Err(error);
        }
        // What cannot be released stays counted; the rest does not stay with it.
        let map = self.map()?;
        let mut released = Ok(());
        for (offset, clusters) in freed {
            map.disclaim(self.geometry.cluster_of(offset), clusters);
            released = released.and(meta.release(&*self.storage, offset, clusters).map(drop));
        }
        released?;
        if !refcounts {
            return Ok(());
        }
        // Written now so that a program that ends without close leaves no leaks; no sync, since a leak is
        // all that can come of it.
        let blocks = meta.refcounts.take_dirty_blocks();
        drop(meta);
        let written = blocks.iter().try_for_each(|(_, offset, bytes)| self.storage.write_at(bytes, *offset));
        self.meta.lock().refcounts.blocks_written(blocks.iter().map(|b| b.0), written.is_ok());
        written
    }

    /// The parts of ranges of clusters that only one reference holds, as (offset, length).
    fn referred_to_once(&self, meta: &mut Meta, ranges: &[(u64, u64)]) -> Result<Vec<(u64, u64)>> {
        let mut runs = Vec::new();
        for (offset, clusters) in ranges {
            for i in 0..*clusters {
                let at = offset + self.geometry.offset_of(i);
                if meta.refcounts.get(&*self.storage, self.geometry.cluster_of(at))? == 1 {
                    push_run(&mut runs, at, self.geometry.cluster_size());
                }
            }
        }
        Ok(runs)
    }

    /// The header with the fields that live elsewhere while the image is open.
    pub(crate) fn current_header(&self) -> Header {
        let table = self.writable.then(|| {
            let meta = self.meta.lock();
            (meta.refcounts.table_offset, meta.refcounts.table_clusters)
        });
        let mut header = self.header.lock().clone();
        if let Some((offset, clusters)) = table {
            header.refcount_table_offset = offset;
            header.refcount_table_clusters = clusters;
        }
        header
    }
}

impl Drop for Qcow2 {
    /// A last attempt for users who forgot [`close`](block::BlockDevice::close), which is where errors are
    /// reported.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = self.close_cleanly();
        }
    }
}

/// A failed flush: everything it took is changed again, unless it has changed since anyway.
fn restore(meta: &mut Meta, batch: Batch) {
    meta.refcounts.blocks_written(batch.blocks.iter().map(|b| b.0), false);
    meta.refcounts.entries_not_written(&batch.table_entries);
    for (offset, slice) in batch.slices {
        slice.not_written();
        meta.dirty_slices.insert(offset, slice);
    }
    meta.dirty_l1.extend(batch.l1.iter().map(|(index, _)| *index));
    meta.pending_free.extend(batch.freed);
}

/// Writes 8-byte entries of a table, neighbours in one request.
fn write_entries(storage: &dyn Storage, table: u64, entries: &[(u64, u64)]) -> Result<()> {
    for run in entries.chunk_by(|a, b| a.0 + 1 == b.0) {
        let bytes: Vec<u8> = run.iter().flat_map(|(_, entry)| entry.to_be_bytes()).collect();
        storage.write_at(&bytes, table + run[0].0 * 8)?;
    }
    Ok(())
}

/// Appends a range to a list of (offset, length), joining it to the last where it follows.
pub(crate) fn push_run(runs: &mut Vec<(u64, u64)>, offset: u64, len: u64) {
    match runs.last_mut() {
        Some((start, total)) if *start + *total == offset => *total += len,
        _ => runs.push((offset, len)),
    }
}
