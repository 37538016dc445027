//! Everything that can be wrong with a VDI, as facts with their numbers; in qemu's words where it has some.

use block::ErrorKind;

use crate::header::Uuid;

/// The result of looking at an image's own structures, without I/O.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// A fact about an image that keeps it from being used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No magic number.
    #[error("Image not in VDI format (bad signature {0:08x})")]
    Signature(u32),
    /// A version of the format that nobody knows.
    #[error("unsupported VDI image (version {}.{})", .0 >> 16, .0 & 0xffff)]
    Version(u32),
    /// A kind of image that cannot be read by itself, or that nobody knows.
    #[error("unsupported VDI image (image type {0})")]
    Type(u32),
    /// The map does not begin with a sector.
    #[error("unsupported VDI image (unaligned block map offset {0:#x})")]
    MapUnaligned(u32),
    /// The data does not begin with a sector.
    #[error("unsupported VDI image (unaligned data offset {0:#x})")]
    DataUnaligned(u32),
    /// Sectors of another size.
    #[error("unsupported VDI image (sector size {0} is not 512)")]
    SectorSize(u32),
    /// Blocks of a size that cannot be.
    #[error("unsupported VDI image (block size {0})")]
    BlockSize(u32),
    /// Further bytes in front of each block.
    #[error("unsupported VDI image ({0} extra bytes in each block)")]
    BlockExtra(u32),
    /// More than the map can say.
    #[error("Unsupported VDI image size (size is {size:#x}, max supported is {max:#x})")]
    TooLarge {
        /// The size in bytes.
        size: u64,
        /// The largest.
        max: u64,
    },
    /// The map does not cover the disk.
    #[error("unsupported VDI image (disk size {size}, image bitmap has room for {room})")]
    MapTooSmall {
        /// The size in bytes.
        size: u64,
        /// What the map covers.
        room: u64,
    },
    /// The map covers more than the disk: one of the two numbers is not what it was.
    #[error(
        "the disk has {size} bytes, which are {needed} blocks, but the image has {blocks}: the header is damaged"
    )]
    MapTooLarge {
        /// The size in bytes.
        size: u64,
        /// Blocks that the disk needs.
        needed: u64,
        /// Blocks by the header.
        blocks: u32,
    },
    /// A base image with a parent.
    #[error("unsupported VDI image (non-NULL {0} UUID)")]
    UnexpectedParent(&'static str),
    /// The map overlaps the header or the data.
    #[error("the block map at {offset:#x} (length {len:#x}) overlaps the {what}")]
    MapPlace {
        /// Where it is.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// What it overlaps.
        what: &'static str,
    },
    /// The map does not lie in the file.
    #[error(
        "the block map at {offset:#x} (length {len:#x}) lies past the end of the file (length {file_len:#x})"
    )]
    MapOutsideFile {
        /// Where it is.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// A block outside the file.
    #[error("block {index} at {offset:#x} lies past the end of the file (length {file_len:#x})")]
    BlockOutsideFile {
        /// Its number in the disk.
        index: u64,
        /// Where it should be.
        offset: u64,
        /// The length of the file.
        file_len: u64,
    },
    /// Two blocks of the disk in one of the file, and the image was to be written.
    #[error("block {index} has the same place ({offset:#x}) as another block")]
    SharedBlock {
        /// Its number in the disk.
        index: u64,
        /// Where it is.
        offset: u64,
    },
    /// Block numbers that the map has no word for.
    #[error("the image has no number for a further block")]
    Full,
    /// A parent is needed to know the contents.
    #[error(
        "this is a differencing image, which does not say where its parent is (the parent's UUID is {{{0}}})"
    )]
    NoParent(Uuid),
    /// A parent that is not the one that the image was made on.
    #[error(
        "the parent is not the disk that this image was made on: its UUID is {{{found}}}, the image asks for {{{wanted}}}"
    )]
    WrongParent {
        /// What the image says.
        wanted: Uuid,
        /// What the parent is.
        found: Uuid,
    },
    /// A parent that has no UUID.
    #[error(
        "the parent is not a VDI, so that nothing says whether it is the disk that this image was made on"
    )]
    ForeignParent,
}

impl Error {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Version(_)
            | Self::Type(_)
            | Self::SectorSize(_)
            | Self::BlockSize(_)
            | Self::BlockExtra(_)
            | Self::TooLarge { .. }
            | Self::NoParent(_)
            | Self::UnexpectedParent(_) => ErrorKind::Unsupported,
            Self::MapOutsideFile { .. } | Self::BlockOutsideFile { .. } => ErrorKind::Truncated,
            Self::SharedBlock { .. } | Self::MapPlace { .. } | Self::MapTooLarge { .. } => ErrorKind::Corrupt,
            Self::Full => ErrorKind::NoSpace,
            _ => ErrorKind::Invalid,
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::MapOutsideFile { .. } | Self::BlockOutsideFile { .. } => {
                Some("The file has been cut off: copy or download it again.")
            }
            Self::MapTooLarge { .. } => {
                Some("The end of the disk would be missing: copy or download the image again.")
            }
            Self::SharedBlock { .. } => {
                Some("The image can still be read: convert it to a new one, and look at the contents.")
            }
            Self::NoParent(_) => Some(
                "name it: --image-opts driver=vdi,file.filename=CHILD,backing.driver=vdi,backing.file.filename=PARENT",
            ),
            Self::WrongParent { .. } | Self::ForeignParent => Some("Name the right parent."),
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
