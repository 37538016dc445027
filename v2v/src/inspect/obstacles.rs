//! What stands in the way of KVM.

use guestdisk::Disks;
use guestdisk::detect::Kind;

use super::{DRIVERS, DriverPlace, Inspection, Kernel, Obstacle, System, missing};
use crate::names::{DiskNames, is_unstable};
use crate::view::GuestView;

/// Where swap space has its signature: at the end of the first page.
const SIGNATURE: u64 = 4086;
/// Signatures of swap space that holds the memory of a machine which sleeps.
const SLEEPING: [&[u8]; 3] = [b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0"];

/// Finds what is in the way of a Linux.
/// `starts`: it is the one that starts by itself.
pub(super) fn fill(disks: &Disks, names: &DiskNames, view: &GuestView, system: &mut System, starts: bool) {
    let mut found = vec![];
    selinux(view, system);
    for kernel in &system.kernels {
        found.extend(of_kernel(kernel));
    }
    if system.kernels.is_empty() {
        found.push(Obstacle {
            code: "no-kernel",
            message: "no kernel was found, neither through a boot loader nor in /boot".into(),
            hint: "a paravirtual Xen guest may have its kernel on the host: install one, and a boot loader"
                .into(),
            fatal: true,
        });
    } else if system.entries.is_empty() {
        found.push(Obstacle {
            code: "no-boot-loader",
            message: "no boot loader configuration offers a kernel of this system".into(),
            hint: "install a boot loader in the guest, or start the kernel directly".into(),
            fatal: false,
        });
    }
    found.extend(order(disks, names, system));
    found.extend(of_mounts(view));
    found.extend(missing::find(disks, names, view, system, starts));
    found.extend(of_volumes(disks));
    found.extend(root_on_array(disks, system));
    system.obstacles = found;
}

/// What is in the way where no system was found that it could belong to.
pub(super) fn without_system(disks: &Disks, found: &mut Inspection) {
    if !found.systems.is_empty() {
        return;
    }
    found.problems.push("no operating system was found".into());
    found.problems.extend(of_volumes(disks).into_iter().map(|obstacle| obstacle.message));
    for volume in disks.volumes() {
        match &volume.content {
            Some(content) if !content.kind.is_readable() => {
                let problem = format!("{}: {}, which is not read", volume.location, content.kind);
                if !matches!(content.kind, Kind::Swap | Kind::Lvm2 | Kind::LinuxRaid)
                    && !found.problems.contains(&problem)
                {
                    found.problems.push(problem);
                }
            }
            _ => {}
        }
    }
}

fn place(kernel: &Kernel, name: &str) -> DriverPlace {
    kernel
        .drivers
        .iter()
        .find(|driver| driver.name == name)
        .map_or(DriverPlace::Missing, |driver| driver.place)
}

/// What is in the way of a kernel. Only what holds for the one that starts by itself is fatal.
fn of_kernel(kernel: &Kernel) -> Option<Obstacle> {
    let release = &kernel.release;
    if release.ends_with("xen") || release.ends_with("xenU") || release.ends_with("xen0") {
        return Some(Obstacle {
            code: "xen-only-kernel",
            message: format!("the kernel {release} runs under Xen only"),
            hint: "install an ordinary kernel in the guest before it is converted".into(),
            fatal: kernel.default,
        });
    }
    let unknown = || {
        kernel.default.then(|| Obstacle {
            code: "drivers-unknown",
            message: format!("which drivers the kernel {release} has cannot be found out"),
            hint: "its modules or its configuration are not where they usually are".into(),
            fatal: false,
        })
    };
    if kernel.drivers.is_empty() {
        return unknown();
    }
    let reachable = |name: &str| matches!(place(kernel, name), DriverPlace::BuiltIn | DriverPlace::Initramfs);
    let there = |name: &str| place(kernel, name) != DriverPlace::Missing;
    let is_early = reachable("virtio_pci")
        && (reachable("virtio_blk") || reachable("virtio_scsi") && reachable("sd_mod"));
    if is_early {
        return None;
    }
    if there("virtio_pci") && (there("virtio_blk") || there("virtio_scsi")) {
        return Some(Obstacle {
            code: "virtio-not-in-initramfs",
            message: format!(
                "the kernel {release} has virtio drivers, but not where they are needed to find its root"
            ),
            hint: "converting the guest adds them to its initramfs".into(),
            fatal: false,
        });
    }
    if kernel.drivers.len() < DRIVERS.len() {
        return unknown();
    }
    let other = ["ahci", "ata_piix", "nvme"].into_iter().find(|name| reachable(name));
    Some(Obstacle {
        code: "no-virtio-driver",
        message: format!("the kernel {release} has no driver for virtio disks"),
        hint: match other {
            Some(driver) => format!("attach the disks by SATA or IDE instead: {driver} is there"),
            None => "install a kernel with virtio drivers in the guest before it is converted".into(),
        },
        fatal: kernel.default,
    })
}

/// fstab calls a partition `/` that is on another disk than the root: the disks are given in another order than the guest's,
/// and every name would be taken for something else.
fn order(disks: &Disks, names: &DiskNames, system: &System) -> Option<Obstacle> {
    let root = system.mounts.iter().find(|mount| mount.path == std::path::Path::new("/"))?;
    let named = names.find(disks, &root.spec).filter(|_| is_unstable(&root.spec))?;
    let [named, found] = [named, system.root].map(|index| disks.volumes().get(index));
    let disk = |volume: Option<&guestdisk::Volume>| match volume.map(|volume| &volume.location) {
        Some(guestdisk::Location::Whole { disk } | guestdisk::Location::Partition { disk, .. }) => {
            Some(*disk)
        }
        _ => None,
    };
    let (named, found) = disk(named).zip(disk(found))?;
    (named != found).then(|| Obstacle {
        code: "disk-order",
        message: format!(
            "fstab has its root at {}, but it is on disk {}: the disks are not in the guest's order",
            root.spec,
            found + 1
        ),
        hint: "give the disks in the order in which the guest counts them (the one with /dev/sda first)"
            .into(),
        fatal: system.entries.iter().any(|entry| entry.default),
    })
}

/// File systems that were not left cleanly.
fn of_mounts(view: &GuestView) -> Vec<Obstacle> {
    let mut found = vec![];
    let mut seen = vec![];
    for mount in view.mounts() {
        let Ok(place) = view.locate(&mount.path) else { continue };
        let Ok(files) = view.file_system(&place) else { continue };
        if seen.contains(&mount.volume) {
            continue;
        }
        seen.push(mount.volume);
        found.extend(files.notes().iter().map(|note| Obstacle {
            code: "unclean",
            message: format!("{}: {note}", mount.path.display()),
            hint: "shut the guest down before it is copied, if that is possible".into(),
            fatal: false,
        }));
    }
    found
}

/// Arrays that cannot be read, that lack members, or that cannot be changed.
fn of_array(array: &guestdisk::md::Array) -> Option<Obstacle> {
    let name = format!("the array /dev/{} ({})", array.name, array.level);
    let (code, message, hint) = match (array.device(), &array.locked) {
        (Err(error), _) => (
            "md-raid",
            format!("{name} was not looked at: {error}"),
            error
                .hints()
                .first()
                .cloned()
                .unwrap_or_else(|| "if the root lies on it, the guest is not converted".into()),
        ),
        (Ok(_), Some(reason)) => (
            "md-read-only",
            format!("{name} can be read and not changed: {reason}"),
            "let the guest finish what it does with the array, and shut it down cleanly before it is copied"
                .into(),
        ),
        (Ok(_), None) if !array.missing.is_empty() => (
            "md-degraded",
            format!("{name} lacks {} of its {} members", array.missing.len(), array.disks),
            "give all disks of the guest, or add new members to the array once it runs on KVM".into(),
        ),
        _ => return None,
    };
    Some(Obstacle { code, message, hint, fatal: false })
}

/// The module that a level of arrays needs.
fn module_of(level: &str) -> &str {
    match level {
        "raid4" | "raid5" | "raid6" => "raid456",
        level => level,
    }
}

/// The root lies on arrays that the initramfs of the kernel which starts by itself cannot put together.
fn root_on_array(disks: &Disks, system: &System) -> Option<Obstacle> {
    let is_physical = |array: &&guestdisk::md::Array| {
        disks.volumes().iter().any(|volume| {
            let own = disks.array_of(&volume.location).is_some_and(|other| other.name == array.name);
            own && volume.content.as_ref().is_some_and(|content| content.kind == Kind::Lvm2)
        })
    };
    let arrays: Vec<_> = match &system.location {
        guestdisk::Location::Logical { .. } => disks.arrays().iter().filter(is_physical).collect(),
        location => disks.array_of(location).into_iter().collect(),
    };
    let kernel = system.kernels.iter().find(|kernel| kernel.default)?;
    let has = |array: &guestdisk::md::Array| {
        let module = place(kernel, module_of(&array.level));
        let is_reachable = matches!(module, DriverPlace::BuiltIn | DriverPlace::Initramfs);
        // The kernel itself puts arrays of the oldest format together.
        let is_started = kernel.initramfs.as_ref().is_none_or(|initramfs| initramfs.has_mdadm)
            || array.version == guestdisk::md::Version::V0_90;
        is_reachable && is_started
    };
    if kernel.drivers.is_empty() {
        return None;
    }
    let array = arrays.into_iter().find(|array| !has(array))?;
    Some(Obstacle {
        code: "md-not-in-initramfs",
        message: format!(
            "the root lies on the array /dev/{} ({}), which the initramfs of the kernel {} does not put together",
            array.name, array.level, kernel.release
        ),
        hint: "install mdadm in the guest and make its initramfs anew before it is converted".into(),
        fatal: false,
    })
}

/// What lies on the disks and is in the way of whatever system it belongs to.
fn of_volumes(disks: &Disks) -> Vec<Obstacle> {
    let mut found: Vec<Obstacle> = disks.arrays().iter().filter_map(of_array).collect();
    let is_orphan = |volume: &&guestdisk::Volume| {
        let own = |member: &guestdisk::md::Member| member.location == volume.location;
        volume.content.as_ref().is_some_and(|content| content.kind == Kind::LinuxRaid)
            && !disks.arrays().iter().any(|array| array.members.iter().any(own))
    };
    found.extend(disks.volumes().iter().filter(is_orphan).map(|volume| Obstacle {
        code: "md-raid",
        message: format!("{} is a member of a software RAID whose superblock is damaged", volume.location),
        hint: "if the root lies on it, the guest is not converted".into(),
        fatal: false,
    }));
    for volume in disks.volumes() {
        let place = &volume.location;
        let kind = volume.content.as_ref().map(|content| content.kind);
        let (code, message, hint) = match kind {
            Some(Kind::Luks) if !disks.is_locked(volume) => continue,
            Some(Kind::Luks) => (
                "encrypted",
                format!(
                    "{place} is encrypted (LUKS), and no key was given that opens it: what lies in it was not looked at"
                ),
                "give its passphrase (--key all:file:FILE); if only data are in it, nothing is to be done",
            ),
            Some(Kind::BitLocker) => (
                "bitlocker",
                format!("{place} is encrypted (BitLocker)"),
                "suspend or remove BitLocker in the guest before it is converted",
            ),
            None if is_asleep(volume) => (
                "hibernated",
                format!("{place} holds the memory of a hibernated guest"),
                "resume the guest and shut it down before it is converted",
            ),
            _ => continue,
        };
        found.push(Obstacle { code, message, hint: hint.into(), fatal: code == "hibernated" });
    }
    found
}

fn is_asleep(volume: &guestdisk::Volume) -> bool {
    let mut signature = [0; 10];
    let read = volume.device.read_at(&mut signature, SIGNATURE);
    read.is_ok() && SLEEPING.contains(&&signature[..])
}

/// Whether SELinux is on.
fn selinux(view: &GuestView, system: &mut System) {
    let text =
        view.text("/etc/selinux/config").or_else(|| view.text("/etc/sysconfig/selinux")).unwrap_or_default();
    let mode = text.lines().rev().find_map(|line| line.trim().strip_prefix("SELINUX=")).unwrap_or_default();
    let off = |entry: &guestdisk::boot::Entry| {
        entry.default && entry.cmdline.split_whitespace().any(|word| matches!(word, "selinux=0"))
    };
    let on = matches!(mode.trim().to_ascii_lowercase().as_str(), "enforcing" | "permissive");
    system.selinux = on && !system.entries.iter().any(off);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};

    use super::*;

    /// A RAID 1 of three members that mdadm has made (guestdisk/testdata/md), without those whose partitions begin there.
    fn disks(without: &[usize]) -> Disks {
        let packed = include_bytes!("../../../guestdisk/testdata/md/raid1-1.2.zst");
        let mut bytes = zstd::decode_all(&packed[..]).unwrap();
        without.iter().for_each(|at| bytes[*at..*at + (1 << 20)].fill(0));
        let raw = Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap();
        Disks::open(Arc::new(raw)).unwrap()
    }

    #[test]
    fn arrays_without_members() {
        assert_eq!(of_volumes(&disks(&[])), []);
        let found = of_volumes(&disks(&[1 << 20]));
        let [obstacle] = &found[..] else { panic!("{found:?}") };
        assert_eq!((obstacle.code, obstacle.fatal), ("md-degraded", false));
        assert_eq!(obstacle.message, "the array /dev/md/raid1-1.2 (raid1) lacks 1 of its 3 members");
    }

    #[test]
    fn an_initramfs_without_what_an_array_needs() {
        let (disks, location) =
            (disks(&[]), |name: &str| guestdisk::Location::Array { name: name.into(), partition: None });
        let drivers = |place| vec![super::super::Driver { name: "raid1".into(), place }];
        let found = |name: &str, place, has_mdadm| {
            let initramfs = super::super::Initramfs { has_mdadm, ..Default::default() };
            let kernel = Kernel {
                default: true,
                drivers: drivers(place),
                initramfs: Some(initramfs),
                ..Kernel::default()
            };
            let system = System { location: location(name), kernels: vec![kernel], ..System::default() };
            root_on_array(&disks, &system).map(|obstacle| obstacle.code)
        };
        let name = "md/raid1-1.2";
        assert_eq!(found(name, DriverPlace::Initramfs, true), None);
        assert_eq!(found(name, DriverPlace::BuiltIn, true), None);
        assert_eq!(found(name, DriverPlace::Modules, true), Some("md-not-in-initramfs"));
        assert_eq!(found(name, DriverPlace::Initramfs, false), Some("md-not-in-initramfs"));
        assert_eq!(found("md/other", DriverPlace::Modules, false), None);
    }
}
