//! Persistent dirty bitmaps (specification, "Bitmaps extension").
//!
//! ```text
//!   header extension -> directory          table             data clusters
//!                       | name, flags |    | host offset |-> | bits    |
//!                       | table at    |--> | 0: no bit   |   +---------+
//!                       | table at    |    | 1: all bits |
//! ```
//!
//! This file knows the directory; `contents` the tables and bits, `record` how writes to the disk get into them
//! and they to the disk again, `edit` what a user can do to them.

mod contents;
mod edit;
mod record;

use block::Storage;
use block::codec::{Reader, Writer};
use block::num::{is_aligned, to_usize};

use crate::error::Error;
use crate::extension::BitmapsExtension;
use crate::geometry::Geometry;
use crate::header::Header;

pub(crate) use contents::structures;
pub use edit::check_new;
pub(crate) use record::Recorder;

/// The bitmap was open for writing when the image was last closed or lost: its bits cannot be trusted.
pub const IN_USE: u32 = 1 << 0;
/// The bitmap is recording.
pub const AUTO: u32 = 1 << 1;
/// The only type of bitmap that there is.
const DIRTY_TRACKING: u8 = 1;
/// QEMU's range of `granularity_bits`.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Longest name of a bitmap in bytes.
pub const MAX_NAME: u16 = 1023;
/// QEMU's limit for the entries of a bitmap's table.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// QEMU's limit for the data of a bitmap in bytes.
const MAX_DATA: u64 = 0x2000_0000;
/// Bytes of a directory entry before the extra data.
const FIXED: usize = 24;

/// An entry of the bitmap directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Host offset of the bitmap's table.
    pub table_offset: u64,
    /// Entries of the table.
    pub table_size: u32,
    /// [`IN_USE`] and [`AUTO`].
    pub flags: u32,
    /// log2 of the bytes of disk that a bit stands for.
    pub granularity_bits: u8,
    /// The name (not necessarily UTF-8).
    pub name: Vec<u8>,
}

impl Bitmap {
    /// Bytes of disk that a bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Whether its bits cannot be trusted.
    pub fn in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Whether it is recording.
    pub fn auto(&self) -> bool {
        self.flags & AUTO != 0
    }

    /// Parses the next entry of the directory.
    fn parse(reader: &mut Reader<'_>, geometry: &Geometry, disk_size: u64) -> Result<Self, Error> {
        let broken = || Error::Bitmaps("Broken bitmap directory".into());
        let start = reader.position();
        let (fixed, extra_len, name_len) = Self::parse_fixed(reader).ok_or_else(broken)?;
        let extra = usize::try_from(extra_len).ok().and_then(|len| reader.take(len));
        let name = extra.and_then(|_| reader.take(name_len.into()));
        let padding = (reader.position() - start).next_multiple_of(8) - (reader.position() - start);
        if extra_len != 0 {
            return Err(Error::Bitmaps("Bitmap extra data is not supported".into()));
        }
        let name = name.ok_or_else(broken)?.to_vec();
        reader.skip(padding).ok_or_else(broken)?;
        let bitmap = Self { name, ..fixed.bitmap };
        if fixed.kind != DIRTY_TRACKING || name_len > MAX_NAME || !bitmap.is_valid(geometry, disk_size) {
            let text = format!("Bitmap '{}' doesn't satisfy the constraints", bitmap.display_name());
            return Err(Error::Bitmaps(text));
        }
        Ok(bitmap)
    }

    fn parse_fixed(reader: &mut Reader<'_>) -> Option<(Fixed, u32, u16)> {
        let (table_offset, table_size, flags) = (reader.be_u64()?, reader.be_u32()?, reader.be_u32()?);
        let (kind, granularity_bits) = (reader.u8()?, reader.u8()?);
        let (name_len, extra_len) = (reader.be_u16()?, reader.be_u32()?);
        let bitmap = Self { table_offset, table_size, flags, granularity_bits, name: vec![] };
        Some((Fixed { bitmap, kind }, extra_len, name_len))
    }

    fn is_valid(&self, geometry: &Geometry, disk_size: u64) -> bool {
        let data = u64::from(self.table_size) << geometry.cluster_bits;
        let numbers = self.table_offset != 0
            && is_aligned(self.table_offset, geometry.cluster_size())
            && (1..=MAX_TABLE_ENTRIES).contains(&self.table_size)
            && GRANULARITY_BITS.contains(&self.granularity_bits)
            && self.flags & !(IN_USE | AUTO) == 0
            && !self.name.is_empty();
        // The data of a bitmap whose image was resized while it was in use may be of another size.
        let covers = || (u128::from(data) * 8) << self.granularity_bits >= u128::from(disk_size);
        numbers && data <= MAX_DATA && (self.in_use() || covers())
    }

    /// The name for people.
    pub fn display_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Appends the entry to a directory.
    fn encode(&self, writer: &mut Writer) {
        // A name is at most MAX_NAME bytes long.
        let name_len = u16::try_from(self.name.len()).unwrap_or(MAX_NAME);
        writer.be_u64(self.table_offset).be_u32(self.table_size).be_u32(self.flags);
        writer.u8(DIRTY_TRACKING).u8(self.granularity_bits).be_u16(name_len).be_u32(0);
        writer.bytes(&self.name).pad_to(8);
    }

    /// Bytes of the entry in the directory.
    fn entry_bytes(&self) -> u64 {
        (FIXED as u64 + self.name.len() as u64).next_multiple_of(8)
    }

    /// Bytes of the bitmap's table.
    pub fn table_bytes(&self) -> u64 {
        u64::from(self.table_size) * 8
    }
}

/// What has been read of an entry before its name.
struct Fixed {
    bitmap: Bitmap,
    kind: u8,
}

/// Reads the bitmap directory; empty if the image has no bitmaps, or none that are up to date.
///
/// # Errors
/// What is wrong with it, in QEMU's words; `Truncated` if the file ends before the directory; or the host
/// failed.
pub fn read_directory(storage: &dyn Storage, header: &Header) -> block::Result<Vec<Bitmap>> {
    let Some(extension) = &header.bitmaps else { return Ok(vec![]) };
    let file_len = storage.len()?;
    let (offset, len) = (extension.directory_offset, extension.directory_size);
    if len == 0 {
        return Err(Error::Bitmaps("Requested bitmap directory size is zero".into()).into());
    }
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(Error::OutsideFile { what: "bitmap directory", offset, len, file_len }.into());
    }
    let mut bytes = vec![0; to_usize(len)];
    storage.read_at(&mut bytes, offset)?;
    Ok(parse_directory(&bytes, extension, header)?)
}

/// The directory of these bitmaps, as it is stored.
fn encode_directory(bitmaps: &[Bitmap]) -> Vec<u8> {
    let mut writer = Writer::new();
    bitmaps.iter().for_each(|bitmap| bitmap.encode(&mut writer));
    writer.into_bytes()
}

fn parse_directory(
    bytes: &[u8],
    extension: &BitmapsExtension,
    header: &Header,
) -> Result<Vec<Bitmap>, Error> {
    let mut reader = Reader::new(bytes);
    let mut bitmaps: Vec<Bitmap> = vec![];
    let mut names = std::collections::HashSet::new();
    while reader.remaining() > 0 {
        if bitmaps.len() as u64 >= u64::from(extension.count) {
            return Err(Error::Bitmaps("More bitmaps found than specified in header extension".into()));
        }
        if reader.remaining() < FIXED {
            return Err(Error::Bitmaps("Broken bitmap directory".into()));
        }
        let bitmap = Bitmap::parse(&mut reader, &header.geometry(), header.size)?;
        if !names.insert(bitmap.name.clone()) {
            return Err(Error::Bitmaps(format!("Bitmap already exists: {}", bitmap.display_name())));
        }
        bitmaps.push(bitmap);
    }
    if (bitmaps.len() as u64) < u64::from(extension.count) {
        return Err(Error::Bitmaps("Less bitmaps found than specified in header extension".into()));
    }
    Ok(bitmaps)
}

#[cfg(test)]
mod tests;
