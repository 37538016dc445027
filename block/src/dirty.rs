//! Which parts of a disk have been written: dirty bitmaps.
//!
//! A bit stands for a granule of the disk. Writers on any number of threads set bits without a lock and, where they
//! are set already, without writing to memory that others read. Bits are kept in pages that are made when the first
//! bit in them is set; a page that is set as a whole takes no memory, nor does one that never was. So a bitmap takes
//! at most an eighth of a byte per granule and a few bytes per page whatever happens to it, and next to nothing for a
//! disk that is hardly written.
//!
//! Bits only ever become set while a bitmap is shared; clearing and resizing need it alone.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::num::to_usize;

/// log2 of the smallest granularity in bytes.
pub const MIN_GRANULARITY_BITS: u8 = 9;
/// log2 of the largest granularity in bytes.
pub const MAX_GRANULARITY_BITS: u8 = 31;

/// 64-bit words in a page.
const PAGE_WORDS: u64 = 256;
/// Bits in a page.
const PAGE_BITS: u64 = PAGE_WORDS * 64;

/// A part of the bitmap.
#[derive(Debug, Default)]
struct Page {
    /// Every bit of the page that stands for a part of the disk is set, whatever the words say.
    full: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Page {
    fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    fn is_empty(&self) -> bool {
        !self.is_full() && self.words.get().is_none()
    }

    fn word(&self, index: u64) -> u64 {
        if self.is_full() {
            return u64::MAX;
        }
        self.words.get().map_or(0, |words| words[to_usize(index)].load(Ordering::Relaxed))
    }

    fn words(&self) -> &[AtomicU64] {
        self.words.get_or_init(|| (0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets the bits of `mask` in a word; whether one of them was not set before.
    fn set(&self, index: u64, mask: u64) -> bool {
        let word = &self.words()[to_usize(index)];
        // Looking first keeps the cache line shared among threads that write to the same places again and again.
        word.load(Ordering::Relaxed) & mask != mask && word.fetch_or(mask, Ordering::Relaxed) & mask != mask
    }
}

impl Clone for Page {
    fn clone(&self) -> Self {
        let copy = |words: &[AtomicU64]| -> Box<[AtomicU64]> {
            words.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed))).collect()
        };
        let words = self.words.get().map(|words| OnceLock::from(copy(words)));
        Self { full: AtomicBool::new(self.is_full()), words: words.unwrap_or_default() }
    }
}

/// The bits of a word from `from` on and before `to` (both in 0..=64).
fn mask(from: u64, to: u64) -> u64 {
    match to - from {
        64 => u64::MAX,
        len => ((1 << len) - 1) << from,
    }
}

/// A run of granules that are all dirty or all clean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyExtent {
    /// First byte.
    pub offset: u64,
    /// Bytes, ending at a granule or with the disk.
    pub len: u64,
    /// Whether it has been written.
    pub dirty: bool,
}

/// Whether a range of bits is all set, all clear or neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uniform {
    /// No bit is set.
    Clear,
    /// Every bit is set.
    Set,
    /// Some are.
    Mixed,
}

/// A dirty bitmap of a disk.
#[derive(Debug)]
pub struct DirtyBitmap {
    len: u64,
    granularity_bits: u8,
    pages: Vec<Page>,
    changed: AtomicBool,
}

impl Clone for DirtyBitmap {
    /// A copy of its own. Bits that other threads set meanwhile may be in it or not.
    fn clone(&self) -> Self {
        let (len, granularity_bits) = (self.len, self.granularity_bits);
        Self { len, granularity_bits, pages: self.pages.clone(), changed: AtomicBool::new(self.changed()) }
    }
}

impl DirtyBitmap {
    /// A bitmap without a set bit, for a disk of `len` bytes. `granularity_bits` is the log2 of the bytes of disk that
    /// a bit stands for; what lies outside [`MIN_GRANULARITY_BITS`]`..=`[`MAX_GRANULARITY_BITS`] becomes the nearest
    /// that does not.
    pub fn new(len: u64, granularity_bits: u8) -> Self {
        let granularity_bits = granularity_bits.clamp(MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS);
        let mut bitmap = Self { len, granularity_bits, pages: vec![], changed: AtomicBool::new(false) };
        bitmap.pages.resize_with(bitmap.pages_needed(), Page::default);
        bitmap
    }

    fn pages_needed(&self) -> usize {
        to_usize(self.bits().div_ceil(PAGE_BITS))
    }

    /// The size of the disk in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the disk has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of disk that a bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// log2 of [`granularity`](Self::granularity).
    pub fn granularity_bits(&self) -> u8 {
        self.granularity_bits
    }

    /// How many bits there are.
    pub fn bits(&self) -> u64 {
        self.len.div_ceil(self.granularity())
    }

    /// Whether a bit has changed since the bitmap was made or [`settle`](Self::settle) was called.
    pub fn changed(&self) -> bool {
        self.changed.load(Ordering::Relaxed)
    }

    /// From here on [`changed`](Self::changed) speaks of what comes.
    pub fn settle(&self) {
        self.changed.store(false, Ordering::Relaxed);
    }

    /// Marks every granule that a range of bytes touches. What lies past the end of the disk is left out.
    pub fn set(&self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if offset < end {
            self.set_bits(offset >> self.granularity_bits, end.div_ceil(self.granularity()));
        }
    }

    /// Marks everything.
    pub fn set_all(&self) {
        self.set(0, self.len);
    }

    /// Sets bits `from..to`.
    fn set_bits(&self, from: u64, to: u64) {
        let mut changed = false;
        let mut bit = from;
        while bit < to {
            let index = bit / PAGE_BITS;
            let end = ((index + 1) * PAGE_BITS).min(to);
            let whole =
                bit.is_multiple_of(PAGE_BITS) && (end == self.bits() || end.is_multiple_of(PAGE_BITS));
            changed |= set_in_page(&self.pages[to_usize(index)], bit % PAGE_BITS, end - bit, whole);
            bit = end;
        }
        if changed && !self.changed() {
            self.changed.store(true, Ordering::Relaxed);
        }
    }

    /// Clears every granule that a range of bytes touches.
    pub fn clear(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if offset < end {
            self.clear_bits(offset >> self.granularity_bits, end.div_ceil(self.granularity()));
        }
    }

    /// Clears everything, and gives the memory back.
    pub fn clear_all(&mut self) {
        let dirty = self.pages.iter().any(|page| !page.is_empty());
        *self.changed.get_mut() |= dirty;
        self.pages.iter_mut().for_each(|page| *page = Page::default());
    }

    fn clear_bits(&mut self, from: u64, to: u64) {
        let bits = self.bits();
        let mut bit = from;
        while bit < to {
            let index = bit / PAGE_BITS;
            let end = ((index + 1) * PAGE_BITS).min(to);
            let page = &mut self.pages[to_usize(index)];
            if !page.is_empty() {
                *self.changed.get_mut() = true;
                if bit.is_multiple_of(PAGE_BITS) && (end == bits || end.is_multiple_of(PAGE_BITS)) {
                    *page = Page::default();
                } else {
                    spell_out(page, (bits - index * PAGE_BITS).min(PAGE_BITS));
                    clear_in_page(page, bit % PAGE_BITS, end - bit);
                }
            }
            bit = end;
        }
    }

    /// Changes the size of the disk. What is added is clean; what is cut off is forgotten.
    pub fn resize(&mut self, len: u64) {
        let old_bits = self.bits();
        let past = len.div_ceil(self.granularity());
        if past < old_bits {
            self.clear_bits(past, old_bits);
        } else if let Some(last) = self.pages.last_mut() {
            // "Full" is about to mean more bits.
            let valid = old_bits - (old_bits - 1) / PAGE_BITS * PAGE_BITS;
            spell_out(last, valid);
        }
        *self.changed.get_mut() |= past != old_bits;
        self.len = len;
        self.pages.resize_with(self.pages_needed(), Page::default);
    }

    /// Marks what `other` has marked, whatever its granularity. What lies past the end of this disk is left out.
    pub fn merge(&self, other: &Self) {
        other.extents(0, other.len).filter(|extent| extent.dirty).for_each(|extent| {
            self.set(extent.offset, extent.len);
        });
    }

    /// The word of bits `64 * index ..`.
    fn word(&self, index: u64) -> u64 {
        self.pages.get(to_usize(index / PAGE_WORDS)).map_or(0, |page| page.word(index % PAGE_WORDS))
    }

    /// The first bit in `from..to` that is set (or, with `set` false, clear); `to` if there is none.
    fn find(&self, from: u64, to: u64, set: bool) -> u64 {
        let mut bit = from;
        while bit < to {
            let page = &self.pages[to_usize(bit / PAGE_BITS)];
            if (page.is_empty() && set) || (page.is_full() && !set) {
                bit = (bit / PAGE_BITS + 1) * PAGE_BITS;
                continue;
            }
            let word = if set { page.word(bit % PAGE_BITS / 64) } else { !page.word(bit % PAGE_BITS / 64) };
            let rest = word & (u64::MAX << (bit % 64));
            if rest != 0 {
                return (bit / 64 * 64 + u64::from(rest.trailing_zeros())).min(to);
            }
            bit = (bit / 64 + 1) * 64;
        }
        to
    }

    /// Whether the byte at `offset` is dirty, and for how far it is the same, at most up to `end`. `None` at the end
    /// of the disk.
    pub fn extent(&self, offset: u64, end: u64) -> Option<DirtyExtent> {
        let end = end.min(self.len);
        if offset >= end {
            return None;
        }
        let (first, past) = (offset >> self.granularity_bits, end.div_ceil(self.granularity()));
        let dirty = self.find(first, first + 1, true) == first;
        let next = self.find(first, past, !dirty);
        let stop = (next << self.granularity_bits).min(end);
        Some(DirtyExtent { offset, len: stop - offset, dirty })
    }

    /// The dirty and clean runs of `offset..end`, in order.
    pub fn extents(&self, offset: u64, end: u64) -> impl Iterator<Item = DirtyExtent> + '_ {
        std::iter::successors(self.extent(offset, end), move |extent| {
            self.extent(extent.offset + extent.len, end)
        })
    }

    /// How many bits are set.
    pub fn count(&self) -> u64 {
        let valid = |index: u64| (self.bits() - index * PAGE_BITS).min(PAGE_BITS);
        (0..)
            .zip(&self.pages)
            .filter(|(_, page)| !page.is_empty())
            .map(|(index, page)| match page.is_full() {
                true => valid(index),
                false => (0..PAGE_WORDS).map(|word| u64::from(page.word(word).count_ones())).sum(),
            })
            .sum()
    }

    /// Whether bits `from..from + count`, as far as there are such bits, are all alike. Of no bits at all: clear.
    pub fn uniform(&self, from: u64, count: u64) -> Uniform {
        let to = from.saturating_add(count).min(self.bits());
        if from >= to || self.find(from, to, true) == to {
            Uniform::Clear
        } else if self.find(from, to, false) == to {
            Uniform::Set
        } else {
            Uniform::Mixed
        }
    }

    /// Writes the bits from `first` (a multiple of 64) on into `out`, bit 0 of each byte first; zeros past the last.
    pub fn export(&self, first: u64, out: &mut [u8]) {
        let bits = self.bits();
        for (index, chunk) in (first / 64..).zip(out.chunks_mut(8)) {
            let valid = bits.saturating_sub(index * 64).min(64);
            let word = if valid == 0 { 0 } else { self.word(index) & mask(0, valid) };
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }

    /// Sets the bits that are set in `bytes`, whose first bit (bit 0 of byte 0) is bit `first` (a multiple of 64). Bits
    /// past the last are left out.
    pub fn import(&self, first: u64, bytes: &[u8]) {
        let bits = self.bits();
        for (index, chunk) in (first / 64..).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let valid = bits.saturating_sub(index * 64).min(64);
            let word = u64::from_le_bytes(word) & if valid == 0 { 0 } else { mask(0, valid) };
            if word == 0 {
                continue;
            }
            let page = &self.pages[to_usize(index / PAGE_WORDS)];
            if !page.is_full() && page.set(index % PAGE_WORDS, word) {
                self.changed.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Sets `count` bits of a page; whether one of them was not set before (or could be).
fn set_in_page(page: &Page, from: u64, count: u64, whole: bool) -> bool {
    if page.is_full() {
        return false;
    }
    if whole {
        page.full.store(true, Ordering::Relaxed);
        return true;
    }
    let (mut bit, end) = (from, from + count);
    let mut changed = false;
    while bit < end {
        let stop = (bit / 64 * 64 + 64).min(end);
        changed |= page.set(bit / 64, mask(bit % 64, bit % 64 + (stop - bit)));
        bit = stop;
    }
    changed
}

/// Writes down the bits of a full page one by one, `valid` of them.
fn spell_out(page: &mut Page, valid: u64) {
    if !*page.full.get_mut() {
        return;
    }
    let words = (0..PAGE_WORDS).map(|word| {
        let valid = valid.saturating_sub(word * 64).min(64);
        AtomicU64::new(if valid == 0 { 0 } else { mask(0, valid) })
    });
    *page = Page { full: AtomicBool::new(false), words: OnceLock::from(words.collect::<Box<[_]>>()) };
}

/// Clears `count` bits of a page that is not full.
fn clear_in_page(page: &mut Page, from: u64, count: u64) {
    let Some(words) = page.words.get_mut() else { return };
    let (mut bit, end) = (from, from + count);
    while bit < end {
        let stop = (bit / 64 * 64 + 64).min(end);
        *words[to_usize(bit / 64)].get_mut() &= !mask(bit % 64, bit % 64 + (stop - bit));
        bit = stop;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges(bitmap: &DirtyBitmap) -> Vec<(u64, u64)> {
        bitmap.extents(0, u64::MAX).filter(|e| e.dirty).map(|e| (e.offset, e.len)).collect()
    }

    #[test]
    fn bytes_mark_the_granules_that_they_touch() {
        let bitmap = DirtyBitmap::new(1 << 20, 16);
        bitmap.set(0x1_ffff, 2);
        bitmap.set(0xf_ffff, 100);
        bitmap.set(5 << 20, 100);
        assert_eq!(ranges(&bitmap), [(0x1_0000, 0x2_0000), (0xf_0000, 0x1_0000)]);
        assert_eq!(bitmap.count(), 3);
        assert_eq!(
            bitmap.extent(0x1_8000, u64::MAX),
            Some(DirtyExtent { offset: 0x1_8000, len: 0x1_8000, dirty: true })
        );
        assert_eq!(bitmap.extent(1 << 20, u64::MAX), None);
    }

    #[test]
    fn a_huge_disk_costs_little_until_it_is_written_and_nothing_when_it_is_written_throughout() {
        let bitmap = DirtyBitmap::new(60 << 40, 16);
        let pages = |b: &DirtyBitmap| b.pages.iter().filter(|page| page.words.get().is_some()).count();
        bitmap.set(59 << 40, 1);
        assert_eq!((pages(&bitmap), bitmap.count()), (1, 1));
        bitmap.set_all();
        assert_eq!((pages(&bitmap), bitmap.count()), (1, bitmap.bits()));
        assert!(bitmap.pages.len() * size_of::<Page>() < 4 << 20);
        assert_eq!(ranges(&bitmap), [(0, 60 << 40)]);
    }

    #[test]
    fn threads_set_bits_beside_each_other() {
        let bitmap = DirtyBitmap::new(1 << 26, 9);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let bitmap = &bitmap;
                scope.spawn(move || (0..1 << 15).for_each(|i| bitmap.set((i * 4 + thread) * 512, 512)));
            }
        });
        assert_eq!(bitmap.count(), bitmap.bits());
        assert_eq!(bitmap.uniform(0, u64::MAX), Uniform::Set);
    }

    /// What can be done to a bitmap.
    #[derive(Debug, Clone)]
    enum Op {
        Set(u64, u64),
        Clear(u64, u64),
        Resize(u64),
        All,
        None,
        Copy,
        Merge(u8, u64, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let range = (0..40u64 << 20, prop_oneof![1..5000u64, 1..40u64 << 20]);
        prop_oneof![
            4 => range.clone().prop_map(|(at, len)| Op::Set(at, len)),
            2 => range.clone().prop_map(|(at, len)| Op::Clear(at, len)),
            1 => (0..40u64 << 20).prop_map(Op::Resize),
            1 => Just(Op::All),
            1 => Just(Op::None),
            1 => Just(Op::Copy),
            1 => (9..20u8, range).prop_map(|(bits, (at, len))| Op::Merge(bits, at, len)),
        ]
    }

    proptest! {
        #[test]
        fn it_does_what_an_array_of_flags_does(
            len in 0..40u64 << 20,
            granularity_bits in 9..13u8,
            ops in proptest::collection::vec(op(), 1..20),
        ) {
            let mut bitmap = DirtyBitmap::new(len, granularity_bits);
            let granule = bitmap.granularity();
            let mut model = vec![false; to_usize(bitmap.bits())];
            let fill = |model: &mut Vec<bool>, len: u64, at: u64, count: u64, value: bool| {
                let end = (at + count).min(len);
                if at < end {
                    model[to_usize(at / granule)..to_usize(end.div_ceil(granule))].fill(value);
                }
            };
            for op in ops {
                match op {
                    Op::Set(at, count) => {
                        bitmap.set(at, count);
                        fill(&mut model, bitmap.len(), at, count, true);
                    }
                    Op::Clear(at, count) => {
                        bitmap.clear(at, count);
                        fill(&mut model, bitmap.len(), at, count, false);
                    }
                    Op::Resize(len) => {
                        bitmap.resize(len);
                        model.resize(to_usize(bitmap.bits()), false);
                    }
                    Op::All => {
                        bitmap.set_all();
                        model.fill(true);
                    }
                    Op::None => {
                        bitmap.clear_all();
                        model.fill(false);
                    }
                    Op::Copy => {
                        let mut bytes = vec![0; to_usize(bitmap.bits().div_ceil(8))];
                        bitmap.export(0, &mut bytes);
                        bitmap = DirtyBitmap::new(bitmap.len(), granularity_bits);
                        bitmap.import(0, &bytes);
                    }
                    Op::Merge(bits, at, count) => {
                        let other = DirtyBitmap::new(bitmap.len(), bits);
                        other.set(at, count);
                        bitmap.merge(&other);
                        for extent in other.extents(0, u64::MAX).filter(|e| e.dirty) {
                            fill(&mut model, bitmap.len(), extent.offset, extent.len, true);
                        }
                    }
                }
                let mut seen = vec![];
                for extent in bitmap.extents(0, u64::MAX) {
                    let end = (extent.offset + extent.len).div_ceil(granule);
                    seen.resize(to_usize(end), extent.dirty);
                }
                prop_assert!(seen == model);
                prop_assert_eq!(bitmap.count(), model.iter().filter(|set| **set).count() as u64);
            }
        }
    }
}
