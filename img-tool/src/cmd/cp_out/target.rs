//! Files, folders and links on the host, made step by step from open folders.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use block::{Error, ErrorKind, Result, ResultExt as _};
use guestdisk::fs::Metadata;
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sys::stat::{Mode, UtimensatFlags, fchmod, futimens, mkdirat, utimensat};
use nix::sys::time::TimeSpec;

/// Permissions while something is being made, and those that may be kept.
const PRIVATE: u32 = 0o700;
const KEPT: u32 = 0o777;

/// A folder that is open.
#[derive(Debug)]
pub(super) struct Folder(OwnedFd);

/// A file that is being written.
#[derive(Debug)]
pub(super) struct NewFile(File);

/// The system's error, with what it is about; that there is something of this name already has a hint.
fn failed(errno: nix::Error, name: &Path) -> Error {
    let error =
        Error::from(std::io::Error::from(errno)).context(format!("could not create '{}'", name.display()));
    if errno == nix::Error::EEXIST {
        error.hint("nothing is replaced: remove it, or copy to another folder")
    } else {
        error
    }
}

/// One name, which is no way to another folder.
fn checked(name: &Path) -> Result<&Path> {
    let mut components = name.components();
    match (components.next(), components.next()) {
        (Some(std::path::Component::Normal(only)), None) if only == name.as_os_str() => Ok(name),
        _ => Err(Error::new(
            ErrorKind::Corrupt,
            format!("'{}' is not a name that a file can have", name.display()),
        )),
    }
}

fn times(metadata: &Metadata) -> TimeSpec {
    TimeSpec::new(metadata.mtime, 0)
}

fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits & KEPT)
}

impl Folder {
    /// Opens the folder that a person named; links are followed.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let opened = openat(AT_FDCWD, path, flags, Mode::empty());
        let context = || format!("could not open the folder '{}'", path.display());
        opened.map(Self).map_err(|errno| Error::from(std::io::Error::from(errno)).context(context()))
    }

    /// Makes a folder in this one, and opens it.
    pub(super) fn create_folder(&self, name: &Path) -> Result<Self> {
        let name = checked(name)?;
        mkdirat(self.0.as_fd(), name, mode(PRIVATE)).map_err(|errno| failed(errno, name))?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        openat(self.0.as_fd(), name, flags, Mode::empty()).map(Self).map_err(|errno| failed(errno, name))
    }

    /// Makes a file in this folder.
    pub(super) fn create_file(&self, name: &Path) -> Result<NewFile> {
        let name = checked(name)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(self.0.as_fd(), name, flags, mode(0o600)).map_err(|errno| failed(errno, name))?;
        Ok(NewFile(File::from(file)))
    }

    /// Makes a symbolic link in this folder. Where it leads is the guest's affair.
    pub(super) fn create_link(&self, name: &Path, target: &Path, metadata: &Metadata) -> Result<()> {
        let name = checked(name)?;
        nix::unistd::symlinkat(target, self.0.as_fd(), name).map_err(|errno| failed(errno, name))?;
        let time = times(metadata);
        // A time that the host's file system cannot have is no loss.
        let _ = utimensat(self.0.as_fd(), name, &time, &time, UtimensatFlags::NoFollowSymlink);
        Ok(())
    }

    /// Gives it its permissions and times, when all that is in it has been made.
    pub(super) fn finish(&self, metadata: &Metadata) -> Result<()> {
        let time = times(metadata);
        fchmod(self.0.as_fd(), mode(metadata.mode)).map_err(std::io::Error::from)?;
        let _ = futimens(self.0.as_fd(), &time, &time);
        Ok(())
    }
}

impl NewFile {
    /// Writes bytes at an offset.
    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        Ok(self.0.write_all_at(bytes, offset)?)
    }

    /// Gives it its length, permissions and times.
    pub(super) fn finish(&self, len: u64, metadata: &Metadata) -> Result<()> {
        let time = times(metadata);
        self.0.set_len(len).context(|| "could not set the length of a file".to_owned())?;
        fchmod(self.0.as_fd(), mode(metadata.mode)).map_err(std::io::Error::from)?;
        let _ = futimens(self.0.as_fd(), &time, &time);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere() {
        for name in ["..", ".", "", "a/b", "/etc", "a/", "../x", "./a"] {
            checked(Path::new(name)).unwrap_err();
        }
        checked(Path::new("..a")).unwrap();
    }

    #[test]
    fn links_are_not_followed_and_nothing_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let metadata = |mode| Metadata {
            kind: guestdisk::fs::FileKind::File,
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 1_000_000_000,
            links: 1,
        };
        let folder = Folder::open(dir.path()).unwrap();
        folder.create_link(Path::new("link"), Path::new("/etc"), &metadata(0o777)).unwrap();
        folder.create_folder(Path::new("link")).unwrap_err();
        folder.create_file(Path::new("link")).unwrap_err();
        let file = folder.create_file(Path::new("file")).unwrap();
        file.write_at(b"x", 70_000).unwrap();
        file.finish(70_001, &metadata(0o4755)).unwrap();
        let seen = dir.path().join("file").metadata().unwrap();
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!((seen.len(), seen.mode() & 0o7777, seen.mtime()), (70_001, 0o755, 1_000_000_000));
        let again = folder.create_file(Path::new("file")).unwrap_err();
        assert!(again.hints()[0].contains("nothing is replaced"), "{again}");
    }
}
