//! Parallels' expandable images ("Parallels Expandable Image File Format", QEMU's interop documentation).
//!
//! ```text
//!   0     "WithoutFreeSpace" or "WithouFreSpacExt", version 2                little-endian
//!   28    sectors of a cluster, entries of the BAT, sectors of the disk
//!   44    in use, where the data begins in sectors, flags, extension
//!   64    BAT: where each cluster is, in sectors (the old magic) or clusters (the new one), or 0
//!   ...   clusters
//! ```

use std::collections::HashSet;
use std::sync::Arc;

use block::codec::Reader;
use block::image::{CheckReport, ImageInfo};
use block::{Error, ErrorKind, Result, Storage};

use crate::device::{Layout, Piece, Place};
use crate::format::Opened;
use crate::tables::Tables;

const OLD_MAGIC: &[u8] = b"WithoutFreeSpace";
const NEW_MAGIC: &[u8] = b"WithouFreSpacExt";
const VERSION: u32 = 2;
/// "in use": opened for writing and not closed since.
const IN_USE: u32 = 0x746f_6e59;
const HEADER_LEN: u64 = 64;
const SECTOR: u64 = 512;
/// Limits of qemu: a cluster and the BAT are addressed with an `int`.
const MOST_TRACKS: u32 = i32::MAX as u32 / 513;
const MOST_ENTRIES: u32 = i32::MAX as u32 / 4;

/// Whether these are the first bytes of a Parallels image. (qemu wants version 2, too.)
pub(crate) fn probe(first: &[u8]) -> bool {
    let magic = first.starts_with(OLD_MAGIC) || first.starts_with(NEW_MAGIC);
    magic && first.get(16..20) == Some(&VERSION.to_le_bytes())
}

#[derive(Debug, Clone, Copy)]
struct Header {
    extended: bool,
    /// Sectors of a cluster.
    tracks: u32,
    entries: u32,
    sectors: u64,
    in_use: u32,
    data_offset: u32,
}

impl Header {
    fn parse(bytes: &[u8; 64]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let extended = reader.take(16)? == NEW_MAGIC;
        reader.skip(12)?;
        let (tracks, entries, sectors) = (reader.le_u32()?, reader.le_u32()?, reader.le_u64()?);
        // The old magic has 32 bits here, and nothing that counts behind them.
        let sectors = if extended { sectors } else { sectors & u64::from(u32::MAX) };
        Some(Self {
            extended,
            tracks,
            entries,
            sectors,
            in_use: reader.le_u32()?,
            data_offset: reader.le_u32()?,
        })
    }

    fn check(&self) -> Result<()> {
        if self.tracks == 0 {
            return Err(Error::invalid("Invalid image: Zero sectors per track"));
        }
        if self.tracks > MOST_TRACKS {
            return Err(Error::invalid("Invalid image: Too big cluster"));
        }
        if self.entries > MOST_ENTRIES {
            return Err(Error::invalid("Catalog too large"));
        }
        let needed = self.sectors.div_ceil(u64::from(self.tracks));
        if u64::from(self.entries) < needed {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("the disk needs {needed} clusters, the image lists {}", self.entries),
            ));
        }
        Ok(())
    }

    /// The first byte behind the BAT.
    fn bat_end(&self) -> u64 {
        HEADER_LEN + u64::from(self.entries) * 4
    }

    /// Bytes of a cluster.
    fn cluster(&self) -> u64 {
        u64::from(self.tracks) * SECTOR
    }

    /// Whether the place where the data begins is one that the specification allows.
    fn data_offset_is_right(&self) -> bool {
        let offset = u64::from(self.data_offset);
        match (self.extended, offset) {
            // To be computed.
            (false, 0) => true,
            (extended, _) => {
                let aligned = !extended || offset % u64::from(self.tracks) == 0;
                aligned && offset * SECTOR >= self.bat_end()
            }
        }
    }
}

#[derive(Debug)]
struct Parallels {
    tables: Tables,
    header: Header,
}

/// Reads the header.
pub(crate) fn read(storage: Arc<dyn Storage>) -> Result<Opened> {
    let tables = Tables::new(Arc::clone(&storage))?;
    tables.check_inside("the header", 0, HEADER_LEN)?;
    let bytes: [u8; 64] = tables.bytes(0)?;
    if !probe(&bytes) {
        return Err(Error::invalid("Image not in Parallels format"));
    }
    let header = Header::parse(&bytes).ok_or_else(|| Error::invalid("Image not in Parallels format"))?;
    header.check()?;
    tables.check_inside("the BAT", HEADER_LEN, u64::from(header.entries) * 4)?;
    Ok(Opened::new(Parallels { tables, header }, storage))
}

impl Parallels {
    /// Where cluster `index` begins in the file, as the BAT has it. Fits: 32 bits of clusters of 2 GiB.
    fn place(&self, index: u64) -> Result<Option<u64>> {
        let entry = u32::from_le_bytes(self.tables.bytes(HEADER_LEN + index * 4)?);
        let unit = if self.header.extended { self.header.cluster() } else { SECTOR };
        Ok((entry != 0).then(|| u64::from(entry) * unit))
    }

    /// The same, refusing places in the metadata.
    fn trusted(&self, index: u64) -> Result<Option<u64>> {
        match self.place(index)? {
            Some(place) if place < self.header.bat_end() => Err(Error::new(
                ErrorKind::Corrupt,
                format!("cluster {index} lies at {place:#x}, in the image's own structures"),
            )),
            place => Ok(place),
        }
    }

    fn run(&self, first: Option<u64>, offset: u64, max_len: u64) -> Result<u64> {
        let cluster = self.header.cluster();
        let mut len = (cluster - offset % cluster).min(max_len);
        while len < max_len {
            let next = self.trusted((offset + len) / cluster)?;
            let wanted = first.map(|first| first + offset % cluster + len);
            if next != wanted {
                break;
            }
            len += cluster.min(max_len - len);
        }
        Ok(len)
    }
}

impl Layout for Parallels {
    fn format_name(&self) -> &'static str {
        "parallels"
    }

    fn size(&self) -> u64 {
        // Fits: there are no more sectors than clusters, and those have been counted.
        self.header.sectors * SECTOR
    }

    fn preferred(&self) -> u32 {
        block::num::low_u32(self.header.cluster())
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn piece(&self, offset: u64, max_len: u64) -> Result<Piece> {
        let cluster = self.header.cluster();
        let first = self.trusted(offset / cluster)?;
        let len = self.run(first, offset, max_len)?;
        let place = first.map_or(Place::Absent, |first| Place::Plain(first + offset % cluster));
        Ok(Piece { place, len })
    }

    /// As qemu-img does it: the mark of an image in use, where data begins, clusters outside the file or used twice,
    /// and what is behind the last one.
    fn check(&self) -> Result<CheckReport> {
        let mut report =
            CheckReport { total_clusters: u64::from(self.header.entries), ..CheckReport::default() };
        if self.header.in_use == IN_USE {
            report.corruptions += 1;
            report.say("ERROR image was not closed correctly".to_owned());
        }
        if !self.header.data_offset_is_right() {
            report.corruptions += 1;
            report.say("ERROR data_off field has incorrect value".to_owned());
        }
        let end = self.check_clusters(&mut report)?;
        let len = self.tables.file_len().next_multiple_of(SECTOR);
        if len > end {
            let leaked = len - end;
            report.leaks += leaked.div_ceil(self.header.cluster());
            report.say(format!("ERROR space leaked at the end of the image {leaked}"));
        }
        report.image_end_offset = end;
        Ok(report)
    }
}

impl Parallels {
    /// Checks the entries of the BAT; returns where the last cluster ends.
    fn check_clusters(&self, report: &mut CheckReport) -> Result<u64> {
        let cluster = self.header.cluster();
        let mut end = match u64::from(self.header.data_offset) * SECTOR {
            offset if self.header.data_offset_is_right() && offset != 0 => offset,
            _ => self.header.bat_end().next_multiple_of(if self.header.extended { cluster } else { SECTOR }),
        };
        // No more clusters than the file holds, however many the BAT names.
        let mut seen = HashSet::new();
        let mut previous = None;
        for index in 0..u64::from(self.header.entries) {
            let Some(place) = self.place(index)? else {
                previous = None;
                continue;
            };
            if place + cluster > self.tables.file_len() || place < self.header.bat_end() {
                report.corruptions += 1;
                report.say(format!("ERROR cluster {index} is outside image"));
                previous = None;
                continue;
            }
            if !seen.insert(place) {
                report.corruptions += 1;
                report.say(format!("ERROR duplicate offset in BAT entry {index}"));
            }
            report.allocated_clusters += 1;
            if previous.is_some_and(|previous| previous + cluster != place) {
                report.fragmented_clusters += 1;
            }
            previous = Some(place);
            end = end.max(place + cluster);
        }
        Ok(end)
    }
}
