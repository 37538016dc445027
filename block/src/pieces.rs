//! A request cut at the borders of clusters, grains or blocks.

use std::ops::Range;

use crate::num::to_usize;

/// The part of a request that lies in one unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Number of the unit, counted from the start of the disk.
    pub index: u64,
    /// Offset of the part within the unit in bytes.
    pub within: u64,
    /// Bytes of the request's buffer that belong to it.
    pub range: Range<usize>,
}

impl Piece {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.range.len() as u64
    }

    /// Whether there is nothing in it, which [`pieces`] never hands out.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Whether it is all of a unit of `unit` bytes.
    pub fn is_whole(&self, unit: u64) -> bool {
        self.within == 0 && self.len() == unit
    }
}

/// Cuts the request for `len` bytes at `offset` at the multiples of `unit` (not 0). `offset + len` must not overflow:
/// requests have been checked against the size of the disk before.
pub fn pieces(offset: u64, len: u64, unit: u64) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = len - done;
        if left == 0 {
            return None;
        }
        let at = offset + done;
        let within = at % unit;
        let piece = (unit - within).min(left);
        let range = to_usize(done)..to_usize(done + piece);
        done += piece;
        Some(Piece { index: at / unit, within, range })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_cut_at_the_borders() {
        let cut: Vec<_> = pieces(1000, 2100, 1024).collect();
        let piece = |index, within, range| Piece { index, within, range };
        assert_eq!(
            cut,
            [piece(0, 1000, 0..24), piece(1, 0, 24..1048), piece(2, 0, 1048..2072), piece(3, 0, 2072..2100)]
        );
        assert!(cut[1].is_whole(1024) && !cut[3].is_whole(1024));
        assert_eq!(pieces(5, 0, 512).count(), 0);
    }

    #[test]
    fn the_end_of_the_address_space_is_reached() {
        let cut: Vec<_> = pieces(u64::MAX - 10, 10, 4096).collect();
        assert_eq!((cut.len(), cut[0].len()), (1, 10));
    }
}
