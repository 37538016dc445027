//! Ranges in ascending order, neighbours merged.

use std::ops::Range;

/// Ranges that do not overlap, sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// Adds a range that begins at or after the end of the last one; any other is put in its place later, by
    /// [`sorted`](Self::sorted).
    pub(crate) fn push(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.0.push(range),
        }
    }

    /// The same bytes in order.
    pub(crate) fn sorted(mut self) -> Self {
        self.0.sort_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = vec![];
        for range in self.0 {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// What of `whole` is in none of the ranges, which are sorted.
    pub(crate) fn gaps(&self, whole: Range<u64>) -> Self {
        let mut gaps = Self::default();
        let mut at = whole.start;
        for range in &self.0 {
            if range.start > at {
                gaps.push(at..range.start.min(whole.end));
            }
            at = at.max(range.end);
        }
        gaps.push(at.min(whole.end)..whole.end);
        gaps
    }
}

impl IntoIterator for Ranges {
    type Item = Range<u64>;
    type IntoIter = std::vec::IntoIter<Range<u64>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_merge_and_gaps_are_what_is_left() {
        let mut ranges = Ranges::default();
        for range in [10..20, 20..30, 5..6, 7..7, 25..40] {
            ranges.push(range);
        }
        let ranges = ranges.sorted();
        assert_eq!(ranges, Ranges(vec![5..6, 10..40]));
        assert_eq!(ranges.gaps(0..50), Ranges(vec![0..5, 6..10, 40..50]));
        assert_eq!(ranges.gaps(0..30), Ranges(vec![0..5, 6..10]));
        assert!(Ranges::default().gaps(3..4).into_iter().eq(std::iter::once(3..4)));
    }
}
