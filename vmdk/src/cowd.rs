//! COWD extents: the sparse files of ESX hosts before VMFS-6 (Virtual Disk Format 5.0, "ESXi Host Sparse
//! Extents"; createType vmfsSparse), which hold the changes of a snapshot or a linked clone.
//!
//! ```text
//!   sector 0       header, 4 sectors: COWD, size, grain size (often a single sector), where the directory is
//!   sector 4       grain directory: u32 sector of each table, 0: none
//!   ...            tables of 4096 u32: sector of each grain, 0: not here
//! ```
//!
//! They are read only here: hosts that write them have been out of support for years, and what is left of them
//! is to be migrated.

use std::sync::Arc;

use block::codec::Reader;
use block::{Error, ErrorKind, Result, Storage};

use crate::layout::COWD_MAGIC as MAGIC;
use crate::lookup::{Entries, Grain, Lookup, Shape};

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Sectors of the header: no table or grain lies there.
const HEADER_SECTORS: u64 = 4;
/// Entries of a table.
const TABLE_ENTRIES: u64 = 4096;
/// The only version that is known.
const VERSION: u32 = 1;
/// The largest grain in sectors, as in hosted sparse extents.
const MAX_GRAIN_SECTORS: u32 = 0x20_0000;

/// The header of a COWD extent, validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Size of the extent in sectors.
    pub(crate) capacity_sectors: u64,
    /// Size of a grain in sectors.
    pub(crate) grain_sectors: u32,
    /// Sector of the grain directory.
    pub(crate) directory_sector: u32,
    /// Entries of the grain directory.
    pub(crate) directory_entries: u32,
}

impl Header {
    /// Bytes that are looked at.
    pub(crate) const LEN: usize = 28;

    /// Reads and checks the header at the start of `bytes`.
    ///
    /// # Errors
    /// It is not one, is of another version, or contradicts itself.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        Self::fields(bytes).ok_or_else(|| Error::invalid("the COWD header is cut off"))?
    }

    fn fields(bytes: &[u8]) -> Option<Result<Self>> {
        let mut reader = Reader::new(bytes);
        if reader.take(4)? != MAGIC {
            return Some(Err(Error::invalid("not a COWD extent")));
        }
        let (version, _flags) = (reader.le_u32()?, reader.le_u32()?);
        let header = Self {
            capacity_sectors: reader.le_u32()?.into(),
            grain_sectors: reader.le_u32()?,
            directory_sector: reader.le_u32()?,
            directory_entries: reader.le_u32()?,
        };
        Some(header.validate(version))
    }

    fn validate(self, version: u32) -> Result<Self> {
        if version != VERSION {
            return Err(Error::unsupported(format!("Unsupported VMDK version {version}")));
        }
        if self.grain_sectors == 0 || self.grain_sectors > MAX_GRAIN_SECTORS {
            return Err(Error::invalid("Invalid granularity, image may be corrupt"));
        }
        let needed = self.capacity_sectors.div_ceil(u64::from(self.grain_sectors) * TABLE_ENTRIES);
        if u64::from(self.directory_entries) < needed {
            let message = format!(
                "the grain directory has {} entries, a disk of this size needs {needed}",
                self.directory_entries
            );
            return Err(Error::invalid(message));
        }
        if u64::from(self.directory_sector) < HEADER_SECTORS {
            let message =
                format!("the grain directory at sector {} overlaps the header", self.directory_sector);
            return Err(Error::invalid(message));
        }
        Ok(self)
    }

    fn shape(&self) -> Shape {
        Shape {
            directory: u64::from(self.directory_sector) * SECTOR,
            tables: self.directory_entries.into(),
            width: 4,
            per_table: TABLE_ENTRIES,
            grain: u64::from(self.grain_sectors) * SECTOR,
        }
    }
}

/// What the entries mean: sectors of the file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CowdEntries;

fn place(entry: u64, what: &str) -> Result<u64> {
    match entry {
        1..HEADER_SECTORS => Err(Error::new(
            ErrorKind::Corrupt,
            format!("{what} at sector {entry} would overlap the header of the extent"),
        )),
        sector => Ok(sector * SECTOR),
    }
}

impl Entries for CowdEntries {
    fn table(&self, entry: u64) -> Result<Option<u64>> {
        place(entry, "a grain table").map(|place| (place > 0).then_some(place))
    }

    fn grain(&self, entry: u64) -> Result<Grain> {
        Ok(match place(entry, "a grain")? {
            0 => Grain::Absent,
            place => Grain::At(place),
        })
    }
}

/// The tables of the COWD extent in this file.
///
/// # Errors
/// Those of [`Header::parse`], or the host failed.
pub(crate) fn open(storage: &Arc<dyn Storage>) -> Result<(Header, Lookup<CowdEntries>)> {
    let mut bytes = [0; Header::LEN];
    storage.read_at(&mut bytes, 0)?;
    let header = Header::parse(&bytes)?;
    Ok((header, Lookup::new(Arc::clone(storage), header.shape(), CowdEntries)))
}

#[cfg(test)]
mod tests {
    use block::codec::Writer;
    use block::mem::MemStorage;

    use super::*;
    use crate::lookup::Run;

    fn header(capacity: u32, grain: u32, directory: u32, entries: u32) -> Vec<u8> {
        let mut out = Writer::new();
        out.bytes(MAGIC).le_u32(1).le_u32(3).le_u32(capacity).le_u32(grain).le_u32(directory).le_u32(entries);
        out.le_u32(0).pad_to(2048);
        out.into_bytes()
    }

    /// 16384 sectors in grains of 2: the first table has its grains 0, 1 and 4095, the second is missing.
    fn extent() -> Vec<u8> {
        let mut bytes = header(16384, 2, 4, 2);
        bytes.resize(512 * 40, 0);
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(4 * 512, 5);
        put(5 * 512, 37);
        put(5 * 512 + 4, 39);
        put(5 * 512 + 4 * 4095, 1 << 20);
        bytes.truncate(512 * 37);
        (37..41u8).for_each(|sector| bytes.extend([sector; 512]));
        bytes
    }

    #[test]
    fn grains_are_found_and_read() {
        let storage: Arc<dyn Storage> = Arc::new(MemStorage::from_bytes(extent()));
        let (header, lookup) = open(&storage).unwrap();
        assert_eq!((header.capacity_sectors, header.grain_sectors), (16384, 2));
        let run = |at, max| lookup.run(at, max, true).unwrap();
        assert_eq!(run(512, 1 << 20), Run { grain: Grain::At(38 * 512), len: 3 * 512 });
        assert_eq!(run(2048, 1 << 22), Run { grain: Grain::Absent, len: 4093 * 1024 });
        assert_eq!(run(4096 * 1024, 1 << 20), Run { grain: Grain::Absent, len: 1 << 20 });
        let mut buf = vec![0xee; 4096];
        lookup
            .read(&mut buf, 0, &|part, _| {
                part.fill(9);
                Ok(())
            })
            .unwrap();
        let sectors: Vec<u8> = buf.chunks(512).map(|sector| sector[511]).collect();
        assert_eq!(sectors, [37, 38, 39, 40, 9, 9, 9, 9]);
        let error = lookup.read(&mut buf[..512], 4095 * 1024, &|_, _| Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Truncated);
    }

    #[test]
    fn headers_that_cannot_be_are_refused() {
        for bytes in [
            header(16384, 0, 4, 2),
            header(16384, u32::MAX, 4, 2),
            header(16384, 2, 4, 1),
            header(16384, 2, 3, 2),
            header(16384, 2, 0, 2),
        ] {
            Header::parse(&bytes).unwrap_err();
        }
        Header::parse(&header(16384, 2, 4, 2)).unwrap();
        Header::parse(b"COWD").unwrap_err();
        Header::parse(&[0; 32]).unwrap_err();
        CowdEntries.grain(3).unwrap_err();
    }
}
