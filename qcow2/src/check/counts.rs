//! How often every host cluster is referred to, as computed from the image's tables.
//!
//! Two bytes for a cluster: a small counter and what the cluster is used for. Larger counts live in a map.
//! The memory is bounded by the file: pages of the array that nothing refers to are never touched, and a
//! file that claims to be enormous (which costs nothing, with holes) gets a sparse array.

use std::collections::HashMap;

use block::num::to_usize;

/// The counter; all ones: see the overflow map.
const COUNT: u16 = 0x07ff;
/// Part of a structure that nothing else may share.
pub(super) const EXCLUSIVE: u16 = 1 << 11;
/// An L2 table, which only L1 tables may share.
pub(super) const L2_TABLE: u16 = 1 << 12;
/// Holds guest data.
pub(super) const DATA: u16 = 1 << 13;
/// The active tables refer to it with the COPIED flag,
pub(super) const COPIED: u16 = 1 << 14;
/// or without.
pub(super) const NOT_COPIED: u16 = 1 << 15;

/// Up to this many clusters are an array.
const DENSE_CLUSTERS: u64 = 1 << 27;
const PAGE: u64 = 32;

#[derive(Debug)]
enum Store {
    Dense(Vec<u16>),
    Sparse(HashMap<u64, [u16; to_usize(PAGE)]>),
}

/// The computed refcounts.
#[derive(Debug)]
pub(super) struct Counts {
    len: u64,
    end: u64,
    store: Store,
    overflow: HashMap<u64, u64>,
}

impl Counts {
    /// Nothing is referred to; clusters below `len` can be.
    pub(super) fn new(len: u64) -> Self {
        let store = match len <= DENSE_CLUSTERS {
            true => Store::Dense(vec![0; to_usize(len)]),
            false => Store::Sparse(HashMap::new()),
        };
        Self { len, end: 0, store, overflow: HashMap::new() }
    }

    /// Lets clusters below `len` be counted.
    pub(super) fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
        if let Store::Dense(slots) = &mut self.store {
            slots.resize(to_usize(self.len), 0);
        }
    }

    /// One past the last cluster that something refers to.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    fn slot(&mut self, cluster: u64) -> &mut u16 {
        match &mut self.store {
            Store::Dense(slots) => &mut slots[to_usize(cluster)],
            Store::Sparse(pages) => &mut pages.entry(cluster / PAGE).or_default()[to_usize(cluster % PAGE)],
        }
    }

    /// `count` more references to a cluster below the length, of kind `flags`.
    pub(super) fn add(&mut self, cluster: u64, count: u64, flags: u16) {
        self.end = self.end.max(cluster + 1);
        let slot = self.slot(cluster);
        let old = *slot & COUNT;
        let sum = u64::from(old).saturating_add(count);
        match u16::try_from(sum) {
            Ok(sum) if sum < COUNT => *slot = (*slot & !COUNT) | sum | flags,
            _ => {
                *slot |= COUNT | flags;
                let first = if old == COUNT { 0 } else { old.into() };
                let total = self.overflow.entry(cluster).or_insert(first);
                *total = total.saturating_add(count);
            }
        }
    }

    /// `count` references to a cluster less.
    pub(super) fn sub(&mut self, cluster: u64, count: u64) {
        if let Some(total) = self.overflow.get_mut(&cluster) {
            *total = total.saturating_sub(count);
            return;
        }
        let slot = self.slot(cluster);
        let left = u64::from(*slot & COUNT).saturating_sub(count);
        *slot = (*slot & !COUNT) | u16::try_from(left).unwrap_or(0);
    }

    /// A cluster with more than `max` references, if there is one.
    pub(super) fn exceed(&self, max: u64) -> Option<u64> {
        let small = |slot: u16| slot & COUNT != COUNT && u64::from(slot & COUNT) > max;
        let large = self.overflow.iter().find(|(_, count)| **count > max).map(|(cluster, _)| *cluster);
        if max >= u64::from(COUNT) || large.is_some() {
            return large;
        }
        match &self.store {
            Store::Dense(slots) => {
                (0..).zip(slots).find(|(_, slot)| small(**slot)).map(|(cluster, _)| cluster)
            }
            Store::Sparse(pages) => pages.iter().find_map(|(page, slots)| {
                let within = (0..).zip(slots).find(|(_, slot)| small(**slot));
                within.map(|(index, _)| page * PAGE + index)
            }),
        }
    }

    /// Notes something about a cluster below the length without counting a reference.
    pub(super) fn mark(&mut self, cluster: u64, flags: u16) {
        *self.slot(cluster) |= flags;
    }

    /// Takes a note back.
    pub(super) fn unmark(&mut self, cluster: u64, flags: u16) {
        *self.slot(cluster) &= !flags;
    }

    /// References to a cluster, and of which kinds; nothing for clusters that cannot be counted.
    pub(super) fn get(&self, cluster: u64) -> Count {
        let slot = match &self.store {
            Store::Dense(slots) => slots.get(to_usize(cluster)).copied(),
            Store::Sparse(pages) => pages.get(&(cluster / PAGE)).map(|page| page[to_usize(cluster % PAGE)]),
        };
        self.decode(cluster, slot.unwrap_or(0))
    }

    /// What a slot from [`slots`](Self::slots) means.
    pub(super) fn decode(&self, cluster: u64, slot: u16) -> Count {
        let references = match slot & COUNT {
            COUNT => self.overflow.get(&cluster).copied().unwrap_or(u64::from(COUNT)),
            count => count.into(),
        };
        Count { references, flags: slot & !COUNT }
    }

    /// The raw slots of `first..first + out.len()`, `first` a multiple of [`PAGE`]; 0 means that nothing refers
    /// to the cluster.
    pub(super) fn slots(&self, first: u64, out: &mut [u16]) {
        out.fill(0);
        match &self.store {
            Store::Dense(slots) => {
                let slots = slots.get(to_usize(first)..).unwrap_or_default();
                let len = slots.len().min(out.len());
                out[..len].copy_from_slice(&slots[..len]);
            }
            Store::Sparse(pages) => {
                for (page, out) in (first / PAGE..).zip(out.chunks_mut(to_usize(PAGE))) {
                    if let Some(slots) = pages.get(&page) {
                        out.copy_from_slice(&slots[..out.len()]);
                    }
                }
            }
        }
    }

    /// The groups of `1 << bits` clusters (at least [`PAGE`] of them) that something may refer to, besides
    /// those in `others`, ascending.
    pub(super) fn groups(&self, bits: u32, others: impl Iterator<Item = u64>) -> Vec<u64> {
        let mut groups: Vec<u64> = match &self.store {
            Store::Dense(_) => (0..self.end.div_ceil(1 << bits)).collect(),
            Store::Sparse(pages) => pages.keys().map(|page| (page * PAGE) >> bits).collect(),
        };
        groups.extend(others);
        groups.sort_unstable();
        groups.dedup();
        groups
    }
}

/// References to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) references: u64,
    pub(super) flags: u16,
}

impl Count {
    /// Whether a structure shares the cluster with something that it must not share it with.
    pub(super) fn overlap(&self) -> bool {
        let data_on_table = L2_TABLE | DATA;
        self.references > 1 && (self.flags & EXCLUSIVE != 0 || self.flags & data_on_table == data_on_table)
    }

    /// Whether the active tables' COPIED flags contradict the refcount.
    pub(super) fn wrong_copied(&self, refcount: u64) -> bool {
        let wrong = if refcount == 1 { NOT_COPIED } else { COPIED };
        self.flags & wrong != 0
    }
}

/// Where which number of intervals `(start, length)` lies on top of each other: `(start, end, how many)`,
/// ascending. However many intervals there are, every byte is in one result at most.
pub(super) fn overlaps(intervals: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64, u64)> {
    let mut edges: Vec<(u64, i64)> = intervals
        .filter(|(_, len)| *len > 0)
        .flat_map(|(start, len)| [(start, 1), (start.saturating_add(len), -1)])
        .collect();
    edges.sort_unstable();
    let mut depth = 0i64;
    let mut pieces = vec![];
    for pair in edges.windows(2) {
        let [(start, change), (end, _)] = pair else { continue };
        depth += change;
        if depth > 0 && start < end {
            pieces.push((*start, *end, depth.unsigned_abs()));
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> [Counts; 2] {
        let sparse =
            Counts { len: 1 << 40, end: 0, store: Store::Sparse(HashMap::new()), overflow: HashMap::new() };
        [Counts::new(1000), sparse]
    }

    #[test]
    fn counts_go_beyond_the_small_counter() {
        for mut counts in both() {
            counts.add(7, 1, DATA);
            counts.add(7, 2045, COPIED);
            assert_eq!(counts.get(7), Count { references: 2046, flags: DATA | COPIED });
            counts.add(7, 1, 0);
            counts.add(7, u64::from(u32::MAX), 0);
            assert_eq!(counts.get(7).references, 2047 + u64::from(u32::MAX));
            assert_eq!((counts.get(8).references, counts.end()), (0, 8));
            let mut slots = [0; 40];
            counts.slots(0, &mut slots);
            assert_eq!(counts.decode(7, slots[7]), counts.get(7));
            assert_eq!((slots[6], slots[8]), (0, 0));
        }
    }

    #[test]
    fn groups_hold_everything_that_is_counted() {
        for mut counts in both() {
            counts.add(700, 1, 0);
            let groups = counts.groups(6, [3, 20].into_iter());
            assert!(groups.contains(&10) && groups.contains(&3) && groups.contains(&20));
            assert!(groups.is_sorted());
        }
    }

    #[test]
    fn intervals_on_top_of_each_other_are_counted_once_a_byte() {
        let pieces = overlaps([(0, 10), (5, 10), (5, 10), (30, 0), (20, 1)].into_iter());
        assert_eq!(pieces, [(0, 5, 1), (5, 10, 3), (10, 15, 2), (20, 21, 1)]);
    }
}
