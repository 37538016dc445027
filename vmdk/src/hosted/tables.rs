//! From a grain of the disk to its place in the file, through the grain directory and a grain table.
//!
//! Every entry is validated before it is followed. Where it cannot be right, the redundant copy is asked; where that
//! cannot be right either, the read fails: bytes that are not the disk's are never shown as if they were.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Error, ErrorKind, Result, Storage};

use super::pages::{Found, Pages};
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copy {
    Main,
    Redundant,
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

    /// Where the table for directory entry `index` begins in bytes: the redundant one if the first cannot be.
    /// `None`: there is none, its grains are absent.
    fn table(&self, index: u64) -> Result<Option<u64>> {
        if let Some(table) = self.table_of(Copy::Main, index)? {
            return Ok(Some(table));
        }
        if let Some(table) = self.table_of(Copy::Redundant, index)? {
            return Ok(Some(table));
        }
        let (main, redundant) = (self.gde(Copy::Main, index)?, self.gde(Copy::Redundant, index)?);
        if main.or(redundant) == Some(0) && redundant.unwrap_or(0) == 0 {
            return Ok(None);
        }
        let at = u64::from(main.or(redundant).unwrap_or(0)) * SECTOR;
        let what = format!("grain table {index} at {at:#x}");
        Err(truncated(&*self.storage, &what, self.file_len.load(Ordering::Relaxed)))
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

    /// Whether sectors belong to what the header names.
    fn is_metadata(&self, sector: u64, len: u64) -> bool {
        let header = &self.header;
        let directory = header.gd_sectors();
        let ranges = [
            (0, header.overhead.max(1)),
            (header.descriptor_offset, header.descriptor_len),
            (header.gd_offset, directory),
            (header.rgd_offset, if header.has(flags::REDUNDANT) { directory } else { 0 }),
        ];
        ranges.iter().any(|(start, room)| *start < sector + len && start.saturating_add(*room) > sector)
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
        let (index, within) = self.indices(grain);
        match self.table(index)? {
            Some(table) => self.decode(grain, self.pages.entry(table + within * 4)?),
            None => Ok(Mapped::Absent),
        }
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
        let Some(table) = self.table(index)? else {
            return Ok(Run { mapped: Mapped::Absent, len: to_len(per_table - entry) });
        };
        let at = table + entry * 4;
        let in_page = (super::pages::PAGE - at % super::pages::PAGE) / 4;
        let most = in_page.min(per_table - entry).min(self.grain_of(offset + max - 1).0 - first + 1);
        let page = match self.pages.find(at)? {
            Found::Page(page) => page,
            Found::Hole => return Ok(Run { mapped: Mapped::Absent, len: to_len(most) }),
        };
        let mapped = self.decode(first, page.entry(at))?;
        let at_start = match mapped {
            Mapped::Data(place) => Mapped::Data(place + within),
            other => other,
        };
        let mut grains = 1;
        while grains < most {
            let Ok(next) = self.decode(first + grains, page.entry(at + grains * 4)) else {
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
