//! Creating an image.
//!
//! ```text
//!   0      1M          1M + log     + BAT           + 1M
//!   | header | log ..  | BAT ..     | metadata      | blocks, if the disk is fixed
//! ```

use block::num::{align_up, low_u32, to_usize};
use block::{Error, ErrorKind, Result, Storage, ZeroMode};

use crate::bat::Entry;
use crate::geometry::Geometry;
use crate::header::{self, Header};
use crate::metadata::{BLOCK_SIZES, MAX_DISK_SIZE, Metadata};
use crate::region::{self, Region, Regions};
use crate::{Guid, MIB, SIGNATURE};

/// What is written into the first KiB of the file as its creator.
const CREATOR: &str = concat!("vimg ", env!("CARGO_PKG_VERSION"));
/// Bytes of the BAT that are written at once.
const CHUNK: u64 = 1 << 20;

/// What an image is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk; rounded up to whole sectors.
    pub size: u64,
    /// Bytes of the log; at least 1 MiB, rounded up to a multiple of it.
    pub log_size: u64,
    /// Bytes of a block; `None`: by the size of the disk.
    pub block_size: Option<u64>,
    /// Every block has its place from the start.
    pub fixed: bool,
    /// Blocks of a dynamic disk begin as zeros; otherwise as not present, whose contents the specification leaves
    /// undefined.
    pub block_state_zero: bool,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector_size: u32,
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes, as qemu-img makes it.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            log_size: MIB,
            block_size: None,
            fixed: false,
            block_state_zero: true,
            logical_sector_size: 512,
        }
    }

    /// The options as they will be carried out, in qemu's words if they cannot be.
    ///
    /// # Errors
    /// The disk or the log is too large, the log or the blocks are of no possible size.
    pub fn plan(&self) -> Result<Plan> {
        let size = align_up(self.size, self.logical_sector_size.into())
            .filter(|size| self.size <= MAX_DISK_SIZE && *size <= MAX_DISK_SIZE)
            .ok_or_else(|| Error::usage("Image size too large; max of 64TB"))?;
        let block_size = self.block_size.filter(|size| *size != 0).unwrap_or_else(|| usual_block_size(size));
        let (least, most) = (u64::from(*BLOCK_SIZES.start()), u64::from(*BLOCK_SIZES.end()));
        let block_size = block_size.max(1).div_ceil(least).saturating_mul(least).min(most);
        if !block_size.is_power_of_two() {
            return Err(Error::usage("Block size must be a power of two"));
        }
        let log_length = self.log_length()?;
        let metadata = Metadata {
            block_size: low_u32(block_size),
            leave_blocks_allocated: self.fixed,
            disk_size: size,
            disk_id: Guid::ZERO,
            logical_sector_size: self.logical_sector_size,
            physical_sector_size: self.logical_sector_size,
            parent: None,
        };
        let geometry = Geometry::new(&metadata);
        Ok(Plan { geometry, metadata, log_length, block_state_zero: self.block_state_zero })
    }

    fn log_length(&self) -> Result<u32> {
        if self.log_size == 0 {
            return Err(Error::usage("Log size must be a multiple of 1 MB"));
        }
        let rounded = align_up(self.log_size, MIB).and_then(|size| u32::try_from(size).ok());
        rounded.ok_or_else(|| Error::usage("Log size must be smaller than 4 GB"))
    }
}

/// The size of a block for a disk of `size` bytes.
fn usual_block_size(size: u64) -> u64 {
    match size {
        size if size > 32 << 40 => 64 << 20,
        size if size > 100 << 30 => 32 << 20,
        size if size > 1 << 30 => 16 << 20,
        _ => 8 << 20,
    }
}

/// Options that have been understood.
#[derive(Debug, Clone)]
pub struct Plan {
    geometry: Geometry,
    metadata: Metadata,
    log_length: u32,
    block_state_zero: bool,
}

impl Plan {
    fn bat(&self) -> Region {
        let length = (self.geometry.entries() * 8).max(1).next_multiple_of(MIB);
        // At most 64 Mi entries of 8 bytes, and 8 Mi of bitmaps.
        Region { offset: MIB + u64::from(self.log_length), length: low_u32(length) }
    }

    fn metadata_region(&self) -> Region {
        Region { offset: self.bat().end(), length: Metadata::REGION_LEN }
    }

    /// Bytes that the file has when it has been created.
    pub fn file_len(&self) -> u64 {
        let blocks = if self.metadata.leave_blocks_allocated { self.geometry.blocks } else { 0 };
        self.metadata_region().end() + blocks * self.geometry.block_size
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.geometry.block_size
    }

    /// Writes the structures of the image into an empty storage. Durable on return.
    ///
    /// # Errors
    /// The storage is too small, or the host failed.
    pub fn carry_out(&self, storage: &dyn Storage) -> Result<()> {
        let len = self.file_len();
        if storage.fixed_len() {
            if storage.len()? < len {
                return Err(Error::new(ErrorKind::NoSpace, "No space left on device"));
            }
            storage.zero_range(0, len, ZeroMode::UNMAP)?;
        } else {
            storage.set_len(len)?;
        }
        let (bat, metadata) = (self.bat(), self.metadata_region());
        self.write_bat(storage, bat, metadata.end())?;
        let described = Metadata { disk_id: Guid::random()?, ..self.metadata.clone() };
        storage.write_at(&described.encode(), metadata.offset)?;
        let table = Regions::encode(bat, metadata);
        region::OFFSETS.iter().try_for_each(|offset| storage.write_at(&table, *offset))?;
        self.write_headers(storage)?;
        // The signature last: before it there is no image.
        storage.sync()?;
        storage.write_at(&file_identifier(), 0)?;
        storage.sync()
    }

    fn write_headers(&self, storage: &dyn Storage) -> Result<()> {
        let mut header = Header {
            sequence_number: 1,
            file_write_guid: Guid::random()?,
            data_write_guid: Guid::random()?,
            log_guid: Guid::ZERO,
            log_length: self.log_length,
            log_offset: MIB,
        };
        for offset in header::OFFSETS {
            storage.write_at(&header.encode(), offset)?;
            header.sequence_number += 1;
        }
        Ok(())
    }

    fn write_bat(&self, storage: &dyn Storage, bat: Region, first_block: u64) -> Result<()> {
        if !self.metadata.leave_blocks_allocated && !self.block_state_zero {
            return Ok(());
        }
        let per_chunk = CHUNK / 8;
        for start in (0..self.geometry.entries()).step_by(to_usize(per_chunk)) {
            let end = (start + per_chunk).min(self.geometry.entries());
            let bytes: Vec<u8> =
                (start..end).flat_map(|index| self.entry(index, first_block).0.to_le_bytes()).collect();
            storage.write_at(&bytes, bat.offset + start * 8)?;
        }
        Ok(())
    }

    fn entry(&self, index: u64, first_block: u64) -> Entry {
        match self.geometry.block_of(index) {
            None => Entry::default(),
            Some(_) if !self.metadata.leave_blocks_allocated => Entry::ZERO,
            Some(block) => Entry::present(first_block + block * self.geometry.block_size),
        }
    }
}

/// Signature and creator (section 2.2.1).
fn file_identifier() -> Vec<u8> {
    let mut bytes = SIGNATURE.to_vec();
    bytes.extend(CREATOR.encode_utf16().flat_map(u16::to_le_bytes));
    bytes
}

/// Creates an image in an empty storage.
///
/// # Errors
/// As [`CreateOptions::plan`] and [`Plan::carry_out`].
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.plan()?.carry_out(storage)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(change: impl FnOnce(&mut CreateOptions)) -> std::result::Result<Plan, String> {
        let mut options = CreateOptions::new(100 << 20);
        change(&mut options);
        options.plan().map_err(|error| error.to_string())
    }

    /// As qemu-img 10.0.2 chooses and refuses.
    #[test]
    fn sizes_are_qemus() {
        let block = |size: u64| plan(|o| o.size = size).unwrap().block_size() >> 20;
        assert_eq!([1 << 20, 1 << 30, (1 << 30) + 512].map(block), [8, 8, 16]);
        assert_eq!([100 << 30, 101 << 30, 32 << 40, 33 << 40, 64 << 40].map(block), [16, 32, 32, 64, 64]);
        let given = |size: u64| plan(|o| o.block_size = Some(size)).map(|plan| plan.block_size() >> 20);
        assert_eq!([512 << 10, 1_000_000, 1 << 20, 512 << 20, 0].map(given), [1, 1, 1, 256, 8].map(Ok));
        assert_eq!(given(3 << 20).unwrap_err(), "Block size must be a power of two");
        let log = |size: u64| plan(|o| o.log_size = size).map(|plan| plan.log_length >> 20);
        assert_eq!([512 << 10, 1500 << 10, 3 << 20, 4095 << 20].map(log), [1, 2, 3, 4095].map(Ok));
        assert_eq!(log(0).unwrap_err(), "Log size must be a multiple of 1 MB");
        assert_eq!(log(4 << 30).unwrap_err(), "Log size must be smaller than 4 GB");
        let too_large = "Image size too large; max of 64TB";
        assert_eq!(plan(|o| o.size = (64 << 40) + 1).unwrap_err(), too_large);
        assert_eq!(plan(|o| o.size = u64::MAX).unwrap_err(), too_large);
        assert_eq!(plan(|o| o.size = 513).unwrap().metadata.disk_size, 1024);
    }

    #[test]
    fn the_largest_tables_fit() {
        let plan = plan(|o| (o.size, o.block_size) = (64 << 40, Some(1 << 20))).unwrap();
        assert_eq!(u64::from(plan.bat().length), 513 << 20);
        assert_eq!(plan.file_len(), (1 + 1 + 513 + 1) << 20);
    }
}
