//! The BAT in memory: pages that are read when they are needed, and the sectors of it that have changed.
//!
//! A page holds 8192 entries. Pages without changes can go at any time; a changed sector (4 KiB, what the log
//! changes as one) stays until the [`journal`](crate::journal) has brought it to the disk.

use std::collections::HashMap;
use std::sync::Arc;

use block::num::to_usize;
use block::{Result, Storage};
use parking_lot::RwLock;

use crate::bat::Entry;
use crate::log::{SECTOR, SECTOR_LEN};
use crate::region::Region;

/// Bytes of a page: divides a MiB, and so the BAT.
const PAGE: u64 = 64 << 10;
const ENTRY: u64 = 8;
const ENTRIES_PER_PAGE: u64 = PAGE / ENTRY;
/// The most pages that are kept without need: 32 MiB.
const MAX_PAGES: usize = 512;

/// A part of the BAT. Bit n of the masks stands for its n-th sector.
#[derive(Debug)]
struct Page {
    bytes: Vec<u8>,
    /// Changed since they were last taken.
    dirty: u16,
    /// Taken, on their way to the disk.
    flying: u16,
}

/// The BAT of an image.
#[derive(Debug)]
pub(crate) struct Table {
    storage: Arc<dyn Storage>,
    region: Region,
    pages: RwLock<HashMap<u64, Page>>,
}

/// A sector of the BAT: its place in the file and what it is to hold.
pub(crate) type Sector = (u64, Box<[u8; SECTOR_LEN]>);

impl Table {
    pub(crate) fn new(storage: Arc<dyn Storage>, region: Region) -> Self {
        Self { storage, region, pages: RwLock::default() }
    }

    /// Entry number `index`, which the BAT has been checked to have.
    pub(crate) fn get(&self, index: u64) -> Result<Entry> {
        let (number, at) = place(index);
        if let Some(page) = self.pages.read().get(&number) {
            return Ok(page.entry(at));
        }
        let page = self.load(number)?;
        let entry = page.entry(at);
        let mut pages = self.pages.write();
        make_room(&mut pages);
        // Somebody may have loaded and changed it meanwhile.
        let entry = pages.get(&number).map_or(entry, |page| page.entry(at));
        pages.entry(number).or_insert(page);
        Ok(entry)
    }

    /// How many entries from number `index` on, at most `max`, are as `wanted` wants them. Looks at one page only, so that
    /// there may be more of them behind what it says.
    pub(crate) fn count(&self, index: u64, max: u64, wanted: impl Fn(Entry) -> bool) -> Result<u64> {
        self.get(index)?;
        let (number, at) = place(index);
        let pages = self.pages.read();
        // Let go again by somebody else: nothing is said then.
        let Some(page) = pages.get(&number) else { return Ok(0) };
        let entries =
            page.bytes[at..].as_chunks::<8>().0.iter().map(|bytes| Entry(u64::from_le_bytes(*bytes)));
        Ok(entries.take(to_usize(max)).take_while(|entry| wanted(*entry)).count() as u64)
    }

    /// Changes entry number `index`, in memory.
    pub(crate) fn set(&self, index: u64, entry: Entry) -> Result<()> {
        let (number, at) = place(index);
        loop {
            if let Some(page) = self.pages.write().get_mut(&number) {
                page.set(at, entry);
                return Ok(());
            }
            self.get(index)?;
        }
    }

    fn load(&self, number: u64) -> Result<Page> {
        let mut bytes = vec![0; to_usize(PAGE)];
        self.storage.read_at(&mut bytes, self.region.offset + number * PAGE)?;
        Ok(Page { bytes, dirty: 0, flying: 0 })
    }

    /// Pages with changes.
    pub(crate) fn dirty_pages(&self) -> usize {
        self.pages.read().values().filter(|page| page.dirty != 0).count()
    }

    /// The changed sectors in ascending order. They stay until [`landed`](Self::landed) or
    /// [`returned`](Self::returned) is called; there is one taker at a time.
    pub(crate) fn take(&self) -> Vec<Sector> {
        let mut taken = vec![];
        for (&number, page) in self.pages.write().iter_mut().filter(|(_, page)| page.dirty != 0) {
            let sectors = page.bytes.as_chunks::<SECTOR_LEN>().0.iter().zip(0..);
            for (bytes, nth) in sectors.filter(|(_, nth)| page.dirty >> nth & 1 == 1) {
                taken.push((self.region.offset + number * PAGE + nth * SECTOR, Box::new(*bytes)));
            }
            page.flying |= std::mem::take(&mut page.dirty);
        }
        taken.sort_by_key(|(offset, _)| *offset);
        taken
    }

    /// Everything that was taken has been written.
    pub(crate) fn landed(&self) {
        self.pages.write().values_mut().for_each(|page| page.flying = 0);
    }

    /// What was taken may not have been written: it counts as changed again.
    pub(crate) fn returned(&self) {
        for page in self.pages.write().values_mut() {
            page.dirty |= std::mem::take(&mut page.flying);
        }
    }
}

impl Page {
    fn entry(&self, at: usize) -> Entry {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.bytes[at..at + 8]);
        Entry(u64::from_le_bytes(bytes))
    }

    fn set(&mut self, at: usize, entry: Entry) {
        self.bytes[at..at + 8].copy_from_slice(&entry.0.to_le_bytes());
        self.dirty |= 1 << (at / SECTOR_LEN);
    }
}

/// The page of an entry, and its first byte there.
fn place(index: u64) -> (u64, usize) {
    (index / ENTRIES_PER_PAGE, to_usize(index % ENTRIES_PER_PAGE * ENTRY))
}

/// Lets every other page without changes go if there are too many.
fn make_room(pages: &mut HashMap<u64, Page>) {
    if pages.len() < MAX_PAGES {
        return;
    }
    let mut keep = false;
    pages.retain(|_, page| {
        keep = !keep;
        keep || page.dirty != 0 || page.flying != 0
    });
}

#[cfg(test)]
mod tests {
    use block::mem::MemStorage;

    use super::*;

    const REGION: Region = Region { offset: 2 << 20, length: 64 << 20 };

    fn table() -> Table {
        Table::new(Arc::new(MemStorage::new()), REGION)
    }

    #[test]
    fn changes_are_taken_by_sector_and_stay_until_they_have_landed() {
        let table = table();
        for index in [0, 1, 511, 512, 9000, 1_000_000] {
            assert_eq!(table.get(index).unwrap(), Entry(0));
            table.set(index, Entry(index + 1)).unwrap();
        }
        let offsets = |sectors: &[Sector]| {
            sectors.iter().map(|(at, _)| (at - REGION.offset) / 4096).collect::<Vec<_>>()
        };
        let taken = table.take();
        assert_eq!(offsets(&taken), [0, 1, 17, 1953]);
        assert_eq!(taken[0].1[8..16], 2u64.to_le_bytes());
        assert!(table.take().is_empty() && table.dirty_pages() == 0);
        // Changed while it is on its way: taken again.
        table.set(1, Entry(77)).unwrap();
        assert_eq!(offsets(&table.take()), [0]);
        table.returned();
        assert_eq!(offsets(&table.take()), [0, 1, 17, 1953]);
        table.landed();
        table.returned();
        assert!(table.dirty_pages() == 0);
    }

    #[test]
    fn entries_of_a_kind_are_counted_within_a_page() {
        let table = table();
        table.set(100, Entry(6)).unwrap();
        let count = |index, max| table.count(index, max, |entry| entry.0 == 0).unwrap();
        assert_eq!((count(0, 1000), count(0, 50), count(100, 9), count(101, 10)), (100, 50, 0, 10));
        assert_eq!(count(8000, 1000), 192);
    }

    #[test]
    fn memory_is_bounded_and_changes_are_kept() {
        let table = table();
        table.set(5, Entry(55)).unwrap();
        for page in 0..2000 {
            table.get(page * ENTRIES_PER_PAGE).unwrap();
            assert!(table.pages.read().len() <= MAX_PAGES);
        }
        assert_eq!(table.get(5).unwrap(), Entry(55));
        assert_eq!(table.dirty_pages(), 1);
    }
}
