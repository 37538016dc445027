//! The file systems of a volume, opened when they are needed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use block::{BlockDevice, Error, ErrorKind, Result, ResultExt as _};
use guestdisk::detect::Kind;
use guestdisk::fs::FileSystem;
use guestdisk::{Location, Volume};

/// A file system, or why there is none.
type Opened = std::result::Result<FileSystem, (ErrorKind, String)>;

/// A volume.
#[derive(Debug)]
pub(super) struct VolumeFiles {
    pub(super) location: Location,
    device: Arc<dyn BlockDevice>,
    /// What it holds, if that is known.
    kind: Option<Kind>,
    /// As it is mounted if nothing else is said.
    main: OnceLock<Opened>,
    /// Without regard to the default subvolume of btrfs.
    top: OnceLock<Opened>,
}

impl VolumeFiles {
    pub(super) fn new(volume: &Volume) -> Self {
        Self {
            location: volume.location.clone(),
            device: Arc::clone(&volume.device),
            kind: volume.content.as_ref().map(|content| content.kind),
            main: OnceLock::new(),
            top: OnceLock::new(),
        }
    }

    /// Its file system.
    pub(super) fn files(&self, from_top: bool) -> Result<&FileSystem> {
        let opened = if from_top && self.kind == Some(Kind::Btrfs) {
            self.top.get_or_init(|| self.open(FileSystem::open_top))
        } else {
            self.main.get_or_init(|| self.open(FileSystem::open))
        };
        opened.as_ref().map_err(|(kind, message)| Error::new(*kind, message.clone()))
    }

    fn open(&self, open: impl Fn(Arc<dyn BlockDevice>) -> Result<FileSystem>) -> Opened {
        let opened = match self.kind {
            None => Err(Error::unsupported("nothing that is known here")),
            Some(kind) if !kind.is_readable() => {
                Err(Error::unsupported(format!("{kind} is not a file system that is read here")))
            }
            Some(_) => open(Arc::clone(&self.device)),
        };
        opened.context(|| self.location.to_string()).map_err(|error| (error.kind(), error.to_string()))
    }

    /// Whether there is something at this path.
    pub(super) fn has(&self, path: &Path, from_top: bool) -> bool {
        self.files(from_top).is_ok_and(|files| files.symlink_metadata(path).is_ok())
    }

    /// A path from the top of a btrfs as one from its default subvolume, which is how others find it who mount the volume
    /// without further words. `None`: it lies elsewhere, or there is no difference.
    pub(super) fn below_default(&self, path: &Path) -> Option<PathBuf> {
        let (top, wanted) = (self.files(true).ok()?, self.files(false).ok()?.root());
        if top.root() == wanted {
            return None;
        }
        let mut folder = PathBuf::from("/");
        for name in path.iter().skip(1) {
            let entry = top.read_dir(&folder).ok()?.into_iter().find(|entry| entry.name == name)?;
            folder.push(name);
            if entry.node == wanted {
                return Some(Path::new("/").join(path.strip_prefix(&folder).ok()?));
            }
        }
        None
    }

    /// Pages that have been read.
    pub(super) fn work(&self) -> u64 {
        let opened = [&self.main, &self.top].into_iter().filter_map(|cell| cell.get()?.as_ref().ok());
        opened.map(FileSystem::work).sum()
    }
}
