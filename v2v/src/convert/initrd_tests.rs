use std::collections::HashSet;
use std::path::Path;

use guestdisk::Location;
use guestdisk::boot::{BootFile, Entry, Loader};

use super::cmdline::Cmdlines;
use super::draft::Draft;
use super::initrd;
use super::names::tests::{ROOT, SWAP, names};
use super::tests::system;
use super::tree::memory::Memory;
use crate::initramfs::{self, Limits};
use crate::inspect::{Driver, DriverPlace, Kernel, System};
use crate::plan::{Action, Plan, TargetBus};
use cpio::Archive;

const RELEASE: &str = "6.1.0-30-amd64";
const DEP: &str = super::modules::tests::DEP;

fn location() -> Location {
    Location::Partition { disk: 0, number: 1 }
}

fn boot_file(path: &str) -> BootFile {
    BootFile { volume: 0, location: location(), path: path.into(), section: None }
}

/// A guest with this initramfs; its tree of modules has files with this suffix.
fn guest(initramfs: &[u8], suffix: &str) -> (Memory, System) {
    let folder = format!("/usr/lib/modules/{RELEASE}");
    let dep = DEP.replace(".ko", suffix);
    let mut tree = Memory::default()
        .file("/boot/initrd.img", initramfs)
        .file(&format!("{folder}/modules.dep"), &dep)
        .file(&format!("{folder}/modules.dep.bin"), "the index of depmod")
        .file(&format!("{folder}/modules.alias.bin"), "aliases")
        .link_to("/lib", "usr/lib");
    for path in dep.lines().filter_map(|line| line.split_once(':')) {
        let bytes = format!("code of {}", path.0);
        let bytes = if suffix == ".ko.zst" {
            zstd::encode_all(bytes.as_bytes(), 1).unwrap()
        } else {
            bytes.into_bytes()
        };
        tree = tree.file(&format!("{folder}/{}", path.0), bytes);
    }
    let mut system = system();
    let mut kernel = Kernel {
        release: RELEASE.to_owned(),
        initrds: vec![boot_file("/boot/initrd.img")],
        modules: Some(folder.into()),
        entries: vec!["a".to_owned()],
        ..Kernel::default()
    };
    let archive = initramfs::read(initramfs, &Limits::default(), &initramfs::is_wanted);
    kernel.initramfs = Some(initramfs::describe(&archive, RELEASE, initramfs.len() as u64));
    kernel.drivers = vec![Driver { name: "virtio_blk".to_owned(), place: DriverPlace::Modules }];
    system.kernels = vec![kernel];
    system.entries = vec![Entry {
        title: "a".to_owned(),
        id: "a".to_owned(),
        kernel: boot_file("/vmlinuz"),
        initrds: vec![],
        cmdline: "root=/dev/sda1".to_owned(),
        source: boot_file("/grub.cfg"),
        loader: Loader::Grub,
        default: true,
    }];
    (tree, system)
}

fn archive(fill: impl FnOnce(&mut Archive)) -> Vec<u8> {
    let mut archive = Archive::new();
    fill(&mut archive);
    archive.finish()
}

/// That of initramfs-tools, with a driver of VMware and nothing for KVM.
fn debian() -> Vec<u8> {
    archive(|archive| {
        archive.link("lib", "usr/lib").unwrap();
        archive.way_to("", &format!("usr/lib/modules/{RELEASE}/kernel/drivers/scsi/x")).unwrap();
        let base = format!("usr/lib/modules/{RELEASE}/kernel/drivers/scsi");
        archive.file(&format!("{base}/scsi_mod.ko"), 0o644, b"code").unwrap();
        archive.way_to("", "conf/conf.d/x").unwrap();
        archive.file("conf/initramfs.conf", 0o644, b"MODULES=dep\n").unwrap();
        archive.file("conf/conf.d/resume", 0o644, b"RESUME=/dev/sda2\n").unwrap();
    })
}

fn planned(tree: &Memory, system: &System) -> (Plan, Vec<&'static str>) {
    let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
    let lines = Cmdlines { names: &names, from_xen: false, add_serial: false };
    let mut draft = Draft::new(tree);
    let missing = initrd::convert(&mut draft, system, TargetBus::VirtioBlk, &lines, &[]).unwrap();
    (draft.finish().unwrap(), missing.drivers)
}

/// The initramfs with what the plan adds.
fn result(initramfs: &[u8], plan: &Plan) -> Vec<u8> {
    let [change] = &plan.changes[..] else { panic!("{plan:?}") };
    let Action::Append { bytes } = &change.action else { panic!("{change:?}") };
    let whole = [initramfs, bytes].concat();
    assert_eq!(change.new_digest, super::draft::digest(&whole));
    whole
}

fn paths(bytes: &[u8]) -> HashSet<String> {
    let archive = initramfs::read(bytes, &Limits::default(), &|_| false);
    assert_eq!(archive.problem, "");
    archive.members.into_iter().map(|member| member.path).collect()
}

#[test]
fn modules_with_what_they_need_are_put_behind() {
    let old = debian();
    let (tree, system) = guest(&old, ".ko");
    let (plan, missing) = planned(&tree, &system);
    assert_eq!(missing, ["virtio_pci", "virtio_blk"]);
    let new = result(&old, &plan);
    let archive = initramfs::read(&new[..], &Limits::default(), &|_| true);
    assert_eq!(archive.segments.len(), 2);
    assert!(archive.segments[1].offset.is_multiple_of(512));
    let base = format!("usr/lib/modules/{RELEASE}");
    let text = |path: &str| {
        let member = archive.get(path).unwrap_or_else(|| panic!("{path}"));
        String::from_utf8(member.bytes.clone().unwrap()).unwrap()
    };
    assert_eq!(
        text(&format!("{base}/kernel/drivers/block/virtio_blk.ko")),
        "code of kernel/drivers/block/virtio_blk.ko"
    );
    assert_eq!(text(&format!("{base}/modules.dep.bin")), "the index of depmod");
    assert_eq!(text("conf/conf.d/resume"), format!("RESUME=UUID={SWAP}\n"));
    // No directory takes the place of a link.
    let added: Vec<_> = archive.members.iter().skip(archive.segments[0].members).collect();
    assert!(
        added
            .iter()
            .filter(|member| member.is_directory())
            .all(|member| member.path.starts_with("usr/lib/modules"))
    );
}

#[test]
fn a_second_plan_is_empty() {
    let old = debian();
    let (tree, system) = guest(&old, ".ko");
    let new = result(&old, &planned(&tree, &system).0);
    let (tree, system) = guest(&new, ".ko");
    let (plan, missing) = planned(&tree, &system);
    assert!(plan.changes.is_empty() && missing.is_empty(), "{plan:?}");
}

#[test]
fn an_archive_with_its_modules_elsewhere_keeps_them() {
    // mkinitcpio of some years had all modules in one folder, and unpacked.
    let old = archive(|archive| {
        archive.way_to("", &format!("usr/lib/modules/{RELEASE}/kernel/x")).unwrap();
        archive.link("lib", "usr/lib").unwrap();
        archive.file(&format!("usr/lib/modules/{RELEASE}/kernel/scsi_mod.ko"), 0o644, b"code").unwrap();
        archive.file("config", 0o644, b"").unwrap();
    });
    let (tree, system) = guest(&old, ".ko.zst");
    let new = result(&old, &planned(&tree, &system).0);
    let archive = initramfs::read(&new[..], &Limits::default(), &|_| true);
    let text = |path: &str| {
        let path = format!("usr/lib/modules/{RELEASE}/{path}");
        String::from_utf8(archive.get(&path).unwrap_or_else(|| panic!("{path}")).bytes.clone().unwrap())
            .unwrap()
    };
    let dep = text("modules.dep");
    assert!(
        dep.contains("kernel/drivers/scsi/sd_mod.ko: kernel/scsi_mod.ko kernel/lib/crc-t10dif.ko\n"),
        "{dep}"
    );
    assert_eq!(text("kernel/drivers/virtio/virtio.ko"), "code of kernel/drivers/virtio/virtio.ko.zst");
    let index =
        archive.get(&format!("usr/lib/modules/{RELEASE}/modules.dep.bin")).unwrap().bytes.clone().unwrap();
    let found = super::index::find(&index, b"scsi_mod").unwrap();
    assert_eq!(String::from_utf8(found).unwrap(), "kernel/scsi_mod.ko:");
}

#[test]
fn an_archive_without_any_module_gets_a_folder() {
    let old = archive(|archive| archive.file("bin", 0o755, b"").unwrap());
    let (tree, system) = guest(&old, ".ko.zst");
    let found = paths(&result(&old, &planned(&tree, &system).0));
    assert!(
        found.contains(&format!("lib/modules/{RELEASE}/kernel/drivers/block/virtio_blk.ko")),
        "{found:?}"
    );
    assert!(found.contains("lib/modules"));
}

#[test]
fn every_compression_is_continued() {
    let plain = debian();
    let gzip = {
        use std::io::Write as _;
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
        encoder.write_all(&plain).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    for (old, compression) in [(plain, "none"), (gzip, "gzip"), (zstd, "zstd")] {
        let (tree, system) = guest(&old, ".ko");
        let new = result(&old, &planned(&tree, &system).0);
        let archive = initramfs::read(&new[..], &Limits::default(), &|_| false);
        assert_eq!((archive.segments.len(), archive.problem.as_str()), (2, ""));
        assert_eq!(archive.segments[1].compression.name(), compression);
    }
}

#[test]
fn drivers_that_are_nowhere_are_said() {
    let old = debian();
    let (mut tree, system) = guest(&old, ".ko");
    let folder = format!("/usr/lib/modules/{RELEASE}");
    tree = tree.file(&format!("{folder}/modules.dep"), "kernel/drivers/virtio/virtio.ko:\n");
    let (plan, _) = planned(&tree, &system);
    assert!(
        plan.to_do[0].contains("there is no module virtio_pci") && plan.to_do[0].contains("--bus sata"),
        "{plan:?}"
    );
}

#[test]
fn unified_images_and_kernels_alone() {
    let (tree, mut system) = guest(&debian(), ".ko");
    system.kernels[0].unified = true;
    let (plan, _) = planned(&tree, &system);
    assert!(plan.changes.is_empty() && plan.to_do[0].contains("nothing can be added"));
    system.kernels[0].initrds.clear();
    system.kernels[0].initramfs = None;
    let (plan, _) = planned(&tree, &system);
    assert!(plan.changes.is_empty() && plan.to_do[0].contains("without an initramfs"));
    for name in TargetBus::VirtioBlk.modules() {
        system.kernels[0].drivers.push(Driver { name: (*name).to_owned(), place: DriverPlace::BuiltIn });
    }
    system.kernels[0].drivers.remove(0);
    assert!(planned(&tree, &system).0.to_do.is_empty());
}

/// What is only to do of a kernel that somebody has to choose keeps the guest from starting if it is the one that starts by
/// itself.
#[test]
fn what_the_kernel_that_starts_by_itself_lacks_stops_the_guest() {
    let stop = |tree: &Memory, system: &System| {
        let mut system = system.clone();
        let (other, _) = planned(tree, &system);
        assert!(other.stops.is_empty() && other.to_do.len() == 1, "{other:?}");
        system.kernels[0].default = true;
        let (plan, _) = planned(tree, &system);
        assert!(plan.to_do.is_empty() && plan.stops.len() == 1, "{:?}", plan.stops);
        plan.stops[0].sentence()
    };
    // Nobody can read it.
    let (tree, mut system) = guest(&debian(), ".ko");
    system.kernels[0].initramfs = None;
    assert!(stop(&tree, &system).contains("cannot be read"));
    // Nor to its end.
    let mut half = debian();
    half.truncate(half.len() / 2);
    let (tree, damaged) = guest(&half, ".ko");
    assert!(stop(&tree, &damaged).contains("is damaged"));
    // Nothing to add.
    let (mut tree, mut bare) = guest(&debian(), ".ko");
    tree.files.retain(|path, _| !path.starts_with("/usr/lib/modules"));
    bare.kernels[0].modules = None;
    assert!(stop(&tree, &bare).contains("--bus sata"));
    let (tree, mut unified) = guest(&debian(), ".ko");
    unified.kernels[0].unified = true;
    assert!(stop(&tree, &unified).contains("nothing can be added"));
    // Its drivers are in the kernel: an initramfs that nobody can read is no matter.
    for name in TargetBus::VirtioBlk.modules() {
        system.kernels[0].drivers.push(Driver { name: (*name).to_owned(), place: DriverPlace::BuiltIn });
    }
    system.kernels[0].drivers.remove(0);
    system.kernels[0].default = true;
    let (plan, _) = planned(&guest(&debian(), ".ko").0, &system);
    assert!(plan.stops.is_empty() && plan.to_do.is_empty() && plan.left_alone.len() == 1, "{plan:?}");
}

#[test]
fn drivers_are_needed_where_the_guest_starts_by_itself() {
    let (tree, mut system) = guest(&debian(), ".ko");
    assert!(!planned(&tree, &system).0.changes.iter().any(|change| change.needed));
    system.kernels[0].default = true;
    assert!(planned(&tree, &system).0.changes.iter().any(|change| change.needed));
}

#[test]
fn nash_is_told_what_to_load() {
    let init = "#!/bin/nash\nmount -t proc /proc /proc\ninsmod /lib/scsi_mod.ko \ninsmod /lib/mptspi.ko \nmkblkdevs\nresume LABEL=x\nmkrootdev -t ext3 -o defaults,ro sda1\n";
    let old = archive(|archive| {
        archive.way_to("", "bin/nash").unwrap();
        archive.file("bin/nash", 0o755, b"").unwrap();
        archive.way_to("", "lib/x").unwrap();
        archive.file("lib/scsi_mod.ko", 0o600, b"code").unwrap();
        archive.file("init", 0o755, init.as_bytes()).unwrap();
    });
    let (tree, system) = guest(&old, ".ko");
    let new = result(&old, &planned(&tree, &system).0);
    let archive = initramfs::read(&new[..], &Limits::default(), &|_| true);
    let text = String::from_utf8(archive.get("init").unwrap().bytes.clone().unwrap()).unwrap();
    let loaded: Vec<_> =
        text.lines().filter_map(|line| line.strip_prefix("insmod /lib/")).map(str::trim).collect();
    let expected = [
        "scsi_mod.ko",
        "mptspi.ko",
        "virtio_pci_modern_dev.ko",
        "virtio.ko",
        "virtio_ring.ko",
        "virtio_pci.ko",
        "virtio_blk.ko",
    ];
    assert_eq!(loaded, expected);
    assert!(text.ends_with("mkblkdevs\nresume LABEL=x\nmkrootdev -t ext3 -o defaults,ro sda1\n"));
    assert!(archive.get("lib/virtio_blk.ko").is_some());
}

#[test]
fn what_an_initramfs_waits_for_is_renamed() {
    let hook = "var/lib/dracut/hooks/initqueue/finished/devexists-\\x2fdev\\x2fsda1.sh";
    let wait = "etc/systemd/system/dev-sda1.device.d/timeout.conf";
    let old = archive(|archive| {
        archive.way_to("", wait).unwrap();
        archive.file(wait, 0o644, b"[Unit]\nJobTimeoutSec=infinity\n").unwrap();
        archive.way_to("", hook).unwrap();
        archive.file(hook, 0o755, b"[ -e \"/dev/sda1\" ]\n").unwrap();
        archive.way_to("", "etc/cmdline.d/x").unwrap();
        archive.file("etc/cmdline.d/95root-dev.conf", 0o644, b" root=/dev/sda1 rootfstype=ext4\n").unwrap();
    });
    let (tree, mut system) = guest(&old, ".ko");
    for name in TargetBus::VirtioBlk.modules() {
        system.kernels[0].drivers.retain(|driver| driver.name != *name);
        system.kernels[0].drivers.push(Driver { name: (*name).to_owned(), place: DriverPlace::BuiltIn });
    }
    let (plan, missing) = planned(&tree, &system);
    assert!(missing.is_empty());
    let new = result(&old, &plan);
    let archive = initramfs::read(&new[..], &Limits::default(), &|_| true);
    let text = |path: &str| String::from_utf8(archive.get(path).unwrap().bytes.clone().unwrap()).unwrap();
    assert_eq!(text(hook), format!("[ -e \"/dev/disk/by-uuid/{ROOT}\" ]\n"));
    assert_eq!(text("etc/cmdline.d/95root-dev.conf"), format!(" root=UUID={ROOT} rootfstype=ext4\n"));
    assert_eq!(text(wait), "[Unit]\nJobTimeoutSec=1\n");
    assert_eq!(archive.segments[1].members, 6);
}

#[test]
fn an_old_kernel_with_lz4_goes_on_reading() {
    let unpacked = debian();
    let old = super::segment::append(&unpacked, super::segment::Packing::Lz4Continued, 0).unwrap();
    let (tree, mut system) = guest(&old, ".ko");
    system.kernels[0].release = "5.4.0-100-generic".to_owned();
    let new = result(&old, &planned(&tree, &system).0);
    assert_eq!(new[old.len()..old.len() + 4], 0x184c_2102_u32.to_le_bytes());
    let found = paths(&new);
    assert!(found.contains("conf/initramfs.conf"));
    assert!(found.iter().any(|path| Path::new(path).ends_with("virtio_blk.ko")));
}

#[test]
fn what_is_left_of_a_removed_kernel_is_told_and_no_failure() {
    let old = debian();
    let (mut tree, system) = guest(&old, ".ko");
    let folder = format!("/usr/lib/modules/{RELEASE}/kernel");
    tree.files.retain(|path, _| !path.starts_with(&folder));
    let (plan, missing) = planned(&tree, &system);
    assert!(missing.is_empty());
    assert!(plan.to_do[0].contains("which modules.dep lists, is not there"), "{:?}", plan.to_do);
    // Its names are changed all the same.
    assert!(!paths(&result(&old, &plan)).iter().any(|path| path.ends_with("virtio_blk.ko")));
}

#[test]
fn the_filter_of_lvm_in_an_initramfs() {
    let old = archive(|archive| {
        archive.way_to("", "etc/lvm/lvm.conf").unwrap();
        archive.file("etc/lvm/lvm.conf", 0o644, b"filter = [ \"a|/dev/sda3|\", \"r|.*|\" ]\n").unwrap();
    });
    let (tree, system) = guest(&old, ".ko");
    let new = result(&old, &planned(&tree, &system).0);
    let archive = initramfs::read(&new[..], &Limits::default(), &|_| true);
    let member = archive.get("etc/lvm/lvm.conf").unwrap();
    assert_eq!(member.bytes.as_deref().unwrap(), b"filter = [ \"a|/dev/vda3|\", \"r|.*|\" ]\n");
}

#[test]
fn nothing_is_put_behind_a_damaged_archive() {
    let mut old = debian();
    old.truncate(old.len() / 2);
    let (tree, system) = guest(&old, ".ko");
    let (plan, missing) = planned(&tree, &system);
    assert!(plan.changes.is_empty() && missing.is_empty(), "{plan:?}");
    assert!(plan.to_do[0].contains("is damaged"), "{:?}", plan.to_do);
}
