//! The metadata region (section 2.6): a table of items, and the items that describe the disk.

use block::codec::{Reader, Writer};
use block::{Error, ErrorKind, Result, Storage};

use crate::locator::Locator;
use crate::region::Region;
use crate::{Guid, MIB};

/// Bytes of the table at the start of the region; items lie behind it.
const TABLE_LEN: usize = 64 << 10;
/// The most entries that a table may have.
const MAX_ENTRIES: u16 = 1023;
/// The longest item, in bytes.
const MAX_ITEM: u32 = 1 << 20;
const SIGNATURE: &[u8; 8] = b"metadata";
/// The largest disk: 64 TiB.
pub const MAX_DISK_SIZE: u64 = 64 << 40;
/// Bounds of the size of a block in bytes.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 1 << 20..=256 << 20;

const FILE_PARAMETERS: Guid = Guid::new(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const VIRTUAL_DISK_SIZE: Guid = Guid::new(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const VIRTUAL_DISK_ID: Guid = Guid::new(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
const LOGICAL_SECTOR_SIZE: Guid = Guid::new(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR_SIZE: Guid = Guid::new(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const PARENT_LOCATOR: Guid = Guid::new(0xa8d3_5f2d, 0xb30b, 0x454d, 0xabf7_d3d8_4834_ab0c);

/// Flags of an entry: the item belongs to a user's program, describes the virtual disk (and not the file), has to be
/// understood.
const IS_USER: u32 = 1;
const IS_VIRTUAL_DISK: u32 = 2;
const IS_REQUIRED: u32 = 4;
/// In the flags of the file parameters.
const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;

/// What the items of the system say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a block: a power of two from 1 MiB to 256 MiB.
    pub block_size: u32,
    /// Blocks keep their places: a fixed disk.
    pub leave_blocks_allocated: bool,
    /// Bytes of the disk: a multiple of the logical sector size, at most 64 TiB.
    pub disk_size: u64,
    /// What a guest sees as the disk's identity (SCSI page 83).
    pub disk_id: Guid,
    /// 512 or 4096.
    pub logical_sector_size: u32,
    /// 512 or 4096.
    pub physical_sector_size: u32,
    /// Where the parent of a differencing disk is.
    pub parent: Option<Locator>,
}

/// An entry of the table.
#[derive(Debug, Clone, Copy)]
struct Entry {
    id: Guid,
    /// Relative to the start of the region.
    offset: u32,
    length: u32,
    flags: u32,
}

impl Entry {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let id = Guid(reader.take(16)?.try_into().ok()?);
        let (offset, length, flags) = (reader.le_u32()?, reader.le_u32()?, reader.le_u32()?);
        reader.skip(4)?;
        Some(Self { id, offset, length, flags })
    }

    /// An entry without length says that the item is empty, and has no place then.
    fn check(&self, region: Region) -> Result<()> {
        let end = u64::from(self.offset) + u64::from(self.length);
        let inside = self.offset as usize >= TABLE_LEN && end <= u64::from(region.length);
        if self.length > MAX_ITEM || (self.length > 0 && !inside) {
            return Err(Error::invalid(format!(
                "VHDX metadata item {} has {} bytes at {:#x} of a region of {:#x} bytes",
                self.id, self.length, self.offset, region.length
            )));
        }
        Ok(())
    }
}

/// The table of items.
#[derive(Debug)]
struct Table {
    region: Region,
    entries: Vec<Entry>,
}

impl Table {
    fn read(storage: &dyn Storage, region: Region) -> Result<Self> {
        let mut bytes = vec![0; TABLE_LEN];
        storage.read_at(&mut bytes, region.offset)?;
        let mut reader = Reader::new(&bytes);
        if reader.take(8) != Some(SIGNATURE) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("there is no VHDX metadata table at {:#x}", region.offset),
            ));
        }
        reader.skip(2);
        let count = reader.le_u16().unwrap_or(0);
        if count > MAX_ENTRIES {
            return Err(Error::invalid(format!(
                "the VHDX metadata table has {count} entries, more than {MAX_ENTRIES}"
            )));
        }
        reader.skip(20);
        let entries: Vec<Entry> = (0..count).map_while(|_| Entry::read(&mut reader)).collect();
        let table = Self { region, entries };
        table.check()?;
        Ok(table)
    }

    fn check(&self) -> Result<()> {
        let mut seen = std::collections::HashSet::new();
        for entry in &self.entries {
            entry.check(self.region)?;
            if !seen.insert((entry.id, entry.flags & IS_USER)) {
                return Err(Error::invalid(format!("VHDX metadata item {} is there twice", entry.id)));
            }
            if entry.flags & IS_REQUIRED != 0 && !is_known(entry) {
                return Err(Error::unsupported(format!(
                    "the VHDX file has a metadata item {} that is required to read it, and that is not known here",
                    entry.id
                )));
            }
        }
        Ok(())
    }

    /// The entry of an item of the system.
    fn find(&self, id: Guid) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.id == id && entry.flags & IS_USER == 0)
    }

    /// The contents of an item of the system.
    fn item(&self, storage: &dyn Storage, id: Guid) -> Result<Option<Vec<u8>>> {
        let Some(entry) = self.find(id) else { return Ok(None) };
        let mut bytes = vec![0; entry.length as usize];
        storage.read_at(&mut bytes, self.region.offset + u64::from(entry.offset))?;
        Ok(Some(bytes))
    }

    fn required<T>(
        &self,
        storage: &dyn Storage,
        id: Guid,
        name: &str,
        read: impl FnOnce(&mut Reader<'_>) -> Option<T>,
    ) -> Result<T> {
        let missing = || Error::invalid(format!("the VHDX metadata has no {name}"));
        let bytes = self.item(storage, id)?.ok_or_else(missing)?;
        read(&mut Reader::new(&bytes))
            .ok_or_else(|| Error::invalid(format!("the VHDX {name} is {} bytes short", bytes.len())))
    }
}

fn is_known(entry: &Entry) -> bool {
    let known = [
        FILE_PARAMETERS,
        VIRTUAL_DISK_SIZE,
        VIRTUAL_DISK_ID,
        LOGICAL_SECTOR_SIZE,
        PHYSICAL_SECTOR_SIZE,
        PARENT_LOCATOR,
    ];
    entry.flags & IS_USER == 0 && known.contains(&entry.id)
}

impl Metadata {
    /// Reads the items of the region.
    ///
    /// # Errors
    /// An item is missing, breaks the rules, or is required and unknown; the host failed.
    pub fn read(storage: &dyn Storage, region: Region) -> Result<Self> {
        let table = Table::read(storage, region)?;
        let number = |id, name| table.required(storage, id, name, |r| r.le_u32());
        let (block_size, flags) =
            table.required(storage, FILE_PARAMETERS, "block size", |r| Some((r.le_u32()?, r.le_u32()?)))?;
        let disk_size = table.required(storage, VIRTUAL_DISK_SIZE, "disk size", |r| r.le_u64())?;
        let guid = |reader: &mut Reader<'_>| Some(Guid(reader.take(16)?.try_into().ok()?));
        let metadata = Self {
            block_size,
            leave_blocks_allocated: flags & LEAVE_BLOCKS_ALLOCATED != 0,
            disk_size,
            disk_id: table.required(storage, VIRTUAL_DISK_ID, "disk identifier", guid)?,
            logical_sector_size: number(LOGICAL_SECTOR_SIZE, "logical sector size")?,
            physical_sector_size: number(PHYSICAL_SECTOR_SIZE, "physical sector size")?,
            parent: None,
        };
        metadata.check()?;
        let parent = if flags & HAS_PARENT != 0 { Some(locator(&table, storage)?) } else { None };
        Ok(Self { parent, ..metadata })
    }

    fn check(&self) -> Result<()> {
        if !BLOCK_SIZES.contains(&self.block_size) || !self.block_size.is_power_of_two() {
            return Err(Error::invalid(format!(
                "VHDX blocks of {} bytes: the size has to be a power of two from 1 MiB to 256 MiB",
                self.block_size
            )));
        }
        for (name, size) in [("logical", self.logical_sector_size), ("physical", self.physical_sector_size)] {
            if size != 512 && size != 4096 {
                return Err(Error::invalid(format!(
                    "VHDX {name} sectors of {size} bytes: there are 512 and 4096"
                )));
            }
        }
        if self.disk_size > MAX_DISK_SIZE || !self.disk_size.is_multiple_of(self.logical_sector_size.into()) {
            return Err(Error::invalid(format!(
                "a VHDX disk of {} bytes: it has to be whole sectors of {} bytes, and 64 TiB at most",
                self.disk_size, self.logical_sector_size
            )));
        }
        Ok(())
    }

    /// The bytes of a metadata region of a disk without parent, from its first byte to the last that is not zero.
    pub fn encode(&self) -> Vec<u8> {
        let mut items = Writer::new();
        let mut table = Writer::new();
        let flags = if self.leave_blocks_allocated { LEAVE_BLOCKS_ALLOCATED } else { 0 };
        let mut item = |id: Guid, flags: u32, bytes: &[u8]| {
            let offset = block::num::low_u32((TABLE_LEN + items.len()) as u64);
            table.bytes(&id.0).le_u32(offset).le_u32(block::num::low_u32(bytes.len() as u64));
            table.le_u32(flags | IS_REQUIRED).le_u32(0);
            items.bytes(bytes);
        };
        item(FILE_PARAMETERS, 0, &[self.block_size.to_le_bytes(), flags.to_le_bytes()].concat());
        item(VIRTUAL_DISK_SIZE, IS_VIRTUAL_DISK, &self.disk_size.to_le_bytes());
        item(VIRTUAL_DISK_ID, IS_VIRTUAL_DISK, &self.disk_id.0);
        item(LOGICAL_SECTOR_SIZE, IS_VIRTUAL_DISK, &self.logical_sector_size.to_le_bytes());
        item(PHYSICAL_SECTOR_SIZE, IS_VIRTUAL_DISK, &self.physical_sector_size.to_le_bytes());
        let mut writer = Writer::new();
        writer.bytes(SIGNATURE).le_u16(0).le_u16(5).bytes(&[0; 20]).bytes(&table.into_bytes());
        let mut bytes = writer.into_bytes();
        bytes.resize(TABLE_LEN, 0);
        bytes.extend(items.into_bytes());
        bytes
    }

    /// How long the region is that [`encode`](Self::encode) is written into, in bytes.
    pub const REGION_LEN: u32 = block::num::low_u32(MIB);
}

fn locator(table: &Table, storage: &dyn Storage) -> Result<Locator> {
    let missing = || Error::invalid("the VHDX file has a parent, and no parent locator");
    let bytes = table.item(storage, PARENT_LOCATOR)?.ok_or_else(missing)?;
    let at = table.find(PARENT_LOCATOR).map_or(0, |entry| table.region.offset + u64::from(entry.offset));
    let locator = Locator::parse(&bytes)?;
    Ok(Locator { linkage_at: locator.linkage_at.map(|within| at + within), ..locator })
}

#[cfg(test)]
mod tests {
    use block::mem::MemStorage;

    use super::*;

    const REGION: Region = Region { offset: 3 << 20, length: 1 << 20 };

    fn metadata() -> Metadata {
        Metadata {
            block_size: 2 << 20,
            leave_blocks_allocated: true,
            disk_size: 5 << 20,
            disk_id: Guid([3; 16]),
            logical_sector_size: 512,
            physical_sector_size: 4096,
            parent: None,
        }
    }

    fn read(bytes: &[u8]) -> Result<Metadata> {
        let storage = MemStorage::new();
        storage.write_at(bytes, REGION.offset).unwrap();
        Metadata::read(&storage, REGION)
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read(&metadata().encode()).unwrap(), metadata());
        let kind = |metadata: Metadata| read(&metadata.encode()).unwrap_err().kind();
        for bad in [
            Metadata { block_size: 3 << 20, ..metadata() },
            Metadata { block_size: 512 << 20, ..metadata() },
            Metadata { block_size: 0, ..metadata() },
            Metadata { logical_sector_size: 1024, ..metadata() },
            Metadata { physical_sector_size: 0, ..metadata() },
            Metadata { disk_size: 513, ..metadata() },
            Metadata { disk_size: MAX_DISK_SIZE + 512, ..metadata() },
            Metadata { disk_size: 512, logical_sector_size: 4096, ..metadata() },
        ] {
            assert_eq!(kind(bad), ErrorKind::Invalid);
        }
    }

    /// Changes bytes of the table: entry `n` lies at 32 * (n + 1).
    fn with(change: impl FnOnce(&mut Vec<u8>)) -> Result<Metadata> {
        let mut bytes = metadata().encode();
        change(&mut bytes);
        read(&bytes)
    }

    #[test]
    fn tables_that_break_the_rules_are_refused() {
        let kind = |change: &dyn Fn(&mut Vec<u8>)| with(change).map(|_| ()).map_err(|error| error.kind());
        assert_eq!(kind(&|b| b[0] = 0), Err(ErrorKind::Corrupt));
        assert_eq!(kind(&|b| b[10..12].copy_from_slice(&2000u16.to_le_bytes())), Err(ErrorKind::Invalid));
        assert_eq!(kind(&|b| b[10] = 4), Err(ErrorKind::Invalid), "an item is missing");
        assert_eq!(kind(&|b| b[32] ^= 1), Err(ErrorKind::Unsupported), "an unknown required item");
        assert_eq!(kind(&|b| b[56] |= 1), Err(ErrorKind::Unsupported), "of a user, too");
        assert_eq!(kind(&|b| b[48..52].copy_from_slice(&100u32.to_le_bytes())), Err(ErrorKind::Invalid));
        assert_eq!(kind(&|b| b[48..52].fill(0xff)), Err(ErrorKind::Invalid));
        assert_eq!(kind(&|b| b[52..56].fill(0xff)), Err(ErrorKind::Invalid));
        assert_eq!(kind(&|b| b[52] = 4), Err(ErrorKind::Invalid), "too short");
        assert_eq!(kind(&|b| b.copy_within(64..80, 32)), Err(ErrorKind::Invalid), "twice");
        let optional = |b: &mut Vec<u8>| {
            b[10] = 6;
            b[32 * 6] = 9;
            b[32 * 6 + 24] = 1;
        };
        assert_eq!(kind(&optional), Ok(()), "an item of a user that need not be understood");
        let parent = |b: &mut Vec<u8>| b[TABLE_LEN + 4] = 2;
        assert_eq!(kind(&parent), Err(ErrorKind::Invalid), "no locator");
    }
}
