//! What writes do to the mapping of grains.
//!
//! A grain that has a place is written there, side by side with everything else. A grain that has none gets one at the
//! end of the file; what surrounds the bytes of the request in it comes from the parent, or is zeros. The grain is
//! written as a whole before its entries are changed, and its entries are changed only while it is held exclusively.

use std::io::IoSlice;
use std::sync::Arc;

use block::num::to_usize;
use block::pieces::pieces;
use block::{Error, ErrorKind, Result, Storage, ZeroMode};

use super::pages::{MAX_DIRTY, Page};
use super::tables::{Copy, Mapped, ZERO_GRAIN};
use super::{Hosted, Meta};
use crate::SECTOR;
use crate::extent::protected;
use crate::header::flags;

/// Zeros around small writes; larger ranges are zeroed by the host.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Bytes that are copied at a time.
const CHUNK: u64 = 1 << 20;
/// Where the format ends: places are 32-bit numbers of sectors.
const MAX_END: u64 = (1 << 32) * SECTOR;

/// Grains that follow each other in the file.
#[derive(Debug, Clone, Copy)]
struct Place {
    offset: u64,
    grains: u64,
}

impl Hosted {
    pub(super) fn check_writable(&self) -> Result<()> {
        if self.writable { Ok(()) } else { Err(protected(self.storage_ref())) }
    }

    /// Bytes of a grain.
    fn grain_bytes(&self) -> u64 {
        self.tables.header.grain_bytes()
    }

    pub(super) fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_writable()?;
        self.each_piece(offset, buf.len() as u64, |at, len| {
            let start = to_usize(at - offset);
            self.write_piece(&buf[start..start + to_usize(len)], at)
        })
    }

    fn write_piece(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.throttle()?;
        let (first, last) = self.grains(offset, buf.len() as u64);
        {
            let _held = self.stripes.shared(first, last);
            if self.write_in_place(buf, offset)? {
                return Ok(());
            }
        }
        let _held = self.stripes.exclusive(first, last);
        let mut done = 0;
        while done < buf.len() {
            done += self.write_some(&buf[done..], offset + done as u64)?;
        }
        Ok(())
    }

    /// Writes what has its place already, if all of it has.
    fn write_in_place(&self, buf: &[u8], offset: u64) -> Result<bool> {
        let mut runs = vec![];
        let mut done = 0;
        while done < buf.len() {
            let run = self.tables.lookup(offset + done as u64, (buf.len() - done) as u64)?;
            let Mapped::Data(place) = run.mapped else { return Ok(false) };
            let end = done + to_usize(run.len);
            runs.push((place, done..end));
            done = end;
        }
        for (place, range) in runs {
            self.storage_ref().write_at(&buf[range], place)?;
        }
        Ok(true)
    }

    /// Writes the first bytes of `buf`, as many as go into one place. Returns how many. Their grains are held
    /// exclusively.
    fn write_some(&self, buf: &[u8], offset: u64) -> Result<usize> {
        let run = self.tables.lookup(offset, buf.len() as u64)?;
        if let Mapped::Data(place) = run.mapped {
            let len = to_usize(run.len);
            self.storage_ref().write_at(&buf[..len], place)?;
            return Ok(len);
        }
        let (grain, within) = self.tables.grain_of(offset);
        let wanted = (within + run.len).div_ceil(self.grain_bytes());
        let place = self.allocate(grain, wanted)?;
        let room = place.grains * self.grain_bytes() - within;
        let bytes = &buf[..to_usize(room.min(run.len))];
        self.write_surrounded(bytes, offset, place, run.mapped)
            .and_then(|()| self.link_place(grain, place))
            .inspect_err(|_| self.give_back(place))?;
        Ok(bytes.len())
    }

    /// Writes `bytes` to new grains, with what surrounds them there.
    fn write_surrounded(&self, bytes: &[u8], offset: u64, place: Place, old: Mapped) -> Result<()> {
        let within = self.tables.grain_of(offset).1;
        let end = place.grains * self.grain_bytes();
        let tail = end - within - bytes.len() as u64;
        let after = offset + bytes.len() as u64;
        let parent = old == Mapped::Absent;
        let from_parent = |at: u64, len: u64| parent && len > 0 && at < self.len && self.below.covers(at);
        if from_parent(offset - within, within)
            || from_parent(after, tail)
            || within.max(tail) > ZEROS.len() as u64
        {
            self.fill(offset - within, place.offset, within, parent)?;
            self.storage_ref().write_at(bytes, place.offset + within)?;
            return self.fill(after, place.offset + end - tail, tail, parent);
        }
        let zeros = |len: u64| IoSlice::new(&ZEROS[..to_usize(len)]);
        let parts = [zeros(within), IoSlice::new(bytes), zeros(tail)];
        let parts: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        self.storage_ref().write_vectored_at(&parts, place.offset)
    }

    /// Writes `len` bytes that the disk has at `offset` to a place of the file: the parent's, or zeros.
    fn fill(&self, offset: u64, place: u64, len: u64, parent: bool) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let shown = if parent { len.min(self.len.saturating_sub(offset)) } else { 0 };
        let mut done = 0;
        let mut buf = vec![0; to_usize(shown.min(CHUNK))];
        while done < shown && self.below.covers(offset + done) {
            let piece = (shown - done).min(CHUNK);
            let bytes = &mut buf[..to_usize(piece)];
            self.below.read(bytes, offset + done)?;
            self.storage_ref().write_at(bytes, place + done)?;
            done += piece;
        }
        if done < len {
            self.storage_ref().zero_range(place + done, len - done, ZeroMode::UNMAP)?;
        }
        Ok(())
    }

    /// A place for up to `wanted` grains of the disk from `grain` on: what was set aside for them, or the end of the
    /// file.
    fn allocate(&self, grain: u64, wanted: u64) -> Result<Place> {
        let mut meta = self.meta.lock();
        self.ensure_tables(&mut meta, grain, wanted)?;
        let size = self.grain_bytes();
        if let Some(offset) = meta.reserved.remove(&grain) {
            let mut grains = 1;
            while grains < wanted && meta.reserved.get(&(grain + grains)) == Some(&(offset + grains * size)) {
                meta.reserved.remove(&(grain + grains));
                grains += 1;
            }
            return Ok(Place { offset, grains });
        }
        let until_reserved = (1..wanted).find(|next| meta.reserved.contains_key(&(grain + next)));
        self.take(&mut meta, until_reserved.unwrap_or(wanted))
    }

    /// A place for up to `wanted` grains.
    fn take(&self, meta: &mut Meta, wanted: u64) -> Result<Place> {
        if let Some(offset) = meta.free.pop() {
            return Ok(Place { offset, grains: 1 });
        }
        self.take_new(meta, wanted)
    }

    /// The same at the end of the file.
    fn take_new(&self, meta: &mut Meta, wanted: u64) -> Result<Place> {
        let size = self.grain_bytes();
        let end = wanted.checked_mul(size).and_then(|len| len.checked_add(meta.next));
        if end.is_none_or(|end| end > MAX_END) {
            let text = "the sparse extent is full: the format cannot address more than 2 TiB of a file";
            return Err(Error::new(ErrorKind::NoSpace, text)
                .hint("Create the disk in extents of 2 GiB, with subformat=twoGbMaxExtentSparse."));
        }
        let offset = meta.next;
        meta.next += wanted * size;
        Ok(Place { offset, grains: wanted })
    }

    /// What was not linked can be given out again. It may hold bytes of a write that failed, which is as well.
    fn give_back(&self, place: Place) {
        let size = self.grain_bytes();
        self.meta.lock().free.extend((0..place.grains).map(|index| place.offset + index * size));
    }

    /// Makes sure that grains have grain tables, in both copies. Products make all of them in advance; where one is
    /// missing it is put at the end of the file.
    fn ensure_tables(&self, meta: &mut Meta, grain: u64, count: u64) -> Result<()> {
        let per_table = u64::from(self.tables.header.gtes_per_gt);
        for index in grain / per_table..=(grain + count - 1) / per_table {
            for copy in self.copies() {
                if self.tables.table_of(*copy, index)?.is_some() {
                    continue;
                }
                let Some(directory) = self.tables.directory(*copy) else { continue };
                let place = self.take_table(meta)?;
                self.set_entry(meta, directory + index * 4, place)?;
            }
        }
        Ok(())
    }

    /// A place for an empty table.
    fn take_table(&self, meta: &mut Meta) -> Result<u64> {
        let len = self.tables.header.gt_sectors() * SECTOR;
        // Grains that are given out again do not follow each other: a table that needs more than one is new space.
        let grains = len.div_ceil(self.grain_bytes());
        let place = if grains > 1 { self.take_new(meta, grains)? } else { self.take(meta, 1)? };
        self.storage_ref().zero_range(place.offset, place.grains * self.grain_bytes(), ZeroMode::UNMAP)?;
        // The pages that it lies on may have been read for the sake of a neighbour, with what was here before.
        for at in (place.offset..place.offset + len).step_by(4) {
            let page = self.tables.pages.hold(at)?;
            page.set(at, 0);
            meta.dirty.insert(page.offset, page);
        }
        Ok(place.offset)
    }

    /// The copies of the tables that are kept.
    fn copies(&self) -> &'static [Copy] {
        match self.tables.header.has(flags::REDUNDANT) {
            true => &[Copy::Main, Copy::Redundant],
            false => &[Copy::Main],
        }
    }

    /// Makes an entry name a place of the file.
    fn set_entry(&self, meta: &mut Meta, at: u64, place: u64) -> Result<()> {
        let sector = u32::try_from(place / SECTOR).unwrap_or(u32::MAX); // Below MAX_END.
        let page = self.tables.pages.hold(at)?;
        page.set(at, sector);
        meta.dirty.insert(page.offset, page);
        Ok(())
    }

    /// Links grains of the disk to their new place.
    fn link_place(&self, grain: u64, place: Place) -> Result<()> {
        let size = self.grain_bytes();
        self.link(grain, place.grains, |index| (place.offset + index * size) / SECTOR)
    }

    /// Replaces the entries of grains, which are held exclusively and have tables. What the old ones referred to is free
    /// after the next flush.
    fn link(&self, grain: u64, count: u64, entry: impl Fn(u64) -> u64) -> Result<()> {
        let mut meta = self.meta.lock();
        self.mark_unclean(&mut meta)?;
        // Everything that can fail comes first: half a link must not happen.
        let mut slots: Vec<(u64, u32, Arc<Page>)> = vec![];
        let mut old_places = vec![];
        for index in 0..count {
            if let Mapped::Data(old) = self.tables.mapped(grain + index)? {
                old_places.push(old);
            }
            let new = u32::try_from(entry(index)).unwrap_or(u32::MAX); // Below MAX_END.
            for copy in self.copies() {
                let Some(at) = self.tables.entry_place(*copy, grain + index)? else {
                    let text = format!("grain {} has no grain table", grain + index);
                    return Err(Error::new(ErrorKind::Corrupt, text));
                };
                slots.push((at, new, self.tables.hold(*copy, grain + index, at)?));
            }
        }
        for (at, new, page) in slots {
            page.set(at, new);
            meta.dirty.insert(page.offset, page);
        }
        meta.pending_free.extend(old_places);
        Ok(())
    }

    /// Lets a writer wait for a flush when too many changed tables have piled up in memory.
    fn throttle(&self) -> Result<()> {
        let full = self.meta.lock().dirty.len() > MAX_DIRTY;
        if full { self.flush_all() } else { Ok(()) }
    }

    pub(super) fn reserve_piece(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        if len == 0 {
            return Ok(());
        }
        self.throttle()?;
        let (first, last) = self.grains(offset, len);
        let _held = self.stripes.shared(first, last);
        let mut at = offset;
        while at < offset + len {
            let run = self.tables.lookup(at, offset + len - at)?;
            if !matches!(run.mapped, Mapped::Data(_)) {
                let (from, to) = self.grains(at, run.len);
                self.reserve_grains(from, to)?;
            }
            at += run.len;
        }
        Ok(())
    }

    fn reserve_grains(&self, first: u64, last: u64) -> Result<()> {
        let mut meta = self.meta.lock();
        for grain in first..=last {
            if !meta.reserved.contains_key(&grain) {
                let place = self.take(&mut meta, 1)?;
                meta.reserved.insert(grain, place.offset);
            }
        }
        Ok(())
    }

    pub(super) fn clone_range(
        &self,
        offset: u64,
        len: u64,
        source: &dyn Storage,
        source_offset: u64,
    ) -> Result<bool> {
        self.check_writable()?;
        let size = self.grain_bytes();
        if len == 0 || !offset.is_multiple_of(size) || !len.is_multiple_of(size) {
            return Ok(false);
        }
        self.throttle()?;
        let (first, last) = self.grains(offset, len);
        let _held = self.stripes.exclusive(first, last);
        let run = self.tables.lookup(offset, len)?;
        if run.len < len || matches!(run.mapped, Mapped::Data(_)) {
            return Ok(false);
        }
        let mut grain = first;
        while grain <= last {
            let place = self.allocate(grain, last - grain + 1)?;
            let from = source_offset + (grain - first) * size;
            match self.clone_grains(grain, place, source, from) {
                Ok(true) => grain += place.grains,
                failed => {
                    self.give_back(place);
                    return failed;
                }
            }
        }
        Ok(true)
    }

    fn clone_grains(&self, grain: u64, place: Place, source: &dyn Storage, from: u64) -> Result<bool> {
        let len = place.grains * self.grain_bytes();
        if !self.storage_ref().clone_range(place.offset, source, from, len)? {
            return Ok(false);
        }
        self.link_place(grain, place).map(|()| true)
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_writable()?;
        self.each_piece(offset, len, |at, len| self.zero_piece(at, len, mode))
    }

    fn zero_piece(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.throttle()?;
        let (first, last) = self.grains(offset, len);
        let _held = self.stripes.exclusive(first, last);
        let mut at = offset;
        while at < offset + len {
            let run = self.tables.lookup(at, offset + len - at)?;
            self.zero_run(at, run.len, run.mapped, mode)?;
            at += run.len;
        }
        Ok(())
    }

    /// Zeroes a range that is mapped in one way.
    fn zero_run(&self, offset: u64, len: u64, mapped: Mapped, mode: ZeroMode) -> Result<()> {
        match mapped {
            Mapped::Zero => Ok(()),
            Mapped::Absent if !self.below.covers(offset) => Ok(()),
            _ => pieces(offset, len, self.grain_bytes()).try_for_each(|piece| {
                let place = match mapped {
                    Mapped::Data(place) => Some(place + piece.range.start as u64),
                    _ => None,
                };
                self.zero_in_grain(piece.index, piece.within, piece.len(), place, mode)
            }),
        }
    }

    /// Zeroes a part of a grain that shows something.
    fn zero_in_grain(
        &self,
        grain: u64,
        within: u64,
        len: u64,
        place: Option<u64>,
        mode: ZeroMode,
    ) -> Result<()> {
        let start = grain * self.grain_bytes();
        if place.is_none() && !self.below.covers(start + within) {
            return Ok(()); // Zeros already: the parent ends before.
        }
        let whole = within == 0 && (len == self.grain_bytes() || start + len == self.len);
        let has_zero_grains = self.tables.header.has(flags::ZERO_GRAINS);
        let may_unlink = place.is_none() || mode.may_unmap;
        if whole && may_unlink && has_zero_grains {
            self.ensure_tables(&mut self.meta.lock(), grain, 1)?;
            return self.link(grain, 1, |_| u64::from(ZERO_GRAIN));
        }
        if whole && may_unlink && !self.below.covers(start) {
            return self.link(grain, 1, |_| 0);
        }
        match place {
            Some(place) => self.storage_ref().zero_range(place, len, mode),
            None if mode.no_fallback => {
                Err(Error::unsupported("the sparse extent has no fast way to write zeros over its parent"))
            }
            None => {
                let zeros = vec![0; to_usize(len.min(CHUNK))];
                let mut done = 0;
                while done < len {
                    let piece = (len - done).min(CHUNK);
                    self.write_some_all(&zeros[..to_usize(piece)], start + within + done)?;
                    done += piece;
                }
                Ok(())
            }
        }
    }

    /// Writes all of `buf` to grains that are held exclusively.
    fn write_some_all(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            done += self.write_some(&buf[done..], offset + done as u64)?;
        }
        Ok(())
    }

    pub(super) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.each_piece(offset, len, |at, len| self.discard_piece(at, len))
    }

    /// Gives up whole grains that have a place.
    fn discard_piece(&self, offset: u64, len: u64) -> Result<()> {
        self.throttle()?;
        let (first, last) = self.grains(offset, len);
        let _held = self.stripes.exclusive(first, last);
        for piece in pieces(offset, len, self.grain_bytes()) {
            let start = piece.index * self.grain_bytes();
            let whole =
                piece.within == 0 && (piece.len() == self.grain_bytes() || start + piece.len() == self.len);
            if whole && let Mapped::Data(place) = self.tables.mapped(piece.index)? {
                self.zero_in_grain(piece.index, 0, piece.len(), Some(place), ZeroMode::UNMAP)?;
            }
        }
        Ok(())
    }
}
