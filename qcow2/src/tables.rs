//! Changing what the header names: tables that are written elsewhere, complete and counted on disk before the header
//! switches over to them, and given back when it does not name them any more.
//!
//! Every operation on metadata other than guest I/O (snapshots, bitmaps, amending, a new backing file) has this
//! shape, so that a crash finds the old state or the new one:
//!
//! ```text
//!   flush lock held:  place_table(new)  ->  change_header_locked(name it)  ->  drop_table(old)
//! ```

use std::sync::atomic::Ordering;

use block::{Error as BlockError, Result};

use crate::alloc::Run;
use crate::device::Qcow2;
use crate::header::Header;

impl Qcow2 {
    /// Changes the header: feature bits, names, extensions, the places of tables. The change is durable when this
    /// returns. The size, the L1 table and the refcount table have ways of their own to change.
    ///
    /// # Errors
    /// What `change` says; read-only; the new header does not fit into its cluster; the host failed. The header is
    /// the old one then; if the disk may hold something else, the next flush writes the old one again.
    pub fn change_header(&self, change: impl FnOnce(&mut Header) -> Result<()>) -> Result<()> {
        let _flushing = self.flush_lock.lock();
        self.change_header_locked(change)
    }

    /// The same for a caller that holds the flush lock.
    pub(crate) fn change_header_locked(&self, change: impl FnOnce(&mut Header) -> Result<()>) -> Result<()> {
        if !self.writable {
            return Err(BlockError::read_only());
        }
        self.settle_header()?;
        let meta = self.meta.lock();
        let mut header = self.header.lock();
        let mut old = header.clone();
        old.refcount_table_offset = meta.refcounts.table_offset;
        old.refcount_table_clusters = meta.refcounts.table_clusters;
        let mut new = old.clone();
        change(&mut new)?;
        new.encode()?;
        let written = new.replace(&*self.storage, &old);
        match written {
            Ok(()) => *header = new,
            Err(_) => self.header_lost.store(true, Ordering::Release),
        }
        written
    }

    /// Writes the whole header again, as it is in memory, if changing it has failed before. Part of
    /// [`settle_header`](Self::settle_header).
    pub(crate) fn rewrite_header(&self, header: &Header, table: (u64, u32)) -> Result<()> {
        let mut header = header.clone();
        (header.refcount_table_offset, header.refcount_table_clusters) = table;
        self.storage.write_at(&header.encode()?, 0)?;
        self.storage.sync()
    }

    /// Writes `bytes` into clusters of their own, padded with zeros. Bytes and refcounts are durable when this
    /// returns; nothing refers to them yet. The caller holds the flush lock, and gives the run to
    /// [`drop_table`](Self::drop_table) if it cannot be used after all.
    ///
    /// # Errors
    /// No space, or the host failed; nothing stays allocated then (after a crash it may be leaked).
    pub(crate) fn place_table(&self, bytes: &[u8]) -> Result<Run> {
        let clusters = self.geometry.clusters_for(bytes.len() as u64).max(1);
        let map = self.map()?;
        self.settle_header()?;
        let run = {
            let mut meta = self.meta.lock();
            self.mark_dirty(&mut meta)?;
            meta.may_grow_table = true;
            let run = meta.allocate_contiguous(&*self.storage, map, clusters);
            meta.may_grow_table = false;
            run?
        };
        map.claim(self.geometry.cluster_of(run.offset), run.clusters);
        self.fill_table(bytes, run).inspect_err(|_| {
            map.disclaim(self.geometry.cluster_of(run.offset), run.clusters);
            self.meta.lock().undo(&*self.storage, run);
        })?;
        Ok(run)
    }

    fn fill_table(&self, bytes: &[u8], run: Run) -> Result<()> {
        self.storage.write_at(bytes, run.offset)?;
        let rest = self.geometry.offset_of(run.clusters) - bytes.len() as u64;
        crate::write::write_zeros(&*self.storage, run.offset + bytes.len() as u64, rest)?;
        self.grown_to(run.offset + self.geometry.offset_of(run.clusters));
        self.write_tables_locked(true)?;
        self.storage.sync()
    }

    /// Gives back the clusters under `len` bytes at `offset` that the header does not name any more: with this flush,
    /// or if that fails with the next. The caller holds the flush lock.
    ///
    /// # Errors
    /// The flush failed.
    pub(crate) fn drop_table(&self, offset: u64, len: u64) -> Result<()> {
        if len > 0 {
            self.meta.lock().free_later(offset, len);
        }
        self.write_tables_locked(true)
    }
}
