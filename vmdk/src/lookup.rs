//! Finding grains: a directory of tables of entries, the shape that all sparse extents share.
//!
//! What differs between them - how wide an entry is, what its values mean - is an [`Entries`]. Only the pages of
//! tables that are asked for are read.

use std::fmt::Debug;
use std::sync::Arc;

use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use crate::pages::{PAGE, Page, Pages};

/// Where a grain is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Grain {
    /// Not here: the parent answers.
    Absent,
    /// Nowhere: it reads as zeros.
    Zero,
    /// At this byte of the file.
    At(u64),
}

/// What the entries of a kind of sparse extent mean. Offsets are bytes of the file.
pub(crate) trait Entries: Debug + Send + Sync {
    /// The table that a directory entry points to, if there is one.
    ///
    /// # Errors
    /// It cannot point there.
    fn table(&self, entry: u64) -> Result<Option<u64>>;

    /// The grain that a table entry points to.
    ///
    /// # Errors
    /// It cannot point there.
    fn grain(&self, entry: u64) -> Result<Grain>;

    /// The entry of a grain, where it is not (only) in the file.
    fn held(&self, grain: u64) -> Option<u64> {
        let _ = grain;
        None
    }

    /// The directory's entry with this index, where it is not (only) in the file.
    fn held_directory(&self, index: u64) -> Option<u64> {
        let _ = index;
        None
    }
}

/// Measures of the tables, all of them checked: no product of them overflows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Byte of the file where the directory begins.
    pub(crate) directory: u64,
    /// Entries of the directory.
    pub(crate) tables: u64,
    /// Bytes of an entry: 4 or 8.
    pub(crate) width: u64,
    /// Entries of a table.
    pub(crate) per_table: u64,
    /// Bytes of a grain.
    pub(crate) grain: u64,
}

impl Shape {
    /// Bytes of the disk that a table covers.
    pub(crate) fn coverage(&self) -> u64 {
        self.grain * self.per_table
    }
}

/// The tables of an extent.
#[derive(Debug)]
pub(crate) struct Lookup<E> {
    storage: Arc<dyn Storage>,
    pages: Pages,
    shape: Shape,
    entries: E,
}

/// A run of the disk that is stored in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Where its first byte is (not the first byte of its grain).
    pub(crate) grain: Grain,
    /// Its length in bytes.
    pub(crate) len: u64,
}

/// The page that was looked at last: neighbours are usually on the same one.
type Memo = Option<(u64, Page)>;

impl<E: Entries> Lookup<E> {
    pub(crate) fn new(storage: Arc<dyn Storage>, shape: Shape, entries: E) -> Self {
        Self { pages: Pages::new(Arc::clone(&storage)), storage, shape, entries }
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// The grain that byte `offset` of the disk lies in.
    ///
    /// # Errors
    /// A table is damaged or cannot be read.
    pub(crate) fn grain(&self, offset: u64) -> Result<Grain> {
        Ok(self.piece(offset, &mut (None, None))?.grain)
    }

    /// What is stored at byte `offset` of the disk, as far as the same goes for what follows, at most `max_len`
    /// bytes. Grains that have a place are joined if they follow each other in the file, or if their places do
    /// not matter (`places`).
    ///
    /// # Errors
    /// A table is damaged or cannot be read.
    pub(crate) fn run(&self, offset: u64, max_len: u64, places: bool) -> Result<Run> {
        let mut memo = (None, None);
        let grain_start = |at: u64| at - at % self.shape.grain;
        let first = self.piece(offset, &mut memo)?;
        let mut len = first.len;
        while len < max_len {
            let Ok(next) = self.piece(offset + len, &mut memo) else { break };
            let continues = match (first.grain, next.grain) {
                (Grain::At(first), Grain::At(next)) => {
                    !places || next.checked_sub(first) == Some(offset + len - grain_start(offset))
                }
                (first, next) => first == next,
            };
            if !continues {
                break;
            }
            len += next.len;
        }
        let grain = match first.grain {
            Grain::At(place) if places => Grain::At(place + offset % self.shape.grain),
            other => other,
        };
        Ok(Run { grain, len: len.min(max_len) })
    }

    /// Behind byte `offset`, where something is wrong: the next table if it is the directory, else the next grain.
    pub(crate) fn skip_bad(&self, offset: u64) -> u64 {
        let Shape { directory, tables, grain, .. } = self.shape;
        let coverage = self.shape.coverage();
        let entry = match self.entries.held_directory(offset / coverage) {
            Some(entry) => Ok(entry),
            None => self.entry(directory, offset / coverage, tables, &mut None),
        };
        let table_is_there = entry.and_then(|entry| self.entries.table(entry)).is_ok_and(|table| {
            table.is_some_and(|table| {
                self.entry(table, offset / grain % self.shape.per_table, self.shape.per_table, &mut None)
                    .is_ok()
            })
        });
        let unit = if table_is_there { grain } else { coverage };
        (offset / unit + 1) * unit
    }

    /// The grain (its start) or missing table that `offset` lies in, and the bytes that are left of it.
    fn piece(&self, offset: u64, memo: &mut (Memo, Memo)) -> Result<Run> {
        let Shape { directory, tables, per_table, grain, .. } = self.shape;
        let coverage = self.shape.coverage();
        let left = grain - offset % grain;
        if let Some(entry) = self.entries.held(offset / grain) {
            return Ok(Run { grain: self.entries.grain(entry)?, len: left });
        }
        let entry = match self.entries.held_directory(offset / coverage) {
            Some(entry) => entry,
            None => self.entry(directory, offset / coverage, tables, &mut memo.0)?,
        };
        let Some(table) = self.entries.table(entry)? else {
            return Ok(Run { grain: Grain::Absent, len: coverage - offset % coverage });
        };
        let entry = self.entry(table, offset / grain % per_table, per_table, &mut memo.1)?;
        Ok(Run { grain: self.entries.grain(entry)?, len: left })
    }

    /// Entry `index` of the table at `table`, which has `count` entries.
    fn entry(&self, table: u64, index: u64, count: u64, memo: &mut Memo) -> Result<u64> {
        let width = self.shape.width;
        let in_page = PAGE / width;
        let (page_index, within) = (index / in_page, index % in_page);
        let place = table.saturating_add(page_index * PAGE);
        let page = match memo {
            Some((at, page)) if *at == place => page,
            memo => {
                let page = self.page(place, page_index * in_page, count)?;
                &mut memo.insert((place, page)).1
            }
        };
        Ok(decode(page, within, width))
    }

    /// Fills `buf` from byte `offset` of the disk, whose grains lie in the file as they are. `absent` fills what is
    /// not stored here, given where on the disk it belongs.
    ///
    /// # Errors
    /// A table is damaged, a grain lies beyond the end of the file, or the host failed.
    pub(crate) fn read(
        &self,
        mut buf: &mut [u8],
        mut offset: u64,
        absent: &dyn Fn(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        while !buf.is_empty() {
            let run = self.run(offset, buf.len() as u64, true)?;
            let (part, rest) = buf.split_at_mut(to_usize(run.len));
            match run.grain {
                Grain::Absent => absent(part, offset)?,
                Grain::Zero => part.fill(0),
                Grain::At(place) => self.read_file(part, place)?,
            }
            (buf, offset) = (rest, offset + run.len);
        }
        Ok(())
    }

    /// Reads bytes that have to be in the file.
    fn read_file(&self, buf: &mut [u8], place: u64) -> Result<()> {
        let end = self.storage.len()?;
        if place.checked_add(buf.len() as u64).is_none_or(|last| last > end) {
            let message = format!("a grain at {place:#x} lies beyond the end of the file ({end:#x})");
            return Err(Error::new(ErrorKind::Truncated, message));
        }
        self.storage.read_at(buf, place)
    }

    /// The page at `place`, which begins with entry `first` of `count`.
    fn page(&self, place: u64, first: u64, count: u64) -> Result<Page> {
        let entries = (count - first).min(PAGE / self.shape.width);
        self.pages.get(place, entries * self.shape.width)
    }
}

/// The entry with this index of a page; 0 past its end.
fn decode(page: &[u8], index: u64, width: u64) -> u64 {
    let at = to_usize(index * width);
    let bytes = page.get(at..at + to_usize(width)).unwrap_or_default();
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
