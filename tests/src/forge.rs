//! Writes qcow2 images field by field, wrong ones on purpose.
//!
//! A [`Forge`] starts as a small correct image; tests change what they want to be wrong.

/// An image of clusters, with setters for its fields.
#[derive(Debug, Clone)]
pub struct Forge {
    bytes: Vec<u8>,
    cluster: usize,
}

/// Host offsets of the parts of a fresh [`Forge`].
pub mod at {
    /// The refcount table, in clusters.
    pub const REFCOUNT_TABLE: usize = 1;
    /// The first refcount block, in clusters.
    pub const REFCOUNT_BLOCK: usize = 2;
    /// The L1 table, in clusters.
    pub const L1: usize = 3;
    /// The first L2 table, in clusters.
    pub const L2: usize = 4;
    /// The first data cluster, in clusters.
    pub const DATA: usize = 5;
}

/// Bit 63 of an L1 or L2 entry.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry.
pub const COMPRESSED: u64 = 1 << 62;

impl Forge {
    /// A correct version 3 image of 16 clusters of 64 KiB, the first of which holds data.
    pub fn new() -> Self {
        Self::with_clusters(16, 16 * 65536)
    }

    /// A correct version 3 image with clusters of `1 << bits` bytes and a disk of `size` bytes.
    pub fn with_clusters(bits: u32, size: u64) -> Self {
        let cluster = 1usize << bits;
        let mut forge = Self { bytes: vec![0; 6 * cluster], cluster };
        let c = cluster as u64;
        forge.set32(0, 0x5146_49fb).set32(4, 3).set32(20, bits).set64(24, size);
        forge.set32(36, 1).set64(40, at::L1 as u64 * c);
        forge.set64(48, at::REFCOUNT_TABLE as u64 * c).set32(56, 1);
        forge.set32(96, 4).set32(100, 104);
        forge.set64(at::REFCOUNT_TABLE * cluster, at::REFCOUNT_BLOCK as u64 * c);
        for index in 0..6 {
            forge.refcount(index, 1);
        }
        forge.set64(at::L1 * cluster, COPIED | (at::L2 as u64 * c));
        forge.set64(at::L2 * cluster, COPIED | (at::DATA as u64 * c));
        forge.bytes[at::DATA * cluster..].fill(0x5a);
        forge
    }

    /// Host offset of a cluster.
    pub fn offset(&self, cluster: usize) -> usize {
        cluster * self.cluster
    }

    /// Overwrites 2 bytes, big-endian.
    pub fn set16(&mut self, offset: usize, value: u16) -> &mut Self {
        self.set(offset, &value.to_be_bytes())
    }

    /// Overwrites 4 bytes, big-endian.
    pub fn set32(&mut self, offset: usize, value: u32) -> &mut Self {
        self.set(offset, &value.to_be_bytes())
    }

    /// Overwrites 8 bytes, big-endian.
    pub fn set64(&mut self, offset: usize, value: u64) -> &mut Self {
        self.set(offset, &value.to_be_bytes())
    }

    /// Overwrites bytes, extending the file where needed.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) -> &mut Self {
        let end = offset + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(bytes);
        self
    }

    /// Sets the (16-bit) refcount of a cluster that the first block covers.
    pub fn refcount(&mut self, cluster: usize, value: u16) -> &mut Self {
        let offset = at::REFCOUNT_BLOCK * self.cluster + 2 * cluster;
        self.set16(offset, value)
    }

    /// Sets an L1 entry.
    pub fn l1(&mut self, index: usize, value: u64) -> &mut Self {
        let offset = at::L1 * self.cluster + 8 * index;
        self.set64(offset, value)
    }

    /// Sets an entry of the first L2 table.
    pub fn l2(&mut self, index: usize, value: u64) -> &mut Self {
        let offset = at::L2 * self.cluster + 8 * index;
        self.set64(offset, value)
    }

    /// Sets the backing file name, right behind where the extensions begin.
    pub fn backing(&mut self, name: &[u8]) -> &mut Self {
        let len = u32::try_from(name.len()).unwrap();
        self.set64(8, 112).set32(16, len).set(112, name)
    }

    /// Puts one header extension (and the end mark) right behind the header.
    pub fn extension(&mut self, kind: u32, data: &[u8]) -> &mut Self {
        let len = u32::try_from(data.len()).unwrap();
        self.set32(104, kind).set32(108, len).set(112, data)
    }

    /// Cuts the file.
    pub fn cut(&mut self, len: usize) -> &mut Self {
        self.bytes.truncate(len);
        self
    }

    /// The image.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.clone()
    }
}

impl Default for Forge {
    fn default() -> Self {
        Self::new()
    }
}
