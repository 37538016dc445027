//! The content ID: how a child notices that its parent has been changed.
//!
//! The ID is replaced by a random one before the first change of the contents after each opening, as by VMware's
//! products, and is on the disk before the change is: a child can miss no change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Error, Result, Storage};
use parking_lot::Mutex;

use crate::descriptor::{Descriptor, NO_PARENT};
use crate::layout::Place;

/// The descriptor of an open disk.
#[derive(Debug)]
pub(crate) struct Identity {
    storage: Arc<dyn Storage>,
    place: Place,
    descriptor: Mutex<Descriptor>,
    /// The contents have changed since the disk was opened, and the ID on the disk says so.
    changed: AtomicBool,
}

impl Identity {
    pub(crate) fn new(storage: Arc<dyn Storage>, descriptor: Descriptor, place: Place) -> Self {
        Self { storage, place, descriptor: Mutex::new(descriptor), changed: AtomicBool::new(false) }
    }

    pub(crate) fn cid(&self) -> u32 {
        self.descriptor.lock().cid()
    }

    pub(crate) fn parent_cid(&self) -> u32 {
        self.descriptor.lock().parent_cid()
    }

    /// Records that the parent has another content ID now. A disk without a parent has none to record.
    pub(crate) fn adopt_parent(&self, cid: u32) -> Result<()> {
        let mut descriptor = self.descriptor.lock();
        if !descriptor.has_parent() || descriptor.parent_cid() == cid {
            return Ok(());
        }
        let mut new = descriptor.clone();
        new.set_parent_cid(cid);
        replace(&*self.storage, self.place, &descriptor, &new)?;
        self.storage.sync()?;
        *descriptor = new;
        Ok(())
    }

    /// Makes the ID on the disk a new one, once.
    pub(crate) fn contents_change(&self) -> Result<()> {
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut descriptor = self.descriptor.lock();
        if self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut new = descriptor.clone();
        new.set_cid(random_cid(descriptor.cid())? & descriptor.cid_mask());
        replace(&*self.storage, self.place, &descriptor, &new)?;
        self.storage.sync()?;
        *descriptor = new;
        self.changed.store(true, Ordering::Release);
        Ok(())
    }
}

/// A content ID whose last six digits differ from those of `old` and of the one that means "no parent".
pub(crate) fn random_cid(old: u32) -> Result<u32> {
    loop {
        let mut bytes = [0; 4];
        getrandom::fill(&mut bytes).map_err(|error| Error::new(block::ErrorKind::Io, error.to_string()))?;
        let cid = u32::from_le_bytes(bytes);
        let differs = |other: u32| (cid ^ other) & 0x00ff_ffff != 0;
        if differs(old) && differs(NO_PARENT) {
            return Ok(cid);
        }
    }
}

/// Replaces a descriptor. Where the new one is as long as the old, nothing is written but the bytes that differ: the
/// digits of an ID, in one write.
pub(crate) fn replace(storage: &dyn Storage, place: Place, old: &Descriptor, new: &Descriptor) -> Result<()> {
    let (old, mut new) = (old.encode(), new.encode());
    let differs = |(a, b): (&u8, &u8)| a != b;
    if old.len() == new.len() {
        let first = old.iter().zip(&new).position(differs);
        let last = old.iter().zip(&new).rposition(differs);
        let (Some(first), Some(last)) = (first, last) else { return Ok(()) };
        return storage.write_at(&new[first..=last], place.offset + first as u64);
    }
    match place.room {
        Some(room) if new.len() as u64 > room => {
            let text =
                format!("the descriptor needs {} bytes, and the extent has room for {room}", new.len());
            return Err(Error::new(block::ErrorKind::NoSpace, text));
        }
        Some(_) => new.resize(new.len().max(old.len()), 0),
        None => {}
    }
    storage.write_at(&new, place.offset)?;
    if place.room.is_none() && new.len() < old.len() {
        storage.set_len(new.len() as u64)?;
    }
    Ok(())
}
