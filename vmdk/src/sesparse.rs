//! SESparse extents ("space efficient"): the snapshots of ESXi 6.5 and later, and of VMFS-6.
//!
//! VMware has published no description. What is known is how its files look, as observers have written it down:
//!
//! ```text
//!   sector 0         constant header: sizes, and where each of the areas is (offset and length in sectors)
//!   volatile header  whether a journal has to be replayed
//!   directory        u64 each: 0: no table; 0x10000000_nnnnnnnn: table n of the area of tables
//!   tables           4096 u64 each, the uppermost digit says what a grain (8 sectors) is:
//!                    0 not here, 1 unmapped (zeros), 2 zeros, 3 grain n of the area of grains
//! ```
//!
//! They are read only here (as in qemu): writing needs the journal and the map of free grains.

use std::sync::Arc;

use block::codec::Reader;
use block::{Error, ErrorKind, Result, Storage};

use crate::lookup::{Entries, Grain, Lookup, Shape};

const CONST_MAGIC: u64 = 0xcafe_babe;
const VOLATILE_MAGIC: u64 = 0xcafe_cafe;
const VERSION: u64 = 0x0000_0002_0000_0001;
const SECTOR: u64 = 512;
const GRAIN_SECTORS: u64 = 8;
const TABLE_SECTORS: u64 = 64;
const TABLE_ENTRIES: u64 = TABLE_SECTORS * SECTOR / 8;
/// Sectors of the largest disk that ESXi makes (64 TiB), with room to spare: one PiB.
const MAX_SECTORS: u64 = 1 << 41;

/// An area of the file, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    offset: u64,
    len: u64,
}

impl Area {
    /// Byte `offset` of the area, where `len` bytes have to be inside it.
    fn place(self, offset: u64, len: u64) -> Option<u64> {
        let within = offset.checked_add(len)? <= self.len * SECTOR;
        within.then_some(self.offset * SECTOR + offset)
    }
}

/// Whether these are the first bytes of such an extent.
pub(crate) fn probe(first: &[u8]) -> bool {
    first.starts_with(&CONST_MAGIC.to_le_bytes())
}

/// The constant header of an SESparse extent, validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Size of the extent in sectors.
    pub(crate) capacity_sectors: u64,
    volatile_header: Area,
    directory: Area,
    tables: Area,
    grains: Area,
}

impl Header {
    /// Bytes of it.
    pub(crate) const LEN: usize = 512;

    /// Reads and checks the header at the start of `bytes`.
    ///
    /// # Errors
    /// It is not one, is of another version, or has values that are not known.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        Self::fields(bytes).ok_or_else(|| Error::invalid("the seSparse header is cut off"))?
    }

    fn fields(bytes: &[u8]) -> Option<Result<Self>> {
        let mut reader = Reader::new(bytes);
        let (magic, version) = (reader.le_u64()?, reader.le_u64()?);
        let capacity_sectors = reader.le_u64()?;
        let (grain, table) = (reader.le_u64()?, reader.le_u64()?);
        let flags = reader.le_u64()?;
        let reserved = [reader.le_u64()?, reader.le_u64()?, reader.le_u64()?, reader.le_u64()?];
        let mut area = || Some(Area { offset: reader.le_u64()?, len: reader.le_u64()? });
        let volatile_header = area()?;
        let (_journal_header, _journal) = (area()?, area()?);
        let (directory, tables) = (area()?, area()?);
        let (_free, _backmap) = (area()?, area()?);
        let grains = area()?;
        let known = [
            ("magic", magic, CONST_MAGIC),
            ("version", version, VERSION),
            ("grain size", grain, GRAIN_SECTORS),
            ("grain table size", table, TABLE_SECTORS),
            ("flags", flags | reserved.iter().fold(0, |all, word| all | word), 0),
        ];
        if let Some((what, found, wanted)) = known.into_iter().find(|(_, found, wanted)| found != wanted) {
            let message = format!("unsupported seSparse {what}: {found:#x} (known is {wanted:#x})");
            return Some(Err(Error::unsupported(message)));
        }
        Some(Self { capacity_sectors, volatile_header, directory, tables, grains }.validate())
    }

    fn validate(self) -> Result<Self> {
        if self.capacity_sectors > MAX_SECTORS {
            return Err(Error::invalid(format!(
                "seSparse capacity of {} sectors is too large",
                self.capacity_sectors
            )));
        }
        for (what, area) in [
            ("volatile header", self.volatile_header),
            ("grain directory", self.directory),
            ("grain tables", self.tables),
            ("grains", self.grains),
        ] {
            let end = area.offset.checked_add(area.len);
            if area.offset == 0 || end.is_none_or(|end| end > MAX_SECTORS * 2) {
                let message = format!(
                    "seSparse {what} at sector {:#x}, {:#x} sectors: impossible",
                    area.offset, area.len
                );
                return Err(Error::invalid(message));
            }
        }
        let needed = self.directory_entries() * 8;
        if self.directory.place(0, needed).is_none() {
            let message =
                format!("the seSparse grain directory has no room for {} tables", self.directory_entries());
            return Err(Error::invalid(message));
        }
        Ok(self)
    }

    fn directory_entries(&self) -> u64 {
        self.capacity_sectors.div_ceil(GRAIN_SECTORS * TABLE_ENTRIES)
    }

    fn shape(&self) -> Shape {
        Shape {
            directory: self.directory.offset * SECTOR,
            tables: self.directory_entries(),
            width: 8,
            per_table: TABLE_ENTRIES,
            grain: GRAIN_SECTORS * SECTOR,
        }
    }
}

/// What the entries mean.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SeEntries {
    tables: Area,
    grains: Area,
}

fn corrupt(what: &str, entry: u64) -> Error {
    Error::new(ErrorKind::Corrupt, format!("invalid seSparse {what} entry {entry:#018x}"))
}

impl Entries for SeEntries {
    fn table(&self, entry: u64) -> Result<Option<u64>> {
        match (entry >> 32, entry & 0xffff_ffff) {
            (0, 0) => Ok(None),
            (0x1000_0000, index) => {
                let bytes = TABLE_SECTORS * SECTOR;
                let place = self.tables.place(index * bytes, bytes);
                place.map(Some).ok_or_else(|| corrupt("grain directory", entry))
            }
            _ => Err(corrupt("grain directory", entry)),
        }
    }

    fn grain(&self, entry: u64) -> Result<Grain> {
        match entry >> 60 {
            0 if entry == 0 => Ok(Grain::Absent),
            1 | 2 => Ok(Grain::Zero),
            3 => {
                let index = (entry >> 48 & 0xfff) | (entry & 0xffff_ffff_ffff) << 12;
                let bytes = GRAIN_SECTORS * SECTOR;
                let place = index.checked_mul(bytes).and_then(|offset| self.grains.place(offset, bytes));
                place.map(Grain::At).ok_or_else(|| corrupt("grain table", entry))
            }
            _ => Err(corrupt("grain table", entry)),
        }
    }
}

/// The tables of the SESparse extent in this file.
///
/// # Errors
/// Those of [`Header::parse`], a journal that would have to be replayed, or the host failed.
pub(crate) fn open(storage: &Arc<dyn Storage>) -> Result<(Header, Lookup<SeEntries>)> {
    let mut bytes = [0; Header::LEN];
    storage.read_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    check_clean(&**storage, header.volatile_header)?;
    let entries = SeEntries { tables: header.tables, grains: header.grains };
    Ok((header, Lookup::new(Arc::clone(storage), header.shape(), entries)))
}

/// Refuses an extent whose tables are not up to date without its journal.
fn check_clean(storage: &dyn Storage, area: Area) -> Result<()> {
    let mut bytes = [0; 32];
    storage.read_at(&mut bytes, area.offset * SECTOR)?;
    let mut reader = Reader::new(&bytes);
    let mut word = || reader.le_u64().unwrap_or_default();
    let (magic, _free_table, _sequence, replay) = (word(), word(), word(), word());
    if magic != VOLATILE_MAGIC {
        return Err(Error::invalid(format!("unsupported seSparse volatile header (magic {magic:#x})")));
    }
    match replay {
        0 => Ok(()),
        _ => Err(Error::unsupported("Image is dirty, Replaying journal not supported")
            .hint("let the host that wrote it open the disk once, or consolidate its snapshots there")),
    }
}

#[cfg(test)]
mod tests {
    use block::codec::Writer;
    use block::mem::MemStorage;

    use super::*;
    use crate::lookup::Run;

    /// 40 MiB: the first table at index 1 of the area of tables, the other two missing.
    pub(crate) fn extent(replay: u64) -> Vec<u8> {
        let mut out = Writer::new();
        out.le_u64(CONST_MAGIC).le_u64(VERSION).le_u64(81920).le_u64(8).le_u64(64).le_u64(0);
        out.bytes(&[0; 32]);
        for (offset, len) in [(1, 1), (2, 1), (3, 1), (4, 1), (8, 128), (136, 1), (137, 1), (144, 64)] {
            out.le_u64(offset).le_u64(len);
        }
        out.pad_to(512);
        out.le_u64(VOLATILE_MAGIC).le_u64(0).le_u64(0).le_u64(replay);
        let mut bytes = out.into_bytes();
        bytes.resize(208 * 512, 0);
        let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put(4 * 512, 0x1000_0000_0000_0001);
        let table = (8 + 64) * 512;
        put(table, 3 << 60 | 2 << 48);
        put(table + 8, 3 << 60 | 3 << 48);
        put(table + 16, 1 << 60);
        put(table + 24, 2 << 60);
        put(table + 40, 3 << 60 | 8 << 48);
        put(table + 48, 4 << 60);
        bytes[(144 + 16) * 512..(144 + 32) * 512].fill(7);
        bytes
    }

    fn lookup(bytes: Vec<u8>) -> Result<Lookup<SeEntries>> {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(bytes));
        open(&storage).map(|(_, lookup)| lookup)
    }

    #[test]
    fn grains_are_found_and_read() {
        let lookup = lookup(extent(0)).unwrap();
        let run = |at, max| lookup.run(at, max, true).unwrap();
        assert_eq!(run(100, 1 << 20), Run { grain: Grain::At(160 * 512 + 100), len: 8192 - 100 });
        assert_eq!(run(8192, 1 << 20), Run { grain: Grain::Zero, len: 8192 });
        assert_eq!(run(16384, 1 << 20), Run { grain: Grain::Absent, len: 4096 });
        assert_eq!(run(16 << 20, 24 << 20), Run { grain: Grain::Absent, len: 24 << 20 });
        assert_eq!(lookup.grain(20480).unwrap_err().kind(), ErrorKind::Corrupt, "grain 8 of 8");
        assert_eq!(lookup.grain(24576).unwrap_err().kind(), ErrorKind::Corrupt, "an unknown kind");
        let mut buf = vec![0xee; 20480];
        lookup
            .read(&mut buf, 0, &|part, _| {
                part.fill(9);
                Ok(())
            })
            .unwrap();
        assert!(buf[..8192] == [7; 8192] && buf[8192..16384] == [0; 8192] && buf[16384..] == [9; 4096]);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert!(lookup(extent(1)).unwrap_err().to_string().contains("journal"));
        for (at, value) in [
            (0, 1),
            (8, 1),
            (16, u64::MAX),
            (24, 16),
            (32, 32),
            (40, 1),
            (72, 1),
            (128, 0),
            (136, 0),
            (200, u64::MAX),
        ] {
            let mut bytes = extent(0);
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
            assert!(Header::parse(&bytes).is_err(), "offset {at}");
        }
        Header::parse(&extent(0)[..200]).unwrap_err();
    }
}
