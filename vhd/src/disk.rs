//! A disk in blocks: reading.
//!
//! A bit of a block's bitmap says whether the sector is there (specification, "Data Blocks"). Where it is not, a
//! differencing disk shows its parent, and a dynamic disk zeros. (qemu does not look at the bitmaps of dynamic disks and
//! sets all of their bits, as this crate does for new blocks.)

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::device::check_range;
use block::num::{low_u32, to_usize};
use block::pages::Pages;
use block::pieces::{Piece, pieces};
use block::stripes::Stripes;
use block::{BlockDevice, LayerExtent, Limits, Result, Storage, Stored, ZeroMode};
use parking_lot::Mutex;

use crate::alloc::Alloc;
use crate::container::Container;
use crate::error::Error;
use crate::header::DynamicHeader;
use crate::table::{SECTOR, Table};
use crate::vhd::OpenOptions;
use crate::write::Payload;

/// Bytes of bitmaps that are kept in memory.
const BITMAP_CACHE: u64 = 8 << 20;
/// Sectors whose bits are looked at in one step.
const BITS: u64 = 4096;

/// A disk in blocks.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) storage: Arc<dyn Storage>,
    size: u64,
    pub(crate) writable: bool,
    /// What is not here is in the parent.
    pub(crate) differencing: bool,
    pub(crate) parent: Option<Arc<dyn BlockDevice>>,
    pub(crate) table: Table,
    /// The bitmaps of the blocks, in pages of a sector.
    pub(crate) bitmaps: Pages,
    /// Held shared by who uses a block, exclusively by who changes its entry or bits.
    pub(crate) stripes: Stripes,
    /// Of images that are open for writing.
    pub(crate) alloc: Option<Mutex<Alloc>>,
    /// One past the last byte that may be a block's.
    pub(crate) limit: AtomicU64,
    pub(crate) footer_bytes: Vec<u8>,
    /// One flush at a time.
    pub(crate) flushing: Mutex<()>,
}

/// A run of sectors of one kind, in bytes within a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) present: bool,
    pub(crate) range: Range<u64>,
}

impl Disk {
    pub(crate) fn new(container: &Container, header: &DynamicHeader, options: OpenOptions) -> Result<Self> {
        if options.writable && !header.sum_good {
            return Err(Error::HeaderChecksum.into());
        }
        let table = Table::new(container, header);
        let alloc = match options.writable {
            true => Some(Alloc::new(container, header, &table)?),
            false => None,
        };
        Ok(Self {
            storage: Arc::clone(&container.storage),
            size: container.size(),
            writable: options.writable,
            differencing: container.is_differencing(),
            parent: options.parent,
            bitmaps: Pages::new(0, u64::MAX, SECTOR, BITMAP_CACHE),
            stripes: Stripes::new(),
            limit: AtomicU64::new(alloc.as_ref().map_or(container.data_end(), Alloc::limit)),
            alloc: alloc.map(Mutex::new),
            table,
            footer_bytes: container.footer_bytes.clone(),
            flushing: Mutex::default(),
        })
    }

    /// The host offset of a block's bitmap; `None`: there is no such block.
    pub(crate) fn place(&self, index: u64) -> Result<Option<u64>> {
        self.table.place(&*self.storage, index, self.limit.load(Ordering::Acquire))
    }

    /// Which sectors of a range of a block are there: calls `each` for runs of a kind, in order. The range is in bytes
    /// within the block; runs are cut to it.
    pub(crate) fn runs(
        &self,
        bitmap: u64,
        range: Range<u64>,
        mut each: impl FnMut(Run) -> Result<()>,
    ) -> Result<()> {
        let mut pending: Option<Run> = None;
        let (mut sector, end) = (range.start / SECTOR, range.end.div_ceil(SECTOR));
        let mut bits = [0; to_usize(BITS / 8)];
        while sector < end {
            let last = end.min((sector / BITS + 1) * BITS);
            let bytes = sector / 8..last.div_ceil(8);
            let bits = &mut bits[..to_usize(bytes.end - bytes.start)];
            self.bitmaps.read(&*self.storage, bits, bitmap + bytes.start)?;
            for at in sector..last {
                // The first sector is the most significant bit.
                let present = bits[to_usize(at / 8 - bytes.start)] & (0x80 >> (at % 8)) != 0;
                let part = (at * SECTOR).max(range.start)..((at + 1) * SECTOR).min(range.end);
                match &mut pending {
                    Some(run) if run.present == present => run.range.end = part.end,
                    _ => {
                        if let Some(done) = pending.replace(Run { present, range: part }) {
                            each(done)?;
                        }
                    }
                }
            }
            sector = last;
        }
        pending.map_or(Ok(()), each)
    }

    /// Reads the part of a request that lies in one block.
    fn read_piece(&self, piece: &Piece, buf: &mut [u8]) -> Result<()> {
        let guest = piece.index * self.table.block_size;
        let Some(bitmap) = self.place(piece.index)? else {
            return self.read_parent(buf, guest + piece.within);
        };
        let data = bitmap + self.table.bitmap_bytes;
        self.runs(bitmap, piece.within..piece.within + piece.len(), |run| {
            let part =
                &mut buf[to_usize(run.range.start - piece.within)..to_usize(run.range.end - piece.within)];
            if run.present {
                self.storage.read_at(part, data + run.range.start)
            } else {
                self.read_parent(part, guest + run.range.start)
            }
        })
    }

    /// Reads what this image does not store.
    pub(crate) fn read_parent(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if !self.differencing {
            buf.fill(0);
            return Ok(());
        }
        let Some(parent) = &self.parent else { return Err(Error::NoParent.into()) };
        let there = parent.size().saturating_sub(offset).min(buf.len() as u64);
        let (there, behind) = buf.split_at_mut(to_usize(there));
        behind.fill(0);
        if there.is_empty() { Ok(()) } else { parent.read_at(there, offset) }
    }

    /// What nothing is stored for: the parent's, or zeros.
    fn absent(&self, len: u64) -> LayerExtent {
        LayerExtent::new(if self.differencing { Stored::Absent } else { Stored::Zero }, len)
    }

    /// What is stored in a block that is there, from `within` on.
    fn block_extent(&self, bitmap: u64, within: u64, len: u64) -> Result<LayerExtent> {
        let mut first = None;
        // Runs come in order, and only the first is wanted.
        self.runs(bitmap, within..within + len, |run| {
            first.get_or_insert(run);
            Ok(())
        })?;
        let Some(Run { present: true, range }) = first else {
            let len = first.map_or(len, |run| run.range.end - run.range.start);
            return Ok(self.absent(len));
        };
        let host = bitmap + self.table.bitmap_bytes + range.start;
        // As qemu, without asking the host for holes.
        Ok(LayerExtent::new(Stored::Data, range.end - range.start).at(host))
    }

    fn last_block(offset: u64, len: u64, block_size: u64) -> u64 {
        (offset + len.max(1) - 1) / block_size
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        !self.writable
    }

    fn limits(&self) -> Limits {
        let preferred = low_u32(self.table.block_size.min(2 << 20));
        Limits { alignment: self.storage.alignment(), preferred, ..Limits::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (len, block) = (buf.len() as u64, self.table.block_size);
        check_range(offset, len, self.size)?;
        let _held = self.stripes.shared(offset / block, Self::last_block(offset, len, block));
        for piece in pieces(offset, len, block) {
            self.read_piece(&piece, &mut buf[piece.range.clone()])?;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.write(offset, buf.len() as u64, |range| Payload::Bytes(&buf[range]))
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.write(offset, len, |_| Payload::Zeros(mode))
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }

    fn close(&self) -> Result<()> {
        self.close_cleanly()
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        let block = self.table.block_size;
        let len = max_len.min(self.size - offset);
        let (index, within) = (offset / block, offset % block);
        let _held = self.stripes.shared(index, index);
        if let Some(bitmap) = self.place(index)? {
            return self.block_extent(bitmap, within, len.min(block - within));
        }
        let blocks = self.table.unused_run(&*self.storage, index, (within + len).div_ceil(block))?;
        Ok(self.absent(len.min(blocks * block - within)))
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.parent.as_ref()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.reserve_blocks(offset, len)
    }
}
