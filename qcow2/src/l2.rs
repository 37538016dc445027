//! L1 and L2 table entries (specification, "Cluster mapping", "Extended L2 Entries").

use crate::geometry::Geometry;

/// Refcount is exactly one: the cluster may be written in place.
pub const COPIED: u64 = 1 << 63;
/// The entry is a compressed cluster descriptor.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3, standard entries only).
pub const ZERO: u64 = 1;
/// Host offset bits of L1 and standard L2 entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Reserved bits of an L1 entry.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of a standard L2 entry, bit 0 aside.
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Host offsets have at most 56 bits.
pub const MAX_HOST_OFFSET: u64 = 1 << 56;

/// The two words of an L2 entry. The second is 0 in images without extended L2 entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawEntry {
    /// The cluster descriptor.
    pub word: u64,
    /// Bits 0-31: subcluster is allocated; 32-63: subcluster reads as zeros.
    pub bitmap: u64,
}

/// How a guest cluster is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// A cluster in plain form, or none. Standard entries have one subcluster (bit 0).
    Plain {
        /// The host cluster's offset; `None` if there is none.
        host: Option<u64>,
        /// Whether the host cluster belongs to this entry alone.
        copied: bool,
        /// Subclusters whose bytes are in the host cluster.
        allocated: u32,
        /// Subclusters that read as zeros.
        zero: u32,
    },
    /// A compressed cluster.
    Compressed {
        /// Where the compressed bytes start (any alignment).
        offset: u64,
        /// How many bytes they span at most (to the end of their last 512-byte sector).
        len: u64,
    },
}

/// Why an L2 entry is not acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadEntry {
    /// Reserved bits are set.
    Reserved,
    /// The host offset is not a multiple of the cluster size.
    Unaligned(u64),
    /// The zero flag in a version 2 image.
    ZeroInV2,
    /// A subcluster both allocated and zero, or allocated without a host cluster.
    Subclusters,
    /// A compressed cluster in an image with an external data file, or with its bitmap set.
    Compressed,
}

impl std::fmt::Display for BadEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Reserved => f.write_str("reserved bits are set"),
            Self::Unaligned(offset) => {
                write!(f, "host offset {offset:#x} is not aligned to the cluster size")
            }
            Self::ZeroInV2 => f.write_str("zero cluster in a version 2 image"),
            Self::Subclusters => f.write_str("impossible subcluster bitmap"),
            Self::Compressed => f.write_str("compressed cluster where none may be"),
        }
    }
}

impl Entry {
    /// A cluster that is not stored at all.
    pub const UNALLOCATED: Self = Self::Plain { host: None, copied: false, allocated: 0, zero: 0 };

    /// The bits of all subclusters of a cluster.
    pub const fn all_subclusters(geometry: &Geometry) -> u32 {
        u32::MAX >> (32 - geometry.subclusters())
    }

    /// Decodes and validates an entry. `version` is the header's; with an external data file an
    /// allocated cluster may lie at host offset 0, told apart by the COPIED bit.
    ///
    /// # Errors
    /// The rule that the entry breaks.
    pub fn decode(
        raw: RawEntry,
        geometry: &Geometry,
        version: u32,
        external_data: bool,
    ) -> Result<Self, BadEntry> {
        if raw.word & COMPRESSED != 0 {
            return Self::decode_compressed(raw, geometry, external_data);
        }
        let reserved = L2_RESERVED | if geometry.extended_l2 { ZERO } else { 0 };
        if raw.word & reserved != 0 {
            return Err(BadEntry::Reserved);
        }
        let offset = raw.word & OFFSET_MASK;
        if geometry.in_cluster(offset) != 0 {
            return Err(BadEntry::Unaligned(offset));
        }
        let copied = raw.word & COPIED != 0;
        let host = (offset != 0 || (external_data && copied)).then_some(offset);
        if !geometry.extended_l2 {
            let zero = raw.word & ZERO != 0;
            if zero && version < 3 {
                return Err(BadEntry::ZeroInV2);
            }
            let allocated = u32::from(host.is_some() && !zero);
            return Ok(Self::Plain { host, copied, allocated, zero: u32::from(zero) });
        }
        let allocated = block::num::low_u32(raw.bitmap & 0xffff_ffff);
        let zero = block::num::low_u32(raw.bitmap >> 32);
        if allocated & zero != 0 || (allocated != 0 && host.is_none()) {
            return Err(BadEntry::Subclusters);
        }
        Ok(Self::Plain { host, copied, allocated, zero })
    }

    fn decode_compressed(raw: RawEntry, geometry: &Geometry, external_data: bool) -> Result<Self, BadEntry> {
        if external_data || raw.bitmap != 0 {
            return Err(BadEntry::Compressed);
        }
        if raw.word & COPIED != 0 {
            return Err(BadEntry::Reserved);
        }
        let bits = geometry.compressed_offset_bits();
        let offset = raw.word & ((1 << bits) - 1);
        if offset >= MAX_HOST_OFFSET {
            return Err(BadEntry::Reserved);
        }
        let sectors = ((raw.word & (COMPRESSED - 1)) >> bits) + 1;
        Ok(Self::Compressed { offset, len: sectors * 512 - offset % 512 })
    }

    /// The entry's words on disk.
    pub fn encode(&self, geometry: &Geometry) -> RawEntry {
        match *self {
            Self::Compressed { offset, len } => {
                let sectors = (offset + len - 1) / 512 - offset / 512;
                RawEntry {
                    word: COMPRESSED | (sectors << geometry.compressed_offset_bits()) | offset,
                    bitmap: 0,
                }
            }
            Self::Plain { host, copied, allocated, zero } => {
                let mut word = host.unwrap_or(0);
                if copied && host.is_some() {
                    word |= COPIED;
                }
                if geometry.extended_l2 {
                    RawEntry { word, bitmap: u64::from(zero) << 32 | u64::from(allocated) }
                } else {
                    RawEntry { word: word | u64::from(zero & 1), bitmap: 0 }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: Geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false };
    const EXTENDED: Geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: true };

    fn round_trip(entry: Entry, geometry: &Geometry) {
        assert_eq!(Entry::decode(entry.encode(geometry), geometry, 3, false), Ok(entry));
    }

    #[test]
    fn every_kind_of_entry_survives() {
        round_trip(Entry::UNALLOCATED, &STANDARD);
        round_trip(Entry::Plain { host: None, copied: false, allocated: 0, zero: 1 }, &STANDARD);
        round_trip(Entry::Plain { host: Some(0x50000), copied: true, allocated: 1, zero: 0 }, &STANDARD);
        round_trip(Entry::Plain { host: Some(0x50000), copied: true, allocated: 0, zero: 1 }, &STANDARD);
        round_trip(Entry::Plain { host: Some(0x50000), copied: false, allocated: 5, zero: 8 }, &EXTENDED);
        round_trip(Entry::Compressed { offset: 0x50123, len: 512 * 3 - 0x123 }, &STANDARD);
    }

    #[test]
    fn rules_of_the_specification_are_kept() {
        let decode = |word, bitmap, geometry: &Geometry, version| {
            Entry::decode(RawEntry { word, bitmap }, geometry, version, false)
        };
        assert_eq!(decode(0x50002, 0, &STANDARD, 3), Err(BadEntry::Reserved));
        assert_eq!(decode(0x50200, 0, &STANDARD, 3), Err(BadEntry::Unaligned(0x50200)));
        assert_eq!(decode(1, 0, &STANDARD, 2), Err(BadEntry::ZeroInV2));
        assert_eq!(decode(1, 0, &EXTENDED, 3), Err(BadEntry::Reserved));
        assert_eq!(decode(0, 1, &EXTENDED, 3), Err(BadEntry::Subclusters));
        assert_eq!(decode(0x50000, 1 << 32 | 1, &EXTENDED, 3), Err(BadEntry::Subclusters));
    }

    #[test]
    fn any_words_decode_without_panic_and_round_trip_if_accepted() {
        let mut word = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..100_000 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            for geometry in [STANDARD, EXTENDED] {
                let raw = RawEntry { word: word.rotate_left(17), bitmap: word };
                if let Ok(entry) = Entry::decode(raw, &geometry, 3, false) {
                    assert_eq!(Entry::decode(entry.encode(&geometry), &geometry, 3, false), Ok(entry));
                }
            }
        }
    }
}
