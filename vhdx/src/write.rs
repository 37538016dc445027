//! Writing: blocks get their places at the end of the file, and the BAT learns of them in memory; the
//! [`journal`](crate::journal) brings it to the disk.
//!
//! A block of a differencing disk is completed from the parent before the BAT says that it is present, so that no
//! moment and no crash shows a part of it. A block that has no parent begins as the zeros that the file is extended
//! by.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use block::extent::read_backing;
use block::num::{align_down, align_up, len_of, to_usize};
use block::pieces::{Piece, pieces};
use block::stripes::Stripes;
use block::{Error, ErrorKind, Result, Storage, ZeroMode};
use parking_lot::Mutex;

use crate::bat::{Entry, State};
use crate::device::{Place, Vhdx};
use crate::journal::Journal;
use crate::locator::Locator;
use crate::log::{SECTOR, SECTOR_LEN};
use crate::region::Region;
use crate::source::Source;
use crate::{Guid, MIB};

/// Bytes that are copied from the parent at once.
const COPY: u64 = 1 << 20;
/// Changed pages of the BAT (of 64 KiB) at which they are brought to the disk without waiting for a flush.
const MAX_DIRTY_PAGES: usize = 256;

/// Blocks of zeros after which it is looked whether that is so.
const BLOCKS_BETWEEN: u64 = 8192;

/// What an image that is open for writing has.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) journal: Journal,
    /// A block that gets a place is held exclusively.
    stripes: Stripes,
    space: Mutex<Space>,
}

/// Where new blocks go.
#[derive(Debug)]
struct Space {
    /// One past everything that is in use, a multiple of 1 MiB.
    end: u64,
    /// Places that have been set aside for blocks.
    reserved: HashMap<u64, u64>,
}

impl Writer {
    pub(crate) fn new(image: &Vhdx, source: &Source) -> Result<Self> {
        if source.file.read_only() {
            return Err(Error::read_only());
        }
        let journal = Journal::new(source.file.clone(), source.headers.clone(), source.log())?;
        let len = image.file_len.load(Ordering::Acquire);
        // Behind the end of a file there are zeros; a block device ends where it ends.
        let end = if source.file.fixed_len() { image.used_end()? } else { len };
        // Regions may have been named that the file does not reach to yet.
        let unknown = source.regions.unknown.iter();
        let regions = image.structures().iter().map(|(_, region)| region).chain(unknown);
        let end = regions.map(Region::end).fold(end, u64::max);
        let end = align_up(end, MIB).ok_or_else(no_space)?;
        let space = Mutex::new(Space { end, reserved: HashMap::new() });
        Ok(Self { journal, stripes: Stripes::new(), space })
    }
}

fn no_space() -> Error {
    Error::new(ErrorKind::NoSpace, "No space left on device")
}

impl Vhdx {
    /// One past the last byte that a structure or a block uses.
    fn used_end(&self) -> Result<u64> {
        let mut end = self.structures().iter().map(|(_, region)| region.end()).max().unwrap_or(MIB);
        for index in 0..self.geometry.entries() {
            let entry = self.table.get(index)?;
            let len = match self.geometry.block_of(index) {
                Some(_) if matches!(entry.state(), State::FullyPresent | State::PartiallyPresent) => {
                    self.geometry.block_size
                }
                None if entry.bitmap_present() == Some(true) => crate::geometry::BITMAP_BLOCK,
                _ => continue,
            };
            end = end.max(entry.offset().saturating_add(len));
        }
        Ok(end)
    }

    /// The writer, after the file has been marked as changed.
    fn begin(&self) -> Result<&Writer> {
        let writer = self.writer.as_ref().ok_or_else(Error::read_only)?;
        writer.journal.announce()?;
        Ok(writer)
    }

    /// A place for a block: zeros, at the end of the file.
    fn new_place(&self, writer: &Writer, block: u64) -> Result<u64> {
        let mut space = writer.space.lock();
        if let Some(place) = space.reserved.remove(&block) {
            return Ok(place);
        }
        self.extend(&mut space)
    }

    fn extend(&self, space: &mut Space) -> Result<u64> {
        let (start, size) = (space.end, self.geometry.block_size);
        let end = start.checked_add(size).filter(|end| i64::try_from(*end).is_ok()).ok_or_else(no_space)?;
        if self.storage.fixed_len() {
            if end > self.storage.len()? {
                return Err(no_space());
            }
            self.storage.zero_range(start, size, ZeroMode::ALLOCATE)?;
        } else {
            self.storage.set_len(end)?;
            self.file_len.store(end, Ordering::Release);
        }
        space.end = end;
        Ok(start)
    }

    pub(crate) fn reserve_blocks(&self, offset: u64, len: u64) -> Result<()> {
        let writer = self.begin()?;
        for piece in pieces(offset, len, self.geometry.block_size) {
            if matches!(self.place(piece.index)?, Place::Zero | Place::Parent) {
                let mut space = writer.space.lock();
                if !space.reserved.contains_key(&piece.index) {
                    let place = self.extend(&mut space)?;
                    space.reserved.insert(piece.index, place);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        let writer = self.begin()?;
        for piece in pieces(offset, buf.len() as u64, self.geometry.block_size) {
            let part = &buf[piece.range.clone()];
            match self.place(piece.index)? {
                Place::File(at) => self.storage.write_at(part, at + piece.within)?,
                _ => {
                    self.write_new(writer, part, &piece)?;
                    self.relieve(writer)?;
                }
            }
        }
        Ok(())
    }

    /// Writes to a block that is not (or not all) in the file.
    fn write_new(&self, writer: &Writer, part: &[u8], piece: &Piece) -> Result<()> {
        let held = writer.stripes.exclusive(piece.index, piece.index);
        let at = match self.place(piece.index)? {
            Place::File(at) => at,
            Place::Zero => {
                let at = self.new_place(writer, piece.index)?;
                self.set(piece.index, Entry::present(at))?;
                at
            }
            Place::Parent => {
                let at = self.new_place(writer, piece.index)?;
                self.copy_around(piece, |range| self.copy_from_parent(piece.index, at, range))?;
                self.storage.write_at(part, at + piece.within)?;
                return self.set(piece.index, Entry::present(at));
            }
            Place::Partly(at, bits) => {
                self.copy_around(piece, |(from, to)| {
                    self.for_runs(&bits, from, to - from, |present, run| match present {
                        true => Ok(()),
                        false => self.copy_from_parent(piece.index, at, (run.within, run.within + run.len())),
                    })
                })?;
                self.storage.write_at(part, at + piece.within)?;
                return self.set(piece.index, Entry::present(at));
            }
        };
        // Others may write to the block by now; it is zeros where nobody has.
        drop(held);
        self.storage.write_at(part, at + piece.within)
    }

    fn set(&self, block: u64, entry: Entry) -> Result<()> {
        self.table.set(self.geometry.entry_of(block), entry)
    }

    /// Calls `copy` with the parts of the block before and behind the piece.
    fn copy_around(&self, piece: &Piece, copy: impl Fn((u64, u64)) -> Result<()>) -> Result<()> {
        let end = piece.within + piece.len();
        for range in [(0, piece.within), (end, self.geometry.len_of(piece.index))] {
            if range.0 < range.1 {
                copy(range)?;
            }
        }
        Ok(())
    }

    /// Copies a range of a block from the parent to its place at `at`.
    fn copy_from_parent(&self, block: u64, at: u64, (start, end): (u64, u64)) -> Result<()> {
        let mut buf = vec![0; to_usize(COPY.min(end - start))];
        for from in (start..end).step_by(to_usize(COPY)) {
            let part = &mut buf[..to_usize(COPY.min(end - from))];
            read_backing(self.parent.as_deref(), part, block * self.geometry.block_size + from)?;
            self.storage.write_at(part, at + from)?;
        }
        Ok(())
    }

    /// Brings the BAT to the disk if much of it has changed.
    fn relieve(&self, writer: &Writer) -> Result<()> {
        if self.table.dirty_pages() < MAX_DIRTY_PAGES {
            return Ok(());
        }
        writer.journal.flush(&self.table)
    }

    /// A fixed disk keeps the space that it has.
    fn may_unmap(&self) -> bool {
        !self.metadata.leave_blocks_allocated || self.is_differencing()
    }

    pub(crate) fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let writer = self.begin()?;
        let mode = ZeroMode { may_unmap: mode.may_unmap && self.may_unmap(), ..mode };
        for piece in pieces(offset, len, self.geometry.block_size) {
            if piece.index.is_multiple_of(BLOCKS_BETWEEN) {
                self.relieve(writer)?;
            }
            let whole = piece.within == 0 && piece.len() == self.geometry.len_of(piece.index);
            match self.place(piece.index)? {
                Place::File(at) => self.storage.zero_range(at + piece.within, piece.len(), mode)?,
                _ if whole => self.zero_block(writer, piece.index, mode)?,
                Place::Zero => {}
                Place::Parent | Place::Partly(..) if mode.no_fallback => {
                    return Err(Error::unsupported("a part of a VHDX block has no fast way to write zeros"));
                }
                Place::Parent | Place::Partly(..) => self.write_zero_bytes(writer, &piece)?,
            }
        }
        self.relieve(writer)
    }

    /// Makes a whole block zeros. What a block without parent and without contents reads as is left to the reader by
    /// the specification unless its state is `Zero`, so that it becomes that.
    fn zero_block(&self, writer: &Writer, block: u64, mode: ZeroMode) -> Result<()> {
        let _held = writer.stripes.exclusive(block, block);
        match self.place(block)? {
            Place::File(at) => self.storage.zero_range(at, self.geometry.len_of(block), mode),
            Place::Zero | Place::Parent => {
                if self.table.get(self.geometry.entry_of(block))?.state() == State::Zero {
                    return Ok(());
                }
                self.set(block, Entry::ZERO)
            }
            Place::Partly(at, _) => {
                self.storage.zero_range(at, self.geometry.len_of(block), mode)?;
                self.set(block, Entry::present(at))
            }
        }
    }

    /// Writes zeros like other bytes.
    fn write_zero_bytes(&self, writer: &Writer, piece: &Piece) -> Result<()> {
        let zeros = vec![0; to_usize(COPY.min(piece.len()))];
        for done in (0..piece.len()).step_by(to_usize(COPY)) {
            let len = to_usize(COPY.min(piece.len() - done));
            let part = Piece { index: piece.index, within: piece.within + done, range: 0..len };
            self.write_new(writer, &zeros[..len], &part)?;
        }
        Ok(())
    }

    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.begin()?;
        if !self.may_unmap() {
            return Ok(());
        }
        for piece in pieces(offset, len, self.geometry.block_size) {
            if let Place::File(at) = self.place(piece.index)? {
                self.storage.discard_range(at + piece.within, piece.len())?;
            }
        }
        Ok(())
    }

    /// Shares the host's blocks, block by block. What has been shared when it turns out that the rest cannot be is
    /// what the caller is about to write there.
    pub(crate) fn clone_blocks(
        &self,
        offset: u64,
        len: u64,
        source: &dyn Storage,
        source_offset: u64,
    ) -> Result<bool> {
        if self.is_differencing() {
            return Ok(false);
        }
        let writer = self.begin()?;
        for piece in pieces(offset, len, self.geometry.block_size) {
            let at = match self.place(piece.index)? {
                Place::File(at) => at,
                _ => {
                    self.write_new(writer, &[], &piece)?;
                    let Place::File(at) = self.place(piece.index)? else { return Ok(false) };
                    at
                }
            };
            let from = source_offset + piece.range.start as u64;
            if !self.storage.clone_range(at + piece.within, source, from, piece.len())? {
                return Ok(false);
            }
        }
        self.relieve(writer).map(|()| true)
    }

    /// Records another GUID of the parent, through the log: it may lie across two sectors.
    pub(crate) fn change_linkage(&self, parent: Guid) -> Result<()> {
        let writer = self.begin()?;
        let at = self.metadata.parent.as_ref().and_then(|locator| locator.linkage_at);
        let at =
            at.ok_or_else(|| Error::unsupported("the VHDX parent locator has no room for another GUID"))?;
        let text = Locator::linkage_text(parent);
        let first = align_down(at, SECTOR);
        let end = (at + len_of(&text)).next_multiple_of(SECTOR);
        let mut bytes = vec![0; to_usize(end - first)];
        self.storage.read_at(&mut bytes, first)?;
        bytes[to_usize(at - first)..][..text.len()].copy_from_slice(&text);
        let sectors = bytes.as_chunks::<SECTOR_LEN>().0.iter().zip((first..).step_by(SECTOR_LEN));
        let sectors: Vec<_> = sectors.map(|(bytes, offset)| (offset, Box::new(*bytes))).collect();
        writer.journal.change(&sectors)
    }

    /// Leaves the file as a clean shutdown does.
    pub(crate) fn finish(&self) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        writer.journal.close(&self.table)?;
        // Only now: the log says how long the file has to be.
        self.give_back(writer)
    }

    /// Cuts off what was set aside at the end of the file and has not been used.
    fn give_back(&self, writer: &Writer) -> Result<()> {
        let mut space = writer.space.lock();
        let mut unused: Vec<u64> = space.reserved.drain().map(|(_, place)| place).collect();
        unused.sort_unstable();
        let end = space.end;
        while unused.last().is_some_and(|place| place + self.geometry.block_size == space.end) {
            space.end -= self.geometry.block_size;
            unused.pop();
        }
        if space.end < end && !self.storage.fixed_len() {
            self.storage.set_len(space.end)?;
            self.file_len.store(space.end, Ordering::Release);
            self.storage.sync()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use block::BlockDevice as _;
    use block::mem::MemStorage;

    use super::*;
    use crate::create::{CreateOptions, create};
    use crate::device::OpenOptions;
    use crate::header::Headers;

    /// A log for which the file has not grown yet is no place for a block.
    #[test]
    fn blocks_keep_clear_of_a_log_behind_the_end_of_the_file() {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::new());
        create(&*storage, &CreateOptions { block_size: Some(MIB), ..CreateOptions::new(4 << 20) }).unwrap();
        let end = storage.len().unwrap();
        let mut headers = Headers::read(&*storage).unwrap();
        headers.replace(&*storage, |header| header.log_offset = end + MIB).unwrap();
        let options = OpenOptions { writable: true, parent: None };
        let image = Vhdx::open(Source::read(&storage).unwrap(), options).unwrap();
        image.write_at(&[7; 4 << 20], 0).unwrap();
        image.close().unwrap();
        let mut bytes = vec![0; 4 << 20];
        image.read_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
        assert!(crate::check::check(&storage, block::image::Repair::None).unwrap().is_clean());
    }
}
