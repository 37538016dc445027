//! Stream-optimized extents (specification, "Stream-Optimized Compressed"): compressed grains in the order of the
//! disk, made to be sent and received without seeking.
//!
//! * `marker`: what announces each thing in the file; `codec`: how a grain is compressed.
//! * `read`: grains, found through the tables of a file that can be sought in.
//! * `append`: writing, to a file or a pipe (`target`).
//! * `sequential`: reading from a pipe.
//!
//! There are two kinds. VMware's has the grain directory behind the grains, and a footer that says where; it can be
//! read here in any order and written in the order of the disk. qemu's has directory and tables in front, as a
//! plain sparse extent, and neither tables' markers nor footer nor end; it is only read here.

pub(crate) mod append;
pub(crate) mod codec;
mod extent;
pub(crate) mod marker;
mod read;
mod sequential;
mod target;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use block::num::{len_of, to_usize};
use block::pieces::pieces;
use block::zero::is_zero;
use block::{Compressed, Error, ErrorKind, Result, Storage};

use self::append::{Appender, Start};
use self::marker::{Marker, SECTOR};
use self::read::Grains;
use crate::header::{GD_AT_END, Header, flags};
use crate::lookup::{Entries, Grain, Lookup, Run, Shape};

pub use self::codec::{Level, check_level};
pub(crate) use self::extent::StreamExtent;
pub use self::sequential::Sequential;
pub use self::target::{Target, create};

/// How far from the end of the file the footer is looked for: some programs pad what they send.
const FOOTER_SEARCH: u64 = 64 << 10;

/// What the entries of the tables mean.
#[derive(Debug)]
pub(crate) struct StreamEntries {
    /// The first sector that a table or a grain may lie at.
    first: u64,
    /// An entry of 1 stands for zeros.
    zero_grains: bool,
    appender: Option<Arc<Appender>>,
}

impl StreamEntries {
    fn place(&self, entry: u64, what: &str) -> Result<u64> {
        if entry < self.first {
            let message = format!("{what} at sector {entry} would overlap the metadata of the extent");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        Ok(entry * SECTOR)
    }
}

impl Entries for StreamEntries {
    fn table(&self, entry: u64) -> Result<Option<u64>> {
        if entry == 0 { Ok(None) } else { self.place(entry, "a grain table").map(Some) }
    }

    fn grain(&self, entry: u64) -> Result<Grain> {
        match entry {
            0 => Ok(Grain::Absent),
            1 if self.zero_grains => Ok(Grain::Zero),
            entry => self.place(entry, "a grain").map(Grain::At),
        }
    }

    fn held(&self, grain: u64) -> Option<u64> {
        self.appender.as_ref()?.entry(grain).map(u64::from)
    }

    fn held_directory(&self, index: u64) -> Option<u64> {
        self.appender.as_ref().map(|appender| appender.table(index).into())
    }
}

/// A stream-optimized extent.
#[derive(Debug)]
pub(crate) struct Stream {
    storage: Arc<dyn Storage>,
    header: Header,
    lookup: Lookup<StreamEntries>,
    grains: Grains,
    appender: Option<Arc<Appender>>,
    level: Level,
}

impl Stream {
    /// Opens the extent in `storage`, whose header is `header`. `level` is that of grains that will be written.
    ///
    /// # Errors
    /// There is no footer, or it contradicts the header. One that cannot be appended to is open read-only.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        header: Header,
        writable: bool,
        level: Level,
    ) -> Result<Self> {
        check_level(level)?;
        let in_front = header.gd_offset != GD_AT_END;
        let directory = if in_front { header.gd_offset } else { find_footer(&*storage, &header)?.gd_offset };
        let appender = match writable && !in_front {
            true => resume(&storage, &header, directory)?,
            false => None,
        };
        let appender =
            appender.map(|start| Arc::new(Appender::new(Arc::clone(&storage), header, start, true)));
        Self::with(storage, header, directory, appender, level)
    }

    /// A new extent behind what [`append::head`] has written, on a storage that need not be able to do more than
    /// append.
    ///
    /// # Errors
    /// It is too large.
    pub(crate) fn create(storage: Arc<dyn Storage>, header: Header, level: Level) -> Result<Self> {
        check_level(level)?;
        let appender = Arc::new(Appender::new(Arc::clone(&storage), header, Start::empty(&header)?, false));
        Self::with(storage, header, 0, Some(appender), level)
    }

    fn with(
        storage: Arc<dyn Storage>,
        header: Header,
        directory: u64,
        appender: Option<Arc<Appender>>,
        level: Level,
    ) -> Result<Self> {
        let shape = Shape {
            directory: directory.saturating_mul(SECTOR),
            tables: header.gd_entries(),
            width: 4,
            per_table: header.gtes_per_gt.into(),
            grain: header.grain_bytes(),
        };
        let entries = StreamEntries {
            first: header.descriptor_offset.saturating_add(header.descriptor_len).max(1),
            zero_grains: header.has(flags::ZERO_GRAINS),
            appender: appender.clone(),
        };
        let grains = Grains::new(Arc::clone(&storage), &header)?;
        let lookup = Lookup::new(Arc::clone(&storage), shape, entries);
        Ok(Self { storage, header, lookup, grains, appender, level })
    }

    /// Bytes of a grain.
    pub(crate) fn grain(&self) -> u64 {
        self.header.grain_bytes()
    }

    /// The file that it lies in.
    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Its tables.
    pub(crate) fn lookup(&self) -> &Lookup<StreamEntries> {
        &self.lookup
    }

    /// Whether it can be appended to.
    pub(crate) fn writable(&self) -> bool {
        self.appender.is_some()
    }

    /// How what lies at byte `offset` of the extent is stored, at most `max_len` bytes. Where in the file grains
    /// lie makes no difference.
    ///
    /// # Errors
    /// A table is damaged or cannot be read.
    pub(crate) fn run(&self, offset: u64, max_len: u64) -> Result<Run> {
        self.lookup.run(offset, max_len, false)
    }

    /// Fills `buf` from byte `offset` of the extent; `absent` fills what is not stored here.
    ///
    /// # Errors
    /// A table or a grain is damaged, or the host failed.
    pub(crate) fn read(
        &self,
        buf: &mut [u8],
        offset: u64,
        absent: &dyn Fn(&mut [u8], u64) -> Result<()>,
    ) -> Result<()> {
        self.grains.read(&self.lookup, buf, offset, absent)
    }

    /// Compresses one whole grain.
    ///
    /// # Errors
    /// The codec failed.
    pub(crate) fn compress(&self, data: &[u8]) -> Result<Compressed> {
        codec::compress(data, self.level).map(Compressed::Packed)
    }

    /// Appends compressed grains, the first for byte `offset` of the extent.
    ///
    /// # Errors
    /// They are not behind all others, or could not be written.
    pub(crate) fn append(&self, grains: &[Compressed], offset: u64) -> Result<()> {
        let appender = self.appender.as_ref().ok_or_else(Error::read_only)?;
        if !offset.is_multiple_of(self.grain()) {
            return Err(partial_grain(offset));
        }
        let first = offset / self.grain();
        let packed = grains.iter().zip(first..).filter_map(|(grain, index)| match grain {
            Compressed::Packed(bytes) => Some((index, &bytes[..])),
            Compressed::Incompressible => None,
        });
        appender.append(packed)
    }

    /// Writes whole grains (the last one of the disk may be cut off at its end), each of them for the first time.
    ///
    /// # Errors
    /// Part of a grain, a grain that lies before others that have been written, or the host failed.
    pub(crate) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_whole(offset, len_of(buf))?;
        for piece in pieces(offset, len_of(buf), self.grain()) {
            let data = &buf[piece.range];
            let whole;
            let data = if len_of(data) < self.grain() {
                whole = [data, &vec![0; to_usize(self.grain()) - data.len()]].concat();
                &whole
            } else {
                data
            };
            self.append(&[self.compress(data)?], piece.index * self.grain())?;
        }
        Ok(())
    }

    /// Makes whole grains zero that have never been written. `shadows`: the parent may hold something there.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub(crate) fn write_zeroes(&self, offset: u64, len: u64, shadows: bool) -> Result<()> {
        if self.appender.is_none() {
            return Err(Error::read_only());
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let run = self.run(at, end - at)?;
            match run.grain {
                Grain::Zero => {}
                Grain::Absent if !shadows => {}
                Grain::Absent => self.store_zeroes(at, run.len)?,
                Grain::At(_) => return Err(rewrite(at)),
            }
            at += run.len;
        }
        Ok(())
    }

    /// Refuses what lies before grains that have been appended.
    pub(crate) fn check_unsent(&self, offset: u64) -> Result<()> {
        match &self.appender {
            Some(appender) if offset / self.grain() >= appender.next_grain() => Ok(()),
            Some(_) => Err(rewrite(offset)),
            None => Err(Error::read_only()),
        }
    }

    fn store_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_whole(offset, len)?;
        let zeros = self.compress(&vec![0; to_usize(self.grain())])?;
        for piece in pieces(offset, len, self.grain()) {
            self.append(std::slice::from_ref(&zeros), piece.index * self.grain())?;
        }
        Ok(())
    }

    /// Refuses requests that begin or end inside a grain.
    fn check_whole(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.header.capacity * SECTOR;
        let end = offset + len;
        if !offset.is_multiple_of(self.grain()) || !(end.is_multiple_of(self.grain()) || end >= size) {
            return Err(partial_grain(offset));
        }
        Ok(())
    }

    /// Makes what has been written durable, with everything that a complete stream ends with.
    ///
    /// # Errors
    /// The host failed, or had failed before.
    pub(crate) fn flush(&self) -> Result<()> {
        self.appender.as_ref().map_or(Ok(()), |appender| appender.complete())
    }
}

fn partial_grain(offset: u64) -> Error {
    Error::unsupported(format!("a stream takes whole grains only, not part of one at {offset:#x}"))
}

fn rewrite(offset: u64) -> Error {
    Error::unsupported(format!(
        "Could not write to allocated cluster for streamOptimized: offset {offset:#x}"
    ))
}

/// The footer of a stream, which says where its directory is.
///
/// # Errors
/// There is none, or it is not that of the header.
pub(crate) fn find_footer(storage: &dyn Storage, header: &Header) -> Result<Header> {
    let end = storage.len()? / SECTOR * SECTOR;
    let start = end.saturating_sub(FOOTER_SEARCH);
    let mut bytes = vec![0; to_usize(end - start)];
    storage.read_at(&mut bytes, start)?;
    let sectors: Vec<&[u8]> = bytes.chunks(to_usize(SECTOR)).collect();
    // The end-of-stream marker is all zeros, and so is padding.
    let last = sectors.iter().rposition(|sector| !is_zero(sector)).unwrap_or(0);
    let marker = last.checked_sub(1).and_then(|at| sectors.get(at));
    let (Some(marker), Some(footer), Some(_)) = (marker, sectors.get(last), sectors.get(last + 1)) else {
        return Err(invalid_footer());
    };
    if Marker::parse(marker) != Some(Marker::Footer { sectors: 1 }) {
        return Err(invalid_footer());
    }
    let footer = Header::parse(footer).map_err(|error| error.context("Invalid footer"))?;
    let same = Header { gd_offset: header.gd_offset, rgd_offset: header.rgd_offset, ..footer } == *header;
    if !same || footer.gd_offset == GD_AT_END || footer.gd_offset == 0 {
        return Err(
            Error::new(ErrorKind::Corrupt, "Invalid footer").hint("it contradicts the header of the file")
        );
    }
    Ok(footer)
}

fn invalid_footer() -> Error {
    Error::new(ErrorKind::Truncated, "Invalid footer")
        .hint("the end of the stream is missing: the file was not written or transferred to its end")
}

/// Where a stream whose directory is at sector `directory` is continued: over its tail. `None`: it is not laid out such
/// that it could be.
fn resume(storage: &Arc<dyn Storage>, header: &Header, directory: u64) -> Result<Option<Start>> {
    let Some(next) = directory.checked_sub(1).filter(|next| *next >= header.overhead) else {
        return Ok(None);
    };
    let mut marker = [0; 16];
    storage.read_at(&mut marker, next.saturating_mul(SECTOR))?;
    let has_marker = matches!(Marker::parse(&marker), Some(Marker::GrainDirectory { .. }));
    if !has_marker || append::check(header).is_err() {
        return Ok(None);
    }
    let directory = read_table(&**storage, directory, header.gd_entries())?;
    let (mut next_grain, mut last) = (0, None);
    if let Some(index) = directory.iter().rposition(|sector| *sector != 0) {
        let table = read_table(&**storage, directory[index].into(), header.gtes_per_gt.into())?;
        let index = index as u64;
        let used = table.iter().rposition(|entry| *entry != 0).map_or(0, |at| at as u64 + 1);
        next_grain = index * u64::from(header.gtes_per_gt) + used;
        last = Some((index, table));
    }
    Ok(Some(Start { next, next_grain, directory, last }))
}

/// A whole table in memory.
fn read_table(storage: &dyn Storage, sector: u64, entries: u64) -> Result<Vec<u32>> {
    let offset = sector.saturating_mul(SECTOR);
    let end = storage.len()?;
    if offset.checked_add(entries * 4).is_none_or(|last| last > end) {
        let message = format!("a table at {offset:#x} lies beyond the end of the file ({end:#x})");
        return Err(Error::new(ErrorKind::Truncated, message));
    }
    let mut bytes = vec![0; to_usize(entries * 4)];
    storage.read_at(&mut bytes, offset)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect())
}
