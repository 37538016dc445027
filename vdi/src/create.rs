//! New images.

use block::num::{align_up, low_u32};
use block::{Error as BlockError, Preallocation, Result, Storage};

use crate::error::Error;
use crate::header::{BLOCK_SIZE, Header, ImageType, MAX_BLOCKS, MAX_SIZE, Uuid};

/// Map and data begin at multiples of this, as VirtualBox lays them out: no block lies across two pages or extents of
/// the host.
const ALIGN: u64 = 1 << 20;

/// What a new image is to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to sectors.
    pub size: u64,
    /// With all blocks from the start.
    pub fixed: bool,
    /// How much space the blocks of a static image are given.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// Whether there can be such an image.
    ///
    /// # Errors
    /// Too large, in qemu's words.
    pub fn validate(&self) -> Result<()> {
        if self.size > MAX_SIZE {
            let error = Error::TooLarge { size: self.size, max: MAX_SIZE };
            return Err(BlockError::usage(error.to_string()));
        }
        Ok(())
    }

    fn header(&self) -> Result<Header> {
        self.validate()?;
        let size = self.size.next_multiple_of(512);
        let blocks = size.div_ceil(u64::from(BLOCK_SIZE));
        debug_assert!(blocks <= MAX_BLOCKS);
        let data = align_up(ALIGN + 4 * blocks, ALIGN).unwrap_or(u64::MAX);
        Ok(Header {
            image_type: if self.fixed { ImageType::Static } else { ImageType::Dynamic },
            map_offset: low_u32(ALIGN),
            // The largest map has 2 GiB.
            data_offset: low_u32(data),
            disk_size: size,
            block_size: BLOCK_SIZE,
            blocks: low_u32(blocks),
            allocated: if self.fixed { low_u32(blocks) } else { 0 },
            uuid: Uuid::random()?,
            modified: Uuid::random()?,
            parent: Uuid::default(),
            parent_modified: Uuid::default(),
        })
    }
}

/// Fills a new, empty container.
///
/// # Errors
/// Too large, or the host failed.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let header = options.header()?;
    let data = u64::from(header.data_offset);
    let len = data + u64::from(header.allocated) * u64::from(header.block_size);
    if !storage.fixed_len() {
        // The space of the map is taken by writing it.
        storage.set_len(len)?;
    } else if storage.len()? < len {
        return Err(BlockError::usage("Cannot grow device files"));
    }
    write_map(storage, &header)?;
    preallocate(storage, data, len, options.preallocation)?;
    storage.write_at(&header.encode(), 0)?;
    storage.sync()
}

/// Gives space to the blocks of a static image.
fn preallocate(storage: &dyn Storage, data: u64, len: u64, mode: Preallocation) -> Result<()> {
    const STEP: u64 = 1 << 20;
    match mode {
        Preallocation::Off | Preallocation::Metadata if !storage.fixed_len() => Ok(()),
        Preallocation::Falloc => storage.allocate_range(data, len - data),
        Preallocation::Full => {
            let zeros = vec![0; block::num::to_usize(STEP)];
            (data..len).step_by(block::num::to_usize(STEP)).try_for_each(|at| storage.write_at(&zeros, at))
        }
        // What was on a device before is not the disk's.
        _ => storage.zero_range(data, len - data, block::ZeroMode::UNMAP),
    }
}

/// Writes the map: every block in its place, or none at all.
fn write_map(storage: &dyn Storage, header: &Header) -> Result<()> {
    const STEP: u32 = 1 << 18;
    let mut first = 0;
    while first < header.blocks {
        let end = header.blocks.min(first.saturating_add(STEP));
        let number = |index: u32| if header.image_type == ImageType::Static { index } else { u32::MAX };
        let bytes: Vec<u8> = (first..end).flat_map(|index| number(index).to_le_bytes()).collect();
        storage.write_at(&bytes, u64::from(header.map_offset) + 4 * u64::from(first))?;
        first = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use block::mem::MemStorage;

    use super::*;

    #[test]
    fn images_of_both_kinds_can_be_read() {
        for (fixed, size) in [(false, 64 << 20), (true, 3 << 20), (true, 1_500_000), (false, 0), (true, 0)] {
            let storage = MemStorage::new();
            create(&storage, &CreateOptions { size, fixed, ..CreateOptions::default() }).unwrap();
            let header = Header::read(&storage).unwrap();
            assert_eq!(header.disk_size, size.next_multiple_of(512));
            assert_eq!(header.allocated > 0, fixed && size > 0);
        }
    }

    #[test]
    fn the_largest_disk_is_qemus() {
        let options = CreateOptions { size: MAX_SIZE, ..CreateOptions::default() };
        assert_eq!(options.header().unwrap().needed_blocks(), MAX_BLOCKS);
        let error = CreateOptions { size: 512 << 40, ..options }.validate().unwrap_err();
        let text = "Unsupported VDI image size (size is 0x2000000000000, max supported is 0x1fffff8000000)";
        assert_eq!(error.message(), text);
    }
}
