//! What the file systems here can do, tried with files that are gone afterwards.

use std::path::{Path, PathBuf};

use block::file::{CacheMode, CreateMode, FileOptions, HostFile};
use block::lock::Permissions;
use block::{ErrorKind, Result, Storage as _};
use nix::sys::statvfs::statvfs;

use super::Finding;

/// Bytes of the files that are tried: several blocks of any file system.
const TRIAL_BYTES: usize = 256 << 10;
/// What guests of a check may want to write.
const ENOUGH_SPACE: u64 = 2 << 30;

pub(super) fn findings() -> Vec<Finding> {
    let here = Path::new(".");
    vec![locks(here), reflinks(here), direct(here), space()]
}

/// A file that is removed when this is dropped.
struct Trial {
    path: PathBuf,
}

impl Trial {
    fn new(directory: &Path, name: &str) -> Self {
        Self { path: directory.join(format!(".vimg-doctor-{}-{name}", std::process::id())) }
    }

    fn create(&self, cache: CacheMode) -> Result<HostFile> {
        let options = FileOptions { cache, follow: false, ..FileOptions::creating(CreateMode::New) };
        HostFile::open(&self.path, &options)
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// qemu's way of locking: byte ranges of open file descriptions.
fn locks(directory: &Path) -> Finding {
    let name = "locks here";
    let trial = Trial::new(directory, "lock");
    let tried = || -> Result<bool> {
        let first = trial.create(CacheMode::Writeback)?;
        first.lock(Permissions::WRITE, Permissions::ALL.without(Permissions::WRITE))?;
        let second = HostFile::open(&trial.path, &FileOptions::read_write())?;
        match second.lock(Permissions::WRITE, Permissions::ALL) {
            Err(error) if error.kind() == ErrorKind::Locked => Ok(true),
            other => other.map(|()| false),
        }
    };
    match tried() {
        Ok(true) => Finding::ok(name, "keep two writers apart (open file descriptions)"),
        Ok(false) => {
            Finding::gap(name, "do not keep two writers apart", "keep images on a file system that has locks")
        }
        Err(error) => unwritable(name, &error),
    }
}

fn reflinks(directory: &Path) -> Finding {
    let name = "reflink here";
    let (from, to) = (Trial::new(directory, "from"), Trial::new(directory, "to"));
    let tried = || -> Result<bool> {
        let source = from.create(CacheMode::Writeback)?;
        source.write_at(&vec![1; TRIAL_BYTES], 0)?;
        to.create(CacheMode::Writeback)?.clone_range(0, &source, 0, TRIAL_BYTES as u64)
    };
    match tried() {
        Ok(true) => Finding::ok(name, "copies can share their blocks"),
        Ok(false) => Finding::gap(
            name,
            "copies cannot share their blocks",
            "xfs and btrfs can; elsewhere 'convert' copies the bytes",
        ),
        Err(error) => unwritable(name, &error),
    }
}

fn direct(directory: &Path) -> Finding {
    let name = "O_DIRECT here";
    match Trial::new(directory, "direct").create(CacheMode::None) {
        Ok(_) => Finding::ok(name, "cache modes none and directsync work"),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            Finding::gap(name, "this file system has none", "use cache mode writeback, the default")
        }
        Err(error) => unwritable(name, &error),
    }
}

fn unwritable(name: &'static str, error: &block::Error) -> Finding {
    Finding::gap(
        name,
        format!("cannot be tried in this folder: {error}"),
        "run this in a folder where files can be made",
    )
}

/// Where overlays of checks lie.
fn space() -> Finding {
    let name = "scratch";
    let directory = std::env::temp_dir();
    let found = match statvfs(&directory) {
        Ok(stat) => stat.blocks_available().saturating_mul(stat.fragment_size()),
        Err(error) => {
            let remedy = "set TMPDIR to a folder where files can be made";
            return Finding::gap(name, format!("'{}': {error}", directory.display()), remedy);
        }
    };
    let words = format!("{} MiB free in '{}'", found >> 20, directory.display());
    if found >= ENOUGH_SPACE {
        Finding::ok(name, words)
    } else {
        Finding::gap(name, words, "what guests write during a check goes there: set TMPDIR to a larger place")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_leave_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let found = [locks(directory.path()), reflinks(directory.path()), direct(directory.path())];
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "{found:?}");
        assert_eq!(found[0].remedy, None, "{found:?}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_said() {
        let found = locks(Path::new("/proc/1"));
        assert!(found.found.starts_with("cannot be tried"), "{found:?}");
    }
}
