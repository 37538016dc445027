//! The markers of a stream-optimized extent (Virtual Disk Format 5.0, "Stream-Optimized Compressed").
//!
//! Behind the header, everything in such an extent is announced by a marker in a sector of its own (a grain's
//! data follows its marker in the same sector), so that a reader that cannot seek knows what it is looking at:
//!
//! ```text
//!    0  u64  a grain: the first sector of the disk that it holds; else: sectors of metadata that follow
//!    8  u32  a grain: bytes of compressed data, not 0;             else: 0
//!   12       a grain: the data, padded to whole sectors;           else: u32 type, padding
//! ```

use block::codec::{Reader, Writer};

/// Bytes of a sector, the unit of everything in the file.
pub(crate) const SECTOR: u64 = 512;
/// Bytes in front of a grain's data.
pub(crate) const GRAIN_MARKER: usize = 12;

const END_OF_STREAM: u32 = 0;
const GRAIN_TABLE: u32 = 1;
const GRAIN_DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;

/// What stands at a sector of a stream, and what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marker {
    /// A grain, whose compressed data begins [`GRAIN_MARKER`] bytes on.
    Grain {
        /// First sector of the disk that it holds.
        sector: u64,
        /// Bytes of compressed data, at least 1.
        size: u32,
    },
    /// The end; nothing follows.
    EndOfStream,
    /// A grain table follows.
    GrainTable {
        /// Its length in sectors.
        sectors: u64,
    },
    /// The grain directory follows.
    GrainDirectory {
        /// Its length in sectors.
        sectors: u64,
    },
    /// The footer follows: the header with what was not known at the start.
    Footer {
        /// Its length in sectors: 1.
        sectors: u64,
    },
    /// Metadata of a type that has been invented later.
    Other {
        /// Its number.
        kind: u32,
        /// Its length in sectors.
        sectors: u64,
    },
}

impl Marker {
    /// Reads the marker at the start of `bytes`, or `None` if these are fewer than 16.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let (value, size, kind) = (reader.le_u64()?, reader.le_u32()?, reader.le_u32()?);
        Some(match (size, kind) {
            (0, END_OF_STREAM) => Self::EndOfStream,
            (0, GRAIN_TABLE) => Self::GrainTable { sectors: value },
            (0, GRAIN_DIRECTORY) => Self::GrainDirectory { sectors: value },
            (0, FOOTER) => Self::Footer { sectors: value },
            (0, kind) => Self::Other { kind, sectors: value },
            (size, _) => Self::Grain { sector: value, size },
        })
    }

    /// Appends the marker: what stands in front of a grain's data, or a whole sector.
    pub(crate) fn encode(self, out: &mut Writer) {
        match self {
            Self::Grain { sector, size } => {
                out.le_u64(sector).le_u32(size);
            }
            Self::EndOfStream => metadata(out, 0, END_OF_STREAM),
            Self::GrainTable { sectors } => metadata(out, sectors, GRAIN_TABLE),
            Self::GrainDirectory { sectors } => metadata(out, sectors, GRAIN_DIRECTORY),
            Self::Footer { sectors } => metadata(out, sectors, FOOTER),
            Self::Other { kind, sectors } => metadata(out, sectors, kind),
        }
    }
}

fn metadata(out: &mut Writer, sectors: u64, kind: u32) {
    out.le_u64(sectors).le_u32(0).le_u32(kind).bytes(&[0; 496]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_round_trip_in_whole_sectors() {
        for marker in [
            Marker::EndOfStream,
            Marker::GrainTable { sectors: 4 },
            Marker::GrainDirectory { sectors: 17 },
            Marker::Footer { sectors: 1 },
            Marker::Other { kind: 9, sectors: 2 },
        ] {
            let mut out = Writer::new();
            marker.encode(&mut out);
            assert_eq!((out.len(), Marker::parse(&out.into_bytes())), (512, Some(marker)));
        }
    }

    #[test]
    fn a_grain_is_known_by_its_size() {
        let mut out = Writer::new();
        let marker = Marker::Grain { sector: 1 << 40, size: 500 };
        marker.encode(&mut out);
        assert_eq!(out.len(), GRAIN_MARKER);
        out.bytes(&[1; 500]);
        assert_eq!(Marker::parse(&out.into_bytes()), Some(marker));
    }

    #[test]
    fn the_end_of_the_stream_is_a_sector_of_zeros() {
        assert_eq!(Marker::parse(&[0; 512]), Some(Marker::EndOfStream));
        assert_eq!(Marker::parse(&[0; 15]), None);
    }
}
