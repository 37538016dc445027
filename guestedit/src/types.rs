//! What is told of files, and what new ones are given.

use std::ffi::OsString;
use std::time::{SystemTime, UNIX_EPOCH};

use guestdisk::fs::FileKind;

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes; of a directory, whatever the file system says.
    pub size: u64,
    /// Last change of the contents, in seconds since 1970 UTC.
    pub mtime: i64,
    /// Names that it has.
    pub links: u32,
    /// The inode number, or what the file system has in its place.
    pub node: u64,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, without any path.
    pub name: OsString,
    /// What it is; [`FileKind::Unknown`] where only [`stat`](crate::GuestFs::stat) knows.
    pub kind: FileKind,
}

/// What a new file is given. Most often that of a sibling.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permission bits (07777).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the contents, in seconds since 1970 UTC; `None`: the time of the operation.
    pub mtime: Option<i64>,
    /// Extended attributes, by their full names (`security.selinux`).
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    /// With these permission bits, owned by the superuser.
    pub fn mode(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }

    /// With the mode and owner of a file that is there.
    pub fn like(stat: &Stat) -> Self {
        Self { mode: stat.mode, uid: stat.uid, gid: stat.gid, mtime: None, xattrs: vec![] }
    }
}

/// How much room a file system has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Bytes in free blocks, those included that are reserved for the superuser.
    pub bytes: u64,
    /// Files that can be made; `None` if nothing but space limits them.
    pub inodes: Option<u64>,
}

/// The time of changes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Option<i64>);

impl Clock {
    pub(crate) fn new(fixed: Option<i64>) -> Self {
        Self(fixed)
    }

    /// Seconds since 1970 UTC.
    pub(crate) fn now(self) -> i64 {
        self.0.unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        })
    }
}
