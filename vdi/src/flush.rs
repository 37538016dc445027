//! The order in which header and map reach the disk.
//!
//! ```text
//!   0  guest data (written when it was written), the length of the file, the header's count of blocks  | sync
//!   1  entries of new blocks                                                                             | sync
//! ```
//!
//! What phase 1 writes is copied before phase 0, so that everything it refers to is on disk and counted: other programs
//! take the count for the number of the next free block, and would give a block out twice if it came too late.

use std::sync::atomic::Ordering;

use block::Result;

use crate::alloc::Alloc;
use crate::vdi::Vdi;

impl Vdi {
    /// Makes all completed writes durable.
    pub(crate) fn flush_all(&self) -> Result<()> {
        let Some(alloc) = &self.alloc else { return Ok(()) };
        let _alone = self.flushing.lock();
        let entries = self.map.pages().take_changed();
        self.write_header(&mut alloc.lock())?;
        self.storage.sync()?;
        if entries.is_empty() {
            return Ok(());
        }
        entries.write(&*self.storage)?;
        self.storage.sync()?;
        entries.done();
        Ok(())
    }

    /// Writes the count of blocks and the UUID of the state, if they have changed, and makes the file as long as the
    /// blocks are.
    fn write_header(&self, alloc: &mut Alloc) -> Result<()> {
        let Some(modified) = *self.modified.lock() else { return Ok(()) };
        let state = (alloc.next, modified);
        if alloc.on_disk == Some(state) {
            return Ok(());
        }
        let end = self.limit.load(Ordering::Acquire);
        if !self.storage.fixed_len() && self.storage.len()? < end {
            self.storage.set_len(end)?;
        }
        alloc.on_disk = None;
        self.header.write_state(&*self.storage, alloc.next, modified)?;
        alloc.on_disk = Some(state);
        Ok(())
    }

    /// Flushes, and gives back numbers that were set aside and not used.
    pub(crate) fn close_cleanly(&self) -> Result<()> {
        let Some(alloc) = &self.alloc else { return Ok(()) };
        // Nobody is between taking a number and referring to it.
        let _all = self.stripes.all();
        {
            let mut alloc = alloc.lock();
            let before = alloc.next;
            alloc.release();
            if alloc.next < before {
                let end = self.map.offset_of(alloc.next).max(self.opened_len);
                self.limit.store(end, Ordering::Release);
                if !self.storage.fixed_len() && self.storage.len()? > end {
                    self.storage.set_len(end)?;
                }
            }
        }
        self.flush_all()
    }
}

impl Drop for Vdi {
    /// A last attempt for users who forgot [`close`](block::BlockDevice::close), which is where errors are reported.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = self.close_cleanly();
        }
    }
}
