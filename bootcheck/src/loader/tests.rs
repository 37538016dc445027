//! Boots that were recorded (qemu, Debian's SeaBIOS and OVMF), fed to a watcher and judged.

use guestdisk::Location;
use guestdisk::boot::firmware::{BootCode, EfiPartition};
use guestdisk::partition::Scheme;

use super::*;
use crate::engine::{DiskActivity, Ending};
use crate::verdict::judge;
use crate::watch::{Expectations, Watcher};

fn at(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn esp(fallback: bool) -> EfiPartition {
    EfiPartition {
        location: Location::Partition { disk: 0, number: 1 },
        volume: 0,
        typed: true,
        unreadable: None,
        loaders: vec![r"\EFI\debian\grubx64.efi".to_owned()],
        fallback: fallback.then(|| r"\EFI\BOOT\BOOTX64.EFI".to_owned()),
    }
}

fn mark(part: Part, sectors: &[(u64, u64)]) -> Landmark {
    Landmark { part, name: "x".to_owned(), disk: 0, sectors: sectors.to_vec(), by_firmware: false }
}

fn used(firmware: Firmware, facts: Facts) -> FirmwareUse {
    FirmwareUse {
        firmware,
        code: "code.fd".to_owned(),
        vars: None,
        reason: "because".to_owned(),
        both: false,
        facts,
        nvram: vec![],
        landmarks: vec![
            mark(Part::BootSector, &[(0, 1)]),
            mark(Part::SecondStage, &[(1, 2047)]),
            mark(Part::Kernel, &[(4096, 100)]),
            mark(Part::Root, &[(2048, 1 << 20)]),
        ],
        stall_limit: at(60_000),
        changes: vec![],
    }
}

fn bios(boot_code: BootCode) -> FirmwareUse {
    used(Firmware::Bios, Facts { scheme: Some(Scheme::Mbr), boot_code, ..Facts::default() })
}

fn uefi(fallback: bool) -> FirmwareUse {
    let facts = Facts {
        scheme: Some(Scheme::Gpt),
        boot_code: BootCode::Empty,
        efi: vec![esp(fallback)],
        ..Facts::default()
    };
    used(Firmware::Uefi, facts)
}

/// What the guest does.
enum Does<'a> {
    Prints(&'a str),
    Logs(&'a str),
    Reads(u64, u64),
    Shows(&'a [&'a str]),
}
use Does::{Logs, Prints, Reads, Shows};

#[test]
fn who_gives_up_has_been_started() {
    for (line, level) in [
        ("Gave up waiting for root file system device.\r\n", Milestone::Initramfs),
        (
            "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r\n",
            Milestone::Kernel,
        ),
        ("You are in emergency mode.\r\n", Milestone::Init),
    ] {
        let found = verdict(&bios(BootCode::Grub), &[Prints(SEABIOS), Prints(line)], Stopped::Decided, 0);
        let furthest = found.1.furthest().unwrap();
        assert_eq!((furthest.milestone, furthest.by), (level, Evidence::Console), "{line}");
    }
}

/// The verdict in words, and the furthest level.
fn verdict(used: &FirmwareUse, story: &[Does<'_>], stopped: Stopped, written: u64) -> (Verdict, Watched) {
    let mut watcher = Watcher::new(Expectations::default(), Some(used.through())).unwrap();
    let mut now = at(0);
    for does in story {
        now += at(100);
        match does {
            Prints(text) => watcher.feed(text.as_bytes(), now),
            Logs(text) => watcher.firmware_log(text.as_bytes(), now),
            Reads(sector, sectors) => watcher.disk_read(0, *sector, *sectors, now),
            Shows(rows) => {
                watcher.screen(&rows.iter().map(|&row| row.to_owned()).collect::<Vec<_>>(), now);
            }
        }
        watcher.tick(now + at(50));
    }
    let mut watched = watcher.finish(now + at(100));
    let disk = DiskActivity {
        reads: 1,
        written_bytes: written,
        sectors_written: (written > 0).then_some((5000, 9000)),
        ..DiskActivity::default()
    };
    let outcome = Outcome {
        ending: Ending::Stopped,
        cpus: vec![],
        disks: vec![disk],
        startup: at(0),
        screen: vec![],
        vars: None,
    };
    let verdict = judge(stopped, &watched, &outcome);
    (used.conclude(verdict, stopped, &mut watched, Some(&outcome)), watched)
}

const STALLED: Stopped = Stopped::Stalled(Duration::from_secs(60));
const SEABIOS: &str = "\x1bcSeaBIOS (version 1.16.3-debian-1.16.3-2)\r\nBooting from Hard Disk...\r\n";
const SHELL: &str = "BdsDxe: loading Boot0002 \"EFI Internal Shell\" from Fv(7C)/FvFile(7C)\r\n\
                     BdsDxe: starting Boot0002 \"EFI Internal Shell\" from Fv(7C)/FvFile(7C)\r\n\
                     UEFI Interactive Shell v2.2\r\nShell> ";
const DISK: &str = "\"UEFI Misc Device\" from PciRoot(0x0)/Pci(0x1,0x0)";

#[track_caller]
fn expect(found: &(Verdict, Watched), reason: Reason, detail: &str, level: Milestone) {
    let expected = Verdict::NotBooted { reason, detail: Some(detail.to_owned()) };
    assert_eq!(found.0, expected);
    assert_eq!(found.1.furthest().unwrap().milestone, level, "{:?}", found.1.stations);
}

#[test]
fn grub_that_cannot_go_on() {
    let story = [
        Logs("SeaBIOS (version 1.16.3)\ndrive 0x000e7930: PCHS=134/16/63\nBooting from 0000:7c00"),
        Prints(SEABIOS),
        Reads(0, 1),
        Reads(1, 63),
        Prints("GRUB loading.\r\nWelcome to GRUB!\r\n\r\nerror: no such partition.\r\ngrub rescue> "),
    ];
    let found = verdict(&bios(BootCode::Grub), &story, Stopped::Decided, 0);
    expect(&found, Reason::BootLoader, "GRUB rescue prompt: error: no such partition", Milestone::BootLoader);
    let found = verdict(
        &bios(BootCode::Grub),
        &[
            Prints(SEABIOS),
            Prints("GRUB loading.\r\nWelcome to GRUB!\r\nerror: no suitable video mode found.\r\n"),
            Prints(
                "error: file `/vmlinuz-0.0' not\x1b[10;32H found.\r\nerror: you need to load the kernel first.\r\n",
            ),
            Shows(&[
                "",
                "error: file `/vmlinuz-0.0' not found.",
                "error: you need to load the kernel first.",
            ]),
        ],
        Stopped::Decided,
        0,
    );
    expect(
        &found,
        Reason::BootLoader,
        "GRUB cannot load: error: file `/vmlinuz-0.0' not found",
        Milestone::BootLoader,
    );
}

#[test]
fn syslinux_that_cannot_go_on() {
    let whole = "SYSLINUX cannot load: Loading /vmlinuz-0.0 failed: No such file or directory";
    let failed = "Loading /vmlinuz-0.0 failed: No such file or directory";
    for (story, detail) in [
        // Its prompt is seen, and only afterwards, on the screen, why it is there.
        (vec![Prints("Loading /vml\x1b[3Bfailed: No\r\nboot: "), Shows(&[failed, "boot:"])], whole),
        // A line that pauses.
        (vec![Prints("Loading /vmlinuz-0.0 failed: No"), Prints(" such file or directory\r\nboot: ")], whole),
        (
            vec![Prints("\x1bcLoading /vml\x1b[1;12H\x1b[1;13Hinuz-0.0 failed: No such file or directory")],
            whole,
        ),
        (vec![Prints("boot: ")], "SYSLINUX prompt: boot:"),
    ] {
        let found = verdict(&bios(BootCode::Syslinux), &story, Stopped::Decided, 0);
        expect(&found, Reason::BootLoader, detail, Milestone::BootLoader);
    }
}

#[test]
fn a_second_stage_that_is_damaged() {
    let story = [Prints(SEABIOS), Reads(0, 1), Reads(1, 63), Prints("GRUB loading.\r\n")];
    let found = verdict(&bios(BootCode::Grub), &story, STALLED, 0);
    expect(
        &found,
        Reason::BootLoader,
        "the last level was: boot loader, at 0.30 s (disk reads: the boot loader's second stage (x) is read); \
         nothing was printed and no disk was read for 60 s",
        Milestone::BootLoader,
    );
}

#[test]
fn the_wrong_firmware() {
    let facts = uefi(true).facts;
    let wrong = used(Firmware::Bios, facts);
    let story = [Prints(SEABIOS), Reads(0, 1), Logs("Booting from Hard Disk...\nBooting from 0000:7c00")];
    let found = verdict(&wrong, &story, Stopped::Decided, 0);
    expect(
        &found,
        Reason::NoBootLoader,
        r"GPT with no boot code and no BIOS boot partition: was it a UEFI machine? There is an EFI system partition (disk 1 partition 1) with \EFI\BOOT\BOOTX64.EFI, \EFI\debian\grubx64.efi",
        Milestone::DiskSeen,
    );
    let wrong = used(Firmware::Uefi, bios(BootCode::Grub).facts);
    let failed = format!("BdsDxe: failed to load Boot0001 {DISK}: Not Found\r\n{SHELL}");
    let found = verdict(&wrong, &[Prints(&failed)], Stopped::Decided, 0);
    expect(
        &found,
        Reason::NoBootLoader,
        "no EFI system partition: was it a BIOS machine? (MBR with GRUB's boot code); no boot entries in NVRAM; \
         failed to load Boot0001 \"UEFI Misc Device\" from PciRoot(0x0)/Pci(0x1,0x0): Not Found",
        Milestone::DiskSeen,
    );
}

#[test]
fn a_fallback_that_is_missing() {
    let mut used = uefi(false);
    used.nvram = vec![NvramEntry {
        number: 3,
        description: "debian".to_owned(),
        active: true,
        partition: None,
        path: Some(r"\EFI\debian\shimx64.efi".to_owned()),
    }];
    let found = verdict(&used, &[Prints(SHELL)], Stopped::Decided, 0);
    let Verdict::NotBooted { reason: Reason::NoBootLoader, detail: Some(detail) } = &found.0 else {
        panic!("{found:?}")
    };
    assert_eq!(
        detail,
        r#"no \EFI\BOOT\BOOTX64.EFI on disk 1 partition 1: only an entry in NVRAM would start \EFI\debian\grubx64.efi; in NVRAM: Boot0003 "debian" \EFI\debian\shimx64.efi"#
    );
}

#[test]
fn a_loader_that_gives_up_to_uefi() {
    let story = format!(
        "BdsDxe: loading Boot0001 {DISK}\r\nBdsDxe: starting Boot0001 {DISK}\r\nerror: no such device: 00.\r\n{SHELL}"
    );
    let found = verdict(&uefi(true), &[Prints(&story)], Stopped::Decided, 0);
    expect(
        &found,
        Reason::BootLoader,
        "a loader was started and gave control back to the firmware: error: no such device: 00.",
        Milestone::BootLoader,
    );
}

#[test]
fn guests_that_say_nothing() {
    let quiet = [Prints(SEABIOS), Reads(0, 1), Reads(1, 63), Reads(4096, 100)];
    let found = verdict(&bios(BootCode::Grub), &quiet, STALLED, 0);
    let Verdict::NotBooted { reason: Reason::Silent, detail: Some(detail) } = &found.0 else {
        panic!("{found:?}")
    };
    assert!(detail.contains("the kernel (x) was read at 0.40 s; --add-console makes"), "{detail}");
    // What it has written shows that it runs, and no more than that.
    let found = verdict(&bios(BootCode::Grub), &quiet, STALLED, 1 << 20);
    assert_eq!(found.1.furthest().unwrap().by, Evidence::DiskWrites);
    assert!(matches!(found.0, Verdict::NotBooted { reason: Reason::Silent, .. }), "{found:?}");
    // On the screen it may say everything.
    let story = [Prints(SEABIOS), Reads(4096, 100), Shows(&["Debian GNU/Linux 12 vm tty1", "", "vm login:"])];
    let found = verdict(&bios(BootCode::Grub), &story, Stopped::Decided, 0);
    assert_eq!(found.0, Verdict::Booted);
    let login = found.1.furthest().unwrap();
    assert_eq!((login.milestone, login.by), (Milestone::Login, Evidence::Screen));
}

#[test]
fn the_time_limit_says_little_about_a_slow_host() {
    let limit = Stopped::TimeLimit(Duration::from_secs(20));
    let story = [Logs("SeaBIOS (version 1.16.3)\ndrive 0x000e7930: PCHS=1/16/63\n"), Prints(SEABIOS)];
    let found = verdict(&bios(BootCode::Grub), &story, limit, 0);
    let Verdict::NotBooted { reason: Reason::Timeout, detail: Some(detail) } = &found.0 else {
        panic!("{found:?}")
    };
    assert!(detail.starts_with("the last level was: disk seen, at 0.10 s"), "{detail}");
    let late = "Kernel panic - not syncing: IO-APIC + timer doesn't work!  Boot with apic=debug\r\n";
    let found = verdict(&bios(BootCode::Grub), &[Prints(SEABIOS), Prints(late)], Stopped::Decided, 0);
    assert_eq!(found.0.exit_code(), 2, "{found:?}");
}
