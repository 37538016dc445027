//! The bounded cache of L2 tables, in slices.
//!
//! A slice is a piece of an L2 table (a table can be 2 MiB; one lookup must not cost that much). Readers
//! take a slice from one of several shards and read its words without further locking. A slice that has
//! been changed stays in memory until [`flush`](crate::flush) has written it: it is *pinned*, and eviction
//! passes it over.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::num::to_usize;
use block::{Result, Storage};
use parking_lot::Mutex;

use crate::l2::RawEntry;

/// Bytes of a slice, unless the cluster is smaller.
const SLICE_BYTES: u64 = 16 << 10;
/// Shards of the cache.
const SHARDS: usize = 32;

/// A piece of an L2 table in memory.
#[derive(Debug)]
pub(crate) struct Slice {
    /// Host offset of its first entry.
    pub(crate) offset: u64,
    words: Box<[AtomicU64]>,
    /// Changed since it was last handed to a flush.
    dirty: AtomicBool,
    /// Being written by a flush: the file may still hold the old contents.
    writing: AtomicBool,
}

impl Slice {
    fn load(storage: &dyn Storage, offset: u64, bytes: u64) -> Result<Self> {
        let mut buf = vec![0; to_usize(bytes)];
        storage.read_at(&mut buf, offset)?;
        let words =
            buf.as_chunks::<8>().0.iter().map(|chunk| AtomicU64::new(u64::from_be_bytes(*chunk))).collect();
        Ok(Self { offset, words, dirty: AtomicBool::new(false), writing: AtomicBool::new(false) })
    }

    /// The entry with this index in the slice.
    pub(crate) fn entry(&self, index: u64, extended: bool) -> RawEntry {
        let word = |i: usize| self.words[i].load(Ordering::Relaxed);
        let index = to_usize(index);
        if extended {
            RawEntry { word: word(2 * index), bitmap: word(2 * index + 1) }
        } else {
            RawEntry { word: word(index), bitmap: 0 }
        }
    }

    /// Replaces an entry. The caller holds the cluster exclusively, the image's metadata lock, and the
    /// slice pinned.
    pub(crate) fn set_entry(&self, index: u64, extended: bool, entry: RawEntry) {
        let index = to_usize(index);
        if extended {
            self.words[2 * index].store(entry.word, Ordering::Relaxed);
            self.words[2 * index + 1].store(entry.bitmap, Ordering::Relaxed);
        } else {
            self.words[index].store(entry.word, Ordering::Relaxed);
        }
    }

    /// Whether eviction must leave it.
    fn pinned(&self) -> bool {
        self.dirty.load(Ordering::Acquire) || self.writing.load(Ordering::Acquire)
    }

    /// Takes the contents for writing: it is not dirty any more, but pinned until
    /// [`written`](Self::written).
    pub(crate) fn begin_write(&self) -> Vec<u8> {
        self.writing.store(true, Ordering::Release);
        self.dirty.store(false, Ordering::Release);
        self.words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_be_bytes()).collect()
    }

    /// The contents taken by [`begin_write`](Self::begin_write) are in the file.
    pub(crate) fn written(&self) {
        self.writing.store(false, Ordering::Release);
    }

    /// They are not: it is dirty again.
    pub(crate) fn not_written(&self) {
        self.dirty.store(true, Ordering::Release);
        self.writing.store(false, Ordering::Release);
    }
}

#[derive(Debug, Default)]
struct Shard {
    slices: HashMap<u64, (Arc<Slice>, bool)>,
    /// Offsets in the order of the clock hand.
    ring: VecDeque<u64>,
}

impl Shard {
    /// Makes room for one more: second chance to what was used, none to the rest.
    fn evict(&mut self, capacity: usize) {
        let mut tries = 2 * self.ring.len();
        while self.slices.len() >= capacity && tries > 0 {
            tries -= 1;
            let Some(offset) = self.ring.pop_front() else { return };
            match self.slices.get_mut(&offset) {
                None => {}
                Some((slice, used)) if *used || slice.pinned() => {
                    *used = false;
                    self.ring.push_back(offset);
                }
                Some(_) => {
                    self.slices.remove(&offset);
                }
            }
        }
    }
}

/// The cache.
#[derive(Debug)]
pub(crate) struct SliceCache {
    shards: Vec<Mutex<Shard>>,
    /// Slices per shard.
    capacity: usize,
    slice_bytes: u64,
}

impl SliceCache {
    /// A cache of at most about `bytes` (pinned slices aside) for an image of this cluster size.
    pub(crate) fn new(bytes: u64, cluster_size: u64) -> Self {
        let slice_bytes = SLICE_BYTES.min(cluster_size);
        let capacity = to_usize(bytes / slice_bytes).div_ceil(SHARDS).max(2);
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), capacity, slice_bytes }
    }

    /// Bytes of a slice.
    pub(crate) fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// How many slices may be dirty before a flush is due.
    pub(crate) fn max_dirty(&self) -> usize {
        (self.capacity * SHARDS / 2).max(1)
    }

    fn shard(&self, offset: u64) -> &Mutex<Shard> {
        let hash = (offset / self.slice_bytes).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.shards[to_usize(hash % SHARDS as u64)]
    }

    /// The slice at a host offset, read from the storage if need be. The shard stays locked meanwhile: a
    /// second reader must not come to a copy of its own.
    pub(crate) fn get(&self, storage: &dyn Storage, offset: u64) -> Result<Arc<Slice>> {
        self.get_and(storage, offset, |_| {})
    }

    /// The same, pinned, and whether it was clean before.
    pub(crate) fn get_dirty(&self, storage: &dyn Storage, offset: u64) -> Result<(Arc<Slice>, bool)> {
        let mut was_clean = false;
        let slice =
            self.get_and(storage, offset, |slice| was_clean = !slice.dirty.swap(true, Ordering::AcqRel))?;
        Ok((slice, was_clean))
    }

    fn get_and(&self, storage: &dyn Storage, offset: u64, with: impl FnOnce(&Slice)) -> Result<Arc<Slice>> {
        let mut shard = self.shard(offset).lock();
        if let Some((slice, used)) = shard.slices.get_mut(&offset) {
            *used = true;
            with(slice);
            return Ok(Arc::clone(slice));
        }
        shard.evict(self.capacity);
        let slice = Arc::new(Slice::load(storage, offset, self.slice_bytes)?);
        with(&slice);
        shard.slices.insert(offset, (Arc::clone(&slice), false));
        shard.ring.push_back(offset);
        Ok(slice)
    }

    /// Forgets the slices of a table whose cluster is given back or replaced, changed ones included.
    pub(crate) fn forget_table(&self, table: u64, cluster_size: u64) {
        let mut offset = table;
        while offset < table + cluster_size {
            self.shard(offset).lock().slices.remove(&offset);
            offset += self.slice_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;

    #[test]
    fn pinned_slices_survive_any_pressure() {
        let storage = MemStorage::from_bytes(vec![0; 1 << 20]);
        let cache = SliceCache::new(0, 512);
        let (slice, clean) = cache.get_dirty(&storage, 512).unwrap();
        assert!(clean);
        slice.set_entry(3, false, RawEntry { word: 77, bitmap: 0 });
        for offset in (0..1 << 20).step_by(512) {
            cache.get(&storage, offset).unwrap();
        }
        assert_eq!(cache.get(&storage, 512).unwrap().entry(3, false).word, 77);
        let total: usize = cache.shards.iter().map(|s| s.lock().slices.len()).sum();
        assert!(total <= SHARDS * 3, "{total} slices");
    }

    #[test]
    fn a_written_slice_may_go_and_comes_back_from_the_file() {
        let storage = MemStorage::from_bytes(vec![0; 1 << 16]);
        let cache = SliceCache::new(0, 512);
        let (slice, _) = cache.get_dirty(&storage, 1024).unwrap();
        slice.set_entry(0, true, RawEntry { word: 1, bitmap: 2 });
        storage.write_at(&slice.begin_write(), 1024).unwrap();
        slice.written();
        for _ in 0..3 {
            for offset in (0..1 << 16).step_by(512) {
                cache.get(&storage, offset).unwrap();
            }
        }
        assert_eq!(cache.get(&storage, 1024).unwrap().entry(0, true), RawEntry { word: 1, bitmap: 2 });
    }
}
