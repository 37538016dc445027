//! The guest side: a disk as its user sees it.

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::storage::Storage;

/// How zeros are to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroMode {
    /// The space under the range may be given back; the range reads as zeros either way.
    pub may_unmap: bool,
    /// Fail with [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) rather than write zeros
    /// byte by byte.
    pub no_fallback: bool,
}

impl ZeroMode {
    /// Zeros that may free the space under them.
    pub const UNMAP: Self = Self { may_unmap: true, no_fallback: false };
    /// Zeros that keep (or take) space, so that a later write cannot run out of it.
    pub const ALLOCATE: Self = Self { may_unmap: false, no_fallback: false };

    /// The same, but refusing to write zeros byte by byte.
    #[must_use]
    pub const fn fast(self) -> Self {
        Self { may_unmap: self.may_unmap, no_fallback: true }
    }
}

/// How much of a new or grown disk is given space ahead of the first write (qemu's words).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The format's tables, with sparse data behind them.
    Metadata,
    /// Tables and data, the data by `posix_fallocate`.
    Falloc,
    /// Tables and data, the data by writing zeros.
    Full,
}

/// What the user of a device should know to use it well. All values in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of requests need to be multiples of this (1 where anything goes). A
    /// device accepts unaligned requests all the same, by reading around them.
    pub alignment: u32,
    /// Requests in multiples of this avoid read-modify-write: the cluster or grain size.
    pub preferred: u32,
    /// Smallest range worth discarding.
    pub discard_granularity: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { alignment: 1, preferred: 4096, discard_granularity: 4096 }
    }
}

/// What one layer stores for a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stored {
    /// Bytes that have to be read.
    Data,
    /// Bytes that have to be read and inflated.
    Compressed,
    /// Known to read as zeros without looking (a zero cluster, a hole in a raw file).
    Zero,
    /// Nothing: the backing device answers, or zeros where there is none.
    Absent,
}

/// A range of guest bytes that one layer stores in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerExtent {
    /// How it is stored.
    pub stored: Stored,
    /// Length in bytes, at least 1, at most what was asked for.
    pub len: u64,
    /// Where the first byte lies in [`BlockDevice::host_storage`], if the bytes lie there as they
    /// are, contiguous for all of `len`. Also given for zeros that have space set aside.
    pub host_offset: Option<u64>,
    /// For [`Stored::Data`]: the host range is a hole, so that the data is known to be zeros
    /// (preallocated metadata over a sparse file).
    pub reads_zero: bool,
}

impl LayerExtent {
    /// An extent without a place.
    pub fn new(stored: Stored, len: u64) -> Self {
        Self { stored, len, host_offset: None, reads_zero: stored == Stored::Zero }
    }

    /// The same, lying at `offset` in the host storage.
    #[must_use]
    pub fn at(self, offset: u64) -> Self {
        Self { host_offset: Some(offset), ..self }
    }
}

/// A cluster in compressed form, ready to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compressed {
    /// The compressed bytes: fewer than the cluster has.
    Packed(Vec<u8>),
    /// It does not shrink: store it as it is.
    Incompressible,
}

/// The extra ability of formats that can store compressed clusters.
///
/// Split in two so that the expensive half, [`compress`](Self::compress), runs on all cores without
/// any lock, while the cheap half happens in whatever order the caller wants on disk.
pub trait CompressedWriter: Send + Sync {
    /// Bytes that are compressed as one unit.
    fn cluster_size(&self) -> u32;

    /// Compresses one cluster. Touches nothing. `data` is exactly [`cluster_size`](Self::cluster_size)
    /// bytes (the caller pads the disk's last cluster with zeros).
    ///
    /// # Errors
    /// The codec failed.
    fn compress(&self, data: &[u8]) -> Result<Compressed>;

    /// Stores consecutive clusters, packed back to back, the first at guest `offset` (a multiple of
    /// the cluster size). Every element must be [`Compressed::Packed`].
    ///
    /// # Errors
    /// The clusters are already allocated and the format cannot replace them, or the host failed.
    fn write_compressed(&self, clusters: &[Compressed], offset: u64) -> Result<()>;
}

/// A disk: a fixed number of bytes that can be read and written at any offset, from any thread.
///
/// A request is carried out in full or fails. Requests outside `0..size()` fail with
/// [`ErrorKind::OutOfRange`](crate::ErrorKind::OutOfRange). Implementations never panic because of
/// what an image contains. The methods that change something refuse, unless a device has them: it is
/// read-only then.
pub trait BlockDevice: Debug + Send + Sync {
    /// The size in bytes. Changes only by [`resize`](Self::resize).
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Preferred request shapes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Fills `buf` from `offset`, through the whole backing chain.
    ///
    /// # Errors
    /// Out of range, host failure, or an image that cannot be trusted at this place. The contents
    /// of `buf` are unspecified then.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`. Durable only after [`flush`](Self::flush).
    ///
    /// # Errors
    /// Out of range, read-only, host failure. Bytes of the range may have been written or not.
    fn write_at(&self, _buf: &[u8], _offset: u64) -> Result<()> {
        Err(Error::read_only())
    }

    /// Makes `len` bytes at `offset` read as zeros.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at); `Unsupported` if [`ZeroMode::no_fallback`] and it would be slow.
    fn write_zeroes_at(&self, _offset: u64, _len: u64, _mode: ZeroMode) -> Result<()> {
        Err(Error::read_only())
    }

    /// Says that the range is not needed any more. What it reads as afterwards is unspecified (old
    /// bytes or zeros), and any part of it may be left as it was.
    ///
    /// # Errors
    /// Out of range, read-only, host failure.
    fn discard_at(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::read_only())
    }

    /// When this returns, every write that had returned before the call is durable.
    ///
    /// # Errors
    /// The host failed; nothing is promised about the writes then.
    fn flush(&self) -> Result<()>;

    /// Flushes and leaves the image as a clean shutdown does (clears a dirty bit, returns what was
    /// reserved). The device stays usable.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    fn close(&self) -> Result<()> {
        self.flush()
    }

    /// Changes the size in bytes. New bytes read as zeros; bytes cut off are gone. Asking for less than
    /// the present size must be the caller's deliberate wish.
    ///
    /// # Errors
    /// The format or the state of the image does not allow it, or the host failed.
    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let _ = (size, preallocation);
        Err(Error::unsupported("this disk cannot be resized"))
    }

    /// What *this layer* stores at `offset`, for at most `max_len` bytes; never looks into the backing
    /// device. Cheap: cost grows with the number of table entries, not with `max_len`, and ranges with
    /// no table at all are answered in one step.
    ///
    /// # Errors
    /// Out of range (`offset` must be below the size, `max_len` above 0), host failure, or a corrupt
    /// table.
    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent>;

    /// The device that answers for what this layer does not store. May be shorter or longer than this
    /// one; bytes past its end read as zeros.
    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        None
    }

    /// The storage in which the `host_offset` of extents counts.
    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        None
    }

    /// A hint: the caller will soon write `len` bytes at `offset`. A format that allocates sets space
    /// aside now, so that writers working in parallel still leave a file laid out in the order of
    /// these calls. What is never written is returned by [`close`](Self::close).
    ///
    /// # Errors
    /// No space, or host failure.
    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        let _ = (offset, len);
        Ok(())
    }

    /// Lets the kernel share or move `len` bytes from `source_offset` of `source` to `offset` of this
    /// disk without copying them (reflink). `Ok(false)`: not possible here, nothing has changed for the
    /// reader, write the bytes instead.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        let _ = (offset, len, source, source_offset);
        Ok(false)
    }

    /// The ability to store compressed clusters, if the format has it.
    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        None
    }
}

/// Checks that `offset..offset + len` lies on a disk of `size` bytes.
///
/// # Errors
/// `OutOfRange`, with the numbers.
pub fn check_range(offset: u64, len: u64, size: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(
            crate::ErrorKind::OutOfRange,
            format!("request for {len} bytes at {offset:#x} lies outside the disk ({size} bytes)"),
        )),
    }
}
