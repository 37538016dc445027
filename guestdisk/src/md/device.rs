//! An array as a disk.

use std::ops::Range;

use block::device::check_range;
use block::extent::extent;
use block::num::to_usize;
use block::slice::Slice;
use block::{BlockDevice, Error, ErrorKind, LayerExtent, Result, Stored, ZeroMode};
use parking_lot::Mutex;

use super::layout::{Layout, Parity, Row};
use super::mark::Counters;
use super::parity;
use crate::bytes::corrupt;

/// Bytes that are summed up at once.
const PIECE: u64 = 64 << 10;

/// The data of a member.
#[derive(Debug)]
pub(super) struct Leg {
    pub(super) data: Slice,
    /// Bytes from the start on that are in sync, if not all are.
    pub(super) recovered: Option<u64>,
    /// What of the data is known to be bad.
    pub(super) bad: Vec<Range<u64>>,
    pub(super) write_mostly: bool,
}

impl Leg {
    pub(super) fn is_in_sync(&self) -> bool {
        self.recovered.is_none()
    }

    /// Whether what lies at `at` can be trusted, and for how many of `len` bytes that answer holds.
    fn judge(&self, at: u64, len: u64) -> (bool, u64) {
        let mut left = len;
        if let Some(end) = self.recovered {
            if at >= end {
                return (false, len);
            }
            left = left.min(end - at);
        }
        for bad in &self.bad {
            if bad.contains(&at) {
                return (false, (bad.end - at).min(len));
            }
            if bad.start > at {
                left = left.min(bad.start - at);
            }
        }
        (true, left)
    }
}

/// The array.
#[derive(Debug)]
pub(super) struct ArrayDevice {
    pub(super) layout: Layout,
    pub(super) size: u64,
    /// By slot; the legs that are read first stand first.
    pub(super) slots: Vec<Vec<Leg>>,
    /// Why nothing can be written.
    pub(super) locked: Option<String>,
    /// What is to be set before the first write, because members are missing.
    pub(super) outdate: Mutex<Option<(Vec<Counters>, u64)>>,
    /// Sums are changed by one at a time.
    pub(super) sums: Mutex<()>,
}

fn lost(slot: usize, at: u64) -> Error {
    corrupt(format!("no member of the array holds what lies at {at:#x} of number {slot}"))
}

impl ArrayDevice {
    /// Calls `act` with offset, distance from the start and length of pieces of a range.
    fn pieces(&self, offset: u64, len: u64, mut act: impl FnMut(u64, u64, u64) -> Result<u64>) -> Result<()> {
        check_range(offset, len, self.size)?;
        let mut done = 0;
        while done < len {
            done += act(offset + done, done, len - done)?.max(1);
        }
        Ok(())
    }

    /// The leg that is to be read at one of several places, and for how many bytes.
    fn best(&self, places: &[(usize, u64)], len: u64) -> Option<(&Leg, u64, u64)> {
        let legs = places.iter().flat_map(|(slot, at)| self.slots[*slot].iter().map(move |leg| (leg, *at)));
        let mut usable = legs.filter_map(|(leg, at)| {
            let (good, len) = leg.judge(at, len);
            good.then_some((leg, at, len))
        });
        let first = usable.next()?;
        if !first.0.write_mostly {
            return Some(first);
        }
        usable.find(|(leg, _, _)| !leg.write_mostly).or(Some(first))
    }

    /// Reads some bytes from any of several places; tells how many.
    fn read_copies(&self, places: &[(usize, u64)], buf: &mut [u8]) -> Result<u64> {
        let len = buf.len() as u64;
        let (leg, at, good) = self.best(places, len).ok_or_else(|| lost(places[0].0, places[0].1))?;
        match leg.data.read_at(&mut buf[..to_usize(good)], at) {
            Ok(()) => Ok(good),
            Err(error) => self.read_others(places, leg, buf).unwrap_or(Err(error)),
        }
    }

    /// The same after a device has failed. `None`: there is no other.
    fn read_others(&self, places: &[(usize, u64)], failed: &Leg, buf: &mut [u8]) -> Option<Result<u64>> {
        for (slot, at) in places {
            for leg in self.slots[*slot].iter().filter(|leg| !std::ptr::eq(*leg, failed)) {
                let (good, len) = leg.judge(*at, buf.len() as u64);
                if good && leg.data.read_at(&mut buf[..to_usize(len)], *at).is_ok() {
                    return Some(Ok(len));
                }
            }
        }
        None
    }

    /// Reads from one slot alone, all of the buffer.
    fn read_slot(&self, slot: usize, buf: &mut [u8], at: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let read = self.read_copies(&[(slot, at + done as u64)], &mut buf[done..])?;
            done += to_usize(read);
        }
        Ok(())
    }

    /// Reads data of a row: of its member, or by computing them from all others.
    fn read_row(&self, parity: &Parity, row: &Row, index: u64, buf: &mut [u8], at: u64) -> Result<()> {
        let Err(error) = self.read_slot(row.data(index), buf, at) else { return Ok(()) };
        let len = buf.len();
        let (mut sum, mut weighted, mut other) = (vec![0; len], vec![0; len], vec![0; len]);
        let mut second = None;
        for data in (0..parity.data_disks()).filter(|data| *data != index) {
            match self.read_slot(row.data(data), &mut other, at) {
                Ok(()) => {
                    parity::add(&mut sum, &other, 1);
                    parity::add(&mut weighted, &other, parity::power(row.exponent(data)));
                }
                Err(_) if second.is_none() => second = Some(data),
                Err(_) => return Err(error),
            }
        }
        let has_sum = self.read_slot(row.p(), &mut other, at).is_ok();
        if has_sum {
            parity::add(&mut sum, &other, 1);
        }
        if has_sum && second.is_none() {
            buf.copy_from_slice(&sum);
            return Ok(());
        }
        let Some(q) = row.q().filter(|_| has_sum || second.is_none()) else { return Err(error) };
        self.read_slot(q, &mut other, at)?;
        parity::add(&mut weighted, &other, 1);
        let own = parity::power(row.exponent(index));
        // One unknown: what is left of the second sum is it, weighted. Two: both sums together give it.
        let factor = match second.map(|data| parity::power(row.exponent(data))) {
            None => own,
            Some(second) => {
                parity::add(&mut weighted, &sum, second);
                own ^ second
            }
        };
        buf.copy_from_slice(&weighted);
        parity::scale(buf, parity::inverse(factor));
        Ok(())
    }

    /// Writes data of a row, and changes its sums by what the data change.
    fn write_row(&self, parity: &Parity, row: &Row, index: u64, buf: &[u8], at: u64) -> Result<()> {
        let mut change = vec![0; buf.len()];
        self.read_row(parity, row, index, &mut change, at)?;
        parity::add(&mut change, buf, 1);
        self.write_slot(row.data(index), buf, at)?;
        let sums = [Some((row.p(), 1)), row.q().map(|q| (q, parity::power(row.exponent(index))))];
        for (slot, factor) in sums.into_iter().flatten().filter(|(slot, _)| !self.slots[*slot].is_empty()) {
            let mut sum = vec![0; buf.len()];
            self.read_slot(slot, &mut sum, at)?;
            parity::add(&mut sum, &change, factor);
            self.write_slot(slot, &sum, at)?;
        }
        Ok(())
    }

    /// Writes to all legs of a slot, those that are being rebuilt included.
    fn write_slot(&self, slot: usize, buf: &[u8], at: u64) -> Result<()> {
        self.slots[slot].iter().try_for_each(|leg| leg.data.write_at(buf, at))
    }

    fn legs(&self) -> impl Iterator<Item = &Leg> {
        self.slots.iter().flatten()
    }

    /// What has to be true before anything is written.
    fn prepare(&self) -> Result<()> {
        if let Some(reason) = &self.locked {
            return Err(Error::new(ErrorKind::ReadOnly, format!("the array cannot be written to: {reason}")));
        }
        if self.read_only() {
            return Err(Error::read_only());
        }
        let mut outdate = self.outdate.lock();
        if let Some((counters, events)) = &*outdate {
            counters.iter().try_for_each(|counters| counters.set(*events))?;
        }
        *outdate = None;
        Ok(())
    }

    /// Calls `act` for every leg that has some of a range: the leg, where there, the distance from the start, the length.
    fn on_legs(
        &self,
        offset: u64,
        len: u64,
        mut act: impl FnMut(&Leg, u64, u64, u64) -> Result<()>,
    ) -> Result<()> {
        self.pieces(offset, len, |at, done, rest| {
            let (places, left) = self.layout.locate(at);
            let piece = left.min(rest);
            for (slot, place) in places {
                self.slots[slot].iter().try_for_each(|leg| act(leg, place, done, piece))?;
            }
            Ok(piece)
        })
    }

    /// Calls `act` for every piece of a range of an array with parity.
    fn on_rows(
        &self,
        parity: &Parity,
        offset: u64,
        len: u64,
        mut act: impl FnMut(&Row, u64, u64, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        self.pieces(offset, len, |at, done, rest| {
            let (row, index, place, left) = parity.locate(at);
            let piece = left.min(rest).min(PIECE);
            act(&row, index, place, to_usize(done)..to_usize(done + piece))?;
            Ok(piece)
        })
    }
}

impl BlockDevice for ArrayDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.locked.is_some() || self.legs().any(|leg| leg.data.read_only())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if let Layout::Parity(parity) = &self.layout {
            return self.on_rows(parity, offset, buf.len() as u64, |row, index, place, range| {
                self.read_row(parity, row, index, &mut buf[range], place)
            });
        }
        self.pieces(offset, buf.len() as u64, |at, done, rest| {
            let (places, left) = self.layout.locate(at);
            let piece = left.min(rest);
            self.read_copies(&places, &mut buf[to_usize(done)..to_usize(done + piece)])
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.prepare()?;
        if let Layout::Parity(parity) = &self.layout {
            let _alone = self.sums.lock();
            return self.on_rows(parity, offset, buf.len() as u64, |row, index, place, range| {
                self.write_row(parity, row, index, &buf[range], place)
            });
        }
        self.on_legs(offset, buf.len() as u64, |leg, place, done, len| {
            leg.data.write_at(&buf[to_usize(done)..to_usize(done + len)], place)
        })
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        check_range(offset, len, self.size)?;
        self.prepare()?;
        let Layout::Parity(parity) = &self.layout else {
            return self
                .on_legs(offset, len, |leg, place, _, len| leg.data.write_zeroes_at(place, len, mode));
        };
        if mode.no_fallback {
            return Err(Error::unsupported("zeros change the sums of the array"));
        }
        let (_alone, zeros) = (self.sums.lock(), vec![0; to_usize(PIECE)]);
        self.on_rows(parity, offset, len, |row, index, place, range| {
            self.write_row(parity, row, index, &zeros[..range.len()], place)
        })
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size)?;
        self.prepare()?;
        // The legs must go on to hold the same, and what a discarded range reads as is up to each of them.
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.legs().try_for_each(|leg| leg.data.flush())
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size)?;
        let (places, left) = self.layout.locate(offset);
        let len = left.min(max_len).min(self.size - offset).max(1);
        let Some((leg, at, len)) = self.best(&places, len) else {
            return Ok(LayerExtent::new(Stored::Data, len.min(PIECE)));
        };
        let found = extent(&leg.data, at, len)?;
        // What no layer of a member stores reads as zeros.
        let stored = if found.stored == Stored::Absent { Stored::Zero } else { found.stored };
        Ok(LayerExtent { stored, len: found.len, host_offset: None, reads_zero: found.zero })
    }
}
