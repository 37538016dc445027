//! Writing to a disk in blocks.
//!
//! What goes to sectors that are there is written in place, by any number of threads. Everything else changes a bitmap or
//! the table, and has the block to itself: the bytes are written first, then the bits and the entry are changed in
//! memory, so that nobody sees a sector before it is complete.

use std::ops::Range;
use std::sync::atomic::Ordering;

use block::device::check_range;
use block::num::{align_down, align_up, to_usize};
use block::pieces::{Piece, pieces};
use block::{Error as BlockError, Result, ZeroMode};
use parking_lot::Mutex;

use crate::alloc::{Alloc, Place};
use crate::disk::Disk;
use crate::table::SECTOR;

/// Bytes of changed tables and bitmaps at which they are written without being asked.
const MAX_CHANGED: u64 = 16 << 20;

/// What is written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Payload<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// Zeros.
    Zeros(ZeroMode),
}

impl Disk {
    fn alloc(&self) -> Result<&Mutex<Alloc>> {
        self.alloc.as_ref().ok_or_else(BlockError::read_only)
    }

    /// Writes `len` bytes, which `payload` says for each range of the request.
    pub(crate) fn write<'a>(
        &self,
        offset: u64,
        len: u64,
        payload: impl Fn(Range<usize>) -> Payload<'a>,
    ) -> Result<()> {
        check_range(offset, len, block::BlockDevice::size(self))?;
        self.alloc()?;
        for piece in pieces(offset, len, self.table.block_size) {
            let payload = payload(piece.range.clone());
            if !self.write_in_place(&piece, payload)? {
                self.write_changing(&piece, payload)?;
            }
        }
        self.flush_if_much_has_changed()
    }

    /// Writes to a block of which all sectors of the range are there. `false`: it is not such a block.
    fn write_in_place(&self, piece: &Piece, payload: Payload<'_>) -> Result<bool> {
        let _held = self.stripes.shared(piece.index, piece.index);
        let Some(bitmap) = self.place(piece.index)? else { return Ok(false) };
        let range = piece.within..piece.within + piece.len();
        if !self.is_present(bitmap, range.clone())? {
            return Ok(false);
        }
        self.put(bitmap, range.start, range.end, payload).map(|()| true)
    }

    fn is_present(&self, bitmap: u64, range: Range<u64>) -> Result<bool> {
        let mut all = true;
        self.runs(bitmap, range, |run| {
            all &= run.present;
            Ok(())
        })?;
        Ok(all)
    }

    /// Writes a part of a block's data, without looking at its bits.
    fn put(&self, bitmap: u64, start: u64, end: u64, payload: Payload<'_>) -> Result<()> {
        let host = bitmap + self.table.bitmap_bytes + start;
        match payload {
            Payload::Bytes(bytes) => self.storage.write_at(bytes, host),
            Payload::Zeros(mode) => self.storage.zero_range(host, end - start, mode),
        }
    }

    /// Writes to a block that is not there, or in which sectors are missing.
    fn write_changing(&self, piece: &Piece, payload: Payload<'_>) -> Result<()> {
        let _held = self.stripes.exclusive(piece.index, piece.index);
        let range = piece.within..piece.within + piece.len();
        let there = self.place(piece.index)?;
        if matches!(payload, Payload::Zeros(_)) && self.shows_zeros(piece.index, there, &range)? {
            return Ok(());
        }
        let bitmap = match there {
            Some(bitmap) => bitmap,
            None => self.new_block(piece.index)?,
        };
        if let Err(error) = self.fill(bitmap, piece.index, range, payload) {
            self.spoil(piece.index)?;
            return Err(error);
        }
        if there.is_none() {
            self.table.set(&*self.storage, piece.index, bitmap)?;
            self.unreserve(piece.index)?;
        }
        Ok(())
    }

    /// Whether a range reads as zeros because nothing is stored for it here or below.
    fn shows_zeros(&self, index: u64, there: Option<u64>, range: &Range<u64>) -> Result<bool> {
        if there.is_some() {
            return Ok(false);
        }
        let guest = index * self.table.block_size + range.start;
        let len = range.end - range.start;
        match &self.parent {
            _ if !self.differencing => Ok(true),
            Some(parent) if guest < parent.size() => {
                let found = block::extent::extent(&**parent, guest, len)?;
                Ok(found.zero && found.len >= len.min(parent.size() - guest))
            }
            Some(_) => Ok(true),
            None => Ok(false),
        }
    }

    /// Writes the bytes of a range whose sectors may be missing, then says that they are there. The caller holds the
    /// block exclusively.
    fn fill(&self, bitmap: u64, index: u64, range: Range<u64>, payload: Payload<'_>) -> Result<()> {
        let sectors = align_down(range.start, SECTOR)..align_up(range.end, SECTOR).unwrap_or(range.end);
        // What of the first and the last sector is not written now comes from below, if it is not there.
        self.complete(bitmap, index, sectors.start..range.start)?;
        self.complete(bitmap, index, range.end..sectors.end)?;
        self.put(bitmap, range.start, range.end, payload)?;
        if self.is_present(bitmap, sectors.clone())? {
            return Ok(());
        }
        self.set_bits(bitmap, sectors.start / SECTOR..sectors.end / SECTOR)
    }

    /// Fills the part of a sector that is not being written, if the sector is not there.
    fn complete(&self, bitmap: u64, index: u64, part: Range<u64>) -> Result<()> {
        if part.is_empty() || self.is_present(bitmap, part.clone())? {
            return Ok(());
        }
        let mut bytes = vec![0; to_usize(part.end - part.start)];
        self.read_parent(&mut bytes, index * self.table.block_size + part.start)?;
        self.put(bitmap, part.start, part.end, Payload::Bytes(&bytes))
    }

    /// Marks sectors of a block as being there, in memory.
    fn set_bits(&self, bitmap: u64, sectors: Range<u64>) -> Result<()> {
        let (mut at, end) = (sectors.start, sectors.end);
        while at < end {
            // Up to the end of a page of the bitmap.
            let last = end.min((at / (8 * SECTOR) + 1) * 8 * SECTOR);
            let first_byte = at / 8;
            let len = to_usize(last.div_ceil(8) - first_byte);
            self.bitmaps.change(&*self.storage, bitmap + first_byte, len, |bytes| {
                for sector in at..last {
                    bytes[to_usize(sector / 8 - first_byte)] |= 0x80 >> (sector % 8);
                }
            })?;
            at = last;
        }
        Ok(())
    }

    /// Sets space aside for a block and prepares it: the bitmap is written, and the data reads as zeros. Nothing refers
    /// to it yet.
    fn new_block(&self, index: u64) -> Result<u64> {
        let place = self.reserve_block(index)?;
        let data = place.offset + self.table.bitmap_bytes;
        // Sectors of a dynamic disk are all there from the start, as qemu has it; those of a differencing disk are not.
        let fill = if self.differencing { 0 } else { 0xff };
        let mut bytes = vec![0; to_usize(place.offset - place.gap)];
        bytes.resize(to_usize(data - place.gap), fill);
        for page in (place.offset..data).step_by(to_usize(SECTOR)) {
            self.bitmaps.forget(page);
        }
        self.storage.write_at(&bytes, place.gap)?;
        let junk = place.junk_end.min(data + self.table.block_size).saturating_sub(data);
        if junk > 0 {
            self.storage.zero_range(data, junk, ZeroMode::UNMAP)?;
        }
        Ok(place.offset)
    }

    /// The place of a block that is not there yet.
    fn reserve_block(&self, index: u64) -> Result<Place> {
        let mut alloc = self.alloc()?.lock();
        let place = match alloc.reserved.get(&index) {
            Some(place) => *place,
            None => {
                let place = alloc.place(&self.table)?;
                alloc.reserved.insert(index, place);
                place
            }
        };
        alloc.settle_footer(&*self.storage, &self.footer_bytes)?;
        self.limit.store(alloc.limit(), Ordering::Release);
        Ok(place)
    }

    /// What is in the place of a block may be anything: parts of what could not be written.
    fn spoil(&self, index: u64) -> Result<()> {
        if let Some(place) = self.alloc()?.lock().reserved.get_mut(&index) {
            place.junk_end = u64::MAX;
        }
        Ok(())
    }

    /// The table refers to the block now.
    fn unreserve(&self, index: u64) -> Result<()> {
        self.alloc()?.lock().reserved.remove(&index);
        Ok(())
    }

    /// Sets places aside for the blocks of a range, in their order.
    pub(crate) fn reserve_blocks(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, block::BlockDevice::size(self))?;
        for piece in pieces(offset, len, self.table.block_size) {
            let _held = self.stripes.shared(piece.index, piece.index);
            if self.place(piece.index)?.is_none() {
                self.reserve_block(piece.index)?;
            }
        }
        Ok(())
    }

    /// Gives back the space under sectors that are there.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, block::BlockDevice::size(self))?;
        self.alloc()?;
        for piece in pieces(offset, len, self.table.block_size) {
            let _held = self.stripes.shared(piece.index, piece.index);
            let Some(bitmap) = self.place(piece.index)? else { continue };
            let data = bitmap + self.table.bitmap_bytes;
            self.runs(bitmap, piece.within..piece.within + piece.len(), |run| match run.present {
                true => self.storage.discard_range(data + run.range.start, run.range.end - run.range.start),
                false => Ok(()),
            })?;
        }
        Ok(())
    }

    /// Keeps the memory for changed tables within its bounds.
    fn flush_if_much_has_changed(&self) -> Result<()> {
        if self.bitmaps.changed_bytes() + self.table.pages().changed_bytes() > MAX_CHANGED {
            return self.flush_all();
        }
        Ok(())
    }
}
