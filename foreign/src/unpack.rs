//! What chunks are packed with.

use block::{Error, ErrorKind, Result};
use flate2::{Decompress, FlushDecompress, Status};

/// Inflates exactly `len` bytes. With `zlib` the stream has a header and a checksum, and has to end with the last
/// byte; without, whatever follows is not looked at.
///
/// # Errors
/// `Corrupt`: the stream is broken, too short or too long.
pub(crate) fn inflate(packed: &[u8], len: usize, zlib: bool) -> Result<Vec<u8>> {
    let mut inflater = Decompress::new(zlib);
    let mut out = vec![0; len];
    let status = inflater.decompress(packed, &mut out, FlushDecompress::Finish).map_err(broken)?;
    if inflater.total_out() != len as u64 {
        return Err(broken(format!("it holds {:#x} bytes instead of {len:#x}", inflater.total_out())));
    }
    if zlib && status != Status::StreamEnd {
        finish(&mut inflater, packed)?;
    }
    Ok(out)
}

/// Sees to it that a stream of which everything has been inflated ends, and that its checksum is right.
fn finish(inflater: &mut Decompress, packed: &[u8]) -> Result<()> {
    let rest = usize::try_from(inflater.total_in()).ok().and_then(|used| packed.get(used..));
    let before = inflater.total_out();
    let mut more = [0; 1];
    let status = inflater.decompress(rest.unwrap_or_default(), &mut more, FlushDecompress::Finish);
    match status.map_err(broken)? {
        Status::StreamEnd if inflater.total_out() == before => Ok(()),
        _ => Err(broken("it does not end where it should")),
    }
}

/// Unpacks exactly `len` bytes of bzip2.
///
/// # Errors
/// `Corrupt`: the stream is broken, too short or too long.
pub(crate) fn bunzip2(packed: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = vec![0; len];
    let mut done = 0;
    let mut rest = packed;
    // Apple's images hold one stream per chunk; bzip2 itself lets several follow each other.
    while done < len && !rest.is_empty() {
        let mut decoder = bzip2::Decompress::new(false);
        loop {
            let (read, written) = (decoder.total_in(), decoder.total_out());
            let status = decoder.decompress(rest, &mut out[done..]).map_err(broken)?;
            let read = usize::try_from(decoder.total_in() - read).unwrap_or(rest.len());
            let written = usize::try_from(decoder.total_out() - written).unwrap_or(len);
            rest = rest.get(read..).unwrap_or_default();
            done = done.saturating_add(written).min(len);
            if status == bzip2::Status::StreamEnd {
                break;
            }
            if read == 0 && written == 0 {
                return Err(broken(format!("it holds {done:#x} bytes of {len:#x}, or more")));
            }
        }
    }
    if done == len { Ok(out) } else { Err(broken(format!("it holds {done:#x} bytes instead of {len:#x}"))) }
}

/// Unpacks exactly `len` bytes of Apple Data Compression: runs of literal bytes, and copies of what came before in a
/// short form (two bytes) and a long one (three).
///
/// # Errors
/// `Corrupt`: a copy from before the beginning, or not that many bytes.
pub(crate) fn adc(packed: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out: Vec<u8> = Vec::with_capacity(len);
    let mut bytes = packed.iter().copied();
    let mut next = || bytes.next().ok_or_else(|| broken("it ends too early"));
    while out.len() < len {
        let first = next()?;
        if first & 0x80 != 0 {
            for _ in 0..=(first & 0x7f) {
                out.push(next()?);
            }
            continue;
        }
        let (count, back) = if first & 0x40 != 0 {
            (usize::from(first & 0x3f) + 4, usize::from(next()?) << 8 | usize::from(next()?))
        } else {
            (usize::from(first >> 2 & 0xf) + 3, usize::from(first & 3) << 8 | usize::from(next()?))
        };
        for _ in 0..count {
            let from = out.len().checked_sub(back + 1).ok_or_else(|| broken("it copies from nowhere"))?;
            out.push(out[from]);
        }
    }
    if out.len() == len { Ok(out) } else { Err(broken("it holds more than it should")) }
}

fn broken(why: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("compressed data is broken: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn zlib_streams_are_complete_and_checked() {
        let data: Vec<u8> = (0..100_000u32).map(|n| u8::try_from(n / 7 % 256).unwrap()).collect();
        let packed = deflated(&data);
        assert_eq!(inflate(&packed, data.len(), true).unwrap(), data);
        for (packed, len) in [
            (&packed[..], data.len() - 1),
            (&packed, data.len() + 1),
            (&packed[..packed.len() - 1], data.len()),
        ] {
            assert_eq!(inflate(packed, len, true).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        let mut wrong = packed.clone();
        *wrong.last_mut().unwrap() ^= 1;
        inflate(&wrong, data.len(), true).unwrap_err();
    }

    #[test]
    fn bzip2_streams_are_complete() {
        let data = vec![5; 50_000];
        let mut encoder = bzip2::write::BzEncoder::new(vec![], bzip2::Compression::fast());
        encoder.write_all(&data).unwrap();
        let packed = encoder.finish().unwrap();
        assert_eq!(bunzip2(&packed, data.len()).unwrap(), data);
        for (packed, len) in [(&packed[..], 49_999), (&packed, 50_001), (&packed[..20], 50_000), (&[], 1)] {
            bunzip2(packed, len).unwrap_err();
        }
    }

    #[test]
    fn adc_copies_what_came_before() {
        // Two literals, a short copy of 3 from 2 back, a long copy of 4 from 1 back.
        assert_eq!(adc(&[0x81, 1, 2, 0x00, 1, 0x40, 0, 0], 9).unwrap(), [1, 2, 1, 2, 1, 1, 1, 1, 1]);
        adc(&[0x00, 1], 3).unwrap_err();
        adc(&[0x81, 1], 2).unwrap_err();
        adc(&[0x81, 1, 2], 1).unwrap_err();
    }
}
