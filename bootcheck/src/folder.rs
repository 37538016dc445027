//! A private folder that is removed in the end: for the sockets and files of an engine's program.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Error, Result, ResultExt as _};

/// Names that are tried.
const TRIES: u32 = 100;

/// The folder; dropping it removes it with everything in it.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Makes one in `directory`, for `program`, that only its owner can enter.
    ///
    /// # Errors
    /// `directory` cannot be written to.
    pub fn new(directory: &Path, program: &str) -> Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let what = || format!("could not make a folder for {program} in '{}'", directory.display());
        for _ in 0..TRIES {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = directory.join(format!("vimg-{program}-{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).context(what),
            }
        }
        Err(Error::new(block::ErrorKind::Io, "no free name").context(what()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where a file of this name is in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Removes it now.
    pub fn clear(&self) {
        // Nobody is left to be told.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.clear();
    }
}
