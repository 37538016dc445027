//! The header of a hosted sparse extent: the first sector of monolithicSparse, twoGbMaxExtentSparse and
//! streamOptimized files (specification, "Hosted Sparse Extents").
//!
//! Bytes become a [`Header`] only after every field has been compared with its limits; only whether the places that
//! it names lie inside the file is left to whoever knows the file.

use block::codec::{Reader, Writer};
use block::{Error, ErrorKind, Result, Storage};

use crate::SECTOR;
use crate::descriptor::{Descriptor, Kind};

/// The first four bytes.
pub const MAGIC: &[u8; 4] = b"KDMV";
/// Length in bytes.
pub const LENGTH: usize = 512;
/// `gd_offset` of a file whose grain directory is named by the footer.
pub const GD_AT_END: u64 = u64::MAX;
/// Sectors of the largest grain, as in qemu.
const MAX_GRAIN: u64 = 0x20_0000;
/// Entries of the largest grain table.
const MAX_GTES: u32 = 512;
/// Entries of the largest grain directory, as in qemu.
const MAX_GDES: u64 = 32 << 20;

/// The bits of `flags`.
pub mod flags {
    /// Bytes 73 to 76 are to be compared, to find transfers that have translated line ends.
    pub const NEWLINE_TEST: u32 = 1;
    /// There is a redundant grain directory.
    pub const REDUNDANT: u32 = 1 << 1;
    /// A grain table entry of 1 stands for a grain of zeros.
    pub const ZERO_GRAINS: u32 = 1 << 2;
    /// Grains are compressed.
    pub const COMPRESSED: u32 = 1 << 16;
    /// Metadata is announced by markers.
    pub const MARKERS: u32 = 1 << 17;
}

/// The header of a hosted sparse extent. Places and lengths are in sectors, unless they say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// 1, 2 or 3.
    pub version: u32,
    /// Bits of [`flags`], and others that are kept.
    pub flags: u32,
    /// Size of the extent's part of the disk.
    pub capacity: u64,
    /// Size of a grain: a power of two.
    pub grain: u64,
    /// Where the embedded descriptor lies; 0: there is none.
    pub descriptor_offset: u64,
    /// Room for the embedded descriptor.
    pub descriptor_len: u64,
    /// Entries of a grain table.
    pub gtes_per_gt: u32,
    /// Where the redundant grain directory lies.
    pub rgd_offset: u64,
    /// Where the grain directory lies, or [`GD_AT_END`].
    pub gd_offset: u64,
    /// What lies before the first grain.
    pub overhead: u64,
    /// The file is open for writing, or was not closed.
    pub unclean: bool,
    /// Four bytes that a transfer as text would have changed.
    pub newlines: [u8; 4],
    /// 0: none, 1: deflate.
    pub compression: u16,
}

/// What `newlines` is to contain.
pub const NEWLINES: [u8; 4] = *b"\n \r\n";
/// Position of `uncleanShutdown` in bytes.
pub const UNCLEAN_AT: u64 = 72;

impl Header {
    /// Reads the header at `offset` (0, or that of a footer) of a file.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), or the host failed.
    pub fn read(storage: &dyn Storage, offset: u64) -> Result<Self> {
        let mut bytes = [0; LENGTH];
        storage.read_at(&mut bytes, offset)?;
        Self::parse(&bytes)
    }

    /// Validates a header. `capacity` 0 with a descriptor is let pass: such a file is nothing but a descriptor.
    ///
    /// # Errors
    /// What is wrong with it, in qemu's words where it has some.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let too_short = || Error::new(ErrorKind::Truncated, "the header of the sparse extent is cut off");
        let header = Self::decode(bytes).ok_or_else(too_short)??;
        header.validate()?;
        Ok(header)
    }

    fn decode(bytes: &[u8]) -> Option<Result<Self>> {
        let mut reader = Reader::new(bytes.get(..LENGTH)?);
        if reader.take(4)? != MAGIC {
            return Some(Err(Error::invalid(
                "the sparse extent has no header: its first bytes are not 'KDMV'",
            )));
        }
        let (version, flags) = (reader.le_u32()?, reader.le_u32()?);
        let (capacity, grain) = (reader.le_u64()?, reader.le_u64()?);
        let (descriptor_offset, descriptor_len) = (reader.le_u64()?, reader.le_u64()?);
        let gtes_per_gt = reader.le_u32()?;
        let (rgd_offset, gd_offset, overhead) = (reader.le_u64()?, reader.le_u64()?, reader.le_u64()?);
        let unclean = reader.u8()? != 0;
        let newlines = reader.take(4)?.try_into().ok()?;
        let compression = reader.le_u16()?;
        Some(Ok(Self {
            version,
            flags,
            capacity,
            grain,
            descriptor_offset,
            descriptor_len,
            gtes_per_gt,
            rgd_offset,
            gd_offset,
            overhead,
            unclean,
            newlines,
            compression,
        }))
    }

    fn validate(&self) -> Result<()> {
        if !(1..=3).contains(&self.version) {
            return Err(Error::unsupported(format!("Unsupported VMDK version {}", self.version)));
        }
        if self.is_descriptor_only() {
            return Ok(());
        }
        if self.flags & flags::NEWLINE_TEST != 0 && self.newlines != NEWLINES {
            let text = "the file was transferred as text: its line ends have been translated";
            return Err(Error::new(ErrorKind::Corrupt, text).hint("Transfer it again, as binary."));
        }
        if self.compression > 1 {
            return Err(Error::unsupported(format!("Unsupported compression {}", self.compression)));
        }
        if self.compression == 0 && self.flags & (flags::COMPRESSED | flags::MARKERS) != 0 {
            let text = "the header says that grains are compressed (or have markers), but not how";
            return Err(Error::unsupported(text));
        }
        if self.gtes_per_gt > MAX_GTES {
            return Err(Error::invalid("L2 table size too big"));
        }
        if self.gtes_per_gt == 0 {
            return Err(Error::invalid("L1 entry size is invalid"));
        }
        if !self.grain.is_power_of_two() || self.grain > MAX_GRAIN {
            return Err(Error::invalid("Invalid granularity, image may be corrupt")
                .hint(format!("the header says that a grain has {} sectors", self.grain)));
        }
        if self.capacity > i64::MAX.cast_unsigned() / SECTOR {
            return Err(Error::invalid(format!("the extent claims to have {} sectors", self.capacity)));
        }
        if self.gd_entries() > MAX_GDES {
            return Err(Error::unsupported("L1 size too big"));
        }
        Ok(())
    }

    /// The sector as it is written.
    pub fn encode(&self) -> [u8; LENGTH] {
        let mut writer = Writer::new();
        writer.bytes(MAGIC).le_u32(self.version).le_u32(self.flags);
        writer.le_u64(self.capacity).le_u64(self.grain);
        writer.le_u64(self.descriptor_offset).le_u64(self.descriptor_len).le_u32(self.gtes_per_gt);
        writer.le_u64(self.rgd_offset).le_u64(self.gd_offset).le_u64(self.overhead);
        writer.u8(u8::from(self.unclean)).bytes(&self.newlines);
        writer.bytes(&self.compression.to_le_bytes()).pad_to(LENGTH);
        let mut sector = [0; LENGTH];
        sector.copy_from_slice(&writer.into_bytes());
        sector
    }

    /// Whether the file is a descriptor behind a header, and no extent.
    pub fn is_descriptor_only(&self) -> bool {
        self.capacity == 0 && self.descriptor_offset != 0
    }

    /// Whether a bit of [`flags`] is set.
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Compares the capacity with the extent line of the embedded descriptor, if that describes this file alone. Products
    /// round one of them to whole grains.
    ///
    /// # Errors
    /// They are a grain or more apart.
    pub fn check_descriptor(&self, descriptor: &Descriptor) -> Result<()> {
        let [line] = descriptor.extents() else { return Ok(()) };
        let alone = matches!(descriptor.create_type(), "monolithicSparse" | "streamOptimized");
        if !alone || line.kind != Kind::Sparse || line.sectors.abs_diff(self.capacity) < self.grain {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the descriptor in the file says that the disk has {} sectors, and the header says {}",
            line.sectors, self.capacity
        )))
    }

    /// Whether the grains are compressed.
    pub fn is_compressed(&self) -> bool {
        self.has(flags::COMPRESSED)
    }

    /// Bytes of a grain.
    pub fn grain_bytes(&self) -> u64 {
        self.grain * SECTOR
    }

    /// Sectors of the disk that a grain table is for.
    pub fn gt_coverage(&self) -> u64 {
        self.grain * u64::from(self.gtes_per_gt)
    }

    /// Entries of the grain directory.
    pub fn gd_entries(&self) -> u64 {
        self.capacity.div_ceil(self.gt_coverage())
    }

    /// Sectors of a grain table.
    pub fn gt_sectors(&self) -> u64 {
        (u64::from(self.gtes_per_gt) * 4).div_ceil(SECTOR)
    }

    /// Sectors of the grain directory.
    pub fn gd_sectors(&self) -> u64 {
        (self.gd_entries() * 4).div_ceil(SECTOR)
    }

    /// The embedded descriptor's place as (offset, length) in bytes, if there is one.
    pub fn descriptor_place(&self) -> Option<(u64, u64)> {
        let offset = self.descriptor_offset.checked_mul(SECTOR).filter(|offset| *offset != 0)?;
        Some((offset, self.descriptor_len.saturating_mul(SECTOR)))
    }
}

/// Whether these are the first bytes of a hosted sparse extent.
pub fn probe(first: &[u8]) -> bool {
    first.starts_with(MAGIC)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample() -> Header {
        Header {
            version: 1,
            flags: flags::NEWLINE_TEST | flags::REDUNDANT,
            capacity: 195_313,
            grain: 128,
            descriptor_offset: 1,
            descriptor_len: 20,
            gtes_per_gt: 512,
            rgd_offset: 21,
            gd_offset: 34,
            overhead: 128,
            unclean: false,
            newlines: NEWLINES,
            compression: 0,
        }
    }

    fn refused(change: impl FnOnce(&mut Header)) -> String {
        let mut header = sample();
        change(&mut header);
        Header::parse(&header.encode()).unwrap_err().to_string()
    }

    #[test]
    fn the_fields_lie_where_the_specification_puts_them() {
        let bytes = sample().encode();
        assert_eq!(bytes[..12], *b"KDMV\x01\0\0\0\x03\0\0\0");
        assert_eq!(bytes[12..20], 195_313_u64.to_le_bytes());
        assert_eq!(bytes[44..48], 512_u32.to_le_bytes());
        assert_eq!(bytes[72..79], *b"\0\n \r\n\0\0");
        assert_eq!(bytes[56], 34);
    }

    #[test]
    fn what_breaks_a_limit_is_refused_in_qemus_words() {
        assert_eq!(refused(|h| h.version = 4), "Unsupported VMDK version 4");
        assert_eq!(refused(|h| h.version = 0), "Unsupported VMDK version 0");
        assert_eq!(refused(|h| h.gtes_per_gt = 513), "L2 table size too big");
        assert_eq!(refused(|h| h.gtes_per_gt = 0), "L1 entry size is invalid");
        for grain in [0, 129, 0x40_0000, u64::MAX] {
            assert_eq!(refused(|h| h.grain = grain), "Invalid granularity, image may be corrupt");
        }
        assert_eq!(refused(|h| h.capacity = 1 << 53), "L1 size too big");
        refused(|h| h.capacity = u64::MAX);
        refused(|h| h.newlines = *b"\n \n\n");
        refused(|h| h.compression = 2);
        refused(|h| h.flags |= flags::COMPRESSED);
        refused(|h| h.flags |= flags::MARKERS);
    }

    #[test]
    fn a_capacity_that_contradicts_the_descriptor_is_refused() {
        let check = |kind: &str, lines: &str| {
            let text = format!("version=1\nCID=1\ncreateType=\"{kind}\"\n{lines}");
            sample().check_descriptor(&Descriptor::parse(text.as_bytes()).unwrap())
        };
        for sectors in [195_313, 195_328, 195_200] {
            check("monolithicSparse", &format!("RW {sectors} SPARSE \"a\"\n")).unwrap();
        }
        for kind in ["monolithicSparse", "streamOptimized"] {
            for sectors in [100, 195_313 - 128, 195_313 + 128] {
                let error = check(kind, &format!("RW {sectors} SPARSE \"a\"\n")).unwrap_err().to_string();
                assert!(error.contains("195313") && error.contains(&sectors.to_string()), "{error}");
            }
            check(kind, "RW 1 SPARSE \"a\"\nRW 1 SPARSE \"b\"\n").unwrap();
        }
        check("twoGbMaxExtentSparse", "RW 1 SPARSE \"a\"\n").unwrap();
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_written_as_it_was(bytes in prop::collection::vec(any::<u8>(), 79)) {
            let mut sector = bytes;
            sector[..8].copy_from_slice(b"KDMV\x03\0\0\0");
            sector[72] &= 1;
            sector.resize(LENGTH, 0);
            if let Some(Ok(header)) = Header::decode(&sector) {
                prop_assert_eq!(&header.encode()[..], &sector[..]);
                let _ = header.validate();
            }
        }
    }
}
