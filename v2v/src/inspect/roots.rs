//! Which volumes hold the root of a Linux.

use std::path::{Path, PathBuf};

use guestdisk::detect::Kind;
use guestdisk::fs::{FileKind, FileSystem};
use guestdisk::{Disks, Volume};

/// The most systems of one guest.
const MOST_ROOTS: usize = 16;
/// The most folders at the top of a file system that are looked at.
const MOST_FOLDERS: usize = 256;

/// What says that a folder is `/etc` of a system.
const IN_ETC: [&str; 12] = [
    "os-release",
    "fstab",
    "redhat-release",
    "SuSE-release",
    "debian_version",
    "lsb-release",
    "alpine-release",
    "arch-release",
    "gentoo-release",
    "slackware-version",
    "system-release",
    "passwd",
];

/// A root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) volume: usize,
    pub(super) subvolume: PathBuf,
}

/// All of them, one for each volume at most: of the subvolumes of a btrfs, the one that is mounted by default or has the
/// name that installers give; the others are its snapshots.
pub(super) fn find(disks: &Disks, problems: &mut Vec<String>) -> Vec<Root> {
    let mut roots = vec![];
    for (index, volume) in disks.volumes().iter().enumerate() {
        let kind = volume.content.as_ref().map(|content| content.kind);
        if !volume.is_readable() || kind == Some(Kind::Vfat) || roots.len() >= MOST_ROOTS {
            continue;
        }
        match volume.file_system() {
            Ok(files) => {
                roots.extend(root_of(volume, &files).map(|subvolume| Root { volume: index, subvolume }));
            }
            Err(error) => problems.push(error.to_string()),
        }
    }
    roots
}

/// The folder of a volume that is a root, if one is.
fn root_of(volume: &Volume, files: &FileSystem) -> Option<PathBuf> {
    if is_root(files, Path::new("")) {
        return Some(PathBuf::new());
    }
    deployment(files).or_else(|| {
        (files.kind() == Kind::Btrfs).then_some(())?;
        let top = FileSystem::open_top(std::sync::Arc::clone(&volume.device)).ok()?;
        subvolume(files).or_else(|| subvolume(&top))
    })
}

/// A subvolume at the top that is a root.
fn subvolume(files: &FileSystem) -> Option<PathBuf> {
    let mut names: Vec<PathBuf> = files
        .read_dir("/")
        .ok()?
        .into_iter()
        .filter(|entry| entry.kind == FileKind::Directory)
        .map(|entry| PathBuf::from(entry.name))
        .take(MOST_FOLDERS)
        .collect();
    let rank = |name: &PathBuf| {
        let known = ["@", "root", "@rootfs", "@root", "rootfs"];
        known.iter().position(|known| Path::new(known) == name).unwrap_or(known.len())
    };
    names.sort();
    names.sort_by_key(rank);
    names.into_iter().find(|name| is_root(files, name))
}

/// The deployment of an OSTree system (Fedora CoreOS, Silverblue): `ostree/deploy/NAME/deploy/CHECKSUM.0`.
fn deployment(files: &FileSystem) -> Option<PathBuf> {
    let folders = |path: &Path| -> Vec<PathBuf> {
        let entries = files.read_dir(path).unwrap_or_default().into_iter().take(MOST_FOLDERS);
        let folders = entries.filter(|entry| entry.kind == FileKind::Directory);
        let mut folders: Vec<_> = folders.map(|entry| path.join(entry.name)).collect();
        folders.sort();
        folders
    };
    let systems = folders(Path::new("ostree/deploy"));
    systems.iter().flat_map(|system| folders(&system.join("deploy"))).find(|folder| is_root(files, folder))
}

/// Whether a folder looks like the root of a system. Symbolic links count as what they are called: they may lead to
/// another volume.
fn is_root(files: &FileSystem, folder: &Path) -> bool {
    let has = |path: &str| files.symlink_metadata(folder.join(path)).is_ok();
    files.metadata(folder.join("etc")).is_ok_and(|etc| etc.kind == FileKind::Directory)
        && IN_ETC.iter().any(|name| has(&format!("etc/{name}")))
        && ["bin", "sbin", "usr", "lib"].iter().any(|name| has(name))
        && ["proc", "sys", "dev", "var", "root", "home"].iter().any(|name| has(name))
}
