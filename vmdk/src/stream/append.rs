//! Writing a stream: grains are appended as they come, in the order of the disk, each table behind the grains
//! that it is for; the directory, the footer and the end-of-stream marker are put behind them.
//!
//! ```text
//!  header            directory "at the end"            the place where all is written next: it only moves on,
//!  descriptor, padding to the overhead                 so that a pipe will do
//!  grain marker + data .. (up to 512 grains)
//!  table marker, table
//!  grain marker + data .. table marker, table ..
//!  directory marker, directory
//!  footer marker, footer (the header again, with the place of the directory)
//!  end-of-stream marker
//! ```
//!
//! What lies behind the last grain - the *tail* - is written by a flush, the footer not before the tables are on the
//! disk, and cut off before the next grain takes its place. Between the two the file has no footer: an interrupted
//! writer leaves something that nobody takes for complete.

use std::sync::Arc;

use block::codec::Writer;
use block::num::{low_u32, to_usize};
use block::{Error, ErrorKind, Result, Storage};
use parking_lot::Mutex;

use super::marker::{GRAIN_MARKER, Marker, SECTOR};
use crate::header::{GD_AT_END, Header};

/// Entries of a grain table.
const TABLE_ENTRIES: u64 = 512;
/// Sectors of a grain table.
const TABLE_SECTORS: u64 = TABLE_ENTRIES * 4 / SECTOR;
/// The largest directory that is held in memory: 4 Mi tables, 128 TiB in grains of 64 KiB.
const MAX_DIRECTORY: u64 = 4 << 20;

/// The end of a stream, where grains are appended.
#[derive(Debug)]
pub(crate) struct Appender {
    storage: Arc<dyn Storage>,
    header: Header,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The sector that is written next.
    next: u64,
    /// Grains below this one cannot be appended any more.
    next_grain: u64,
    /// The sector of each table that has been written.
    directory: Vec<u32>,
    /// The table of the grains that were appended last.
    open: Option<Open>,
    /// Where the file was complete last, if it has been since it was opened.
    complete: Option<Start>,
    /// There is no tail in the file.
    changed: bool,
    /// Something could not be written: what is in the file is not known any more.
    failed: bool,
}

/// A table that grains are being added to.
#[derive(Debug, Clone)]
struct Open {
    index: u64,
    entries: Vec<u32>,
}

impl Open {
    fn new(index: u64) -> Self {
        Self { index, entries: vec![0; to_usize(TABLE_ENTRIES)] }
    }
}

/// Where an appender goes on.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    /// The sector behind the last grain or table.
    pub(crate) next: u64,
    /// The grain behind the last one that is there.
    pub(crate) next_grain: u64,
    /// The directory so far.
    pub(crate) directory: Vec<u32>,
    /// The entries of the last table, if it has room for more, and its index.
    pub(crate) last: Option<(u64, Vec<u32>)>,
}

impl Start {
    /// An empty extent.
    ///
    /// # Errors
    /// It is too large.
    pub(crate) fn empty(header: &Header) -> Result<Self> {
        check(header)?;
        let directory = vec![0; to_usize(header.gd_entries())];
        Ok(Self { next: header.overhead, next_grain: 0, directory, last: None })
    }
}

/// Refuses what cannot be appended to.
pub(crate) fn check(header: &Header) -> Result<()> {
    if u64::from(header.gtes_per_gt) != TABLE_ENTRIES || header.gd_entries() > MAX_DIRECTORY {
        let message = format!(
            "a stream of {} sectors with tables of {} grains cannot be written",
            header.capacity, header.gtes_per_gt
        );
        return Err(Error::unsupported(message));
    }
    Ok(())
}

/// The header and the descriptor of a new stream, padded to where its first grain lies.
pub(crate) fn head(header: &Header, descriptor: &[u8]) -> Vec<u8> {
    let mut out = Writer::new();
    out.bytes(&header.encode());
    out.bytes(&vec![0; to_usize(header.descriptor_offset.saturating_sub(1) * SECTOR)]);
    out.bytes(descriptor);
    let mut bytes = out.into_bytes();
    bytes.resize(to_usize(header.overhead * SECTOR), 0);
    bytes
}

impl Appender {
    /// Appends to `storage`, whose header is `header`. `resumed`: the file is complete.
    pub(crate) fn new(storage: Arc<dyn Storage>, header: Header, start: Start, resumed: bool) -> Self {
        let complete = resumed.then(|| start.clone());
        let state = State { complete, changed: !resumed, ..State::at(start) };
        Self { storage, header, state: Mutex::new(state) }
    }

    /// The table entry of a grain, where the appender knows it, or that there is none.
    pub(crate) fn entry(&self, grain: u64) -> Option<u32> {
        let state = self.state.lock();
        let table = grain / TABLE_ENTRIES;
        let open = state.open.as_ref().filter(|open| open.index == table)?;
        open.entries.get(to_usize(grain % TABLE_ENTRIES)).copied()
    }

    /// The sector of a table; 0: there is none.
    pub(crate) fn table(&self, index: u64) -> u32 {
        self.state.lock().directory.get(to_usize(index)).copied().unwrap_or(0)
    }

    /// The first grain that may be appended.
    pub(crate) fn next_grain(&self) -> u64 {
        self.state.lock().next_grain
    }

    /// Cuts off the tail, for good, so that nothing of it can be taken for a part of what follows.
    fn cut_tail(&self, state: &mut State) -> Result<()> {
        state.changed = true;
        let cut = self.storage.set_len(state.next * SECTOR).and_then(|()| self.storage.sync());
        state.failed = cut.is_err();
        cut
    }

    /// Appends grains, given as number and compressed bytes, in ascending order.
    ///
    /// # Errors
    /// A grain is not behind all others, the file would be too large, or the host failed.
    pub(crate) fn append<'a>(&self, grains: impl Iterator<Item = (u64, &'a [u8])>) -> Result<()> {
        let mut state = self.state.lock();
        state.check()?;
        let mut grains = grains.peekable();
        match grains.peek() {
            None => return Ok(()),
            Some((first, _)) if *first < state.next_grain => return Err(self.out_of_order(*first)),
            Some(_) if !state.changed => self.cut_tail(&mut state)?,
            Some(_) => {}
        }
        let mut out = Writer::new();
        let start = state.next;
        let grain_sectors = self.header.grain;
        for (grain, packed) in grains {
            if let Err(error) = state.add(&mut out, start, grain, packed, grain_sectors) {
                // What has been added in this call is in the tables and not in the file.
                state.failed |= !out.is_empty();
                return Err(error);
            }
        }
        let bytes = out.into_bytes();
        let written = self.storage.write_at(&bytes, start * SECTOR);
        state.failed = written.is_err();
        written
    }

    fn out_of_order(&self, grain: u64) -> Error {
        let offset = grain * self.header.grain_bytes();
        Error::unsupported(format!(
            "Could not write to allocated cluster for streamOptimized: offset {offset:#x} lies before what has been \
             written"
        ))
    }

    /// Makes what has been appended durable and writes the tail. Grains can be appended after that, unless the storage
    /// is a pipe.
    ///
    /// # Errors
    /// The file would be too large, something could not be written before, or the host failed.
    pub(crate) fn complete(&self) -> Result<()> {
        let mut state = self.state.lock();
        state.check()?;
        if !state.changed {
            return self.storage.sync();
        }
        let (tables, end) = state.tail(&self.header)?;
        let written = self.write_tail(state.next * SECTOR, &tables, &end);
        state.failed = written.is_err();
        state.changed = state.failed;
        if written.is_ok() && state.complete.is_some() {
            state.complete = Some(state.start());
        }
        written
    }

    fn write_tail(&self, offset: u64, tables: &[u8], end: &[u8]) -> Result<()> {
        self.storage.write_at(tables, offset)?;
        // No footer names tables, and no table grains, that are not there.
        self.storage.sync()?;
        self.storage.write_at(end, offset + tables.len() as u64)?;
        self.storage.sync()
    }
}

/// Whoever gives up half-way leaves a file as complete as it was: with what has been appended, or if that could not be
/// written, without it.
impl Drop for Appender {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        let Some(complete) = state.complete.take().filter(|_| state.changed) else { return };
        if state.failed {
            let back = State::at(complete);
            if self.storage.set_len(back.next * SECTOR).is_err() {
                return;
            }
            *state = back;
        }
        // There is an error on its way to the user already.
        let _ = self.complete();
    }
}

impl State {
    /// At a place behind which there is nothing.
    fn at(start: Start) -> Self {
        Self {
            next: start.next,
            next_grain: start.next_grain,
            directory: start.directory,
            open: start.last.map(|(index, entries)| Open { index, entries }),
            complete: None,
            changed: true,
            failed: false,
        }
    }

    /// Where it is.
    fn start(&self) -> Start {
        Start {
            next: self.next,
            next_grain: self.next_grain,
            directory: self.directory.clone(),
            last: self.open.as_ref().map(|open| (open.index, open.entries.clone())),
        }
    }

    fn check(&self) -> Result<()> {
        match self.failed {
            true => Err(Error::new(ErrorKind::Io, "an earlier write to the stream failed")),
            false => Ok(()),
        }
    }

    /// Puts a grain behind what `out`, which will lie at sector `start`, holds.
    fn add(
        &mut self,
        out: &mut Writer,
        start: u64,
        grain: u64,
        packed: &[u8],
        grain_sectors: u64,
    ) -> Result<()> {
        debug_assert!(grain >= self.next_grain);
        let table = grain / TABLE_ENTRIES;
        if self.open.as_ref().is_some_and(|open| open.index != table) {
            self.close_table(out, start)?;
        }
        let place = sector_number(self.next)?;
        let open = self.open.get_or_insert_with(|| Open::new(table));
        if let Some(entry) = open.entries.get_mut(to_usize(grain % TABLE_ENTRIES)) {
            *entry = place;
        }
        let size = u32::try_from(packed.len()).map_err(|_| Error::unsupported("a grain of 4 GiB"))?;
        Marker::Grain { sector: grain * grain_sectors, size }.encode(out);
        out.bytes(packed).pad_to(to_usize(SECTOR));
        self.next += (GRAIN_MARKER as u64 + u64::from(size)).div_ceil(SECTOR);
        self.next_grain = grain + 1;
        debug_assert_eq!(start * SECTOR + out.len() as u64, self.next * SECTOR);
        Ok(())
    }

    /// Writes the open table behind what `out` holds.
    fn close_table(&mut self, out: &mut Writer, start: u64) -> Result<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let place = sector_number(self.next + 1)?;
        if let Some(entry) = self.directory.get_mut(to_usize(open.index)) {
            *entry = place;
        }
        encode_table(out, &open);
        self.next = start + out.len() as u64 / SECTOR;
        Ok(())
    }

    /// What belongs behind the last grain: tables and directory, and what comes after them.
    fn tail(&self, header: &Header) -> Result<(Vec<u8>, Vec<u8>)> {
        let mut out = Writer::new();
        let mut directory = self.directory.clone();
        if let Some(open) = &self.open {
            let place = sector_number(self.next + 1)?;
            if let Some(entry) = directory.get_mut(to_usize(open.index)) {
                *entry = place;
            }
            encode_table(&mut out, open);
        }
        let sectors = header.gd_sectors();
        Marker::GrainDirectory { sectors }.encode(&mut out);
        let gd_offset = self.next + out.len() as u64 / SECTOR;
        for entry in &directory {
            out.le_u32(*entry);
        }
        out.pad_to(to_usize(SECTOR));
        sector_number(gd_offset + sectors)?;
        let mut end = Writer::new();
        Marker::Footer { sectors: 1 }.encode(&mut end);
        end.bytes(&Header { gd_offset, ..*header }.encode());
        Marker::EndOfStream.encode(&mut end);
        Ok((out.into_bytes(), end.into_bytes()))
    }
}

fn encode_table(out: &mut Writer, open: &Open) {
    Marker::GrainTable { sectors: TABLE_SECTORS }.encode(out);
    for entry in &open.entries {
        out.le_u32(*entry);
    }
}

/// A sector as tables name it.
fn sector_number(sector: u64) -> Result<u32> {
    match sector {
        ..=0xffff_fffe => Ok(low_u32(sector)),
        _ => Err(Error::new(ErrorKind::NoSpace, "the extent would be larger than 2 TiB")),
    }
}

/// The header of a new stream, as VMware's products write it: version 3, the directory at the end, no redundant
/// copy, the first grain at sector 128 (or behind the descriptor, where that is longer).
pub(crate) fn new_header(capacity: u64, grain: u64, descriptor_sectors: u64, zero_grains: bool) -> Header {
    use crate::header::{NEWLINES, flags};
    let zeros = if zero_grains { flags::ZERO_GRAINS } else { 0 };
    Header {
        version: 3,
        flags: flags::NEWLINE_TEST | zeros | flags::COMPRESSED | flags::MARKERS,
        capacity,
        grain,
        descriptor_offset: 1,
        descriptor_len: descriptor_sectors,
        gtes_per_gt: low_u32(TABLE_ENTRIES),
        rgd_offset: 0,
        gd_offset: GD_AT_END,
        overhead: (1 + descriptor_sectors).next_multiple_of(128),
        unclean: false,
        newlines: NEWLINES,
        compression: 1,
    }
}
