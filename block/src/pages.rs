//! Tables of an image in memory, page by page: bounded, and written back when the caller says so.
//!
//! Formats look up where guest data lies in tables that may be larger than memory should be. [`Pages`] reads the
//! pages that are asked for and forgets those that have not been used for a while. A page that has been changed
//! stays until it has been written: [`Pages::take_changed`] copies all of them at one moment, the caller makes
//! durable what they refer to, and only then writes the [`Batch`]. So nothing on disk ever refers to data that is
//! not there, while other threads go on changing tables; what they change meanwhile is the next batch's.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::num::to_usize;
use crate::storage::Storage;

/// Parts of the cache with a lock each.
const SHARDS: u64 = 32;

/// A page in memory.
#[derive(Debug)]
struct Page {
    bytes: Box<[u8]>,
    /// Looked at since the clock hand passed.
    used: bool,
    /// Changed since it was last copied into a batch.
    changed: bool,
    /// In a batch: the file may still hold the old contents.
    writing: bool,
}

#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<u64, Page>,
    /// Numbers of pages in the order of the clock hand.
    ring: VecDeque<u64>,
}

impl Shard {
    /// Makes room for one more: second chance to what was used, none to the rest, no eviction of what is not
    /// written.
    fn evict(&mut self, capacity: usize) {
        let mut tries = 2 * self.ring.len();
        while self.pages.len() >= capacity && tries > 0 {
            tries -= 1;
            let Some(number) = self.ring.pop_front() else { return };
            match self.pages.get_mut(&number) {
                None => {}
                Some(page) if page.used || page.changed || page.writing => {
                    page.used = false;
                    self.ring.push_back(number);
                }
                Some(_) => {
                    self.pages.remove(&number);
                }
            }
        }
    }
}

/// The pages of one region of a container that holds tables.
#[derive(Debug)]
pub struct Pages {
    start: u64,
    end: u64,
    page_bytes: u64,
    /// Pages per shard.
    capacity: usize,
    shards: Vec<Mutex<Shard>>,
    /// Changed pages.
    changed: AtomicU64,
}

impl Pages {
    /// The region from `start` to `end` (host offsets in bytes), in pages of `page_bytes` counted from `start`, of
    /// which about `cache_bytes` are kept.
    pub fn new(start: u64, end: u64, page_bytes: u64, cache_bytes: u64) -> Self {
        let capacity = to_usize(cache_bytes / page_bytes).div_ceil(to_usize(SHARDS)).max(2);
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { start, end, page_bytes, capacity, shards, changed: AtomicU64::new(0) }
    }

    /// One past the last byte of the region.
    pub fn end(&self) -> u64 {
        self.end
    }

    fn shard(&self, number: u64) -> &Mutex<Shard> {
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        &self.shards[to_usize(hash % SHARDS)]
    }

    /// The page in which `offset` lies, and where in it. `len` bytes must not leave the page or the region.
    fn locate(&self, offset: u64, len: usize) -> Result<(u64, usize)> {
        let inside = offset >= self.start
            && offset.checked_add(len as u64).is_some_and(|end| end <= self.end)
            && (offset - self.start) % self.page_bytes + len as u64 <= self.page_bytes;
        if !inside {
            let message = format!("{len} bytes at {offset:#x} lie outside the table");
            return Err(Error::new(crate::ErrorKind::OutOfRange, message));
        }
        let from = offset - self.start;
        Ok((from / self.page_bytes, to_usize(from % self.page_bytes)))
    }

    /// Calls `with` on a page, which is read from the storage if need be. The shard stays locked meanwhile: a second
    /// reader must not come to a copy of its own.
    fn with<T>(&self, storage: &dyn Storage, number: u64, with: impl FnOnce(&mut Page) -> T) -> Result<T> {
        let mut shard = self.shard(number).lock();
        if let Some(page) = shard.pages.get_mut(&number) {
            page.used = true;
            return Ok(with(page));
        }
        shard.evict(self.capacity);
        let offset = self.offset_of(number);
        let mut bytes = vec![0; to_usize(self.page_bytes.min(self.end - offset))];
        storage.read_at(&mut bytes, offset)?;
        let mut page = Page { bytes: bytes.into_boxed_slice(), used: false, changed: false, writing: false };
        let result = with(&mut page);
        shard.pages.insert(number, page);
        shard.ring.push_back(number);
        Ok(result)
    }

    fn offset_of(&self, number: u64) -> u64 {
        self.start + number * self.page_bytes
    }

    /// Copies bytes out of one page.
    ///
    /// # Errors
    /// `OutOfRange` if the bytes leave the page or the region; the host failed.
    pub fn read(&self, storage: &dyn Storage, buf: &mut [u8], offset: u64) -> Result<()> {
        let (number, within) = self.locate(offset, buf.len())?;
        self.with(storage, number, |page| buf.copy_from_slice(&page.bytes[within..within + buf.len()]))
    }

    /// Four bytes as they are in the file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn word(&self, storage: &dyn Storage, offset: u64) -> Result<[u8; 4]> {
        let mut word = [0; 4];
        self.read(storage, &mut word, offset)?;
        Ok(word)
    }

    /// Changes `len` bytes of one page in memory.
    ///
    /// # Errors
    /// As [`read`](Self::read); nothing has changed then.
    pub fn change(
        &self,
        storage: &dyn Storage,
        offset: u64,
        len: usize,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let (number, within) = self.locate(offset, len)?;
        self.with(storage, number, |page| {
            change(&mut page.bytes[within..within + len]);
            if !std::mem::replace(&mut page.changed, true) {
                self.changed.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    /// Forgets the page at `offset`, changes included: the place is used anew.
    pub fn forget(&self, offset: u64) {
        if let Ok((number, _)) = self.locate(offset, 0) {
            let gone = self.shard(number).lock().pages.remove(&number);
            if gone.is_some_and(|page| page.changed) {
                self.changed.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Bytes of pages that wait to be written.
    pub fn changed_bytes(&self) -> u64 {
        self.changed.load(Ordering::Relaxed) * self.page_bytes
    }

    /// Copies every changed page. Until the batch is [`done`](Batch::done) (or dropped, which makes its pages changed
    /// ones again) they stay in memory. One batch at a time.
    pub fn take_changed(&self) -> Batch<'_> {
        let mut copies = vec![];
        for shard in &self.shards {
            for (&number, page) in shard.lock().pages.iter_mut().filter(|(_, page)| page.changed) {
                page.changed = false;
                page.writing = true;
                copies.push((number, page.bytes.to_vec()));
            }
        }
        self.changed.fetch_sub(copies.len() as u64, Ordering::Relaxed);
        copies.sort_unstable_by_key(|(number, _)| *number);
        Batch { pages: self, copies, done: false }
    }

    fn settle(&self, number: u64, written: bool) {
        if let Some(page) = self.shard(number).lock().pages.get_mut(&number) {
            page.writing = false;
            if !written && !std::mem::replace(&mut page.changed, true) {
                self.changed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Copies of changed pages, on their way to the file.
#[derive(Debug)]
#[must_use]
pub struct Batch<'a> {
    pages: &'a Pages,
    /// Number and contents, ascending.
    copies: Vec<(u64, Vec<u8>)>,
    done: bool,
}

impl Batch<'_> {
    /// Whether nothing had changed.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// Writes the copies to their places, neighbours in one request.
    ///
    /// # Errors
    /// The host failed; any of them may have been written.
    pub fn write(&self, storage: &dyn Storage) -> Result<()> {
        const MOST: usize = 1 << 20;
        let mut copies = self.copies.iter().peekable();
        while let Some((number, bytes)) = copies.next() {
            let (offset, mut next) = (self.pages.offset_of(*number), number + 1);
            let mut run = bytes.clone();
            while let Some((_, more)) = copies.next_if(|(n, _)| *n == next && run.len() < MOST) {
                run.extend_from_slice(more);
                next += 1;
            }
            storage.write_at(&run, offset)?;
        }
        Ok(())
    }

    /// They are durable.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        for (number, _) in &self.copies {
            self.pages.settle(*number, self.done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::MemStorage;

    fn pages(storage: &MemStorage, cache: u64) -> Pages {
        Pages::new(512, storage.len().unwrap(), 1024, cache)
    }

    #[test]
    fn changes_stay_in_memory_until_they_are_written() {
        let storage = MemStorage::from_bytes(vec![7; 512 + 100 * 1024 + 8]);
        let pages = pages(&storage, 0);
        for number in 0..100 {
            let at = 512 + number * 1024;
            pages.change(&storage, at + 4, 4, |word| word.fill(u8::try_from(number).unwrap())).unwrap();
        }
        assert_eq!(storage.to_bytes(), vec![7; 512 + 100 * 1024 + 8]);
        assert_eq!(pages.changed_bytes(), 100 * 1024);
        assert_eq!(pages.word(&storage, 512 + 40 * 1024 + 4).unwrap(), [40; 4]);
        let batch = pages.take_changed();
        batch.write(&storage).unwrap();
        batch.done();
        assert_eq!(pages.changed_bytes(), 0);
        let bytes = storage.to_bytes();
        assert_eq!((bytes.len(), bytes[512 + 99 * 1024 + 5]), (512 + 100 * 1024 + 8, 99));
    }

    #[test]
    fn a_batch_that_is_dropped_is_to_be_written_again() {
        let storage = MemStorage::from_bytes(vec![0; 4096]);
        let pages = pages(&storage, 0);
        pages.change(&storage, 600, 1, |byte| byte[0] = 1).unwrap();
        drop(pages.take_changed());
        assert_eq!(pages.changed_bytes(), 1024);
        let batch = pages.take_changed();
        pages.change(&storage, 601, 1, |byte| byte[0] = 2).unwrap();
        batch.write(&storage).unwrap();
        batch.done();
        assert_eq!((storage.to_bytes()[600], storage.to_bytes()[601]), (1, 0));
        assert!(!pages.take_changed().is_empty(), "what changed meanwhile is the next batch's");
    }

    #[test]
    fn memory_is_bounded() {
        let storage = MemStorage::from_bytes(vec![0; 1 << 20]);
        let pages = pages(&storage, 64 << 10);
        for offset in (512..(1 << 20) - 4).step_by(1024) {
            pages.word(&storage, offset).unwrap();
        }
        assert_eq!(pages.changed_bytes(), 0);
        let held: usize = pages.shards.iter().map(|shard| shard.lock().pages.len()).sum();
        assert!(held <= 64 + 32, "{held} pages");
    }

    #[test]
    fn nothing_outside_the_region_or_across_pages_is_touched() {
        let storage = MemStorage::from_bytes(vec![0; 2000]);
        let pages = pages(&storage, 0);
        for (offset, len) in [(0, 4), (510, 4), (1534, 4), (1998, 4), (u64::MAX, 4)] {
            assert!(pages.read(&storage, &mut vec![0; len], offset).is_err(), "{offset}");
        }
        pages.read(&storage, &mut [0; 4], 1996).unwrap();
    }
}
