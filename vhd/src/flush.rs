//! The order in which tables reach the disk.
//!
//! ```text
//!   0  guest data, bitmaps of new blocks, the footer (written when they were written)  | sync
//!   1  bits of sectors that have been added to blocks; entries of new blocks            | sync
//! ```
//!
//! What phase 1 writes is copied before the sync of phase 0, so that everything it refers to is on disk. Within phase 1
//! any sector may arrive without the others: a block whose bits are missing shows its parent there, as before.

use block::Result;

use crate::disk::Disk;

impl Disk {
    /// Makes all completed writes durable.
    pub(crate) fn flush_all(&self) -> Result<()> {
        let Some(alloc) = &self.alloc else { return Ok(()) };
        let _alone = self.flushing.lock();
        alloc.lock().settle_footer(&*self.storage, &self.footer_bytes)?;
        let bitmaps = self.bitmaps.take_changed();
        let entries = self.table.pages().take_changed();
        self.storage.sync()?;
        if bitmaps.is_empty() && entries.is_empty() {
            return Ok(());
        }
        bitmaps.write(&*self.storage)?;
        entries.write(&*self.storage)?;
        self.storage.sync()?;
        bitmaps.done();
        entries.done();
        Ok(())
    }

    /// Flushes, and gives back places that were set aside and not used.
    pub(crate) fn close_cleanly(&self) -> Result<()> {
        let Some(alloc) = &self.alloc else { return Ok(()) };
        // Nobody is between taking a place and referring to it.
        let _all = self.stripes.all();
        self.flush_all()?;
        let mut alloc = alloc.lock();
        if !alloc.release(&self.table) {
            return Ok(());
        }
        alloc.settle_footer(&*self.storage, &self.footer_bytes)?;
        self.limit.store(alloc.limit(), std::sync::atomic::Ordering::Release);
        if let (Some(at), false) = (alloc.footer_at, self.storage.fixed_len()) {
            self.storage.set_len(at + crate::footer::FOOTER_BYTES)?;
        }
        self.storage.sync()
    }
}

impl Drop for Disk {
    /// A last attempt for users who forgot [`close`](block::BlockDevice::close), which is where errors are reported.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = self.close_cleanly();
        }
    }
}
