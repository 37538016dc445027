//! The files of a guest as its processes see them: several volumes, mounted into one tree.
//!
//! ```text
//!   /boot/grub/grub.cfg          what the guest says                 view.read("/boot/grub/grub.cfg", max)
//!        |  mounts, links
//!   volume 1, /grub/grub.cfg     where the bytes are                 view.locate("/boot/grub/grub.cfg")
//! ```
//!
//! Symbolic links are followed across mounts and never out of the guest. What is found costs bounded time: paths have a
//! limit of names and links, and the file systems together one of pages that are read.

mod mounts;
mod volume;
mod walk;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result};
use guestdisk::boot::BootFile;
use guestdisk::fs::{DirEntry, File, FileSystem, Metadata};
use guestdisk::{Disks, Location};
use parking_lot::Mutex;

use crate::inspect::System;
use crate::names::DiskNames;
pub use mounts::MountPoint;
use volume::VolumeFiles;

/// Pages that may be read of all file systems together before nothing is looked for any more.
const MOST_WORK: u64 = 16 << 20;

/// The most names of a directory that are gone through.
const MOST_NAMES: usize = 4096;

/// The most bytes of a configuration file that are read as text.
pub const MOST_TEXT: u64 = 1 << 20;

/// The tree of a guest.
#[derive(Debug)]
pub struct GuestView {
    volumes: Vec<VolumeFiles>,
    /// The longest paths first, so that the first that fits is the right one.
    mounts: Vec<MountPoint>,
    /// Paths of the guest that are known to be directories.
    directories: Mutex<HashSet<PathBuf>>,
    /// Pages that may be read.
    most_work: u64,
}

/// Where a file of the guest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The path as the guest sees it, without symbolic links.
    pub guest_path: PathBuf,
    /// The volume (index in [`Disks::volumes`]).
    pub volume: usize,
    /// The path within that volume, with a leading slash and without symbolic links.
    pub path: PathBuf,
    /// The path counts from the top of a btrfs ([`FileSystem::open_top`]) rather than from its default subvolume
    /// ([`guestdisk::Volume::file_system`]).
    pub from_top: bool,
}

impl GuestView {
    /// The tree of a system, with what its fstab mounts.
    pub fn new(disks: &Disks, system: &System) -> Self {
        Self::with_names(disks, system, &DiskNames::default())
    }

    /// The same, where the names of disks in fstab have been found out.
    pub fn with_names(disks: &Disks, system: &System, names: &DiskNames) -> Self {
        let mut view = Self::of_volume(disks, system.root);
        let from_top =
            !view.volumes.get(system.root).is_some_and(|volume| volume.has(&system.subvolume, false));
        if let Some(root) = view.mounts.first_mut() {
            root.folder = mounts::absolute(&system.subvolume);
            root.from_top = from_top;
        }
        view.mount_all(disks, system, names);
        view
    }

    /// One volume as a tree of its own, without mounts. It has no files if the volume holds no file system that is read.
    pub fn of_volume(disks: &Disks, volume: usize) -> Self {
        let root =
            MountPoint { path: PathBuf::from("/"), volume, folder: PathBuf::from("/"), from_top: false };
        Self {
            volumes: disks.volumes().iter().map(VolumeFiles::new).collect(),
            mounts: vec![root],
            directories: Mutex::default(),
            most_work: MOST_WORK,
        }
    }

    /// The same for a caller who wants as many bytes as there are, and can be interrupted.
    #[must_use]
    pub fn without_limit(self) -> Self {
        Self { most_work: u64::MAX, ..self }
    }

    /// What is mounted where, the longest paths first, the root last.
    pub fn mounts(&self) -> &[MountPoint] {
        &self.mounts
    }

    /// Where a path of the guest leads, all links followed.
    ///
    /// # Errors
    /// `NotFound`; too many links; a file system cannot be read or is damaged; a device failed.
    pub fn locate(&self, path: impl AsRef<Path>) -> Result<Place> {
        self.walk(path.as_ref(), walk::Last::Follow)
    }

    /// The same, but for a symbolic link at the end of the path, which is what is located then.
    ///
    /// # Errors
    /// As [`locate`](Self::locate).
    pub fn locate_link(&self, path: impl AsRef<Path>) -> Result<Place> {
        self.walk(path.as_ref(), walk::Last::Keep)
    }

    /// Where a file of this path would be made: links of folders that exist are followed, and names that do not exist are
    /// taken as they are.
    ///
    /// # Errors
    /// As [`locate`](Self::locate), but for `NotFound`.
    pub fn locate_new(&self, path: impl AsRef<Path>) -> Result<Place> {
        self.walk(path.as_ref(), walk::Last::New)
    }

    /// What the guest calls a file of one of its volumes, if it has that volume mounted. The path may count from the default
    /// subvolume or the top.
    pub fn guest_path(&self, volume: usize, path: impl AsRef<Path>) -> Option<PathBuf> {
        let path = mounts::absolute(path.as_ref());
        let of_volume = self.mounts.iter().filter(|mount| mount.volume == volume);
        let within = of_volume.filter_map(|mount| Some((mount, path.strip_prefix(&mount.folder).ok()?)));
        // The deepest folder that holds it.
        let (mount, rest) = within.max_by_key(|(mount, _)| mount.folder.as_os_str().len())?;
        Some(if rest.as_os_str().is_empty() { mount.path.clone() } else { mount.path.join(rest) })
    }

    /// A file as boot loaders name files.
    pub fn boot_file(&self, place: &Place) -> BootFile {
        let location = self.volumes.get(place.volume).map(|volume| volume.location.clone());
        let location = location.unwrap_or(Location::Whole { disk: 0 });
        BootFile { volume: place.volume, location, path: place.path.clone(), section: None }
    }

    /// A file that a boot loader names, without symbolic links. Its path may count from the default subvolume or the top.
    ///
    /// # Errors
    /// As [`locate`](Self::locate).
    pub fn place_of(&self, file: &BootFile) -> Result<Place> {
        let volume = self.volume(file.volume)?;
        let from_top = !volume.has(&file.path, false) && volume.has(&file.path, true);
        let path = volume.files(from_top)?.canonicalize(&file.path)?;
        let below_default = if from_top { volume.below_default(&path) } else { None };
        let (path, from_top) = below_default.map_or((path, from_top), |path| (path, false));
        let guest_path = self.guest_path(file.volume, &path).unwrap_or_else(|| path.clone());
        Ok(Place { guest_path, volume: file.volume, path, from_top })
    }

    /// The file system that a place is on.
    ///
    /// # Errors
    /// It cannot be read, or was read too much already.
    pub fn file_system(&self, place: &Place) -> Result<&FileSystem> {
        self.files(place.volume, place.from_top)
    }

    /// What is known of a path, the target of a symbolic link.
    ///
    /// # Errors
    /// As [`locate`](Self::locate).
    pub fn metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        let place = self.locate(path)?;
        self.file_system(&place)?.symlink_metadata(&place.path)
    }

    /// What is known of a path, the symbolic link itself.
    ///
    /// # Errors
    /// As [`locate`](Self::locate).
    pub fn symlink_metadata(&self, path: impl AsRef<Path>) -> Result<Metadata> {
        let place = self.locate_link(path)?;
        self.file_system(&place)?.symlink_metadata(&place.path)
    }

    /// Whether there is something of this name. Damage counts as absence.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.locate(path).is_ok()
    }

    /// What a symbolic link holds.
    ///
    /// # Errors
    /// As [`locate`](Self::locate); not a symbolic link.
    pub fn read_link(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let place = self.locate_link(path)?;
        self.file_system(&place)?.read_link(&place.path)
    }

    /// The names in a directory, without `.` and `..`, sorted.
    ///
    /// # Errors
    /// As [`locate`](Self::locate); not a directory; more than a million names.
    pub fn read_dir(&self, path: impl AsRef<Path>) -> Result<Vec<DirEntry>> {
        let place = self.locate(path)?;
        let mut entries = self.file_system(&place)?.read_dir(&place.path)?;
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    /// The names in a directory that are valid UTF-8, sorted, at most 4096 of them; none if it cannot be read.
    pub fn names_in(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = self.read_dir(path).unwrap_or_default();
        entries.into_iter().filter_map(|entry| entry.name.into_string().ok()).take(MOST_NAMES).collect()
    }

    /// The contents of a file of at most `max_bytes`.
    ///
    /// # Errors
    /// As [`locate`](Self::locate); not a regular file; `Unsupported` if it is larger.
    pub fn read(&self, path: impl AsRef<Path>, max_bytes: u64) -> Result<Vec<u8>> {
        let place = self.locate(path)?;
        self.file_system(&place)?.read(&place.path, max_bytes)
    }

    /// A configuration file as text, what is not UTF-8 replaced; `None` if it is not there, cannot be read, or is larger
    /// than [`MOST_TEXT`].
    pub fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        let bytes = self.read(path, MOST_TEXT).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file at a place, to be read at any offset.
    ///
    /// # Errors
    /// Not a regular file, or it cannot be read.
    pub fn open(&self, place: &Place) -> Result<File<'_>> {
        self.file_system(place)?.open_file(&place.path)
    }

    /// How much has been read of all file systems, in pages: see [`FileSystem::work`].
    pub fn work(&self) -> u64 {
        self.volumes.iter().map(VolumeFiles::work).sum()
    }

    /// What is to be known of the state of a volume's file system ([`FileSystem::notes`]): with notes, what is not there may
    /// be all the same for the guest.
    pub fn notes(&self, volume: usize) -> &[String] {
        let files = self.volumes.get(volume).and_then(|volume| volume.files(false).ok());
        files.map(FileSystem::notes).unwrap_or_default()
    }

    fn volume(&self, index: usize) -> Result<&VolumeFiles> {
        let missing = || Error::new(ErrorKind::NotFound, format!("this guest has no volume {index}"));
        self.volumes.get(index).ok_or_else(missing)
    }

    fn files(&self, volume: usize, from_top: bool) -> Result<&FileSystem> {
        if self.work() > self.most_work {
            return Err(Error::unsupported("the file systems take too long to read"));
        }
        self.volume(volume)?.files(from_top)
    }
}
