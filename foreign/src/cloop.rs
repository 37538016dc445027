//! cloop: a disk cut into blocks of one size, each deflated (zlib) on its own.
//!
//! ```text
//!   0     a shell script that mounts the file; begins with "#!/bin/sh\n#V2.0 Format\n"
//!   128   block size in bytes, number of blocks             32 bits each, big-endian, like everything
//!   136   where each block begins, and where the last ends  64 bits each
//!   ...   the blocks
//! ```

use std::sync::Arc;

use block::codec::Reader;
use block::image::ImageInfo;
use block::num::to_usize;
use block::{Error, ErrorKind, Result, Storage};

use crate::device::{Layout, Piece, Place};
use crate::format::Opened;
use crate::tables::Tables;
use crate::unpack::inflate;

/// How a file begins that qemu takes for a cloop image, up to the version.
const MAGIC: &[u8] = b"#!/bin/sh\n#V";
const VERSION: &[u8] = b"2.0 Format\n";
const MODULE: &[u8] = b"modprobe cloop";
const HEADER_OFFSET: u64 = 128;
const OFFSETS: u64 = HEADER_OFFSET + 8;
/// The largest block in bytes, as in qemu.
const MOST_BLOCK: u32 = 64 << 20;
/// The most bytes of offsets, as in qemu.
const MOST_OFFSETS: u64 = 512 << 20;

/// Whether these are the first bytes of a cloop image of any version.
pub(crate) fn probe(first: &[u8]) -> bool {
    first.starts_with(MAGIC)
        && first.get(..128).is_some_and(|start| start.windows(MODULE.len()).any(|bytes| bytes == MODULE))
}

#[derive(Debug)]
struct Cloop {
    tables: Tables,
    block: u32,
    blocks: u32,
}

/// Reads the header.
pub(crate) fn read(storage: Arc<dyn Storage>) -> Result<Opened> {
    let tables = Tables::new(Arc::clone(&storage))?;
    tables.check_inside("the cloop header", 0, OFFSETS)?;
    let start: [u8; 136] = tables.bytes(0)?;
    if !start.get(MAGIC.len()..).is_some_and(|version| version.starts_with(VERSION)) {
        let version: Vec<u8> =
            start[MAGIC.len()..].iter().copied().take_while(|byte| *byte != b' ').take(8).collect();
        let version = String::from_utf8_lossy(&version);
        return Err(Error::unsupported(format!("cloop format {version} is not supported, only 2.0 is"))
            .hint("extract_compressed_fs, of Debian's cloop-utils, reads other versions"));
    }
    let mut header = Reader::new(&start[to_usize(HEADER_OFFSET)..]);
    let (block, blocks) = (header.be_u32().unwrap_or_default(), header.be_u32().unwrap_or_default());
    check_geometry(block, blocks)?;
    let cloop = Cloop { tables, block, blocks };
    cloop.check_ends()?;
    Ok(Opened::new(cloop, storage))
}

fn check_geometry(block: u32, blocks: u32) -> Result<()> {
    if block == 0 {
        return Err(Error::invalid("block_size cannot be zero"));
    }
    if !block.is_multiple_of(512) {
        return Err(Error::invalid(format!("block_size {block} must be a multiple of 512")));
    }
    if block > MOST_BLOCK {
        return Err(Error::invalid(format!("block_size {block} must be 64 MB or less")));
    }
    if (u64::from(blocks) + 1) * 8 > MOST_OFFSETS {
        return Err(Error::invalid("image requires too many offsets, try increasing block size"));
    }
    Ok(())
}

impl Cloop {
    fn offset(&self, index: u64) -> Result<u64> {
        Ok(u64::from_be_bytes(self.tables.bytes(OFFSETS + index * 8)?))
    }

    /// The first block begins behind the offsets, and the last one ends in the file.
    fn check_ends(&self) -> Result<()> {
        let blocks = u64::from(self.blocks);
        let end = OFFSETS + (blocks + 1) * 8;
        self.tables.check_inside("the offsets of the blocks", OFFSETS, end - OFFSETS)?;
        let (first, last) = (self.offset(0)?, self.offset(blocks)?);
        if first < end || last < first {
            let message = format!("the blocks lie at {first:#x} to {last:#x}, the offsets end at {end:#x}");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        self.tables.check_inside("the blocks", first, last - first)
    }

    /// Where a block is in the file, and how long.
    fn extent(&self, index: u64) -> Result<(u64, u64)> {
        let (start, end) = (self.offset(index)?, self.offset(index + 1)?);
        let corrupt = |what: &str| {
            Error::new(ErrorKind::Corrupt, format!("{what} at index {index}, image file is corrupt"))
        };
        let len = end.checked_sub(start).ok_or_else(|| corrupt("offsets not monotonically increasing"))?;
        // Deflate adds five bytes to 64 KiB that do not shrink, and the frame eleven; anything much longer is a lie.
        if len > u64::from(self.block) * 2 + 64 || start < OFFSETS {
            return Err(corrupt("invalid compressed block size"));
        }
        self.tables.check_inside("a block", start, len)?;
        Ok((start, len))
    }
}

impl Layout for Cloop {
    fn format_name(&self) -> &'static str {
        "cloop"
    }

    fn size(&self) -> u64 {
        u64::from(self.block) * u64::from(self.blocks)
    }

    fn preferred(&self) -> u32 {
        self.block
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece> {
        let block = u64::from(self.block);
        let (unit, within) = (offset / block, offset % block);
        Ok(Piece {
            place: Place::Packed { unit, unit_len: block, within },
            len: (block - within).min(max_len),
        })
    }

    fn unpack(&self, unit: u64) -> Result<Vec<u8>> {
        let (start, len) = self.extent(unit)?;
        let mut packed = vec![0; to_usize(len)];
        self.tables.storage().read_at(&mut packed, start)?;
        let context = |error: Error| error.context(format!("block {unit} at {start:#x}"));
        inflate(&packed, to_usize(u64::from(self.block)), true).map_err(context)
    }

    /// qemu-img shows plain data.
    fn says_compressed(&self) -> bool {
        false
    }
}
