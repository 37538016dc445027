//! An opened VHD as a disk.

use std::sync::Arc;

use block::device::check_range;
use block::image::{Image, ImageInfo};
use block::raw::{Raw, RawOptions};
use block::{BlockDevice, Error as BlockError, LayerExtent, Limits, Result, Storage, Stored, ZeroMode};

use crate::container::Container;
use crate::disk::Disk;
use crate::error::Error;
use crate::footer::{DiskType, UniqueId};

/// How to open an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// For writing.
    pub writable: bool,
    /// The disk that answers for what a differencing disk does not store. Without it such an image can be described,
    /// but not read where it stores nothing.
    pub parent: Option<Arc<dyn BlockDevice>>,
    /// What the parent is known by ([`Image::content_id`]); compared with what the image says. `None`: it has no such
    /// thing.
    pub parent_id: Option<Vec<u8>>,
}

/// An opened image.
#[derive(Debug)]
pub struct Vhd {
    unique_id: UniqueId,
    cluster_size: Option<u32>,
    parent_name: Option<String>,
    disk: Kind,
}

#[derive(Debug)]
enum Kind {
    /// The sectors before the footer.
    Fixed(Raw),
    /// Blocks.
    Blocks(Box<Disk>),
}

impl Vhd {
    /// Opens an image.
    ///
    /// # Errors
    /// The parent is another disk than the image was made on; the image is to be written to and two of its blocks
    /// overlap; or the host failed.
    pub fn open(container: &Container, options: OpenOptions) -> Result<Self> {
        if container.is_differencing() && options.parent.is_some() {
            check_parent(container, options.parent_id.as_deref())?;
        }
        let disk = match container.header() {
            None => Kind::Fixed(Raw::open(
                Arc::clone(&container.storage),
                RawOptions { offset: 0, size: Some(container.size()) },
            )?),
            Some(header) => Kind::Blocks(Box::new(Disk::new(container, header, options)?)),
        };
        Ok(Self {
            unique_id: container.footer().unique_id,
            cluster_size: container.header().map(|header| header.block_size),
            parent_name: container.parent_names().first().cloned(),
            disk,
        })
    }

    fn device(&self) -> &dyn BlockDevice {
        match &self.disk {
            Kind::Fixed(raw) => raw,
            Kind::Blocks(disk) => &**disk,
        }
    }
}

fn check_parent(container: &Container, found: Option<&[u8]>) -> Result<()> {
    debug_assert!(container.footer().disk_type == DiskType::Differencing);
    let wanted = container.header().map(|header| header.parent_id).unwrap_or_default();
    let Some(found) = found.and_then(|bytes| bytes.try_into().ok()).map(UniqueId) else {
        return Err(Error::ForeignParent.into());
    };
    if wanted == found { Ok(()) } else { Err(Error::WrongParent { wanted, found }.into()) }
}

impl BlockDevice for Vhd {
    fn size(&self) -> u64 {
        self.device().size()
    }

    fn read_only(&self) -> bool {
        self.device().read_only()
    }

    fn limits(&self) -> Limits {
        self.device().limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device().read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.device().write_at(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64, mode: ZeroMode) -> Result<()> {
        self.device().write_zeroes_at(offset, len, mode)
    }

    fn discard_at(&self, offset: u64, len: u64) -> Result<()> {
        self.device().discard_at(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.device().flush()
    }

    fn close(&self) -> Result<()> {
        self.device().close()
    }

    fn resize(&self, _size: u64, _preallocation: block::Preallocation) -> Result<()> {
        Err(BlockError::unsupported("Image format driver does not support resize"))
    }

    fn layer_extent(&self, offset: u64, max_len: u64) -> Result<LayerExtent> {
        check_range(offset, 1, self.size())?;
        let found = self.device().layer_extent(offset, max_len.min(self.size() - offset))?;
        Ok(match (&self.disk, found.stored) {
            // As qemu: a fixed disk stores all of itself, in a hole as well.
            (Kind::Fixed(_), Stored::Zero) => LayerExtent { stored: Stored::Data, reads_zero: true, ..found },
            _ => found,
        })
    }

    fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.device().backing()
    }

    fn host_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.device().host_storage()
    }

    fn reserve(&self, offset: u64, len: u64) -> Result<()> {
        self.device().reserve(offset, len)
    }

    fn clone_in(&self, offset: u64, len: u64, source: &dyn Storage, source_offset: u64) -> Result<bool> {
        match &self.disk {
            Kind::Fixed(raw) => raw.clone_in(offset, len, source, source_offset),
            Kind::Blocks(_) => Ok(false),
        }
    }
}

impl Image for Vhd {
    fn format_name(&self) -> &'static str {
        "vpc"
    }

    fn info(&self) -> Result<ImageInfo> {
        Ok(ImageInfo {
            cluster_size: self.cluster_size,
            backing_file: self.parent_name.clone(),
            ..ImageInfo::default()
        })
    }

    fn content_id(&self) -> Option<Vec<u8>> {
        Some(self.unique_id.0.to_vec())
    }

    fn container(&self) -> Option<&Arc<dyn Storage>> {
        self.host_storage()
    }

    fn into_device(self: Arc<Self>) -> Arc<dyn BlockDevice> {
        self
    }
}
