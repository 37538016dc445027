//! Tables of chunks ("mish").

use block::codec::Reader;
use block::{Error, ErrorKind, Result};

const CHUNK_LEN: usize = 40;
/// The most bytes of a chunk, packed or unpacked, as in qemu.
const MOST_LEN: u64 = 64 << 20;
const SECTOR: u64 = 512;

/// How a chunk is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// It is not there and reads as zeros.
    Zero,
    /// Not at all.
    Raw,
    /// Apple Data Compression.
    Adc,
    /// zlib.
    Zlib,
    /// bzip2.
    Bzip2,
    /// Apple's LZFSE.
    Lzfse,
    /// LZMA, in xz's format.
    Lzma,
}

impl Packing {
    /// Whether it has to be unpacked as a whole.
    pub(super) fn is_packed(self) -> bool {
        !matches!(self, Self::Zero | Self::Raw)
    }

    /// The packing of a chunk of the type `kind`. `None`: not a chunk but a comment or the end.
    fn of(kind: u32) -> Result<Option<Self>> {
        Ok(Some(match kind {
            0 | 2 => Self::Zero,
            1 => Self::Raw,
            0x8000_0004 => Self::Adc,
            0x8000_0005 => Self::Zlib,
            0x8000_0006 => Self::Bzip2,
            0x8000_0007 => Self::Lzfse,
            0x8000_0008 => Self::Lzma,
            0x7fff_fffe | 0xffff_ffff => return Ok(None),
            other => {
                return Err(Error::unsupported(format!(
                    "the disk image has chunks of the unknown type {other:#x}"
                )));
            }
        }))
    }
}

/// Sectors that are packed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) packing: Packing,
    /// The first sector on the disk.
    pub(super) sector: u64,
    /// How many, at least 1.
    pub(super) sectors: u64,
    /// Where the chunk is in the file.
    pub(super) offset: u64,
    /// How many bytes it has there.
    pub(super) len: u64,
}

/// Adds the chunks of a table. Their offsets count from `data_offset` of a file of `file_len` bytes.
///
/// # Errors
/// `Invalid`, `Corrupt`, `Truncated`: the table breaks the rules; `Unsupported`: chunks of an unknown type.
pub(super) fn parse(table: &[u8], data_offset: u64, file_len: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    let broken = || Error::invalid("a table of chunks of the disk image is too short");
    let mut reader = Reader::new(table);
    reader.skip(8).ok_or_else(broken)?;
    let first = reader.be_u64().ok_or_else(broken)?;
    reader.skip(8).ok_or_else(broken)?;
    let base = reader.be_u64().ok_or_else(broken)?;
    let base = base.checked_add(data_offset).ok_or_else(broken)?;
    // Sizes of buffers, an id, reserved words and a checksum.
    reader.skip(4 + 4 + 24 + 136).ok_or_else(broken)?;
    let count = reader.be_u32().ok_or_else(broken)?;
    if reader.remaining() / CHUNK_LEN < usize::try_from(count).unwrap_or(usize::MAX) {
        return Err(broken());
    }
    for _ in 0..count {
        let (kind, _comment) = (reader.be_u32().ok_or_else(broken)?, reader.be_u32().ok_or_else(broken)?);
        let (sector, sectors) = (reader.be_u64().ok_or_else(broken)?, reader.be_u64().ok_or_else(broken)?);
        let (offset, len) = (reader.be_u64().ok_or_else(broken)?, reader.be_u64().ok_or_else(broken)?);
        let Some(packing) = Packing::of(kind)? else { continue };
        if sectors == 0 {
            continue;
        }
        let sector = first.checked_add(sector).ok_or_else(broken)?;
        let offset = base.checked_add(offset).ok_or_else(broken)?;
        let chunk = Chunk { packing, sector, sectors, offset, len };
        check(&chunk, file_len)?;
        chunks.push(chunk);
    }
    Ok(())
}

/// Everything that is computed with later is shown to fit here.
fn check(chunk: &Chunk, file_len: u64) -> Result<()> {
    let sector = chunk.sector;
    let end = sector.checked_add(chunk.sectors).and_then(|end| end.checked_mul(SECTOR));
    if end.is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(Error::invalid(format!("the chunk of sector {sector} has {} sectors", chunk.sectors)));
    }
    if chunk.packing == Packing::Zero {
        return Ok(());
    }
    let unpacked = chunk.sectors * SECTOR;
    if chunk.packing.is_packed() && unpacked.max(chunk.len) > MOST_LEN {
        return Err(Error::unsupported(format!(
            "the chunk of sector {sector} has {} bytes, unpacked {unpacked}; {MOST_LEN} is the limit",
            chunk.len
        )));
    }
    if chunk.packing == Packing::Raw && chunk.len != unpacked {
        let message = format!("the chunk of sector {sector} has {} bytes instead of {unpacked}", chunk.len);
        return Err(Error::new(ErrorKind::Corrupt, message));
    }
    match chunk.offset.checked_add(chunk.len) {
        Some(end) if end <= file_len => Ok(()),
        _ => Err(Error::new(
            ErrorKind::Truncated,
            format!(
                "the chunk of sector {sector} at {:#x} ({:#x} bytes) lies past the end of the file (length {file_len:#x})",
                chunk.offset, chunk.len
            ),
        )),
    }
}
