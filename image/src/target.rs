//! Where the target of a convert is written until it is complete.
//!
//! A file that does not exist yet is written under a hidden name beside its own and gets its name when nothing
//! more can go wrong, so that whoever finds it finds all of it. What is there already - a file, a device -
//! is written in place, as the user must want by naming it; it is never removed.

use std::fs;
use std::io::ErrorKind as IoErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use block::{Error, ErrorKind, Result, ResultExt as _};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, RenameFlags, renameat2};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, FsType, statfs};

/// Longest file name in bytes (Linux `NAME_MAX`).
const NAME_MAX: usize = 255;
/// Symbolic links that are followed before giving up, as the kernel does.
const MAX_LINKS: usize = 40;

/// The place of a new image. Unless [`complete`](Self::complete) is called, dropping it removes everything that
/// was not there before.
#[derive(Debug)]
#[must_use]
pub struct Placement {
    /// The name that the image is to have, symbolic links followed.
    path: PathBuf,
    /// Where it is written meanwhile.
    partial: Option<PathBuf>,
    /// Keeps others from writing under the temporary name.
    _lock: Option<fs::File>,
    /// Further files that were made for the image.
    others: Vec<PathBuf>,
    /// Further files that were there before.
    existing_others: Vec<PathBuf>,
    /// Further files that have a temporary name until the image is complete, and the names that they will have.
    partial_others: Vec<(PathBuf, PathBuf)>,
    existed: Option<fs::Metadata>,
}

impl Placement {
    /// Chooses a place for an image that is to be known as `path`. Takes the temporary name, if there is to be one,
    /// by creating an empty file.
    ///
    /// # Errors
    /// The directory does not exist or cannot be written.
    pub fn new(path: &Path) -> Result<Self> {
        // What is not a file (a device, a pipe behind /dev/stdout) is taken as it is.
        let special = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
        let path = if special { path.to_owned() } else { follow_links(path)? };
        let existed = match fs::metadata(&path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == IoErrorKind::NotFound => None,
            Err(error) => return Err(error.into()),
        };
        let (partial, lock) = match existed {
            None => take_partial_name(&path).map(|(partial, lock)| (Some(partial), Some(lock)))?,
            Some(_) => (None, None),
        };
        Ok(Self {
            path,
            partial,
            _lock: lock,
            others: vec![],
            existing_others: vec![],
            partial_others: vec![],
            existed,
        })
    }

    /// The name that the image is to have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where to write. `None`: in place.
    pub fn partial(&self) -> Option<&Path> {
        self.partial.as_deref()
    }

    /// What was there before, identified as [`HostFile::identity`](block::file::HostFile::identity) does it.
    pub fn existing(&self) -> Option<(u64, u64)> {
        self.existed.as_ref().map(identity)
    }

    /// The same for any path.
    pub fn existing_at(path: &Path) -> Option<(u64, u64)> {
        fs::metadata(path).ok().as_ref().map(identity)
    }

    /// Whether a file that was there before is overwritten.
    pub fn overwrites(&self) -> bool {
        self.existed.is_some()
    }

    /// Bytes that overwriting the old file gives back.
    pub fn reclaimed(&self) -> u64 {
        self.existed
            .as_ref()
            .filter(|metadata| metadata.is_file())
            .map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// The file system that the image will lie on, if it will lie on one.
    pub fn directory(&self) -> Option<&Path> {
        let lies_in_directory = self.existed.as_ref().is_none_or(fs::Metadata::is_file);
        lies_in_directory.then(|| parent(&self.path))
    }

    /// Empties a file that was overwritten in part, so that nobody takes what is left for an image. Returns whether
    /// that was done.
    pub fn void(&self) -> bool {
        let empty =
            |path: &PathBuf| fs::OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(0));
        self.existed.as_ref().is_some_and(fs::Metadata::is_file)
            && self.existing_others.iter().chain([&self.path]).all(|path| empty(path).is_ok())
    }

    /// Further files of the image that are there already and will be overwritten with it.
    pub(crate) fn overwrites_others<'a>(&mut self, paths: impl IntoIterator<Item = &'a PathBuf>) {
        if self.existed.is_some() {
            self.existing_others.extend(paths.into_iter().cloned());
        }
    }

    /// A file that has been made for the image: removed with it.
    pub fn made(&mut self, path: PathBuf) {
        self.others.push(path);
    }

    /// Replaces the temporary name in a message by the one that the user knows.
    pub fn translate(&self, error: Error) -> Error {
        let Some(partial) = &self.partial else { return error };
        let mut text = error.to_string();
        let others = self.partial_others.iter().map(|(partial, path)| (partial, path));
        let mut found = false;
        for (partial, path) in std::iter::once((partial, &self.path)).chain(others) {
            let partial = partial.display().to_string();
            if text.contains(&partial) {
                text = text.replace(&partial, &path.display().to_string());
                found = true;
            }
        }
        if !found {
            return error;
        }
        let hints = error.hints().to_vec();
        let plain = Error::new(error.kind(), text);
        hints.into_iter().fold(plain, Error::hint)
    }

    /// A further file of the image that is to be called `path` will be written under [`partial_path`] of it, and gets its
    /// name with the image. Takes that name, by creating an empty file.
    ///
    /// # Errors
    /// The directory cannot be written, or somebody else is writing there.
    pub(crate) fn make_partial(&mut self, path: PathBuf) -> Result<()> {
        let (partial, _lock) = take_partial_name(&path)?;
        self.partial_others.push((partial, path));
        Ok(())
    }

    /// The image is complete: it gets its name. `durable`: the name, too, is to survive a crash.
    ///
    /// # Errors
    /// Somebody has taken the name meanwhile (the image keeps its temporary name then), or the host failed.
    pub fn complete(mut self, durable: bool) -> Result<()> {
        self.others.clear();
        let Some(partial) = self.partial.take() else { return Ok(()) };
        // The main file comes last: what it names is there.
        let others = std::mem::take(&mut self.partial_others);
        for (partial, path) in &others {
            fs::rename(partial, path)
                .map_err(Error::from)
                .context(|| format!("Could not rename '{}' to '{}'", partial.display(), path.display()))?;
        }
        if durable && !others.is_empty() {
            sync_directory(parent(&self.path))?;
        }
        if let Err(error) = rename_without_replacing(&partial, &self.path) {
            let error = error.context(format!(
                "Could not rename '{}' to '{}'",
                partial.display(),
                self.path.display()
            ));
            return Err(error.hint(format!("The image is complete; it is called '{}'", partial.display())));
        }
        if durable { sync_directory(parent(&self.path)) } else { Ok(()) }
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        let partial_others = self.partial_others.iter().map(|(partial, _)| partial);
        for path in self.partial.iter().chain(&self.others).chain(partial_others) {
            // There is an error on its way to the user already, and this one could not be acted upon.
            let _ = fs::remove_file(path);
        }
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    let kind = metadata.file_type();
    let device = kind.is_block_device() || kind.is_char_device();
    if device { (metadata.rdev(), 0) } else { (metadata.dev(), metadata.ino()) }
}

/// The directory of a path.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The path that `path` leads to when its last component is a symbolic link, whether there is anything or not.
fn follow_links(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = parent(&path).join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(Error::from(Errno::ELOOP))
}

/// `name` in the directory of `path`, spelled such that it is not taken for the name of a protocol.
fn beside(path: &Path, name: &str) -> PathBuf {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() && !name.contains(':') => PathBuf::from(name),
        _ => parent(path).join(name),
    }
}

/// How often a temporary name that somebody else is just giving up is tried again.
const ATTEMPTS: u32 = 100;

/// Takes the temporary name of `path`: creates it, or takes over what a killed convert has left there.
fn take_partial_name(path: &Path) -> Result<(PathBuf, fs::File)> {
    let name = path.file_name().ok_or(Errno::ENOENT)?;
    let partial = beside(path, &partial_name(&name.to_string_lossy()));
    for _ in 0..ATTEMPTS {
        // Not through a link that somebody has put there.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let opened = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(flags.bits())
            .mode(0o644)
            .open(&partial);
        let file =
            opened.map_err(Error::from).context(|| format!("Could not create '{}'", path.display()))?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.nlink() > 1 || metadata.uid() != nix::unistd::geteuid().as_raw() {
            let message = format!("'{}' is in the way and is not ours", partial.display());
            return Err(
                Error::new(ErrorKind::Permission, message).hint("Remove it, or choose another directory.")
            );
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(in_use(path)),
            // A file system without locks: go on without one.
            Err(fs::TryLockError::Error(_)) => return Ok((partial, file)),
        }
        // Whoever held the lock before may have given the file its final name, or removed it.
        if fs::symlink_metadata(&partial).is_ok_and(|now| identity(&now) == identity(&metadata)) {
            return Ok((partial, file));
        }
    }
    Err(in_use(path))
}

fn in_use(path: &Path) -> Error {
    let message = format!("Could not create '{}': another process is writing it", path.display());
    Error::new(ErrorKind::Locked, message)
}

/// Where a file is written that is to be called `path`.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default();
    beside(path, &partial_name(&name.to_string_lossy()))
}

/// `.NAME.vimg-partial`; NAME shortened where the whole would be too long.
fn partial_name(name: &str) -> String {
    let suffix = ".vimg-partial";
    let room = NAME_MAX - 1 - suffix.len();
    let cut = (0..=room.min(name.len())).rev().find(|&at| name.is_char_boundary(at)).unwrap_or(0);
    format!(".{}{suffix}", &name[..cut])
}

/// Renames unless the new name is taken.
fn rename_without_replacing(from: &Path, to: &Path) -> Result<()> {
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // Not every file system can; then look first.
        Err(Errno::EINVAL | Errno::ENOSYS) if !to.exists() => Ok(fs::rename(from, to)?),
        Err(Errno::EINVAL | Errno::ENOSYS) => Err(Errno::EEXIST.into()),
        result => Ok(result?),
    }
}

fn sync_directory(path: &Path) -> Result<()> {
    match fs::File::open(path).and_then(|directory| directory.sync_all()) {
        // Some file systems have nothing to synchronise there.
        Err(error) if error.kind() == IoErrorKind::InvalidInput => Ok(()),
        result => Ok(result?),
    }
}

/// Refuses early what certainly cannot fit: `needed` bytes, all of which will take space.
pub(crate) fn check_space(placement: &Placement, needed: u64) -> Result<()> {
    let Some(directory) = placement.directory() else { return Ok(()) };
    let Ok(stat) = nix::sys::statvfs::statvfs(directory) else { return Ok(()) };
    // Everything that is free, what is kept for the superuser included: in doubt it fits.
    let free = stat.fragment_size().saturating_mul(stat.blocks_free());
    let free = free.saturating_add(placement.reclaimed());
    if needed <= free || compresses(directory) {
        return Ok(());
    }
    let message = format!(
        "not enough space: the image needs {}, but only {} are free in '{}'",
        block::size::human(needed),
        block::size::human(free),
        directory.display()
    );
    Err(Error::new(ErrorKind::NoSpace, message))
}

/// Whether files in this directory may take less space than they have bytes.
fn compresses(directory: &Path) -> bool {
    const COMPRESSING: [FsType; 4] = [
        BTRFS_SUPER_MAGIC,
        FsType(0x2fc1_2fc1), // ZFS
        FsType(0xf2f5_2010), // F2FS
        FsType(0xca45_1a4e), // bcachefs
    ];
    statfs(directory).is_ok_and(|stat| COMPRESSING.contains(&stat.filesystem_type()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_file_gets_its_name_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let placement = Placement::new(&dir.path().join("disk")).unwrap();
        let partial = placement.partial().unwrap().to_owned();
        let name = ".disk.vimg-partial".to_owned();
        assert_eq!(partial.file_name().unwrap().to_str().unwrap(), name);
        fs::write(&partial, b"all of it").unwrap();
        assert_eq!(names(dir.path()), [name]);
        placement.complete(true).unwrap();
        assert_eq!(names(dir.path()), ["disk"]);
        assert_eq!(fs::read(dir.path().join("disk")).unwrap(), b"all of it");
    }

    #[test]
    fn what_is_not_completed_disappears_with_what_was_made_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut placement = Placement::new(&dir.path().join("disk")).unwrap();
        fs::write(dir.path().join("data"), b"").unwrap();
        placement.made(dir.path().join("data"));
        drop(placement);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn an_existing_file_is_written_in_place_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, vec![1; 10_000]).unwrap();
        let placement = Placement::new(&path).unwrap();
        assert_eq!((placement.partial(), placement.overwrites()), (None, true));
        assert!(placement.reclaimed() >= 10_000);
        drop(placement);
        assert!(path.exists());
    }

    #[test]
    fn links_are_followed_even_to_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere/disk", dir.path().join("link")).unwrap();
        let placement = Placement::new(&dir.path().join("link")).unwrap();
        assert_eq!(parent(placement.partial().unwrap()), dir.path().join("elsewhere"));
        placement.complete(false).unwrap();
        assert_eq!(names(&dir.path().join("elsewhere")), ["disk"]);
        assert!(fs::symlink_metadata(dir.path().join("link")).unwrap().file_type().is_symlink());
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        Placement::new(&dir.path().join("loop")).unwrap_err();
    }

    #[test]
    fn a_name_that_was_taken_meanwhile_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let placement = Placement::new(&path).unwrap();
        let partial = placement.partial().unwrap().to_owned();
        fs::write(&path, b"somebody else's").unwrap();
        let error = placement.complete(false).unwrap_err();
        assert!(error.to_string().ends_with("File exists"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
        assert!(partial.exists(), "hours of work are not thrown away");
    }

    #[test]
    fn the_second_convert_to_a_name_is_refused_until_the_first_is_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let first = Placement::new(&path).unwrap();
        assert_eq!(Placement::new(&path).unwrap_err().kind(), ErrorKind::Locked);
        drop(first);
        drop(Placement::new(&path).unwrap());
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn what_a_killed_convert_has_left_is_taken_over_but_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (path, partial) = (dir.path().join("disk"), dir.path().join(".disk.vimg-partial"));
        fs::write(&partial, b"left").unwrap();
        drop(Placement::new(&path).unwrap());
        assert!(names(dir.path()).is_empty());
        fs::write(dir.path().join("precious"), b"mine").unwrap();
        std::os::unix::fs::symlink("precious", &partial).unwrap();
        Placement::new(&path).unwrap_err();
        fs::remove_file(&partial).unwrap();
        fs::hard_link(dir.path().join("precious"), &partial).unwrap();
        Placement::new(&path).unwrap_err();
        assert_eq!(fs::read(dir.path().join("precious")).unwrap(), b"mine");
    }

    #[test]
    fn what_was_overwritten_in_part_can_be_emptied_and_only_that() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        assert!(!Placement::new(&path).unwrap().void());
        fs::write(&path, b"half").unwrap();
        assert!(Placement::new(&path).unwrap().void());
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn long_names_are_shortened_between_characters() {
        for name in ["x".repeat(255), "ä".repeat(127), "日".repeat(85)] {
            let partial = partial_name(&name);
            assert!(partial.len() <= NAME_MAX && partial.len() > NAME_MAX - 4);
            let dir = tempfile::tempdir().unwrap();
            Placement::new(&dir.path().join(&name)).unwrap().complete(false).unwrap();
            assert_eq!(names(dir.path()), [name]);
        }
    }

    #[test]
    fn messages_show_the_name_that_the_user_knows() {
        let dir = tempfile::tempdir().unwrap();
        let placement = Placement::new(&dir.path().join("disk")).unwrap();
        let error =
            Error::invalid("bad").context(format!("'{}'", placement.partial().unwrap().display())).hint("do");
        let error = placement.translate(error);
        assert_eq!(error.to_string(), format!("'{}': bad", dir.path().join("disk").display()));
        assert_eq!(error.hints(), ["do"]);
    }

    #[test]
    fn a_missing_directory_is_reported_as_qemu_does() {
        let error = Placement::new(Path::new("/nonexistent/dir/x")).unwrap_err();
        assert_eq!(error.to_string(), "Could not create '/nonexistent/dir/x': No such file or directory");
    }

    #[test]
    fn only_what_certainly_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let placement = Placement::new(&dir.path().join("disk")).unwrap();
        check_space(&placement, 4096).unwrap();
        if compresses(dir.path()) {
            eprintln!("skipped: the temporary directory lies on a file system that may compress");
            return;
        }
        let error = check_space(&placement, 1 << 60).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(
            error.to_string().starts_with("not enough space: the image needs 1 EiB, but only "),
            "{error}"
        );
    }
}
