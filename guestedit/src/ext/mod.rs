//! ext2, ext3 and ext4, written from the kernel's documentation ("ext4 Data Structures and Algorithms").
//!
//! ```text
//!   Ext        paths and operations                               (this file, path, change)
//!    |
//!   Volume     directories (dir, records, index, hash), maps of files (map, extents), attributes (xattr),
//!    |         blocks and inodes that are taken and given back (alloc), all with their checksums
//!    |
//!   Staged     changed blocks, in memory until they are synced
//! ```
//!
//! Files get new contents in new blocks and a new map; the old blocks are given back when nothing on the device refers
//! to them any more. Changes reach the device in four steps, so that whatever interrupts them leaves blocks or inodes that
//! nobody uses, at worst: what has been taken is marked and new blocks of metadata are written; then inodes; then
//! everything else, directories above all; then what has been given back is marked as free. (A hash tree or the
//! parent of a directory is more than one block: an interruption in the third step may leave them for e2fsck to repair.)
//! The journal is not used for any of this: it has been brought to its end, and is empty.

mod alloc;
mod change;
mod dir;
mod extents;
mod hash;
mod index;
mod inode;
mod journal;
mod map;
mod orphan;
mod path;
mod records;
mod superblock;
mod volume;
mod xattr;

use std::sync::Arc;

use block::{BlockDevice, Error, Result, ResultExt as _};
use guestdisk::detect::Kind;

use crate::bytes::{le32, part};
use crate::types::Clock;
use volume::Volume;

/// An ext file system that is changed.
#[derive(Debug)]
pub(crate) struct Ext {
    volume: Volume,
    kind: Kind,
    notes: Vec<String>,
}

impl Ext {
    /// Opens the file system and brings its journal to an end.
    pub(crate) fn open(device: Arc<dyn BlockDevice>, kind: Kind, clock: Clock) -> Result<Self> {
        let (mut volume, mut notes) = (Volume::open(Arc::clone(&device), clock)?, vec![]);
        if volume.geometry.needs_recovery() {
            if !volume.geometry.has_journal() {
                return Err(Error::unsupported("a journal that is not there was not finished"));
            }
            let blocks = journal::replay(&mut volume).context(|| "journal".to_owned())?;
            notes.push(format!("the journal was not finished: {blocks} blocks were written from it"));
            // The superblock may have been among what the journal held.
            volume = Volume::open(device, clock)?;
        }
        volume.geometry.check_state()?;
        volume.check_mmp()?;
        volume.survey()?;
        let mut ext = Self { volume, kind, notes };
        let orphans = ext.change(Volume::finish_orphans).context(|| "orphans".to_owned())?;
        if orphans > 0 {
            ext.notes
                .push(format!("{orphans} files that had been removed while they were open are gone now"));
            ext.write()?;
        }
        Ok(ext)
    }

    /// Carries out an operation, as a whole or not at all.
    fn change<T>(&mut self, mut operation: impl FnMut(&mut Volume) -> Result<T>) -> Result<T> {
        /// Bytes of changes that are kept in memory.
        const MOST_WAITING: u64 = 64 << 20;
        self.volume.begin();
        let mut result = operation(&mut self.volume);
        let full = matches!(&result, Err(error) if error.kind() == block::ErrorKind::NoSpace);
        if full && self.volume.given_back() != (0, 0) {
            // What earlier operations have given back can be used after a sync.
            self.volume.abandon();
            self.write()?;
            self.volume.begin();
            result = operation(&mut self.volume);
        }
        match result {
            Ok(_) => self.volume.accept(),
            Err(_) => self.volume.abandon(),
        }
        if self.volume.staged.waiting() > MOST_WAITING {
            self.write()?;
        }
        result
    }

    /// Brings all changes to the device.
    fn write(&mut self) -> Result<()> {
        let Volume { staged, accounts, fresh, system, .. } = &mut self.volume;
        let is_own = |number| volume::is_in(system, number, 1);
        staged.write(|number| accounts.contains(&number) || fresh.contains(&number))?;
        staged.flush()?;
        staged.write(is_own)?;
        staged.flush()?;
        staged.write(|_| true)?;
        staged.flush()?;
        fresh.clear();
        if self.volume.given_back() == (0, 0) {
            return Ok(());
        }
        self.volume.unbounded();
        let released = self.volume.release();
        if released.is_err() {
            self.volume.staged.abandon();
            return released;
        }
        self.volume.freed = volume::Freed::default();
        self.volume.staged.accept();
        self.volume.staged.write(|_| true)?;
        self.volume.staged.flush()
    }
}

impl Volume {
    /// Refuses a file system that another machine has mounted ("Multiple Mount Protection").
    fn check_mmp(&mut self) -> Result<()> {
        const CLEAN: u32 = 0xff4d_4d50;
        if !self.geometry.has_mmp() {
            return Ok(());
        }
        let block = self.block(self.geometry.mmp_block)?;
        if part(&block, 0, 4) == [0x50, 0x4d, 0x4d, 0] && le32(&block, 4) == CLEAN {
            return Ok(());
        }
        Err(Error::unsupported("the file system is mounted somewhere, says its protection against that")
            .hint("Shut the guest down first."))
    }
}
