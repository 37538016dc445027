//! What is in an initramfs, without unpacking it to anywhere.
//!
//! ```text
//!   070701...TRAILER!!! 0 0 0 | 28 b5 2f fd ...        | 0 0 070701...TRAILER!!!
//!   microcode, as it is         the rest, by zstd          what somebody has appended
//!        |                           |                          |
//!     Segment                     Segment                    Segment     each a cpio archive
//! ```
//!
//! This is the form in which Linux takes it (Linux documentation, `driver-api/early-userspace/buffer-format`): archives of
//! cpio's `newc` or `crc` format, each packed or not, with zeros between them. Later files take the place of earlier ones
//! of the same name. Everything is read as a stream: memory is what names take, and time is bounded by [`Limits`].

mod cpio;
mod describe;
mod input;
mod lzop;
mod unpack;

use std::io::{BufReader, Read};

pub use describe::{describe, is_wanted, module_name};
use input::Input;

/// How a segment is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// The older format of the LZMA utilities.
    Lzma,
    /// bzip2.
    Bzip2,
    /// LZ4 in its "legacy" frames, the only ones that Linux takes.
    Lz4,
    /// Zstandard.
    Zstd,
    /// LZO, in files of lzop.
    Lzo,
}

impl Compression {
    /// Its name in documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Lzo => "lzo",
        }
    }
}

/// One of the archives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// How it is packed.
    pub compression: Compression,
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// How long it is in the file, in bytes.
    pub len: u64,
    /// How long it is when it is unpacked, in bytes.
    pub unpacked: u64,
    /// How many members it has.
    pub members: usize,
}

/// Something in an archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    /// Its path without a leading slash, as the archive has it; what is not UTF-8 is replaced.
    pub path: String,
    /// Type and permissions, as `st_mode` has them.
    pub mode: u32,
    /// Length in bytes.
    pub len: u64,
    /// The target of a symbolic link.
    pub target: String,
    /// The contents, of files that the caller wanted.
    pub bytes: Option<Vec<u8>>,
}

impl Member {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    /// Whether it is a symbolic link.
    pub fn is_link(&self) -> bool {
        self.mode & 0o170_000 == 0o120_000
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & 0o170_000 == 0o100_000
    }
}

/// What reading may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all archives when they are unpacked.
    pub unpacked_bytes: u64,
    /// Members of all archives.
    pub members: usize,
    /// Bytes of one file whose contents are wanted.
    pub file_bytes: u64,
    /// Bytes of all files whose contents are wanted.
    pub all_file_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { unpacked_bytes: 2 << 30, members: 1 << 17, file_bytes: 64 << 10, all_file_bytes: 2 << 20 }
    }
}

/// Everything that was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Archive {
    /// The archives, as they come.
    pub segments: Vec<Segment>,
    /// Their members, as they come.
    pub members: Vec<Member>,
    /// Why not everything could be read: damage, an unknown compression, a limit. Empty if everything was.
    pub problem: String,
}

impl Archive {
    /// The member that counts, of those of this path: the last.
    pub fn get(&self, path: &str) -> Option<&Member> {
        self.members.iter().rev().find(|member| member.path == path)
    }
}

/// Reads an initramfs. `wanted` says of which files the contents are kept, by their path.
///
/// Damage is no error: what was read until there is given, and [`Archive::problem`] says what is wrong.
pub fn read(source: impl Read, limits: &Limits, wanted: &dyn Fn(&str) -> bool) -> Archive {
    let mut input = Input::new(source);
    let mut reader = cpio::Reader::new(*limits, wanted);
    let (mut segments, mut problem) = (vec![], String::new());
    loop {
        match segment(&mut input, &mut reader) {
            Ok(Some(segment)) => segments.push(segment),
            Ok(None) => break,
            Err((segment, error)) => {
                segments.extend(segment);
                problem = format!("at {:#x}: {error}", input.position());
                break;
            }
        }
    }
    Archive { segments, members: reader.members, problem }
}

/// Why a segment could not be read, and as much as is known of it.
type Broken = (Option<Segment>, std::io::Error);

/// Reads one archive. `None`: there is none any more.
fn segment<R: Read>(input: &mut Input<R>, reader: &mut cpio::Reader<'_>) -> Result<Option<Segment>, Broken> {
    input.skip_zeros().map_err(|error| (None, error))?;
    let offset = input.position();
    let magic = input.peek(6).map_err(|error| (None, error))?.to_vec();
    if magic.is_empty() {
        return Ok(None);
    }
    let Some(compression) = unpack::recognise(&magic) else {
        return Err((None, std::io::Error::other("neither an archive nor a compression that is known")));
    };
    let (before, unpacked) = (reader.members.len(), reader.bytes());
    let read = match compression {
        Compression::None => reader.archive(input),
        _ => unpack::decoder(compression, input).and_then(|decoder| {
            let mut unpacked = BufReader::with_capacity(64 << 10, decoder);
            reader.archives(&mut unpacked)
        }),
    };
    let segment = Segment {
        compression,
        offset,
        len: input.position() - offset,
        unpacked: reader.bytes() - unpacked,
        members: reader.members.len() - before,
    };
    match read {
        Ok(()) => Ok(Some(segment)),
        Err(error) => Err((Some(segment), error)),
    }
}
