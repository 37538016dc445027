//! The workers: each takes the next piece of the plan, reads it, looks for zeros, and writes it.
//!
//! There is no reader and no writer thread. A worker does everything for its piece, so that the bytes are
//! still in its processor's cache when they are written. What must happen in order - giving out space in
//! the target, so that its layout does not depend on luck - is done in turns, between reading and writing.
//!
//! Memory: every worker holds one piece (512 KiB, or the target's cluster or the `-S` size where that is more),
//! two where it compares, and when compressing at most as much again of compressed bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use block::align::AlignedBuf;
use block::num::to_usize;
use block::zero::{is_zero, runs};
use block::{BlockDevice, Compressed, CompressedWriter, Error, Result, ResultExt as _, ZeroMode};

use super::crew::{Crew, Pieces as _};
use super::plan::{Action, Cursor, Fresh, Item, Plan, Sharing};
use super::salvage::{Losses, Salvage};
use super::source::{Place, SECTOR, Source};
use crate::progress::{Meter, Progress};
use crate::rate::RateLimit;

/// Bytes that a worker reads and writes at once, where nothing demands more.
const CHUNK: u64 = 512 << 10;
/// The alignment of buffers, which suits O_DIRECT everywhere.
const BUFFER_ALIGNMENT: usize = 4096;

/// How devices are converted.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// How many workers there are (at least 1).
    pub threads: usize,
    /// Bytes that are read and written at once; `None`: what has proved itself.
    pub chunk: Option<u64>,
    /// Zeros of at least this many bytes become holes in the target. 0: none do, the target takes space for all.
    pub sparse: u64,
    /// Whether zeros take space in the target when they are written as zeros that are to be allocated (raw
    /// images). Otherwise they have to be written like data, if `sparse` is 0.
    pub allocates_zeros: bool,
    /// What the target reads as before the convert.
    pub fresh: Fresh,
    /// Space in the target is given out in the order of guest offsets.
    pub ordered: bool,
    /// Clusters are stored compressed.
    pub compress: bool,
    /// The kernel may be asked to share blocks instead of copying them.
    pub share: bool,
    /// What cannot be read is replaced by zeros and reported.
    pub salvage: bool,
    /// At most this many bytes per second.
    pub rate: Option<u64>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            threads: default_threads(),
            chunk: None,
            sparse: 4096,
            allocates_zeros: false,
            fresh: Fresh::Zeros,
            ordered: true,
            compress: false,
            share: true,
            salvage: false,
            rate: None,
        }
    }
}

/// As many workers as there are processors, but at least 2 and at most 16.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16)
}

/// What a convert has done, in bytes of the guest's disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Read and written.
    pub copied: u64,
    /// Read and found to be zero.
    pub found_zero: u64,
    /// Shared by the kernel.
    pub shared: u64,
    /// What could not be read.
    pub losses: Losses,
}

/// Makes `target` hold what `source` holds. Bytes of the target past the source's end stay as they are; so does
/// what is not written yet to disk: the caller flushes.
///
/// # Errors
/// The first error in the order of offsets that was met, with qemu's words; `Cancelled`. The target is
/// incomplete then.
pub fn convert_devices(
    source: &Source,
    target: &dyn BlockDevice,
    options: &EngineOptions,
    progress: &dyn Progress,
) -> Result<Tally> {
    if target.size() < source.size() {
        return Err(Error::usage("output file is smaller than input file"));
    }
    let compressor = match options.compress {
        true => Some(target.compressed_writer().ok_or_else(compression_unsupported)?),
        false => None,
    };
    let plan = plan(source, target, options, compressor);
    let total = estimate(&plan, progress)?;
    let job = Job::new(
        &plan,
        options,
        compressor,
        Meter::new(progress, total.unwrap_or(source.size())),
        total.is_none(),
    );
    job.run(workers_for(options.threads, source.size(), plan.chunk))
}

/// The format cannot store compressed clusters.
pub(crate) fn compression_unsupported() -> Error {
    Error::usage("Compression not supported for this file format")
}

/// No more workers than there are pieces.
pub(crate) fn workers_for(threads: usize, size: u64, chunk: u64) -> usize {
    usize::try_from(size.div_ceil(chunk)).unwrap_or(usize::MAX).clamp(1, threads.max(1))
}

fn plan<'a>(
    source: &'a Source,
    target: &'a dyn BlockDevice,
    options: &EngineOptions,
    compressor: Option<&dyn CompressedWriter>,
) -> Plan<'a> {
    let cluster =
        compressor.map_or(target.limits().preferred, |writer| writer.cluster_size()).max(512).into();
    let wanted = options.chunk.unwrap_or(CHUNK);
    let unit = options.sparse.max(1).next_multiple_of(cluster);
    // What has contents already is written to as finely as the source is stored: completing its clusters is its own
    // affair, and two workers in one cluster are no harm there.
    let cluster = if matches!(options.fresh, Fresh::Base { .. }) { SECTOR } else { cluster };
    Plan {
        source,
        target,
        fresh: options.fresh,
        cluster,
        chunk: (wanted / unit).max(1) * unit,
        keep_zeros: options.sparse == 0,
        copy_zeros: options.compress || !options.allocates_zeros,
        salvage: options.salvage,
        sharing: Sharing::new(options.share && !options.compress && !options.salvage),
    }
}

/// Bytes that are looked at together for zeros: a hole in less than the target can leave out saves nothing.
fn zero_unit(sparse: u64, plan: &Plan<'_>) -> u64 {
    let smallest = u64::from(plan.target.limits().discard_granularity).max(1);
    let smallest =
        if matches!(plan.fresh, Fresh::Base { .. }) { smallest } else { smallest.min(plan.cluster) };
    sparse.max(1).next_multiple_of(smallest)
}

/// How much there is to do, if anybody wants to know.
fn estimate(plan: &Plan<'_>, progress: &dyn Progress) -> Result<Option<u64>> {
    if !progress.wants_estimate() {
        return Ok(None);
    }
    let (mut cursor, mut total) = (Cursor::new(plan), 0u64);
    while let Some(item) = cursor.next()? {
        total += item.len;
        if progress.cancelled() {
            return Err(crate::progress::cancelled());
        }
    }
    Ok(Some(total))
}

/// A convert under way.
struct Job<'a> {
    plan: &'a Plan<'a>,
    crew: Crew<'a, Cursor<'a>>,
    ordered: bool,
    /// Bytes that are looked at together for zeros.
    unit: usize,
    compressor: Option<&'a dyn CompressedWriter>,
    salvage: Option<Salvage<'a>>,
    rate: Option<RateLimit>,
    copied: AtomicU64,
    found_zero: AtomicU64,
    shared: AtomicU64,
}

/// A worker's memory.
struct Scratch {
    data: AlignedBuf,
    /// What the target's backing device holds, where that is wanted.
    other: Option<AlignedBuf>,
    /// Ranges of the buffer, and whether they are zero.
    runs: Vec<(Range<usize>, bool)>,
    packed: Vec<Compressed>,
}

impl<'a> Job<'a> {
    fn new(
        plan: &'a Plan<'a>,
        options: &EngineOptions,
        compressor: Option<&'a dyn CompressedWriter>,
        meter: Meter<'a>,
        count_skipped: bool,
    ) -> Self {
        Self {
            plan,
            ordered: options.ordered,
            unit: to_usize(zero_unit(options.sparse, plan)),
            compressor,
            salvage: options.salvage.then(|| Salvage::new(plan.source, meter.listener())),
            rate: options.rate.map(RateLimit::new),
            crew: Crew::new(Cursor::new(plan), meter, count_skipped),
            copied: AtomicU64::new(0),
            found_zero: AtomicU64::new(0),
            shared: AtomicU64::new(0),
        }
    }

    /// Works with `workers` threads, this one included.
    fn run(self, workers: usize) -> Result<Tally> {
        let scratch = || Scratch::new(self.plan.chunk);
        self.crew.run(workers, scratch, |item, scratch| self.perform(item, scratch))?;
        Ok(Tally {
            copied: self.copied.into_inner(),
            found_zero: self.found_zero.into_inner(),
            shared: self.shared.into_inner(),
            losses: self.salvage.map(Salvage::into_losses).unwrap_or_default(),
        })
    }

    fn perform(&self, item: &Item<'a>, scratch: &mut Scratch) -> Result<()> {
        match item.action {
            Action::Zero => self.in_turn(item, || self.zero(item.offset, item.len)),
            Action::Share(place) => self.share(item, &place, scratch),
            Action::Copy => {
                let data = scratch.data(item.len);
                self.read(data, item.offset)?;
                self.rate_limit(item.len)?;
                match self.compressor {
                    Some(compressor) => self.store_compressed(item, scratch, compressor),
                    None => self.store(item, scratch),
                }
            }
            Action::Difference => {
                self.read_both(item, scratch)?;
                self.rate_limit(item.len)?;
                self.store_differences(item, scratch)
            }
        }
    }

    /// Calls `act` in the order of tickets, or at once if nobody wants an order. Does nothing if the job has been
    /// aborted.
    fn in_turn(&self, item: &Item<'a>, act: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.ordered { self.crew.in_turn(item, act) } else { act() }
    }

    fn rate_limit(&self, bytes: u64) -> Result<()> {
        self.rate.as_ref().map_or(Ok(()), |rate| rate.pass(bytes, || self.crew.check()))
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match &self.salvage {
            Some(salvage) => {
                salvage.read(self.plan.source, buf, offset);
                Ok(())
            }
            None => self
                .plan
                .source
                .read_at(buf, offset)
                .context(|| format!("error while reading at byte {offset}")),
        }
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.copied.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.plan.target.write_at(buf, offset).context(|| write_error(offset))
    }

    fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let mode = if self.plan.keep_zeros { ZeroMode::ALLOCATE } else { ZeroMode::UNMAP };
        self.plan.target.write_zeroes_at(offset, len, mode).context(|| write_error(offset))
    }

    /// Whether zeros need not be written to a place that nothing has been written to yet.
    fn zeros_are_there(&self, offset: u64) -> bool {
        match self.plan.fresh {
            Fresh::Zeros => true,
            Fresh::Unknown | Fresh::Base { .. } => false,
            Fresh::Backing { .. } => {
                self.plan.target.backing().is_none_or(|backing| offset >= backing.size())
            }
        }
    }

    /// Writes the buffer, leaving out zeros.
    fn store(&self, item: &Item<'a>, scratch: &mut Scratch) -> Result<()> {
        let Scratch { data, runs: found, .. } = scratch;
        let data = &data[..to_usize(item.len)];
        found.clear();
        if self.plan.keep_zeros {
            found.push((0..data.len(), false));
        } else {
            found.extend(runs(data, self.unit));
        }
        self.store_runs(item, data, found)
    }

    /// Writes the data runs of `data` and makes the zero runs zero. What gives out space in the target is done
    /// in turn, the bytes themselves are moved outside it.
    fn store_runs(&self, item: &Item<'a>, data: &[u8], found: &[(Range<usize>, bool)]) -> Result<()> {
        let at = |run: &Range<usize>| item.offset + run.start as u64;
        self.in_turn(item, || {
            for (run, zero) in found {
                if *zero {
                    self.store_zero_run(at(run), run.len() as u64)?;
                } else if self.ordered {
                    self.plan.target.reserve(at(run), run.len() as u64).context(|| write_error(at(run)))?;
                }
            }
            Ok(())
        })?;
        if self.crew.is_aborted() {
            return Ok(());
        }
        found
            .iter()
            .filter(|(_, zero)| !zero)
            .try_for_each(|(run, _)| self.write(&data[run.clone()], at(run)))
    }

    fn store_zero_run(&self, offset: u64, len: u64) -> Result<()> {
        self.found_zero.fetch_add(len, Ordering::Relaxed);
        if self.zeros_are_there(offset) { Ok(()) } else { self.zero(offset, len) }
    }

    /// Compresses the buffer's clusters, all threads at once, and stores them in turn, packed in order.
    fn store_compressed(
        &self,
        item: &Item<'a>,
        scratch: &mut Scratch,
        compressor: &dyn CompressedWriter,
    ) -> Result<()> {
        let cluster = to_usize(self.plan.cluster);
        let Scratch { data, packed, .. } = scratch;
        // The disk's last cluster is padded with zeros.
        let (data, padding) = data.split_at_mut(to_usize(item.len));
        let padded = data.len().next_multiple_of(cluster);
        padding[..padded - data.len()].fill(0);
        let data = &scratch.data[..padded];
        packed.clear();
        for bytes in data.chunks(cluster) {
            packed.push(self.compress(bytes, compressor)?);
        }
        self.in_turn(item, || self.store_packed(item, data, packed, compressor))
    }

    /// A cluster of zeros becomes an empty [`Compressed::Packed`], unless zeros are to be kept.
    fn compress(&self, bytes: &[u8], compressor: &dyn CompressedWriter) -> Result<Compressed> {
        if !self.plan.keep_zeros && is_zero(bytes) {
            return Ok(Compressed::Packed(vec![]));
        }
        compressor.compress(bytes)
    }

    fn store_packed(
        &self,
        item: &Item<'a>,
        data: &[u8],
        packed: &[Compressed],
        compressor: &dyn CompressedWriter,
    ) -> Result<()> {
        let cluster = to_usize(self.plan.cluster);
        let mut index = 0;
        for same in packed.chunk_by(|a, b| sort_of(a) == sort_of(b)) {
            let range = index * cluster..((index + same.len()) * cluster).min(to_usize(item.len));
            let (offset, len) = (item.offset + range.start as u64, range.len() as u64);
            match same.first().map_or(Sort::Zero, sort_of) {
                Sort::Zero => self.store_zero_run(offset, len)?,
                Sort::Plain => self.write(&data[range], offset)?,
                Sort::Packed => {
                    self.copied.fetch_add(len, Ordering::Relaxed);
                    compressor.write_compressed(same, offset).context(|| write_error(offset))?;
                }
            }
            index += same.len();
        }
        Ok(())
    }

    fn read_both(&self, item: &Item<'a>, scratch: &mut Scratch) -> Result<()> {
        self.read(scratch.data(item.len), item.offset)?;
        let chunk = self.plan.chunk;
        let other = scratch.other.get_or_insert_with(|| buffer(chunk));
        let backing = self.plan.target.backing().map(|backing| &**backing);
        block::extent::read_backing(backing, &mut other[..to_usize(item.len)], item.offset)
            .context(|| format!("error while reading the backing file at byte {}", item.offset))
    }

    /// Writes the clusters that differ from what the target's backing device holds.
    fn store_differences(&self, item: &Item<'a>, scratch: &mut Scratch) -> Result<()> {
        let Scratch { data, other, runs: found, .. } = scratch;
        let len = to_usize(item.len);
        let (data, Some(other)) = (&data[..len], other) else { return Ok(()) };
        found.clear();
        let cluster = to_usize(self.plan.cluster);
        for (index, (ours, theirs)) in data.chunks(cluster).zip(other[..len].chunks(cluster)).enumerate() {
            if ours != theirs {
                add_run(
                    found,
                    index * cluster..index * cluster + ours.len(),
                    is_zero(ours) && !self.plan.keep_zeros,
                );
            }
        }
        if let Some(compressor) = self.compressor {
            return self.store_compressed_runs(item, data, found, compressor);
        }
        self.store_runs(item, data, found)
    }

    /// As [`store_compressed`](Self::store_compressed), for some ranges of the buffer.
    fn store_compressed_runs(
        &self,
        item: &Item<'a>,
        data: &[u8],
        found: &[(Range<usize>, bool)],
        compressor: &dyn CompressedWriter,
    ) -> Result<()> {
        let cluster = to_usize(self.plan.cluster);
        let mut stored = Vec::with_capacity(found.len());
        for (run, _) in found {
            let mut bytes = data[run.clone()].to_vec();
            bytes.resize(bytes.len().next_multiple_of(cluster), 0);
            let packed = bytes
                .chunks(cluster)
                .map(|bytes| self.compress(bytes, compressor))
                .collect::<Result<Vec<_>>>()?;
            let part = Item { offset: item.offset + run.start as u64, len: run.len() as u64, ..*item };
            stored.push((part, bytes, packed));
        }
        self.in_turn(item, || {
            stored
                .iter()
                .try_for_each(|(part, bytes, packed)| self.store_packed(part, bytes, packed, compressor))
        })
    }

    /// Lets the kernel share the piece, or copies it if it will not.
    fn share(&self, item: &Item<'a>, place: &Place<'_>, scratch: &mut Scratch) -> Result<()> {
        self.in_turn(item, || {
            let target = self.plan.target;
            let shared = target.clone_in(item.offset, item.len, &**place.storage, place.offset);
            if shared.context(|| write_error(item.offset))? {
                self.plan.sharing.worked();
                self.shared.fetch_add(item.len, Ordering::Relaxed);
                return Ok(());
            }
            self.plan.sharing.failed(place.storage);
            self.copy_here(item, scratch)
        })
    }

    /// Copies a piece of any length within the turn that the caller holds.
    fn copy_here(&self, item: &Item<'a>, scratch: &mut Scratch) -> Result<()> {
        let end = item.offset + item.len;
        let mut offset = item.offset;
        while offset < end {
            self.crew.check()?;
            let len = self.plan.chunk.min(end - offset);
            let data = scratch.data(len);
            self.read(data, offset)?;
            self.rate_limit(len)?;
            for (run, zero) in runs(data, self.unit) {
                let at = offset + run.start as u64;
                if zero && !self.plan.keep_zeros {
                    self.store_zero_run(at, run.len() as u64)?;
                } else {
                    self.write(&data[run], at)?;
                }
            }
            offset += len;
        }
        Ok(())
    }
}

impl Scratch {
    fn new(chunk: u64) -> Self {
        Self { data: buffer(chunk), other: None, runs: vec![], packed: vec![] }
    }

    /// The first `len` bytes of the buffer.
    fn data(&mut self, len: u64) -> &mut [u8] {
        &mut self.data[..to_usize(len)]
    }
}

pub(crate) fn buffer(len: u64) -> AlignedBuf {
    AlignedBuf::new(to_usize(len), BUFFER_ALIGNMENT)
}

fn write_error(offset: u64) -> String {
    format!("error while writing at byte {offset}")
}

/// Appends a range, merged with the one before where that is of the same kind and adjacent.
pub(crate) fn add_run(found: &mut Vec<(Range<usize>, bool)>, run: Range<usize>, zero: bool) {
    match found.last_mut() {
        Some((last, same)) if last.end == run.start && *same == zero => last.end = run.end,
        _ => found.push((run, zero)),
    }
}

/// The three ways in which a cluster is stored in a compressed image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Zero,
    Plain,
    Packed,
}

fn sort_of(compressed: &Compressed) -> Sort {
    match compressed {
        Compressed::Packed(bytes) if bytes.is_empty() => Sort::Zero,
        Compressed::Packed(_) => Sort::Packed,
        Compressed::Incompressible => Sort::Plain,
    }
}
