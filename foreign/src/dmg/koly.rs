//! The trailer of a disk image, and where it leads.

use block::codec::Reader;
use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use super::plist;

const LEN: u64 = 512;
const MAGIC: &[u8] = b"koly";
/// The most bytes of a property list or resource fork: 2 million chunks, half a terabyte.
const MOST_TABLES: u64 = 128 << 20;

/// What the trailer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Koly {
    /// Where the chunks' offsets count from.
    pub(super) data_offset: u64,
    /// Sectors of the disk.
    pub(super) sectors: u64,
    resource_fork: (u64, u64),
    property_list: (u64, u64),
}

impl Koly {
    /// The trailer of a file of `len` bytes, if it has one that makes sense.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn read(storage: &dyn Storage, len: u64) -> Result<Option<Self>> {
        let Some(start) = len.checked_sub(LEN) else { return Ok(None) };
        let mut bytes = [0; 512];
        storage.read_at(&mut bytes, start)?;
        Ok(Self::parse(&bytes).filter(|koly| koly.fits(start)))
    }

    fn parse(bytes: &[u8; 512]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let (magic, version, header_len) = (reader.take(4)?, reader.be_u32()?, reader.be_u32()?);
        if magic != MAGIC || version != 4 || u64::from(header_len) != LEN {
            return None;
        }
        reader.skip(4 + 8)?;
        let data_offset = reader.be_u64()?;
        reader.skip(8)?;
        let resource_fork = (reader.be_u64()?, reader.be_u64()?);
        let property_list = (be_u64(bytes, 216)?, be_u64(bytes, 224)?);
        Some(Self { data_offset, sectors: be_u64(bytes, 492)?, resource_fork, property_list })
    }

    /// Whether everything that is named lies before the trailer, and anything is named.
    fn fits(&self, end: u64) -> bool {
        let inside = |(offset, len): (u64, u64)| offset.checked_add(len).is_some_and(|last| last <= end);
        let named = self.property_list.1 != 0 || self.resource_fork.1 != 0;
        named && inside(self.property_list) && inside(self.resource_fork) && self.data_offset <= end
    }

    /// The tables of chunks, as bytes.
    ///
    /// # Errors
    /// There are none, or too many; the host's.
    pub(super) fn tables(&self, storage: &dyn Storage) -> Result<Vec<Vec<u8>>> {
        let tables = if self.property_list.1 != 0 {
            plist::tables(&read(storage, self.property_list)?)?
        } else {
            resources(&read(storage, self.resource_fork)?)
        };
        if tables.is_empty() {
            return Err(Error::invalid("the disk image has no table of chunks"));
        }
        Ok(tables)
    }
}

fn be_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Reader::new(bytes.get(at..)?).be_u64()
}

fn read(storage: &dyn Storage, (offset, len): (u64, u64)) -> Result<Vec<u8>> {
    if len > MOST_TABLES {
        return Err(Error::unsupported(format!(
            "the tables of chunks have {len} bytes, more than {MOST_TABLES}"
        )));
    }
    let mut bytes = vec![0; to_usize(len)];
    storage.read_at(&mut bytes, offset).map_err(|error| match error.kind() {
        ErrorKind::Io => error.context(format!("tables of chunks at {offset:#x}")),
        _ => error,
    })?;
    Ok(bytes)
}

/// The tables in a resource fork: where its data is and how long, then each resource behind its length. Resources that
/// are not tables are skipped.
fn resources(fork: &[u8]) -> Vec<Vec<u8>> {
    let field = |at: usize| Reader::new(fork.get(at..)?).be_u32().map(|value| to_usize(u64::from(value)));
    let mut found = vec![];
    let (Some(start), Some(len)) = (field(0), field(8)) else { return found };
    let end = start.saturating_add(len).min(fork.len());
    let mut rest = fork.get(start..end).unwrap_or_default();
    while let Some(len) = Reader::new(rest).be_u32() {
        let len = to_usize(u64::from(len));
        let Some(resource) = rest.get(4..4 + len) else { break };
        if resource.starts_with(b"mish") {
            found.push(resource.to_vec());
        }
        rest = rest.get(4 + len..).unwrap_or_default();
    }
    found
}
