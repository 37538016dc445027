//! Extents that are not sparse: the bytes of a file, zeros, and what may not be looked at.

use std::sync::Arc;

use block::image::{CheckReport, Repair};
use block::{Error, LayerExtent, Result, Storage, Stored, ZeroMode};

use crate::extent::{Description, Extent, How, protected, truncated};

/// A FLAT or VMFS extent: a range of a file.
#[derive(Debug)]
pub(crate) struct Flat {
    storage: Arc<dyn Storage>,
    /// Where it begins in the file, in bytes.
    offset: u64,
    len: u64,
    writable: bool,
}

impl Flat {
    /// An extent from byte `offset` of a file on.
    ///
    /// # Errors
    /// The file ends before the extent does (qemu would show zeros there), or the host failed.
    pub(crate) fn open(storage: Arc<dyn Storage>, offset: u64, how: &How) -> Result<Self> {
        let file_len = storage.len()?;
        let end = offset.saturating_add(how.len);
        if end > file_len && !how.metadata_only && !how.for_check {
            let what = format!("the end of the flat extent, at {end:#x},");
            return Err(truncated(&*storage, &what, file_len));
        }
        Ok(Self { storage, offset, len: how.len, writable: how.writable })
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable { Ok(()) } else { Err(protected(&*self.storage)) }
    }
}

impl Extent for Flat {
    fn describe(&self) -> Description {
        Description { size: self.len, filename: self.storage.name(), ..Description::default() }
    }

    fn storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage.read_at(buf, self.offset + offset)
    }

    /// As qemu says of raw files behind another format: holes are data that is known to be zeros.
    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let at = self.offset + offset;
        let found = self.storage.extent(at, max_len)?;
        let extent = LayerExtent::new(Stored::Data, found.len.min(max_len)).at(at);
        Ok(LayerExtent { reads_zero: !found.data, ..extent })
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.check_writable()?;
        self.storage.write_at(buf, self.offset + offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.check_writable()?;
        self.storage.zero_range(self.offset + offset, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.storage.discard_range(self.offset + offset, len)
    }

    fn flush(&self) -> Result<()> {
        if self.writable { self.storage.sync() } else { Ok(()) }
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        self.check_writable()?;
        self.storage.clone_range(self.offset + offset, source, source_offset, len)
    }

    fn check(&self, report: &mut CheckReport, _repair: Repair) -> Result<()> {
        let file_len = self.storage.len()?;
        if self.offset.saturating_add(self.len) > file_len {
            report.corruptions += 1;
            report.say(format!("ERROR: extent '{}' is larger than its file", self.storage.name()));
        }
        Ok(())
    }
}

/// An extent without bytes: a ZERO extent, or one that may not be accessed. It hides the parent.
#[derive(Debug)]
pub(crate) struct Zero {
    len: u64,
    filename: String,
}

impl Zero {
    pub(crate) fn new(len: u64, filename: Option<&str>) -> Self {
        Self { len, filename: filename.unwrap_or_default().to_owned() }
    }
}

impl Extent for Zero {
    fn describe(&self) -> Description {
        Description { size: self.len, filename: self.filename.clone(), ..Description::default() }
    }

    fn storage(&self) -> Option<&Arc<dyn Storage>> {
        None
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn layer_extent(&self, _offset: u64, max_len: u64) -> Result<LayerExtent> {
        Ok(LayerExtent::new(Stored::Zero, max_len))
    }

    fn write_at(&self, buf: &[u8], _offset: u64) -> Result<()> {
        if buf.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        Err(Error::new(block::ErrorKind::ReadOnly, "this part of the disk has no place to be written to")
            .hint("The descriptor says that the extent is ZERO or NOACCESS."))
    }

    fn write_zeroes_at(&self, _offset: u64, _len: u64, _mode: ZeroMode) -> Result<()> {
        Ok(())
    }

    fn check(&self, _report: &mut CheckReport, _repair: Repair) -> Result<()> {
        Ok(())
    }
}
