//! Writing.
//!
//! What goes to blocks that are there is written in place, by any number of threads. A block that is not there is made by
//! one thread that has it to itself: its bytes are written first, then the map is changed in memory.

use std::ops::Range;
use std::sync::atomic::Ordering;

use block::device::check_range;
use block::num::to_usize;
use block::pieces::{Piece, pieces};
use block::{BlockDevice as _, Error as BlockError, Result, ZeroMode};
use parking_lot::Mutex;

use crate::alloc::Alloc;
use crate::header::Uuid;
use crate::map::Entry;
use crate::vdi::Vdi;

/// Bytes of the changed map at which it is written without being asked.
const MAX_CHANGED: u64 = 16 << 20;

/// What is written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Payload<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// Zeros.
    Zeros(ZeroMode),
}

impl Vdi {
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
        check_range(offset, len, self.size())?;
        self.alloc()?;
        self.note_change()?;
        for piece in pieces(offset, len, self.map.block_size) {
            let payload = payload(piece.range.clone());
            if !self.write_in_place(&piece, payload)? {
                self.write_changing(&piece, payload)?;
            }
        }
        if self.map.pages().changed_bytes() > MAX_CHANGED {
            self.flush_all()?;
        }
        Ok(())
    }

    /// From the first write on, the image is in another state: what VirtualBox notices if a parent has been changed.
    fn note_change(&self) -> Result<()> {
        let mut modified = self.modified.lock();
        if modified.is_none() {
            *modified = Some(Uuid::random()?);
        }
        Ok(())
    }

    /// Writes to a block that is there. `false`: it is not.
    fn write_in_place(&self, piece: &Piece, payload: Payload<'_>) -> Result<bool> {
        let _held = self.stripes.shared(piece.index, piece.index);
        let Entry::Data(number) = self.map.entry(&*self.storage, piece.index)? else { return Ok(false) };
        self.put(self.place(piece.index, number)? + piece.within, piece.len(), payload).map(|()| true)
    }

    fn put(&self, host: u64, len: u64, payload: Payload<'_>) -> Result<()> {
        match payload {
            Payload::Bytes(bytes) => self.storage.write_at(bytes, host),
            Payload::Zeros(mode) => self.storage.zero_range(host, len, mode),
        }
    }

    /// Writes to a block that is not there.
    fn write_changing(&self, piece: &Piece, payload: Payload<'_>) -> Result<()> {
        let _held = self.stripes.exclusive(piece.index, piece.index);
        let entry = self.map.entry(&*self.storage, piece.index)?;
        let from_parent = entry == Entry::Free && self.is_differencing();
        match (entry, payload) {
            // Somebody else was faster.
            (Entry::Data(number), _) => {
                return self.put(self.place(piece.index, number)? + piece.within, piece.len(), payload);
            }
            (_, Payload::Zeros(_)) if !from_parent => return Ok(()),
            (_, Payload::Zeros(_)) if piece.len() == self.map.used_len(piece.index) => {
                return self.map.set(&*self.storage, piece.index, Entry::Zero);
            }
            _ => {}
        }
        let number = self.new_block(piece, from_parent, payload)?;
        self.map.set(&*self.storage, piece.index, Entry::Data(number))?;
        self.alloc()?.lock().reserved.remove(&piece.index);
        Ok(())
    }

    /// Writes a block to a new place, with what it showed before around the payload. Nothing refers to it yet.
    fn new_block(&self, piece: &Piece, from_parent: bool, payload: Payload<'_>) -> Result<u32> {
        let (number, junk_end) = self.reserve_block(piece.index)?;
        let host = self.map.offset_of(number);
        let (start, end) = (piece.within, piece.within + piece.len());
        let used = self.map.used_len(piece.index);
        if from_parent {
            for part in [0..start, end..used] {
                self.copy_from_parent(piece.index, host, part)?;
            }
        } else if junk_end > host {
            // The place has been used before: no hole to rely on.
            let junk = (junk_end - host).min(self.map.block_size);
            self.storage.zero_range(host, junk, ZeroMode::UNMAP)?;
        }
        if let Err(error) = self.put(host + start, piece.len(), payload) {
            // Parts of it may be there, which whoever gets the place next must not take for zeros.
            let mut alloc = self.alloc()?.lock();
            alloc.junk_end = alloc.junk_end.max(host + self.map.block_size);
            return Err(error);
        }
        Ok(number)
    }

    /// Copies a part of a block from the parent, in small steps.
    fn copy_from_parent(&self, index: u64, host: u64, part: Range<u64>) -> Result<()> {
        const STEP: u64 = 64 << 10;
        let guest = index * self.map.block_size;
        let mut buf = vec![0; to_usize(STEP.min(part.end - part.start))];
        let mut at = part.start;
        while at < part.end {
            let step = &mut buf[..to_usize(STEP.min(part.end - at))];
            self.read_parent(step, guest + at)?;
            self.storage.write_at(step, host + at)?;
            at += step.len() as u64;
        }
        Ok(())
    }

    /// The number of a block that is not there yet, and how far bytes may be anything.
    fn reserve_block(&self, index: u64) -> Result<(u32, u64)> {
        let mut alloc = self.alloc()?.lock();
        let number = alloc.reserve(&*self.storage, &self.map, index)?;
        self.limit.fetch_max(self.map.offset_of(number) + self.map.block_size, Ordering::AcqRel);
        Ok((number, alloc.junk_end))
    }

    /// Sets numbers aside for the blocks of a range, in their order.
    pub(crate) fn reserve_blocks(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        for piece in pieces(offset, len, self.map.block_size) {
            let _held = self.stripes.shared(piece.index, piece.index);
            if !matches!(self.map.entry(&*self.storage, piece.index)?, Entry::Data(_)) {
                self.reserve_block(piece.index)?;
            }
        }
        Ok(())
    }

    /// Gives back the space under blocks that are there. They keep their places.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        self.alloc()?;
        self.note_change()?;
        for piece in pieces(offset, len, self.map.block_size) {
            let _held = self.stripes.shared(piece.index, piece.index);
            if let Entry::Data(number) = self.map.entry(&*self.storage, piece.index)? {
                let host = self.place(piece.index, number)? + piece.within;
                self.storage.discard_range(host, piece.len())?;
            }
        }
        Ok(())
    }
}
