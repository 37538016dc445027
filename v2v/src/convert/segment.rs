//! An archive that is put behind an initramfs: how it is packed, and how far it is from what is in front of it.
//!
//! Linux takes archives one after the other, each packed in any way that the kernel knows, with zeros between them; files
//! of a later one take the place of earlier ones. (Tried with 6.1: behind archives of every compression, if the first part
//! is filled up with zeros to a multiple of four.) Before 5.13 the LZ4 decoder took zeros behind its data for a block: there
//! the archive follows at once, as another LZ4 stream, which is how that format is continued (tried with 6.1).

use std::io::Write as _;

use block::{Error, Result};

/// Bytes to a multiple of which the first part is filled up.
const ALIGN: u64 = 512;
/// How hard zstd tries. (Measured: for Debian's drivers and indexes, level 9 takes four times as long and saves a tenth.)
const ZSTD_LEVEL: i32 = 3;

/// How a segment is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// Not at all.
    Plain,
    Gzip,
    Zstd,
    /// LZ4's "legacy" frames without any compression, directly behind the first part.
    Lz4Continued,
}

/// The first version whose LZ4 decoder stops at zeros.
const LZ4_STOPS: (u32, u32) = (5, 13);

impl Packing {
    /// How to pack a segment behind an archive of this compression, for a kernel of this release. `has_gzip`: its
    /// configuration says that it reads gzip.
    pub(crate) fn behind(compression: &str, release: &str, has_gzip: bool) -> Self {
        match compression {
            "gzip" => Self::Gzip,
            "zstd" => Self::Zstd,
            "lz4" if version(release).is_none_or(|version| version < LZ4_STOPS) => Self::Lz4Continued,
            _ if has_gzip => Self::Gzip,
            _ => Self::Plain,
        }
    }
}

/// The first two numbers of a kernel's release.
pub(crate) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What is added to a file of `len` bytes: zeros, and the archive.
///
/// # Errors
/// A compressor failed.
pub(crate) fn append(archive: &[u8], packing: Packing, len: u64) -> Result<Vec<u8>> {
    if packing == Packing::Lz4Continued {
        return Ok(lz4(archive));
    }
    let padding = len.next_multiple_of(ALIGN) - len;
    let mut out = vec![0; usize::try_from(padding).unwrap_or(0)];
    match packing {
        Packing::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(out, flate2::Compression::new(6));
            encoder.write_all(archive)?;
            out = encoder.finish()?;
        }
        Packing::Zstd => {
            let packed = zstd::bulk::compress(archive, ZSTD_LEVEL);
            out.extend(packed.map_err(|error| Error::from(error).context("zstd".to_owned()))?);
        }
        Packing::Plain | Packing::Lz4Continued => out.extend_from_slice(archive),
    }
    Ok(out)
}

/// LZ4's legacy format: the magic number, then blocks of 8 MiB with their lengths in front. Every block is one run of
/// literals.
fn lz4(archive: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 8 << 20;
    let mut out = 0x184c_2102_u32.to_le_bytes().to_vec();
    for part in archive.chunks(BLOCK) {
        let block = literals(part);
        out.extend_from_slice(&u32::try_from(block.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(block);
    }
    out
}

/// A block of LZ4 (Block Format Description): a token with the length of the literals, more of that length, the literals.
fn literals(part: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(part.len() + part.len() / 255 + 16);
    match part.len().checked_sub(15) {
        None => out.push(u8::try_from(part.len()).unwrap_or(0) << 4),
        Some(mut rest) => {
            out.push(0xf0);
            while rest >= 255 {
                out.push(255);
                rest -= 255;
            }
            out.push(u8::try_from(rest).unwrap_or(0));
        }
    }
    out.extend_from_slice(part);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_like_what_is_in_front() {
        assert_eq!(Packing::behind("gzip", "2.6.32", false), Packing::Gzip);
        assert_eq!(Packing::behind("zstd", "6.1.0-30-amd64", true), Packing::Zstd);
        assert_eq!(Packing::behind("xz", "4.18.0", true), Packing::Gzip);
        assert_eq!(Packing::behind("none", "4.18.0", false), Packing::Plain);
        assert_eq!(Packing::behind("lz4", "5.4.0-100-generic", true), Packing::Lz4Continued);
        assert_eq!(Packing::behind("lz4", "5.13.0", true), Packing::Gzip);
        assert_eq!(Packing::behind("lz4", "6.8.0-50-generic", false), Packing::Plain);
    }

    #[test]
    fn the_archive_begins_at_a_multiple() {
        for (len, zeros) in [(0, 0), (1, 511), (512, 0), (513, 511)] {
            let out = append(b"070701", Packing::Plain, len).unwrap();
            assert!(out[..zeros].iter().all(|byte| *byte == 0));
            assert_eq!(&out[zeros..], b"070701");
        }
    }

    #[test]
    fn literals_are_as_long_as_they_say() {
        assert_eq!(literals(b"abc"), b"\x30abc");
        assert_eq!(literals(&[7; 15])[..2], [0xf0, 0]);
        assert_eq!(literals(&[7; 300])[..4], [0xf0, 255, 30, 7]);
        assert_eq!(literals(&[7; 300]).len(), 303);
    }
}
