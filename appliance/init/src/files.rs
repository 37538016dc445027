//! What is done in a mounted file system. Runs in a thread whose root that file system is.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions, Permissions};
use std::io::{Error, ErrorKind, Result, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
    PermissionsExt as _, fchown, lchown, symlink,
};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::serve::{Answer, DONE};
use crate::wire::{Action, Listing, Maybe, Message as _, Names, PIECE, Room, WireAttributes, WireStat};
use crate::{during, run, sys};

/// Bytes of names in one listing.
const LISTING_BYTES: usize = 4 << 20;

/// What is known between requests.
#[derive(Debug)]
pub(crate) struct Files {
    /// The file system has its own idea of owners and permissions, or none: they are not set.
    foreign: bool,
    open: Option<(PathBuf, File)>,
}

impl Files {
    /// For a file system that the kernel knows as `kind`.
    pub(crate) fn new(kind: &str) -> Self {
        let foreign = matches!(kind, "vfat" | "msdos" | "exfat" | "ntfs3" | "ntfs" | "hfsplus");
        Self { foreign, open: None }
    }

    /// Does it.
    pub(crate) fn act(&mut self, path: &[u8], action: Action) -> Answer {
        let path = rooted(path)?;
        match action {
            Action::Stat { follow } => Ok(stat(&path, follow)?.encode()),
            Action::ReadLink => Ok(fs::read_link(&path)?.as_os_str().as_bytes().to_vec()),
            Action::Read { offset, len } => Ok(read(&path, offset, len)?),
            Action::List { skip } => Ok(list(&path, skip)?.encode()),
            Action::Open { create } => self.begin(path, create),
            Action::Append { bytes } => {
                self.opened()?.write_all(&bytes)?;
                Ok(DONE)
            }
            Action::Close { attributes } => self.finish(attributes.as_ref()),
            Action::MakeDirectory { attributes } => {
                DirBuilder::new().mode(0o700).create(&path)?;
                self.dress(&path, &File::open(&path)?, &attributes)?;
                Ok(DONE)
            }
            Action::Symlink { target, attributes } => {
                symlink(OsStr::from_bytes(&target), &path)?;
                if !self.foreign {
                    lchown(&path, Some(attributes.uid), Some(attributes.gid)).map_err(during("owner"))?;
                    set_xattrs(&path, &attributes)?;
                }
                Ok(DONE)
            }
            Action::Remove => {
                let is_directory = fs::symlink_metadata(&path)?.is_dir();
                if is_directory {
                    fs::remove_dir(&path)?;
                } else {
                    fs::remove_file(&path)?;
                }
                Ok(DONE)
            }
            Action::GetXattr { name } => Ok(Maybe(get_xattr(&path, &name)?).encode()),
            Action::ListXattrs => match sys::list_xattrs(&path) {
                Err(error) if error.raw_os_error() == Some(sys::EOPNOTSUPP) => Ok(Names(vec![]).encode()),
                names => Ok(Names(names?).encode()),
            },
            Action::SetXattr { name, value } => {
                sys::set_xattr(&path, &name, &value)?;
                Ok(DONE)
            }
            Action::Free => Ok(room()?.encode()),
            Action::Sync => {
                sys::sync_file_system(&File::open("/")?)?;
                Ok(DONE)
            }
            Action::Run { words, environment, limit_seconds } => {
                Ok(run::run(&words, &environment, Duration::from_secs(limit_seconds))?.encode())
            }
        }
    }

    fn begin(&mut self, path: PathBuf, create: bool) -> Answer {
        self.open = None;
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(sys::O_NONBLOCK).mode(0o600).create_new(create);
        let file = options.open(&path)?;
        if !file.metadata()?.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, "not a regular file").into());
        }
        file.set_len(0)?;
        self.open = Some((path, file));
        Ok(DONE)
    }

    fn opened(&mut self) -> Result<&mut File> {
        let none = || Error::new(ErrorKind::InvalidInput, "no file is open");
        self.open.as_mut().map(|(_, file)| file).ok_or_else(none)
    }

    fn finish(&mut self, attributes: Option<&WireAttributes>) -> Answer {
        self.opened()?;
        let open = self.open.take();
        if let (Some((path, file)), Some(attributes)) = (open, attributes) {
            self.dress(&path, &file, attributes)?;
        }
        Ok(DONE)
    }

    /// Gives a new file or directory its attributes: the owner first, for that takes permissions away; time last.
    fn dress(&self, path: &Path, file: &File, attributes: &WireAttributes) -> Result<()> {
        if !self.foreign {
            fchown(file, Some(attributes.uid), Some(attributes.gid)).map_err(during("owner"))?;
            let permissions = Permissions::from_mode(attributes.mode & 0o7777);
            file.set_permissions(permissions).map_err(during("permissions"))?;
            set_xattrs(path, attributes)?;
        }
        if let Some(mtime) = attributes.mtime.and_then(moment) {
            file.set_times(FileTimes::new().set_modified(mtime)).map_err(during("time"))?;
        }
        Ok(())
    }
}

fn set_xattrs(path: &Path, attributes: &WireAttributes) -> Result<()> {
    attributes.xattrs.iter().try_for_each(|(name, value)| {
        let what = || format!("attribute {}", String::from_utf8_lossy(name));
        sys::set_xattr(path, name, value).map_err(during(what()))
    })
}

/// The path from the root, `..` and all: the kernel resolves it within this thread's root.
fn rooted(path: &[u8]) -> Result<PathBuf> {
    if path.contains(&0) {
        return Err(Error::new(ErrorKind::InvalidInput, "a path with a zero byte"));
    }
    let path = Path::new(OsStr::from_bytes(path));
    let inner =
        path.components().filter(|component| !matches!(component, Component::RootDir | Component::CurDir));
    Ok(Path::new("/").join(inner.collect::<PathBuf>()))
}

fn stat(path: &Path, follow: bool) -> Result<WireStat> {
    let found = if follow { fs::metadata(path)? } else { fs::symlink_metadata(path)? };
    Ok(WireStat {
        mode: found.mode(),
        uid: found.uid(),
        gid: found.gid(),
        size: found.size(),
        mtime: found.mtime(),
        links: found.nlink(),
        inode: found.ino(),
    })
}

fn read(path: &Path, offset: u64, len: u32) -> Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(sys::O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let len = u64::from(len.min(PIECE)).min(found.len().saturating_sub(offset));
    let mut bytes = vec![0; usize::try_from(len).map_err(Error::other)?];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

fn list(path: &Path, skip: u64) -> Result<Listing> {
    let mut listing = Listing { entries: vec![], more: false };
    let (mut bytes, mut seen) = (0, 0);
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        seen += 1;
        if seen <= skip {
            continue;
        }
        if bytes > LISTING_BYTES {
            listing.more = true;
            break;
        }
        let kind = entry.file_type()?;
        let name = entry.file_name().as_bytes().to_vec();
        bytes += name.len() + 16;
        listing.entries.push((name, mode_of(kind)));
    }
    Ok(listing)
}

/// The type as `st_mode` has it.
fn mode_of(kind: fs::FileType) -> u32 {
    if kind.is_file() {
        0o100_000
    } else if kind.is_dir() {
        0o40_000
    } else if kind.is_symlink() {
        0o120_000
    } else if kind.is_block_device() {
        0o60_000
    } else if kind.is_char_device() {
        0o20_000
    } else if kind.is_fifo() {
        0o10_000
    } else if kind.is_socket() {
        0o140_000
    } else {
        0
    }
}

/// A file system that keeps none has none.
fn get_xattr(path: &Path, name: &[u8]) -> Result<Option<Vec<u8>>> {
    match sys::get_xattr(path, name) {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.raw_os_error(), Some(sys::ENODATA | sys::EOPNOTSUPP)) => {
            // A path that is not there is another matter.
            fs::symlink_metadata(path)?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn room() -> Result<Room> {
    let space = sys::space(Path::new("/"))?;
    Ok(Room {
        free_bytes: space.free_blocks.saturating_mul(space.block_bytes),
        total_bytes: space.blocks.saturating_mul(space.block_bytes),
        free_inodes: (space.inodes > 0).then_some(space.free_inodes),
    })
}

/// Seconds since 1970, before or after.
fn moment(seconds: i64) -> Option<SystemTime> {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_begins_at_the_root() {
        for (path, rooted_path) in
            [(&b""[..], "/"), (b"/", "/"), (b"etc/x", "/etc/x"), (b"/./a//b", "/a/b"), (b"/../x", "/../x")]
        {
            assert_eq!(rooted(path).unwrap(), Path::new(rooted_path));
        }
        rooted(b"a\0b").unwrap_err();
    }

    #[test]
    fn times_before_1970() {
        assert_eq!(moment(-1).unwrap() + Duration::from_secs(1), SystemTime::UNIX_EPOCH);
    }
}
