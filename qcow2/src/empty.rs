//! Emptying an image: letting go of everything that its disk stores, so that its backing file shows everywhere.
//!
//! That is the end of a commit. The entries of the L1 table become zero, some at a time; when they are on disk, the
//! clusters behind them lose a reference, as with every other change. A crash in between leaves a disk of which a
//! part has been emptied. To whoever has just copied all of it to the backing file that is the same disk.

use block::{Error as BlockError, Result};

use crate::device::Qcow2;
use crate::l2::{Entry, OFFSET_MASK};

/// Runs of clusters that are let go before the tables are written, so that memory stays bounded.
const MANY_RUNS: usize = 1 << 16;

impl Qcow2 {
    /// Forgets all that the disk stores in this layer; snapshots keep what they have. Durable when this returns.
    ///
    /// # Errors
    /// Read-only, a corrupt table, or the host failed: a part of the disk may have been emptied then.
    pub fn make_empty(&self) -> Result<()> {
        if !self.writable {
            return Err(BlockError::read_only());
        }
        self.check_readable()?;
        if self.external_raw {
            return Err(BlockError::unsupported("an image whose data file is raw cannot be emptied"));
        }
        self.close_cleanly()?;
        let _held = self.stripes.all();
        let _flushing = self.flush_lock.lock();
        let tables = self.l1.read().len() as u64;
        for index in 0..tables {
            self.let_table_go(index)?;
            if self.meta.lock().pending_free.len() >= MANY_RUNS {
                self.write_tables_locked(true)?;
            }
        }
        self.write_tables_locked(true)?;
        if self.external {
            self.data.discard_range(0, self.data.len()?)?;
        }
        self.drop_idle_blocks()?;
        self.cut_file()?;
        self.write_tables_locked(true)
    }

    /// Takes an L2 table out of the L1 table. It and the clusters it maps lose a reference with the next flush.
    fn let_table_go(&self, index: u64) -> Result<()> {
        let guest = index << (self.geometry.l2_bits() + self.geometry.cluster_bits);
        let Some(table) = self.l2_table(guest)? else { return Ok(()) };
        let held = self.clusters_of_table(table, guest)?;
        let mut meta = self.meta.lock();
        self.mark_dirty(&mut meta)?;
        if let Some(entry) = self.l1.write().get_mut(block::num::to_usize(index)) {
            debug_assert_eq!(*entry & OFFSET_MASK, table);
            *entry = 0;
        }
        meta.dirty_l1.insert(index);
        for (offset, len) in held {
            meta.free_later(offset, len);
        }
        let cluster = self.geometry.cluster_size();
        meta.free_later(table, cluster);
        meta.dirty_slices.retain(|offset, _| !(table..table + cluster).contains(offset));
        self.slices.forget_table(table, cluster);
        self.compressed_epoch.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        Ok(())
    }

    /// The host ranges (offset, length) that the entries of a table refer to.
    fn clusters_of_table(&self, table: u64, guest: u64) -> Result<Vec<(u64, u64)>> {
        let mut held = Vec::new();
        for i in 0..1u64 << self.geometry.l2_bits() {
            let at = guest + self.geometry.offset_of(i);
            let (slice, index) = self.slice(table, at)?;
            match self.decode(&slice, index, at)? {
                Entry::Compressed { offset, len } => held.push((offset, len)),
                Entry::Plain { host: Some(host), .. } if !self.external => {
                    held.push((host, self.geometry.cluster_size()));
                }
                Entry::Plain { .. } => {}
            }
        }
        Ok(held)
    }

    /// Takes refcount blocks that count nothing but themselves off the end of the table, so that the file can end
    /// before them. When their entries are zero on disk, nobody looks at the clusters they lie in any more.
    fn drop_idle_blocks(&self) -> Result<()> {
        let mut meta = self.meta.lock();
        for index in (1..meta.refcounts.table_len()).rev() {
            let Some(offset) = meta.refcounts.block_offset(index) else { continue };
            let own = self.geometry.cluster_of(offset);
            if meta.refcounts.block_index(own) != index
                || !meta.refcounts.counts_only(&*self.storage, index, own)?
            {
                break;
            }
            meta.refcounts.drop_block(index);
            self.map()?.disclaim(own, 1);
        }
        drop(meta);
        self.write_tables_locked(true)
    }
}
