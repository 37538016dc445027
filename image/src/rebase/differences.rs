//! Finding where the old and the new chain behind an image differ, and keeping the old bytes in the image there.
//!
//! ```text
//!    overlay    ..####....##.......     what it stores itself stays as it is
//!    old chain  aa  ccc bb  ........    read only where its own members, or the new chain's, store something:
//!    new chain  xx  ccc yyyy.......     what both share is never read
//!                |       |
//!                +-------+--> compared, and the old bytes written to the overlay where they differ
//! ```
//!
//! What is written are the bytes that the overlay reads as anyway, so that it holds the same contents after
//! every single write, with the old backing file: an interruption does no harm at any moment.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use block::align::AlignedBuf;
use block::num::to_usize;
use block::zero::is_zero;
use block::{BlockDevice as _, Compressed, CompressedWriter, Error, Result, ResultExt as _, Stored};
use qcow2::Qcow2;

use super::side::{Holds, Side, SideLook};
use crate::convert::crew::{Crew, Piece, Pieces};
use crate::convert::engine::{add_run, buffer, workers_for};
use crate::progress::{Meter, Progress};

/// Bytes that a worker compares at once, where no cluster is larger.
const CHUNK: u64 = 512 << 10;
/// How far ahead tables are looked at.
const WINDOW: u64 = 1 << 30;

/// How differences are copied.
#[derive(Debug, Clone, Copy)]
pub struct CopyOptions {
    /// How many workers there are (at least 1).
    pub threads: usize,
    /// Clusters are stored compressed.
    pub compress: bool,
}

/// What has been done, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// Read and compared.
    pub compared: u64,
    /// Written to the overlay.
    pub written: u64,
    /// Of these, the ones that are zeros without space.
    pub zeroed: u64,
}

/// Writes to `overlay` what it reads as through its `old` chain and would not through the `new` one. Its contents
/// do not change. Nothing is flushed.
///
/// # Errors
/// The first error in the order of offsets that was met, with qemu's words; `Cancelled`.
pub fn copy_differences(
    overlay: &Qcow2,
    old: &Side,
    new: &Side,
    options: CopyOptions,
    progress: &dyn Progress,
) -> Result<Copied> {
    let limits = overlay.limits();
    let cluster = u64::from(limits.preferred);
    let chunk = CHUNK.max(cluster);
    let plan = Plan {
        overlay,
        old,
        new,
        size: overlay.size(),
        unit: limits.discard_granularity.max(512).into(),
        cluster,
        chunk,
    };
    let compressor = match options.compress {
        true => Some(overlay.compressed_writer().ok_or_else(|| {
            Error::unsupported("Error while writing to COW image: Operation not supported")
        })?),
        false => None,
    };
    let job = Job {
        plan: &plan,
        compressor,
        crew: Crew::new(Cursor::new(&plan), Meter::new(progress, plan.size), true),
        compared: AtomicU64::new(0),
        written: AtomicU64::new(0),
        zeroed: AtomicU64::new(0),
    };
    job.run(workers_for(options.threads, plan.size, chunk))
}

/// What stays the same all the time.
struct Plan<'a> {
    overlay: &'a Qcow2,
    old: &'a Side,
    new: &'a Side,
    /// Of the overlay, in bytes.
    size: u64,
    /// Bytes that the overlay stores or does not store as a whole: a cluster, or a subcluster.
    unit: u64,
    cluster: u64,
    chunk: u64,
}

/// A range that the overlay does not store and that may have to be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Item {
    /// Its number: 0, 1, 2.. in the order of offsets.
    ticket: u64,
    offset: u64,
    len: u64,
    /// The old chain may hold something other than zeros.
    old: bool,
    /// So may the new one.
    new: bool,
}

/// Walks the disk.
struct Cursor<'a> {
    plan: &'a Plan<'a>,
    position: u64,
    skipped: u64,
    ticket: u64,
    /// End of the range at the position that the overlay stores or does not store, and which.
    own: (u64, bool),
    old: SideLook<'a>,
    new: SideLook<'a>,
}

/// What has to be done from the position on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Skip,
    Compare { old: bool, new: bool },
}

impl Piece for Item {
    fn ticket(&self) -> u64 {
        self.ticket
    }

    fn offset(&self) -> u64 {
        self.offset
    }

    fn len(&self) -> u64 {
        self.len
    }
}

impl Pieces for Cursor<'_> {
    type Piece = Item;

    fn next(&mut self) -> Result<Option<Item>> {
        while self.position < self.plan.size {
            let (end, class) = self.classify(self.position)?;
            let whole = self.whole_units(end);
            match class {
                Class::Skip if whole > self.position => {
                    self.skipped += whole - self.position;
                    self.position = whole;
                }
                Class::Compare { old, new } if whole > self.position => {
                    let end = self.extend(whole)?;
                    return Ok(Some(self.item(end, old || end > whole, new || end > whole)));
                }
                // A unit that is not of one kind.
                _ => {
                    let end = self.extend(self.next_unit(self.position))?;
                    return Ok(Some(self.item(end, true, true)));
                }
            }
        }
        Ok(None)
    }

    fn position(&self) -> u64 {
        self.position
    }

    fn take_skipped(&mut self) -> u64 {
        std::mem::take(&mut self.skipped)
    }
}

impl<'a> Cursor<'a> {
    fn new(plan: &'a Plan<'a>) -> Self {
        Self {
            plan,
            position: 0,
            skipped: 0,
            ticket: 0,
            own: (0, false),
            old: plan.old.look(),
            new: plan.new.look(),
        }
    }

    /// Makes a piece that ends at `end` longer while there is something to compare, up to the next multiple of the
    /// chunk, so that pieces do not fall apart where the chains are finely cut.
    fn extend(&mut self, mut end: u64) -> Result<u64> {
        let limit = ((self.position / self.plan.chunk + 1) * self.plan.chunk).min(self.plan.size);
        while end < limit {
            let (next, class) = self.classify(end)?;
            if class == Class::Skip && self.whole_units(next) > end {
                break;
            }
            end = self.whole_units(next).max(self.next_unit(end));
        }
        Ok(end.min(limit))
    }

    fn item(&mut self, end: u64, old: bool, new: bool) -> Item {
        let item = Item { ticket: self.ticket, offset: self.position, len: end - self.position, old, new };
        self.ticket += 1;
        self.position = end;
        item
    }

    /// What is to be done at `offset`, and up to where.
    fn classify(&mut self, offset: u64) -> Result<(u64, Class)> {
        if offset >= self.own.0 {
            let found = self.plan.overlay.layer_extent(offset, WINDOW.min(self.plan.size - offset));
            let found = found.context(|| block_status(offset))?;
            // A unit is stored as a whole, also where the file has a hole in it.
            let stored = found.stored != Stored::Absent;
            let end = offset + found.len;
            let whole = end.next_multiple_of(self.plan.unit).min(self.plan.size);
            self.own = (if stored { whole } else { end }, stored);
        }
        let (own_end, stored) = self.own;
        if stored {
            return Ok((own_end, Class::Skip));
        }
        let left = own_end - offset;
        let (old, len) = self.old.holds(offset, left).context(|| block_status(offset))?;
        let (new, len) = self.new.holds(offset, len).context(|| block_status(offset))?;
        let (old, new, len) = match (old, new) {
            (Holds::Common, Holds::Common) => return Ok((offset + len, Class::Skip)),
            (Holds::Common, new) => {
                let (old, len) = self.old.holds_at_all(offset, len).context(|| block_status(offset))?;
                (old, new, len)
            }
            (old, Holds::Common) => {
                let (new, len) = self.new.holds_at_all(offset, len).context(|| block_status(offset))?;
                (old, new, len)
            }
            both => (both.0, both.1, len),
        };
        let (old, new) = (old != Holds::Zeros, new != Holds::Zeros);
        Ok((offset + len, if old || new { Class::Compare { old, new } } else { Class::Skip }))
    }

    /// `offset`, rounded down to whole units; the end of the disk counts as the end of one.
    fn whole_units(&self, offset: u64) -> u64 {
        if offset >= self.plan.size { self.plan.size } else { offset / self.plan.unit * self.plan.unit }
    }

    fn next_unit(&self, offset: u64) -> u64 {
        ((offset / self.plan.unit + 1) * self.plan.unit).min(self.plan.size)
    }
}

fn block_status(offset: u64) -> String {
    format!("error while reading block status at offset {offset}")
}

/// The work under way.
struct Job<'a> {
    plan: &'a Plan<'a>,
    compressor: Option<&'a dyn CompressedWriter>,
    crew: Crew<'a, Cursor<'a>>,
    compared: AtomicU64,
    written: AtomicU64,
    zeroed: AtomicU64,
}

/// What becomes of a range of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    Plain,
    Zero,
    Packed,
}

/// A worker's memory.
struct Scratch {
    old: AlignedBuf,
    new: AlignedBuf,
}

impl Job<'_> {
    fn run(self, workers: usize) -> Result<Copied> {
        let chunk = self.plan.chunk;
        let scratch = || Scratch { old: buffer(chunk), new: buffer(chunk) };
        self.crew.run(workers, scratch, |item, scratch| self.perform(item, scratch))?;
        Ok(Copied {
            compared: self.compared.into_inner(),
            written: self.written.into_inner(),
            zeroed: self.zeroed.into_inner(),
        })
    }

    fn perform(&self, item: &Item, scratch: &mut Scratch) -> Result<()> {
        let len = to_usize(item.len);
        let (old, new) = (&mut scratch.old[..], &mut scratch.new[..len]);
        read(self.plan.old, &mut old[..len], item.offset, item.old)
            .context(|| "error while reading from old backing file".to_owned())?;
        read(self.plan.new, new, item.offset, item.new)
            .context(|| "error while reading from new backing file".to_owned())?;
        self.compared.fetch_add(item.len, Ordering::Relaxed);
        match self.compressor {
            Some(compressor) => self.store_compressed(item, old, new, compressor),
            None => {
                let runs = runs(&old[..len], new, to_usize(self.plan.unit), 0);
                self.crew.in_turn(item, || self.prepare(item.offset, &runs))?;
                self.write_plain(item.offset, &old[..len], &runs)
            }
        }
    }

    /// What gives out space, in turn: zeros, and room for what will be written.
    fn prepare(&self, start: u64, runs: &[(Range<usize>, bool)]) -> Result<()> {
        for (run, zero) in runs {
            let (at, len) = (start + run.start as u64, run.len() as u64);
            match zero {
                true => self.zero(at, len)?,
                false => self.plan.overlay.reserve(at, len).context(write_error)?,
            }
        }
        Ok(())
    }

    fn write_plain(&self, start: u64, old: &[u8], runs: &[(Range<usize>, bool)]) -> Result<()> {
        if self.crew.is_aborted() {
            return Ok(());
        }
        runs.iter()
            .filter(|(_, zero)| !zero)
            .try_for_each(|(run, _)| self.write(&old[run.clone()], start + run.start as u64))
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.plan.overlay.write_at(bytes, offset).context(write_error)
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.written.fetch_add(len, Ordering::Relaxed);
        self.zeroed.fetch_add(len, Ordering::Relaxed);
        self.plan.overlay.write_own_zeroes(offset, len).context(write_error)
    }

    /// Stores whole clusters compressed where all of one is to come from the chains, the rest as it is. Compression
    /// happens in all threads at once.
    fn store_compressed(
        &self,
        item: &Item,
        old: &mut [u8],
        new: &[u8],
        compressor: &dyn CompressedWriter,
    ) -> Result<()> {
        let (cluster, len) = (to_usize(self.plan.cluster), to_usize(item.len));
        let end = item.offset + item.len;
        let mut stored = Vec::new();
        let mut at = 0;
        while at < len {
            let offset = item.offset + at as u64;
            let next = ((offset / self.plan.cluster + 1) * self.plan.cluster).min(end);
            let range = at..to_usize(next - item.offset);
            at = range.end;
            let whole = offset.is_multiple_of(self.plan.cluster)
                && (range.len() == cluster || next == self.plan.size);
            if !whole {
                // A part of a cluster that the overlay stores in part.
                let found =
                    runs(&old[range.clone()], &new[range.clone()], to_usize(self.plan.unit), range.start);
                stored.extend(
                    found
                        .into_iter()
                        .map(|(run, zero)| (run, if zero { Store::Zero } else { Store::Plain }, None)),
                );
            } else if old[range.clone()] != new[range.clone()] {
                stored.push(self.pack(old, range, compressor)?);
            }
        }
        self.crew.in_turn(item, || {
            stored.iter().try_for_each(|(run, store, packed)| {
                let offset = item.offset + run.start as u64;
                match (store, packed) {
                    (Store::Zero, _) => self.zero(offset, run.len() as u64),
                    (Store::Packed, Some(packed)) => {
                        self.written.fetch_add(run.len() as u64, Ordering::Relaxed);
                        compressor.write_compressed(std::slice::from_ref(packed), offset).context(write_error)
                    }
                    _ => self.write(&old[run.clone()], offset),
                }
            })
        })
    }

    /// Compresses one cluster; the disk's last one is padded with zeros.
    fn pack(
        &self,
        old: &mut [u8],
        range: Range<usize>,
        compressor: &dyn CompressedWriter,
    ) -> Result<(Range<usize>, Store, Option<Compressed>)> {
        if is_zero(&old[range.clone()]) {
            return Ok((range, Store::Zero, None));
        }
        let full = range.start..range.start + to_usize(self.plan.cluster);
        old[range.end..full.end].fill(0);
        match compressor.compress(&old[full])? {
            Compressed::Incompressible => Ok((range, Store::Plain, None)),
            packed => Ok((range, Store::Packed, Some(packed))),
        }
    }
}

fn write_error() -> String {
    "Error while writing to COW image".to_owned()
}

/// Fills `buf` from a chain, or with zeros where that is known to hold nothing else.
fn read(side: &Side, buf: &mut [u8], offset: u64, holds: bool) -> Result<()> {
    if holds {
        return side.read_at(buf, offset);
    }
    buf.fill(0);
    Ok(())
}

/// The ranges, in units, in which `old` differs from `new`, and whether they are zeros in `old`. Positions are
/// counted from `start`.
fn runs(old: &[u8], new: &[u8], unit: usize, start: usize) -> Vec<(Range<usize>, bool)> {
    let mut found = Vec::new();
    for (index, (ours, theirs)) in old.chunks(unit).zip(new.chunks(unit)).enumerate() {
        if ours != theirs {
            let at = start + index * unit;
            add_run(&mut found, at..at + ours.len(), is_zero(ours));
        }
    }
    found
}
