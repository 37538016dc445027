//! Images made byte by byte, with blocks of any size.

use std::sync::Arc;

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::{BlockDevice, Storage};
use vdi::{Header, ImageType, OpenOptions, Uuid, Vdi};

/// The UUID of every parent.
pub(crate) const PARENT: Uuid = Uuid([9; 16]);

/// A new image with blocks of `block_size` bytes and without any data.
pub(crate) fn forge(size: u64, block_size: u32, child: bool) -> Vec<u8> {
    let blocks = u32::try_from(size.div_ceil(u64::from(block_size))).unwrap();
    let header = Header {
        image_type: if child { ImageType::Differencing } else { ImageType::Dynamic },
        map_offset: 512,
        data_offset: 512 + (4 * blocks).next_multiple_of(512),
        disk_size: size,
        block_size,
        blocks,
        allocated: 0,
        uuid: Uuid([1; 16]),
        modified: Uuid([2; 16]),
        parent: if child { PARENT } else { Uuid::default() },
        parent_modified: Uuid::default(),
    };
    let mut bytes = header.encode();
    bytes.resize(header.data_offset as usize, 0xff);
    bytes
}

/// A disk of these bytes.
pub(crate) fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap())
}

pub(crate) fn open(
    storage: &Arc<dyn Storage>,
    parent: Option<Arc<dyn BlockDevice>>,
    writable: bool,
) -> block::Result<Vdi> {
    let header = Header::read(&**storage)?;
    let parent_id = parent.as_ref().map(|_| PARENT.0.to_vec());
    Vdi::open(Arc::clone(storage), header, OpenOptions { writable, parent, parent_id })
}
