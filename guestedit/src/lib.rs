//! Changes files in the file systems of guests without mounting them.
//!
//! ```text
//!   open(device)                  finds out what the device holds, and how that can be changed
//!      |
//!   GuestFs                       stat, read, list, replace, create, mkdir, symlink, remove, sync
//!      |
//!      |-- ext       ext2, ext3, ext4: everything
//!      |-- fat       FAT12, FAT16, FAT32: everything that FAT has
//!      '-- in-place  XFS, btrfs: the bytes of files that are there, within the space that they have
//! ```
//!
//! An operation happens as a whole or not at all: its changes are made in memory first, and one that fails (because the
//! disk is full, or damaged) leaves nothing behind. They reach the device with [`GuestFs::sync`] (or earlier if there
//! are many), in an order in which whatever interrupts it costs space at worst. Only the contents of new files are
//! written at once, to space that is free until then. (In place, where nothing can be moved, files are overwritten at
//! once.) Dropping a [`GuestFs`] without a sync drops the changes.
//!
//! A guest's disk is a stranger's: every number is checked before it is followed, and damage is an error.
#![forbid(unsafe_code)]

mod bytes;
mod crc;
mod ext;
mod fat;
mod in_place;
mod staged;
mod types;

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BlockDevice, Error, Result, ResultExt as _};
use guestdisk::detect::{self, Kind};

pub use guestdisk::fs::FileKind;
pub use types::{Attributes, DirEntry, Free, Stat};

/// A guest's file system that can be changed.
///
/// Paths are absolute within the file system. Symbolic links in the parent directories are followed within it, as if it
/// were mounted at the root; a link at the end of a path is not.
///
/// # Errors
/// All operations: `NotFound` if a parent directory is missing or is none; `Corrupt` if the file system is damaged where
/// it had to be looked at; `Unsupported` for what this backend cannot do, the reason in the message and what can in
/// the hint; `NoSpace` if the file system is full; whatever the device says.
pub trait GuestFs: Debug + Send {
    /// Which file system it is.
    fn kind(&self) -> Kind;

    /// How it is changed: `ext`, `fat`, `in-place`, `appliance` or `mount`.
    fn backend(&self) -> &'static str;

    /// What a person should know of its state: a journal that has been replayed, for example.
    fn notes(&self) -> Vec<String> {
        vec![]
    }

    /// What is known of a path. `None`: there is nothing of this name (or no directory on the way to it).
    ///
    /// # Errors
    /// See [`GuestFs`].
    fn stat(&mut self, path: &Path) -> Result<Option<Stat>>;

    /// The contents of a regular file of at most `max` bytes.
    ///
    /// # Errors
    /// See [`GuestFs`]; `NotFound`; `Usage` if it is no regular file; `Unsupported` if it is larger.
    fn read(&mut self, path: &Path, max: u64) -> Result<Vec<u8>>;

    /// What a symbolic link holds.
    ///
    /// # Errors
    /// See [`GuestFs`]; `NotFound`; `Usage` if it is no symbolic link.
    fn read_link(&mut self, path: &Path) -> Result<PathBuf>;

    /// The names in a directory, without `.` and `..`, in the order of the disk.
    ///
    /// # Errors
    /// See [`GuestFs`]; `NotFound`; `Usage` if it is no directory.
    fn list(&mut self, path: &Path) -> Result<Vec<DirEntry>>;

    /// Gives an existing regular file new contents. It keeps its inode, links, owner, mode, extended attributes and
    /// times other than those of the change.
    ///
    /// # Errors
    /// See [`GuestFs`]; `NotFound`; `Usage` if it is no regular file.
    fn replace(&mut self, path: &Path, bytes: &[u8]) -> Result<()>;

    /// Makes a regular file that was not there. Its parent directory must exist.
    ///
    /// # Errors
    /// See [`GuestFs`]; `Usage` if there is something of this name already.
    fn create(&mut self, path: &Path, bytes: &[u8], like: &Attributes) -> Result<()>;

    /// Makes a directory that was not there. Its parent directory must exist.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    fn mkdir(&mut self, path: &Path, like: &Attributes) -> Result<()>;

    /// Makes a symbolic link that was not there. Its mode is always 0777.
    ///
    /// # Errors
    /// As [`create`](Self::create); `Usage` if the target is empty or longer than links can be.
    fn symlink(&mut self, path: &Path, target: &Path, like: &Attributes) -> Result<()>;

    /// Removes a name: of a file, a link, a device, or an empty directory.
    ///
    /// # Errors
    /// See [`GuestFs`]; `NotFound`; `Usage` if it is a directory that is not empty.
    fn remove(&mut self, path: &Path) -> Result<()>;

    /// The value of an extended attribute (`security.selinux`); `None` if there is none.
    ///
    /// # Errors
    /// See [`GuestFs`]; `NotFound` if there is nothing of this path.
    fn xattr(&mut self, path: &Path, name: &str) -> Result<Option<Vec<u8>>>;

    /// How much room there is. What [`sync`](Self::sync) will give back counts.
    ///
    /// # Errors
    /// See [`GuestFs`].
    fn free(&mut self) -> Result<Free>;

    /// Brings all changes to the device, durably. The file system on it is consistent then.
    ///
    /// # Errors
    /// The device failed: nothing is promised about the file system on it then, but it may be tried again.
    fn sync(&mut self) -> Result<()>;
}

/// How a file system is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The time of all changes, in seconds since 1970 UTC; `None`: now.
    pub time: Option<i64>,
}

/// Opens what a device holds, to be changed. A journal that was not finished is brought to its end, on the device.
///
/// # Errors
/// `ReadOnly` if the device is; `Unsupported` if it holds no file system that can be changed here, or one in a state or
/// with features that forbid it, with the reason and a hint; `Corrupt` if it contradicts itself; the device failed.
pub fn open(device: Arc<dyn BlockDevice>, options: &Options) -> Result<Box<dyn GuestFs>> {
    if device.read_only() {
        return Err(Error::read_only());
    }
    let Some(found) = detect::detect(&*device)? else {
        return Err(Error::unsupported("no file system that is known here"));
    };
    let clock = types::Clock::new(options.time);
    match found.kind {
        Kind::Ext2 | Kind::Ext3 | Kind::Ext4 => Ok(Box::new(ext::Ext::open(device, found.kind, clock)?)),
        Kind::Vfat => Ok(Box::new(fat::Fat::open(device, clock)?)),
        Kind::Xfs | Kind::Btrfs => Ok(Box::new(in_place::InPlace::open(device, clock)?)),
        kind @ (Kind::Swap | Kind::Lvm2 | Kind::Luks | Kind::LinuxRaid | Kind::BitLocker) => {
            Err(Error::unsupported(format!("{kind} is not a file system")))
        }
        kind => Err(Error::unsupported(format!("{kind} cannot be changed without its own driver"))
            .hint("Use the appliance backend for this file system.")),
    }
}

/// Opens the file system of a volume, to be changed.
///
/// # Errors
/// As [`open`], with the volume's place in front.
pub fn open_volume(volume: &guestdisk::Volume, options: &Options) -> Result<Box<dyn GuestFs>> {
    open(Arc::clone(&volume.device), options).context(|| volume.location.to_string())
}
