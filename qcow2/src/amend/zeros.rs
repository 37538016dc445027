//! Version 2 has no zero clusters: here they become clusters of zeros, or nothing where nothing reads as zeros.
//!
//! That goes for every L2 table that the active L1 table or a snapshot refers to. A table that several refer to is
//! changed for all of them, since it means the same to all; a cluster that it then refers to is counted once for
//! each, as if it had been there when the snapshots were taken.
//!
//! Tables are changed in batches. First the clusters of zeros and their refcounts are made durable, then the tables,
//! then what they have stopped referring to is let go. At every moment, each entry is the old one or the new one, and
//! they read alike.

use std::collections::HashMap;

use block::num::to_usize;
use block::{Result, ZeroMode};

use super::Steps;
use crate::device::Qcow2;
use crate::error::Error;
use crate::geometry::MAX_L1_BYTES;
use crate::l2::{Entry, RawEntry};

/// Bytes of changed tables that are written at a time.
const BATCH: u64 = 8 << 20;

/// What refers to an L2 table.
#[derive(Debug, Clone, Copy)]
struct Uses {
    /// How many L1 entries.
    count: u32,
    /// Lowest index among them.
    first: u32,
    /// Whether the active L1 table is among them.
    active: bool,
}

/// Changed tables, until they are written.
#[derive(Debug, Default)]
struct Batch {
    /// (offset, contents)
    tables: Vec<(u64, Vec<u8>)>,
    /// Host clusters that lose a reference.
    freed: Vec<u64>,
}

/// Expands the zero clusters of an image, which is to be of version 2.
///
/// # Errors
/// A broken table; no space; what `steps` returns; the host failed. What has been expanded stays so.
pub(super) fn expand(image: &Qcow2, steps: &mut Steps<'_>) -> Result<()> {
    let _flushing = image.flush_lock.lock();
    image.write_tables_locked(true)?;
    let mut tables: Vec<_> = uses(image)?.into_iter().collect();
    tables.sort_unstable_by_key(|(offset, _)| *offset);
    let total = tables.len() as u64;
    let mut batch = Batch::default();
    for ((offset, uses), done) in tables.into_iter().zip(0..) {
        // What has been expanded is complete, whatever happens now.
        let expanded = steps.update(done, total).and_then(|()| expand_table(image, offset, uses, &mut batch));
        if expanded.is_err() {
            batch.commit(image)?;
            return expanded;
        }
        let bytes = batch.tables.len() as u64 * image.geometry.cluster_size();
        if bytes >= BATCH || image.meta.lock().wants_flush(usize::MAX) {
            batch.commit(image)?;
        }
    }
    batch.commit(image)?;
    steps.update(total, total)
}

/// All L2 tables.
fn uses(image: &Qcow2) -> Result<HashMap<u64, Uses>> {
    let mut all = HashMap::new();
    let mut note = |l1: &[u64], active: bool| -> Result<()> {
        for (entry, index) in l1.iter().zip(0u32..).filter(|(entry, _)| **entry != 0) {
            let Some(table) = image.validate_l1_entry(index.into(), *entry)? else { continue };
            let uses = all.entry(table).or_insert(Uses { count: 0, first: index, active });
            uses.count += 1;
            uses.first = uses.first.min(index);
            uses.active |= active;
        }
        Ok(())
    };
    note(&image.l1.read(), true)?;
    for snapshot in image.snapshots() {
        let bytes = u64::from(snapshot.l1_size) * 8;
        if bytes > MAX_L1_BYTES {
            return Err(Error::SnapshotL1 { too_large: true }.into());
        }
        let mut l1 = vec![0; to_usize(bytes)];
        image.storage.read_at(&mut l1, snapshot.l1_offset)?;
        let entries: Vec<u64> =
            l1.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        note(&entries, false)?;
    }
    Ok(all)
}

fn expand_table(image: &Qcow2, offset: u64, uses: Uses, batch: &mut Batch) -> Result<()> {
    let mut bytes = vec![0; to_usize(image.geometry.cluster_size())];
    image.storage.read_at(&mut bytes, offset)?;
    let entries = decode(image, &bytes, uses)?;
    let mut table = Table { image, offset, uses, entries, freed: vec![], taken: vec![] };
    if !table.expand().inspect_err(|_| table.undo())? {
        return Ok(());
    }
    for (entry, chunk) in table.entries.iter().zip(bytes.as_chunks_mut::<8>().0) {
        *chunk = entry.encode(&image.geometry).word.to_be_bytes();
    }
    batch.freed.append(&mut table.freed);
    batch.tables.push((offset, bytes));
    Ok(())
}

fn decode(image: &Qcow2, bytes: &[u8], uses: Uses) -> Result<Vec<Entry>> {
    let words = bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_be_bytes(*chunk));
    let entries = words.zip(0u64..).map(|(word, i)| {
        Entry::decode(RawEntry { word, bitmap: 0 }, &image.geometry, image.version, image.external).map_err(
            |reason| {
                let guest =
                    u64::from(uses.first) * image.geometry.l2_coverage() + image.geometry.offset_of(i);
                Error::L2Entry { guest, reason }.into()
            },
        )
    });
    entries.collect()
}

/// An L2 table on its way.
struct Table<'a> {
    image: &'a Qcow2,
    offset: u64,
    uses: Uses,
    entries: Vec<Entry>,
    freed: Vec<u64>,
    /// (offset, clusters)
    taken: Vec<(u64, u64)>,
}

impl Table<'_> {
    /// Whether anything has changed.
    fn expand(&mut self) -> Result<bool> {
        let mut wanted = vec![];
        let mut changed = false;
        for index in 0..self.entries.len() {
            if let Entry::Plain { zero: 1, host, copied, .. } = self.entries[index] {
                changed = true;
                match host {
                    Some(host) if self.is_exclusive(host)? => self.fill_in_place(index, host, copied)?,
                    host => {
                        self.let_go(host);
                        match self.backed(index) {
                            true => wanted.push(index),
                            false => self.entries[index] = Entry::UNALLOCATED,
                        }
                    }
                }
            }
        }
        self.fill_elsewhere(&wanted)?;
        Ok(changed)
    }

    fn guest(&self, index: usize) -> u64 {
        let start = u64::from(self.uses.first) * self.image.geometry.l2_coverage();
        start + self.image.geometry.offset_of(index as u64)
    }

    /// Whether a backing file would show where this entry says nothing.
    fn backed(&self, index: usize) -> bool {
        self.image.backing.as_ref().is_some_and(|backing| self.guest(index) < backing.size())
    }

    /// Whether a host cluster belongs to this table alone.
    fn is_exclusive(&self, host: u64) -> Result<bool> {
        let cluster = self.image.geometry.cluster_of(host);
        let count = self.image.meta.lock().refcounts.get(&*self.image.storage, cluster)?;
        Ok(count == u64::from(self.uses.count))
    }

    fn let_go(&mut self, host: Option<u64>) {
        let times = to_usize(self.uses.count.into());
        self.freed.extend(host.into_iter().flat_map(|host| std::iter::repeat_n(host, times)));
    }

    fn fill_in_place(&mut self, index: usize, host: u64, copied: bool) -> Result<()> {
        let len = self.image.geometry.cluster_size();
        self.image.check_place(self.guest(index), host, len)?;
        match self.image.is_encrypted() {
            true => self.image.write_guest_zeros(self.guest(index), host, len)?,
            false => self.image.storage.zero_range(host, len, ZeroMode::ALLOCATE)?,
        }
        self.entries[index] = Entry::Plain { host: Some(host), copied, allocated: 1, zero: 0 };
        Ok(())
    }

    /// Gives new clusters to the entries with these indices.
    fn fill_elsewhere(&mut self, wanted: &[usize]) -> Result<()> {
        let copied = self.uses.count == 1 && self.uses.active;
        let mut rest = wanted;
        while !rest.is_empty() {
            let (offset, clusters) = self.allocate(rest.len() as u64)?;
            self.taken.push((offset, clusters));
            let cluster = self.image.geometry.cluster_size();
            if !self.image.is_encrypted() {
                self.image.storage.zero_range(offset, clusters * cluster, ZeroMode::UNMAP)?;
            }
            let (now, later) = rest.split_at(to_usize(clusters));
            for (index, i) in now.iter().zip(0..) {
                let place = offset + i * cluster;
                if self.image.is_encrypted() {
                    self.image.write_guest_zeros(self.guest(*index), place, cluster)?;
                }
                self.entries[*index] = Entry::Plain { host: Some(place), copied, allocated: 1, zero: 0 };
            }
            rest = later;
        }
        Ok(())
    }

    /// Up to `max` clusters that follow each other, counted once for each use of this table: (offset, clusters).
    fn allocate(&self, max: u64) -> Result<(u64, u64)> {
        let image = self.image;
        let (value, max_count) = (u64::from(self.uses.count), image.geometry.max_refcount());
        if value > max_count {
            let cluster = image.geometry.cluster_of(self.offset);
            return Err(Error::RefcountRange { cluster, value: value.into(), max: max_count }.into());
        }
        let map = image.map()?;
        let mut meta = image.meta.lock();
        image.mark_dirty(&mut meta)?;
        meta.may_grow_table = true;
        let run = meta.allocate(&*image.storage, map, max);
        meta.may_grow_table = false;
        let run = run?;
        let first = image.geometry.cluster_of(run.offset);
        for cluster in first..first + run.clusters {
            meta.refcounts.set(&*image.storage, cluster, self.uses.count.into())?;
        }
        Ok((run.offset, run.clusters))
    }

    /// Gives back the clusters that nothing is going to refer to.
    fn undo(&mut self) {
        let mut meta = self.image.meta.lock();
        for (offset, clusters) in self.taken.drain(..) {
            for _ in 0..self.uses.count {
                // An error leaves a leak; the caller is reporting the first one already.
                let _ = meta.release(&*self.image.storage, offset, clusters);
            }
        }
    }
}

impl Batch {
    fn commit(&mut self, image: &Qcow2) -> Result<()> {
        if self.tables.is_empty() {
            return Ok(());
        }
        image.write_tables_locked(true)?;
        for (offset, bytes) in self.tables.drain(..) {
            image.storage.write_at(&bytes, offset)?;
            image.slices.forget_table(offset, image.geometry.cluster_size());
        }
        image.storage.sync()?;
        {
            let mut meta = image.meta.lock();
            let cluster = image.geometry.cluster_size();
            self.freed.drain(..).for_each(|host| meta.free_later(host, cluster));
        }
        image.write_tables_locked(true)
    }
}
