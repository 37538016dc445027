//! An opened VDI as a disk: reading, and what there is to say about it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::device::check_range;
use block::image::{Image, ImageInfo};
use block::num::to_usize;
use block::pieces::{Piece, pieces};
use block::stripes::Stripes;
use block::{
    BlockDevice, Error as BlockError, LayerExtent, Limits, Preallocation, Result, Storage, Stored, ZeroMode,
};
use parking_lot::Mutex;

use crate::alloc::Alloc;
use crate::error::Error;
use crate::header::{Header, ImageType, Uuid};
use crate::map::{Entry, Map};
use crate::write::Payload;

/// How to open an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// For writing.
    pub writable: bool,
    /// The disk that answers for what a differencing image does not store. Without it such an image can be described,
    /// but not read where it stores nothing.
    pub parent: Option<Arc<dyn BlockDevice>>,
    /// What the parent is known by ([`Image::content_id`]); compared with what the image says. `None`: it has no such
    /// thing.
    pub parent_id: Option<Vec<u8>>,
}

/// An opened image.
#[derive(Debug)]
pub struct Vdi {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) header: Header,
    pub(crate) map: Map,
    pub(crate) parent: Option<Arc<dyn BlockDevice>>,
    /// Held shared by who uses a block, exclusively by who changes its entry.
    pub(crate) stripes: Stripes,
    /// Of images that are open for writing.
    pub(crate) alloc: Option<Mutex<Alloc>>,
    /// One past the last byte that may be a block's.
    pub(crate) limit: AtomicU64,
    /// The length of the file when it was opened.
    pub(crate) opened_len: u64,
    /// The UUID of the state that is being written, once anything has been.
    pub(crate) modified: Mutex<Option<Uuid>>,
    /// One flush at a time.
    pub(crate) flushing: Mutex<()>,
}

impl Vdi {
    /// Opens an image.
    ///
    /// # Errors
    /// The parent is another disk than the image was made on; the image is to be written to and its map names places
    /// twice or outside the file; or the host failed.
    pub fn open(storage: Arc<dyn Storage>, header: Header, options: OpenOptions) -> Result<Self> {
        if header.image_type == ImageType::Differencing && options.parent.is_some() {
            check_parent(&header, options.parent_id.as_deref())?;
        }
        let map = Map::new(&header);
        let file_len = storage.len()?;
        let alloc = match options.writable {
            true => Some(Alloc::new(&*storage, &header, &map, file_len)?),
            false => None,
        };
        Ok(Self {
            storage,
            map,
            parent: options.parent,
            stripes: Stripes::new(),
            alloc: alloc.map(Mutex::new),
            limit: AtomicU64::new(file_len),
            opened_len: file_len,
            modified: Mutex::default(),
            flushing: Mutex::default(),
            header,
        })
    }

    /// The header as it was when the image was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) fn is_differencing(&self) -> bool {
        self.header.image_type == ImageType::Differencing
    }

    /// The host offset of a block of data.
    pub(crate) fn place(&self, index: u64, number: u32) -> Result<u64> {
        Ok(self.map.check_place(index, number, self.limit.load(Ordering::Acquire))?)
    }

    fn read_piece(&self, piece: &Piece, buf: &mut [u8]) -> Result<()> {
        match self.map.entry(&*self.storage, piece.index)? {
            Entry::Data(number) => self.storage.read_at(buf, self.place(piece.index, number)? + piece.within),
            Entry::Zero => {
                buf.fill(0);
                Ok(())
            }
            Entry::Free => self.read_parent(buf, piece.index * self.map.block_size + piece.within),
        }
    }

    /// Reads what this image does not store.
    pub(crate) fn read_parent(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        if !self.is_differencing() {
            buf.fill(0);
            return Ok(());
        }
        let Some(parent) = &self.parent else { return Err(Error::NoParent(self.header.parent).into()) };
        let there = parent.size().saturating_sub(offset).min(buf.len() as u64);
        let (there, behind) = buf.split_at_mut(to_usize(there));
        behind.fill(0);
        if there.is_empty() { Ok(()) } else { parent.read_at(there, offset) }
    }

    /// What is stored in a block that is there.
    fn data_extent(&self, host: u64, len: u64) -> Result<LayerExtent> {
        let whole = LayerExtent::new(Stored::Data, len).at(host);
        if self.header.image_type != ImageType::Static {
            return Ok(whole);
        }
        // As qemu: the holes of a static image are known to be zeros.
        let found = self.storage.extent(host, len)?;
        Ok(LayerExtent { len: found.len.min(len), reads_zero: !found.data, ..whole })
    }
}

fn check_parent(header: &Header, found: Option<&[u8]>) -> Result<()> {
    let Some(found) = found.and_then(|bytes| bytes.try_into().ok()).map(Uuid) else {
        return Err(Error::ForeignParent.into());
    };
    let wanted = header.parent;
    if wanted == found { Ok(()) } else { Err(Error::WrongParent { wanted, found }.into()) }
}

impl BlockDevice for Vdi {
    fn size(&self) -> u64 {
        self.header.disk_size
    }

    fn read_only(&self) -> bool {
        self.alloc.is_none()
    }

    fn limits(&self) -> Limits {
        Limits { alignment: self.storage.alignment(), preferred: self.header.block_size, ..Limits::default() }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let (len, block) = (buf.len() as u64, self.map.block_size);
        check_range(offset, len, self.size())?;
        let _held = self.stripes.shared(offset / block, (offset + len.max(1) - 1) / block);
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

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> Result<()> {
        Err(BlockError::unsupported("Image format driver does not support resize"))
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        let block = self.map.block_size;
        let len = max_len.min(self.size() - offset);
        let (index, within) = (offset / block, offset % block);
        let _held = self.stripes.shared(index, index);
        let first = self.map.entry(&*self.storage, index)?;
        if let Entry::Data(number) = first {
            let host = self.place(index, number)? + within;
            return self.data_extent(host, len.min(block - within));
        }
        let end = (offset + len).div_ceil(block);
        // The first block that is of another kind, or behind the range.
        let mut behind = index;
        self.map.walk(&*self.storage, index, |at, entry| {
            let alike = entry == first && at < end;
            behind += u64::from(alike);
            Ok(alike)
        })?;
        let run = behind * block - offset;
        let absent = first == Entry::Free && self.is_differencing();
        let stored = if absent { Stored::Absent } else { Stored::Zero };
        Ok(LayerExtent::new(stored, run.min(len)))
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

impl Image for Vdi {
    fn format_name(&self) -> &'static str {
        "vdi"
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo { cluster_size: Some(self.header.block_size), ..ImageInfo::default() })
    }

    fn content_id(&self) -> Option<Vec<u8>> {
        Some(self.header.uuid.0.to_vec())
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        Some(&self.storage)
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}
