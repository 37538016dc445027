//! From paths to inodes: names are looked up one by one, symbolic links followed, with limits to both.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path};

use block::{Error, ErrorKind, Result};
use guestdisk::fs::FileKind;

use super::inode::Inode;
use super::volume::Volume;

/// The inode of the root directory.
const ROOT: u64 = 2;
/// Symbolic links that are followed for one path: as many as Linux follows.
const MOST_LINKS: u32 = 40;
/// Names in one path, those that links bring included.
const MOST_NAMES: u32 = 4096;
/// The most bytes of a symbolic link.
pub(super) const MOST_LINK: u64 = 4096;

pub(super) fn not_found() -> Error {
    Error::new(ErrorKind::NotFound, "no such file or directory")
}

impl Volume {
    /// Where a path leads; a link at its end is followed if `last` says so. `None`: there is nothing.
    pub(super) fn find(&mut self, path: &Path, last: bool) -> Result<Option<Inode>> {
        let mut names: Vec<OsString> = names_of(path).collect();
        let mut way = vec![self.inode(ROOT)?];
        let (mut links, mut steps) = (0, 0);
        while let Some(name) = names.pop() {
            steps += 1;
            if steps > MOST_NAMES {
                return Err(Error::unsupported("too far to go"));
            }
            if name == ".." {
                way.truncate(way.len().saturating_sub(1).max(1));
                continue;
            }
            let Some(here) = way.last().filter(|here| here.kind() == FileKind::Directory).cloned() else {
                return Ok(None);
            };
            let Some(found) = self.lookup(&here, name.as_bytes())? else { return Ok(None) };
            let inode = self.inode(found.inode)?;
            if inode.kind() != FileKind::Symlink || names.is_empty() && !last {
                way.push(inode);
                continue;
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(Error::unsupported("too many symbolic links"));
            }
            let target = self.contents(&inode, MOST_LINK)?;
            let target = Path::new(OsStr::from_bytes(&target));
            if target.has_root() {
                way.truncate(1);
            }
            names.extend(names_of(target));
        }
        Ok(way.pop())
    }

    /// The inode of a path.
    pub(super) fn existing(&mut self, path: &Path) -> Result<Inode> {
        self.find(path, false)?.ok_or_else(not_found)
    }

    /// The directory of a path, and the name in it.
    pub(super) fn parent(&mut self, path: &Path) -> Result<(Inode, Vec<u8>)> {
        let name = path.file_name().ok_or_else(|| Error::usage("a path that does not end with a name"))?;
        let parent = path.parent().unwrap_or(Path::new("/"));
        let dir = self.find(parent, true)?.ok_or_else(not_found)?;
        if dir.kind() != FileKind::Directory {
            return Err(Error::new(ErrorKind::NotFound, "its parent is not a directory"));
        }
        Ok((dir, name.as_bytes().to_vec()))
    }
}

/// The names of a path, the last first; `..` is one of them.
fn names_of(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().rev().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    })
}
