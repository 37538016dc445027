//! What every kind of extent can do: the seam between the disk and the files that it is spread over.
//!
//! An extent knows its own part of the disk, which begins at 0 for it; where that part lies on the disk, and what
//! lies behind the disk, is in its [`Below`]. An extent that stores nothing for a range reads it from there, and
//! fills up a grain that is written in part from there: extents with a parent behave like images with a backing file.

use std::fmt::Debug;
use std::sync::Arc;

use block::extent::read_backing;
use block::image::{CheckReport, Repair};
use block::{BlockDevice, CompressedWriter, Error, LayerExtent, Preallocation, Result, Storage, ZeroMode};

/// What lies under an extent: the parent's bytes at the same place of the disk.
#[derive(Debug, Clone, Default)]
pub struct Below {
    /// The parent.
    pub device: Option<Arc<dyn BlockDevice>>,
    /// Where the extent begins on the disk, in bytes.
    pub start: u64,
}

impl Below {
    /// Reads what the parent has at `offset` of the extent; zeros where there is none.
    ///
    /// # Errors
    /// As [`BlockDevice::read_at`].
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        read_backing(self.device.as_deref(), buf, self.start + offset)
    }

    /// Whether the parent has anything at or after `offset` of the extent.
    pub fn covers(&self, offset: u64) -> bool {
        self.device.as_ref().is_some_and(|device| self.start + offset < device.size())
    }
}

/// How an extent is opened.
#[derive(Debug, Clone)]
pub struct How {
    /// Its part of the disk in bytes.
    pub len: u64,
    /// What lies under it.
    pub below: Below,
    /// It may be written.
    pub writable: bool,
    /// It will only be described: what keeps its bytes from being read is let pass.
    pub metadata_only: bool,
    /// It will only be checked (and repaired): damage is let pass.
    pub for_check: bool,
    /// How hard grains are compressed where they are, if anybody has said so.
    pub level: Option<u32>,
}

/// What an extent says of itself, for `info`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Description {
    /// Its part of the disk in bytes.
    pub size: u64,
    /// The name of its file.
    pub filename: String,
    /// Bytes of a grain; flat ones have none.
    pub grain: Option<u64>,
    /// Whether the grains are compressed.
    pub compressed: bool,
}

/// A part of a disk. Offsets are relative to its start; requests lie inside it (the disk has cut them).
pub(crate) trait Extent: Debug + Send + Sync {
    /// Describes it.
    fn describe(&self) -> Description;

    /// Where its bytes lie, if it has a file.
    fn storage(&self) -> Option<&Arc<dyn Storage>>;

    /// Fills `buf`, from the parent where the extent stores nothing.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// What the extent itself stores; [`host_offset`](LayerExtent::host_offset) counts in its own storage.
    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent>;

    /// Whether writes are refused.
    fn read_only(&self) -> bool {
        true
    }

    /// Writes all of `buf`.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let _ = (buf, offset);
        Err(Error::read_only())
    }

    /// Makes a range read as zeros.
    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        let _ = (offset, len, mode);
        Err(Error::read_only())
    }

    /// Gives up the contents of a range. Of a disk with a parent, the parent's bytes must not come up again.
    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        let _ = (offset, len);
        Ok(())
    }

    /// Makes completed writes durable.
    fn flush(&self) -> Result<()> {
        Ok(())
    }

    /// Flushes, and leaves the file as a clean shutdown does.
    fn close(&self) -> Result<()> {
        self.flush()
    }

    /// As [`BlockDevice::reserve`].
    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        let _ = (offset, len);
        Ok(())
    }

    /// As [`BlockDevice::clone_in`].
    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        let _ = (offset, len, source, source_offset);
        Ok(false)
    }

    /// As [`BlockDevice::resize`]; asked of a disk's only extent.
    fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let _ = (size, preallocation);
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    /// As [`BlockDevice::compressed_writer`]; asked of a disk's only extent.
    fn compressed_writer(&self) -> Option<&dyn CompressedWriter> {
        None
    }

    /// Adds what is wrong with the extent to `report`.
    fn check(&self, report: &mut CheckReport, repair: Repair) -> Result<()>;
}

/// The error of a write to an extent that its descriptor protects.
pub(crate) fn protected(storage: &dyn Storage) -> Error {
    let text = format!("the extent '{}' is marked RDONLY", storage.name());
    Error::new(block::ErrorKind::ReadOnly, text)
}

/// The error of a place that lies past the end of `storage`.
pub(crate) fn truncated(storage: &dyn Storage, what: &str, len: u64) -> Error {
    let text = format!("{what} lies past the end of the file '{}' ({len:#x} bytes)", storage.name());
    Error::new(block::ErrorKind::Truncated, text)
}
