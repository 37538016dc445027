//! The order in which an extent reaches the disk.
//!
//! ```text
//!   0  grains (written when they were written), the mark that the file is in use    | sync
//!   1  the changed sectors of the tables, both copies                               | sync
//!   2  what nothing refers to any more is given back, and can be given out again
//! ```
//!
//! What a table on disk refers to is therefore always on the disk. A crash in phase 1 can leave the two copies
//! different in entries that the flush was to bring; each of them is right by itself, and a check with repair makes
//! them equal. The mark is still there then: without it, entries that contradict each other are an error.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::Result;
use block::num::align_up;

use super::pages::Page;
use super::tables::{Copy, Tables};
use super::{Hosted, Meta};
use crate::SECTOR;
use crate::header::UNCLEAN_AT;

/// Changed pages on their way to the disk, as they were at one moment.
#[derive(Debug)]
struct Batch {
    pages: BTreeMap<u64, Arc<Page>>,
    /// Which sectors of each page.
    sectors: Vec<u32>,
    runs: Vec<(u64, Vec<u8>)>,
    freed: Vec<u64>,
}

impl Batch {
    fn take(meta: &mut Meta) -> Self {
        let pages = std::mem::take(&mut meta.dirty);
        let mut runs: Vec<(u64, Vec<u8>)> = vec![];
        let mut sectors = vec![];
        for page in pages.values() {
            let (taken, changes) = page.take_changes();
            sectors.push(taken);
            for (at, bytes) in changes {
                match runs.last_mut() {
                    Some((start, run)) if *start + run.len() as u64 == at => run.extend(bytes),
                    _ => runs.push((at, bytes)),
                }
            }
        }
        Self { pages, sectors, runs, freed: std::mem::take(&mut meta.pending_free) }
    }

    /// A failed flush: everything it took is changed again.
    fn restore(self, meta: &mut Meta) {
        for ((offset, page), sectors) in self.pages.into_iter().zip(self.sectors) {
            page.not_written(sectors);
            meta.dirty.insert(offset, page);
        }
        meta.pending_free.extend(self.freed);
    }
}

impl Hosted {
    /// Makes all completed writes durable.
    pub(super) fn flush_all(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let _flushing = self.flush_lock.lock();
        self.flush_locked()
    }

    fn flush_locked(&self) -> Result<()> {
        let batch = Batch::take(&mut self.meta.lock());
        let written = self.write_batch(&batch);
        self.tables.pages.written();
        if let Err(error) = written {
            batch.restore(&mut self.meta.lock());
            return Err(error);
        }
        self.settle(batch.freed)
    }

    fn write_batch(&self, batch: &Batch) -> Result<()> {
        self.storage_ref().sync()?;
        if batch.runs.is_empty() {
            return Ok(());
        }
        for (at, bytes) in &batch.runs {
            self.storage_ref().write_at(bytes, *at)?;
        }
        self.storage_ref().sync()
    }

    /// What the tables on the disk have let go. Space that the host does not take back is used again all the same.
    fn settle(&self, freed: Vec<u64>) -> Result<()> {
        let size = self.tables.header.grain_bytes();
        for place in &freed {
            if let Err(error) = self.storage_ref().discard_range(*place, size) {
                self.meta.lock().pending_free.extend(freed);
                return Err(error);
            }
        }
        self.meta.lock().free.extend(freed);
        Ok(())
    }

    /// Says in the header that the file is in use, before its tables change (specification, "uncleanShutdown").
    pub(super) fn mark_unclean(&self, meta: &mut Meta) -> Result<()> {
        if !meta.marked && !self.tables.header.unclean {
            self.storage_ref().write_at(&[1], UNCLEAN_AT)?;
            meta.marked = true;
        }
        Ok(())
    }

    /// Flushes, and takes the mark back. One that was found there stays: nobody has looked at the file since.
    pub(super) fn close_cleanly(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        let _flushing = self.flush_lock.lock();
        self.flush_locked()?;
        let mut meta = self.meta.lock();
        let reserved: Vec<u64> = meta.reserved.drain().map(|(_, place)| place).collect();
        meta.free.extend(reserved);
        if meta.marked && meta.dirty.is_empty() {
            // Not relied on from here on, even if this fails: it may have been done all the same.
            meta.marked = false;
            self.storage_ref().write_at(&[0], UNCLEAN_AT)?;
            self.storage_ref().sync()?;
        }
        Ok(())
    }
}

impl Drop for Hosted {
    /// A last attempt for users who forgot to close, which is where errors are reported.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = self.close_cleanly();
        }
    }
}

/// Where new grains go: behind everything in the file. Of a device, whose length says nothing, behind every grain and
/// table that is in use.
pub(super) fn end_of_grains(tables: &Tables) -> Result<u64> {
    let header = &tables.header;
    let overhead = header.overhead.max(1) * SECTOR;
    let used = if tables.storage.fixed_len() { end_of_used(tables)? } else { tables.storage.len()? };
    let end = used.max(overhead);
    Ok(align_up(end, header.grain_bytes()).unwrap_or(end))
}

fn end_of_used(tables: &Tables) -> Result<u64> {
    let header = &tables.header;
    let directory = |sector: u64| sector.saturating_add(header.gd_sectors());
    let mut end = directory(header.gd_offset).max(directory(header.rgd_offset));
    end = end.max(header.descriptor_offset.saturating_add(header.descriptor_len)).saturating_mul(SECTOR);
    for index in 0..header.gd_entries() {
        for copy in [Copy::Main, Copy::Redundant] {
            let Some(table) = tables.table_of(copy, index)? else { continue };
            end = end.max(table + header.gt_sectors() * SECTOR);
            for entry in 0..u64::from(header.gtes_per_gt) {
                let sector = u64::from(tables.pages.entry(table + entry * 4)?);
                end = end.max((sector + header.grain) * SECTOR);
            }
        }
    }
    Ok(end)
}
