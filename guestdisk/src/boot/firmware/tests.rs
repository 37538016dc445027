//! Decisions about facts made by hand. The suite has disks that real tools have made.

use super::*;

fn esp(loaders: &[&str], fallback: bool) -> EfiPartition {
    EfiPartition {
        location: Location::Partition { disk: 0, number: 1 },
        volume: 0,
        typed: true,
        unreadable: None,
        loaders: loaders.iter().map(|&path| path.to_owned()).collect(),
        fallback: fallback.then(|| FALLBACK.to_owned()),
    }
}

fn gpt(boot_code: BootCode, bios_boot: Option<u32>, efi: Vec<EfiPartition>) -> Facts {
    Facts { scheme: Some(Scheme::Gpt), boot_code, active: None, bios_boot, efi }
}

fn mbr(boot_code: BootCode, active: Option<(u32, BootCode)>) -> Facts {
    Facts { scheme: Some(Scheme::Mbr), boot_code, active, ..Facts::default() }
}

#[track_caller]
fn expect(facts: &Facts, firmware: Firmware, both: bool, startable: bool, reason: &str) {
    let choice = facts.choose(None);
    assert_eq!(choice, Choice { firmware, both, startable, reason: reason.to_owned() });
}

#[test]
fn disks_for_one_firmware() {
    expect(
        &gpt(BootCode::Empty, None, vec![esp(&[r"\EFI\debian\shimx64.efi"], true)]),
        Firmware::Uefi,
        false,
        true,
        r"an EFI system partition (disk 1 partition 1) with \EFI\BOOT\BOOTX64.EFI, \EFI\debian\shimx64.efi; GPT with no boot code and no BIOS boot partition",
    );
    expect(
        &mbr(BootCode::Grub, None),
        Firmware::Bios,
        false,
        true,
        "MBR with GRUB's boot code; no EFI system partition",
    );
    expect(
        &gpt(BootCode::Grub, Some(14), vec![]),
        Firmware::Bios,
        false,
        true,
        "GPT with GRUB's boot code and a BIOS boot partition (14); no EFI system partition",
    );
    expect(
        &mbr(BootCode::Windows, Some((1, BootCode::Windows))),
        Firmware::Bios,
        false,
        true,
        "MBR with Windows's boot code, partition 1 is active and has Windows's boot code; no EFI system partition",
    );
}

#[test]
fn disks_for_both_go_where_no_nvram_is_needed() {
    let hybrid = |fallback| gpt(BootCode::Grub, Some(1), vec![esp(&[r"\EFI\debian\grubx64.efi"], fallback)]);
    let choice = hybrid(true).choose(None);
    assert_eq!((choice.firmware, choice.both), (Firmware::Uefi, true));
    let choice = hybrid(false).choose(None);
    assert_eq!((choice.firmware, choice.both), (Firmware::Bios, true));
    // The source machine knows better.
    let choice = hybrid(true).choose(Some(Firmware::Bios));
    assert_eq!((choice.firmware, choice.both, choice.startable), (Firmware::Bios, true, true));
    assert!(choice.reason.starts_with("the source machine had it; GPT with GRUB's"), "{choice:?}");
}

#[test]
fn disks_for_none_were_meant_for_one() {
    let meant = |facts: &Facts| {
        let choice = facts.choose(None);
        assert!(!choice.startable && !choice.both, "{choice:?}");
        choice.firmware
    };
    assert_eq!(meant(&Facts::default()), Firmware::Bios);
    assert_eq!(meant(&mbr(BootCode::Empty, None)), Firmware::Bios);
    assert_eq!(meant(&gpt(BootCode::Empty, None, vec![])), Firmware::Uefi);
    assert_eq!(meant(&gpt(BootCode::Grub, None, vec![esp(&[], false)])), Firmware::Uefi);
    // GRUB's second stage has nowhere to be.
    assert_eq!(meant(&gpt(BootCode::Empty, Some(1), vec![])), Firmware::Bios);
    // The active partition has nothing to start, or there is none.
    for active in [None, Some((2, BootCode::Empty)), Some((2, BootCode::Missing))] {
        assert_eq!(meant(&mbr(BootCode::Syslinux, active)), Firmware::Bios);
    }
    let mut described = mbr(BootCode::Grub, None).choose(Some(Firmware::Uefi));
    assert!(!described.startable && !described.both);
    described = gpt(BootCode::Empty, None, vec![]).choose(Some(Firmware::Bios));
    assert!(!described.startable);
}

#[test]
fn why_a_firmware_finds_nothing() {
    let uefi = gpt(BootCode::Empty, None, vec![esp(&[r"\EFI\debian\grubx64.efi"], false)]);
    assert_eq!(
        uefi.why_nothing(Firmware::Bios).unwrap(),
        r"GPT with no boot code and no BIOS boot partition: was it a UEFI machine? There is an EFI system partition (disk 1 partition 1) with \EFI\debian\grubx64.efi, without \EFI\BOOT\BOOTX64.EFI"
    );
    assert_eq!(
        uefi.why_nothing(Firmware::Uefi).unwrap(),
        r"no \EFI\BOOT\BOOTX64.EFI on disk 1 partition 1: only an entry in NVRAM would start \EFI\debian\grubx64.efi"
    );
    let bios = mbr(BootCode::Grub, None);
    assert_eq!(bios.why_nothing(Firmware::Bios), None);
    assert_eq!(
        bios.why_nothing(Firmware::Uefi).unwrap(),
        "no EFI system partition: was it a BIOS machine? (MBR with GRUB's boot code)"
    );
    assert_eq!(gpt(BootCode::Empty, None, vec![esp(&[], true)]).why_nothing(Firmware::Uefi), None);
}

#[test]
fn boot_sectors_by_their_messages() {
    let sector = |text: &str, at: usize| {
        let mut sector = vec![0; 512];
        sector[at..at + text.len()].copy_from_slice(text.as_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        BootCode::of(&sector)
    };
    for (text, at, expected) in [
        ("\u{33}GRUB \0Geom\0Hard Disk\0Read\0 Error\r\n", 300, BootCode::Grub),
        ("3\0Missing operating system.\r\n  Operating system load error.", 250, BootCode::Syslinux),
        (
            "Invalid partition table\0Error loading operating system\0Missing operating system",
            300,
            BootCode::Windows,
        ),
        ("This is not a bootable disk.  Please insert", 100, BootCode::Placeholder),
        ("\u{fa}LILO", 2, BootCode::Lilo),
        ("Read\0Boot\0 error\r\n\0BTX", 200, BootCode::FreeBsd),
        ("x", 7, BootCode::Unknown),
        ("", 0, BootCode::Empty),
        // Partition entries are no code, and a FAT file system's own fields are none.
        ("\u{1}\u{2}", 446, BootCode::Empty),
        ("\u{eb}", 0, BootCode::Unknown),
    ] {
        assert_eq!(sector(text, at), expected, "{text:?}");
    }
    let mut fat = vec![0; 512];
    fat[..3].copy_from_slice(&[0xeb, 0x58, 0x90]);
    fat[82..90].copy_from_slice(b"FAT32   ");
    fat[510..].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(BootCode::of(&fat), BootCode::Empty);
    assert_eq!(BootCode::of(&[0; 512]), BootCode::Missing);
    assert_eq!(BootCode::of(&[1; 100]), BootCode::Missing);
}
