//! The footer: what disk this is. At the end of every VHD, and a copy at the start of those that grow.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use block::codec::{Reader, Writer};

use crate::error::{Error, Result};
use crate::geometry::Geometry;

/// Bytes of a footer, and of a sector.
pub const FOOTER_BYTES: u64 = 512;
/// Bytes of a footer by Virtual PC before 2004 (specification, "Hard Disk Footer Format").
pub(crate) const OLD_FOOTER_BYTES: u64 = 511;
/// The first bytes.
pub(crate) const COOKIE: &[u8; 8] = b"conectix";
/// Where the sum is.
const CHECKSUM_AT: usize = 64;
/// Seconds from 1970 to 2000, when the format's time begins.
const EPOCH: u64 = 946_684_800;
/// Features: the reserved bit that is always set.
const FEATURES: u32 = 2;
/// The largest disk: what the format was designed for, and what every program agrees on.
pub const MAX_SIZE: u64 = 2040 << 30;
/// No further structure follows.
pub(crate) const NO_OFFSET: u64 = u64::MAX;

/// The number of a disk that is like no other's: what a differencing disk knows its parent by.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct UniqueId(pub [u8; 16]);

impl UniqueId {
    /// A new one.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random() -> block::Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| {
            block::Error::new(block::ErrorKind::Io, format!("no random numbers: {error}"))
        })?;
        // RFC 9562: version 4, variant 1.
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// Whether it says nothing.
    pub fn is_nil(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What kind of image it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskType {
    /// Every byte of the disk in its place.
    Fixed,
    /// Blocks, as they are needed.
    Dynamic,
    /// The difference from another image.
    Differencing,
}

impl DiskType {
    const fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    fn from_number(number: u32) -> Result<Self> {
        match number {
            2 => Ok(Self::Fixed),
            3 => Ok(Self::Dynamic),
            4 => Ok(Self::Differencing),
            other => Err(Error::Type(other)),
        }
    }
}

/// Which of its two statements about the size of a disk is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum SizeRule {
    /// By who made the image, as qemu: the geometry for `vpc ` and `qemu`, unless it is the largest one; the current
    /// size for everybody else.
    #[default]
    Creator,
    /// The geometry, always (`force_size_calc=chs`).
    Geometry,
    /// The current size, always (`force_size_calc=current_size`).
    CurrentSize,
}

/// A footer whose sum is right and whose version and type are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Bit 0: a temporary disk. Bit 1 is always set.
    pub features: u32,
    /// Where the dynamic disk header is, in bytes.
    pub data_offset: u64,
    /// Seconds since the year 2000.
    pub timestamp: u32,
    /// Who made it: four letters.
    pub creator: [u8; 4],
    /// Its version.
    pub creator_version: u32,
    /// On which system.
    pub creator_host: [u8; 4],
    /// The size in bytes when it was made.
    pub original_size: u64,
    /// The size in bytes now.
    pub current_size: u64,
    /// The size in the words of a BIOS.
    pub geometry: Geometry,
    /// What kind of image.
    pub disk_type: DiskType,
    /// Which disk.
    pub unique_id: UniqueId,
    /// A machine is suspended on it.
    pub saved_state: bool,
}

/// The complement of the sum of all bytes, those of the sum itself left out (specification, "Checksum").
pub(crate) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let outside = bytes.iter().take(at).chain(bytes.iter().skip(at + 4));
    !outside.fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))
}

impl Footer {
    /// Whether bytes begin as a footer does.
    pub fn announces(bytes: &[u8]) -> bool {
        bytes.starts_with(COOKIE)
    }

    /// Parses a footer of 512 bytes, or 511.
    ///
    /// # Errors
    /// It is not one, its sum is wrong, or it is of a version or type that is not known.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if !Self::announces(bytes) {
            return Err(Error::NotVhd);
        }
        let mut reader = Reader::new(bytes);
        let (fields, sum) = Self::fields(&mut reader).ok_or(Error::NotVhd)?;
        if sum != checksum(bytes, CHECKSUM_AT) {
            return Err(Error::FooterChecksum);
        }
        fields
    }

    /// The fields in their order; `None` if there are not enough bytes.
    fn fields(reader: &mut Reader<'_>) -> Option<(Result<Self>, u32)> {
        reader.skip(COOKIE.len())?;
        let features = reader.be_u32()?;
        let version = reader.be_u32()?;
        let data_offset = reader.be_u64()?;
        let timestamp = reader.be_u32()?;
        let creator = reader.take(4)?.try_into().ok()?;
        let creator_version = reader.be_u32()?;
        let creator_host = reader.take(4)?.try_into().ok()?;
        let original_size = reader.be_u64()?;
        let current_size = reader.be_u64()?;
        let geometry = Geometry { cylinders: reader.be_u16()?, heads: reader.u8()?, sectors: reader.u8()? };
        let disk_type = reader.be_u32()?;
        let sum = reader.be_u32()?;
        let unique_id = UniqueId(reader.take(16)?.try_into().ok()?);
        let saved_state = reader.u8()? != 0;
        let footer = DiskType::from_number(disk_type).and_then(|disk_type| {
            // "Major version changes": only those that are known can be understood.
            if version >> 16 != 1 {
                return Err(Error::Version(version));
            }
            Ok(Self {
                features,
                data_offset,
                timestamp,
                creator,
                creator_version,
                creator_host,
                original_size,
                current_size,
                geometry,
                disk_type,
                unique_id,
                saved_state,
            })
        });
        Some((footer, sum))
    }

    /// Why a good footer does not fit the file whose bytes before it are `available`.
    pub(crate) fn unfitting(&self, available: u64) -> Error {
        match self.disk_type {
            DiskType::Fixed => Error::OtherSize { size: self.current_size, available },
            DiskType::Dynamic | DiskType::Differencing => {
                Error::EndDamaged(Box::new(Error::NoHeader(self.data_offset)))
            }
        }
    }

    /// The 512 bytes, with their sum.
    pub fn encode(&self) -> Vec<u8> {
        let with_sum = |sum| {
            let mut writer = Writer::new();
            writer.bytes(COOKIE).be_u32(self.features).be_u32(0x0001_0000).be_u64(self.data_offset);
            writer.be_u32(self.timestamp).bytes(&self.creator).be_u32(self.creator_version);
            writer.bytes(&self.creator_host).be_u64(self.original_size).be_u64(self.current_size);
            writer.be_u16(self.geometry.cylinders).u8(self.geometry.heads).u8(self.geometry.sectors);
            writer.be_u32(self.disk_type.number()).be_u32(sum).bytes(&self.unique_id.0);
            writer.u8(self.saved_state.into()).pad_to(512);
            writer.into_bytes()
        };
        with_sum(checksum(&with_sum(0), CHECKSUM_AT))
    }

    /// The footer of a new disk.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new(size: u64, geometry: Geometry, disk_type: DiskType) -> block::Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Self {
            features: FEATURES,
            data_offset: if disk_type == DiskType::Fixed { NO_OFFSET } else { FOOTER_BYTES },
            timestamp: u32::try_from(now.saturating_sub(EPOCH)).unwrap_or(u32::MAX),
            creator: *b"vimg",
            creator_version: 0x0001_0000,
            creator_host: *b"Wi2k",
            original_size: size,
            current_size: size,
            geometry,
            disk_type,
            unique_id: UniqueId::random()?,
            saved_state: false,
        })
    }

    /// The size of the disk in bytes, a multiple of 512.
    ///
    /// # Errors
    /// More than the format allows.
    pub fn size(&self, rule: SizeRule) -> Result<u64> {
        let by_geometry = match rule {
            SizeRule::Geometry => true,
            SizeRule::CurrentSize => false,
            SizeRule::Creator => matches!(&self.creator, b"vpc " | b"qemu") && self.geometry != Geometry::MAX,
        };
        let size = if by_geometry { self.geometry.sectors() * 512 } else { self.current_size / 512 * 512 };
        if size > MAX_SIZE { Err(Error::TooLarge { size }) } else { Ok(size) }
    }

    /// Whether two footers tell of the same disk: they may differ in what changes in the life of an image.
    pub(crate) fn same_disk(&self, other: &Self) -> bool {
        let of = |footer: &Self| {
            (footer.disk_type, footer.data_offset, footer.unique_id, footer.current_size, footer.geometry)
        };
        of(self) == of(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn footer() -> Footer {
        Footer::new(64 << 20, Geometry::covering(131_072), DiskType::Dynamic).unwrap()
    }

    fn sized(creator: &[u8; 4], geometry: Geometry) -> Footer {
        Footer { creator: *creator, geometry, ..footer() }
    }

    #[test]
    fn what_is_encoded_is_parsed() {
        for disk_type in [DiskType::Fixed, DiskType::Dynamic, DiskType::Differencing] {
            let footer = Footer { disk_type, saved_state: true, ..footer() };
            let bytes = footer.encode();
            assert_eq!((bytes.len(), Footer::parse(&bytes)), (512, Ok(footer.clone())));
            assert_eq!(Footer::parse(&bytes[..511]), Ok(footer), "the last byte is a reserved zero");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = footer().encode();
        for index in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[index / 8] ^= 1 << (index % 8);
            assert!(Footer::parse(&flipped).is_err(), "bit {index}");
        }
    }

    /// Measured with qemu-img 10.0.2.
    #[test]
    fn the_size_depends_on_who_made_the_image() {
        let small = Geometry { cylinders: 963, heads: 8, sectors: 17 };
        for creator in [b"vpc ", b"qemu"] {
            assert_eq!(sized(creator, small).size(SizeRule::Creator), Ok(67_055_616));
            assert_eq!(sized(creator, Geometry::MAX).size(SizeRule::Creator), Ok(64 << 20));
        }
        for creator in
            [b"qem2", b"win ", b"d2v ", b"tap\0", b"vbox", b"vs  ", b"CTXS", b"wa  ", b"abcd", b"vimg"]
        {
            assert_eq!(sized(creator, small).size(SizeRule::Creator), Ok(64 << 20));
        }
        assert_eq!(sized(b"win ", small).size(SizeRule::Geometry), Ok(67_055_616));
        assert_eq!(sized(b"vpc ", small).size(SizeRule::CurrentSize), Ok(64 << 20));
        let large = Footer { current_size: MAX_SIZE + 512, ..sized(b"win ", small) };
        assert!(matches!(large.size(SizeRule::Creator), Err(Error::TooLarge { .. })));
        let odd = Footer { current_size: (64 << 20) + 100, ..sized(b"win ", small) };
        assert_eq!(odd.size(SizeRule::Creator), Ok(64 << 20));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), fix in any::<bool>()) {
            if fix && bytes.len() >= 72 {
                bytes[..8].copy_from_slice(COOKIE);
                let sum = checksum(&bytes, CHECKSUM_AT);
                bytes[64..68].copy_from_slice(&sum.to_be_bytes());
            }
            if let Ok(footer) = Footer::parse(&bytes) {
                for rule in [SizeRule::Creator, SizeRule::Geometry, SizeRule::CurrentSize] {
                    let _ = footer.size(rule);
                }
                prop_assert_eq!(Footer::parse(&footer.encode()).map(|f| f.unique_id), Ok(footer.unique_id));
            }
        }
    }
}
