//! The header: what the first sector of a VDI says.

use std::fmt;

use block::codec::{Reader, Writer};
use block::num::to_usize;
use block::{Result, Storage};

use crate::error::{self, Error};

/// Bytes that the header takes: one sector.
pub(crate) const HEADER_BYTES: u64 = 512;
/// Bytes of text in front.
const TEXT_BYTES: usize = 64;
/// What we write there.
const TEXT: &[u8] = b"<<< vimg VM Virtual Disk Image >>>\n";
/// The number behind the text.
pub(crate) const SIGNATURE: u32 = 0xbeda_107f;
/// Where that is.
pub(crate) const SIGNATURE_AT: usize = 0x40;
/// Version 1.1, the only one in use.
const VERSION: u32 = 0x0001_0001;
/// Bytes of the rest of the header as VirtualBox writes it, the second geometry included.
const SIZE_FIELD: u32 = 0x190;
/// Bytes of the comment.
const COMMENT_BYTES: usize = 256;
/// Where the number of blocks in use is; the image's UUID and that of its last change follow.
const ALLOCATED_AT: u64 = 0x184;
/// Guest bytes of a block, by everybody's choice.
pub(crate) const BLOCK_SIZE: u32 = 1 << 20;
/// The largest block that is accepted.
const MAX_BLOCK_SIZE: u32 = 256 << 20;
/// The most blocks of an image (qemu's limit: a map of 2 GiB).
pub(crate) const MAX_BLOCKS: u64 = 0x1fff_ff80;
/// The largest disk with blocks of the usual size.
pub(crate) const MAX_SIZE: u64 = MAX_BLOCKS << 20;

/// A UUID as it is stored: the first three groups little-endian.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// A new one.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| {
            block::Error::new(block::ErrorKind::Io, format!("no random numbers: {error}"))
        })?;
        // RFC 9562: version 4, variant 1; the version is in the high byte of the third group.
        bytes[7] = bytes[7] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// Whether it says nothing.
    pub fn is_nil(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
        for (position, index) in order.into_iter().enumerate() {
            if matches!(position, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[index])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What kind of image it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageType {
    /// Blocks, as they are needed.
    Dynamic,
    /// All blocks from the start.
    Static,
    /// The difference from another image.
    Differencing,
}

impl ImageType {
    const fn number(self) -> u32 {
        match self {
            Self::Dynamic => 1,
            Self::Static => 2,
            Self::Differencing => 4,
        }
    }

    fn from_number(number: u32) -> error::Result<Self> {
        match number {
            1 => Ok(Self::Dynamic),
            2 => Ok(Self::Static),
            4 => Ok(Self::Differencing),
            // 3: undo images, which VirtualBox never released.
            other => Err(Error::Type(other)),
        }
    }
}

/// A header that makes sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What kind of image.
    pub image_type: ImageType,
    /// Where the block map is, in bytes: a multiple of 512.
    pub map_offset: u32,
    /// Where the data is, in bytes: a multiple of 512.
    pub data_offset: u32,
    /// Bytes of the disk, a multiple of 512.
    pub disk_size: u64,
    /// Guest bytes of a block: a power of two.
    pub block_size: u32,
    /// Entries of the map: as many as the disk has blocks.
    pub blocks: u32,
    /// Blocks in use.
    pub allocated: u32,
    /// Which image.
    pub uuid: Uuid,
    /// Which state of it: another one after every session that changes it.
    pub modified: Uuid,
    /// The [`uuid`](Self::uuid) of the parent; nil where there is none.
    pub parent: Uuid,
    /// The [`modified`](Self::modified) of the parent when the image was made.
    pub parent_modified: Uuid,
}

impl Header {
    /// Whether the first bytes of a file announce a VDI.
    pub fn probe(first: &[u8]) -> bool {
        let magic = first.get(SIGNATURE_AT..SIGNATURE_AT + 4);
        magic == Some(&SIGNATURE.to_le_bytes())
    }

    /// Reads the header of an image.
    ///
    /// # Errors
    /// As [`parse`](Self::parse); the map does not lie in the file; or the host failed.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let mut bytes = vec![0; to_usize(HEADER_BYTES)];
        storage.read_at(&mut bytes, 0)?;
        let header = Self::parse(&bytes)?;
        let (offset, len, file_len) = (u64::from(header.map_offset), header.map_bytes(), storage.len()?);
        if offset + len > file_len {
            return Err(Error::MapOutsideFile { offset, len, file_len }.into());
        }
        Ok(header)
    }

    /// Parses the first sector.
    ///
    /// # Errors
    /// It is none, or needs what we do not have, or contradicts itself; in qemu's words where it has some.
    pub fn parse(bytes: &[u8]) -> error::Result<Self> {
        let mut reader = Reader::new(bytes);
        Self::fields(&mut reader).unwrap_or(Err(Error::Signature(0)))
    }

    /// The fields in their order; `None` if there are not enough bytes.
    fn fields(reader: &mut Reader<'_>) -> Option<error::Result<Self>> {
        reader.skip(TEXT_BYTES)?;
        let signature = reader.le_u32()?;
        if signature != SIGNATURE {
            return Some(Err(Error::Signature(signature)));
        }
        let version = reader.le_u32()?;
        reader.skip(4)?; // The size of the rest; everybody's is long enough.
        let image_type = reader.le_u32()?;
        reader.skip(4 + COMMENT_BYTES)?; // Flags, which are about how VirtualBox handles it, and a comment.
        let (map_offset, data_offset) = (reader.le_u32()?, reader.le_u32()?);
        reader.skip(12)?; // A geometry that nobody uses any more.
        let sector_size = reader.le_u32()?;
        reader.skip(4)?;
        let disk_size = reader.le_u64()?;
        let (block_size, block_extra) = (reader.le_u32()?, reader.le_u32()?);
        let (blocks, allocated) = (reader.le_u32()?, reader.le_u32()?);
        let mut uuids = [Uuid::default(); 4];
        for uuid in &mut uuids {
            *uuid = Uuid(reader.take(16)?.try_into().ok()?);
        }
        let [uuid, modified, parent, parent_modified] = uuids;
        let checked = if version != VERSION {
            Err(Error::Version(version))
        } else if sector_size != 512 {
            Err(Error::SectorSize(sector_size))
        } else if block_extra != 0 {
            Err(Error::BlockExtra(block_extra))
        } else {
            ImageType::from_number(image_type)
        };
        Some(checked.and_then(|image_type| {
            let disk_size = disk_size.checked_next_multiple_of(512).unwrap_or(u64::MAX);
            let header = Self {
                image_type,
                map_offset,
                data_offset,
                disk_size,
                block_size,
                blocks,
                allocated,
                uuid,
                modified,
                parent,
                parent_modified,
            };
            header.check().map(|()| header)
        }))
    }

    /// Whether the numbers go together.
    fn check(&self) -> error::Result<()> {
        if !self.map_offset.is_multiple_of(512) {
            return Err(Error::MapUnaligned(self.map_offset));
        }
        if !self.data_offset.is_multiple_of(512) {
            return Err(Error::DataUnaligned(self.data_offset));
        }
        if !self.block_size.is_power_of_two() || !(512..=MAX_BLOCK_SIZE).contains(&self.block_size) {
            return Err(Error::BlockSize(self.block_size));
        }
        let max = MAX_BLOCKS * u64::from(self.block_size);
        if self.disk_size > max {
            return Err(Error::TooLarge { size: self.disk_size, max });
        }
        let room = u64::from(self.blocks) * u64::from(self.block_size);
        if self.disk_size > room {
            return Err(Error::MapTooSmall { size: self.disk_size, room });
        }
        // As every program writes it. qemu reads as much as the size says, and drops the other blocks without a word.
        let needed = self.needed_blocks();
        if u64::from(self.blocks) != needed {
            return Err(Error::MapTooLarge { size: self.disk_size, needed, blocks: self.blocks });
        }
        self.check_places()?;
        if self.image_type != ImageType::Differencing {
            // A snapshot that says otherwise: its contents are not all here.
            for (uuid, name) in [(self.parent, "link"), (self.parent_modified, "parent")] {
                if !uuid.is_nil() {
                    return Err(Error::UnexpectedParent(name));
                }
            }
        }
        Ok(())
    }

    /// Header, map and data do not overlap.
    fn check_places(&self) -> error::Result<()> {
        let (offset, len) = (u64::from(self.map_offset), self.map_bytes());
        let data = u64::from(self.data_offset);
        if offset < HEADER_BYTES {
            return Err(Error::MapPlace { offset, len, what: "header" });
        }
        if data < offset + len {
            return Err(Error::MapPlace { offset, len, what: "data" });
        }
        Ok(())
    }

    /// Blocks that the disk needs.
    pub fn needed_blocks(&self) -> u64 {
        self.disk_size.div_ceil(u64::from(self.block_size))
    }

    /// Bytes of the map, as far as the disk needs it.
    pub(crate) fn map_bytes(&self) -> u64 {
        4 * self.needed_blocks()
    }

    /// The first sector.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.bytes(TEXT).pad_to(TEXT_BYTES);
        writer
            .le_u32(SIGNATURE)
            .le_u32(VERSION)
            .le_u32(SIZE_FIELD)
            .le_u32(self.image_type.number())
            .le_u32(0);
        writer.bytes(&[0; COMMENT_BYTES]).le_u32(self.map_offset).le_u32(self.data_offset);
        writer.le_u32(0).le_u32(0).le_u32(0).le_u32(512).le_u32(0);
        writer
            .le_u64(self.disk_size)
            .le_u32(self.block_size)
            .le_u32(0)
            .le_u32(self.blocks)
            .le_u32(self.allocated);
        for uuid in [self.uuid, self.modified, self.parent, self.parent_modified] {
            writer.bytes(&uuid.0);
        }
        writer.pad_to(to_usize(HEADER_BYTES));
        writer.into_bytes()
    }

    /// Writes what changes in the life of an image, one piece of one sector.
    pub(crate) fn write_state(&self, storage: &dyn Storage, allocated: u32, modified: Uuid) -> Result<()> {
        let mut writer = Writer::new();
        writer.le_u32(allocated).bytes(&self.uuid.0).bytes(&modified.0);
        storage.write_at(&writer.into_bytes(), ALLOCATED_AT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            image_type: ImageType::Dynamic,
            map_offset: 512,
            data_offset: 4096,
            disk_size: 64 << 20,
            block_size: BLOCK_SIZE,
            blocks: 64,
            allocated: 3,
            uuid: Uuid([1; 16]),
            modified: Uuid([2; 16]),
            parent: Uuid::default(),
            parent_modified: Uuid::default(),
        }
    }

    fn with(offset: usize, value: &[u8]) -> error::Result<Header> {
        let mut bytes = header().encode();
        bytes[offset..offset + value.len()].copy_from_slice(value);
        Header::parse(&bytes)
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        let bytes = header().encode();
        assert_eq!((bytes.len(), Header::parse(&bytes)), (512, Ok(header())));
        assert!(Header::probe(&bytes) && !Header::probe(&bytes[..66]) && !Header::probe(&[0; 512]));
        let child = Header {
            image_type: ImageType::Differencing,
            parent: Uuid([3; 16]),
            parent_modified: Uuid([4; 16]),
            ..header()
        };
        assert_eq!(Header::parse(&child.encode()), Ok(child));
    }

    /// What qemu-img 10.0.2 says of the same.
    #[test]
    fn headers_that_cannot_be_are_refused_in_qemus_words() {
        let said = |offset, value: &[u8]| with(offset, value).unwrap_err().to_string();
        let u32_at = |offset, value: u32| said(offset, &value.to_le_bytes());
        assert_eq!(u32_at(0x40, 0), "Image not in VDI format (bad signature 00000000)");
        assert_eq!(u32_at(0x44, 1), "unsupported VDI image (version 0.1)");
        assert_eq!(u32_at(0x154, 0x201), "unsupported VDI image (unaligned block map offset 0x201)");
        assert_eq!(u32_at(0x158, 0x401), "unsupported VDI image (unaligned data offset 0x401)");
        assert_eq!(u32_at(0x168, 4096), "unsupported VDI image (sector size 4096 is not 512)");
        let text = "unsupported VDI image (disk size 68157440, image bitmap has room for 67108864)";
        assert_eq!(said(0x170, &(65u64 << 20).to_le_bytes()), text);
        let text =
            "Unsupported VDI image size (size is 0x8000000000000000, max supported is 0x1fffff8000000)";
        assert_eq!(said(0x170, &(1u64 << 63).to_le_bytes()), text);
        assert_eq!(said(0x1a8, &[7; 16]), "unsupported VDI image (non-NULL link UUID)");
        assert_eq!(said(0x1b8, &[7; 16]), "unsupported VDI image (non-NULL parent UUID)");
        // Where qemu reads on: the map in the header, the data in the map, blocks that are longer than they say.
        assert_eq!(u32_at(0x154, 0), "the block map at 0x0 (length 0x100) overlaps the header");
        assert_eq!(u32_at(0x158, 512), "the block map at 0x200 (length 0x100) overlaps the data");
        assert_eq!(u32_at(0x17c, 512), "unsupported VDI image (512 extra bytes in each block)");
        let text =
            "the disk has 2097152 bytes, which are 2 blocks, but the image has 64: the header is damaged";
        assert_eq!(said(0x170, &(2u64 << 20).to_le_bytes()), text);
        assert_eq!(u32_at(0x4c, 3), "unsupported VDI image (image type 3)");
        for size in [0, 256, 3 << 20, 512 << 20] {
            assert_eq!(u32_at(0x178, size), format!("unsupported VDI image (block size {size})"));
        }
    }

    #[test]
    fn sizes_are_rounded_up_to_sectors() {
        let odd = with(0x170, &((63u64 << 20) + 1).to_le_bytes()).unwrap();
        assert_eq!(odd.disk_size, (63 << 20) + 512);
    }

    #[test]
    fn uuids_are_shown_as_virtualbox_shows_them() {
        let uuid = Uuid([
            0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
        ]);
        assert_eq!(uuid.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), good in any::<bool>()) {
            if good && bytes.len() >= 512 {
                bytes[..0x154].copy_from_slice(&header().encode()[..0x154]);
            }
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert_eq!(Header::parse(&header.encode()), Ok(header));
            }
        }
    }
}
