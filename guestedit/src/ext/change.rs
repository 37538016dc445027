//! The operations.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::detect::Kind;
use guestdisk::fs::FileKind;

use super::Ext;
use super::dir::check_name;
use super::inode::{BLOCK_FIELD_BYTES, Inode};
use super::path::{MOST_LINK, not_found};
use super::volume::Volume;
use crate::GuestFs;
use crate::bytes::{copy_to, low16};
use crate::types::{Attributes, DirEntry, Free, Stat};

/// Names that a directory can have by subdirectories; with dir_nlink 1 means that there are more.
const MOST_LINKS: u16 = 65_000;

const FILE: u16 = 0x8000;
const DIRECTORY: u16 = 0x4000;
const LINK: u16 = 0xa000;

fn about<T>(result: Result<T>, path: &Path) -> Result<T> {
    result.context(|| path.display().to_string())
}

impl Volume {
    fn replace(&mut self, path: &Path, bytes: &[u8], in_place: bool) -> Result<()> {
        let mut inode = self.existing(path)?;
        if inode.kind() != FileKind::File {
            return Err(Error::usage("not a regular file"));
        }
        inode.check_writable()?;
        self.drop_inline(&mut inode)?;
        if in_place {
            self.write_contents_in_place(&mut inode, bytes)?;
        } else {
            self.write_contents(&mut inode, bytes)?;
        }
        inode.touch(self.clock.now());
        self.store(&mut inode)
    }

    /// A new inode with a name, for which `fill` makes the contents.
    fn make(
        &mut self,
        path: &Path,
        kind: u16,
        like: &Attributes,
        fill: impl FnOnce(&mut Self, &mut Inode, &Inode) -> Result<()>,
    ) -> Result<()> {
        let (mut dir, name) = self.parent(path)?;
        check_name(&name)?;
        dir.check_directory()?;
        if self.lookup(&dir, &name)?.is_some() {
            return Err(Error::usage("there is something of this name already"));
        }
        let number = self.take_inode(self.group_of(dir.number), kind == DIRECTORY)?;
        let mode = kind | low16(like.mode) & 0o7777;
        let mut inode = Inode::create(number, self.geometry.inode_bytes, mode, like, self.clock.now());
        inode.inherit(&dir, self.geometry.has_project());
        self.set_attributes(&mut inode, &like.xattrs)?;
        fill(self, &mut inode, &dir)?;
        self.store(&mut inode)?;
        if kind == DIRECTORY {
            self.count_link(&mut dir, true)?;
        }
        self.add_name(&mut dir, &name, number, inode.kind())
    }

    /// A directory has got a subdirectory more or less.
    fn count_link(&self, dir: &mut Inode, more: bool) -> Result<()> {
        let links = match (dir.links(), more) {
            // There are more than can be counted.
            (1, _) if self.geometry.has_dir_nlink() => 1,
            (links, true) if links >= MOST_LINKS - 1 => {
                if !self.geometry.has_dir_nlink() {
                    return Err(Error::unsupported(format!("a directory with {links} subdirectories")));
                }
                1
            }
            (links, true) => links + 1,
            (links, false) => links.saturating_sub(1).max(2),
        };
        dir.set_links(links);
        Ok(())
    }

    fn create(&mut self, path: &Path, bytes: &[u8], like: &Attributes) -> Result<()> {
        self.make(path, FILE, like, |volume, inode, _| {
            inode.clear_map(volume.geometry.has_extents());
            volume.write_contents(inode, bytes)
        })
    }

    fn mkdir(&mut self, path: &Path, like: &Attributes) -> Result<()> {
        self.make(path, DIRECTORY, like, |volume, inode, dir| {
            inode.set_links(2);
            inode.clear_map(volume.geometry.has_extents());
            volume.first_block(inode, dir.number)
        })
    }

    fn symlink(&mut self, path: &Path, target: &[u8], like: &Attributes) -> Result<()> {
        let room = MOST_LINK.min(self.geometry.block) - 1;
        if target.is_empty() || target.len() as u64 > room || target.contains(&0) {
            return Err(Error::usage(format!("a symbolic link of {} bytes ({room} fit)", target.len())));
        }
        let like = Attributes { mode: 0o777, ..like.clone() };
        self.make(path, LINK, &like, |volume, inode, _| {
            if target.len() < BLOCK_FIELD_BYTES {
                copy_to(inode.block_field_mut(), 0, target);
                inode.set_size(target.len() as u64);
                let blocks = u64::from(inode.attribute_block() != 0);
                return inode.set_blocks(blocks, volume.geometry.block, volume.geometry.has_huge_files());
            }
            // A link without a map of extents has to be long to be known as one with blocks.
            inode.set_size(target.len() as u64);
            inode.clear_map(volume.geometry.has_extents());
            volume.write_contents(inode, target)
        })
    }

    fn remove(&mut self, path: &Path) -> Result<()> {
        let (mut dir, name) = self.parent(path)?;
        check_name(&name)?;
        let found = self.lookup(&dir, &name)?.ok_or_else(not_found)?;
        let mut inode = self.inode(found.inode)?;
        let directory = inode.kind() == FileKind::Directory;
        if directory && !self.is_empty(&inode)? {
            return Err(Error::usage("the directory is not empty"));
        }
        if inode.number < self.geometry.first_inode {
            return Err(Error::usage("it belongs to the file system itself"));
        }
        if directory {
            self.count_link(&mut dir, false)?;
        }
        self.remove_name(&mut dir, found, &name)?;
        if directory || inode.links() <= 1 {
            return self.drop_inode(&inode);
        }
        inode.set_links(inode.links() - 1);
        inode.changed(self.clock.now());
        self.store(&mut inode)
    }
}

impl GuestFs for Ext {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn backend(&self) -> &'static str {
        "ext"
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn stat(&mut self, path: &Path) -> Result<Option<Stat>> {
        self.volume.begin();
        Ok(about(self.volume.find(path, false), path)?.map(|inode| inode.stat()))
    }

    fn read(&mut self, path: &Path, max: u64) -> Result<Vec<u8>> {
        self.volume.begin();
        let mut read = || {
            let inode = self.volume.existing(path)?;
            match inode.kind() {
                FileKind::File => self.volume.contents(&inode, max),
                _ => Err(Error::usage("not a regular file")),
            }
        };
        about(read(), path)
    }

    fn read_link(&mut self, path: &Path) -> Result<PathBuf> {
        self.volume.begin();
        let mut read = || {
            let inode = self.volume.existing(path)?;
            match inode.kind() {
                FileKind::Symlink => self.volume.contents(&inode, MOST_LINK),
                _ => Err(Error::usage("not a symbolic link")),
            }
        };
        about(read(), path).map(|target| OsString::from_vec(target).into())
    }

    fn list(&mut self, path: &Path) -> Result<Vec<DirEntry>> {
        self.volume.begin();
        let mut list = || {
            let inode = self.volume.existing(path)?;
            match inode.kind() {
                FileKind::Directory => self.volume.names(&inode),
                _ => Err(Error::usage("not a directory")),
            }
        };
        let names = about(list(), path)?;
        Ok(names.into_iter().map(|(name, kind)| DirEntry { name: OsString::from_vec(name), kind }).collect())
    }

    fn replace(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut result = self.change(|volume| volume.replace(path, bytes, false));
        if matches!(&result, Err(error) if error.kind() == ErrorKind::NoSpace) {
            // There may be room if the old blocks are used again.
            result = self.change(|volume| volume.replace(path, bytes, true));
        }
        about(result, path)
    }

    fn create(&mut self, path: &Path, bytes: &[u8], like: &Attributes) -> Result<()> {
        about(self.change(|volume| volume.create(path, bytes, like)), path)
    }

    fn mkdir(&mut self, path: &Path, like: &Attributes) -> Result<()> {
        about(self.change(|volume| volume.mkdir(path, like)), path)
    }

    fn symlink(&mut self, path: &Path, target: &Path, like: &Attributes) -> Result<()> {
        let target = target.as_os_str().as_bytes();
        about(self.change(|volume| volume.symlink(path, target, like)), path)
    }

    fn remove(&mut self, path: &Path) -> Result<()> {
        about(self.change(|volume| volume.remove(path)), path)
    }

    fn xattr(&mut self, path: &Path, name: &str) -> Result<Option<Vec<u8>>> {
        self.volume.begin();
        let mut read = || {
            let inode = self.volume.existing(path)?;
            self.volume.attribute(&inode, name.as_bytes())
        };
        about(read(), path)
    }

    fn free(&mut self) -> Result<Free> {
        let (blocks, inodes) = self.volume.free_counts()?;
        let (given_blocks, given_inodes) = self.volume.given_back();
        Ok(Free {
            bytes: blocks.saturating_add(given_blocks).saturating_mul(self.volume.geometry.block),
            inodes: Some(inodes.saturating_add(given_inodes)),
        })
    }

    fn sync(&mut self) -> Result<()> {
        self.write()
    }
}
