//! The sizes that follow from `cluster_bits`, `refcount_order` and the extended-L2 bit, and every
//! conversion between offsets, clusters and table indices.

/// Smallest and largest `cluster_bits` (512 bytes to 2 MiB), as QEMU limits them.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Largest `refcount_order` (64-bit counters).
pub const MAX_REFCOUNT_ORDER: u32 = 6;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// Largest L1 table in bytes (QEMU's limit: 4 Mi entries).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes (QEMU's limit).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// The shape of an image. Guest and host clusters have the same size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// Whether L2 entries are 16 bytes with 32 subclusters each.
    pub extended_l2: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    #[inline]
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes in an L2 entry: 8, or 16 if extended.
    #[inline]
    pub const fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the number of entries in an L2 table.
    #[inline]
    pub const fn l2_bits(&self) -> u32 {
        if self.extended_l2 { self.cluster_bits - 4 } else { self.cluster_bits - 3 }
    }

    /// Entries in an L2 table.
    #[inline]
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table maps.
    #[inline]
    pub const fn l2_coverage(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// Subclusters in a cluster: 32 if extended, else the cluster is its own only subcluster.
    #[inline]
    pub const fn subclusters(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// Bytes in a subcluster.
    #[inline]
    pub const fn subcluster_size(&self) -> u64 {
        self.cluster_size() / self.subclusters() as u64
    }

    /// The cluster (guest or host) that contains a byte.
    #[inline]
    pub const fn cluster_of(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// First byte of a cluster.
    #[inline]
    pub const fn offset_of(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    /// Bytes from the start of its cluster.
    #[inline]
    pub const fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Clusters that `bytes` take.
    #[inline]
    pub const fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Index in the L1 table for a guest offset.
    #[inline]
    pub const fn l1_index(&self, guest_offset: u64) -> u64 {
        guest_offset >> (self.l2_bits() + self.cluster_bits)
    }

    /// Index in its L2 table for a guest offset.
    #[inline]
    pub const fn l2_index(&self, guest_offset: u64) -> u64 {
        (guest_offset >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// L1 entries that a disk of `size` bytes needs.
    #[inline]
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// log2 of the number of counters in a refcount block.
    #[inline]
    pub const fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Counters in a refcount block.
    #[inline]
    pub const fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Largest value of a refcount.
    #[inline]
    pub const fn max_refcount(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Bits of a compressed cluster descriptor that hold the host offset
    /// (specification, "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8)).
    #[inline]
    pub const fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
}
