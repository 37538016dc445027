//! New images.

use block::num::low_u32;
use block::{Error as BlockError, Preallocation, Result, Storage};

use crate::footer::{DiskType, FOOTER_BYTES, Footer, MAX_SIZE};
use crate::geometry::Geometry;
use crate::header::{DynamicHeader, HEADER_BYTES};
use crate::table::SECTOR;

/// Guest bytes of a block (specification, "Dynamic Disk Header Format": the default).
const BLOCK_SIZE: u64 = 2 << 20;

/// What a new image is to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to sectors.
    pub size: u64,
    /// Every byte in its place, instead of blocks.
    pub fixed: bool,
    /// The size as it is, not rounded up to what cylinders, heads and sectors can address.
    pub force_size: bool,
    /// How much space a fixed disk is given.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// The size that the disk will have in bytes, and its geometry.
    ///
    /// # Errors
    /// Too large, in qemu's words.
    pub fn shape(&self) -> Result<(u64, Geometry)> {
        let sectors = self.size.div_ceil(SECTOR);
        if sectors > MAX_SIZE / SECTOR {
            return Err(BlockError::usage("The image size is too large for file format 'vpc'")
                .hint("A VHD holds at most 2040 GiB; use VHDX (-f vhdx) for more."));
        }
        // As qemu: the largest geometry says that the size is not to be computed from it.
        let geometry = if self.force_size { Geometry::MAX } else { Geometry::covering(sectors) };
        let rounded = if geometry == Geometry::MAX { sectors } else { geometry.sectors() };
        Ok((rounded * SECTOR, geometry))
    }
}

/// Fills a new, empty container.
///
/// # Errors
/// Too large, or the host failed.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let (size, geometry) = options.shape()?;
    if options.fixed {
        create_fixed(storage, size, geometry, options.preallocation)?;
    } else {
        create_dynamic(storage, size, geometry)?;
    }
    storage.sync()
}

fn create_fixed(
    storage: &dyn Storage,
    size: u64,
    geometry: Geometry,
    preallocation: Preallocation,
) -> Result<()> {
    let footer = Footer::new(size, geometry, DiskType::Fixed)?.encode();
    if !storage.fixed_len() {
        block::raw::preallocate(storage, size + FOOTER_BYTES, preallocation)?;
    } else if storage.len()? != size + FOOTER_BYTES {
        return Err(BlockError::usage("the footer of a fixed VHD has to be the end of the device")
            .hint(format!("a device of {} bytes would fit", size + FOOTER_BYTES)));
    }
    storage.write_at(&footer, size)
}

fn create_dynamic(storage: &dyn Storage, size: u64, geometry: Geometry) -> Result<()> {
    let footer = Footer::new(size, geometry, DiskType::Dynamic)?.encode();
    // The largest disk has little over a million blocks.
    let entries = low_u32(size.div_ceil(BLOCK_SIZE));
    let table_offset = FOOTER_BYTES + HEADER_BYTES;
    let header = DynamicHeader::new(table_offset, entries, low_u32(BLOCK_SIZE));
    let table_end = table_offset + header.table_bytes();
    let footer_at = if storage.fixed_len() { storage.len()?.saturating_sub(FOOTER_BYTES) } else { table_end };
    if footer_at < table_end {
        return Err(BlockError::usage("Cannot grow device files"));
    }
    let mut front = footer.clone();
    front.extend(header.encode());
    front.resize(block::num::to_usize(table_end), 0xff);
    storage.write_at(&footer, footer_at)?;
    storage.write_at(&front, 0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use block::mem::MemStorage;

    use super::*;
    use crate::{Container, SizeRule};

    fn made(options: CreateOptions) -> (Arc<MemStorage>, Container) {
        let storage = Arc::new(MemStorage::new());
        create(&*storage, &options).unwrap();
        let container = Container::read(&(Arc::clone(&storage) as _), SizeRule::Creator).unwrap();
        (storage, container)
    }

    #[test]
    fn sizes_are_rounded_to_the_geometry_unless_forced() {
        for fixed in [false, true] {
            let options = CreateOptions { size: 10 << 20, fixed, ..CreateOptions::default() };
            let (storage, container) = made(options);
            assert_eq!(container.size(), 10_514_432);
            assert_eq!(container.warnings(), Vec::<String>::new());
            let len = if fixed { 10_514_432 + 512 } else { 2560 };
            assert_eq!(storage.len().unwrap(), len);
            let (_, container) = made(CreateOptions { force_size: true, ..options });
            assert_eq!(container.size(), 10 << 20);
        }
    }

    #[test]
    fn the_largest_disk_has_2040_gib() {
        let options = CreateOptions { size: MAX_SIZE, ..CreateOptions::default() };
        let (storage, container) = made(options);
        assert_eq!((container.size(), storage.len().unwrap()), (MAX_SIZE, 1536 + 4 * 1_044_480 + 512));
        let error = CreateOptions { size: MAX_SIZE + 1, ..options }.shape().unwrap_err();
        assert_eq!(error.message(), "The image size is too large for file format 'vpc'");
    }

    #[test]
    fn a_disk_of_nothing_can_be_made() {
        for fixed in [false, true] {
            let (_, container) = made(CreateOptions { fixed, ..CreateOptions::default() });
            assert_eq!(container.size(), 0);
        }
    }
}
