//! Images made byte by byte, with blocks of any size.

use std::sync::Arc;

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};
use block::{BlockDevice, Storage};
use vhd::{Container, DiskType, DynamicHeader, Footer, Geometry, OpenOptions, SizeRule, Vhd};

/// The id of every parent.
pub(crate) const PARENT_ID: [u8; 16] = [9; 16];

/// A new image with blocks of `block_size` bytes.
pub(crate) fn forge(size: u64, block_size: u32, disk_type: DiskType) -> Vec<u8> {
    let mut footer = Footer::new(size, Geometry::MAX, disk_type).unwrap();
    footer.original_size = size;
    let footer = footer.encode();
    let entries = u32::try_from(size.div_ceil(u64::from(block_size))).unwrap();
    let mut header = DynamicHeader::new(1536, entries, block_size);
    if disk_type == DiskType::Differencing {
        header.parent_id = vhd::UniqueId(PARENT_ID);
        header.parent_name = "parent.vhd".to_owned();
    }
    let mut bytes = footer.clone();
    bytes.extend(header.encode());
    bytes.extend(vec![0xff; usize::try_from(header.table_bytes()).unwrap()]);
    bytes.extend(footer);
    bytes
}

/// Changes the header and keeps its sum right.
#[allow(dead_code, reason = "not every test file changes headers")]
pub(crate) fn with_header(bytes: &mut [u8], change: impl FnOnce(&mut DynamicHeader)) {
    let mut header = DynamicHeader::parse(&bytes[512..1536]).unwrap();
    change(&mut header);
    bytes[512..1536].copy_from_slice(&header.encode());
}

/// A disk of these bytes.
#[allow(dead_code, reason = "not every test file has parents")]
pub(crate) fn disk(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
    Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap())
}

pub(crate) fn open(
    storage: &Arc<dyn Storage>,
    parent: Option<Arc<dyn BlockDevice>>,
    writable: bool,
) -> block::Result<Vhd> {
    let container = Container::read(storage, SizeRule::Creator)?;
    let parent_id = parent.as_ref().map(|_| PARENT_ID.to_vec());
    Vhd::open(&container, OpenOptions { writable, parent, parent_id })
}
