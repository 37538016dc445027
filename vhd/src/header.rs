//! The dynamic disk header: where the block allocation table is, and who the parent is.

use block::codec::{Reader, Writer};
use block::num::align_up;

use crate::error::{Error, Result};
use crate::footer::{NO_OFFSET, UniqueId, checksum};

/// Bytes of the header.
pub const HEADER_BYTES: u64 = 1024;
/// The first bytes.
const COOKIE: &[u8; 8] = b"cxsparse";
/// Where the sum is.
const CHECKSUM_AT: usize = 36;
/// Locators in a header.
const LOCATORS: usize = 8;
/// Characters of the parent's name.
const NAME_CHARS: usize = 256;
/// The largest locator that is read: paths are shorter.
const MAX_LOCATOR: u32 = 64 << 10;

/// Where one of the parent's names is stored (specification, "Dynamic Disk Header Format", Parent Locator Entry).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Locator {
    /// For which platform: `W2ru`, `W2ku`, `MacX`... Zero: not used.
    pub platform: [u8; 4],
    /// Room for the name, in sectors (bytes, by some programs).
    pub space: u32,
    /// Bytes of the name.
    pub len: u32,
    /// Where it is in the file.
    pub offset: u64,
}

impl Locator {
    /// Where it lies in the file, if there is one.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        let used = self.platform != [0; 4] && self.len != 0 && self.len <= MAX_LOCATOR;
        used.then_some((self.offset, u64::from(self.len)))
    }

    /// One past the space that is set aside for it, as far as both readings of that field agree that it is.
    pub(crate) fn end(&self) -> Option<u64> {
        let (offset, len) = self.range()?;
        offset.checked_add(align_up(len, 512)?)
    }
}

/// A dynamic disk header whose numbers make sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynamicHeader {
    /// Whether its sum is right. (qemu does not look; what else can be checked is checked.)
    pub sum_good: bool,
    /// Where the block allocation table is, in bytes.
    pub table_offset: u64,
    /// Entries of the table.
    pub entries: u32,
    /// Bytes of guest data in a block: a power of two, at least a sector.
    pub block_size: u32,
    /// The unique id of the parent; nil where there is none.
    pub parent_id: UniqueId,
    /// When the parent was last written to.
    pub parent_timestamp: u32,
    /// The parent's file name. Empty where there is none.
    pub parent_name: String,
    /// Further names of it.
    pub locators: [Locator; LOCATORS],
}

impl DynamicHeader {
    /// The header of a new disk, whose table follows.
    pub fn new(table_offset: u64, entries: u32, block_size: u32) -> Self {
        Self {
            sum_good: true,
            table_offset,
            entries,
            block_size,
            parent_id: UniqueId::default(),
            parent_timestamp: 0,
            parent_name: String::new(),
            locators: [Locator::default(); LOCATORS],
        }
    }

    /// Parses the 1024 bytes.
    ///
    /// # Errors
    /// No header, an unknown version, or a block size that cannot be.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(COOKIE) {
            return Err(Error::HeaderMagic);
        }
        let mut reader = Reader::new(bytes);
        let (version, sum, mut header) = Self::fields(&mut reader).ok_or(Error::HeaderMagic)?;
        header.sum_good = sum == checksum(bytes, CHECKSUM_AT);
        if version >> 16 != 1 {
            return Err(Error::HeaderVersion(version));
        }
        if !header.block_size.is_power_of_two() || header.block_size < 512 {
            return Err(Error::BlockSize(header.block_size));
        }
        Ok(header)
    }

    /// The fields in their order, with version and sum; `None` if there are not enough bytes.
    fn fields(reader: &mut Reader<'_>) -> Option<(u32, u32, Self)> {
        // Cookie, and the offset of a structure that does not exist yet.
        reader.skip(COOKIE.len() + 8)?;
        let table_offset = reader.be_u64()?;
        let version = reader.be_u32()?;
        let entries = reader.be_u32()?;
        let block_size = reader.be_u32()?;
        let sum = reader.be_u32()?;
        let parent_id = UniqueId(reader.take(16)?.try_into().ok()?);
        let parent_timestamp = reader.be_u32()?;
        reader.skip(4)?;
        let parent_name = utf16(reader.take(2 * NAME_CHARS)?, u16::from_be_bytes);
        let mut locators = [Locator::default(); LOCATORS];
        for locator in &mut locators {
            locator.platform = reader.take(4)?.try_into().ok()?;
            locator.space = reader.be_u32()?;
            locator.len = reader.be_u32()?;
            reader.skip(4)?;
            locator.offset = reader.be_u64()?;
        }
        let header = Self {
            sum_good: false,
            table_offset,
            entries,
            block_size,
            parent_id,
            parent_timestamp,
            parent_name,
            locators,
        };
        Some((version, sum, header))
    }

    /// The 1024 bytes, with their sum.
    pub fn encode(&self) -> Vec<u8> {
        let with_sum = |sum| {
            let mut writer = Writer::new();
            writer.bytes(COOKIE).be_u64(NO_OFFSET).be_u64(self.table_offset).be_u32(0x0001_0000);
            writer.be_u32(self.entries).be_u32(self.block_size).be_u32(sum);
            writer.bytes(&self.parent_id.0).be_u32(self.parent_timestamp).be_u32(0);
            let name = self.parent_name.encode_utf16().chain(std::iter::repeat(0));
            name.take(NAME_CHARS).for_each(|unit| {
                writer.be_u16(unit);
            });
            for locator in &self.locators {
                writer.bytes(&locator.platform).be_u32(locator.space).be_u32(locator.len).be_u32(0);
                writer.be_u64(locator.offset);
            }
            writer.pad_to(1024);
            writer.into_bytes()
        };
        with_sum(checksum(&with_sum(0), CHECKSUM_AT))
    }

    /// Bytes of the sector bitmap in front of each block (specification, "Data Blocks": padded to a sector).
    pub fn bitmap_bytes(&self) -> u64 {
        u64::from(self.block_size).div_ceil(512 * 8).next_multiple_of(512)
    }

    /// Bytes of the block allocation table on disk.
    pub fn table_bytes(&self) -> u64 {
        (u64::from(self.entries) * 4).next_multiple_of(512)
    }
}

/// UTF-16 text up to the first zero.
pub(crate) fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|pair| unit(*pair)).take_while(|unit| *unit != 0);
    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> DynamicHeader {
        let mut header = DynamicHeader::new(1536, 100, 2 << 20);
        header.parent_name = "Bäse 🐎.vhd".to_owned();
        header.parent_id = UniqueId([7; 16]);
        header.locators[1] = Locator { platform: *b"W2ru", space: 1, len: 20, offset: 4096 };
        header
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        let bytes = header().encode();
        assert_eq!((bytes.len(), DynamicHeader::parse(&bytes)), (1024, Ok(header())));
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 0x10;
            assert!(!DynamicHeader::parse(&changed).is_ok_and(|header| header.sum_good), "byte {index}");
        }
    }

    #[test]
    fn block_sizes_are_powers_of_two_of_at_least_a_sector() {
        for (size, good) in
            [(0, false), (256, false), (512, true), (3 << 20, false), (2 << 20, true), (1 << 31, true)]
        {
            let bytes = DynamicHeader { block_size: size, ..header() }.encode();
            let expected = if good { None } else { Some(Error::BlockSize(size)) };
            assert_eq!(DynamicHeader::parse(&bytes).err(), expected);
        }
        let bitmap = |block_size| DynamicHeader { block_size, ..header() }.bitmap_bytes();
        assert_eq!((bitmap(512), bitmap(2 << 20), bitmap(4 << 20)), (512, 512, 1024));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..1100)) {
            if bytes.len() >= 40 {
                bytes[..8].copy_from_slice(COOKIE);
                let sum = checksum(&bytes, CHECKSUM_AT);
                bytes[36..40].copy_from_slice(&sum.to_be_bytes());
            }
            if let Ok(header) = DynamicHeader::parse(&bytes) {
                let _ = (header.bitmap_bytes(), header.table_bytes(), header.locators.map(|l| l.end()));
            }
        }
    }
}
