//! File systems that can be read but not written (XFS, btrfs): the bytes of files that are there, overwritten where they are.
//!
//! ```text
//!   InPlace    what can be done, and refusals for the rest     (this file)
//!    |
//!   Patch      contents, inode and checksums of one change     (patch)
//!    |
//!   guestdisk  where the bytes and the records that speak of them lie
//! ```
//!
//! A file may become shorter, and longer within the space that it has. XFS has no checksums of data, so that contents and
//! the inode with its own checksum are all there is to change. btrfs has: each sector's is changed in the tree of checksums,
//! and each block of a tree that is changed gets its own anew, in all of its copies. Nothing else moves: trees keep their
//! shape, and the transaction its number.
//!
//! Everything is found out and made up in memory before the first byte is written; then it is written at once, contents
//! first. Whoever interrupts that leaves a file that is half old and half new, or (btrfs) does not fit its checksums.

mod patch;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::detect::Kind;
use guestdisk::fs::{FileKind, FileSystem, Metadata};

use crate::GuestFs;
use crate::bytes::{be32, be64, le64};
use crate::types::{Attributes, Clock, DirEntry, Free, Stat};
use patch::Patch;

const HINT: &str = "Use the appliance backend for this file system.";

/// A file system whose files are overwritten where they are.
#[derive(Debug)]
pub(crate) struct InPlace {
    device: Arc<dyn BlockDevice>,
    fs: FileSystem,
    clock: Clock,
}

fn stat(found: &Metadata, node: u64) -> Stat {
    let Metadata { kind, mode, uid, gid, size, mtime, links } = *found;
    Stat { kind, mode, uid, gid, size, mtime, links, node }
}

impl InPlace {
    pub(crate) fn open(device: Arc<dyn BlockDevice>, clock: Clock) -> Result<Self> {
        let fs = FileSystem::open(Arc::clone(&device))?;
        if let Some(note) = fs.notes().first() {
            return Err(Error::unsupported(format!("it cannot be changed in place: {note}"))
                .hint("Start the guest once and shut it down properly, or use the appliance backend."));
        }
        Ok(Self { device, fs, clock })
    }

    fn refuse<T>(&self, path: &Path, what: &str) -> Result<T> {
        let kind = self.fs.kind();
        Err(Error::unsupported(format!("{}: {what} on {kind} without its own driver", path.display()))
            .hint(HINT))
    }

    /// What is known of a path, a link at its end not followed.
    fn existing(&self, path: &Path) -> Result<Metadata> {
        self.fs.symlink_metadata(path)
    }
}

impl GuestFs for InPlace {
    fn kind(&self) -> Kind {
        self.fs.kind()
    }

    fn backend(&self) -> &'static str {
        "in-place"
    }

    fn stat(&mut self, path: &Path) -> Result<Option<Stat>> {
        match self.existing(path) {
            Ok(found) => Ok(Some(stat(&found, 0))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, path: &Path, max: u64) -> Result<Vec<u8>> {
        match self.existing(path)?.kind {
            FileKind::File => self.fs.read(path, max),
            _ => Err(Error::usage(format!("{}: not a regular file", path.display()))),
        }
    }

    fn read_link(&mut self, path: &Path) -> Result<PathBuf> {
        self.fs.read_link(path)
    }

    fn list(&mut self, path: &Path) -> Result<Vec<DirEntry>> {
        if self.existing(path)?.kind != FileKind::Directory {
            return Err(Error::usage(format!("{}: not a directory", path.display())));
        }
        let entries = self.fs.read_dir(path)?.into_iter();
        Ok(entries.map(|entry| DirEntry { name: entry.name, kind: entry.kind }).collect())
    }

    fn replace(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        if self.existing(path)?.kind != FileKind::File {
            return Err(Error::usage(format!("{}: not a regular file", path.display())));
        }
        let file = self.fs.open_file(path)?;
        let (layout, size) = (file.layout()?, file.size());
        let about = || path.display().to_string();
        let patch = Patch::plan(&*self.device, self.fs.kind(), &layout, size, bytes, self.clock.now());
        patch.context(about)?.write(&*self.device).context(about)?;
        // What it has kept in memory may be old now.
        self.fs = FileSystem::open(Arc::clone(&self.device))?;
        Ok(())
    }

    fn create(&mut self, path: &Path, _bytes: &[u8], _like: &Attributes) -> Result<()> {
        self.refuse(path, "files cannot be made")
    }

    fn mkdir(&mut self, path: &Path, _like: &Attributes) -> Result<()> {
        self.refuse(path, "directories cannot be made")
    }

    fn symlink(&mut self, path: &Path, _target: &Path, _like: &Attributes) -> Result<()> {
        self.refuse(path, "links cannot be made")
    }

    fn remove(&mut self, path: &Path) -> Result<()> {
        self.refuse(path, "names cannot be removed")
    }

    fn xattr(&mut self, path: &Path, _name: &str) -> Result<Option<Vec<u8>>> {
        self.refuse(path, "extended attributes cannot be read")
    }

    /// By the word of the superblock.
    fn free(&mut self) -> Result<Free> {
        if self.fs.kind() == Kind::Xfs {
            let mut raw = [0; 512];
            self.device.read_at(&mut raw, 0)?;
            let bytes = be64(&raw, 144).saturating_mul(be32(&raw, 4).into());
            return Ok(Free { bytes, inodes: None });
        }
        let mut raw = [0; 4096];
        self.device.read_at(&mut raw, 0x1_0000)?;
        Ok(Free { bytes: le64(&raw, 0x70).saturating_sub(le64(&raw, 0x78)), inodes: None })
    }

    fn sync(&mut self) -> Result<()> {
        self.device.flush()
    }
}
