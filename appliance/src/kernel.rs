//! The kernel that an appliance runs: the guest's own, or one of this machine, with the modules that are needed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{Error, Result, ResultExt as _};
use guestdisk::fs::FileSystem;

use crate::modules::{GuestTree, HostTree, Module, Tree, closure};

/// The most bytes of a kernel.
const MOST_KERNEL: u64 = 256 << 20;
/// How an appliance reaches its disks.
const DEVICES: [&str; 2] = ["virtio_pci", "virtio_blk"];
/// How a User-Mode Linux does; what is below it is built in.
const UML_DEVICE: &str = "virtio_blk";

/// A kernel and its modules.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What it is, for messages.
    pub name: String,
    /// The bzImage or ELF file; empty for a User-Mode Linux, which is a program of its own.
    pub image: Arc<[u8]>,
    /// The modules in the order in which they are loaded.
    pub modules: Vec<Module>,
    /// What was wanted of it and is neither a module nor, as far as `modules.builtin` tells, built in.
    pub missing: Vec<String>,
}

impl Kernel {
    /// A kernel of this machine: its file, the folder of its modules (`/lib/modules/RELEASE`), and the file systems
    /// (`xfs`, `btrfs`, `ntfs3`, `vfat`) that it is to mount.
    ///
    /// # Errors
    /// A file is missing or cannot be read.
    pub fn from_host(kernel: &Path, modules: &Path, file_systems: &[&str]) -> Result<Self> {
        let image = std::fs::read(kernel).context(|| kernel.display().to_string())?;
        let tree = HostTree(modules.to_owned());
        Self::new(kernel.display().to_string(), image, &tree, file_systems)
    }

    /// The modules of a User-Mode Linux, out of their folder (`/usr/lib/uml/modules/RELEASE`): for
    /// [`UmlEngine`](crate::UmlEngine) only, which has the program.
    ///
    /// # Errors
    /// A file is missing or cannot be read.
    pub fn from_uml(modules: &Path, file_systems: &[&str]) -> Result<Self> {
        let name = format!("User-Mode Linux with {}", modules.display());
        Self::with_modules(name, vec![], &HostTree(modules.to_owned()), &[UML_DEVICE], file_systems)
    }

    /// The kernel of this machine, which runs already: for [`HostEngine`](crate::HostEngine) only. It loads what it needs
    /// by itself.
    pub fn of_host() -> Self {
        Self { name: "this host's kernel".to_owned(), image: Arc::from([]), modules: vec![], missing: vec![] }
    }

    /// A kernel of a guest: its file in the file system `boot`, and the folder of its modules
    /// (`/lib/modules/RELEASE`) in the file system `root`.
    ///
    /// # Errors
    /// A file is missing or cannot be read.
    pub fn from_guest(
        boot: &FileSystem,
        kernel: &Path,
        root: &FileSystem,
        modules: &Path,
        file_systems: &[&str],
    ) -> Result<Self> {
        let name = format!("the guest's {}", kernel.display());
        let image = boot.read(kernel, MOST_KERNEL).context(|| name.clone())?;
        let tree = GuestTree { fs: root, folder: modules.to_owned() };
        Self::new(name, image, &tree, file_systems)
    }

    /// A kernel from its parts.
    ///
    /// # Errors
    /// It is no kernel; a module that it needs cannot be read.
    pub fn new(name: String, image: Vec<u8>, tree: &dyn Tree, file_systems: &[&str]) -> Result<Self> {
        if let Some(defect) = bootcheck::kernel::defect(&image) {
            return Err(Error::invalid(defect).context(name));
        }
        Self::with_modules(name, image, tree, &DEVICES, file_systems)
    }

    fn with_modules(
        name: String,
        image: Vec<u8>,
        tree: &dyn Tree,
        devices: &[&str],
        file_systems: &[&str],
    ) -> Result<Self> {
        let needed = file_systems.iter().flat_map(|kind| needed(kind));
        let wanted: Vec<&str> = devices.iter().copied().chain(needed).collect();
        let found = closure(tree, &wanted).context(|| format!("the modules of {name}"))?;
        Ok(Self { name, image: image.into(), modules: found.modules, missing: found.missing })
    }
}

/// The modules of a file system: character sets come in only when it is mounted.
fn needed(kind: &str) -> Vec<&str> {
    match kind {
        "vfat" => vec!["nls_cp437", "nls_iso8859-1", "nls_ascii", "nls_utf8", "vfat"],
        "ntfs3" => vec!["nls_utf8", "ntfs3"],
        kind => vec![kind],
    }
}

/// Where a kernel of a release usually lies.
pub fn usual_places(release: &str) -> (PathBuf, PathBuf) {
    (Path::new("/boot").join(format!("vmlinuz-{release}")), Path::new("/lib/modules").join(release))
}
