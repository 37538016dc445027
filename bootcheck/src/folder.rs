//! A private folder that is removed in the end: for the sockets and files of an engine's program.

use std::fs::{DirBuilder, DirEntry, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::kill;
use nix::unistd::{Pid, Uid};

use block::{Error, Result, ResultExt as _};

/// Names that are tried.
const TRIES: u32 = 100;

/// The folder; dropping it removes it with everything in it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// Locked as long as it is in use, where the file system can: others may not see our process (a container's).
    _lock: Option<File>,
}

impl Folder {
    /// Makes one in `directory`, for `program`, that only its owner can enter. Those that killed processes of the same
    /// user have left there are removed.
    ///
    /// # Errors
    /// `directory` cannot be written to.
    pub fn new(directory: &Path, program: &str) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let what = || format!("could not make a folder for {program} in '{}'", directory.display());
        remove_left(directory, program);
        for _ in 0..TRIES {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = directory.join(format!("vimg-{program}-{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    let lock = locked(&path);
                    return Ok(Self { path, _lock: lock });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).context(what),
            }
        }
        Err(Error::new(block::ErrorKind::Io, "no free name").context(what()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a file of this name is in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Removes it now.
    pub fn clear(&self) {
        // Nobody is left to be told.
        drop(std::fs::remove_dir_all(&self.path));
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The folder, locked; `None` if somebody else has locked it, or it cannot be.
fn locked(path: &Path) -> Option<File> {
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).ok()?;
    file.try_lock().ok()?;
    Some(file)
}

/// Removes what processes that are gone have left in `directory`, as far as that can be done.
fn remove_left(directory: &Path, program: &str) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if is_left(&entry, program)
            && let Some(_lock) = locked(&entry.path())
        {
            drop(std::fs::remove_dir_all(entry.path()));
        }
    }
}

/// A folder of ours (no link to one) whose process is not alive. A process that has its number by now keeps it.
fn is_left(entry: &DirEntry, program: &str) -> bool {
    let name = entry.file_name();
    let Some(pid) = name.to_str().and_then(|name| pid_of(name, program)) else { return false };
    let ours = entry.metadata().is_ok_and(|meta| {
        meta.is_dir() && meta.uid() == Uid::effective().as_raw() && meta.mode() & 0o7777 == 0o700
    });
    ours && kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH)
}

/// The process in the name of a folder for `program`.
fn pid_of(name: &str, program: &str) -> Option<i32> {
    let (pid, number) =
        name.strip_prefix("vimg-")?.strip_prefix(program)?.strip_prefix('-')?.split_once('-')?;
    number.parse::<u64>().ok()?;
    pid.parse().ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dead_processes_have_left_is_removed_and_nothing_else() {
        let outer = Folder::new(&std::env::temp_dir(), "folder-test").unwrap();
        // Linux gives no number above 2^22.
        let gone = i32::MAX;
        let make = |name: &str, mode| {
            let path = outer.file(name);
            DirBuilder::new().mode(mode).create(&path).unwrap();
            std::fs::write(path.join("file"), "x").unwrap();
            path
        };
        let left = make(&format!("vimg-qemu-{gone}-0"), 0o700);
        let locked_one = make(&format!("vimg-qemu-{gone}-1"), 0o700);
        let lock = locked(&locked_one).unwrap();
        let kept = [
            locked_one,
            make(&format!("vimg-qemu-{gone}-2"), 0o755),
            make(&format!("vimg-qemu-{}-77", std::process::id()), 0o700),
            make("vimg-qemu-1-0", 0o700),
            make(&format!("vimg-qemu-{gone}"), 0o700),
            make(&format!("vimg-other-{gone}-0"), 0o700),
            make("elsewhere", 0o700),
        ];
        let link = outer.file(&format!("vimg-qemu-{gone}-3"));
        std::os::unix::fs::symlink(outer.file("elsewhere"), &link).unwrap();
        let new = Folder::new(outer.path(), "qemu").unwrap();
        assert!(!left.exists());
        assert!(link.is_symlink() && new.path().is_dir());
        assert!(kept.iter().all(|path| path.join("file").exists()), "{kept:?}");
        drop(lock);
    }
}
