//! Holding the machine's file systems still.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use block::freeze::Frozen;
use block::{Error, ErrorKind, Result, ResultExt as _};
use v2v::p2v::Mounted;

use super::guard::Guard;

/// File systems that are held still. They are let go when this is dropped; if this process is killed, by its guard.
#[derive(Debug, Default)]
pub(super) struct Still {
    frozen: Vec<Frozen>,
    steady: Vec<Steady>,
}

/// A file system that cannot be frozen (FAT): everything was on the disk, and it is found out in the end whether anybody has
/// written to the disk since.
#[derive(Debug)]
struct Steady {
    path: PathBuf,
    device: String,
    folder: File,
    written: u64,
}

/// Refuses to hold still what we write to: we would wait for ourselves. `ours` are folders.
///
/// # Errors
/// `Usage`: one of them is on one of the file systems.
pub(super) fn refuse_ours(mounted: &[&Mounted], ours: &[PathBuf]) -> Result<()> {
    for Mounted { path, .. } in mounted {
        let number = device(path)?;
        if let Some(folder) = ours.iter().find(|folder| nearest(folder).is_some_and(|own| own == number)) {
            let message = format!("'{}' cannot be frozen: '{}' is on it", path.display(), folder.display());
            return Err(Error::usage(message)
                .hint("Write to another file system, or over the network (--to, --state)."));
        }
    }
    Ok(())
}

fn device(path: &Path) -> Result<u64> {
    let metadata =
        std::fs::metadata(path).map_err(Error::from).context(|| format!("'{}'", path.display()))?;
    Ok(metadata.dev())
}

/// The device of the nearest folder that is there.
fn nearest(path: &Path) -> Option<u64> {
    let path = std::path::absolute(path).ok()?;
    path.ancestors().find_map(|path| device(path).ok())
}

impl Still {
    /// Holds these file systems of the machine at `root`, in this order.
    ///
    /// # Errors
    /// One of them cannot be held.
    pub(super) fn hold(mounted: &[&Mounted], root: &Path, guard: &mut Guard) -> Result<Self> {
        // Before anything is frozen: what is not in memory yet may lie there.
        for Mounted { path, .. } in mounted {
            guard.thaw(path)?;
        }
        let (mut still, mut others) = (Self::default(), vec![]);
        for mounted in mounted {
            match Frozen::new(&mounted.path) {
                Ok(frozen) => still.frozen.push(frozen),
                Err(error) if error.kind() == ErrorKind::Unsupported => others.push(*mounted),
                Err(error) => return Err(error),
            }
        }
        for mounted in others {
            still.steady.push(Steady::new(mounted, root)?);
        }
        Ok(still)
    }

    /// Where they are mounted.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        let frozen = self.frozen.iter().map(|frozen| frozen.path().to_owned());
        frozen.chain(self.steady.iter().map(|steady| steady.path.clone())).collect()
    }

    /// Lets go of those that are mounted there.
    ///
    /// # Errors
    /// `Locked`: somebody has written to one that could not be frozen.
    pub(super) fn let_go(&mut self, paths: &[&Path], root: &Path) -> Result<()> {
        self.frozen.retain(|frozen| !paths.contains(&frozen.path()));
        let (gone, rest) = std::mem::take(&mut self.steady)
            .into_iter()
            .partition(|one: &Steady| paths.contains(&one.path.as_path()));
        self.steady = rest;
        let gone: Vec<Steady> = gone;
        gone.iter().try_for_each(|steady| steady.check(root))
    }

    /// Lets go of all.
    ///
    /// # Errors
    /// `Locked`: somebody has written to what could not be frozen.
    pub(super) fn release(self, root: &Path) -> Result<()> {
        let written = self.steady.iter().try_for_each(|steady| steady.check(root));
        drop(self.frozen);
        written
    }
}

impl Steady {
    fn new(mounted: &Mounted, root: &Path) -> Result<Self> {
        let path = mounted.path.clone();
        let about = || format!("Could not hold '{}' still", path.display());
        let folder = File::open(&path).map_err(Error::from).context(about)?;
        nix::unistd::syncfs(&folder).map_err(Error::from).context(about)?;
        let unknown =
            || Error::unsupported("it cannot be frozen, and the kernel does not tell what is written to it");
        let written = v2v::p2v::written(root, &mounted.device).ok_or_else(unknown).context(about)?;
        Ok(Self { path, device: mounted.device.clone(), folder, written })
    }

    fn check(&self, root: &Path) -> Result<()> {
        // What somebody has changed in memory only counts, too.
        nix::unistd::syncfs(&self.folder)?;
        if v2v::p2v::written(root, &self.device) == Some(self.written) {
            return Ok(());
        }
        let message = format!("somebody has written to '{}' while it was copied", self.path.display());
        Err(Error::new(ErrorKind::Locked, message)
            .hint(format!("Unmount it for the time of the copy: umount {}", self.path.display())))
    }
}
