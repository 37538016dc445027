//! Which firmware a disk is for, on disks that sfdisk and mkfs.vfat have made.

use guestdisk::Disks;
use guestdisk::boot::firmware::{BootCode, Choice, Facts, Firmware, facts};
use tests::guest_image::{Holds, Part, disk};
use tests::skip::tool;
use tests::{Dir, requires};

const ESP: Part<'static> = Part {
    kind: "U",
    mib: 34,
    holds: Holds::Vfat("12345678"),
    files: &[
        ("EFI/debian/shimx64.efi", b"MZ"),
        ("EFI/debian/fbx64.efi", b"MZ"),
        ("EFI/debian/grub.cfg", b""),
        ("EFI/Microsoft/Boot/bootmgfw.efi", b"MZ"),
        ("EFI/boot/bootx64.efi", b"MZ"),
        ("EFI/boot/mmx64.efi", b"MZ"),
    ],
};
const ROOT: Part<'static> = Part { kind: "L", mib: 8, holds: Holds::Nothing, files: &[] };

fn look(dir: &Dir, label: &str, parts: &[Part<'_>]) -> (Facts, Choice) {
    let found = facts(&Disks::open(disk(dir, "disk", label, parts)).unwrap()).unwrap();
    let choice = found.choose(None);
    (found, choice)
}

#[test]
fn an_efi_system_partition_is_looked_into() {
    requires!(tool("sfdisk"), tool("mkfs.vfat"), tool("mcopy"));
    let dir = Dir::new();
    let (facts, choice) = look(&dir, "gpt", &[ESP, ROOT]);
    assert_eq!(facts.boot_code, BootCode::Empty);
    let [esp] = &facts.efi[..] else { panic!("{facts:?}") };
    assert_eq!(esp.loaders, [r"\EFI\Microsoft\Boot\bootmgfw.efi", r"\EFI\debian\shimx64.efi"]);
    assert_eq!(esp.fallback.as_deref(), Some(r"\EFI\boot\bootx64.efi"));
    assert_eq!((choice.firmware, choice.both, choice.startable), (Firmware::Uefi, false, true));
    // Without its type it is as good, for firmware looks at every FAT file system; also on an MBR disk.
    for (label, kind) in [("gpt", "L"), ("dos", "c"), ("dos", "ef")] {
        let (facts, choice) = look(&dir, label, &[Part { kind, ..ESP }, ROOT]);
        assert_eq!(facts.efi.len(), 1);
        assert_eq!((choice.firmware, choice.startable), (Firmware::Uefi, true), "{choice:?}");
    }
}

#[test]
fn loaders_that_only_nvram_knows_and_none_at_all() {
    requires!(tool("sfdisk"), tool("mkfs.vfat"), tool("mcopy"));
    let dir = Dir::new();
    let (facts, choice) = look(&dir, "gpt", &[Part { files: &ESP.files[..1], ..ESP }, ROOT]);
    assert_eq!((choice.firmware, choice.startable), (Firmware::Uefi, true));
    assert_eq!(
        facts.why_nothing(Firmware::Uefi).unwrap(),
        r"no \EFI\BOOT\BOOTX64.EFI on disk 1 partition 1: only an entry in NVRAM would start \EFI\debian\shimx64.efi"
    );
    let (facts, choice) = look(&dir, "gpt", &[Part { files: &[], ..ESP }, ROOT]);
    assert_eq!((choice.firmware, choice.startable), (Firmware::Uefi, false));
    assert!(facts.for_uefi().ends_with("without a loader"), "{}", facts.for_uefi());
    let (_, choice) = look(&dir, "gpt", &[Part { holds: Holds::Nothing, ..ESP }, ROOT]);
    assert!(choice.reason.contains("that cannot be read"), "{choice:?}");
    let (facts, choice) = look(&dir, "dos", &[ROOT]);
    assert_eq!((choice.firmware, choice.startable), (Firmware::Bios, false));
    assert!(!facts.has_fallback());
}

#[test]
fn bios_disks() {
    requires!(tool("sfdisk"));
    let dir = Dir::new();
    let bios_boot =
        Part { kind: "21686148-6449-6E6F-744E-656564454649", mib: 1, holds: Holds::Nothing, files: &[] };
    let (facts, _) = look(&dir, "gpt", &[bios_boot, ROOT]);
    assert_eq!(facts.bios_boot, Some(1));
    assert!(!facts.has_bios_loader(), "{facts:?}");
    let boot_sector = |name: &str, code: &[u8]| {
        let mut bytes = std::fs::read(dir.file(name)).unwrap();
        bytes[..code.len()].copy_from_slice(code);
        std::fs::write(dir.file(name), bytes).unwrap();
        facts_of(&dir, name)
    };
    let grub = boot_sector("disk", b"\xeb\x63\x90GRUB \0Geom\0Hard Disk");
    assert!(grub.has_bios_loader(), "{grub:?}");
    assert_eq!(grub.choose(None).firmware, Firmware::Bios);
    look(&dir, "dos", &[ROOT]);
    let syslinux = boot_sector("disk", b"\x33\xc0Missing operating system. Operating system load error.");
    assert_eq!(syslinux.boot_code, BootCode::Syslinux);
    assert!(!syslinux.has_bios_loader(), "no partition is active: {syslinux:?}");
}

fn facts_of(dir: &Dir, name: &str) -> Facts {
    facts(&Disks::open(tests::guest::open(&dir.file(name))).unwrap()).unwrap()
}
