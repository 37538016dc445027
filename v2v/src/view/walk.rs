//! From a path of the guest to a place on a volume: names one by one, links followed, mounts crossed.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use block::{Error, ErrorKind, Result};
use guestdisk::detect::Kind;
use guestdisk::fs::FileKind;

use super::{GuestView, MountPoint, Place, mounts};

/// Symbolic links that are followed for one path: as many as Linux follows.
const MOST_LINKS: u32 = 40;
/// Names in one path, those that links bring included.
const MOST_NAMES: u32 = 4096;
/// Bytes of a path that is walked.
const MOST_BYTES: usize = 4096;
/// Directories that are remembered.
const MOST_DIRECTORIES: usize = 1 << 16;

/// What happens at the end of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    /// A symbolic link is followed.
    Follow,
    /// A symbolic link is what is wanted.
    Keep,
    /// It need not exist.
    New,
}

impl GuestView {
    pub(super) fn walk(&self, path: &Path, last: Last) -> Result<Place> {
        if path.as_os_str().len() > MOST_BYTES {
            return Err(Error::unsupported("a path that is longer than paths can be"));
        }
        let mut names: Vec<OsString> = names_of(path).collect();
        let mut real = PathBuf::from("/");
        let (mut links, mut steps) = (0, 0);
        while let Some(name) = names.pop() {
            steps += 1;
            if steps > MOST_NAMES || real.as_os_str().len() + name.len() > MOST_BYTES {
                return Err(about(path, "too far to go"));
            }
            if name == ".." {
                real.pop();
                continue;
            }
            let next = real.join(&name);
            let found = match self.kind_at(&next) {
                Ok(found) => found,
                Err(error) if error.kind() == ErrorKind::NotFound && last == Last::New => {
                    let new = names.iter().rev().fold(next, |path, name| path.join(name));
                    return self.place(&mounts::absolute(&new), true);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let message = format!("{}: no such file or directory", path.display());
                    return Err(Error::new(ErrorKind::NotFound, message));
                }
                Err(error) => return Err(error),
            };
            let Some(target) = found.filter(|_| !(names.is_empty() && last == Last::Keep)) else {
                real = next;
                continue;
            };
            links += 1;
            if links > MOST_LINKS {
                return Err(about(path, "too many symbolic links"));
            }
            if target.has_root() {
                real = PathBuf::from("/");
            }
            names.extend(names_of(&target));
        }
        self.place(&real, false)
    }

    /// The target, if there is a symbolic link at this path of the guest, in front of whose last name there is none.
    fn kind_at(&self, path: &Path) -> Result<Option<PathBuf>> {
        if self.directories.lock().contains(path) || self.mounts.iter().any(|mount| mount.path == path) {
            return Ok(None);
        }
        let (mount, inner) = self.split(path)?;
        let files = self.files(mount.volume, mount.from_top)?;
        match files.symlink_metadata(&inner)?.kind {
            FileKind::Symlink => files.read_link(&inner).map(Some),
            FileKind::Directory => {
                let mut known = self.directories.lock();
                if known.len() < MOST_DIRECTORIES {
                    known.insert(path.to_owned());
                }
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// The mount that a path without links lies in, and the path within its volume.
    fn split(&self, path: &Path) -> Result<(&MountPoint, PathBuf)> {
        let within = |mount: &MountPoint| Some(mount.folder.join(path.strip_prefix(&mount.path).ok()?));
        let found = self.mounts.iter().find_map(|mount| Some((mount, within(mount)?)));
        let (mount, inner) = found.ok_or_else(|| about(path, "not below the root"))?;
        // `join` leaves a slash behind where nothing is joined.
        Ok((mount, inner.components().collect()))
    }

    fn place(&self, path: &Path, is_new: bool) -> Result<Place> {
        let (mount, mut inner) = self.split(path)?;
        let files = self.files(mount.volume, mount.from_top)?;
        if !is_new && files.kind() == Kind::Vfat {
            // Whose names are the same in upper and lower case.
            inner = files.canonicalize(&inner)?;
        }
        let (volume, from_top) = (mount.volume, mount.from_top && files.kind() == Kind::Btrfs);
        Ok(Place { guest_path: path.to_owned(), volume, path: inner, from_top })
    }
}

fn about(path: &Path, what: &str) -> Error {
    Error::unsupported(format!("{}: {what}", path.display()))
}

/// The names of a path, the last first; `..` is one of them.
fn names_of(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().rev().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    })
}
