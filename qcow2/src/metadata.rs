//! Where an image keeps its own structures, so that guest data is never read from or written to them.
//!
//! A damaged or hostile image can point guest clusters at the header or a table. QEMU would hand metadata
//! to the guest; here such an entry is an error. The map is built once, when the first data cluster is
//! used, and stays: clusters that held metadata when the image was opened are not given to guest data in
//! this session even after they have become free.

use std::collections::BTreeSet;

use parking_lot::RwLock;

use crate::geometry::Geometry;

/// What a range of the file is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Header,
    L1Table,
    L2Table,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    SnapshotL1,
    BitmapDirectory,
    CryptoHeader,
    BitmapTable,
    BitmapData,
}

impl Kind {
    /// In words, for a message.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::L1Table => "active L1 table",
            Self::L2Table => "active L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::SnapshotL1 => "inactive L1 table",
            Self::BitmapDirectory => "bitmap directory",
            Self::CryptoHeader => "encryption header",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap data",
        }
    }
}

/// Sorted ranges of clusters that hold metadata.
#[derive(Debug, Default)]
pub(crate) struct MetadataMap {
    /// (first cluster, one past the last, kind), ascending, merged where of one kind.
    ranges: Vec<(u64, u64, Kind)>,
    /// Clusters, ascending, that more than one structure claims.
    conflicts: Vec<(u64, u64)>,
    /// Clusters that have been given to tables since the image was opened.
    claimed: RwLock<BTreeSet<u64>>,
}

impl MetadataMap {
    /// The map of the given byte ranges (offset, length, kind).
    pub(crate) fn new(geometry: &Geometry, ranges: impl Iterator<Item = (u64, u64, Kind)>) -> Self {
        let mut all: Vec<_> = ranges
            .filter(|(_, len, _)| *len > 0)
            .map(|(offset, len, kind)| {
                let end = geometry.clusters_for(offset.saturating_add(len));
                (geometry.cluster_of(offset), end, kind)
            })
            .collect();
        all.sort_unstable();
        let mut merged: Vec<(u64, u64, Kind)> = Vec::with_capacity(all.len());
        let mut conflicts = Vec::new();
        for (first, end, kind) in all {
            let past = merged.last().map_or(0, |last| last.1);
            if first < past {
                conflicts.push((first, end.min(past)));
            }
            let first = first.max(past);
            match merged.last_mut() {
                Some(last) if last.2 == kind && first <= last.1 => last.1 = last.1.max(end),
                _ if first < end => merged.push((first, end, kind)),
                _ => {}
            }
        }
        merged.shrink_to_fit();
        Self { ranges: merged, conflicts, claimed: RwLock::default() }
    }

    /// The first cluster that more than one structure claims.
    pub(crate) fn conflict(&self) -> Option<u64> {
        self.conflicts.first().map(|(first, _)| *first)
    }

    /// Whether more than one structure claims a cluster.
    pub(crate) fn is_shared(&self, cluster: u64) -> bool {
        let next = self.conflicts.partition_point(|(_, end)| *end <= cluster);
        self.conflicts.get(next).is_some_and(|(first, _)| *first <= cluster)
    }

    /// Calls `visit` with every one of clusters `first..end` that holds metadata.
    pub(crate) fn visit(&self, first: u64, end: u64, mut visit: impl FnMut(u64)) {
        let next = self.ranges.partition_point(|range| range.1 <= first);
        let ranges = self.ranges.get(next..).unwrap_or_default().iter().take_while(|range| range.0 < end);
        ranges.for_each(|range| (range.0.max(first)..range.1.min(end)).for_each(&mut visit));
        self.claimed.read().range(first..end).for_each(|cluster| visit(*cluster));
    }

    /// Notes that clusters hold metadata from now on.
    pub(crate) fn claim(&self, first: u64, clusters: u64) {
        self.claimed.write().extend(first..first + clusters);
    }

    /// Notes that clusters hold no metadata of this session any more.
    pub(crate) fn disclaim(&self, first: u64, clusters: u64) {
        let mut claimed = self.claimed.write();
        let gone: Vec<u64> = claimed.range(first..first.saturating_add(clusters)).copied().collect();
        for cluster in gone {
            claimed.remove(&cluster);
        }
    }

    /// Whether one of clusters `first..end` has been given to a table since the image was opened. Only a table that
    /// contradicts itself (two entries, each with the only reference to one cluster) can lead guest data there.
    pub(crate) fn is_claimed(&self, first: u64, end: u64) -> bool {
        self.claimed.read().range(first..end).next().is_some()
    }

    /// The first range that clusters `first..end` touch: its last cluster plus one, and its kind.
    pub(crate) fn hit(&self, first: u64, end: u64) -> Option<(u64, Kind)> {
        let next = self.ranges.partition_point(|range| range.1 <= first);
        self.ranges.get(next).filter(|range| range.0 < end).map(|range| (range.1, range.2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_from_both_sides() {
        let geometry = Geometry { cluster_bits: 9, refcount_order: 4, extended_l2: false };
        let ranges = [
            (0, 512, Kind::Header),
            (1024, 8, Kind::L1Table),
            (2048, 512, Kind::L2Table),
            (2560, 512, Kind::L2Table),
        ];
        let map = MetadataMap::new(&geometry, ranges.into_iter());
        assert_eq!(map.hit(0, 1), Some((1, Kind::Header)));
        assert_eq!(map.hit(1, 2), None);
        assert_eq!(map.hit(1, 3), Some((3, Kind::L1Table)));
        assert_eq!(map.hit(3, 4), None);
        assert_eq!(map.hit(5, 100), Some((6, Kind::L2Table)));
        assert_eq!(map.hit(6, 100), None);
        assert!(!map.is_shared(4));
    }

    #[test]
    fn two_owners_of_a_cluster_are_noticed() {
        let geometry = Geometry { cluster_bits: 9, refcount_order: 4, extended_l2: false };
        let ranges =
            [(512, 1024, Kind::RefcountTable), (1024, 512, Kind::L2Table), (2048, 512, Kind::L2Table)];
        let map = MetadataMap::new(&geometry, ranges.into_iter().chain([(2048, 512, Kind::L2Table)]));
        assert!(map.is_shared(2) && map.is_shared(4));
        assert!(!map.is_shared(1) && !map.is_shared(3));
    }
}
