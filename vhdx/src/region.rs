//! The region table (section 2.2.3): where the BAT and the metadata lie. There are two copies.

use block::codec::{Reader, Writer};
use block::num::is_aligned;
use block::{Error, ErrorKind, Result, Storage};

use crate::{Guid, MIB, checksum};

/// Where the two copies lie in the file.
pub const OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// Bytes of a copy.
pub const LEN: usize = 64 << 10;
/// The most entries that a table may have.
const MAX_ENTRIES: u32 = 2047;
const SIGNATURE: &[u8; 4] = b"regi";
const CHECKSUM_AT: usize = 4;

const BAT: Guid = Guid::new(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: Guid = Guid::new(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);

/// A region of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte in the file, a multiple of 1 MiB, at least 1 MiB.
    pub offset: u64,
    /// Length in bytes, a multiple of 1 MiB.
    pub length: u32,
}

impl Region {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }

    /// Whether it has a byte in common with `len` bytes at `offset`.
    pub fn overlaps(&self, offset: u64, len: u64) -> bool {
        offset < self.end() && self.offset < offset.saturating_add(len)
    }
}

/// The regions that we know. There is nothing else in a table that can be written: unknown required regions are
/// refused, and others are kept as they are because the table never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Region,
    /// The metadata.
    pub metadata: Region,
    /// Others, which are not needed for reading the disk.
    pub unknown: Vec<Region>,
    /// One of the two copies of the table is no valid table.
    pub damaged_copy: Option<usize>,
}

impl Regions {
    /// Reads the region table, from its second copy if the first is damaged.
    ///
    /// # Errors
    /// No copy is valid; an entry breaks the rules or is required and unknown; the host failed.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let mut found: Option<Self> = None;
        let mut damaged_copy = None;
        for (copy, offset) in OFFSETS.into_iter().enumerate() {
            let mut bytes = vec![0; LEN];
            storage.read_at(&mut bytes, offset)?;
            match Self::parse(&bytes)? {
                Some(regions) => found = found.or(Some(regions)),
                None => damaged_copy = Some(copy),
            }
        }
        let found = found.ok_or_else(|| {
            let text = "neither of the two VHDX region tables (at 0x30000 and 0x40000) is valid";
            Error::new(ErrorKind::Corrupt, text)
        })?;
        Ok(Self { damaged_copy, ..found })
    }

    /// Reads one copy. `None`: signature or checksum are wrong.
    fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let mut reader = Reader::new(bytes);
        let (Some(signature), Some(stored)) = (reader.take(4), reader.le_u32()) else { return Ok(None) };
        if signature != SIGNATURE || checksum(bytes, CHECKSUM_AT) != stored {
            return Ok(None);
        }
        let count = reader.le_u32().unwrap_or(0);
        if count > MAX_ENTRIES {
            return Err(Error::invalid(format!(
                "the VHDX region table has {count} entries, more than {MAX_ENTRIES}"
            )));
        }
        reader.skip(4);
        let entries = (0..count).map_while(|_| Entry::read(&mut reader));
        Self::of(entries).map(Some)
    }

    fn of(entries: impl Iterator<Item = Entry>) -> Result<Self> {
        let (mut bat, mut metadata) = (None, None);
        let mut unknown: Vec<Region> = vec![];
        for entry in entries {
            let place = match entry.guid {
                BAT => &mut bat,
                METADATA => &mut metadata,
                guid if entry.required => {
                    return Err(Error::unsupported(format!(
                        "the VHDX file has a region {guid} that is required to read it, and that is not known here"
                    )));
                }
                _ => {
                    unknown.extend(entry.region().ok());
                    continue;
                }
            };
            if place.replace(entry.region()?).is_some() {
                return Err(Error::invalid(format!("VHDX region {} is there twice", entry.guid)));
            }
        }
        let missing = |name| move || Error::invalid(format!("the VHDX region table names no {name}"));
        let (bat, metadata) =
            (bat.ok_or_else(missing("BAT"))?, metadata.ok_or_else(missing("metadata region"))?);
        if bat.overlaps(metadata.offset, metadata.length.into()) {
            return Err(Error::invalid(format!(
                "the VHDX BAT at {:#x} overlaps the metadata region at {:#x}",
                bat.offset, metadata.offset
            )));
        }
        Ok(Self { bat, metadata, unknown, damaged_copy: None })
    }

    /// The bytes of a table that names a BAT and a metadata region.
    pub fn encode(bat: Region, metadata: Region) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.bytes(SIGNATURE).le_u32(0).le_u32(2).le_u32(0);
        for (guid, region) in [(BAT, bat), (METADATA, metadata)] {
            writer.bytes(&guid.0).le_u64(region.offset).le_u32(region.length).le_u32(1);
        }
        let mut bytes = writer.into_bytes();
        bytes.resize(LEN, 0);
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }
}

/// An entry of the table.
#[derive(Debug)]
struct Entry {
    guid: Guid,
    offset: u64,
    length: u32,
    required: bool,
}

impl Entry {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let guid = Guid(reader.take(16)?.try_into().ok()?);
        let (offset, length, flags) = (reader.le_u64()?, reader.le_u32()?, reader.le_u32()?);
        Some(Self { guid, offset, length, required: flags & 1 != 0 })
    }

    fn region(&self) -> Result<Region> {
        let (offset, length) = (self.offset, u64::from(self.length));
        let whole = is_aligned(offset, MIB) && is_aligned(length, MIB) && length > 0;
        if !whole || offset < MIB || offset.checked_add(length).is_none() {
            return Err(Error::invalid(format!(
                "VHDX region {} at {offset:#x} with {length:#x} bytes: both have to be multiples of 1 MiB, behind the header",
                self.guid
            )));
        }
        Ok(Region { offset, length: self.length })
    }
}

#[cfg(test)]
mod tests {
    use block::mem::MemStorage;

    use super::*;

    fn region(mib: u64) -> Region {
        Region { offset: mib << 20, length: 1 << 20 }
    }

    fn read(first: &[u8], second: &[u8]) -> Result<Regions> {
        let storage = MemStorage::new();
        storage.write_at(first, OFFSETS[0]).unwrap();
        storage.write_at(second, OFFSETS[1]).unwrap();
        Regions::read(&storage)
    }

    /// A table of raw entries.
    fn table(entries: &[(Guid, u64, u32, u32)]) -> Vec<u8> {
        let mut writer = Writer::new();
        let count = u32::try_from(entries.len()).unwrap();
        writer.bytes(SIGNATURE).le_u32(0).le_u32(count).le_u32(0);
        for &(guid, offset, length, flags) in entries {
            writer.bytes(&guid.0).le_u64(offset).le_u32(length).le_u32(flags);
        }
        let mut bytes = writer.into_bytes();
        bytes.resize(LEN, 0);
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    #[test]
    fn either_copy_is_enough() {
        let good = Regions::encode(region(2), region(3));
        let both = read(&good, &good).unwrap();
        assert_eq!((both.bat, both.metadata, both.damaged_copy), (region(2), region(3), None));
        let mut bad = good.clone();
        bad[60_000] = 1;
        assert_eq!(read(&bad, &good).unwrap().damaged_copy, Some(0));
        assert_eq!(read(&good, &bad).unwrap().damaged_copy, Some(1));
        assert_eq!(read(&bad, &bad).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn entries_that_break_the_rules_are_refused() {
        let (bat, metadata) = ((BAT, 2 << 20, 1 << 20, 1), (METADATA, 3 << 20, 1 << 20, 1));
        let kind = |entries: &[_]| read(&table(entries), &table(entries)).map_err(|error| error.kind());
        kind(&[bat, metadata, (Guid([7; 16]), 4 << 20, 1 << 20, 0)]).unwrap();
        assert_eq!(kind(&[bat, metadata, (Guid([7; 16]), 4 << 20, 1 << 20, 1)]), Err(ErrorKind::Unsupported));
        for bad in [
            &[bat][..],
            &[bat, metadata, bat],
            &[bat, (METADATA, 2 << 20, 1 << 20, 1)],
            &[bat, (METADATA, 3 << 20, 4096, 1)],
            &[bat, (METADATA, 3 << 20, 0, 1)],
            &[bat, (METADATA, 0, 1 << 20, 1)],
            &[bat, (METADATA, u64::MAX - (MIB - 1), 1 << 20, 1)],
        ] {
            assert_eq!(kind(bad), Err(ErrorKind::Invalid), "{bad:?}");
        }
    }
}
