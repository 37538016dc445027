//! Guests of other hypervisors become guests of KVM: planned, changed, checked, booted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::file::{FileOptions, HostFile};
use block::raw::{Raw, RawOptions};
use block::{BlockDevice, ErrorKind};
use guestdisk::Disks;
use guestedit::{Attributes, GuestFs};
use tests::command::Cmd;
use tests::guest_image::{Holds, Part, disk};
use tests::guests::{guests, qemu_system};
use tests::skip::{Need, qemu, tool};
use tests::{Dir, requires};
use v2v::apply::apply;
use v2v::convert::verify;
use v2v::guest::{Disk, DiskImage, Guest, Nic, Origin};
use v2v::inspect::{Inspection, inspect_with};
use v2v::names::DiskNames;
use v2v::plan::{Action, Plan, PlanOptions, TargetBus, make};

const ROOT: &str = "11111111-2222-3333-4444-555555555555";
const MIB: u64 = 1 << 20;

fn open(path: &Path, writable: bool) -> Arc<dyn BlockDevice> {
    let options = if writable { FileOptions::read_write() } else { FileOptions::read_only() };
    let file = HostFile::open(path, &options).unwrap();
    Arc::new(Raw::open(Arc::new(file), RawOptions::default()).unwrap())
}

fn file_system(path: &Path, volume: usize) -> block::Result<Box<dyn GuestFs>> {
    let disks = Disks::open(open(path, true))?;
    guestedit::open_volume(&disks.volumes()[volume], &guestedit::Options::default())
}

/// A machine of VMware with one disk and one card.
fn vmware() -> Guest {
    let image = DiskImage::Name { name: "vm.raw".into(), format: None };
    let nic = Nic { mac: Some("00:0c:29:4f:8e:35".into()), slot: Some(33), ..Nic::default() };
    Guest {
        name: "vm".into(),
        origin: Origin::Vmware,
        disks: vec![Disk { guest_name: Some("sda".into()), ..Disk::new("scsi0:0", image) }],
        nics: vec![nic],
        ..Guest::default()
    }
}

fn inspected(path: &Path) -> (Disks, Inspection) {
    let disks = Disks::open(open(path, false)).unwrap();
    let names = DiskNames { names: vec![Some("sda".into())], ..DiskNames::default() };
    let inspection = inspect_with(&disks, &names).unwrap();
    (disks, inspection)
}

fn planned(path: &Path, options: &PlanOptions) -> Plan {
    let (disks, inspection) = inspected(path);
    assert_eq!(inspection.systems.len(), 1, "{inspection:#?}");
    make(&disks, &vmware(), &inspection, options).unwrap()
}

fn paths(plan: &Plan) -> Vec<&str> {
    plan.changes.iter().map(|change| change.guest_path.to_str().unwrap()).collect()
}

fn edit(system: &mut dyn GuestFs, path: &str, edit: impl FnOnce(&str) -> String) {
    let old = system.read(Path::new(path), MIB).unwrap();
    system.replace(Path::new(path), edit(std::str::from_utf8(&old).unwrap()).as_bytes()).unwrap();
}

fn create(system: &mut dyn GuestFs, path: &str, text: &str) {
    let parents: Vec<PathBuf> = Path::new(path).ancestors().skip(1).map(Path::to_owned).collect();
    for parent in parents.iter().rev() {
        if system.stat(parent).unwrap().is_none() {
            system.mkdir(parent, &Attributes::mode(0o755)).unwrap();
        }
    }
    system.create(Path::new(path), text.as_bytes(), &Attributes::mode(0o644)).unwrap();
}

/// Makes the test guest one that came from VMware: names of its SCSI disk, an initramfs without virtio_blk, its tools, and a
/// network configuration by its slot.
fn from_vmware(path: &Path, guests: &Path) {
    let uuid = std::fs::read_to_string(guests.join("root.uuid")).unwrap();
    let by_uuid = format!("UUID={}", uuid.trim());
    let version = std::fs::read_to_string(guests.join("version")).unwrap();
    let mut system = file_system(path, 0).unwrap();
    let system = &mut *system;
    edit(system, "/etc/fstab", |text| text.replace(&by_uuid, "/dev/sda1"));
    edit(system, "/boot/grub/grub.cfg", |text| text.replace(&format!("root={by_uuid}"), "root=/dev/sda1"));
    let initrd = std::fs::read(guests.join("initrd.nodisk")).unwrap();
    system.replace(Path::new(&format!("/boot/initrd.img-{}", version.trim())), &initrd).unwrap();
    create(
        system,
        "/etc/network/interfaces",
        "auto ens33\niface ens33 inet static\n\taddress 192.0.2.7/24\n",
    );
    create(
        system,
        "/usr/lib/systemd/system/open-vm-tools.service",
        "[Service]\nExecStart=/usr/bin/vmtoolsd\n",
    );
    create(
        system,
        "/etc/default/grub",
        "GRUB_CMDLINE_LINUX=\"resume=/dev/sda1\"\nGRUB_DISABLE_LINUX_UUID=true\n",
    );
    let wants = "/etc/systemd/system/multi-user.target.wants/open-vm-tools.service";
    let target = Path::new("/usr/lib/systemd/system/open-vm-tools.service");
    system.symlink(Path::new(wants), target, &Attributes::mode(0o777)).unwrap();
    system.sync().unwrap();
}

fn needs() -> Need {
    qemu_system()?;
    qemu()?;
    tool("e2fsck")
}

/// A Debian that VMware had: one plan, carried out, brings it to its login prompt on virtio. The same disk without it does
/// not come up (`bootcheck::a_root_that_is_not_there_and_a_driver_that_is_not`).
#[test]
fn a_debian_of_vmware_comes_up_on_virtio() {
    requires!(needs());
    let guests = match guests() {
        Ok(guests) => guests,
        Err(reason) => return tests::skip::note(&reason),
    };
    let dir = Dir::new();
    let vm = dir.file("vm.raw");
    Cmd::new("cp").words("--sparse=always --reflink=auto").arg(guests.join("debian.raw")).arg(&vm).ok();
    from_vmware(&vm, &guests);

    let options = PlanOptions::default();
    let plan = planned(&vm, &options);
    let version = std::fs::read_to_string(guests.join("version")).unwrap();
    let initrd = format!("/boot/initrd.img-{}", version.trim());
    for path in [
        "/etc/fstab",
        "/boot/grub/grub.cfg",
        "/etc/default/grub",
        "/etc/systemd/network/10-vimg-ens33.link",
        &initrd,
        "/etc/systemd/system/open-vm-tools.service",
    ] {
        assert!(paths(&plan).contains(&path), "{path}: {}", plan.to_text());
    }
    assert!(plan.to_do.is_empty(), "{}", plan.to_text());
    let addition = plan.changes.iter().find(|change| change.guest_path == Path::new(&initrd)).unwrap();
    assert!(
        matches!(&addition.action, Action::Append { bytes } if bytes.len() < 4 << 20),
        "{}",
        plan.to_text()
    );
    assert_eq!(plan, planned(&vm, &options), "the same plan again");

    let before = inspected(&vm).1.systems.remove(0).entries;
    let done = apply(&plan, &mut |volume| file_system(&vm, volume), &mut ()).unwrap();
    assert_eq!((done.changes, done.volumes.len()), (plan.changes.len(), 1));
    Cmd::new("e2fsck").words("-fn").arg(format!("{}?offset={MIB}", vm.display())).ok();

    // Nothing is left to do, and nothing is done twice.
    let again = planned(&vm, &options);
    assert!(again.changes.is_empty(), "{}", again.to_text());
    let error = apply(&plan, &mut |volume| file_system(&vm, volume), &mut ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");

    // The menu is what it was, but for the root.
    let (disks, mut inspection) = inspected(&vm);
    assert_eq!(verify(&before, &disks), Vec::<String>::new());
    let after = inspection.systems.remove(0).entries;
    let uuid = std::fs::read_to_string(guests.join("root.uuid")).unwrap();
    let expected: Vec<_> = before
        .into_iter()
        .map(|mut entry| {
            entry.cmdline = entry.cmdline.replace("root=/dev/sda1", &format!("root=UUID={}", uuid.trim()));
            entry
        })
        .collect();
    assert!(!expected.is_empty());
    assert_eq!(after, expected);

    let words = "bootcheck --engine qemu --timeout 300 --memory 512M --output json -f raw vm.raw";
    let report = dir.vimg_cmd(words).timeout(400).run().expect_code(0).json();
    let check = &report["checks"][0];
    assert_eq!(check["verdict"], "booted", "{check:#}");
    assert_eq!(check["boot"]["from"], "disk");
}

/// As much of a kernel's image as says which release it is (Linux documentation, `arch/x86/boot`, "The Linux/x86 Boot
/// Protocol").
fn kernel(release: &str) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    bytes[0x20e..0x210].copy_from_slice(&0x0300_u16.to_le_bytes());
    let text = format!("{release} (builder@host) #1 SMP\0");
    bytes[0x500..0x500 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

/// A guest whose initramfs has its modules elsewhere than its root: what is added has an index that modprobe reads.
#[test]
fn an_index_that_modprobe_reads() {
    let needs = || -> Need {
        for name in ["modprobe", "cpio", "sfdisk", "mke2fs", "zstd"] {
            tool(name)?;
        }
        Ok(())
    };
    requires!(needs());
    const RELEASE: &str = "6.9.1-arch1-1";
    let dir = Dir::new();
    // mkinitcpio of some years: one folder, modules unpacked.
    let within = format!("ram/usr/lib/modules/{RELEASE}/kernel");
    std::fs::create_dir_all(dir.file(&within)).unwrap();
    std::fs::write(dir.file(&within).join("scsi_mod.ko"), "code").unwrap();
    std::os::unix::fs::symlink("usr/lib", dir.file("ram/lib")).unwrap();
    std::fs::write(dir.file("ram/config"), "MODULES=\"\"\n").unwrap();
    let pack = format!("cd {} && find . | cpio -o -H newc --quiet | zstd -q", dir.file("ram").display());
    Cmd::new("sh").words("-c").arg(format!("{pack} >{}", dir.file("initramfs.img").display())).ok();
    let packed = |name: &str| {
        dir.write("module", format!("code of {name}").as_bytes());
        Cmd::new("zstd").words("-q -f module").dir(dir.path()).ok();
        dir.read("module.zst")
    };
    let names = ["virtio", "virtio_ring", "virtio_pci", "virtio_blk", "scsi_mod"];
    let dep = "kernel/drivers/virtio_blk.ko.zst: kernel/drivers/virtio_ring.ko.zst kernel/drivers/virtio.ko.zst\n\
               kernel/drivers/virtio_pci.ko.zst: kernel/drivers/virtio_ring.ko.zst kernel/drivers/virtio.ko.zst\n\
               kernel/drivers/virtio_ring.ko.zst: kernel/drivers/virtio.ko.zst\n\
               kernel/drivers/virtio.ko.zst:\n\
               kernel/drivers/scsi_mod.ko.zst:\n";
    let mut files: Vec<(String, Vec<u8>)> = vec![
        ("etc/os-release".into(), b"ID=arch\nPRETTY_NAME=\"Arch Linux\"\n".to_vec()),
        ("etc/fstab".into(), b"/dev/sda1 / ext4 rw,relatime 0 1\n".to_vec()),
        ("usr/lib/systemd/systemd".into(), b"\x7fELF".to_vec()),
        ("var/lib/x".into(), vec![]),
        ("etc/mkinitcpio.conf".into(), b"MODULES=()\nHOOKS=(base udev)\n".to_vec()),
        ("boot/vmlinuz-linux".into(), kernel(RELEASE)),
        ("boot/initramfs-linux.img".into(), dir.read("initramfs.img")),
        (
            "boot/loader/entries/arch.conf".into(),
            b"title Arch\nversion 6.9.1-arch1-1\nlinux /boot/vmlinuz-linux\ninitrd /boot/initramfs-linux.img\noptions root=/dev/sda1 rw\n".to_vec(),
        ),
        (format!("usr/lib/modules/{RELEASE}/modules.dep"), dep.as_bytes().to_vec()),
        (format!("usr/lib/modules/{RELEASE}/modules.builtin"), vec![]),
        (format!("usr/lib/modules/{RELEASE}/pkgbase"), b"linux\n".to_vec()),
    ];
    files.extend(
        names.map(|name| (format!("usr/lib/modules/{RELEASE}/kernel/drivers/{name}.ko.zst"), packed(name))),
    );
    let borrowed: Vec<(&str, &[u8])> =
        files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect();
    disk(&dir, "vm.raw", "dos", &[Part { kind: "L", mib: 24, holds: Holds::Ext4(ROOT), files: &borrowed }]);

    let vm = dir.file("vm.raw");
    let plan = planned(&vm, &PlanOptions { bus: TargetBus::VirtioBlk, ..PlanOptions::default() });
    assert!(paths(&plan).contains(&"/boot/initramfs-linux.img"), "{}", plan.to_text());
    apply(&plan, &mut |volume| file_system(&vm, volume), &mut ()).unwrap();
    assert!(planned(&vm, &PlanOptions::default()).changes.is_empty());

    // What is added is unpacked as the kernel does it: over what is there.
    let addition = plan.changes.iter().find(|change| change.path == Path::new("/boot/initramfs-linux.img"));
    let bytes = addition.unwrap().action.bytes();
    let start = bytes.iter().position(|byte| *byte != 0).unwrap();
    dir.write("addition.zst", &bytes[start..]);
    let unpack = "cd ram && zstd -dcq ../addition.zst | cpio -idmu --quiet";
    Cmd::new("sh").words("-c").arg(unpack).dir(dir.path()).ok();
    assert!(std::fs::symlink_metadata(dir.file("ram/lib")).unwrap().is_symlink());
    let shown = |name: &str| {
        let ran = Cmd::new("modprobe")
            .words("-d")
            .arg(dir.file("ram"))
            .words(&format!("-S {RELEASE} --show-depends {name}"))
            .ok();
        ran.stdout.replace(&format!("{}", dir.file("ram").display()), "")
    };
    let base = format!("insmod /lib/modules/{RELEASE}/kernel");
    let expected = ["drivers/virtio.ko", "drivers/virtio_ring.ko", "drivers/virtio_blk.ko"];
    let lines: Vec<_> = shown("virtio_blk").lines().map(|line| line.trim().to_owned()).collect();
    assert_eq!(lines, expected.map(|path| format!("{base}/{path}")));
    assert_eq!(shown("scsi_mod").trim(), format!("{base}/scsi_mod.ko"));
    assert_eq!(std::fs::read(dir.file(&format!("{within}/drivers/virtio.ko"))).unwrap(), b"code of virtio");
}
