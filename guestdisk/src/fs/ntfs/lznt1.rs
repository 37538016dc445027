//! LZNT1, by which NTFS compresses files (\[MS-XCA\] 2.5).

use block::Result;

use crate::bytes::{corrupt, le16};

/// Bytes of a chunk when it is expanded.
const CHUNK: usize = 4096;

/// Expands chunks until there are `len` bytes; what is missing is zeros.
pub(super) fn expand(mut packed: &[u8], len: usize) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len && packed.len() >= 2 {
        let head = le16(packed, 0);
        if head == 0 {
            break;
        }
        let size = usize::from(head & 0xfff) + 1;
        let data = packed.get(2..2 + size).ok_or_else(|| corrupt("a compressed chunk that is cut off"))?;
        let start = out.len();
        if head & 0x8000 == 0 {
            out.extend_from_slice(data);
        } else {
            chunk(data, &mut out, start)?;
        }
        out.resize(start + CHUNK, 0);
        packed = &packed[2 + size..];
    }
    out.resize(len, 0);
    Ok(out)
}

fn chunk(mut data: &[u8], out: &mut Vec<u8>, start: usize) -> Result<()> {
    let wrong = || corrupt("a compressed chunk that makes no sense");
    while let [flags, rest @ ..] = data {
        data = rest;
        for bit in 0..8 {
            let [first, rest @ ..] = data else { return Ok(()) };
            let made = out.len() - start;
            if flags >> bit & 1 == 0 {
                if made >= CHUNK {
                    return Err(wrong());
                }
                out.push(*first);
                data = rest;
                continue;
            }
            if data.len() < 2 || made == 0 {
                return Err(wrong());
            }
            let token = usize::from(le16(data, 0));
            data = &data[2..];
            // The further into the chunk, the more bits tell how far back, and the fewer how long.
            let mut len_bits = 12;
            let mut position = made - 1;
            while position >= 16 {
                position >>= 1;
                len_bits -= 1;
            }
            let len = (token & ((1 << len_bits) - 1)) + 3;
            let back = (token >> len_bits) + 1;
            if back > made || made + len > CHUNK {
                return Err(wrong());
            }
            for _ in 0..len {
                out.push(out[out.len() - back]);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_specification() {
        // [MS-XCA] 3.3.
        let packed = [
            0x38, 0xb0, 0x88, 0x46, 0x23, 0x20, 0x00, 0x20, 0x47, 0x20, 0x41, 0x00, 0x10, 0xa2, 0x47, 0x01,
            0xa0, 0x45, 0x20, 0x44, 0x00, 0x08, 0x45, 0x01, 0x50, 0x79, 0x00, 0xc0, 0x45, 0x20, 0x05, 0x24,
            0x13, 0x88, 0x05, 0xb4, 0x02, 0x4a, 0x44, 0xef, 0x03, 0x58, 0x02, 0x8c, 0x09, 0x16, 0x01, 0x48,
            0x45, 0x00, 0xbe, 0x00, 0x9e, 0x00, 0x04, 0x01, 0x18, 0x90, 0x00,
        ];
        let text = "F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E F# G F# D E F# G F# \
                    E D E A F# F# G A A G F# E D D E F# E D D\0";
        let out = expand(&packed, CHUNK).unwrap();
        assert_eq!(&out[..text.len()], text.as_bytes());
        assert!(out[text.len()..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn nonsense_is_told() {
        expand(&[0x05, 0xb0, 1, 0, 0], 4096).unwrap_err();
        expand(&[0x02, 0xb0, 1, 0, 0], 4096).unwrap_err();
        assert_eq!(expand(&[0x00, 0x30, 7], 4).unwrap(), [7, 0, 0, 0]);
    }
}
