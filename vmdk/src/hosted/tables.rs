//! From a grain of the disk to its place in the file, through the grain directory and a grain table.
//!
//! Every entry is validated before it is followed. Where it cannot be right, the redundant copy is asked; where that
//! cannot be right either, the read fails: bytes that are not the disk's are never shown as if they were. An entry that
//! was lost (it is 0) looks like one that never was: tables are compared with their copies when they are first looked at.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use super::pages::{Found, Page, Pages};
use crate::SECTOR;
use crate::extent::truncated;
use crate::header::{Header, flags};

/// The entry of a grain that is nothing but zeros.
pub(super) const ZERO_GRAIN: u32 = 1;

/// What a grain table says of a grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapped {
    /// Not stored here.
    Absent,
    /// Zeros.
    Zero,
    /// Bytes at this offset of the file.
    Data(u64),
}

impl Mapped {
    /// Whether `next`, `distance` bytes further on, is the same run.
    fn continues(self, next: Self, distance: u64) -> bool {
        match (self, next) {
            (Self::Data(a), Self::Data(b)) => a + distance == b,
            _ => self == next,
        }
    }
}

/// Bytes of the disk that are mapped in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) mapped: Mapped,
    pub(super) len: u64,
}

/// Which of the two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Copy {
    Main,
    Redundant,
}

/// What two copies of an entry say together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// This is right.
    Take(u32),
    /// Both can be right, and they say different things; this is what the first says.
    Either(u32),
    /// Neither can be right, for this reason.
    Neither(&'static str),
}

/// The directories and tables of an extent.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) header: Header,
    pub(super) pages: Pages,
    /// Where the grain directories begin, in bytes, if they lie inside the file.
    main: Option<u64>,
    redundant: Option<u64>,
    /// When last looked at.
    file_len: AtomicU64,
}

impl Tables {
    /// Looks for the directories; does not read them.
    ///
    /// # Errors
    /// The file ends before its first grain, or before both directories; or the host failed.
    pub(super) fn open(storage: Arc<dyn Storage>, header: Header) -> Result<Self> {
        let file_len = storage.len()?;
        let overhead = header.overhead.saturating_mul(SECTOR);
        if overhead > file_len {
            let text = format!("File truncated, expecting at least {overhead} bytes");
            return Err(Error::new(ErrorKind::Truncated, text));
        }
        let tables = Self::new(storage, header, file_len);
        if header.capacity > 0 && tables.main.is_none() && tables.redundant.is_none() {
            let at = header.gd_offset.saturating_mul(SECTOR);
            let what = format!("the grain directory at {at:#x}");
            return Err(truncated(&*tables.storage, &what, file_len));
        }
        Ok(tables)
    }

    /// The same, whatever the file looks like.
    pub(super) fn new(storage: Arc<dyn Storage>, header: Header, file_len: u64) -> Self {
        let place = |sector: u64| {
            let at = sector.checked_mul(SECTOR).filter(|at| *at > 0)?;
            let end = at.checked_add(header.gd_entries() * 4)?;
            (end <= file_len).then_some(at)
        };
        let redundant = place(header.rgd_offset).filter(|_| header.has(flags::REDUNDANT));
        Self {
            pages: Pages::new(Arc::clone(&storage)),
            main: place(header.gd_offset),
            redundant,
            header,
            storage,
            file_len: AtomicU64::new(file_len),
        }
    }

    /// Where the entries of a directory begin, if it is there.
    pub(super) fn directory(&self, copy: Copy) -> Option<u64> {
        match copy {
            Copy::Main => self.main,
            Copy::Redundant => self.redundant,
        }
    }

    /// Whether `end` lies inside the file, looking again if it has grown.
    pub(super) fn inside(&self, end: u64) -> Result<bool> {
        if end <= self.file_len.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let now = self.storage.len()?;
        self.file_len.store(now, Ordering::Relaxed);
        Ok(end <= now)
    }

    /// The number of a grain, and the part of it, that a byte of the extent lies in.
    pub(super) fn grain_of(&self, offset: u64) -> (u64, u64) {
        let grain = self.header.grain_bytes();
        (offset / grain, offset % grain)
    }

    /// The index in the directory, and the index in the table, of a grain.
    fn indices(&self, grain: u64) -> (u64, u64) {
        let per_table = u64::from(self.header.gtes_per_gt);
        (grain / per_table, grain % per_table)
    }

    /// The entry of a directory.
    pub(super) fn gde(&self, copy: Copy, index: u64) -> Result<Option<u32>> {
        let Some(directory) = self.directory(copy) else { return Ok(None) };
        self.pages.entry(directory + index * 4).map(Some)
    }

    /// Whether a grain table can lie at a sector: inside the file, behind the header.
    pub(super) fn is_table(&self, sector: u32) -> Result<bool> {
        let end = (u64::from(sector) + self.header.gt_sectors()) * SECTOR;
        Ok(sector != 0 && self.inside(end)?)
    }

    /// Where a table of one copy begins in bytes, if its entry names one that can be.
    pub(super) fn table_of(&self, copy: Copy, index: u64) -> Result<Option<u64>> {
        match self.gde(copy, index)? {
            Some(sector) if self.is_table(sector)? => Ok(Some(u64::from(sector) * SECTOR)),
            _ => Ok(None),
        }
    }

    /// Where the table for directory entry `index` begins in bytes, and whose it is: the redundant one if the first
    /// cannot be. `None`: there is none, its grains are absent.
    fn table(&self, index: u64) -> Result<Option<(Copy, u64)>> {
        for copy in [Copy::Main, Copy::Redundant] {
            if let Some(table) = self.table_of(copy, index)? {
                return Ok(Some((copy, table)));
            }
        }
        let (main, redundant) = (self.gde(Copy::Main, index)?, self.gde(Copy::Redundant, index)?);
        if main.or(redundant) == Some(0) && redundant.unwrap_or(0) == 0 {
            return Ok(None);
        }
        let at = u64::from(main.or(redundant).unwrap_or(0)) * SECTOR;
        let what = format!("grain table {index} at {at:#x}");
        Err(truncated(&*self.storage, &what, self.file_len.load(Ordering::Relaxed)))
    }

    /// The entries of the table that begins at `at`, past the page cache; `None` where the file has a hole.
    pub(super) fn read_table(&self, at: u64) -> Result<Option<Vec<u32>>> {
        let len = u64::from(self.header.gtes_per_gt) * 4;
        let is_hole = |at| Ok::<_, Error>(matches!(self.pages.find(at)?, Found::Hole));
        if is_hole(at)? && is_hole(at + len - 4)? {
            return Ok(None);
        }
        let mut bytes = vec![0; to_usize(len)];
        self.storage.read_at(&mut bytes, at)?;
        Ok(Some(bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()))
    }

    /// Where the entry for a grain lies in the file, in one copy of the tables.
    pub(super) fn entry_place(&self, copy: Copy, grain: u64) -> Result<Option<u64>> {
        let (index, within) = self.indices(grain);
        Ok(self.table_of(copy, index)?.map(|table| table + within * 4))
    }

    /// What is wrong with a grain's place, if anything is.
    pub(super) fn fault(&self, grain: u64, sector: u32) -> Result<Option<&'static str>> {
        let sector = u64::from(sector);
        let size = self.header.grain;
        let len = size.min(self.header.capacity.saturating_sub(grain.saturating_mul(size)));
        if self.is_metadata(sector, len) {
            return Ok(Some("lies in the metadata"));
        }
        if sector % size != 0 && sector.wrapping_sub(self.header.overhead) % size != 0 {
            return Ok(Some("is not aligned"));
        }
        let inside = self.inside((sector + len) * SECTOR)?;
        Ok((!inside).then_some("lies past the end of the file"))
    }

    /// What is wrong with an entry, if it cannot be right.
    pub(super) fn entry_fault(&self, grain: u64, entry: u32) -> Result<Option<&'static str>> {
        match entry {
            0 => Ok(None),
            ZERO_GRAIN if self.header.has(flags::ZERO_GRAINS) => Ok(None),
            _ => self.fault(grain, entry),
        }
    }

    /// Which of the two entries for a grain is right: the one that can be, and if both can, the one that knows of a grain.
    pub(super) fn choose(&self, grain: u64, entry: u32, other: Option<u32>) -> Result<Choice> {
        let fault = self.entry_fault(grain, entry)?;
        let Some(other) = other.filter(|other| *other != entry) else {
            return Ok(fault.map_or(Choice::Take(entry), Choice::Neither));
        };
        let other_fault = self.entry_fault(grain, other)?;
        Ok(match (fault, other_fault) {
            (None, None) if entry == 0 => Choice::Take(other),
            (None, None) if other != 0 => Choice::Either(entry),
            (None, _) => Choice::Take(entry),
            (Some(_), None) => Choice::Take(other),
            (Some(fault), Some(_)) => Choice::Neither(fault),
        })
    }

    /// Compares what a page holds of the first table `index` (which begins at `table`) for `count` entries from `at` on
    /// with the copy, unless that has been done.
    fn compare(&self, page: &Page, index: u64, table: u64, at: u64, count: u64) -> Result<()> {
        page.compare_once(at, count * 4, |sector| match self.table_of(Copy::Redundant, index)? {
            Some(copy) if copy != table => self.compare_sector(page, index, sector, sector - table + copy),
            _ => Ok(vec![]),
        })
    }

    /// Compares the entries in a sector of a table with those of the copy. Those that the copy alone knows are
    /// taken from there; returns the places of those that contradict each other.
    ///
    /// A file that was not closed can differ in entries that were on their way. Each of them is right by itself. A copy
    /// that the host cannot read has nothing to say.
    fn compare_sector(&self, page: &Page, index: u64, sector: u64, copy: u64) -> Result<Vec<u64>> {
        let Ok(Found::Page(copy_page)) = self.pages.find(copy) else { return Ok(vec![]) };
        let mut disputed = vec![];
        for (grain, at) in self.entries_of(index, sector)? {
            let (entry, other) = (page.entry(at), copy_page.entry(at - sector + copy));
            if entry == other {
                continue;
            }
            match self.choose(grain, entry, Some(other))? {
                Choice::Take(right) if entry == 0 => page.mend(at, right),
                Choice::Either(_) if !self.header.unclean => disputed.push(at),
                _ => {}
            }
        }
        Ok(disputed)
    }

    /// The grains of the disk whose entries lie in a sector of the first table `index`, and where.
    fn entries_of(&self, index: u64, sector: u64) -> Result<impl Iterator<Item = (u64, u64)>> {
        let table = self.table_of(Copy::Main, index)?.unwrap_or(sector);
        let per_table = u64::from(self.header.gtes_per_gt);
        let first = (sector - table) / 4;
        let end = (first + SECTOR / 4).min(per_table);
        let grains = self.header.capacity.div_ceil(self.header.grain);
        let numbered = (first..end).map(move |within| (index * per_table + within, table + within * 4));
        Ok(numbered.take_while(move |(grain, _)| *grain < grains))
    }

    /// The page with `count` entries for grains from `grain` on, the first of them at `at`. A hole is none only if the
    /// copy has nothing there, either.
    fn find_compared(&self, (copy, table): (Copy, u64), grain: u64, count: u64) -> Result<Found> {
        let (index, within) = self.indices(grain);
        let at = table + within * 4;
        let found = self.pages.find(at)?;
        if copy == Copy::Redundant {
            return Ok(found);
        }
        let page = match found {
            Found::Page(page) => page,
            Found::Hole if self.copy_is_hole(grain, count)? => return Ok(Found::Hole),
            Found::Hole => self.pages.hold(at)?,
        };
        self.compare(&page, index, table, at, count)?;
        Ok(Found::Page(page))
    }

    /// Whether the copy of a table has a hole where the entries of grains are, or there is no copy.
    fn copy_is_hole(&self, grain: u64, count: u64) -> Result<bool> {
        let Some(at) = self.entry_place(Copy::Redundant, grain)? else { return Ok(true) };
        let is_hole = |at| Ok::<_, Error>(matches!(self.pages.find(at)?, Found::Hole));
        Ok(is_hole(at)? && is_hole(at + (count - 1) * 4)?)
    }

    /// The page with the entry for a grain at `at` in one copy, in memory, to be changed. It has been compared with
    /// the other copy before: afterwards they differ for as long as it takes to change both.
    pub(super) fn hold(&self, copy: Copy, grain: u64, at: u64) -> Result<Arc<Page>> {
        let page = self.pages.hold(at)?;
        if copy == Copy::Main {
            let (index, within) = self.indices(grain);
            self.compare(&page, index, at - within * 4, at, 1)?;
        }
        Ok(page)
    }

    /// Whether sectors belong to the metadata: all that lies in front of the first grain, and what the header names.
    fn is_metadata(&self, sector: u64, len: u64) -> bool {
        let within = |(start, room): (u64, u64)| start < sector + len && start.saturating_add(room) > sector;
        sector < self.header.overhead || self.named_by_header().into_iter().any(within)
    }

    /// The header, and what it names: first sectors, and how many.
    pub(super) fn named_by_header(&self) -> [(u64, u64); 4] {
        let header = &self.header;
        let directory = header.gd_sectors();
        [
            (0, 1),
            (header.descriptor_offset, header.descriptor_len),
            (header.gd_offset, directory),
            (header.rgd_offset, if header.has(flags::REDUNDANT) { directory } else { 0 }),
        ]
    }

    /// What the entry for a grain at `at` of a page means.
    fn decode_at(&self, page: &Page, grain: u64, at: u64) -> Result<Mapped> {
        if page.is_disputed(at) {
            return Err(self.contradiction(grain, at));
        }
        self.decode(grain, page.entry(at))
    }

    fn contradiction(&self, grain: u64, at: u64) -> Error {
        let name = self.storage.name();
        let text = format!(
            "the two copies of the grain table of '{name}' contradict each other for grain {grain} (entry at {at:#x})"
        );
        Error::new(ErrorKind::Corrupt, text)
            .hint("Run 'vimg check -r all' to go by the first copy, on a copy of the file if in doubt.")
    }

    /// What a grain table entry means.
    fn decode(&self, grain: u64, entry: u32) -> Result<Mapped> {
        match entry {
            0 => return Ok(Mapped::Absent),
            ZERO_GRAIN if self.header.has(flags::ZERO_GRAINS) => return Ok(Mapped::Zero),
            _ => {}
        }
        let Some(fault) = self.fault(grain, entry)? else {
            return Ok(Mapped::Data(u64::from(entry) * SECTOR));
        };
        // The copy may know better.
        if let Some(place) = self.entry_place(Copy::Redundant, grain)? {
            let other = self.pages.entry(place)?;
            if other != 0 && self.fault(grain, other)?.is_none() {
                return Ok(Mapped::Data(u64::from(other) * SECTOR));
            }
        }
        let at = u64::from(entry) * SECTOR;
        let text = format!("grain {grain} at {at:#x} of '{}' {fault}", self.storage.name());
        Err(Error::new(ErrorKind::Corrupt, text))
    }

    /// What is said of one grain.
    pub(super) fn mapped(&self, grain: u64) -> Result<Mapped> {
        self.lookup_piece(grain * self.header.grain_bytes(), 1).map(|run| run.mapped)
    }

    /// How the bytes from `offset` on are mapped, for at most `max` bytes.
    pub(super) fn lookup(&self, offset: u64, max: u64) -> Result<Run> {
        let mut run = self.lookup_piece(offset, max)?;
        while run.len < max {
            let next = self.lookup_piece(offset + run.len, max - run.len)?;
            if !run.mapped.continues(next.mapped, run.len) {
                break;
            }
            run.len += next.len;
        }
        Ok(Run { len: run.len.min(max), ..run })
    }

    /// The same, ending at the latest with the table, or with the page of it.
    fn lookup_piece(&self, offset: u64, max: u64) -> Result<Run> {
        let (first, within) = self.grain_of(offset);
        let (index, entry) = self.indices(first);
        let per_table = u64::from(self.header.gtes_per_gt);
        let to_len = |grains: u64| grains * self.header.grain_bytes() - within;
        let Some((copy, table)) = self.table(index)? else {
            return Ok(Run { mapped: Mapped::Absent, len: to_len(per_table - entry) });
        };
        let at = table + entry * 4;
        let in_page = (super::pages::PAGE - at % super::pages::PAGE) / 4;
        let most = in_page.min(per_table - entry).min(self.grain_of(offset + max - 1).0 - first + 1);
        let page = match self.find_compared((copy, table), first, most)? {
            Found::Page(page) => page,
            Found::Hole => return Ok(Run { mapped: Mapped::Absent, len: to_len(most) }),
        };
        let mapped = self.decode_at(&page, first, at)?;
        let at_start = match mapped {
            Mapped::Data(place) => Mapped::Data(place + within),
            other => other,
        };
        let mut grains = 1;
        while grains < most {
            let Ok(next) = self.decode_at(&page, first + grains, at + grains * 4) else {
                break; // To be reported when it is its turn.
            };
            if !mapped.continues(next, grains * self.header.grain_bytes()) {
                break;
            }
            grains += 1;
        }
        Ok(Run { mapped: at_start, len: to_len(grains) })
    }
}
