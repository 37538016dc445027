//! Tables of an extent that is only read, in pages: loaded when they are asked for, a bounded number of them.
//!
//! A page is a piece of one table, known by where it lies in the file. Whoever has got one reads it without any
//! lock. Together the pages in memory are never more than [`CAPACITY`], however large the disk is.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};
use parking_lot::Mutex;

/// Bytes of the largest page.
pub(crate) const PAGE: u64 = 4096;
/// Shards, so that readers seldom wait for each other.
const SHARDS: usize = 16;
/// Pages of a shard.
const PAGES_PER_SHARD: usize = 256;
/// Bytes of all pages together.
#[cfg(test)]
const CAPACITY: u64 = PAGE * (SHARDS * PAGES_PER_SHARD) as u64;

/// A piece of a table.
pub(crate) type Page = Arc<[u8]>;

/// The cache.
#[derive(Debug)]
pub(crate) struct Pages {
    storage: Arc<dyn Storage>,
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<u64, (Page, bool)>,
    /// Their places in the order of the clock hand.
    ring: VecDeque<u64>,
}

impl Pages {
    /// Of tables in this file.
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, shards: std::array::from_fn(|_| Mutex::default()) }
    }

    /// The `len` bytes (at most [`PAGE`]) at byte `offset` of the file. Always asked for with the same length for
    /// the same offset.
    ///
    /// # Errors
    /// The file ends before, or the host failed.
    pub(crate) fn get(&self, offset: u64, len: u64) -> Result<Page> {
        let shard = &self.shards[to_usize(offset / 512 % SHARDS as u64)];
        if let Some((page, used)) =
            shard.lock().pages.get_mut(&offset).filter(|(page, _)| page.len() as u64 == len)
        {
            *used = true;
            return Ok(Arc::clone(page));
        }
        let page = self.load(offset, len)?;
        shard.lock().insert(offset, &page);
        Ok(page)
    }

    fn load(&self, offset: u64, len: u64) -> Result<Page> {
        let end = self.storage.len()?;
        if offset.checked_add(len).is_none_or(|last| last > end) {
            let message = format!("a grain table at {offset:#x} lies beyond the end of the file ({end:#x})");
            return Err(Error::new(ErrorKind::Truncated, message));
        }
        let mut bytes = vec![0; to_usize(len.min(PAGE))];
        self.storage.read_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }

    /// How many pages there are.
    #[cfg(test)]
    fn held(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().pages.len()).sum()
    }
}

impl Shard {
    fn insert(&mut self, offset: u64, page: &Page) {
        self.evict();
        if self.pages.insert(offset, (Arc::clone(page), false)).is_none() {
            self.ring.push_back(offset);
        }
    }

    /// Makes room for one more: a second chance to what was used, none to the rest.
    fn evict(&mut self) {
        while self.pages.len() >= PAGES_PER_SHARD {
            let Some(offset) = self.ring.pop_front() else { return };
            match self.pages.get_mut(&offset) {
                Some((_, used)) if *used => {
                    *used = false;
                    self.ring.push_back(offset);
                }
                _ => {
                    self.pages.remove(&offset);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use block::mem::MemStorage;

    use super::*;

    #[test]
    fn memory_stays_bounded_and_contents_right() {
        let bytes: Vec<u8> = (0..40u32 << 20).map(|i| (i / 512).to_le_bytes()[0]).collect();
        let pages = Pages::new(Arc::new(MemStorage::from_bytes(bytes)));
        for offset in (0..40 << 20).step_by(4096).chain([0, 512 * 7]) {
            let page = pages.get(offset, 512).unwrap();
            assert_eq!(u64::from(page[511]), offset / 512 % 256);
        }
        assert!(pages.held() as u64 * PAGE <= CAPACITY);
    }

    #[test]
    fn a_table_beyond_the_end_is_an_error() {
        let pages = Pages::new(Arc::new(MemStorage::from_bytes(vec![0; 1000])));
        for offset in [489, u64::MAX - 3] {
            assert_eq!(pages.get(offset, 512).unwrap_err().kind(), ErrorKind::Truncated);
        }
        pages.get(488, 512).unwrap();
    }
}
