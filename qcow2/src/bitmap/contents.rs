//! Where the bits of a bitmap lie, and reading them (specification, "Bitmap table" and "Bitmap data").

use block::num::{is_aligned, to_usize};
use block::{DirtyBitmap, Error as BlockError, Result, Storage};

use super::Bitmap;
use crate::error::Error;
use crate::geometry::Geometry;
use crate::l2::OFFSET_MASK;
use crate::metadata::Kind;

/// Every bit that a table entry without data stands for is set.
const ALL_ONES: u64 = 1;
/// Bytes of tables that are looked at in one piece.
const PIECE: u64 = 1 << 20;

/// What a table entry says about the bits of one data cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bits {
    Clear,
    Set,
    /// In the cluster at this host offset.
    At(u64),
}

impl Bits {
    /// Understands a table entry; `None` if it cannot be.
    fn decode(entry: u64, geometry: &Geometry) -> Option<Self> {
        match (entry & OFFSET_MASK, entry & !OFFSET_MASK) {
            (0, 0) => Some(Self::Clear),
            (0, ALL_ONES) => Some(Self::Set),
            (offset, 0) if is_aligned(offset, geometry.cluster_size()) => Some(Self::At(offset)),
            _ => None,
        }
    }

    /// The table entry.
    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => ALL_ONES,
            Self::At(offset) => offset,
        }
    }
}

/// Bits in a data cluster.
pub(super) fn bits_per_cluster(geometry: &Geometry) -> u64 {
    geometry.cluster_size() * 8
}

/// Entries that the table of a bitmap needs for a disk of `disk_size` bytes.
pub(super) fn table_entries(geometry: &Geometry, disk_size: u64, granularity_bits: u8) -> u64 {
    disk_size.div_ceil(1 << granularity_bits).div_ceil(bits_per_cluster(geometry))
}

/// Reads and validates the table of a bitmap, whose size has been held against the limits with its directory entry.
///
/// # Errors
/// The table or what it names lies outside the file, an entry cannot be, or the host failed.
pub(super) fn read_table(storage: &dyn Storage, geometry: &Geometry, bitmap: &Bitmap) -> Result<Vec<Bits>> {
    let file_len = storage.len()?;
    let inside = |offset: u64, len: u64, what| match offset.checked_add(len) {
        Some(end) if end <= file_len => Ok(()),
        _ => Err(BlockError::from(Error::OutsideFile { what, offset, len, file_len })),
    };
    inside(bitmap.table_offset, bitmap.table_bytes(), "bitmap table")?;
    let mut bytes = vec![0; to_usize(bitmap.table_bytes())];
    storage.read_at(&mut bytes, bitmap.table_offset)?;
    let entries = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry));
    entries
        .map(|entry| match Bits::decode(entry, geometry) {
            Some(Bits::At(offset)) => {
                inside(offset, geometry.cluster_size(), "bitmap data").map(|()| Bits::At(offset))
            }
            Some(bits) => Ok(bits),
            None => Err(BlockError::from(Error::BitmapTable(bitmap.display_name()))),
        })
        .collect()
}

/// Reads the bits of a bitmap of a disk of `disk_size` bytes. Takes memory for what is stored only.
///
/// # Errors
/// As [`read_table`].
pub(super) fn load(
    storage: &dyn Storage,
    geometry: &Geometry,
    bitmap: &Bitmap,
    disk_size: u64,
) -> Result<DirtyBitmap> {
    let bits = DirtyBitmap::new(disk_size, bitmap.granularity_bits);
    let mut bytes = vec![0; to_usize(geometry.cluster_size())];
    let per_cluster = bits_per_cluster(geometry);
    let table = read_table(storage, geometry, bitmap)?;
    for (first, entry) in
        (0..).step_by(to_usize(per_cluster)).zip(table).take_while(|(n, _)| *n < bits.bits())
    {
        match entry {
            Bits::Clear => {}
            Bits::Set => bits.set(first << bitmap.granularity_bits, per_cluster << bitmap.granularity_bits),
            Bits::At(offset) => {
                storage.read_at(&mut bytes, offset)?;
                bits.import(first, &bytes);
            }
        }
    }
    bits.settle();
    Ok(bits)
}

/// Where the tables and the data of bitmaps lie, as (offset, length, kind), for the map of the image's structures.
/// Broken entries are left out, but not what overlaps: tables that lie in each other are all listed, and read once.
/// More data clusters than the file has are not: there are two of one place among them already.
///
/// # Errors
/// The host failed.
pub(crate) fn structures(
    storage: &dyn Storage,
    geometry: &Geometry,
    bitmaps: &[Bitmap],
) -> Result<Vec<(u64, u64, Kind)>> {
    let mut tables: Vec<(u64, u64)> = bitmaps.iter().map(|b| (b.table_offset, b.table_bytes())).collect();
    tables.sort_unstable();
    let mut found: Vec<_> = tables.iter().map(|(offset, len)| (*offset, *len, Kind::BitmapTable)).collect();
    let file_len = storage.len()?;
    let most = tables.len() + to_usize(geometry.clusters_for(file_len)) + 1;
    let mut at = 0;
    for (offset, len) in tables {
        let end = offset.saturating_add(len).min(file_len);
        at = at.max(offset);
        while at < end && found.len() < most {
            at += data_of(storage, geometry, at, end - at, &mut found)?;
        }
    }
    found.truncate(most);
    Ok(found)
}

/// Appends the data clusters that the first bytes of a table name; returns how many bytes were looked at. Holes in
/// the file are passed over.
fn data_of(
    storage: &dyn Storage,
    geometry: &Geometry,
    offset: u64,
    len: u64,
    found: &mut Vec<(u64, u64, Kind)>,
) -> Result<u64> {
    let (extent, file_len) = (storage.extent(offset, len)?, storage.len()?);
    // Entries do not straddle the pieces: file systems know holes of whole sectors only, but who knows.
    let len = extent.len.min(len).min(PIECE).next_multiple_of(8);
    if extent.data {
        let mut bytes = vec![0; to_usize(len)];
        storage.read_at(&mut bytes, offset)?;
        for entry in bytes.as_chunks::<8>().0 {
            match Bits::decode(u64::from_be_bytes(*entry), geometry) {
                Some(Bits::At(data)) if data < file_len => {
                    found.push((data, geometry.cluster_size(), Kind::BitmapData));
                }
                _ => {}
            }
        }
    }
    Ok(len)
}
