//! An opened VHDX image: reading, and the traits. Writing is in [`write`](crate::write), what lies where in
//! [`extents`](crate::extents).
//!
//! Blocks never move once they have a place, so that reading and writing in place need no lock: only the first write
//! to a block, which gives it its place, keeps others out of that block.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::device::check_range;
use block::extent::read_backing;
use block::image::{CheckReport, Image, ImageInfo, Repair};
use block::pieces::{Piece, pieces};
use block::{BlockDevice, Error, ErrorKind, LayerExtent, Limits, Preallocation, Result, Storage, ZeroMode};

use crate::bat::State;
use crate::bitmap::{Bitmaps, Bits};
use crate::geometry::{BITMAP_BLOCK, Geometry};
use crate::metadata::Metadata;
use crate::region::Region;
use crate::source::Source;
use crate::table::Table;
use crate::write::Writer;
use crate::{Guid, MIB};

/// How to open an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// For writing: a log that was left behind is replayed on the disk first.
    pub writable: bool,
    /// The opened parent of a differencing disk. Without it, what the image does not store reads as zeros.
    pub parent: Option<Arc<dyn BlockDevice>>,
}

/// An opened VHDX image.
#[derive(Debug)]
pub struct Vhdx {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) geometry: Geometry,
    pub(crate) metadata: Metadata,
    pub(crate) parent: Option<Arc<dyn BlockDevice>>,
    pub(crate) table: Table,
    pub(crate) writer: Option<Writer>,
    bitmaps: Bitmaps,
    structures: [(&'static str, Region); 3],
    /// Length of the file in bytes, as far as blocks may use it.
    pub(crate) file_len: AtomicU64,
    pending_log: bool,
    data_write_guid: Guid,
}

/// Where the bytes of a block are.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// All of them from this byte of the file on.
    File(u64),
    /// Those of the sectors whose bits are set.
    Partly(u64, Arc<Bits>),
    /// Nowhere: they are zeros.
    Zero,
    /// The parent has them.
    Parent,
}

impl Vhdx {
    /// Opens the image that has been read.
    ///
    /// # Errors
    /// The log cannot be replayed; a structure has changed since; the host failed.
    pub fn open(source: Source, options: OpenOptions) -> Result<Arc<Self>> {
        let pending_log = source.has_pending_log() && !options.writable;
        let source = match options.writable {
            // A log that is named in the header and has no entries is put away as well.
            true if !source.headers.current.log_guid.is_zero() => source.replay()?,
            _ => source,
        };
        let file_len = source.storage.len()?;
        let table = Table::new(Arc::clone(&source.storage), source.regions.bat);
        let mut image = Self {
            geometry: source.geometry,
            structures: source.structures(),
            data_write_guid: source.data_write_guid(),
            storage: Arc::clone(&source.storage),
            metadata: source.metadata.clone(),
            parent: options.parent,
            table,
            writer: None,
            bitmaps: Bitmaps::default(),
            file_len: AtomicU64::new(file_len),
            pending_log,
        };
        if options.writable {
            image.writer = Some(Writer::new(&image, &source)?);
        }
        Ok(Arc::new(image))
    }

    /// What the metadata of the file say.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The GUID that a differencing disk knows this one by: changes with the first write of a session.
    pub fn data_write_guid(&self) -> Guid {
        self.writer.as_ref().map_or(self.data_write_guid, |writer| writer.journal.data_write_guid())
    }

    /// The structures that blocks must not overlap, with their names.
    pub(crate) fn structures(&self) -> &[(&'static str, Region); 3] {
        &self.structures
    }

    /// Whether what the file does not store lies in a parent, whether that is open or not.
    pub(crate) fn is_differencing(&self) -> bool {
        self.metadata.parent.is_some()
    }

    /// Where the bytes of a block are, checked against the file.
    pub(crate) fn place(&self, block: u64) -> Result<Place> {
        let entry = self.table.get(self.geometry.entry_of(block))?;
        match entry.state() {
            State::NotPresent if self.is_differencing() => Ok(Place::Parent),
            State::NotPresent | State::Undefined | State::Zero | State::Unmapped => Ok(Place::Zero),
            State::FullyPresent => {
                self.check_block(block, entry.offset(), self.geometry.len_of(block))?;
                Ok(Place::File(entry.offset()))
            }
            State::PartiallyPresent if self.is_differencing() => {
                self.check_block(block, entry.offset(), self.geometry.len_of(block))?;
                Ok(Place::Partly(entry.offset(), self.bits(block)?))
            }
            State::PartiallyPresent => Err(corrupt(format!(
                "block {block:#x} of the VHDX file is partly present, and the disk has no parent"
            ))),
            State::Reserved => Err(corrupt(format!(
                "BAT entry of VHDX block {block:#x} is {:#018x}: no state is 4",
                entry.0
            ))),
        }
    }

    fn bits(&self, block: u64) -> Result<Arc<Bits>> {
        let entry = self.table.get(self.geometry.bitmap_entry_of(block))?;
        if entry.bitmap_present() != Some(true) {
            return Err(corrupt(format!(
                "block {block:#x} of the VHDX file is partly present, and its sector bitmap is not there"
            )));
        }
        self.check_block(block, entry.offset(), BITMAP_BLOCK)?;
        let (within, len) = self.geometry.bitmap_part(block);
        self.bitmaps.get(&*self.storage, block, entry.offset() + within, len)
    }

    /// `len` bytes at `offset` lie inside the file and are none of its structures.
    fn check_block(&self, block: u64, offset: u64, len: u64) -> Result<()> {
        let file_len = self.file_len.load(Ordering::Acquire);
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(Error::new(
                ErrorKind::Truncated,
                format!("VHDX block {block:#x} at {offset:#x} lies outside the file (length {file_len:#x})"),
            ));
        }
        if offset < MIB {
            return Err(corrupt(format!("VHDX block {block:#x} at {offset:#x} overlaps the header")));
        }
        match self.structures.iter().find(|(_, region)| region.overlaps(offset, len)) {
            None => Ok(()),
            Some((name, _)) => {
                Err(corrupt(format!("VHDX block {block:#x} at {offset:#x} overlaps the {name}")))
            }
        }
    }

    fn read_piece(&self, buf: &mut [u8], piece: &Piece, offset: u64) -> Result<()> {
        match self.place(piece.index)? {
            Place::File(at) => self.storage.read_at(buf, at + piece.within),
            Place::Zero => {
                buf.fill(0);
                Ok(())
            }
            Place::Parent => read_backing(self.parent.as_deref(), buf, offset),
            Place::Partly(at, bits) => self.for_runs(&bits, piece.within, piece.len(), |present, run| {
                let part = &mut buf[run.range];
                match present {
                    true => self.storage.read_at(part, at + run.within),
                    false => read_backing(self.parent.as_deref(), part, offset + (run.within - piece.within)),
                }
            }),
        }
    }

    /// Calls `each` with every run of sectors that are all present or all not, cut to `len` bytes at `within` of a
    /// block. The range of a run counts from `within`.
    pub(crate) fn for_runs(
        &self,
        bits: &Bits,
        within: u64,
        len: u64,
        mut each: impl FnMut(bool, Piece) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (within, within + len);
        while at < end {
            let (present, len) = self.run_at(bits, at, end - at);
            let start = block::num::to_usize(at - within);
            let range = start..start + block::num::to_usize(len);
            each(present, Piece { index: 0, within: at, range })?;
            at += len;
        }
        Ok(())
    }

    /// Whether the sector at `within` of a block is present, and for how many bytes, at most `max`, that goes on.
    pub(crate) fn run_at(&self, bits: &Bits, within: u64, max: u64) -> (bool, u64) {
        let sector_size = self.geometry.sector_size;
        let first = within / sector_size;
        let (present, sectors) = bits.run(first, (within + max).div_ceil(sector_size) - first);
        (present, ((first + sectors) * sector_size - within).min(max))
    }
}

pub(crate) fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

impl BlockDevice for Vhdx {
    fn size(&self) -> u64 {
        self.geometry.disk_size
    }

    fn read_only(&self) -> bool {
        self.writer.is_none()
    }

    fn limits(&self) -> Limits {
        Limits { alignment: self.storage.alignment(), ..Limits::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        for piece in pieces(offset, buf.len() as u64, self.geometry.block_size) {
            let at = offset + piece.range.start as u64;
            self.read_piece(&mut buf[piece.range.clone()], &piece, at)?;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        check_range(offset, buf.len() as u64, self.size())?;
        self.write(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        check_range(offset, len, self.size())?;
        self.write_zeroes(offset, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        self.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        match &self.writer {
            Some(writer) => writer.journal.flush(&self.table),
            None => Ok(()),
        }
    }

    fn close(&self) -> Result<()> {
        self.finish()
    }

    fn resize(&self, _: u64, _: Preallocation) -> Result<()> {
        Err(Error::unsupported("Image format driver does not support resize"))
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        self.extent_at(offset, max_len.min(self.size() - offset))
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.parent.as_ref()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.size())?;
        self.reserve_blocks(offset, len)
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        check_range(offset, len, self.size())?;
        self.clone_blocks(offset, len, source, source_offset)
    }
}

impl Image for Vhdx {
    fn format_name(&self) -> &'static str {
        "vhdx"
    }

    fn info(&self) -> Result<ImageInfo> {
        let parent = self.metadata.parent.as_ref().and_then(|parent| parent.names().into_iter().next());
        Ok(ImageInfo {
            cluster_size: Some(self.metadata.block_size),
            dirty: Some(self.pending_log),
            backing_format: parent.is_some().then(|| "vhdx".to_owned()),
            backing_file: parent,
            ..ImageInfo::default()
        })
    }

    fn check(&self, repair: Repair) -> Result<CheckReport> {
        if self.writer.is_some() {
            return Err(Error::usage("an image that is open for writing cannot be checked"));
        }
        crate::check::check(&self.storage, repair)
    }

    fn content_id(&self) -> Option<Vec<u8>> {
        Some(self.data_write_guid().0.to_vec())
    }

    fn adopt_parent(&self, content_id: &[u8]) -> Result<()> {
        let guid = content_id.try_into().map(Guid);
        self.change_linkage(guid.map_err(|_| Error::unsupported("the parent of a VHDX image is one, too"))?)
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}
