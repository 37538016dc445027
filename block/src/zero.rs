//! Finding zeros in buffers, at the speed of memory.
//!
//! Most buffers that are looked at are either all zero or differ from zero early, so a few bytes spread over
//! the buffer are probed first; then whole blocks are folded together with OR, a loop that LLVM turns into
//! vector instructions on every target without `unsafe`.

use std::ops::Range;

/// Bytes that are folded before the result is looked at. Large enough that the test costs nothing beside
/// the loads, small enough to stop soon.
const BLOCK: usize = 256;

/// Whether every byte of `buf` is zero (so is an empty buffer).
pub fn is_zero(buf: &[u8]) -> bool {
    let (Some(first), Some(last)) = (buf.first(), buf.last()) else {
        return true;
    };
    if first | last | buf[buf.len() / 2] != 0 {
        return false;
    }
    let (blocks, rest) = buf.as_chunks::<BLOCK>();
    blocks.iter().all(is_zero_block) && rest.iter().fold(0, |all, byte| all | byte) == 0
}

#[inline]
fn is_zero_block(block: &[u8; BLOCK]) -> bool {
    block.iter().fold(0, |all, byte| all | byte) == 0
}

/// Length in bytes of the zeros that `buf` begins with, in whole `unit`s (the rest of the buffer that is
/// shorter than a unit counts as one).
///
/// # Panics
/// If `unit` is 0.
pub fn zero_prefix(buf: &[u8], unit: usize) -> usize {
    buf.chunks(unit).take_while(|chunk| is_zero(chunk)).map(<[u8]>::len).sum()
}

/// Length in bytes of the units that `buf` begins with and that are not all zero, as [`zero_prefix`].
///
/// # Panics
/// If `unit` is 0.
pub fn data_prefix(buf: &[u8], unit: usize) -> usize {
    buf.chunks(unit).take_while(|chunk| !is_zero(chunk)).map(<[u8]>::len).sum()
}

/// The runs of a buffer that are zero or not; see [`runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    buf: &'a [u8],
    unit: usize,
    position: usize,
}

/// Divides `buf` into runs of zero units and runs of other units, alternating, as `(range, is_zero)`. Every
/// border but the last lies at a multiple of `unit` bytes from the start of the buffer.
///
/// # Panics
/// The iterator panics if `unit` is 0.
pub fn runs(buf: &[u8], unit: usize) -> Runs<'_> {
    Runs { buf, unit, position: 0 }
}

impl Iterator for Runs<'_> {
    type Item = (Range<usize>, bool);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = &self.buf[self.position..];
        if rest.is_empty() {
            return None;
        }
        let zeros = zero_prefix(rest, self.unit);
        let len = if zeros > 0 { zeros } else { data_prefix(rest, self.unit) };
        let start = self.position;
        self.position += len;
        Some((start..self.position, zeros > 0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_byte_anywhere_is_found() {
        for len in [1, 2, 3, 255, 256, 257, 511, 512, 4096, 5000] {
            let mut buf = vec![0; len];
            assert!(is_zero(&buf));
            for at in 0..len {
                buf[at] = 0x80;
                assert!(!is_zero(&buf), "byte {at} of {len}");
                buf[at] = 0;
            }
        }
        assert!(is_zero(&[]));
    }

    #[test]
    fn a_short_rest_is_a_unit_of_its_own() {
        let mut buf = vec![0; 1300];
        buf[600] = 1;
        let found: Vec<_> = runs(&buf, 512).collect();
        assert_eq!(found, [(0..512, true), (512..1024, false), (1024..1300, true)]);
        assert_eq!(zero_prefix(&buf, 512), 512);
        assert_eq!(zero_prefix(&buf[..100], 512), 100);
        assert_eq!(data_prefix(&buf[512..], 512), 512);
    }

    proptest! {
        #[test]
        fn runs_agree_with_a_slow_look(
            units in proptest::collection::vec(any::<bool>(), 0..40),
            cut in 0usize..16,
            at in 0usize..16,
        ) {
            let mut buf: Vec<u8> = units.iter().flat_map(|&data| {
                let mut unit = [0u8; 16];
                unit[at] = u8::from(data);
                unit
            }).collect();
            buf.truncate(buf.len().saturating_sub(cut));
            let mut expected: Vec<(Range<usize>, bool)> = vec![];
            for (index, chunk) in buf.chunks(16).enumerate() {
                let zero = chunk.iter().all(|&byte| byte == 0);
                let range = index * 16..index * 16 + chunk.len();
                match expected.last_mut() {
                    Some((last, same)) if *same == zero => last.end = range.end,
                    _ => expected.push((range, zero)),
                }
            }
            prop_assert_eq!(runs(&buf, 16).collect::<Vec<_>>(), expected);
        }
    }
}
