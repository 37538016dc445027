//! Growing images of Bochs: a redolog without a base ("Harddisk Images based on redologs", Bochs development manual).
//!
//! ```text
//!   0        "Bochs Virtual HD Image", "Redolog", "Growing", version, length of the header
//!   72       entries of the catalog, bytes of a bitmap, bytes of an extent; size of the disk
//!   512      catalog: number of each extent in the file, or 0xffffffff      32 bits each, little-endian
//!   ...      extents, each a bitmap of the sectors that have been written, and the sectors
//! ```

use std::sync::Arc;

use block::image::ImageInfo;
use block::num::align_up;
use block::{Error, ErrorKind, Result, Storage};

use crate::device::{Layout, Piece, Place};
use crate::format::Opened;
use crate::tables::Tables;

const MAGIC: &[u8] = b"Bochs Virtual HD Image\0";
const SECTOR: u64 = 512;
const HEADER_LEN: u64 = 512;
/// The catalog's word for an extent that is not there.
const NONE: u32 = u32::MAX;
/// Limits of qemu: 4 MiB of catalog, extents from a sector to 8 MiB.
const MOST_CATALOG: u32 = 0x10_0000;
const MOST_EXTENT: u32 = 0x80_0000;

/// Whether these are the first bytes of an image of Bochs, of whatever kind.
pub(crate) fn probe(first: &[u8]) -> bool {
    first.starts_with(MAGIC)
}

#[derive(Debug)]
struct Bochs {
    tables: Tables,
    catalog_offset: u64,
    /// Where extent 0 begins.
    data_offset: u64,
    /// Bytes of a bitmap in the file.
    bitmap: u64,
    /// Bytes of an extent on the disk.
    extent: u64,
    size: u64,
}

fn text(field: &[u8]) -> String {
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// Reads the header.
pub(crate) fn read(storage: Arc<dyn Storage>) -> Result<Opened> {
    let tables = Tables::new(Arc::clone(&storage))?;
    tables.check_inside("the header", 0, HEADER_LEN)?;
    let header: [u8; 512] = tables.bytes(0)?;
    if !probe(&header) {
        return Err(Error::invalid("Image not in Bochs format"));
    }
    check_kind(&text(&header[32..48]), &text(&header[48..64]))?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    let size = match word(64) {
        0x1_0000 => long(84),
        0x2_0000 => long(88),
        other => return Err(Error::unsupported(format!("Bochs image version {other:#x} is not supported"))),
    };
    let (header_len, catalog, bitmap, extent) = (word(68), word(72), word(76), word(80));
    let catalog_offset = u64::from(header_len);
    if catalog_offset < HEADER_LEN {
        return Err(Error::invalid(format!("the header says that it has {header_len} bytes")));
    }
    check_geometry(catalog, bitmap, extent, size)?;
    let catalog_len = u64::from(catalog) * 4;
    tables.check_inside("the catalog", catalog_offset, catalog_len)?;
    let bitmap = align_up(u64::from(bitmap), SECTOR).unwrap_or(u64::from(bitmap));
    let data_offset = catalog_offset + catalog_len;
    let layout = Bochs { tables, catalog_offset, data_offset, bitmap, extent: u64::from(extent), size };
    Ok(Opened::new(layout, storage))
}

fn check_kind(kind: &str, subkind: &str) -> Result<()> {
    match (kind, subkind) {
        ("Redolog", "Growing") => Ok(()),
        ("Redolog", "Undoable" | "Volatile") => Err(Error::unsupported(format!(
            "a redolog of the kind '{subkind}' holds changes to another file, which it does not name"
        ))
        .hint("commit it to its base with bximage first")),
        _ => Err(Error::unsupported(format!(
            "a Bochs image of the kind '{kind}', '{subkind}' is not supported"
        ))),
    }
}

/// The rules of the format, and qemu's limits in its words.
fn check_geometry(catalog: u32, bitmap: u32, extent: u32, size: u64) -> Result<()> {
    let refused = |message: &str| Err(Error::invalid(message));
    if catalog > MOST_CATALOG {
        return refused("Catalog size is too large");
    }
    if extent < 512 {
        return refused("Extent size must be at least 512");
    }
    if !extent.is_power_of_two() {
        return Err(Error::invalid(format!("Extent size {extent} is not a power of two")));
    }
    if extent > MOST_EXTENT {
        return Err(Error::invalid(format!("Extent size {extent} is too large")));
    }
    if u64::from(catalog) < size.div_ceil(u64::from(extent)) {
        return refused("Catalog size is too small for this disk size");
    }
    // One bit for each sector of an extent.
    if u64::from(bitmap) * 8 < u64::from(extent) / SECTOR || bitmap > MOST_EXTENT {
        return Err(Error::invalid(format!(
            "a bitmap of {bitmap} bytes does not fit extents of {extent} bytes"
        )));
    }
    Ok(())
}

impl Bochs {
    /// Where the extent that holds `offset` begins in the file, if it is there.
    fn place(&self, offset: u64) -> Result<Option<u64>> {
        let entry = self.catalog_offset + offset / self.extent * 4;
        let number = u32::from_le_bytes(self.tables.bytes(entry)?);
        if number == NONE {
            return Ok(None);
        }
        // Fits: 32 bits times twice 8 MiB, behind 4 GiB.
        let place = self.data_offset + u64::from(number) * (self.bitmap + self.extent);
        if place >= self.tables.file_len() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("the extent at {offset:#x} lies at {place:#x}, past the end of the file"),
            ));
        }
        Ok(Some(place))
    }

    /// How far extents that are not there go on from `offset`.
    fn absent(&self, offset: u64, max_len: u64) -> Result<u64> {
        let mut len = (self.extent - offset % self.extent).min(max_len);
        while len < max_len && self.place(offset + len)?.is_none() {
            len += self.extent.min(max_len - len);
        }
        Ok(len)
    }

    /// Whether a sector of the extent at `place` has been written.
    fn is_written(&self, place: u64, sector: u64) -> Result<bool> {
        let [byte] = self.tables.bytes(place + sector / 8)?;
        Ok(byte >> (sector % 8) & 1 == 1)
    }
}

impl Layout for Bochs {
    fn format_name(&self) -> &'static str {
        "bochs"
    }

    fn size(&self) -> u64 {
        // qemu counts whole sectors.
        self.size / SECTOR * SECTOR
    }

    fn preferred(&self) -> u32 {
        block::num::low_u32(self.extent)
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece> {
        let Some(place) = self.place(offset)? else {
            return Ok(Piece { place: Place::Absent, len: self.absent(offset, max_len)? });
        };
        let within = offset % self.extent;
        let max_len = max_len.min(self.extent - within);
        let written = self.is_written(place, within / SECTOR)?;
        let mut len = (SECTOR - within % SECTOR).min(max_len);
        while len < max_len && self.is_written(place, (within + len) / SECTOR)? == written {
            len += SECTOR.min(max_len - len);
        }
        let place = if written { Place::Plain(place + self.bitmap + within) } else { Place::Absent };
        Ok(Piece { place, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_is_checked_before_it_is_used() {
        check_geometry(1024, 4, 16384, 10_321_920).unwrap();
        for (catalog, bitmap, extent, size) in [
            (MOST_CATALOG + 1, 4, 16384, 0),
            (1024, 4, 256, 0),
            (1024, 4, 16385, 0),
            (1024, 4, MOST_EXTENT * 2, 0),
            (1024, 3, 16384, 0),
            (1024, u32::MAX, 16384, 0),
            (1024, 4, 16384, 1024 * 16384 + 1),
            (1024, 4, 16384, u64::MAX),
        ] {
            check_geometry(catalog, bitmap, extent, size).unwrap_err();
        }
    }
}
