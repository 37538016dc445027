//! The grain directories and grain tables in memory: a bounded cache of pages of the file.
//!
//! Tables are looked at by the place of an entry in the file, whatever table it belongs to, so that an extent with two
//! million grain tables is opened without reading one of them. A page stays in memory while anybody holds it: a changed
//! one is held until a flush has written it. Only the sectors that hold changes are written, because what else a
//! page shows may be somebody's data.
//!
//! An empty disk of many terabytes has gigabytes of tables, all of them holes of the file: the last hole that was come
//! across in each copy of them is remembered, and what lies in it is not read.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use block::num::to_usize;
use block::{Result, Storage};
use parking_lot::Mutex;

use crate::SECTOR;

/// Bytes of a page; 32 sectors, one bit of a word each.
pub(super) const PAGE: u64 = 16 << 10;
/// Pages of the whole cache: 32 MiB.
const PAGES: usize = 2048;
const SHARDS: usize = 32;
/// Changed pages after which a flush is due.
pub(super) const MAX_DIRTY: usize = PAGES / 2;

/// A page of the file, as entries.
#[derive(Debug)]
pub(super) struct Page {
    /// Where it lies in the file.
    pub(super) offset: u64,
    words: Box<[AtomicU32]>,
    /// Sectors with changes that no flush has taken yet.
    dirty: AtomicU32,
    /// Sectors that have been compared with the other copy of their table.
    compared: AtomicU32,
    /// Places of entries that contradict the other copy. Whoever compares holds this.
    disputed: Mutex<Vec<u64>>,
    has_disputed: AtomicBool,
}

impl Page {
    fn load(storage: &dyn Storage, offset: u64) -> Result<Self> {
        let mut bytes = vec![0; to_usize(PAGE)];
        storage.read_at(&mut bytes, offset)?;
        let words = bytes.as_chunks::<4>().0.iter();
        let words = words.map(|word| AtomicU32::new(u32::from_le_bytes(*word))).collect();
        Ok(Self {
            offset,
            words,
            dirty: AtomicU32::new(0),
            compared: AtomicU32::new(0),
            disputed: Mutex::default(),
            has_disputed: AtomicBool::new(false),
        })
    }

    /// The entry at a place of the file that lies in the page.
    pub(super) fn entry(&self, at: u64) -> u32 {
        self.words[to_usize((at - self.offset) / 4)].load(Ordering::Relaxed)
    }

    /// Changes an entry. The caller holds the extent's metadata lock, and the page until it has been written.
    pub(super) fn set(&self, at: u64, entry: u32) {
        self.words[to_usize((at - self.offset) / 4)].store(entry, Ordering::Relaxed);
        self.dirty.fetch_or(1 << ((at - self.offset) / SECTOR), Ordering::AcqRel);
    }

    /// Calls `compare` with the place of each sector that holds some of the `len` bytes at `at`, once in the life of the
    /// page, and before anybody is let past here. It mends entries by [`mend`](Self::mend), and returns the places of
    /// those that nobody can.
    pub(super) fn compare_once(
        &self,
        at: u64,
        len: u64,
        compare: impl Fn(u64) -> Result<Vec<u64>>,
    ) -> Result<()> {
        let bit = |sector: u64| 1_u32 << ((sector - self.offset) / SECTOR);
        let missing = |sector: &u64| self.compared.load(Ordering::Acquire) & bit(*sector) == 0;
        let mut sectors = (at - at % SECTOR..at + len).step_by(to_usize(SECTOR));
        if !sectors.clone().any(|sector| missing(&sector)) {
            return Ok(());
        }
        let mut disputed = self.disputed.lock();
        sectors.try_for_each(|sector| {
            if missing(&sector) {
                disputed.extend(compare(sector)?);
                self.has_disputed.store(!disputed.is_empty(), Ordering::Release);
                self.compared.fetch_or(bit(sector), Ordering::AcqRel);
            }
            Ok(())
        })
    }

    /// Gives an entry that was lost its value again, in memory: it reaches the file with the next change beside it.
    pub(super) fn mend(&self, at: u64, entry: u32) {
        self.words[to_usize((at - self.offset) / 4)].store(entry, Ordering::Relaxed);
    }

    /// Whether the entry at `at` contradicts the other copy of the table.
    pub(super) fn is_disputed(&self, at: u64) -> bool {
        self.has_disputed.load(Ordering::Acquire) && self.disputed.lock().contains(&at)
    }

    /// Takes the changes for writing, as runs of sectors with their places in the file, and which sectors they are.
    pub(super) fn take_changes(&self) -> (u32, Vec<(u64, Vec<u8>)>) {
        let sectors = self.dirty.swap(0, Ordering::AcqRel);
        let mut runs: Vec<(u64, Vec<u8>)> = vec![];
        for (index, words) in (0_u64..).zip(self.words.chunks(to_usize(SECTOR / 4))) {
            if sectors & (1 << index) == 0 {
                continue;
            }
            let bytes = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes());
            let at = self.offset + index * SECTOR;
            match runs.last_mut() {
                Some((start, run)) if *start + run.len() as u64 == at => run.extend(bytes),
                _ => runs.push((at, bytes.collect())),
            }
        }
        (sectors, runs)
    }

    /// The changes that were taken are not in the file.
    pub(super) fn not_written(&self, sectors: u32) {
        self.dirty.fetch_or(sectors, Ordering::AcqRel);
    }
}

/// What a page holds.
#[derive(Debug)]
pub(super) enum Found {
    /// Entries.
    Page(Arc<Page>),
    /// The file has a hole there: all entries are 0.
    Hole,
}

#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<u64, (Arc<Page>, bool)>,
    ring: VecDeque<u64>,
}

impl Shard {
    /// Makes room for one more: second chance to what was used, none to the rest.
    fn evict(&mut self) {
        let mut tries = 2 * self.ring.len();
        while self.pages.len() >= PAGES / SHARDS && tries > 0 {
            tries -= 1;
            let Some(offset) = self.ring.pop_front() else { return };
            match self.pages.get_mut(&offset) {
                None => {}
                Some((page, used)) if *used || Arc::strong_count(page) > 1 => {
                    *used = false;
                    self.ring.push_back(offset);
                }
                Some(_) => {
                    self.pages.remove(&offset);
                }
            }
        }
    }
}

/// The cache.
#[derive(Debug)]
pub(super) struct Pages {
    storage: Arc<dyn Storage>,
    shards: Vec<Mutex<Shard>>,
    /// The last two: lookups go through both copies of the tables side by side.
    holes: Mutex<[Range<u64>; 2]>,
    /// Counts the times that tables were written: a hole found before may not be one after.
    writes: AtomicU64,
}

impl Pages {
    pub(super) fn new(storage: Arc<dyn Storage>) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { storage, shards, holes: Mutex::new([0..0, 0..0]), writes: AtomicU64::new(0) }
    }

    fn shard(&self, offset: u64) -> &Mutex<Shard> {
        &self.shards[to_usize(offset / PAGE % SHARDS as u64)]
    }

    /// The page with the entry at `at` (a multiple of 4), or that there is nothing.
    pub(super) fn find(&self, at: u64) -> Result<Found> {
        let offset = at - at % PAGE;
        let mut shard = self.shard(offset).lock();
        if let Some((page, used)) = shard.pages.get_mut(&offset) {
            *used = true;
            return Ok(Found::Page(Arc::clone(page)));
        }
        if self.is_hole(offset)? {
            return Ok(Found::Hole);
        }
        self.load(&mut shard, offset).map(Found::Page)
    }

    /// The entry at `at`.
    pub(super) fn entry(&self, at: u64) -> Result<u32> {
        Ok(match self.find(at)? {
            Found::Page(page) => page.entry(at),
            Found::Hole => 0,
        })
    }

    /// The page with the entry at `at`, in memory.
    pub(super) fn hold(&self, at: u64) -> Result<Arc<Page>> {
        let offset = at - at % PAGE;
        let mut shard = self.shard(offset).lock();
        if let Some((page, used)) = shard.pages.get_mut(&offset) {
            *used = true;
            return Ok(Arc::clone(page));
        }
        self.load(&mut shard, offset)
    }

    /// The shard stays locked meanwhile: a second reader must not come to a copy of its own.
    fn load(&self, shard: &mut Shard, offset: u64) -> Result<Arc<Page>> {
        shard.evict();
        let page = Arc::new(Page::load(&*self.storage, offset)?);
        shard.pages.insert(offset, (Arc::clone(&page), false));
        shard.ring.push_back(offset);
        Ok(page)
    }

    fn is_hole(&self, offset: u64) -> Result<bool> {
        let within = |hole: &Range<u64>| hole.start <= offset && offset + PAGE <= hole.end;
        if self.holes.lock().iter().any(within) {
            return Ok(true);
        }
        let writes = self.writes.load(Ordering::Acquire);
        let len = self.storage.len()?;
        if offset.saturating_add(PAGE) > len {
            return Ok(false);
        }
        let found = self.storage.extent(offset, len - offset)?;
        let hole = offset..offset.saturating_add(found.len);
        if found.data || !within(&hole) {
            return Ok(false);
        }
        let mut known = self.holes.lock();
        if self.writes.load(Ordering::Acquire) == writes {
            known.swap(0, 1);
            known[0] = hole;
        }
        Ok(true)
    }

    /// Changes of pages have been written. The caller holds the pages until this returns: whoever finds one gone from
    /// memory must not take it for a hole.
    pub(super) fn written(&self) {
        let mut holes = self.holes.lock();
        self.writes.fetch_add(1, Ordering::AcqRel);
        *holes = [0..0, 0..0];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;

    fn pages(len: u64) -> (Arc<MemStorage>, Pages) {
        let storage = Arc::new(MemStorage::from_bytes(vec![0; to_usize(len)]));
        (Arc::clone(&storage), Pages::new(storage))
    }

    #[test]
    fn changed_pages_survive_any_pressure_and_only_their_sectors_are_written() {
        let (_, pages) = pages(PAGE * 5000);
        let page = pages.hold(PAGE).unwrap();
        for (at, entry) in [(512, 77), (1024, 78), (4096, 79)] {
            page.set(PAGE + at, entry);
        }
        for index in 0..5000 {
            pages.entry(index * PAGE).unwrap();
        }
        assert_eq!(pages.entry(PAGE + 512).unwrap(), 77);
        let (sectors, runs) = page.take_changes();
        assert_eq!(sectors, 0b1_0000_0110);
        let places: Vec<_> = runs.iter().map(|(at, bytes)| (*at, bytes.len())).collect();
        assert_eq!(places, [(PAGE + 512, 1024), (PAGE + 4096, 512)]);
        assert_eq!(runs[0].1[..4], 77_u32.to_le_bytes());
        page.not_written(sectors);
        assert_eq!(page.take_changes().0, sectors);
        let held: usize = pages.shards.iter().map(|shard| shard.lock().pages.len()).sum();
        assert!(held <= PAGES + SHARDS, "{held}");
    }

    #[test]
    fn what_is_written_is_not_taken_for_a_hole_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let options = block::file::FileOptions::creating(block::file::CreateMode::New);
        let file = block::file::HostFile::open(&dir.path().join("x"), &options).unwrap();
        file.set_len(PAGE * 5000).unwrap();
        let pages = Pages::new(Arc::new(file));
        assert!(matches!(pages.find(0).unwrap(), Found::Hole));
        assert!(matches!(pages.find(PAGE * 4000).unwrap(), Found::Hole));
        let page = pages.hold(PAGE * 7).unwrap();
        page.set(PAGE * 7, 5);
        for (at, bytes) in page.take_changes().1 {
            pages.storage.write_at(&bytes, at).unwrap();
        }
        pages.written();
        drop(page);
        for index in 100..5000 {
            pages.hold(index * PAGE).unwrap();
        }
        assert_eq!(pages.entry(PAGE * 7).unwrap(), 5);
    }
}
