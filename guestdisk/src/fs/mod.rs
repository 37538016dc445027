//! File systems, read-only.
//!
//! [`FileSystem::open`] finds out which one a device holds. What it gives back knows paths: symbolic links are followed
//! within the file system, as if it were mounted at the root, and only so many of them. Each format is a module that
//! knows nothing but numbered nodes:
//!
//! ```text
//!   FileSystem      "/boot/vmlinuz" -> follow links, look up names
//!        |
//!   Nodes           root, entries of 2, metadata of 13, bytes of 13
//!        |
//!   ext  fat  xfs  btrfs  ntfs
//! ```
//!
//! Disks are taken as hostile: numbers are compared with the device before they are followed, trees have a limit of
//! depth and directories one of entries, and nothing is allocated by the word of the disk alone. A checksum that does
//! not fit is not a reason to refuse a file that can be read; what is inconsistent is.

mod btrfs;
pub(crate) mod ext;
pub(crate) mod fat;
mod node;
mod ntfs;
mod path;
mod place;
mod redirect;
mod source;
mod xfs;

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::num::to_usize;
use block::{BlockDevice, Error, ErrorKind, Result};

pub use fat::CODE_PAGE;
pub use node::{FileKind, Metadata, Node};
pub use place::{Checksums, FileExtent, Kept, Layout, Record};

use crate::bytes::corrupt;
use crate::detect::{self, Kind};
use node::Nodes;

/// The most names of a directory that are given at once.
const MOST_ENTRIES: usize = 1 << 20;
/// The most bytes of names of a directory that are given at once.
const MOST_NAME_BYTES: usize = 64 << 20;

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without any path.
    pub name: OsString,
    /// What it is; [`FileKind::Unknown`] where only its metadata tells (ext2 of the first revision, old XFS).
    pub kind: FileKind,
    /// The node that the name belongs to.
    pub node: Node,
}

/// A file system on a device.
#[derive(Debug)]
pub struct FileSystem {
    nodes: Box<dyn Nodes>,
    kind: Kind,
    /// Bytes of the device.
    size: u64,
    notes: Vec<String>,
}

impl FileSystem {
    /// Opens what a device holds.
    ///
    /// # Errors
    /// `Unsupported` if it is no file system or one that is not read here, or has features that are not known;
    /// `Corrupt` if its superblock makes no sense; the device failed.
    pub fn open(device: Arc<dyn BlockDevice>) -> Result<Self> {
        Self::open_at(device, false)
    }

    fn open_at(device: Arc<dyn BlockDevice>, top: bool) -> Result<Self> {
        let Some(found) = detect::detect(&*device)? else {
            return Err(Error::unsupported("no file system that is known here"));
        };
        let (mut notes, size) = (vec![], device.size());
        let nodes: Box<dyn Nodes> = match found.kind {
            Kind::Ext2 | Kind::Ext3 | Kind::Ext4 => Box::new(ext::Ext::open(device, &mut notes)?),
            Kind::Btrfs => Box::new(btrfs::Btrfs::open(device, top, &mut notes)?),
            Kind::Xfs => Box::new(xfs::Xfs::open(device, &mut notes)?),
            Kind::Vfat => Box::new(fat::Fat::open(device)?),
            Kind::Ntfs => Box::new(ntfs::Ntfs::open(device, &mut notes)?),
            other => {
                return Err(Error::unsupported(format!("{other} is not a file system that is read here")));
            }
        };
        Ok(Self { nodes, kind: found.kind, size, notes })
    }

    /// Opens a file system of btrfs as it is without regard to its default subvolume; any other as [`open`](Self::open)
    /// does. That is how GRUB sees it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_top(device: Arc<dyn BlockDevice>) -> Result<Self> {
        Self::open_at(device, true)
    }

    /// Which file system it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The folder in which paths begin.
    pub fn root(&self) -> Node {
        self.nodes.root()
    }

    /// What a person should know of its state: a journal that was replayed in memory or could not be.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Bytes of the device that hold nothing, in order: whoever copies the file system may leave zeros there. `None` if
    /// that is not certain, or not known here: the file system is damaged or mounted, its journal is not finished, or it is
    /// of a kind whose free space is not read (ext2/3/4, XFS and FAT are).
    ///
    /// # Errors
    /// The structures contradict themselves; the device failed.
    pub fn free_ranges(&self) -> Result<Option<Vec<Range<u64>>>> {
        let size = self.size;
        let inside = |ranges: Vec<Range<u64>>| ranges.into_iter().filter(|range| range.end <= size).collect();
        Ok(self.nodes.free_ranges()?.map(inside))
    }

    /// How much has been read so far, in pages of 8 KiB from the cache or the device: a measure of the work done, by which
    /// a caller can limit what a hostile disk may cost.
    pub fn work(&self) -> u64 {
        self.nodes.work()
    }

    /// What is known of a path, the target of a symbolic link.
    ///
    /// # Errors
    /// `NotFound`; a loop of links; the file system is damaged or the device failed.
    pub fn metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        self.nodes.metadata(self.locate(path.as_ref())?.node)
    }

    /// What is known of a path, the symbolic link itself.
    ///
    /// # Errors
    /// As [`metadata`](Self::metadata).
    pub fn symlink_metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        self.nodes.metadata(self.locate_link(path.as_ref())?.node)
    }

    /// Whether there is something of this name. Damage counts as absence.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.locate(path.as_ref()).is_ok()
    }

    /// The path without symbolic links.
    ///
    /// # Errors
    /// As [`metadata`](Self::metadata).
    pub fn canonicalize(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        Ok(self.locate(path.as_ref())?.path)
    }

    /// The names in a directory, without `.` and `..`, in the order of the disk.
    ///
    /// # Errors
    /// As [`metadata`](Self::metadata); not a directory; more than a million names.
    pub fn read_dir(&self, path: impl AsRef<Path>) -> Result<Vec<DirEntry>> {
        let path = path.as_ref();
        let node = self.locate(path)?.node;
        let (mut entries, mut bytes) = (vec![], 0);
        let listed = self.nodes.entries(node, &mut |entry| {
            if entry.name.is_empty() || entry.name.iter().any(|byte| matches!(byte, 0 | b'/')) {
                return Err(corrupt(format!(
                    "a name that no file can have: {:?}",
                    OsStr::from_bytes(&entry.name)
                )));
            }
            bytes += entry.name.len();
            if entries.len() >= MOST_ENTRIES || bytes > MOST_NAME_BYTES {
                return Err(Error::unsupported(format!("a directory of more than {MOST_ENTRIES} names")));
            }
            entries.push(DirEntry {
                name: OsString::from_vec(entry.name),
                kind: entry.kind,
                node: entry.node,
            });
            Ok(true)
        });
        path::about(listed, path)?;
        Ok(entries)
    }

    /// What a symbolic link holds.
    ///
    /// # Errors
    /// As [`metadata`](Self::metadata); not a symbolic link.
    pub fn read_link(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = path.as_ref();
        let node = self.locate_link(path)?.node;
        if self.nodes.metadata(node)?.kind != FileKind::Symlink {
            return Err(Error::usage(format!("{}: not a symbolic link", path.display())));
        }
        path::about(self.nodes.read_link(node), path).map(|target| OsStr::from_bytes(&target).into())
    }

    /// A file, to be read at any place.
    ///
    /// # Errors
    /// As [`metadata`](Self::metadata); not a regular file.
    pub fn open_file(&self, path: impl AsRef<Path>) -> Result<File<'_>> {
        let path = path.as_ref();
        let node = self.locate(path)?.node;
        let metadata = path::about(self.nodes.metadata(node), path)?;
        match metadata.kind {
            FileKind::File => Ok(File { nodes: &*self.nodes, node, metadata, path: path.to_owned() }),
            FileKind::Directory => Err(Error::usage(format!("{}: is a directory", path.display()))),
            _ => Err(Error::usage(format!("{}: not a regular file", path.display()))),
        }
    }

    /// The contents of a file of at most `max_bytes`.
    ///
    /// # Errors
    /// As [`open_file`](Self::open_file) and [`File::read_at`]; `Unsupported` if it is larger.
    pub fn read(&self, path: impl AsRef<Path>, max_bytes: u64) -> Result<Vec<u8>> {
        self.open_file(path)?.read_all(max_bytes)
    }
}

/// A file of a [`FileSystem`].
#[derive(Debug)]
pub struct File<'a> {
    nodes: &'a dyn Nodes,
    node: Node,
    metadata: Metadata,
    path: PathBuf,
}

impl File<'_> {
    /// Its metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.metadata.size
    }

    /// Fills `buf` from `offset` as far as the file reaches. Returns how many bytes that were: fewer than asked for
    /// only at its end.
    ///
    /// # Errors
    /// The file is encrypted or compressed in an unknown way; the file system is damaged or the device failed.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let len = to_usize(self.size().saturating_sub(offset).min(buf.len() as u64));
        path::about(self.nodes.read_at(self.node, &mut buf[..len], offset), &self.path)?;
        Ok(len)
    }

    /// Where its bytes lie on the device, and the records that speak of them.
    ///
    /// # Errors
    /// `Unsupported` if that is not known for this file system, or the file lies on several devices; the file system is
    /// damaged or the device failed.
    pub fn layout(&self) -> Result<Layout> {
        path::about(self.nodes.layout(self.node), &self.path)
    }

    /// All of it, if that is at most `max_bytes`.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at); `Unsupported` if it is larger.
    pub fn read_all(&self, max_bytes: u64) -> Result<Vec<u8>> {
        const PIECE: usize = 1 << 20;
        if self.size() > max_bytes {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: {} bytes, more than the {max_bytes} that are read",
                    self.path.display(),
                    self.size()
                ),
            ));
        }
        let (mut bytes, size) = (vec![], to_usize(self.size()));
        while bytes.len() < size {
            // Grown as the bytes come: a size is only a claim.
            let from = bytes.len();
            bytes.resize(size.min(from + PIECE), 0);
            self.read_at(&mut bytes[from..], from as u64)?;
        }
        Ok(bytes)
    }
}
