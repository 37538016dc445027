//! What the guest mounts where.

use std::path::{Component, Path, PathBuf};

use guestdisk::Disks;
use guestdisk::fs::FileSystem;

use super::GuestView;
use crate::inspect::{Mount, System};
use crate::names::DiskNames;

/// The most mounts that are followed.
const MOST_MOUNTS: usize = 256;
/// The top subvolume's number.
const TOP_SUBVOLUME: u64 = 5;

/// A folder of a volume at a place of the guest's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Where it is mounted, without symbolic links.
    pub path: PathBuf,
    /// The volume (index in [`Disks::volumes`]).
    pub volume: usize,
    /// The folder of the volume that is seen there: `/`, or a subvolume of btrfs.
    pub folder: PathBuf,
    /// The folder counts from the top of a btrfs rather than from its default subvolume.
    pub from_top: bool,
}

impl GuestView {
    /// Mounts what fstab names, what is nearer to the root first.
    pub(super) fn mount_all(&mut self, disks: &Disks, system: &System, names: &DiskNames) {
        let mut wanted: Vec<&Mount> =
            system.mounts.iter().filter(|mount| is_mounted(mount)).take(MOST_MOUNTS).collect();
        wanted.sort_by_key(|mount| mount.path.components().count());
        for mount in wanted {
            let Some(volume) = mount.volume.or_else(|| names.find(disks, &mount.spec)) else { continue };
            let Some((folder, from_top)) = self.folder(volume, &mount.options) else { continue };
            let path =
                self.locate_new(&mount.path).map_or_else(|_| absolute(&mount.path), |place| place.guest_path);
            self.directories.lock().clear();
            // What is mounted later hides what was there.
            self.mounts.retain(|known| known.path != path);
            self.mounts.push(MountPoint { path, volume, folder, from_top });
            self.mounts.sort_by_key(|mount| std::cmp::Reverse(mount.path.components().count()));
        }
    }

    /// The folder of a volume that these options ask for. `None`: it is not there.
    fn folder(&self, volume: usize, options: &str) -> Option<(PathBuf, bool)> {
        let option = |name: &str| options.split(',').find_map(|option| option.trim().strip_prefix(name));
        let files = self.volumes.get(volume)?;
        if let Some(name) = option("subvol=") {
            let folder = absolute(Path::new(name));
            return files.has(&folder, true).then_some((folder, true));
        }
        if let Some(number) =
            option("subvolid=").and_then(|number| number.parse().ok()).filter(|number| *number > 0)
        {
            return subvolume(files.files(true).ok()?, number).map(|folder| (folder, true));
        }
        files.files(false).ok().map(|_| (PathBuf::from("/"), false))
    }
}

/// Whether a line of fstab puts a file system into the tree, the root apart.
fn is_mounted(mount: &Mount) -> bool {
    let bound = mount.options.split(',').any(|option| matches!(option.trim(), "bind" | "rbind"));
    mount.path.has_root() && mount.path != Path::new("/") && mount.kind != "swap" && !bound
}

/// The subvolume of this number, if it is at the top.
fn subvolume(top: &FileSystem, number: u64) -> Option<PathBuf> {
    if number == TOP_SUBVOLUME {
        return Some(PathBuf::from("/"));
    }
    let entries = top.read_dir("/").ok()?;
    let found = entries.into_iter().find(|entry| entry.node.tree == number)?;
    Some(Path::new("/").join(found.name))
}

/// A path from the root, without `.` and `..`.
pub(super) fn absolute(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    clean
}
