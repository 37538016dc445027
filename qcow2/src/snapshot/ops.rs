//! Creating, applying and deleting snapshots of an open image.
//!
//! A new snapshot takes over the active L1 table, and the L2 tables as they are; the disk goes on with copies of those
//! that say that clusters belong to it alone. To apply a snapshot is to give the disk the snapshot's tables in the same
//! way. How all of it becomes true at once is described in [`change`](super::change).

use std::time::{SystemTime, UNIX_EPOCH};

use block::num::{is_aligned, low_u32, to_usize};
use block::{BlockDevice as _, Error as BlockError, ErrorKind, Result};

use super::change::{Change, Flags, Target};
use super::{Selector, Snapshot};
use crate::device::{Qcow2, read_l1};
use crate::error::Error;
use crate::header::Header;

/// Longest name of a snapshot in bytes (QEMU's limit); longer ones are cut.
pub const MAX_NAME: usize = 255;

impl Qcow2 {
    /// Takes a snapshot of the disk as it is now and returns its entry in the table. Its id is one more than the
    /// largest number among the ids; names need not be unique, and are cut to [`MAX_NAME`] bytes.
    ///
    /// Requests of other threads wait meanwhile.
    ///
    /// # Errors
    /// The image is read-only or has an external data file; a cluster would be in use more often than the image can
    /// count (`Invalid argument`, as QEMU says); there are too many snapshots; tables contradict the refcounts or each
    /// other; no space; the host failed. The image is as it was then.
    pub fn create_snapshot(&self, name: &[u8], taken: SystemTime) -> Result<Snapshot> {
        self.exclusively(|image, change| {
            let l1 = image.l1.read().clone();
            change.count(&[(&l1, 1)])?;
            change.settle()?;
            let mut snapshots = image.snapshots();
            let snapshot = image.new_entry(&snapshots, name, taken);
            snapshots.push(snapshot.clone());
            let renewed = change.renew(&l1, Flags::Clear)?;
            image.drop_snapshot_table(change)?;
            let target = Target { l1: Some(renewed), size: image.size(), snapshots: Some(snapshots) };
            Ok((target, snapshot))
        })
    }

    /// Makes the disk what it was, in contents and size, when a snapshot was taken. What has been written since is
    /// lost unless another snapshot has it.
    ///
    /// # Errors
    /// `NotFound`; the image has bitmaps, which would miss the change; otherwise as
    /// [`create_snapshot`](Self::create_snapshot).
    pub fn apply_snapshot(&self, selector: &Selector) -> Result<()> {
        self.exclusively(|image, change| {
            if !image.bitmaps.read().is_empty() {
                return Err(BlockError::unsupported("Device has active dirty bitmaps")
                    .hint("The bitmaps would not know what the snapshot changes: remove them first"));
            }
            let snapshots = image.snapshots();
            let snapshot = selector.find(&snapshots).and_then(|index| snapshots.get(index));
            let snapshot = snapshot.ok_or_else(not_found)?;
            let size = snapshot.disk_size.unwrap_or_else(|| image.size());
            if i64::try_from(size).is_err() {
                return Err(Error::TooBig { size }.into());
            }
            image.check_l1_limit(size)?;
            let source = image.l1_of(snapshot)?;
            let l1 = image.l1.read().clone();
            change.count(&[(&source, 1), (&l1, -1)])?;
            change.settle()?;
            let mut renewed = change.renew(&source, Flags::Clear)?;
            let needed = to_usize(image.geometry.l1_entries_for(size));
            renewed.resize(renewed.len().max(needed), 0);
            image.drop_l1(change)?;
            let resized = size != image.size();
            if resized {
                image.drop_snapshot_table(change)?;
            }
            // Entries that do not say how large their disk was meant the present size.
            let target = Target { l1: Some(renewed), size, snapshots: resized.then(|| snapshots.clone()) };
            Ok((target, ()))
        })
    }

    /// Deletes a snapshot and returns what its entry was.
    ///
    /// # Errors
    /// `NotFound`; otherwise as [`create_snapshot`](Self::create_snapshot).
    pub fn delete_snapshot(&self, selector: &Selector) -> Result<Snapshot> {
        self.exclusively(|image, change| {
            let mut snapshots = image.snapshots();
            let index = selector.find(&snapshots).ok_or_else(not_found)?;
            let snapshot = snapshots.remove(index);
            let source = image.l1_of(&snapshot)?;
            let l1 = image.l1.read().clone();
            change.count(&[(&source, -1)])?;
            change.drop_structure(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8)?;
            change.settle()?;
            let renewed = change.renew(&l1, Flags::Follow)?;
            image.drop_snapshot_table(change)?;
            let renewed = (renewed != l1).then_some(renewed);
            if renewed.is_some() {
                image.drop_l1(change)?;
            }
            let target = Target { l1: renewed, size: image.size(), snapshots: Some(snapshots) };
            Ok((target, snapshot))
        })
    }

    /// Carries out a change while nobody else uses the image.
    fn exclusively<T>(&self, plan: impl FnOnce(&Self, &mut Change<'_>) -> Result<(Target, T)>) -> Result<T> {
        if !self.writable {
            return Err(BlockError::read_only());
        }
        if self.external {
            return Err(BlockError::unsupported("Operation not supported")
                .hint("An image with an external data file cannot have internal snapshots"));
        }
        let _reshaping = self.reshaping.lock();
        // Nor does a bitmap appear meanwhile, which would be made for the size that the disk has now.
        let _bitmaps = self.recorder.hold();
        let _held = self.stripes.all();
        self.release_reserved()?;
        let _flushing = self.flush_lock.lock();
        self.write_tables_locked(true)?;
        let mut change = Change::begin(self)?;
        match plan(self, &mut change) {
            Ok((target, result)) => change.commit(target).map(|()| result),
            Err(error) => {
                change.abandon();
                Err(error)
            }
        }
    }

    fn new_entry(&self, snapshots: &[Snapshot], name: &[u8], taken: SystemTime) -> Snapshot {
        let header = self.header.lock();
        let since = taken.duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = snapshots.iter().map(|snapshot| number(&snapshot.id)).max().unwrap_or(0).saturating_add(1);
        Snapshot {
            l1_offset: header.l1_table_offset,
            l1_size: header.l1_size,
            id: id.to_string().into_bytes(),
            name: name.get(..MAX_NAME).unwrap_or(name).to_vec(),
            date_sec: low_u32(since.as_secs() & u64::from(u32::MAX)),
            date_nsec: since.subsec_nanos(),
            disk_size: Some(self.size()),
            icount: Some(0),
            extra_len: 24,
            ..Snapshot::default()
        }
    }

    /// The L1 table of a snapshot.
    fn l1_of(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        snapshot.check_l1(&self.geometry, self.storage.len()?)?;
        let header = self.header.lock().clone();
        let (l1_size, l1_table_offset) = (snapshot.l1_size, snapshot.l1_offset);
        read_l1(&*self.storage, &Header { l1_size, l1_table_offset, ..header })
    }

    fn drop_l1(&self, change: &mut Change<'_>) -> Result<()> {
        let (offset, entries) = {
            let header = self.header.lock();
            (header.l1_table_offset, header.l1_size)
        };
        change.drop_structure(offset, u64::from(entries) * 8)
    }

    /// The table is written anew: the old one goes.
    fn drop_snapshot_table(&self, change: &mut Change<'_>) -> Result<()> {
        let offset = self.header.lock().snapshots_offset;
        let len = super::stored_len(&self.snapshots.read());
        if is_aligned(offset, self.geometry.cluster_size()) {
            change.drop_structure(offset, len)
        } else {
            Ok(())
        }
    }
}

fn not_found() -> BlockError {
    BlockError::new(ErrorKind::NotFound, "snapshot not found")
}

/// The number that a text begins with.
fn number(id: &[u8]) -> u64 {
    id.iter()
        .take_while(|byte| byte.is_ascii_digit())
        .fold(0u64, |sum, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
}
