//! Compressed clusters: raw deflate and Zstandard (specification, "Compressed Clusters Descriptor",
//! "compression_type").
//!
//! Deflate is encoded by libdeflate, which sees a whole cluster at once and is three to four times as fast
//! as zlib for the same size; its matches reach back 32 KiB. QEMU's writer keeps to a 4 KiB window, and
//! QEMU's reader takes both (it inflates a cluster in one call); for readers that insist on 4 KiB, [`Level`]
//! can ask for it, at zlib's speed. Decoding an image is decoding a stranger's bytes, so it is done by the
//! memory-safe zune-inflate and zlib-rs.

use std::cell::RefCell;

use block::{Compressed, Error, ErrorKind, Result};

use crate::header::{COMPRESSION_ZLIB, COMPRESSION_ZSTD};

/// How hard to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Level {
    /// The codec's level: 1 to 12 for deflate, 1 to 22 for zstd. `None`: a level that beats QEMU in
    /// speed and does not lose to it in size (deflate 2, zstd 3).
    pub level: Option<i32>,
    /// Deflate only: matches reach back 4 KiB at most, as in QEMU's own output.
    pub small_window: bool,
}

/// A level of deflate or zstd.
const DEFAULT_DEFLATE_LEVEL: i32 = 2;
const DEFAULT_ZSTD_LEVEL: i32 = 3;
/// log2 of the window that QEMU's writer uses.
const SMALL_WINDOW_BITS: u8 = 12;

/// The codec of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    Deflate,
    Zstd,
}

thread_local! {
    static DEFLATER: RefCell<Option<(i32, libdeflater::Compressor)>> = const { RefCell::new(None) };
    static SMALL_DEFLATER: RefCell<Option<(u32, flate2::Compress)>> = const { RefCell::new(None) };
    static INFLATER: RefCell<flate2::Decompress> = RefCell::new(flate2::Decompress::new(false));
    static ZSTD_ENCODER: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static ZSTD_DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

fn failed(what: &str, why: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Io, format!("{what}: {why}"))
}

impl Codec {
    /// The codec of a header's compression type.
    pub(crate) fn of(compression_type: u8) -> Result<Self> {
        match compression_type {
            COMPRESSION_ZLIB => Ok(Self::Deflate),
            COMPRESSION_ZSTD => Ok(Self::Zstd),
            other => Err(Error::unsupported(format!("qcow2: unknown compression type: {other}"))),
        }
    }

    /// Checks a level the user asked for.
    pub(crate) fn check_level(self, level: Level) -> Result<()> {
        let range = match (self, level.small_window) {
            (Self::Deflate, false) => 1..=12,
            (Self::Deflate, true) => 1..=9,
            (Self::Zstd, _) => 1..=22,
        };
        match level.level {
            Some(level) if !range.contains(&level) => Err(Error::usage(format!(
                "compression level {level} is out of range ({} to {})",
                range.start(),
                range.end()
            ))),
            _ => Ok(()),
        }
    }

    /// Compresses a cluster, unless that does not make it smaller.
    pub(crate) fn compress(self, data: &[u8], level: Level) -> Result<Compressed> {
        match self {
            Self::Deflate if level.small_window => deflate_small_window(data, level.level.unwrap_or(6)),
            Self::Deflate => deflate(data, level.level.unwrap_or(DEFAULT_DEFLATE_LEVEL)),
            Self::Zstd => zstd_compress(data, level.level.unwrap_or(DEFAULT_ZSTD_LEVEL)),
        }
    }

    /// Fills `out` from compressed bytes, which may be followed by others. `Err` says why it cannot.
    pub(crate) fn decompress(self, packed: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
        match self {
            Self::Deflate => inflate(packed, out),
            Self::Zstd => zstd_decompress(packed, out),
        }
    }
}

fn deflate(data: &[u8], level: i32) -> Result<Compressed> {
    DEFLATER.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(have, _)| *have != level) {
            let parsed = libdeflater::CompressionLvl::new(level)
                .map_err(|_| Error::usage(format!("compression level {level} is out of range (1 to 12)")))?;
            *slot = Some((level, libdeflater::Compressor::new(parsed)));
        }
        let Some((_, compressor)) = slot else { return Err(Error::unsupported("no compressor")) };
        let mut packed = vec![0; data.len() - 1];
        match compressor.deflate_compress(data, &mut packed) {
            Ok(len) => {
                packed.truncate(len);
                Ok(Compressed::Packed(packed))
            }
            Err(libdeflater::CompressionError::InsufficientSpace) => Ok(Compressed::Incompressible),
        }
    })
}

fn deflate_small_window(data: &[u8], level: i32) -> Result<Compressed> {
    let level = u32::try_from(level).map_err(|_| Error::usage("compression level is negative"))?;
    SMALL_DEFLATER.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(have, _)| *have != level) {
            let compress = flate2::Compress::new_with_window_bits(
                flate2::Compression::new(level),
                false,
                SMALL_WINDOW_BITS,
            );
            *slot = Some((level, compress));
        }
        let Some((_, compress)) = slot else { return Err(Error::unsupported("no compressor")) };
        compress.reset();
        // Room for what does not shrink, too: some encoders dislike running out of it.
        let mut packed = vec![0; data.len() + data.len() / 8 + 64];
        let status = compress
            .compress(data, &mut packed, flate2::FlushCompress::Finish)
            .map_err(|e| failed("deflate", e))?;
        let len = block::num::to_usize(compress.total_out());
        if status == flate2::Status::StreamEnd && len < data.len() {
            packed.truncate(len);
            Ok(Compressed::Packed(packed))
        } else {
            Ok(Compressed::Incompressible)
        }
    })
}

/// Inflates a whole cluster at once, and only if that does not come out right, step by step: a stream need not
/// have an end, and may hold more than the cluster.
fn inflate(packed: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    let options = zune_inflate::DeflateOptions::default().set_size_hint(out.len()).set_limit(out.len());
    match zune_inflate::DeflateDecoder::new_with_options(packed, options).decode_deflate() {
        Ok(bytes) if bytes.len() == out.len() => {
            out.copy_from_slice(&bytes);
            Ok(())
        }
        _ => inflate_stepwise(packed, out),
    }
}

fn inflate_stepwise(packed: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    INFLATER.with_borrow_mut(|inflater| {
        inflater.reset(false);
        let wanted = out.len() as u64;
        loop {
            let (read, written) = (inflater.total_in(), inflater.total_out());
            if written == wanted {
                return Ok(());
            }
            let input = packed.get(block::num::to_usize(read)..).unwrap_or_default();
            let output = out.get_mut(block::num::to_usize(written)..).unwrap_or_default();
            let status = inflater
                .decompress(input, output, flate2::FlushDecompress::None)
                .map_err(|e| format!("invalid deflate data ({e})"))?;
            let stuck = inflater.total_in() == read && inflater.total_out() == written;
            if inflater.total_out() < wanted && (status == flate2::Status::StreamEnd || stuck) {
                return Err(format!("deflate data ends after {} of {wanted} bytes", inflater.total_out()));
            }
        }
    })
}

fn zstd_compress(data: &[u8], level: i32) -> Result<Compressed> {
    ZSTD_ENCODER.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(have, _)| *have != level) {
            let compressor = zstd::bulk::Compressor::new(level).map_err(|e| failed("zstd", e))?;
            *slot = Some((level, compressor));
        }
        let Some((_, compressor)) = slot else { return Err(Error::unsupported("no compressor")) };
        let packed = compressor.compress(data).map_err(|e| failed("zstd", e))?;
        Ok(if packed.len() < data.len() { Compressed::Packed(packed) } else { Compressed::Incompressible })
    })
}

fn zstd_decompress(mut packed: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    ZSTD_DECODER.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = Some(zstd::bulk::Decompressor::new().map_err(|e| e.to_string())?);
        }
        let Some(decoder) = slot else { return Err("no decoder".to_owned()) };
        let mut done = 0;
        while done < out.len() {
            let frame = zstd::zstd_safe::find_frame_compressed_size(packed)
                .map_err(|code| format!("invalid zstd data ({})", zstd::zstd_safe::get_error_name(code)))?;
            let (this, rest) = packed.split_at_checked(frame).ok_or("zstd frame is cut off")?;
            let written = decoder
                .decompress_to_buffer(this, &mut out[done..])
                .map_err(|e| format!("invalid zstd data ({e})"))?;
            if frame == 0 {
                return Err("empty zstd frame".to_owned());
            }
            packed = rest;
            done += written;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|i| b"the quick brown fox "[(i * i / 7 + i) % 20]).collect()
    }

    fn round_trip(codec: Codec, level: Level) {
        let data = text(65536);
        let Compressed::Packed(mut packed) = codec.compress(&data, level).unwrap() else { panic!("grew") };
        assert!(packed.len() < data.len());
        packed.extend_from_slice(&[0xa5; 300]); // the rest of the last sector
        let mut out = vec![0; data.len()];
        codec.decompress(&packed, &mut out).unwrap();
        assert_eq!(out, data);
    }

    #[test]
    fn what_is_packed_unpacks_with_garbage_behind_it() {
        round_trip(Codec::Deflate, Level::default());
        round_trip(Codec::Deflate, Level { level: Some(12), small_window: false });
        round_trip(Codec::Deflate, Level { level: None, small_window: true });
        round_trip(Codec::Zstd, Level::default());
        round_trip(Codec::Zstd, Level { level: Some(19), small_window: false });
    }

    #[test]
    fn noise_stays_as_it_is() {
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .take(65536)
        .collect();
        for (codec, small_window) in [(Codec::Deflate, false), (Codec::Deflate, true), (Codec::Zstd, false)] {
            let level = Level { level: None, small_window };
            assert_eq!(codec.compress(&noise, level).unwrap(), Compressed::Incompressible);
        }
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let data = text(8192);
        let mut packed = zstd::bulk::compress(&data[..3000], 1).unwrap();
        packed.extend(zstd::bulk::compress(&data[3000..], 1).unwrap());
        packed.extend_from_slice(&[0; 100]);
        let mut out = vec![0; data.len()];
        Codec::Zstd.decompress(&packed, &mut out).unwrap();
        assert_eq!(out, data);
    }

    #[test]
    fn a_stream_may_lack_its_end_or_hold_more_than_the_cluster() {
        let data = text(70_000);
        let mut encoder = flate2::Compress::new(flate2::Compression::fast(), false);
        let mut packed = vec![0; data.len()];
        encoder.compress(&data, &mut packed, flate2::FlushCompress::Sync).unwrap();
        packed.truncate(usize::try_from(encoder.total_out()).unwrap());
        for len in [65536, 70_000] {
            let mut out = vec![0; len];
            Codec::Deflate.decompress(&packed, &mut out).unwrap();
            assert_eq!(out, data[..len]);
        }
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        for codec in [Codec::Deflate, Codec::Zstd] {
            let Compressed::Packed(packed) = codec.compress(&text(4096), Level::default()).unwrap() else {
                panic!("grew")
            };
            let mut out = vec![0; 4096];
            assert!(codec.decompress(&packed[..packed.len() / 2], &mut out).is_err());
            assert!(codec.decompress(&[], &mut out).is_err());
            for at in 0..packed.len() {
                let mut bad = packed.clone();
                bad[at] ^= 0x55;
                let _ = codec.decompress(&bad, &mut out);
            }
        }
    }
}
