//! Everything that can be wrong with a VHD, as facts with their numbers; in qemu's words where it has some.

use block::ErrorKind;

/// The result of looking at an image's own structures, without I/O.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// A fact about an image that keeps it from being used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No footer at either end of the file.
    #[error("invalid VPC image")]
    NotVhd,
    /// A footer whose sum is wrong, and none at the other end.
    #[error("Incorrect header checksum")]
    FooterChecksum,
    /// No format is recognised, but the end of the file is a footer's.
    #[error("the file ends like a VHD, but its footer is damaged: {0}")]
    EndDamaged(Box<Self>),
    /// A fixed disk of another size than the file.
    #[error(
        "the file ends like a VHD, but its size is another: {size} bytes by its footer, {available} in the file"
    )]
    OtherSize {
        /// The size in bytes.
        size: u64,
        /// Bytes before the footer.
        available: u64,
    },
    /// The footers name different disks, and either may have been put there by the guest.
    #[error("the footers at the start and at the end of the file contradict each other")]
    FootersDiffer,
    /// A version of the format that nobody knows.
    #[error("unsupported VHD version {}.{}", .0 >> 16, .0 & 0xffff)]
    Version(u32),
    /// A type of disk that nobody knows.
    #[error("unsupported VHD disk type {0}")]
    Type(u32),
    /// Larger than the format allows.
    #[error("File too large")]
    TooLarge {
        /// The size in bytes.
        size: u64,
    },
    /// A fixed disk that the file does not hold.
    #[error("the disk has {size} bytes by its footer, but the file holds only {available}")]
    FixedTruncated {
        /// The size in bytes.
        size: u64,
        /// Bytes before the footer.
        available: u64,
    },
    /// The dynamic disk header does not lie in the file.
    #[error("Error reading dynamic VHD header: it should be at {0:#x}, past the end of the file")]
    NoHeader(u64),
    /// No magic number at the dynamic disk header.
    #[error("Invalid header magic")]
    HeaderMagic,
    /// The dynamic disk header has a wrong sum.
    #[error("Incorrect dynamic disk header checksum")]
    HeaderChecksum,
    /// A version of the dynamic disk header that nobody knows.
    #[error("unsupported VHD dynamic disk header version {}.{}", .0 >> 16, .0 & 0xffff)]
    HeaderVersion(u32),
    /// Not a power of two, or less than a sector.
    #[error("Invalid block size {0}")]
    BlockSize(u32),
    /// The block allocation table does not cover the disk.
    #[error("Page table too small")]
    TableTooSmall {
        /// Entries by the header.
        entries: u32,
        /// Entries that the disk needs.
        needed: u64,
    },
    /// A structure outside the file, or over another one.
    #[error("the {what} at {offset:#x} (length {len:#x}) {why} (length of the file {file_len:#x})")]
    Place {
        /// The structure.
        what: &'static str,
        /// Where it should be.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// What is wrong with that.
        why: &'static str,
        /// The length of the file.
        file_len: u64,
    },
    /// A block outside the file.
    #[error("block {index} at {offset:#x} lies past the end of the file (length {file_len:#x})")]
    BlockOutsideFile {
        /// Its number.
        index: u64,
        /// Where it should be.
        offset: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// A block over the structures of the image.
    #[error("block {index} at {offset:#x} overlaps the {what}")]
    BlockOnMetadata {
        /// Its number.
        index: u64,
        /// Where it should be.
        offset: u64,
        /// The structure.
        what: &'static str,
    },
    /// Two blocks in one place.
    #[error("block {index} at {offset:#x} overlaps block {other}")]
    BlocksOverlap {
        /// Its number.
        index: u64,
        /// Where it is.
        offset: u64,
        /// The other's number.
        other: u64,
    },
    /// More blocks than can be examined, and the image was to be written.
    #[error("the block allocation table has {0} entries, too many to write to the image safely")]
    TooManyBlocks(u32),
    /// Blocks beyond what an entry of the table can say.
    #[error("the file has grown beyond 2 TiB, the most that a VHD can address")]
    Full,
    /// A parent is needed to know the contents.
    #[error("this is a differencing disk, and its parent has not been opened")]
    NoParent,
    /// A parent that is not the one that the image was made on.
    #[error(
        "the parent is not the disk that this image was made on: its unique id is {found}, the image asks for {wanted}"
    )]
    WrongParent {
        /// What the image says.
        wanted: crate::UniqueId,
        /// What the parent is.
        found: crate::UniqueId,
    },
    /// A parent that has no unique id.
    #[error(
        "the parent is not a VHD, so that nothing says whether it is the disk that this image was made on"
    )]
    ForeignParent,
}

impl Error {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Version(_)
            | Self::Type(_)
            | Self::TooLarge { .. }
            | Self::HeaderVersion(_)
            | Self::TooManyBlocks(_)
            | Self::NoParent => ErrorKind::Unsupported,
            Self::FixedTruncated { .. } | Self::NoHeader(_) | Self::BlockOutsideFile { .. } => {
                ErrorKind::Truncated
            }
            Self::FooterChecksum
            | Self::EndDamaged(_)
            | Self::OtherSize { .. }
            | Self::FootersDiffer
            | Self::HeaderChecksum
            | Self::BlockOnMetadata { .. }
            | Self::BlocksOverlap { .. } => ErrorKind::Corrupt,
            Self::Full => ErrorKind::NoSpace,
            _ => ErrorKind::Invalid,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::FixedTruncated { .. } | Self::NoHeader(_) | Self::BlockOutsideFile { .. } => {
                Some("The file has been cut off: copy or download it again.")
            }
            Self::TooLarge { .. } => Some("A VHD holds at most 2040 GiB; use VHDX (-f vhdx) for more."),
            Self::BlocksOverlap { .. } => {
                Some("The image can still be read: convert it to a new one, and look at the contents.")
            }
            Self::FooterChecksum | Self::EndDamaged(_) | Self::OtherSize { .. } => Some(
                "Copy or download the file again. If all of its bytes are those of a disk, open it with -f raw.",
            ),
            Self::FootersDiffer => Some(
                "If the disk is a fixed one whose guest keeps a VHD in its first sector, open it with -f raw.",
            ),
            Self::WrongParent { .. } | Self::ForeignParent => Some(
                "Name the right parent, or put it back where the image expects it. After an interrupted commit to it, \
                 rebase -u with the parent's own name records it as it is.",
            ),
            _ => None,
        }
    }
}

impl From<Error> for block::Error {
    fn from(error: Error) -> Self {
        let hint = error.hint();
        let wrapped = Self::from_source(error.kind(), error);
        match hint {
            Some(hint) => wrapped.hint(hint),
            None => wrapped,
        }
    }
}
