//! Whether two disks hold the same bytes, whatever their formats.
//!
//! What both sides know to be zero is never read, nor is what both take from the same place of the same
//! file. The rest is read and compared by several threads at once; the result is nevertheless the first
//! difference on the disk, because pieces are given out in order and none behind a difference that is
//! already known.

use std::fmt;
use std::os::fd::AsFd;

use block::align::AlignedBuf;
use block::num::to_usize;
use block::zero::is_zero;
use block::{BlockDevice, Error, Storage, Stored};
use parking_lot::Mutex;

use crate::convert::default_threads;
use crate::convert::source::{Kind, Look, Place, Source};
use crate::convert::workers;
use crate::open::Layer;
use crate::progress::{Meter, Progress, cancelled};

/// Bytes that are compared at once: two buffers of this size stay in a processor's cache.
const CHUNK: u64 = 512 << 10;
/// Differences are reported by the sector.
const SECTOR: u64 = 512;
/// How far ahead extents are asked for at first; grows while the answers fill it.
const FIRST_WINDOW: u64 = 1 << 30;
const BUFFER_ALIGNMENT: usize = 4096;

/// How disks are compared.
#[derive(Debug, Clone)]
pub struct CompareOptions {
    /// Sizes must be the same, and so must what is allocated and what is known to be zero.
    pub strict: bool,
    /// How many threads read and compare (at least 1).
    pub threads: usize,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self { strict: false, threads: default_threads() }
    }
}

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The same bytes. A shorter disk counts as continued by zeros.
    Identical,
    /// The first sector that differs begins at this byte.
    Content(u64),
    /// From this byte on the disks store different kinds of things (strict only).
    Status(u64),
    /// The sizes differ (strict only).
    Size,
}

/// The result of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Comparison {
    /// What was found.
    pub verdict: Verdict,
    /// The sizes in bytes, each rounded up to whole sectors.
    pub sizes: [u64; 2],
}

impl Comparison {
    /// Whether the sizes differ.
    pub fn sizes_differ(&self) -> bool {
        self.sizes[0] != self.sizes[1]
    }

    /// Whether the part that both disks have is the same, and the sizes differ: qemu-img says so before it
    /// goes on to the rest.
    pub fn warns_of_sizes(&self) -> bool {
        let common = self.sizes[0].min(self.sizes[1]);
        self.sizes_differ()
            && matches!(self.verdict, Verdict::Identical | Verdict::Content(_))
            && !matches!(self.verdict, Verdict::Content(offset) if offset < common)
    }
}

/// What a comparison was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Looking up how something is stored.
    BlockStatus,
    /// Reading.
    Read,
    /// Nothing: it was interrupted.
    Cancelled,
}

/// Why a comparison could not be finished.
#[derive(Debug)]
pub struct CompareError {
    /// What it was doing.
    pub stage: Stage,
    /// Which of the disks is to blame: 0 or 1.
    pub side: usize,
    /// Where.
    pub offset: u64,
    /// What happened.
    pub error: Error,
}

impl CompareError {
    /// The error in qemu's words. `names` are those of the disks.
    pub fn into_error(self, names: [&str; 2]) -> Error {
        let name = names[self.side & 1];
        match self.stage {
            Stage::BlockStatus => self.error.context(format!("Sector allocation test failed for {name}")),
            Stage::Read => {
                self.error.context(format!("Error while reading offset {} of {name}", self.offset))
            }
            Stage::Cancelled => self.error,
        }
    }
}

impl fmt::Display for CompareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for CompareError {}

/// Compares two images.
///
/// # Errors
/// Something cannot be read, or the caller interrupted.
pub fn compare(
    first: &Layer,
    second: &Layer,
    options: &CompareOptions,
    progress: &dyn Progress,
) -> Result<Comparison, CompareError> {
    compare_devices([&first.device(), &second.device()], options, progress)
}

/// Compares two disks.
///
/// # Errors
/// As [`compare`].
pub fn compare_devices(
    devices: [&std::sync::Arc<dyn BlockDevice>; 2],
    options: &CompareOptions,
    progress: &dyn Progress,
) -> Result<Comparison, CompareError> {
    let side = |side: usize| {
        Source::new([std::sync::Arc::clone(devices[side])]).map_err(|error| CompareError {
            stage: Stage::Read,
            side,
            offset: 0,
            error,
        })
    };
    let disks = [side(0)?, side(1)?];
    let sizes = [disks[0].size(), disks[1].size()];
    if options.strict && devices[0].size() != devices[1].size() {
        return Ok(Comparison { verdict: Verdict::Size, sizes });
    }
    let size = sizes[0].max(sizes[1]);
    let job = Job {
        disks: &disks,
        cursor: Mutex::new(Cursor::new(&disks, options.strict)),
        end: Mutex::new(None),
        meter: Meter::new(progress, size),
    };
    let workers =
        usize::try_from(size.div_ceil(CHUNK)).unwrap_or(usize::MAX).clamp(1, options.threads.max(1));
    job.run(workers).map(|verdict| Comparison { verdict, sizes })
}

/// What ends a comparison before the end of the disks.
#[derive(Debug)]
enum End {
    Verdict(Verdict),
    Error(CompareError),
}

/// A piece of both disks.
#[derive(Debug, Clone, Copy)]
struct Piece {
    offset: u64,
    len: u64,
    /// Which sides have to be read; the other is zero.
    read: [bool; 2],
}

/// A comparison under way.
struct Job<'a> {
    disks: &'a [Source; 2],
    cursor: Mutex<Cursor<'a>>,
    /// The end that stands nearest to the start of the disks, of those met so far.
    end: Mutex<Option<(u64, End)>>,
    meter: Meter<'a>,
}

impl Job<'_> {
    fn run(self, workers: usize) -> Result<Verdict, CompareError> {
        let ended = workers::run(workers, || self.work());
        ended.map_err(|error| CompareError { stage: Stage::Read, side: 0, offset: 0, error })?;
        match self.end.into_inner() {
            None => {
                self.meter.finish();
                Ok(Verdict::Identical)
            }
            Some((_, End::Verdict(verdict))) => Ok(verdict),
            Some((_, End::Error(error))) => Err(error),
        }
    }

    fn work(&self) {
        let mut buffers = None;
        while let Some(piece) = self.next_piece() {
            let buffers = buffers.get_or_insert_with(|| [buffer(), buffer()]);
            match self.examine(&piece, buffers) {
                Ok(None) => self.meter.add(piece.len),
                Ok(Some(offset)) => self.end(offset, End::Verdict(Verdict::Content(offset))),
                Err(error) => self.end(error.offset, End::Error(error)),
            }
        }
    }

    /// The next piece that lies before the end that is known.
    fn next_piece(&self) -> Option<Piece> {
        let mut cursor = self.cursor.lock();
        if self.meter.check().is_err() {
            let error = CompareError { stage: Stage::Cancelled, side: 0, offset: 0, error: cancelled() };
            drop(cursor);
            self.end(0, End::Error(error));
            return None;
        }
        if self.end.lock().as_ref().is_some_and(|(end, _)| *end <= cursor.position) {
            return None;
        }
        let (next, skipped) = (cursor.next(), std::mem::take(&mut cursor.skipped));
        drop(cursor);
        if skipped > 0 {
            self.meter.add(skipped);
        }
        match next {
            Ok(piece) => piece,
            Err((offset, end)) => {
                self.end(offset, end);
                None
            }
        }
    }

    fn end(&self, offset: u64, new: End) {
        let mut end = self.end.lock();
        if end.as_ref().is_none_or(|(before, _)| offset < *before) {
            *end = Some((offset, new));
        }
    }

    /// Where the piece differs.
    fn examine(&self, piece: &Piece, buffers: &mut [AlignedBuf; 2]) -> Result<Option<u64>, CompareError> {
        let len = to_usize(piece.len);
        for side in [0, 1] {
            if piece.read[side] {
                self.disks[side].read_at(&mut buffers[side][..len], piece.offset).map_err(|error| {
                    CompareError { stage: Stage::Read, side, offset: piece.offset, error }
                })?;
            }
        }
        let [first, second] = &*buffers;
        let found = match piece.read {
            [true, true] => first_difference(&first[..len], &second[..len]),
            [true, false] => first_nonzero(&first[..len]),
            _ => first_nonzero(&second[..len]),
        };
        Ok(found.map(|index| {
            let byte = piece.offset + index as u64;
            (byte / SECTOR * SECTOR).max(piece.offset)
        }))
    }
}

/// Walks both disks and gives out what has to be read.
struct Cursor<'a> {
    disks: &'a [Source; 2],
    looks: [Look<'a>; 2],
    strict: bool,
    position: u64,
    window: u64,
    spans: [Option<Span<'a>>; 2],
    skipped: u64,
}

/// A range of one disk that is stored in one way.
#[derive(Debug, Clone, Copy)]
struct Span<'a> {
    start: u64,
    end: u64,
    status: Status,
    place: Option<Place<'a>>,
}

/// What `-s` compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Status {
    stored: Stored,
    zero: bool,
    has_place: bool,
}

impl<'a> Cursor<'a> {
    fn new(disks: &'a [Source; 2], strict: bool) -> Self {
        let looks = disks.each_ref().map(|disk| disk.look(u32::MAX));
        Self { disks, looks, strict, position: 0, window: FIRST_WINDOW, spans: [None; 2], skipped: 0 }
    }

    /// The next piece that has to be read.
    fn next(&mut self) -> Result<Option<Piece>, (u64, End)> {
        let size = self.disks[0].size().max(self.disks[1].size());
        while self.position < size {
            let offset = self.position;
            let (first, second) = (self.span(0, offset)?, self.span(1, offset)?);
            if self.strict && self.status_differs(&first, &second)? {
                return Err((offset, End::Verdict(Verdict::Status(offset))));
            }
            let end = first.end.min(second.end);
            if (first.status.zero && second.status.zero) || same_place(&first, &second, offset) {
                self.skipped += end - offset;
                self.position = end;
                continue;
            }
            let end = end.min((offset / CHUNK + 1).saturating_mul(CHUNK));
            self.position = end;
            return Ok(Some(Piece {
                offset,
                len: end - offset,
                read: [!first.status.zero, !second.status.zero],
            }));
        }
        Ok(None)
    }

    /// How `side` stores what lies at `offset`. Past the end of a disk there are zeros.
    fn span(&mut self, side: usize, offset: u64) -> Result<Span<'a>, (u64, End)> {
        match self.spans[side] {
            Some(span) if offset < span.end => Ok(span),
            _ => {
                let span = self.look_up(side, offset)?;
                self.spans[side] = Some(span);
                Ok(span)
            }
        }
    }

    fn look_up(&mut self, side: usize, offset: u64) -> Result<Span<'a>, (u64, End)> {
        let disks: &'a [Source; 2] = self.disks;
        let disk = &disks[side];
        if offset >= disk.size() {
            let status = Status { stored: Stored::Absent, zero: true, has_place: false };
            return Ok(Span { start: offset, end: u64::MAX, status, place: None });
        }
        let found =
            self.looks[side].extent(offset, self.window.min(disk.size() - offset)).map_err(|error| {
                (offset, End::Error(CompareError { stage: Stage::BlockStatus, side, offset, error }))
            })?;
        self.window = if found.len == self.window { self.window.saturating_mul(2) } else { FIRST_WINDOW };
        let status =
            Status { stored: found.stored, zero: found.kind == Kind::Zero, has_place: found.has_place };
        Ok(Span { start: offset, end: offset + found.len, status, place: found.place })
    }

    /// Whether the two spans are of different kinds. As qemu-img sees it, it makes a difference, too, whether
    /// everything up to the disk's end is of one kind.
    fn status_differs(&mut self, first: &Span<'_>, second: &Span<'_>) -> Result<bool, (u64, End)> {
        if first.status != second.status {
            return Ok(true);
        }
        let reaches_end =
            [self.reach(0, first.end, first.status)?, self.reach(1, second.end, second.status)?];
        Ok(reaches_end[0] != reaches_end[1])
    }

    /// Whether everything from `offset` to the end of a disk is of one kind.
    fn reach(&mut self, side: usize, mut offset: u64, status: Status) -> Result<bool, (u64, End)> {
        let size = self.disks[side].size();
        while offset < size {
            let next = self.look_up(side, offset)?;
            if next.status != status {
                return Ok(false);
            }
            offset = next.end;
        }
        Ok(true)
    }
}

/// Whether both spans take the byte at `offset` from the same place of the same file.
fn same_place(first: &Span<'_>, second: &Span<'_>, offset: u64) -> bool {
    let at = |span: &Span<'_>| span.place.map(|place| place.offset + (offset - span.start));
    match (first.place, second.place) {
        (Some(a), Some(b)) => at(first) == at(second) && same_storage(&**a.storage, &**b.storage),
        _ => false,
    }
}

/// Whether two containers are the same file or device.
fn same_storage(first: &dyn Storage, second: &dyn Storage) -> bool {
    let identity = |storage: &dyn Storage| {
        let stat = nix::sys::stat::fstat(storage.as_fd()?.as_fd()).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    matches!((identity(first), identity(second)), (Some(a), Some(b)) if a == b)
}

fn buffer() -> AlignedBuf {
    AlignedBuf::new(to_usize(CHUNK), BUFFER_ALIGNMENT)
}

/// The first byte that differs. Slices are compared as `memcmp` does, and only a difference is looked for byte by
/// byte.
fn first_difference(first: &[u8], second: &[u8]) -> Option<usize> {
    const BLOCK: usize = 4096;
    if first == second {
        return None;
    }
    let block = first.chunks(BLOCK).zip(second.chunks(BLOCK)).position(|(a, b)| a != b)? * BLOCK;
    let byte = first[block..].iter().zip(&second[block..]).position(|(a, b)| a != b)?;
    Some(block + byte)
}

/// The first byte that is not zero.
fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.iter().position(|byte| *byte != 0) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use block::Result;
    use proptest::prelude::*;

    use super::*;
    use crate::convert::testing::{Cell, Fake};
    use crate::progress::Quiet;

    fn compare(
        first: &Arc<Fake>,
        second: &Arc<Fake>,
        strict: bool,
    ) -> std::result::Result<Comparison, CompareError> {
        let device = |fake: &Arc<Fake>| Arc::clone(fake) as Arc<dyn BlockDevice>;
        let options = CompareOptions { strict, threads: 3 };
        compare_devices([&device(first), &device(second)], &options, &Quiet)
    }

    fn verdict(first: &Arc<Fake>, second: &Arc<Fake>, strict: bool) -> Verdict {
        compare(first, second, strict).unwrap().verdict
    }

    /// Sectors: nothing, explicit zeros, stored zeros, or data.
    fn disk(cells: &[u8]) -> Arc<Fake> {
        let fake = Fake::sized(cells.len() as u64 * SECTOR);
        for (index, kind) in (0..).zip(cells) {
            let cell = match kind {
                0 => continue,
                1 => Cell::Zero,
                2 => Cell::Data(vec![0; 512]),
                kind => Cell::Data((0..512u32).map(|i| if i == 300 { *kind } else { 0 }).collect()),
            };
            fake.cells.lock().insert(index, cell);
        }
        Arc::new(fake)
    }

    proptest! {
        #[test]
        fn the_verdict_is_that_of_the_bytes(
            first in proptest::collection::vec(0u8..4, 1..4000),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..6), 0..4),
            len in prop_oneof![3 => Just(4000usize), 1 => 1..4000usize],
        ) {
            let mut second = first.clone();
            for (at, kind) in changes {
                let at = at.index(second.len());
                second[at] = kind;
            }
            second.truncate(len);
            let (first, second) = (disk(&first), disk(&second));
            let (mut a, mut b) = (first.contents(), second.contents());
            let longer = a.len().max(b.len());
            a.resize(longer, 0);
            b.resize(longer, 0);
            let difference = a.iter().zip(&b).position(|(a, b)| a != b).map(|at| at as u64 / SECTOR * SECTOR);
            let expected = difference.map_or(Verdict::Identical, Verdict::Content);
            let found = compare(&first, &second, false).unwrap();
            prop_assert_eq!(found.verdict, expected);
            prop_assert_eq!(found.sizes_differ(), first.size != second.size);
        }
    }

    #[test]
    fn strictness_tells_kinds_of_zeros_apart() {
        let (nothing, zeros, stored) = (disk(&[0; 8]), disk(&[1; 8]), disk(&[2; 8]));
        assert_eq!(verdict(&nothing, &zeros, false), Verdict::Identical);
        assert_eq!(verdict(&nothing, &zeros, true), Verdict::Status(0));
        assert_eq!(verdict(&zeros, &stored, true), Verdict::Status(0));
        assert_eq!(verdict(&stored, &stored, true), Verdict::Identical);
        assert_eq!(verdict(&stored, &disk(&[2; 9]), true), Verdict::Size);
    }

    /// As qemu-img reports them: two empty images of which one has an explicit zero cluster somewhere differ from 0
    /// on, but where neither is of one kind to its end the place itself is reported.
    #[test]
    fn status_differences_are_where_qemu_sees_them() {
        assert_eq!(verdict(&disk(&[0; 8]), &disk(&[0, 0, 1, 0, 0, 0, 0, 0]), true), Verdict::Status(0));
        assert_eq!(verdict(&disk(&[0, 0, 2, 0]), &disk(&[0, 0, 1, 0]), true), Verdict::Status(1024));
        assert_eq!(verdict(&disk(&[3, 3, 0, 0]), &disk(&[3, 4, 0, 0]), true), Verdict::Content(512));
    }

    #[test]
    fn sizes_are_warned_of_once_the_common_part_is_the_same() {
        let longer = disk(&[3, 3, 3]);
        let warns = |other: &[u8]| compare(&longer, &disk(other), false).unwrap().warns_of_sizes();
        assert!(warns(&[3, 3]));
        assert!(!warns(&[3, 4]));
        assert!(!warns(&[3, 4, 3]));
    }

    /// An error in front of the first difference is reported rather than the difference: nobody knows what was there.
    #[test]
    fn what_comes_first_on_the_disk_is_reported() {
        let faulty = |at| {
            let mut fake = Arc::into_inner(disk(&[3; 4096])).unwrap();
            fake.bad_reads = vec![(at, None)];
            Arc::new(fake)
        };
        let mut cells = vec![3; 4096];
        cells[2000] = 4;
        let different = disk(&cells);
        for _ in 0..20 {
            let error = compare(&faulty(0), &different, false).unwrap_err();
            assert_eq!((error.stage, error.side), (Stage::Read, 0));
            assert_eq!(
                error.into_error(["a", "b"]).to_string(),
                "Error while reading offset 0 of a: Input/output error"
            );
            assert_eq!(verdict(&faulty(4095 * 512), &different, false), Verdict::Content(2000 * 512));
        }
    }

    #[test]
    fn a_failed_lookup_has_its_own_stage() {
        let mut fake = Arc::into_inner(disk(&[3; 8])).unwrap();
        fake.bad_extents = vec![0];
        let error = compare(&disk(&[3; 8]), &Arc::new(fake), false).unwrap_err();
        assert_eq!((error.stage, error.side), (Stage::BlockStatus, 1));
    }

    #[test]
    fn an_exbibyte_of_nothing_is_compared_at_once() {
        let huge = || {
            let fake = Fake::sized(1 << 60);
            fake.cells.lock().insert(1 << 50, Cell::Data(vec![1; 512]));
            Arc::new(fake)
        };
        let (first, second) = (huge(), huge());
        assert_eq!(verdict(&first, &second, false), Verdict::Identical);
        assert!(first.lookups.load(std::sync::atomic::Ordering::Relaxed) < 100);
    }

    #[test]
    fn the_same_bytes_of_the_same_file_are_not_read() {
        let file = tempfile::tempfile().unwrap();
        let host: Arc<dyn Storage> = Arc::new(OnlyDescriptor(file));
        let unreadable = || {
            let mut fake = Arc::into_inner(disk(&[3; 64])).unwrap();
            fake.host = Some(Arc::clone(&host));
            fake.bad_reads = vec![(0, None)];
            Arc::new(fake)
        };
        assert_eq!(verdict(&unreadable(), &unreadable(), false), Verdict::Identical);
        let mut elsewhere = Arc::into_inner(unreadable()).unwrap();
        elsewhere.host = Some(Arc::new(block::mem::MemStorage::new()));
        compare(&unreadable(), &Arc::new(elsewhere), false).unwrap_err();
    }

    #[derive(Debug)]
    struct OnlyDescriptor(std::fs::File);

    impl Storage for OnlyDescriptor {
        fn len(&self) -> Result<u64> {
            Ok(0)
        }
        fn set_len(&self, _len: u64) -> Result<()> {
            Ok(())
        }
        fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
            Ok(())
        }
        fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
            Ok(())
        }
        fn zero_range(&self, _offset: u64, _len: u64, _mode: block::ZeroMode) -> Result<()> {
            Ok(())
        }
        fn discard_range(&self, _offset: u64, _len: u64) -> Result<()> {
            Ok(())
        }
        fn allocate_range(&self, _offset: u64, _len: u64) -> Result<()> {
            Ok(())
        }
        fn sync(&self) -> Result<()> {
            Ok(())
        }
        fn extent(&self, _offset: u64, max_len: u64) -> Result<block::HostExtent> {
            Ok(block::HostExtent { data: true, len: max_len })
        }
        fn read_only(&self) -> bool {
            true
        }
        fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
        fn name(&self) -> String {
            "descriptor".to_owned()
        }
    }
}
