//! How the bitmaps of an image that is open for writing follow what is written to it, and how they get to the disk.
//!
//! As in QEMU: before the first write to the disk every bitmap that records is marked [`IN_USE`] in the directory, and
//! that is durable before the write goes on; its bits are then kept in memory. Closing the image stores them: data
//! and table elsewhere, a new directory without the mark elsewhere, then the header names it, then the old clusters
//! are given back. So at every moment a bitmap on disk either knows of every write or says that it does not.
//!
//! ```text
//!   record:  mark IN_USE in the directory | sync | set bits in memory | the write itself
//!   close:   bits, table, directory elsewhere | sync | header | sync | free the old ones
//! ```
//!
//! A crash in between leaves bitmaps that are in use: they are kept as they are, record nothing, and can only be
//! removed. Bits are set before the bytes they stand for are written, so a bitmap that is stored while a write is
//! still under way has its bits.
//!
//! Locks: the state here comes before everything else (stripes, flush lock, metadata); a writer holds it, shared, only
//! while it sets bits.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::codec::Writer;
use block::dirty::Uniform;
use block::num::{low_u32, to_usize};
use block::{DirtyBitmap, Result, ResultExt as _};
use parking_lot::{RwLock, RwLockReadGuard};

use super::contents::{Bits, bits_per_cluster, load, read_table, table_entries};
use super::{Bitmap, IN_USE, encode_directory};
use crate::alloc::Run;
use crate::device::Qcow2;
use crate::extension::BitmapsExtension;
use crate::features::autoclear;

/// Position of the flags in a directory entry.
const FLAGS_AT: u64 = 12;
/// Most bytes of bitmap data that are written in one piece.
const PIECE: u64 = 1 << 20;

/// A bitmap of an open image.
#[derive(Debug)]
pub(super) struct Tracked {
    /// Its entry in the directory, as it will be once it is stored. [`IN_USE`] here means that it was found so.
    pub(super) entry: Bitmap,
    /// Its bits, once they have been needed; on disk (at `entry.table_offset`) is what they were when they had last
    /// been [settled](DirtyBitmap::settle).
    pub(super) bits: Option<Arc<DirtyBitmap>>,
}

impl Tracked {
    /// Whether writes are recorded in it.
    pub(super) fn records(&self) -> bool {
        self.entry.auto() && !self.entry.in_use()
    }

    /// Whether the bits in memory are not those on disk.
    fn is_changed(&self) -> bool {
        self.bits.as_ref().is_some_and(|bits| bits.changed() || self.entry.table_offset == 0)
    }
}

/// What [`Recorder`]'s lock protects.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) bitmaps: Vec<Tracked>,
    /// The entries of the directory on disk, in its order (their flags may lack our own [`IN_USE`]).
    stored: Vec<Bitmap>,
    /// The directory on disk is not what it should be when the image is closed.
    pub(super) edited: bool,
    /// On disk the bitmaps that record are marked as being in use, and their bits are in memory.
    pub(super) marked: bool,
    /// The disk may get this size in bytes at any moment. Until that is settled all bitmaps are as long as the longer
    /// of both disks, and on disk there is none that is not marked as being in use.
    pub(super) resizing: Option<u64>,
}

/// The bitmaps of an open image.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    /// Some bitmap records, or did when the directory was last stored. Spares everybody else the lock.
    active: AtomicBool,
    state: RwLock<State>,
}

impl Recorder {
    /// The bitmaps of an image that has just been opened.
    pub(crate) fn new(bitmaps: &[Bitmap]) -> Self {
        let tracked = bitmaps.iter().map(|entry| Tracked { entry: entry.clone(), bits: None }).collect();
        let state = State { bitmaps: tracked, stored: bitmaps.to_vec(), ..State::default() };
        Self { active: AtomicBool::new(state.concerns_writers()), state: RwLock::new(state) }
    }

    /// Keeps the list of bitmaps as it is.
    pub(crate) fn hold(&self) -> impl Sized {
        self.state.read()
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read()
    }
}

impl State {
    /// Whether a write makes a difference: a bitmap records it, or one that has been stopped in memory only still
    /// does on disk and must not claim to know it.
    fn concerns_writers(&self) -> bool {
        self.edited || self.bitmaps.iter().any(Tracked::records)
    }

    fn entries(&self) -> Vec<Bitmap> {
        self.bitmaps.iter().map(|bitmap| bitmap.entry.clone()).collect()
    }
}

impl Qcow2 {
    /// The bitmaps that can be used must be readable before anything is written.
    pub(crate) fn check_bitmap_tables(&self) -> Result<()> {
        let bitmaps = self.bitmaps.read();
        let mut usable = bitmaps.iter().filter(|bitmap| !bitmap.in_use());
        usable.try_for_each(|bitmap| read_table(&*self.storage, &self.geometry, bitmap).map(drop))
    }

    /// What a program that does not know bitmaps has left of them goes when the image is opened for writing: its
    /// extension must not come to life again with the autoclear bit of a new bitmap.
    pub(crate) fn drop_stale_bitmaps(&self) -> Result<()> {
        if !self.header.lock().stale_bitmaps {
            return Ok(());
        }
        self.change_header(|header| {
            header.stale_bitmaps = false;
            Ok(())
        })
    }

    /// Notes in the bitmaps that record that a range of the disk is about to change. To be called before the range is
    /// touched, without locks.
    ///
    /// # Errors
    /// The bitmaps could not be read or marked as being in use: nothing may be written then.
    #[inline]
    pub(crate) fn record(&self, offset: u64, len: u64) -> Result<()> {
        if len == 0 || !self.recorder.active.load(Ordering::Acquire) {
            Ok(())
        } else {
            self.record_in(offset, len)
        }
    }

    fn record_in(&self, offset: u64, len: u64) -> Result<()> {
        loop {
            let state = self.recorder.state.read();
            if state.marked || !state.concerns_writers() {
                let recording = state.bitmaps.iter().filter(|bitmap| bitmap.records());
                recording.filter_map(|bitmap| bitmap.bits.as_ref()).for_each(|bits| bits.set(offset, len));
                return Ok(());
            }
            drop(state);
            let mut state = self.recorder.state.write();
            if !state.marked {
                self.mark_in_use(&mut state, Tracked::records)?;
                self.publish(&state);
            }
        }
    }

    /// Loads the bits of the bitmaps that `which` chooses and says on disk that they are in use.
    pub(super) fn mark_in_use(&self, state: &mut State, which: fn(&Tracked) -> bool) -> Result<()> {
        let which = if state.resizing.is_some() { |_: &Tracked| true } else { which };
        for bitmap in state.bitmaps.iter_mut().filter(|bitmap| which(bitmap)) {
            self.load_bits(bitmap)?;
        }
        let _flushing = self.flush_lock.lock();
        if state.edited {
            self.store_directory(state, which)?;
        } else {
            // Some of the marks may be there even if this fails: then the directory is written anew.
            self.mark_in_place(state, which).inspect_err(|_| state.edited = true)?;
        }
        state.marked = true;
        Ok(())
    }

    /// Gets the bits of a bitmap into memory.
    pub(super) fn load_bits(&self, bitmap: &mut Tracked) -> Result<()> {
        if bitmap.bits.is_none() {
            let bits = load(&*self.storage, &self.geometry, &bitmap.entry, self.size_now());
            let remedy = "Remove the bitmap to go on without it.";
            bitmap.bits = Some(Arc::new(bits.hint(|| remedy.to_owned())?));
        }
        Ok(())
    }

    pub(super) fn size_now(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Sets the flag of each entry where it is: one field, so that a crash leaves the old or the new one. The bitmaps
    /// in memory are those on disk.
    fn mark_in_place(&self, state: &State, which: fn(&Tracked) -> bool) -> Result<()> {
        let extension = self.header.lock().bitmaps;
        let Some(mut at) = extension.map(|extension| extension.directory_offset) else { return Ok(()) };
        for bitmap in &state.bitmaps {
            if which(bitmap) {
                let flags = bitmap.entry.flags | IN_USE;
                self.storage.write_at(&flags.to_be_bytes(), at + FLAGS_AT)?;
            }
            at += bitmap.entry.entry_bytes();
        }
        self.storage.sync()
    }

    /// Changes the list of bitmaps in memory; it is stored when the image is closed.
    ///
    /// # Errors
    /// What `change` says; read-only.
    pub(super) fn change_bitmaps<T>(&self, change: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        if !self.writable {
            return Err(block::Error::read_only());
        }
        let mut state = self.recorder.state.write();
        let was_marked = state.marked;
        let result = change(&mut state);
        // A bitmap that has begun to record must be marked before the next write.
        state.marked &= state.bitmaps.iter().all(|bitmap| !bitmap.records() || bitmap.bits.is_some());
        state.edited |= was_marked && !state.marked;
        self.publish(&state);
        result
    }

    /// Lets everybody else know what the bitmaps are.
    fn publish(&self, state: &State) {
        self.recorder.active.store(state.concerns_writers(), Ordering::Release);
        *self.bitmaps.write() = state.entries();
    }

    /// Stores what has changed, and says that nothing is in use any more. Beside a resize that is the resize's last step.
    ///
    /// # Errors
    /// No space, or the host failed: the disk has the state before, and the next call tries again.
    pub(crate) fn store_bitmaps(&self) -> Result<()> {
        let mut state = self.recorder.state.write();
        if state.resizing.is_some() || !state.edited && !state.marked {
            return Ok(());
        }
        let _flushing = self.flush_lock.lock();
        self.store_directory(&mut state, |_| false)?;
        (state.edited, state.marked) = (false, false);
        self.publish(&state);
        Ok(())
    }

    /// Writes all bits that have changed and a directory in which the bitmaps that `in_use` chooses are marked, and
    /// lets the header name it. The flush lock is held.
    fn store_directory(&self, state: &mut State, in_use: fn(&Tracked) -> bool) -> Result<()> {
        let old = self.header.lock().bitmaps;
        let mut placed = Placed::default();
        let stored = self.place_bitmaps(state, in_use, &mut placed);
        if let Err(error) = stored {
            // What nothing names is given back; should that fail as well it is a leak.
            let _ = self.give_back(&placed.runs);
            return Err(error);
        }
        for (index, entry) in &placed.entries {
            let bitmap = &mut state.bitmaps[*index];
            (bitmap.entry.table_offset, bitmap.entry.table_size) = *entry;
            if let Some(bits) = &bitmap.bits {
                bits.settle();
            }
        }
        let gone = self.clusters_of_old(state, old);
        state.stored = state.entries();
        state.edited = false;
        // The new state is on disk. What cannot be given back now will be with the next flush, which has to succeed.
        let _ = self.give_back(&gone);
        Ok(())
    }

    fn place_bitmaps(&self, state: &State, in_use: fn(&Tracked) -> bool, placed: &mut Placed) -> Result<()> {
        let mut entries = state.entries();
        for (index, bitmap) in state.bitmaps.iter().enumerate().filter(|(_, bitmap)| bitmap.is_changed()) {
            let Some(bits) = &bitmap.bits else { continue };
            let table = self.place_bits(bits, &mut placed.runs)?;
            (entries[index].table_offset, entries[index].table_size) = table;
            placed.entries.push((index, table));
        }
        for (entry, bitmap) in entries.iter_mut().zip(&state.bitmaps) {
            entry.flags |= if in_use(bitmap) { IN_USE } else { 0 };
        }
        let extension = match entries.is_empty() {
            true => None,
            false => Some(self.place_directory(&entries, &mut placed.runs)?),
        };
        self.change_header_locked(|header| {
            header.bitmaps = extension;
            header.stale_bitmaps = false;
            match extension {
                Some(_) => header.autoclear |= autoclear::BITMAPS,
                None => header.autoclear &= !autoclear::BITMAPS,
            }
            Ok(())
        })
    }

    fn place_directory(&self, entries: &[Bitmap], runs: &mut Vec<Run>) -> Result<BitmapsExtension> {
        let bytes = encode_directory(entries);
        let run = self.place_table(&bytes)?;
        runs.push(run);
        Ok(BitmapsExtension {
            count: low_u32(entries.len() as u64),
            directory_size: bytes.len() as u64,
            directory_offset: run.offset,
        })
    }

    /// Writes bits and the table that leads to them; both are durable when this returns. Gives the table's place and
    /// number of entries.
    fn place_bits(&self, bits: &DirtyBitmap, runs: &mut Vec<Run>) -> Result<(u64, u32)> {
        let per_cluster = bits_per_cluster(&self.geometry);
        let entries = table_entries(&self.geometry, bits.len(), bits.granularity_bits()).max(1);
        let mut table = Vec::with_capacity(to_usize(entries));
        while (table.len() as u64) < entries {
            let index = table.len() as u64;
            match bits.uniform(index * per_cluster, per_cluster) {
                Uniform::Clear => table.push(Bits::Clear),
                Uniform::Set => table.push(Bits::Set),
                Uniform::Mixed => {
                    let most = (PIECE >> self.geometry.cluster_bits).max(1).min(entries - index);
                    let mixed = |i: &u64| bits.uniform(i * per_cluster, per_cluster) == Uniform::Mixed;
                    let wanted = (index..index + most).take_while(mixed).count() as u64;
                    let run = self.place_data(bits, index, wanted, runs)?;
                    table
                        .extend((0..run.clusters).map(|i| Bits::At(run.offset + self.geometry.offset_of(i))));
                }
            }
        }
        let mut bytes = Writer::new();
        table.iter().for_each(|entry| {
            bytes.be_u64(entry.encode());
        });
        let run = self.place_table(&bytes.into_bytes())?;
        runs.push(run);
        Ok((run.offset, low_u32(entries)))
    }

    /// Writes the bits of up to `wanted` table entries from `index` on into clusters that follow each other.
    fn place_data(&self, bits: &DirtyBitmap, index: u64, wanted: u64, runs: &mut Vec<Run>) -> Result<Run> {
        let map = self.map()?;
        self.settle_header()?;
        let run = {
            let mut meta = self.meta.lock();
            self.mark_dirty(&mut meta)?;
            meta.may_grow_table = true;
            let run = meta.allocate(&*self.storage, map, wanted);
            meta.may_grow_table = false;
            run?
        };
        map.claim(self.geometry.cluster_of(run.offset), run.clusters);
        runs.push(run);
        let mut bytes = vec![0; to_usize(self.geometry.offset_of(run.clusters))];
        bits.export(index * bits_per_cluster(&self.geometry), &mut bytes);
        self.storage.write_at(&bytes, run.offset)?;
        self.grown_to(run.offset + bytes.len() as u64);
        Ok(run)
    }

    /// The clusters that the directory before named and the present one does not: the directory itself, and tables
    /// and data of bitmaps that have been stored anew or are gone. A table that cannot be read leaves leaks.
    fn clusters_of_old(&self, state: &State, old: Option<BitmapsExtension>) -> Vec<Run> {
        let run = |offset, len| Run { offset, clusters: self.geometry.clusters_for(len), fresh: false };
        let mut gone: Vec<Run> =
            old.iter().map(|old| run(old.directory_offset, old.directory_size)).collect();
        let kept: HashSet<u64> = state.bitmaps.iter().map(|bitmap| bitmap.entry.table_offset).collect();
        for entry in state.stored.iter().filter(|entry| !kept.contains(&entry.table_offset)) {
            let Ok(data) = read_table(&*self.storage, &self.geometry, entry) else { continue };
            gone.push(run(entry.table_offset, entry.table_bytes()));
            gone.extend(data.iter().filter_map(|bits| match bits {
                Bits::At(offset) => Some(run(*offset, self.geometry.cluster_size())),
                _ => None,
            }));
        }
        gone
    }

    /// Gives clusters back that nothing on disk names. The flush lock is held.
    fn give_back(&self, runs: &[Run]) -> Result<()> {
        {
            let mut meta = self.meta.lock();
            for run in runs {
                meta.free_later(run.offset, self.geometry.offset_of(run.clusters));
            }
        }
        self.drop_table(0, 0)
    }
}

/// What has been written of a new state before the header names it.
#[derive(Debug, Default)]
struct Placed {
    runs: Vec<Run>,
    /// The new tables, as (index of the bitmap, (offset, entries)).
    entries: Vec<(usize, (u64, u32))>,
}
