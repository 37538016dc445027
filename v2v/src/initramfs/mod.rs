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
//! of the same name. Everything is read as a stream: memory is what names take, and time is bounded by [`Limits`]. What was
//! unpacked once need not be again ([`read_knowing`]).

mod cpio;
mod describe;
mod input;
mod lzop;
mod seen;
mod unpack;

use std::io::{BufReader, Read};
use std::sync::Arc;

pub use describe::{describe, is_wanted, module_name, module_paths};
use input::Input;
pub use seen::Seen;

/// The most memory, in bytes, for what is remembered of an initramfs.
const MOST_REMEMBERED: usize = 4 << 20;

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
    /// What [`read_knowing`] can know again.
    pub seen: Vec<Arc<Seen>>,
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
    let (mut work, mut input) = (Work::new(limits, wanted, &[]), Input::new(source));
    work.room = 0;
    work.all(&mut input);
    work.archive
}

/// The same, but an archive among `known` (of an [`Archive::seen`], with the same `limits` and `wanted`) is not unpacked
/// again: that all of its bytes are the same is seen by their digest. Remembers what it unpacks.
pub fn read_knowing(
    source: impl Read,
    limits: &Limits,
    wanted: &dyn Fn(&str) -> bool,
    known: &[Arc<Seen>],
) -> Archive {
    let (mut work, mut input) = (Work::new(limits, wanted, known), Input::new(source));
    work.all(&mut input);
    work.archive
}

/// An initramfs that is being read.
struct Work<'a> {
    limits: &'a Limits,
    wanted: &'a dyn Fn(&str) -> bool,
    known: &'a [Arc<Seen>],
    /// Memory for what is remembered, in bytes.
    room: usize,
    reader: cpio::Reader<'a>,
    archive: Archive,
}

impl<'a> Work<'a> {
    fn new(limits: &'a Limits, wanted: &'a dyn Fn(&str) -> bool, known: &'a [Arc<Seen>]) -> Self {
        let reader = cpio::Reader::new(*limits, wanted);
        Self { limits, wanted, known, room: MOST_REMEMBERED, reader, archive: Archive::default() }
    }

    fn all<R: Read>(&mut self, input: &mut Input<R>) {
        loop {
            match self.segment(input) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    self.archive.problem = format!("at {:#x}: {error}", input.position());
                    break;
                }
            }
        }
        self.archive.members = std::mem::take(&mut self.reader.members);
    }

    /// Reads one archive. `false`: there is none any more.
    fn segment<R: Read>(&mut self, input: &mut Input<R>) -> std::io::Result<bool> {
        input.skip_zeros()?;
        let head = seen::head(input)?;
        if head.is_empty() {
            return Ok(false);
        }
        let Some(compression) = unpack::recognise(&head) else {
            return Err(std::io::Error::other("neither an archive nor a compression that is known"));
        };
        if !self.known.is_empty() && self.is_known(input, &head)? {
            return Ok(true);
        }
        if self.room > 0 {
            input.start_digest();
        }
        let (offset, before, bytes) = (input.position(), self.reader.members.len(), self.reader.bytes());
        let read = match compression {
            Compression::None => self.reader.archive(input),
            _ => unpack::decoder(compression, input).and_then(|decoder| {
                let mut unpacked = BufReader::with_capacity(64 << 10, decoder);
                self.reader.archives(&mut unpacked)
            }),
        };
        let segment = Segment {
            compression,
            offset,
            len: input.position() - offset,
            unpacked: self.reader.bytes() - bytes,
            members: self.reader.members.len() - before,
        };
        self.archive.segments.push(segment);
        let digest = input.end_digest();
        read?;
        if let (Some(digest), Some(segment)) = (digest, self.archive.segments.last()) {
            let members = &self.reader.members[before..];
            let seen = Seen::new(segment, head, digest, members, self.limits, self.wanted);
            if let Some(seen) = seen.filter(|seen| seen.memory() <= self.room) {
                self.room -= seen.memory();
                self.archive.seen.push(Arc::new(seen));
            }
        }
        Ok(true)
    }

    /// Takes an archive that was unpacked before, if that is what comes next.
    fn is_known<R: Read>(&mut self, input: &mut Input<R>, head: &[u8]) -> std::io::Result<bool> {
        let Some(found) = seen::next(input, head, self.known)? else { return Ok(false) };
        if !self.reader.take_over(&found.members, found.unpacked) {
            return Ok(false);
        }
        self.archive.segments.push(found.segment(input.position()));
        seen::take(input, &found);
        self.archive.seen.push(found);
        Ok(true)
    }
}
