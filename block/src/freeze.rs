//! Holding a mounted file system still (`fsfreeze(8)`): everything is on the disk, and nobody writes until it is thawed.
//!
//! Whoever writes to it meanwhile waits, this process included: nothing of ours may lie on it. A process that is killed
//! cannot thaw; whoever freezes has somebody else look out for that.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::error::{Error, Result, ResultExt as _};
use crate::sys;

/// A file system that is frozen until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Frozen {
    folder: File,
    path: PathBuf,
}

impl Frozen {
    /// Freezes the file system that is mounted at `path`.
    ///
    /// # Errors
    /// Only root may; not every file system can; it is frozen already.
    pub fn new(path: &Path) -> Result<Self> {
        let about = || format!("Could not freeze '{}'", path.display());
        let folder = File::open(path).map_err(Error::from).context(about)?;
        match sys::freeze(&folder) {
            Ok(()) => Ok(Self { folder, path: path.to_owned() }),
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => {
                Err(Error::unsupported("this file system cannot be frozen").context(about()))
            }
            Err(errno) => Err(Error::from(errno).context(about())),
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Nothing better can be done about a failure than has been tried.
        let _ = sys::thaw(&self.folder);
    }
}

/// Thaws a file system, whoever froze it.
///
/// # Errors
/// It is not frozen (`EINVAL`), or the host refuses.
pub fn thaw(path: &Path) -> Result<()> {
    let folder = File::open(path)?;
    Ok(sys::thaw(&folder)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_frozen_is_named() {
        let error = Frozen::new(Path::new("/proc")).unwrap_err();
        assert!(error.to_string().starts_with("Could not freeze '/proc': "), "{error}");
        Frozen::new(Path::new("/nonexistent")).unwrap_err();
        thaw(Path::new("/proc")).unwrap_err();
    }
}
