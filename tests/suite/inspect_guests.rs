//! Guests in the shapes that distributions and other hypervisors leave them, inspected.

use std::path::{Path, PathBuf};

use guestdisk::Disks;
use guestdisk::boot::Loader;
use tests::command::Cmd;
use tests::guest::{self, Mounted};
use tests::guest_image::{Holds, Part, disk};
use tests::guests::guests;
use tests::skip::{Need, tool};
use tests::{Dir, requires};
use v2v::inspect::{DriverPlace, Init, Inspection, Kernel, System, SystemKind, inspect, to_text};
use v2v::view::GuestView;

const ROOT: &str = "11111111-2222-3333-4444-555555555555";
const BOOT: &str = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";

fn tools() -> Need {
    for name in ["sfdisk", "mke2fs", "debugfs", "mkfs.vfat", "mcopy", "cpio", "xz", "gzip"] {
        tool(name)?;
    }
    Ok(())
}

/// The head of a bzImage that calls itself so.
fn bzimage(version: &str) -> Vec<u8> {
    let mut head = vec![0; 0x400];
    head[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    head[0x202..0x206].copy_from_slice(b"HdrS");
    head[0x206..0x208].copy_from_slice(&[0x0f, 2]);
    head[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    head[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
    head
}

/// An ELF file of this machine, as far as it is looked at.
fn program(machine: u8) -> Vec<u8> {
    let mut head = vec![0; 64];
    head[..6].copy_from_slice(b"\x7fELF\x02\x01");
    head[18] = machine;
    head
}

/// An initramfs with these (empty) files.
fn initramfs(dir: &Dir, packer: &str, files: &[&str]) -> Vec<u8> {
    let _ = std::fs::remove_dir_all(dir.file("ramfs"));
    for path in files {
        let file = dir.file("ramfs").join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, b"").unwrap();
    }
    let script = format!("cd ramfs && find . | sort | cpio -o -H newc --quiet | {packer} > ../ramfs.packed");
    Cmd::new("sh").arg("-c").arg(script).dir(dir.path()).ok();
    dir.read("ramfs.packed")
}

fn place(kernel: &Kernel, driver: &str) -> DriverPlace {
    kernel.drivers.iter().find(|found| found.name == driver).unwrap_or_else(|| panic!("{driver}")).place
}

fn codes(system: &System) -> Vec<&str> {
    system.obstacles.iter().map(|obstacle| obstacle.code).collect()
}

fn device_names(system: &System) -> Vec<(&str, &str, Option<usize>)> {
    let names = system.device_names.iter();
    names.map(|found| (found.file.to_str().unwrap(), found.name.as_str(), found.volume)).collect()
}

fn only(found: &Inspection) -> &System {
    assert_eq!(found.systems.len(), 1, "{:#?}", found.problems);
    &found.systems[0]
}

/// Red Hat's layout, as VMware leaves it: /boot of its own, entries of the specification, dracut, NetworkManager and ifcfg.
#[test]
fn red_hat_from_vmware() {
    requires!(tools());
    let dir = Dir::new();
    let release = "5.14.0-1.el9.x86_64";
    let entry = format!(
        "title Rocky Linux\nversion {release}\nlinux /vmlinuz-{release}\ninitrd /initramfs-{release}.img\noptions root=/dev/sda2 ro resume=/dev/sda3\n"
    );
    let modules = format!("usr/lib/modules/{release}");
    let ramfs = initramfs(
        &dir,
        "xz --check=crc32",
        &["usr/lib/dracut/modules.txt", "etc/initrd-release", &format!("{modules}/kernel/vmw_pvscsi.ko.xz")],
    );
    let kernel = bzimage(&format!("{release} (mock@x) #1"));
    let boot_files: &[(&str, &[u8])] = &[
        ("grub2/grub.cfg", b"insmod blscfg\nblscfg\n"),
        ("grub2/grubenv", b"# GRUB Environment Block\nkernelopts=root=/dev/sda2 ro\n####"),
        (&format!("loader/entries/abc-{release}.conf"), entry.as_bytes()),
        (&format!("vmlinuz-{release}"), &kernel),
        (&format!("initramfs-{release}.img"), &ramfs),
    ];
    let root_files: &[(&str, &[u8])] = &[
        ("etc/os-release", b"ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\nVERSION_ID=\"9.4\"\nPRETTY_NAME=\"Rocky Linux 9.4\"\n"),
        ("etc/fstab", b"/dev/sda2 / ext4 defaults 0 1\n/dev/sda1 /boot ext4 defaults\n/dev/sda3 none swap defaults\n/dev/sdb1 /data xfs defaults\n"),
        ("etc/hostname", b"web.example.org\n"),
        ("etc/selinux/config", b"# x\nSELINUX=enforcing\nSELINUXTYPE=targeted\n"),
        ("etc/sysconfig/network-scripts/ifcfg-ens192", b"DEVICE=ens192\nBOOTPROTO=none\nIPADDR=192.0.2.7\nHWADDR=00:50:56:AA:BB:CC\n"),
        ("etc/NetworkManager/system-connections/b.nmconnection", b"[connection]\nid=b\ninterface-name=ens224\n[ipv4]\nmethod=auto\n"),
        ("etc/lvm/devices/system.devices", b"IDTYPE=devname IDNAME=/dev/sda4 DEVNAME=/dev/sda4 PVID=x\n"),
        (&format!("{modules}/modules.builtin"), b"kernel/fs/ext4/ext4.ko\n"),
        (&format!("{modules}/modules.dep"), b"kernel/virtio_blk.ko.xz:\nkernel/virtio_pci.ko.xz:\nkernel/vmw_pvscsi.ko.xz:\n"),
        ("usr/lib/systemd/systemd", &program(62)),
        ("usr/lib/systemd/system/vmtoolsd.service", b""),
        ("etc/systemd/system/multi-user.target.wants/vmtoolsd.service", b""),
        ("usr/lib/sysimage/rpm/rpmdb.sqlite", b""),
        ("usr/bin/x", b""),
        ("var/x", b""),
        ("boot/x", b""),
    ];
    let parts = [
        Part { kind: "L", mib: 20, holds: Holds::Ext4(BOOT), files: boot_files },
        Part { kind: "L", mib: 30, holds: Holds::Ext4(ROOT), files: root_files },
        Part { kind: "S", mib: 8, holds: Holds::Nothing, files: &[] },
    ];
    disk(&dir, "d", "dos", &parts);
    let offset = 21 << 20;
    let image = format!("{}?offset={offset}", dir.file("d").display());
    let links = "symlink /lib usr/lib\nsymlink /bin usr/bin\nmkdir /sbin\nsymlink /sbin/init ../lib/systemd/systemd\n";
    Cmd::new("debugfs").words("-w -f -").arg(image).stdin(links).ok();
    let disks = Disks::open(guest::open(&dir.file("d"))).unwrap();
    let found = inspect(&disks).unwrap();
    let system = only(&found);
    assert_eq!((system.root, system.kind), (1, SystemKind::Linux));
    assert_eq!((system.distribution.as_str(), system.version.as_str()), ("rocky", "9.4"));
    assert_eq!(system.like, ["rhel", "centos", "fedora"]);
    assert_eq!((system.architecture.as_str(), system.packages.as_str()), ("x86_64", "rpm"));
    assert_eq!(
        (system.host_name.as_str(), system.init, system.selinux),
        ("web.example.org", Init::Systemd, true)
    );
    let mounts: Vec<_> = system.mounts.iter().map(|mount| mount.volume).collect();
    assert_eq!(mounts, [Some(1), Some(0), Some(2), None]);
    let kernel = &system.kernels[0];
    assert_eq!((system.kernels.len(), kernel.release.as_str(), kernel.default), (1, release, true));
    let lib = PathBuf::from(format!("/{modules}"));
    assert_eq!(kernel.modules.as_ref(), Some(&lib));
    let ramfs = kernel.initramfs.as_ref().unwrap();
    assert_eq!(
        (ramfs.generator.as_str(), ramfs.compression.as_str(), ramfs.module_suffix.as_str()),
        ("dracut", "xz", ".ko.xz")
    );
    assert_eq!(place(kernel, "ext4"), DriverPlace::BuiltIn);
    assert_eq!(place(kernel, "vmw_pvscsi"), DriverPlace::Initramfs);
    assert_eq!(place(kernel, "virtio_blk"), DriverPlace::Modules);
    assert_eq!(place(kernel, "virtio_scsi"), DriverPlace::Missing);
    assert_eq!(codes(system), ["virtio-not-in-initramfs", "mount-missing"]);
    let interfaces: Vec<_> = system
        .interfaces
        .iter()
        .map(|found| (found.name.as_str(), found.mac.as_deref(), found.is_static))
        .collect();
    assert_eq!(interfaces, [("ens192", Some("00:50:56:aa:bb:cc"), true), ("ens224", None, false)]);
    assert_eq!(system.tools.len(), 1);
    assert_eq!(system.tools[0].name, "open-vm-tools");
    assert_eq!(system.tools[0].services, [Path::new("/usr/lib/systemd/system/vmtoolsd.service")]);
    let config = format!("/boot/loader/entries/abc-{release}.conf");
    assert_eq!(
        device_names(system),
        [
            ("/etc/fstab", "/dev/sda2", Some(1)),
            ("/etc/fstab", "/dev/sda1", Some(0)),
            ("/etc/fstab", "/dev/sda3", Some(2)),
            ("/etc/fstab", "/dev/sdb1", None),
            ("/etc/lvm/devices/system.devices", "/dev/sda4", None),
            (config.as_str(), "/dev/sda2", Some(1)),
            (config.as_str(), "/dev/sda3", Some(2)),
            ("/boot/grub2/grubenv", "/dev/sda2", Some(1)),
        ]
    );
    let loaders: Vec<_> =
        system.loaders.iter().map(|found| (found.loader, found.file.path.to_str().unwrap())).collect();
    assert!(loaders.contains(&(Loader::Grub, "/grub2/grub.cfg")), "{loaders:?}");
    assert!(loaders.contains(&(Loader::Grub, "/grub2/grubenv")), "{loaders:?}");
    let text = to_text(&disks, &found);
    assert!(text.contains("Rocky Linux 9.4 on disk 1 partition 2"), "{text}");
    let view = GuestView::new(&disks, system);
    assert_eq!(view.read("/boot/grub2/grub.cfg", 100).unwrap(), b"insmod blscfg\nblscfg\n");
}

/// An old one under Xen: GRUB of the first generation, a kernel for Xen, mkinitrd, no os-release.
#[test]
fn centos_5_under_xen() {
    requires!(tools());
    let dir = Dir::new();
    let release = "2.6.18-398.el5xen";
    let ramfs = initramfs(&dir, "gzip -9c", &["bin/nash", "lib/ext3.ko", "lib/xenblk.ko"]);
    let kernel = bzimage(release);
    let menu = format!(
        "default=0\ntitle CentOS\n\troot (hd0,0)\n\tkernel /boot/vmlinuz-{release} ro root=/dev/xvda1 console=xvc0\n\tinitrd /boot/initrd-{release}.img\n"
    );
    let dep = format!(
        "/lib/modules/{release}/kernel/fs/ext3/ext3.ko: \n/lib/modules/{release}/kernel/xenblk.ko:\n"
    );
    let files: &[(&str, &[u8])] = &[
        ("etc/redhat-release", b"CentOS release 5.11 (Final)\n"),
        ("etc/fstab", b"/dev/xvda1 / ext3 defaults 1 1\n"),
        ("etc/inittab", b"co:2345:respawn:/sbin/agetty xvc0 9600 vt100-nav\n"),
        ("etc/sysconfig/network", b"NETWORKING=yes\nHOSTNAME=\"old\"\n"),
        ("boot/grub/menu.lst", menu.as_bytes()),
        ("boot/grub/device.map", b"(hd0) /dev/xvda\n"),
        (&format!("boot/vmlinuz-{release}"), &kernel),
        (&format!("boot/initrd-{release}.img"), &ramfs),
        (&format!("lib/modules/{release}/modules.dep"), dep.as_bytes()),
        ("sbin/init", &program(3)),
        ("var/lib/rpm/Packages", b""),
        ("proc/x", b""),
    ];
    let disks =
        Disks::open(disk(&dir, "d", "dos", &[Part { kind: "L", mib: 20, holds: Holds::Ext4(ROOT), files }]))
            .unwrap();
    let found = inspect(&disks).unwrap();
    let system = only(&found);
    assert_eq!((system.distribution.as_str(), system.version.as_str()), ("centos", "5.11"));
    assert_eq!(
        (system.host_name.as_str(), system.init, system.architecture.as_str()),
        ("old", Init::SysV, "i686")
    );
    assert_eq!(system.kernels[0].initramfs.as_ref().unwrap().generator, "mkinitrd");
    assert_eq!(codes(system), ["xen-only-kernel"]);
    assert!(system.obstacles[0].fatal);
    let names = device_names(system);
    assert!(names.contains(&("/boot/grub/menu.lst", "/dev/xvda1", Some(0))), "{names:?}");
    // The disk as a whole is no volume: it has partitions.
    assert!(names.contains(&("/boot/grub/device.map", "/dev/xvda", None)), "{names:?}");
}

/// Names that hide nothing, an initramfs that is none, a kernel that is not there: everything is told, nothing ends.
#[test]
fn what_is_broken_is_told() {
    requires!(tools());
    let dir = Dir::new();
    let kernel = bzimage("6.6.1");
    let files: &[(&str, &[u8])] = &[
        ("etc/alpine-release", b"3.19.1\n"),
        ("etc/fstab", b"UUID=dead / ext4\n/dev/cdrom /media iso9660 ro\nserver:/x /nfs nfs\n"),
        ("boot/extlinux.conf", b"DEFAULT a\nLABEL a\n LINUX vmlinuz-lts\n INITRD initramfs-lts\n APPEND root=UUID=dead\nLABEL b\n LINUX gone\n APPEND root=/dev/sda1\n"),
        ("boot/vmlinuz-lts", &kernel),
        ("boot/initramfs-lts", b"\x1f\x8bbroken"),
        ("bin/busybox", &program(183)),
        ("dev/x", b""),
        ("sbin/openrc", b""),
        ("lib/apk/db/installed", b""),
    ];
    let disks =
        Disks::open(disk(&dir, "d", "dos", &[Part { kind: "L", mib: 20, holds: Holds::Ext4(ROOT), files }]))
            .unwrap();
    let found = inspect(&disks).unwrap();
    let system = only(&found);
    assert_eq!((system.distribution.as_str(), system.init), ("alpine", Init::OpenRc));
    assert_eq!((system.architecture.as_str(), system.packages.as_str()), ("aarch64", "apk"));
    let releases: Vec<_> = system.kernels.iter().map(|kernel| kernel.release.as_str()).collect();
    assert_eq!(releases, ["6.6.1", ""], "{:#?}", system.kernels);
    assert!(system.kernels[0].drivers.is_empty());
    assert_eq!(codes(system), ["drivers-unknown", "root-missing"], "{:#?}", system.obstacles);
    assert!(
        found.problems.iter().any(|problem| problem.contains("initramfs-lts cannot be read to its end")),
        "{:?}",
        found.problems
    );
}

/// Without a system: what lies there is told.
#[test]
fn no_system_at_all() {
    requires!(tools());
    let dir = Dir::new();
    let parts = [Part {
        kind: "L",
        mib: 20,
        holds: Holds::Ext4(ROOT),
        files: &[("photos/1.jpg", b"x"), ("etc/x", b"")],
    }];
    let mut bytes = vec![0; 1 << 20];
    bytes[..6].copy_from_slice(b"LUKS\xba\xbe");
    bytes[7] = 1;
    let disks = Disks::open_all(vec![disk(&dir, "d", "gpt", &parts), guest::disk(bytes)]).unwrap();
    let found = inspect(&disks).unwrap();
    assert!(found.systems.is_empty());
    assert_eq!(found.problems[0], "no operating system was found");
    assert!(found.problems[1].starts_with("disk 2 is encrypted (LUKS)"), "{:?}", found.problems);
}

/// A guest that sleeps must not be started elsewhere.
#[test]
fn memory_of_a_sleeping_guest() {
    requires!(tools());
    let dir = Dir::new();
    let files: &[(&str, &[u8])] = &[
        ("etc/os-release", b"ID=x\n"),
        ("bin/x", b""),
        ("dev/x", b""),
        ("etc/fstab", b"/dev/sda2 none swap sw\n"),
    ];
    let parts = [
        Part { kind: "L", mib: 20, holds: Holds::Ext4(ROOT), files },
        Part { kind: "S", mib: 8, holds: Holds::Nothing, files: &[] },
    ];
    disk(&dir, "d", "dos", &parts);
    for (signature, asleep) in [(b"S1SUSPEND\0", true), (b"SWAPSPACE2", false)] {
        dir.poke("d", (21 << 20) + 4086, signature);
        let disks = Disks::open(guest::open(&dir.file("d"))).unwrap();
        let found = inspect(&disks).unwrap();
        assert_eq!(codes(only(&found)).contains(&"hibernated"), asleep);
    }
}

/// btrfs as Ubuntu, Fedora and openSUSE divide it: one system each, whatever snapshots there are.
#[test]
fn subvolumes_of_btrfs() {
    requires!(tool("mkfs.btrfs"), tool("btrfs"), guest::mounts("btrfs"));
    for (root, default, seen, fstab) in [
        ("@", false, "@", "UUID=U / btrfs subvol=@ 0 0\nUUID=U /home btrfs subvol=/@home\n"),
        ("root", false, "root", "UUID=U / btrfs subvol=root\nUUID=U /home btrfs subvol=@home\n"),
        ("@/.snapshots/1/snapshot", true, "", "UUID=U / btrfs defaults\nUUID=U /home btrfs subvol=/@home\n"),
    ] {
        let dir = Dir::new();
        dir.sparse("disk", 300 << 20);
        Cmd::new("mkfs.btrfs").words("-q -U").arg(ROOT).arg("disk").dir(dir.path()).ok();
        let mounted = Mounted::new(&dir, "");
        let btrfs = |words: &str| Cmd::new("btrfs").words(words).dir(&mounted.path).ok();
        if default {
            btrfs("subvolume create @");
            std::fs::create_dir_all(mounted.path.join("@/.snapshots/1")).unwrap();
        }
        btrfs(&format!("subvolume create {root}"));
        btrfs("subvolume create @home");
        let fstab = fstab.replace("UUID=U", &format!("UUID={ROOT}"));
        for (path, text) in [
            ("etc/os-release", "ID=test\n"),
            ("etc/fstab", &fstab),
            ("bin/x", ""),
            ("dev/x", ""),
            ("home/hidden", ""),
        ] {
            let file = mounted.path.join(root).join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        std::fs::write(mounted.path.join("@home/alice"), "alice").unwrap();
        btrfs(&format!("subvolume snapshot -r {root} zz-snapshot"));
        if default {
            btrfs(&format!("subvolume set-default {root}"));
        }
        drop(mounted);
        let disks = Disks::open(guest::open(&dir.file("disk"))).unwrap();
        let found = inspect(&disks).unwrap();
        let system = only(&found);
        assert_eq!((system.distribution.as_str(), system.subvolume.to_str()), ("test", Some(seen)), "{root}");
        let view = GuestView::new(&disks, system);
        assert_eq!(view.read("/home/alice", 10).unwrap(), b"alice", "{root}");
        assert!(!view.exists("/home/hidden"), "{root}");
        let place = view.locate("/home/alice").unwrap();
        assert_eq!((place.path.to_str(), place.from_top), (Some("/@home/alice"), true));
        let place = view.locate("/etc/fstab").unwrap();
        let expected = if default { "/etc/fstab".to_owned() } else { format!("/{root}/etc/fstab") };
        assert_eq!((place.path.to_str(), place.from_top), (Some(expected.as_str()), false));
        assert_eq!(view.guest_path(0, "/@home/alice").as_deref(), Some(Path::new("/home/alice")));
        // As GRUB names it; where the default subvolume has it, it is found by whoever mounts the volume.
        let path = format!("/{root}/etc/fstab").into();
        let place = view.boot_file(&place);
        let place = view.place_of(&guestdisk::boot::BootFile { path, ..place }).unwrap();
        assert_eq!((place.path.to_str(), place.from_top), (Some(expected.as_str()), false), "{root}");
        assert_eq!(place.guest_path, Path::new("/etc/fstab"), "{root}");
    }
}

/// The real Debian of the boot tests.
#[test]
fn a_real_debian() {
    requires!(guests().map(|_| ()));
    let folder = guests().unwrap();
    let version = std::fs::read_to_string(folder.join("version")).unwrap_or_default();
    let started = std::time::Instant::now();
    let disks = Disks::open(guest::open(&folder.join("debian.raw"))).unwrap();
    let found = inspect(&disks).unwrap();
    eprintln!("{:?}", started.elapsed());
    let system = only(&found);
    assert_eq!((system.distribution.as_str(), system.version.as_str()), ("debian", "12"));
    assert_eq!((system.host_name.as_str(), system.init), ("vmtest", Init::Systemd));
    let kernel = &system.kernels[0];
    assert!(version.trim().is_empty() || kernel.release == version.trim(), "{}", kernel.release);
    assert!(kernel.default && kernel.entries.len() == 2, "{:?}", kernel.entries);
    let ramfs = kernel.initramfs.as_ref().unwrap();
    assert_eq!((ramfs.generator.as_str(), ramfs.compression.as_str()), ("initramfs-tools", "zstd"));
    assert!(ramfs.merged_usr);
    assert_eq!(ramfs.modules.as_deref(), Some(format!("usr/lib/modules/{}", kernel.release).as_str()));
    assert_eq!(place(kernel, "virtio_blk"), DriverPlace::Initramfs);
    assert_eq!(place(kernel, "nvme"), DriverPlace::BuiltIn);
    assert_eq!(place(kernel, "virtio_scsi"), DriverPlace::Modules);
    assert!(codes(system).is_empty(), "{:?}", system.obstacles);
    assert!(found.problems.is_empty(), "{:?}", found.problems);
}

/// The root has little more than links into a /usr of its own, and /var is elsewhere, too.
#[test]
fn usr_on_a_volume_of_its_own() {
    requires!(tools());
    let dir = Dir::new();
    let kernel = bzimage("6.1.0 x");
    let root: &[(&str, &[u8])] = &[
        ("etc/fstab", b"/dev/sda1 / ext4\n/dev/sda2 /usr ext4\n/dev/sda3 /var ext4\n"),
        ("boot/vmlinuz-6.1.0", &kernel),
        ("usr/hidden", b""),
        ("var/hidden", b""),
        ("dev/x", b""),
    ];
    let usr: &[(&str, &[u8])] = &[
        ("lib/os-release", b"ID=debian\nVERSION_ID=12\n"),
        ("lib/modules/6.1.0/modules.builtin", b"kernel/virtio_blk.ko\nkernel/virtio_pci.ko\n"),
        ("lib/modules/6.1.0/modules.dep", b""),
        ("bin/sh", &program(62)),
    ];
    let var: &[(&str, &[u8])] = &[("lib/dpkg/status", b"")];
    let parts = [root, usr, var].map(|files| Part { kind: "L", mib: 20, holds: Holds::Ext4(ROOT), files });
    disk(&dir, "d", "dos", &parts);
    let image = format!("{}?offset={}", dir.file("d").display(), 1 << 20);
    let links = "symlink /lib usr/lib\nsymlink /bin usr/bin\nsymlink /etc/os-release ../usr/lib/os-release\n";
    Cmd::new("debugfs").words("-w -f -").arg(image).stdin(links).ok();
    let disks = Disks::open(guest::open(&dir.file("d"))).unwrap();
    let found = inspect(&disks).unwrap();
    let system = only(&found);
    assert_eq!((system.root, system.distribution.as_str(), system.packages.as_str()), (0, "debian", "deb"));
    assert_eq!(system.architecture, "x86_64");
    let kernel = &system.kernels[0];
    assert_eq!((kernel.release.as_str(), kernel.entries.len()), ("6.1.0", 0));
    assert_eq!(kernel.modules.as_deref(), Some(Path::new("/usr/lib/modules/6.1.0")));
    assert_eq!(place(kernel, "virtio_blk"), DriverPlace::BuiltIn);
    assert_eq!(codes(system), ["no-boot-loader"]);
    let view = GuestView::new(&disks, system);
    let modules = view.locate("/lib/modules/6.1.0/modules.dep").unwrap();
    assert_eq!((modules.volume, modules.path.to_str()), (1, Some("/lib/modules/6.1.0/modules.dep")));
}

/// That it is Windows is told where Windows starts from the disk, or where there is nothing else, even if its NTFS cannot be
/// read.
#[test]
fn windows_is_known_by_its_disks() {
    requires!(tools());
    let dir = Dir::new();
    let esp: &[(&str, &[u8])] =
        &[("EFI/Microsoft/Boot/bootmgfw.efi", b"MZ"), ("EFI/Boot/bootx64.efi", b"MZ")];
    let parts = [
        Part { kind: "U", mib: 34, holds: Holds::Vfat("12ab34cd"), files: esp },
        Part { kind: "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", mib: 20, holds: Holds::Nothing, files: &[] },
    ];
    disk(&dir, "d", "gpt", &parts);
    for (content, obstacles) in [(b"NTFS    ", &["windows-unread"][..]), (b"-FVE-FS-", &["bitlocker"])] {
        dir.poke("d", (35 << 20) + 3, content);
        let disks = Disks::open(guest::open(&dir.file("d"))).unwrap();
        let found = inspect(&disks).unwrap();
        let system = only(&found);
        assert_eq!((system.kind, system.root, system.esp), (SystemKind::Windows, 1, Some(0)));
        let fallback = system.fallback_loader.as_ref().unwrap().to_string_lossy().to_lowercase();
        assert_eq!(fallback, "/efi/boot/bootx64.efi");
        assert_eq!(codes(system), obstacles);
    }
}
