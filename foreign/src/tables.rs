//! Tables of a file, read when they are needed.
//!
//! Pages of the file are kept in a cache of fixed size. Reading past the end of the file is an error here: a table that
//! is not all there must not be taken for one full of zeros.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};
use parking_lot::Mutex;

/// Bytes that are read at once.
const PAGE: u64 = 32 << 10;
/// Pages that are kept: 4 MiB.
const MOST_PAGES: usize = 128;

/// The metadata of a file.
#[derive(Debug)]
pub(crate) struct Tables {
    storage: Arc<dyn Storage>,
    len: u64,
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    kept: HashMap<u64, Arc<[u8]>>,
    order: VecDeque<u64>,
}

impl Tables {
    /// The tables of `storage`.
    ///
    /// # Errors
    /// The host failed.
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Result<Self> {
        let len = storage.len()?;
        Ok(Self { storage, len, pages: Mutex::default() })
    }

    /// Length of the file in bytes when it was opened.
    pub(crate) fn file_len(&self) -> u64 {
        self.len
    }

    /// The file.
    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Makes sure that `len` bytes at `offset` are in the file; `what` names them.
    pub(crate) fn check_inside(&self, what: &str, offset: u64, len: u64) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Truncated,
                format!(
                    "{what} at {offset:#x} ({len:#x} bytes) lies past the end of the file (length {:#x})",
                    self.len
                ),
            )),
        }
    }

    /// `N` bytes at `offset`.
    ///
    /// # Errors
    /// They are not in the file, or the host failed.
    pub(crate) fn bytes<const N: usize>(&self, offset: u64) -> Result<[u8; N]> {
        self.check_inside("a table entry", offset, N as u64)?;
        let mut found = [0; N];
        let mut done = 0;
        while done < N {
            let at = offset + done as u64;
            let page = self.page(at / PAGE)?;
            let within = to_usize(at % PAGE);
            let part = page.get(within..).unwrap_or_default();
            let len = part.len().min(N - done);
            if len == 0 {
                return Err(Error::new(ErrorKind::Truncated, format!("the file ends at {at:#x}")));
            }
            found[done..done + len].copy_from_slice(&part[..len]);
            done += len;
        }
        Ok(found)
    }

    /// A page, from the cache or the file. Nobody waits for somebody else's reading.
    fn page(&self, index: u64) -> Result<Arc<[u8]>> {
        if let Some(page) = self.pages.lock().kept.get(&index) {
            return Ok(Arc::clone(page));
        }
        let start = index * PAGE;
        let mut bytes = vec![0; to_usize(PAGE.min(self.len.saturating_sub(start)))];
        self.storage.read_at(&mut bytes, start)?;
        let page: Arc<[u8]> = bytes.into();
        self.pages.lock().keep(index, Arc::clone(&page));
        Ok(page)
    }
}

impl Pages {
    fn keep(&mut self, index: u64, page: Arc<[u8]>) {
        if self.kept.insert(index, page).is_none() {
            self.order.push_back(index);
        }
        while self.order.len() > MOST_PAGES {
            if let Some(oldest) = self.order.pop_front() {
                self.kept.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::mem::MemStorage;

    #[test]
    fn entries_are_found_wherever_they_lie_but_not_past_the_end() {
        let bytes: Vec<u8> = (0..200_003u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let tables = Tables::new(Arc::new(MemStorage::from_bytes(bytes.clone()))).unwrap();
        for offset in [0, 1, 32 * 1024 - 3, 65_536, 199_995] {
            assert_eq!(tables.bytes::<8>(offset as u64).unwrap(), bytes[offset..offset + 8], "{offset}");
        }
        for offset in [199_996, 200_003, u64::MAX] {
            assert_eq!(tables.bytes::<8>(offset).unwrap_err().kind(), ErrorKind::Truncated);
        }
    }

    #[test]
    fn the_cache_stays_small() {
        let tables = Tables::new(Arc::new(MemStorage::from_bytes(vec![1; 8 << 20]))).unwrap();
        for offset in (0..8 << 20).step_by(4096) {
            tables.bytes::<4>(offset).unwrap();
        }
        assert!(tables.pages.lock().kept.len() <= MOST_PAGES);
    }
}
