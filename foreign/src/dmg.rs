//! Apple's disk images (UDIF): chunks packed in various ways, described at the end of the file.
//!
//! ```text
//!   0       chunks ("data fork")
//!   ...     a property list: resource-fork / blkx / Data, one table of chunks for each partition, in base64
//!           (or, older, a resource fork with the same tables)
//!   -512    "koly" trailer: where these are, how many sectors the disk has     big-endian
//! ```
//!
//! A trailer is no more than 512 bytes that a guest can write to the end of its disk, so it is only believed when all
//! of it makes sense. Chunks may not overlap, and a sector that no chunk describes is an error, not zeros.

mod koly;
mod plist;
mod table;

use std::sync::Arc;

use block::image::ImageInfo;
use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use crate::device::{Layout, Piece, Place};
use crate::format::Opened;
use crate::tables::Tables;
use crate::unpack::{adc, bunzip2, inflate};

use koly::Koly;
use table::{Chunk, Packing};

const SECTOR: u64 = 512;

/// Whether the file ends with a trailer that makes sense.
///
/// # Errors
/// The host's.
pub(crate) fn probe(storage: &dyn Storage) -> Result<bool> {
    // What cannot say how long it is without being read as a whole has no end to look at.
    let len = storage.len()?;
    Ok(Koly::read(storage, len)?.is_some())
}

#[derive(Debug)]
struct Dmg {
    tables: Tables,
    /// In the order of the disk, without overlaps.
    chunks: Vec<Chunk>,
    size: u64,
    /// Bytes of the largest packed chunk.
    preferred: u32,
}

/// Reads the trailer and the tables of chunks.
pub(crate) fn read(storage: Arc<dyn Storage>) -> Result<Opened> {
    let tables = Tables::new(Arc::clone(&storage))?;
    let koly = Koly::read(&*storage, tables.file_len())?;
    let koly =
        koly.ok_or_else(|| Error::invalid("the file does not end with the trailer of a disk image"))?;
    let blocks = koly.tables(&*storage)?;
    let mut chunks = vec![];
    for block in &blocks {
        table::parse(block, koly.data_offset, tables.file_len(), &mut chunks)?;
    }
    let sectors = arrange(&mut chunks)?.max(koly.sectors);
    let size = sectors.checked_mul(SECTOR).filter(|size| i64::try_from(*size).is_ok());
    let size = size.ok_or_else(|| Error::invalid(format!("the disk cannot have {sectors} sectors")))?;
    Ok(Opened::new(Dmg { tables, preferred: largest(&chunks), chunks, size }, storage))
}

/// Brings chunks into the order of the disk; returns where the last one ends, in sectors.
fn arrange(chunks: &mut [Chunk]) -> Result<u64> {
    chunks.sort_by_key(|chunk| chunk.sector);
    let mut end = 0;
    for chunk in chunks.iter() {
        if chunk.sector < end {
            let message = format!("chunks overlap at sector {}", chunk.sector);
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        end = chunk.sector + chunk.sectors;
    }
    Ok(end)
}

/// Bytes of the largest packed chunk; those of a page if there is none. A packed chunk has at most 64 MiB.
fn largest(chunks: &[Chunk]) -> u32 {
    let packed = chunks.iter().filter(|chunk| chunk.packing.is_packed());
    block::num::low_u32(packed.map(|chunk| chunk.sectors).max().unwrap_or(8) * SECTOR)
}

impl Dmg {
    /// The chunk that holds `offset`.
    fn chunk(&self, offset: u64) -> Result<(usize, &Chunk)> {
        let sector = offset / SECTOR;
        let after = self.chunks.partition_point(|chunk| chunk.sector <= sector);
        let found = after.checked_sub(1).and_then(|index| Some((index, self.chunks.get(index)?)));
        found.filter(|(_, chunk)| sector - chunk.sector < chunk.sectors).ok_or_else(|| {
            Error::new(ErrorKind::Corrupt, format!("the image has no chunk for the disk's sector {sector}"))
        })
    }
}

impl Layout for Dmg {
    fn format_name(&self) -> &'static str {
        "dmg"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn preferred(&self) -> u32 {
        self.preferred
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece> {
        let (index, chunk) = self.chunk(offset)?;
        let within = offset - chunk.sector * SECTOR;
        let unit_len = chunk.sectors * SECTOR;
        let place = match chunk.packing {
            Packing::Zero => Place::Zero,
            Packing::Raw => Place::Plain(chunk.offset + within),
            _ => Place::Packed { unit: index as u64, unit_len, within },
        };
        Ok(Piece { place, len: (unit_len - within).min(max_len) })
    }

    fn unpack(&self, unit: u64) -> Result<Vec<u8>> {
        let chunk = self.chunks.get(to_usize(unit)).ok_or_else(|| Error::invalid("no such chunk"))?;
        let mut packed = vec![0; to_usize(chunk.len)];
        self.tables.storage().read_at(&mut packed, chunk.offset)?;
        let len = to_usize(chunk.sectors * SECTOR);
        let unpacked = match chunk.packing {
            Packing::Zlib => inflate(&packed, len, true),
            Packing::Bzip2 => bunzip2(&packed, len),
            Packing::Adc => adc(&packed, len),
            Packing::Lzfse => Err(not_unpacked("LZFSE")),
            Packing::Lzma => Err(not_unpacked("LZMA")),
            Packing::Zero | Packing::Raw => Err(Error::invalid("the chunk is not packed")),
        };
        let (sector, offset) = (chunk.sector, chunk.offset);
        unpacked.map_err(|error| error.context(format!("chunk of sector {sector} at {offset:#x}")))
    }

    /// qemu-img shows plain data.
    fn says_compressed(&self) -> bool {
        false
    }
}

fn not_unpacked(how: &str) -> Error {
    Error::unsupported(format!("the image is compressed with {how}, which vimg does not unpack"))
        .hint("on a Mac, hdiutil convert -format UDZO makes an image that it can read")
}
