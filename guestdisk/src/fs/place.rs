//! Where the bytes of a file lie on the device, and the records that speak of them: for whoever has to change them where
//! they are. Nothing is written here.

/// How the bytes of a part of a file are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kept {
    /// As they are.
    Written,
    /// Not at all: the space is set aside, and reads as zeros.
    Unwritten,
    /// Among the file system's records.
    Inline,
    /// Compressed.
    Compressed,
}

/// A part of a file that lies together. Holes are in none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileExtent {
    /// First byte in the file.
    pub offset: u64,
    /// Length in bytes. The last one may reach behind the end of the file.
    pub len: u64,
    /// How it is kept.
    pub kept: Kept,
    /// First byte on the device, of each copy; none unless it is [`Kept::Written`] or [`Kept::Unwritten`].
    pub copies: Vec<u64>,
    /// Other files, or snapshots, may have the same bytes.
    pub shared: bool,
    /// The record that says all this, where it is one of its own.
    pub item: Option<Record>,
}

/// Bytes within a block of the file system's own that has a checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// First byte of the block on the device, of each copy.
    pub copies: Vec<u64>,
    /// Length of the block in bytes.
    pub block_len: u64,
    /// First byte of the record within its block.
    pub within: u64,
    /// Length of the record in bytes.
    pub len: u64,
    /// Snapshots may have the same block.
    pub shared: bool,
}

/// Checksums of a part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksums {
    /// First byte in the file.
    pub offset: u64,
    /// How many bytes each of them is for.
    pub each: u64,
    /// The checksums, of four bytes each.
    pub record: Record,
}

/// All that speaks of a file's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// What lengths of extents are multiples of, in bytes.
    pub unit: u64,
    /// Where they lie, in the order of the file.
    pub extents: Vec<FileExtent>,
    /// The inode.
    pub inode: Record,
    /// Checksums of the bytes, in the order of the file; none where there are none.
    pub checksums: Vec<Checksums>,
}
