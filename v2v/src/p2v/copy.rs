//! Copying a disk in segments.
//!
//! ```text
//!   |  segment 0  |  segment 1  |  segment 2  | ..     a worker takes the next one, reads it in pieces, writes them,
//!       digest        digest        digest             and hashes them on the way
//!          '-------------+-------------'
//!              every few seconds: flush the target, then tell the caller, who remembers
//! ```
//!
//! A second run reads every segment of the source again; where the digest is still the same nothing is written, so that what
//! has changed meanwhile is copied once more. Unless the target is known to be the one that the digests are about, it is read,
//! too: a segment is there only if it has the digest. The digest covers what is copied: ranges that are left out count by their
//! place alone.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::num::to_usize;
use block::zero::is_zero;
use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _, ZeroMode};
use image::progress::Progress;
use sha2::{Digest as _, Sha256};

use super::state::Digest;

/// Bytes that are read and written at once.
const PIECE: u64 = 1 << 20;
/// Zeros of at least this many bytes, at multiples of it, are not written.
const GRAIN: usize = 64 << 10;
/// How often the target is flushed.
const CHECKPOINT: Duration = Duration::from_secs(3);
/// The longest that is slept at once, so that an interruption is noticed.
const NAP: Duration = Duration::from_millis(100);

/// Bytes per segment: a digest for each is remembered.
pub const SEGMENT: u64 = 16 << 20;

/// What to copy where.
#[derive(Debug)]
pub struct Job<'a> {
    /// The disk.
    pub source: Arc<dyn BlockDevice>,
    /// Ranges of it that hold nothing, in order: they are zeros in the copy.
    pub unused: &'a [Range<u64>],
    /// The copy, at least as large.
    pub target: Arc<dyn BlockDevice>,
    /// The target is all zeros, and nothing of this disk has been written to it.
    pub fresh: bool,
    /// Which segments to copy.
    pub part: Part<'a>,
    /// Segments that an earlier run has made safe.
    pub done: &'a BTreeMap<u64, Digest>,
    /// They are in this very target, and nobody else has written to it since. Otherwise it is read to find out.
    pub trusted: bool,
    /// Bytes per segment.
    pub segment_bytes: u64,
    /// How many workers there are.
    pub threads: usize,
    /// At most this many bytes per second are read.
    pub rate: Option<u64>,
}

/// A part of a disk, in whole segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// All segments.
    All,
    /// Those that have a byte of one of these ranges.
    Touching(&'a [Range<u64>]),
    /// The others.
    Rest(&'a [Range<u64>]),
}

impl Part<'_> {
    fn has(self, segment: &Range<u64>) -> bool {
        let touches = |range: &Range<u64>| range.start < segment.end && segment.start < range.end;
        match self {
            Self::All => true,
            Self::Touching(ranges) => ranges.iter().any(touches),
            Self::Rest(ranges) => !ranges.iter().any(touches),
        }
    }
}

/// What was done, in bytes of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Read.
    pub read: u64,
    /// Written.
    pub written: u64,
    /// Left out because they hold nothing.
    pub left_out: u64,
    /// Found to be the same as in an earlier run.
    pub unchanged: u64,
}

/// Remembers segments and their digests.
pub type Remember<'a> = dyn Fn(&[(u64, Digest)]) -> Result<()> + Sync + 'a;

#[derive(Debug, Default)]
struct Counters {
    read: AtomicU64,
    written: AtomicU64,
    left_out: AtomicU64,
    unchanged: AtomicU64,
}

impl Tally {
    /// This and another part of the same disk.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            read: self.read + other.read,
            written: self.written + other.written,
            left_out: self.left_out + other.left_out,
            unchanged: self.unchanged + other.unchanged,
        }
    }
}

impl Counters {
    fn tally(&self) -> Tally {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Tally {
            read: get(&self.read),
            written: get(&self.written),
            left_out: get(&self.left_out),
            unchanged: get(&self.unchanged),
        }
    }
}

/// Copies. `safe` is called with segments and their digests when they are durable.
///
/// # Errors
/// `Usage`: the target is smaller; reading or writing failed; `safe` failed; `Cancelled`. What `safe` was told of stays
/// true.
pub fn copy(job: &Job<'_>, progress: &dyn Progress, safe: &Remember<'_>) -> Result<Tally> {
    let size = job.source.size();
    if job.target.size() < size {
        let message = format!("the target has {} bytes, the disk {size}", job.target.size());
        return Err(Error::usage(message).hint("Make the image that is exported as large as the disk."));
    }
    let copier = Copier {
        job,
        progress,
        safe,
        next: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        counters: Counters::default(),
        reached: AtomicU64::new(0),
        pending: Mutex::new(Pending { segments: vec![], since: Instant::now() }),
        started: Instant::now(),
    };
    progress.update(0, size);
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..job.threads.max(1)).map(|_| scope.spawn(|| copier.work())).collect();
        let crashed = || Err(Error::new(ErrorKind::Io, "a worker has crashed"));
        workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| crashed())).collect()
    });
    // What has been copied is made safe even if something failed.
    let last = copier.checkpoint(true);
    results.into_iter().collect::<Result<()>>()?;
    last?;
    Ok(copier.counters.tally())
}

/// Compares the target with the digests of its segments.
///
/// # Errors
/// `Corrupt`: a segment is another; reading failed; `Cancelled`.
pub fn verify(job: &Job<'_>, digests: &BTreeMap<u64, Digest>, progress: &dyn Progress) -> Result<()> {
    let size = job.source.size();
    for (index, expected) in digests {
        if progress.cancelled() {
            return Err(cancelled());
        }
        let range = segment(*index, job.segment_bytes, size);
        if digest_of_copy(job, range.clone())? != *expected {
            let message =
                format!("the copy differs from the disk between {:#x} and {:#x}", range.start, range.end);
            return Err(
                Error::new(ErrorKind::Corrupt, message).hint("Run it again: what differs is copied again.")
            );
        }
        progress.update(range.end, size);
    }
    Ok(())
}

/// The digest of what the target has of a segment.
fn digest_of_copy(job: &Job<'_>, range: Range<u64>) -> Result<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; to_usize(PIECE)];
    for (piece, is_unused) in pieces(job.unused, range) {
        if is_unused {
            hash.update(mark(&piece));
            continue;
        }
        let bytes = &mut buffer[..to_usize(piece.end - piece.start)];
        let read = job.target.read_at(bytes, piece.start);
        read.context(|| format!("error while reading the copy at byte {}", piece.start))?;
        hash.update(&*bytes);
    }
    Ok(hash.finalize().into())
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "interrupted")
}

/// The bytes of a segment.
fn segment(index: u64, segment_bytes: u64, size: u64) -> Range<u64> {
    let start = index.saturating_mul(segment_bytes).min(size);
    start..start.saturating_add(segment_bytes).min(size)
}

/// What a range that is left out adds to a digest.
fn mark(range: &Range<u64>) -> [u8; 17] {
    let mut mark = [0xff; 17];
    mark[1..9].copy_from_slice(&range.start.to_le_bytes());
    mark[9..].copy_from_slice(&range.end.to_le_bytes());
    mark
}

/// A range in pieces, each with whether it is left out.
fn pieces(unused: &[Range<u64>], range: Range<u64>) -> Vec<(Range<u64>, bool)> {
    let mut pieces = vec![];
    let mut at = range.start;
    let mut index = unused.partition_point(|hole| hole.end <= at);
    while at < range.end {
        let hole = unused.get(index).filter(|hole| hole.start < range.end);
        let (end, is_unused) = match hole {
            Some(hole) if hole.start <= at => (hole.end.min(range.end), true),
            Some(hole) => ((at + PIECE).min(hole.start), false),
            None => ((at + PIECE).min(range.end), false),
        };
        pieces.push((at..end, is_unused));
        index += usize::from(is_unused);
        at = end;
    }
    pieces
}

struct Copier<'a> {
    job: &'a Job<'a>,
    progress: &'a dyn Progress,
    safe: &'a Remember<'a>,
    next: AtomicU64,
    stop: AtomicBool,
    counters: Counters,
    /// Bytes of the disk that have been dealt with.
    reached: AtomicU64,
    pending: Mutex<Pending>,
    started: Instant,
}

/// Segments that are written, but not durable yet.
struct Pending {
    segments: Vec<(u64, Digest)>,
    since: Instant,
}

impl Copier<'_> {
    fn work(&self) -> Result<()> {
        let worked = self.segments();
        if worked.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        worked
    }

    fn segments(&self) -> Result<()> {
        let size = self.job.source.size();
        let mut buffer = vec![0; to_usize(PIECE)];
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let range = segment(index, self.job.segment_bytes, size);
            if range.is_empty() || self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            if !self.job.part.has(&range) {
                if let Part::Rest(_) = self.job.part {
                    self.advance(range.end - range.start);
                }
                continue;
            }
            let digest = self.segment(index, range, &mut buffer)?;
            self.pending.lock().unwrap_or_else(PoisonError::into_inner).segments.push((index, digest));
            self.checkpoint(false)?;
        }
    }

    fn segment(&self, index: u64, range: Range<u64>, buffer: &mut [u8]) -> Result<Digest> {
        if let Some(known) = self.job.done.get(&index) {
            let digest = self.pass(range.clone(), buffer, false)?;
            if digest == *known && self.is_there(range.clone(), known)? {
                self.counters.unchanged.fetch_add(range.end - range.start, Ordering::Relaxed);
                self.advance(range.end - range.start);
                return Ok(digest);
            }
        }
        let digest = self.pass(range.clone(), buffer, true)?;
        self.advance(range.end - range.start);
        Ok(digest)
    }

    /// Whether a segment is in the target; what is left out of it is zeros then.
    fn is_there(&self, range: Range<u64>, known: &Digest) -> Result<bool> {
        if self.job.trusted {
            return Ok(true);
        }
        if digest_of_copy(self.job, range.clone())? != *known {
            return Ok(false);
        }
        for (piece, _) in pieces(self.job.unused, range).into_iter().filter(|(_, is_unused)| *is_unused) {
            self.zeros(piece.start, piece.end - piece.start)?;
        }
        Ok(true)
    }

    fn advance(&self, bytes: u64) {
        let reached = self.reached.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.progress.update(reached, self.job.source.size());
    }

    /// Reads a segment, and writes it if it is to be written.
    fn pass(&self, range: Range<u64>, buffer: &mut [u8], write: bool) -> Result<Digest> {
        let mut hash = Sha256::new();
        for (piece, is_unused) in pieces(self.job.unused, range) {
            if self.progress.cancelled() {
                return Err(cancelled());
            }
            let len = piece.end - piece.start;
            if is_unused {
                hash.update(mark(&piece));
                if write {
                    self.counters.left_out.fetch_add(len, Ordering::Relaxed);
                    self.zeros(piece.start, len)?;
                }
                continue;
            }
            let bytes = &mut buffer[..to_usize(len)];
            let read = self.job.source.read_at(bytes, piece.start);
            read.context(|| format!("error while reading at byte {}", piece.start))?;
            hash.update(&*bytes);
            if write {
                self.data(bytes, piece.start)?;
            }
            self.counters.read.fetch_add(len, Ordering::Relaxed);
            self.wait()?;
        }
        Ok(hash.finalize().into())
    }

    /// Writes data, runs of zeros as zeros.
    fn data(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let grains: Vec<(&[u8], bool)> = bytes.chunks(GRAIN).map(|grain| (grain, is_zero(grain))).collect();
        let mut at = 0;
        for run in grains.chunk_by(|one, other| one.1 == other.1) {
            let len: usize = run.iter().map(|(grain, _)| grain.len()).sum();
            let place = offset + at as u64;
            if run.first().is_some_and(|(_, zero)| *zero) {
                self.zeros(place, len as u64)?;
            } else {
                let written = self.job.target.write_at(&bytes[at..at + len], place);
                written.context(|| format!("error while writing at byte {place}"))?;
                self.counters.written.fetch_add(len as u64, Ordering::Relaxed);
            }
            at += len;
        }
        Ok(())
    }

    fn zeros(&self, offset: u64, len: u64) -> Result<()> {
        if self.job.fresh {
            return Ok(());
        }
        let written = self.job.target.write_zeroes_at(offset, len, ZeroMode::UNMAP);
        written.context(|| format!("error while writing zeros at byte {offset}"))
    }

    /// Sleeps as long as more has been read than the rate allows.
    fn wait(&self) -> Result<()> {
        let Some(rate) = self.job.rate.filter(|rate| *rate > 0) else { return Ok(()) };
        loop {
            let read = self.counters.read.load(Ordering::Relaxed);
            let due = Duration::from_millis(
                u64::try_from(u128::from(read) * 1000 / u128::from(rate)).unwrap_or(u64::MAX),
            );
            let Some(early) = due.checked_sub(self.started.elapsed()).filter(|early| !early.is_zero()) else {
                return Ok(());
            };
            if self.progress.cancelled() {
                return Err(cancelled());
            }
            std::thread::sleep(early.min(NAP));
        }
    }

    /// Makes what has been written durable, if it is time, and says so.
    fn checkpoint(&self, now: bool) -> Result<()> {
        let segments = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if pending.segments.is_empty() || !now && pending.since.elapsed() < CHECKPOINT {
                return Ok(());
            }
            pending.since = Instant::now();
            std::mem::take(&mut pending.segments)
        };
        self.job.target.flush().context(|| "error while flushing the target".to_owned())?;
        (self.safe)(&segments)
    }
}
