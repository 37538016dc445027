//! Feature bits of a version 3 header (specification, "Header", "Feature name table").

/// `incompatible_features`: an implementation that does not know a bit must refuse the image.
pub mod incompatible {
    /// Refcounts may be out of date.
    pub const DIRTY: u64 = 1 << 0;
    /// A contradiction has been found; only repair may write.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data is in an external file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 16 bytes.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All bits that this crate knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// `compatible_features`: may be ignored.
pub mod compatible {
    /// Refcounts may be updated lazily.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// `autoclear_features`: a writer that does not know a bit must clear it.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw copy of the disk.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
    /// All bits that this crate knows.
    pub const KNOWN: u64 = BITMAPS | DATA_FILE_RAW;
}
