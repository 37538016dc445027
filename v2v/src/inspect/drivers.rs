//! Where a kernel's drivers are: in itself, in its initramfs, among its modules.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use guestdisk::fs::FileKind;

use super::{Driver, DriverPlace, Initramfs};
use crate::initramfs::module_name;
use crate::view::GuestView;

/// The drivers that matter, with the options of the kernel's configuration: what KVM's devices need, what those of other
/// hypervisors need, and what a root file system may lie on.
pub const DRIVERS: [(&str, &str); 42] = [
    ("virtio", "CONFIG_VIRTIO"),
    ("virtio_ring", "CONFIG_VIRTIO"),
    ("virtio_pci", "CONFIG_VIRTIO_PCI"),
    ("virtio_mmio", "CONFIG_VIRTIO_MMIO"),
    ("virtio_blk", "CONFIG_VIRTIO_BLK"),
    ("virtio_scsi", "CONFIG_SCSI_VIRTIO"),
    ("virtio_net", "CONFIG_VIRTIO_NET"),
    ("virtio_console", "CONFIG_VIRTIO_CONSOLE"),
    ("virtio_balloon", "CONFIG_VIRTIO_BALLOON"),
    ("virtio_rng", "CONFIG_HW_RANDOM_VIRTIO"),
    ("virtio_gpu", "CONFIG_DRM_VIRTIO_GPU"),
    ("virtio_input", "CONFIG_VIRTIO_INPUT"),
    ("sd_mod", "CONFIG_BLK_DEV_SD"),
    ("ahci", "CONFIG_SATA_AHCI"),
    ("ata_piix", "CONFIG_ATA_PIIX"),
    ("nvme", "CONFIG_BLK_DEV_NVME"),
    ("e1000", "CONFIG_E1000"),
    ("e1000e", "CONFIG_E1000E"),
    ("8139cp", "CONFIG_8139CP"),
    ("8139too", "CONFIG_8139TOO"),
    ("vmw_pvscsi", "CONFIG_VMWARE_PVSCSI"),
    ("vmxnet3", "CONFIG_VMXNET3"),
    ("mptspi", "CONFIG_FUSION_SPI"),
    ("mptsas", "CONFIG_FUSION_SAS"),
    ("BusLogic", "CONFIG_SCSI_BUSLOGIC"),
    ("xen_blkfront", "CONFIG_XEN_BLKDEV_FRONTEND"),
    ("xen_netfront", "CONFIG_XEN_NETDEV_FRONTEND"),
    ("hv_storvsc", "CONFIG_HYPERV_STORAGE"),
    ("hv_netvsc", "CONFIG_HYPERV_NET"),
    ("hv_vmbus", "CONFIG_HYPERV"),
    ("dm_mod", "CONFIG_BLK_DEV_DM"),
    ("dm_crypt", "CONFIG_DM_CRYPT"),
    ("linear", "CONFIG_MD_LINEAR"),
    ("raid0", "CONFIG_MD_RAID0"),
    ("raid1", "CONFIG_MD_RAID1"),
    ("raid10", "CONFIG_MD_RAID10"),
    ("raid456", "CONFIG_MD_RAID456"),
    ("ext4", "CONFIG_EXT4_FS"),
    ("ext3", "CONFIG_EXT3_FS"),
    ("xfs", "CONFIG_XFS_FS"),
    ("btrfs", "CONFIG_BTRFS_FS"),
    ("vfat", "CONFIG_VFAT_FS"),
];

/// The most bytes of a list of modules or a configuration.
const MOST_LIST: u64 = 16 << 20;
/// Folders and names of a tree of modules without a list.
const MOST_FOLDERS: usize = 4096;
const MOST_MODULES: usize = 1 << 16;
/// Folders within each other; Linux's own are five deep.
const DEEPEST: u32 = 16;

/// What is known of a kernel's drivers without its initramfs.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Its folder of modules, as the guest sees it.
    pub(super) folder: Option<PathBuf>,
    built_in: HashSet<String>,
    modules: HashSet<String>,
    /// `y`, `m`, or something else.
    config: HashMap<String, String>,
}

impl Known {
    /// Of the kernel of this release.
    pub(super) fn of(view: &GuestView, release: &str) -> Self {
        if release.is_empty() {
            return Self::default();
        }
        let folders = ["/lib/modules", "/usr/lib/modules"].map(|parent| Path::new(parent).join(release));
        let folder = folders.iter().find_map(|folder| view.locate(folder).ok()).map(|place| place.guest_path);
        let mut known = Self { config: config(view, release, folder.as_deref()), ..Self::default() };
        if let Some(folder) = &folder {
            known.built_in = listed(&text(view, &folder.join("modules.builtin")));
            known.modules = listed(&text(view, &folder.join("modules.dep")));
            if known.modules.is_empty() {
                known.modules = found(view, folder);
            }
        }
        known.folder = folder;
        known
    }

    /// Where the drivers are; those of which nothing can be said are left out.
    pub(super) fn drivers(&self, initramfs: Option<&Initramfs>) -> Vec<Driver> {
        if self.built_in.is_empty() && self.modules.is_empty() && self.config.is_empty() {
            return vec![];
        }
        let place = |name: &str, option: &str| {
            let configured = |value: &str| self.config.get(option).is_some_and(|own| own == value);
            // Without a list of what is built in, nothing is known to be missing.
            let is_complete = !self.built_in.is_empty() || !self.config.is_empty();
            let in_initramfs = || {
                let names = initramfs.map(|initramfs| &initramfs.module_names);
                names.is_some_and(|names| names.binary_search_by(|own| own.as_str().cmp(name)).is_ok())
            };
            if self.built_in.contains(name) || configured("y") {
                Some(DriverPlace::BuiltIn)
            } else if in_initramfs() {
                Some(DriverPlace::Initramfs)
            } else if self.modules.contains(name) {
                Some(DriverPlace::Modules)
            } else {
                is_complete.then_some(DriverPlace::Missing)
            }
        };
        let driver = |(name, option): &(&str, &str)| {
            Some(Driver { name: (*name).to_owned(), place: place(name, option)? })
        };
        DRIVERS.iter().filter_map(driver).collect()
    }
}

fn text(view: &GuestView, path: &Path) -> String {
    String::from_utf8_lossy(&view.read(path, MOST_LIST).unwrap_or_default()).into_owned()
}

/// The modules of `modules.builtin` (a path a line) and `modules.dep` (a path, a colon, what it needs).
fn listed(text: &str) -> HashSet<String> {
    let lines = text.lines().map(|line| line.split(':').next().unwrap_or(line).trim());
    lines.filter_map(|path| module_name(path).map(|(name, _)| name)).collect()
}

/// The modules in the folders themselves. A folder may hold itself, on a damaged disk.
fn found(view: &GuestView, folder: &Path) -> HashSet<String> {
    let (mut names, mut folders, mut seen) = (HashSet::new(), vec![(folder.to_owned(), 0)], 0);
    while let Some((folder, depth)) = folders.pop() {
        seen += 1;
        if seen > MOST_FOLDERS || names.len() > MOST_MODULES {
            break;
        }
        for entry in view.read_dir(&folder).unwrap_or_default() {
            if entry.kind == FileKind::Directory {
                if depth < DEEPEST && folders.len() < MOST_FOLDERS {
                    folders.push((folder.join(&entry.name), depth + 1));
                }
            } else if let Some((name, _)) = entry.name.to_str().and_then(module_name) {
                names.insert(name);
            }
        }
    }
    names
}

/// The configuration that a kernel was built with.
fn config(view: &GuestView, release: &str, folder: Option<&Path>) -> HashMap<String, String> {
    let mut paths = vec![PathBuf::from(format!("/boot/config-{release}"))];
    paths.extend(folder.map(|folder| folder.join("config")));
    paths.push(PathBuf::from(format!("/usr/lib/kernel/config-{release}")));
    let found = paths.iter().find_map(|path| view.read(path, MOST_LIST).ok()).unwrap_or_default();
    let wanted: HashSet<_> = DRIVERS.iter().map(|(_, option)| *option).collect();
    let line = |line: &str| {
        let (option, value) = line.split_once('=')?;
        wanted.contains(option).then(|| (option.to_owned(), value.trim().to_owned()))
    };
    String::from_utf8_lossy(&found).lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_modules_old_and_new() {
        let text = "kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio-ring.ko.xz\n\
            /lib/modules/2.6.18/kernel/fs/ext3/ext3.ko: /lib/modules/2.6.18/kernel/fs/jbd/jbd.ko\nkernel/net/a-b.ko\nx\n";
        let mut names: Vec<_> = listed(text).into_iter().collect();
        names.sort();
        assert_eq!(names, ["a_b", "ext3", "virtio_blk"]);
    }

    #[test]
    fn the_nearest_place_counts() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<HashSet<_>>();
        let known = Known {
            built_in: set(&["virtio"]),
            modules: set(&["virtio_blk", "virtio_scsi"]),
            config: HashMap::from([("CONFIG_SATA_AHCI".to_owned(), "y".to_owned())]),
            ..Known::default()
        };
        let initramfs = Initramfs { module_names: vec!["virtio_blk".into()], ..Initramfs::default() };
        let drivers = known.drivers(Some(&initramfs));
        let place = |name: &str| drivers.iter().find(|driver| driver.name == name).unwrap().place;
        assert_eq!(place("virtio"), DriverPlace::BuiltIn);
        assert_eq!(place("virtio_blk"), DriverPlace::Initramfs);
        assert_eq!(place("virtio_scsi"), DriverPlace::Modules);
        assert_eq!(place("ahci"), DriverPlace::BuiltIn);
        assert_eq!(place("nvme"), DriverPlace::Missing);
        assert!(Known::default().drivers(Some(&initramfs)).is_empty());
        // What is built in is not known, so that nothing is missing.
        let modules = Known { modules: set(&["virtio_scsi"]), ..Known::default() }.drivers(Some(&initramfs));
        let seen: Vec<_> = modules.iter().map(|driver| (driver.name.as_str(), driver.place)).collect();
        assert_eq!(seen, [("virtio_blk", DriverPlace::Initramfs), ("virtio_scsi", DriverPlace::Modules)]);
    }
}
