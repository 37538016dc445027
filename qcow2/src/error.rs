//! Everything that can be wrong with a qcow2 image, as facts with their numbers.
//!
//! A variant says what was found and which limit it breaks; its text is QEMU's where QEMU has one, because
//! people search for it. Converted to [`block::Error`], a variant becomes the source of an error whose kind
//! tells whose fault it is.

use block::ErrorKind;

use crate::l2::BadEntry;

/// The result of looking at an image's own structures, without I/O.
pub type Result<T> = std::result::Result<T, Error>;

/// A fact about an image that keeps it from being used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No magic number.
    #[error("Image is not in qcow2 format")]
    NotQcow2,
    /// Neither version 2 nor 3.
    #[error("Unsupported qcow2 version {0}")]
    Version(u32),
    /// `cluster_bits` out of range.
    #[error("Unsupported cluster size: 2^{0}")]
    ClusterBits(u32),
    /// The header ends too early, in the file or by its own statement.
    #[error("qcow2 header too short")]
    HeaderTooShort,
    /// `header_length` exceeds the first cluster.
    #[error("qcow2 header exceeds cluster size")]
    HeaderTooLong,
    /// `header_length` breaks the specification's rule.
    #[error("qcow2 header length {0} is not a multiple of 8")]
    HeaderLengthUnaligned(u32),
    /// The backing file name lies outside the first cluster.
    #[error("Invalid backing file offset")]
    BackingOffset(u64),
    /// The backing file name is longer than 1023 bytes or than the rest of the first cluster.
    #[error("Backing file name too long")]
    BackingNameTooLong(u32),
    /// A compression type other than deflate without the feature bit, or the other way round.
    #[error("qcow2: Compression type incompatible feature bit must {}be set", if *.wanted { "" } else { "not " })]
    CompressionBit {
        /// Whether the bit should be set.
        wanted: bool,
    },
    /// A compression type that nobody knows.
    #[error("qcow2: unknown compression type: {0}")]
    CompressionType(u8),
    /// Incompatible feature bits that this crate does not know, named by the image where it can.
    #[error("Unsupported qcow2 feature(s): {names}")]
    Features {
        /// The unknown bits.
        bits: u64,
        /// Their names, or the number of those that have none.
        names: String,
    },
    /// Extended L2 entries with clusters under 16 KiB.
    #[error("Unsupported subcluster size: {0}")]
    SubclusterSize(u64),
    /// `refcount_order` above 6.
    #[error("Reference count entry width too large; may not exceed 64 bits")]
    RefcountOrder(u32),
    /// An encryption method that nobody knows.
    #[error("Unsupported encryption method {0}")]
    CryptMethod(u32),
    /// `refcount_table_clusters` is 0.
    #[error("Image does not contain a reference count table")]
    NoRefcountTable,
    /// The refcount table exceeds QEMU's limit.
    #[error("Reference count table too large")]
    RefcountTableTooLarge {
        /// Its size by the header, in clusters.
        clusters: u32,
    },
    /// The refcount table is not aligned, or beyond what a file can be.
    #[error("Reference count table offset invalid")]
    RefcountTableOffset(u64),
    /// More than 65536 snapshots.
    #[error("Snapshot table too large")]
    TooManySnapshots(u32),
    /// The snapshot table is not aligned, or beyond what a file can be.
    #[error("Snapshot table offset invalid")]
    SnapshotTableOffset(u64),
    /// The entries of the snapshot table exceed 64 MiB.
    #[error("Snapshot table is too big")]
    SnapshotTableTooBig,
    /// More than 1024 bytes of extra data in a snapshot.
    #[error("Too much extra metadata in snapshot table entry {0}")]
    SnapshotExtraData(usize),
    /// The L1 table of a snapshot exceeds QEMU's limit or is not aligned.
    #[error("Snapshot L1 table {}", if *.too_large { "too large" } else { "offset invalid" })]
    SnapshotL1 {
        /// Which limit it breaks.
        too_large: bool,
    },
    /// The active L1 table exceeds QEMU's limit.
    #[error("Active L1 table too large")]
    L1TooLarge {
        /// Its entries by the header.
        entries: u32,
    },
    /// The active L1 table is not aligned, or beyond what a file can be.
    #[error("Active L1 table offset invalid")]
    L1Offset(u64),
    /// A disk that would need more than 2^31 - 1 L1 entries.
    #[error("Image is too big")]
    TooBig {
        /// The virtual size in bytes.
        size: u64,
    },
    /// The active L1 table does not cover the disk.
    #[error("L1 table is too small")]
    L1TooSmall {
        /// Entries by the header.
        entries: u32,
        /// Entries that the disk needs.
        needed: u64,
    },
    /// A structure that the header points to does not lie inside the file.
    #[error("{what} at {offset:#x} (length {len:#x}) lies past the end of the file (length {file_len:#x})")]
    OutsideFile {
        /// The structure.
        what: &'static str,
        /// Its host offset.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// A header extension reaches past its area.
    #[error("Header extension too large")]
    ExtensionTooLarge,
    /// A header extension with contents that cannot be.
    #[error("{0}")]
    Extension(String),
    /// An encrypted image without the location of its LUKS header.
    #[error("Missing CRYPTO header for crypt method {0}")]
    NoCryptoHeader(u32),
    /// The header does not fit the first cluster any more.
    #[error("No space left in the file header")]
    HeaderFull,
    /// A bitmap directory that cannot be.
    #[error("{0}")]
    Bitmaps(String),
    /// Reserved bits or an unaligned offset in an L1 entry.
    #[error("L1 entry {index} is invalid: {entry:#x}")]
    L1Entry {
        /// Its index.
        index: u64,
        /// What it is.
        entry: u64,
    },
    /// An L2 table outside the file.
    #[error("L2 table {l1_index} at {offset:#x} lies outside the file (length {file_len:#x})")]
    L2TableOutsideFile {
        /// The index of the L1 entry that names it.
        l1_index: u64,
        /// Its host offset.
        offset: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// An L2 entry that breaks a rule.
    #[error("L2 entry for guest offset {guest:#x} is invalid: {reason}")]
    L2Entry {
        /// The guest offset that it maps.
        guest: u64,
        /// The rule.
        reason: BadEntry,
    },
    /// Guest data past the end of the file.
    #[error("data of guest offset {guest:#x} at {offset:#x} lies outside the file (length {file_len:#x})")]
    DataOutsideFile {
        /// The guest offset.
        guest: u64,
        /// The host offset.
        offset: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// Guest data where a structure of the image is.
    #[error("guest offset {guest:#x} is mapped to {offset:#x}, which is part of the {what}")]
    DataOnMetadata {
        /// The guest offset.
        guest: u64,
        /// The host offset.
        offset: u64,
        /// The structure.
        what: &'static str,
    },
    /// Reserved bits or an unaligned offset in a refcount table entry.
    #[error("refcount table entry {index} is invalid: {entry:#x}")]
    RefcountTableEntry {
        /// Its index.
        index: u64,
        /// What it is.
        entry: u64,
    },
    /// A refcount block outside the file.
    #[error("refcount block {index} at {offset:#x} lies outside the file (length {file_len:#x})")]
    RefcountBlockOutsideFile {
        /// Its index in the refcount table.
        index: u64,
        /// Its host offset.
        offset: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// A refcount that would leave the range of its width.
    #[error("refcount of cluster {cluster} would become {value}, outside 0..={max}")]
    RefcountRange {
        /// The host cluster.
        cluster: u64,
        /// The value that does not fit.
        value: i128,
        /// The largest value of the image's width.
        max: u64,
    },
    /// No refcount block counts a cluster that is in use.
    #[error("no refcount block counts cluster {cluster}, which is in use")]
    RefcountBlockMissing {
        /// The host cluster.
        cluster: u64,
    },
    /// An entry of a bitmap's table that is neither a cluster of the file nor one of the two numbers without one.
    #[error("Could not read bitmap_table table from image for bitmap '{0}': Invalid argument")]
    BitmapTable(String),
    /// All clusters that a missing refcount block would count hold metadata.
    #[error("no cluster is free for refcount block {index}")]
    NoRoomForRefcountBlock {
        /// Its index in the refcount table.
        index: u64,
    },
    /// Two structures of the image in one cluster, when it was to be written.
    #[error("two structures of the image overlap at {offset:#x}; it cannot be opened read/write")]
    Overlap {
        /// The host offset.
        offset: u64,
    },
    /// A table that shares its cluster with another structure, or with another table.
    #[error("L2 table {l1_index} at {offset:#x} overlaps another structure of the image")]
    L2TableShared {
        /// The index of the L1 entry that names it.
        l1_index: u64,
        /// Its host offset.
        offset: u64,
    },
    /// A compressed cluster that does not inflate to a cluster.
    #[error("compressed cluster of guest offset {guest:#x} at {offset:#x} cannot be decompressed")]
    CompressedData {
        /// The guest offset.
        guest: u64,
        /// The host offset.
        offset: u64,
    },
    /// The corrupt bit is set and the image was to be written.
    #[error("qcow2: Image is corrupt; cannot be opened read/write")]
    MarkedCorrupt,
    /// The external data file was not given and the image does not name it.
    #[error("'data-file' is required for this image")]
    DataFileRequired,
    /// More references to a cluster than a refcount of the image's width can say.
    #[error(
        "overflow cluster offset={offset:#x}: more references than its refcount can say; nothing has been changed"
    )]
    RefcountWidth {
        /// The host offset of the cluster.
        offset: u64,
    },
    /// The refcount structures are damaged, and not all of the image is to be repaired.
    #[error("need to rebuild refcount structures: {0}; nothing has been changed")]
    NeedsRebuild(&'static str),
    /// Damage that cannot be repaired.
    #[error("the image cannot be repaired: {0}; nothing has been changed")]
    CannotRepair(&'static str),
}

impl Error {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Version(_)
            | Self::CompressionType(_)
            | Self::Features { .. }
            | Self::CryptMethod(_)
            | Self::RefcountWidth { .. }
            | Self::NeedsRebuild(_)
            | Self::CannotRepair(_) => ErrorKind::Unsupported,
            Self::OutsideFile { .. }
            | Self::L2TableOutsideFile { .. }
            | Self::DataOutsideFile { .. }
            | Self::RefcountBlockOutsideFile { .. } => ErrorKind::Truncated,
            Self::L1Entry { .. }
            | Self::L2Entry { .. }
            | Self::DataOnMetadata { .. }
            | Self::RefcountTableEntry { .. }
            | Self::CompressedData { .. }
            | Self::RefcountRange { .. }
            | Self::RefcountBlockMissing { .. }
            | Self::NoRoomForRefcountBlock { .. }
            | Self::L2TableShared { .. }
            | Self::Overlap { .. }
            | Self::MarkedCorrupt => ErrorKind::Corrupt,
            Self::HeaderFull => ErrorKind::NoSpace,
            _ => ErrorKind::Invalid,
        }
    }
}

impl From<Error> for block::Error {
    fn from(error: Error) -> Self {
        let hint = match &error {
            Error::SnapshotExtraData(_) => {
                Some("You can force-remove this extra metadata by updating the image via check -r all")
            }
            Error::OutsideFile { .. } | Error::L2TableOutsideFile { .. } | Error::DataOutsideFile { .. } => {
                Some("The file has been cut off: copy or download it again.")
            }
            Error::NeedsRebuild(_) => Some("check -r all rebuilds them."),
            Error::RefcountWidth { .. } => Some(
                "Use amend to increase the refcount entry width, or convert to create a clean copy if the image \
                 cannot be opened for writing.",
            ),
            _ => None,
        };
        let wrapped = Self::from_source(error.kind(), error);
        match hint {
            Some(hint) => wrapped.hint(hint),
            None => wrapped,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_qemus_words() {
        assert_eq!(Error::ClusterBits(8).to_string(), "Unsupported cluster size: 2^8");
        let text = "qcow2: Compression type incompatible feature bit must not be set";
        assert_eq!(Error::CompressionBit { wanted: false }.to_string(), text);
        assert_eq!(Error::SnapshotL1 { too_large: true }.to_string(), "Snapshot L1 table too large");
    }

    #[test]
    fn the_kind_and_the_fact_survive_the_conversion() {
        let fact = Error::L2TableOutsideFile { l1_index: 3, offset: 0x50000, file_len: 0x40000 };
        let error = block::Error::from(fact.clone());
        assert_eq!(error.kind(), ErrorKind::Truncated);
        assert_eq!(error.message(), "L2 table 3 at 0x50000 lies outside the file (length 0x40000)");
        let source = std::error::Error::source(&error).and_then(|s| s.downcast_ref::<Error>());
        assert_eq!(source, Some(&fact));
    }
}
