//! `bootcheck --firmware` with an installed qemu and its firmwares: disks that their own boot loaders start, and disks that
//! stop at every level. Loaders that give up do so within seconds; the whole matrix of guests that come up is run with
//! `VIMG_BOOT_MATRIX=1` (`make boot-matrix`).

use std::path::PathBuf;

use guestdisk::partition;
use serde_json::Value;

use tests::guests::{firmwares, loaders, qemu_system};
use tests::skip::{note, tool};
use tests::{Cmd, Dir, guest, or_skip, requires};

/// A folder beside which guests with boot loaders lie.
struct Place {
    dir: Dir,
    loaders: PathBuf,
}

fn place() -> Result<Place, String> {
    qemu_system()?;
    firmwares()?;
    Ok(Place { loaders: loaders()?, dir: Dir::new() })
}

impl Place {
    fn has(&self, guest: &str) -> bool {
        self.loaders.join(format!("{guest}.raw")).exists()
    }

    fn image(&self, guest: &str) -> String {
        self.loaders.join(format!("{guest}.raw")).display().to_string()
    }

    fn cmd(&self, guest: &str, words: &str) -> Cmd {
        let image = self.image(guest);
        let words = format!(
            "bootcheck --engine qemu --timeout 300 --memory 512M --output json -f raw {image} {words}"
        );
        self.dir.vimg_cmd(&words).timeout(900)
    }

    /// The check of one guest that must boot.
    #[track_caller]
    fn boots(&self, guest: &str, words: &str) -> Value {
        let ran = self.cmd(guest, words).run().expect_code(0);
        let check = ran.json()["checks"][0].clone();
        assert!(matches!(check["level"]["station"].as_str(), Some("login" | "target")), "{check:#}");
        check
    }

    /// The check of one guest that must not: reason, level, and a part of the explanation.
    #[track_caller]
    fn fails(&self, guest: &str, words: &str, reason: &str, level: &str, detail: &str) -> Value {
        let ran = self.cmd(guest, words).run().expect_code(1);
        let check = ran.json()["checks"][0].clone();
        let story = format!("{guest} {words}: {check:#}");
        assert_eq!(
            (&check["reason"], &check["level"]["station"]),
            (&reason.into(), &level.into()),
            "{story}"
        );
        assert!(check["detail"].as_str().unwrap_or_default().contains(detail), "{story}");
        check
    }
}

/// The Debian that was made on the spot, started by both firmwares, as it would be on any host.
#[test]
fn a_debian_comes_up_by_bios_and_by_uefi() {
    let place = or_skip!(place());
    let ran = place.cmd("debian", "--firmware both --jobs 2 --junit report.xml").run().expect_code(0);
    let said = ran.json();
    assert_eq!((&said["booted"], &said["not-booted"]), (&2.into(), &0.into()), "{said:#}");
    for (check, firmware) in said["checks"].as_array().unwrap().iter().zip(["bios", "uefi"]) {
        let boot = &check["boot"];
        assert_eq!((&boot["from"], &boot["firmware"]), (&"firmware".into(), &firmware.into()), "{check:#}");
        assert_eq!(boot["disk"]["bios-boot-partition"], 1, "{check:#}");
        assert_eq!(boot["disk"]["efi"][0]["fallback"], r"\EFI\BOOT\BOOTX64.EFI", "{check:#}");
        let stations: Vec<_> = check["time-line"].as_array().unwrap().iter().map(|s| &s["station"]).collect();
        for station in ["firmware", "disk-seen", "boot-loader"] {
            assert!(stations.contains(&&station.into()), "{station}: {check:#}");
        }
        assert!(matches!(check["level"]["station"].as_str(), Some("target" | "login")), "{check:#}");
        let read: Vec<_> = check["readings"].as_array().unwrap().iter().map(|r| &r["part"]).collect();
        for part in ["kernel", "initrd", "root"] {
            assert!(read.contains(&&part.into()), "{part}: {check:#}");
        }
    }
    let xml = std::fs::read_to_string(place.dir.file("report.xml")).unwrap();
    assert!(xml.contains("debian.raw [bios]\"") && xml.contains("debian.raw [uefi]\""), "{xml}");
}

#[test]
fn loaders_of_bios_that_give_up() {
    let place = or_skip!(place());
    let auto = "--firmware auto";
    let fails = |guest: &str, words: &str, detail: &str| {
        let check = place.fails(guest, words, "boot-loader", "boot-loader", detail);
        assert_eq!(check["boot"]["firmware"], "bios", "{check:#}");
        check
    };
    fails(
        "mbr-grub.bad-modules",
        auto,
        "GRUB rescue prompt: error: file `/boot/grub/i386-pc/normal.mod' not found",
    );
    fails("mbr-grub.bad-boot", auto, "GRUB rescue prompt: error: no such partition");
    fails("mbr-grub.bad-kernel", auto, "GRUB cannot load: error: file `/vmlinuz-0.0' not found");
    // These just stop.
    for guest in ["mbr-grub.bad-core", "gpt-grub.bad-core"] {
        let check =
            fails(guest, "--firmware auto --timeout 25", "nothing was printed and no disk was read for 5 s");
        assert_eq!(check["readings"][1]["part"], "second-stage", "{check:#}");
    }
    if !place.has("extlinux") {
        return note("no extlinux here");
    }
    fails("extlinux.bad-kernel", auto, "SYSLINUX cannot load: Loading /vmlinuz-0.0 failed");
    let detail = "MBR with syslinux's boot code, no partition is active";
    place.fails("extlinux.bad-active", auto, "no-boot-loader", "boot-loader", detail);
}

#[test]
fn loaders_of_uefi_that_give_up() {
    let place = or_skip!(place());
    let auto = "--firmware auto";
    let check = place.fails("sd-boot.bad-kernel", auto, "boot-loader", "boot-loader", "");
    assert_eq!(check["boot"]["firmware"], "uefi", "{check:#}");
    place.fails("uki.bad-cut", auto, "no-boot-loader", "disk-seen", "failed to load Boot0001");
    if !place.has("esp-grub") {
        return note("no LVM here");
    }
    place.fails(
        "esp-grub.bad-search",
        auto,
        "boot-loader",
        "boot-loader",
        "GRUB prompt: error: no such device: 00000000-dead-dead-dead-000000000000",
    );
}

/// As after a move to another kind of machine, and as without the NVRAM of the old one.
#[test]
fn the_wrong_firmware_and_the_missing_fallback() {
    let place = or_skip!(place());
    place.fails(
        "sd-boot",
        "--firmware bios",
        "no-boot-loader",
        "disk-seen",
        r"no BIOS boot partition: was it a UEFI machine? There is an EFI system partition (disk 1 partition 1) with \EFI\BOOT\BOOTX64.EFI",
    );
    place.fails(
        "mbr-grub",
        "--firmware uefi",
        "no-boot-loader",
        "disk-seen",
        "was it a BIOS machine? (MBR with GRUB",
    );
    if !place.has("esp-grub") {
        return note("no LVM here");
    }
    let detail = r"no \EFI\BOOT\BOOTX64.EFI on disk 1 partition 1: only an entry in NVRAM would start \EFI\debian\grubx64.efi";
    let check =
        place.fails("esp-grub.bad-fallback", "--firmware auto", "no-boot-loader", "disk-seen", detail);
    assert_eq!(check["boot"]["nvram"], serde_json::json!([]));
    // With the NVRAM of the old machine it boots: GRUB is started, and then it is the same as ever.
    let image = place.loaders.join("esp-grub.bad-fallback.raw");
    place.dir.write("vars.fd", &nvram(&image, r"\EFI\debian\grubx64.efi"));
    let before = place.dir.read("vars.fd");
    let words = "--firmware uefi --firmware-vars vars.fd --vars-out left.fd --expect Loading.Linux";
    let ran = place.cmd("esp-grub.bad-fallback", words).run().expect_code(0);
    let check = ran.json()["checks"][0].clone();
    assert_eq!(check["boot"]["nvram"][0]["path"], r"\EFI\debian\grubx64.efi", "{check:#}");
    assert_eq!(check["level"]["station"], "boot-loader", "{check:#}");
    assert!(check["notes"].to_string().contains(r#"starting Boot0007 \"debian\""#), "{check:#}");
    assert!(place.dir.read("vars.fd") == before, "the guest gets a copy");
    let left = guestdisk::boot::nvram::boot_entries(&place.dir.read("left.fd")).unwrap();
    assert!(left.iter().any(|entry| entry.number == 7), "{left:?}");
}

/// OVMF's empty store with an entry `Boot0007` for a program on the first partition (UEFI 2.10, 3.1.3 and 10.3).
fn nvram(image: &std::path::Path, program: &str) -> Vec<u8> {
    let table = partition::read(&*guest::open(image)).unwrap().unwrap();
    let esp = &table.partitions[0];
    let words = |text: &str| text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let mut path = vec![4, 1, 42, 0, 1, 0, 0, 0];
    path.extend((esp.offset / 512).to_le_bytes());
    path.extend((esp.len / 512).to_le_bytes());
    path.extend(guestdisk::Guid::parse(&esp.uuid).unwrap().mixed_endian().as_bytes());
    path.extend([2, 2]);
    let program = words(program);
    path.extend([4, 4]);
    path.extend(u16::try_from(program.len() + 4).unwrap().to_le_bytes());
    path.extend(program);
    path.extend([0x7f, 0xff, 4, 0]);
    let mut option = 1_u32.to_le_bytes().to_vec();
    option.extend(u16::try_from(path.len()).unwrap().to_le_bytes());
    option.extend(words("debian"));
    option.extend(path);
    let mut store = std::fs::read("/usr/share/OVMF/OVMF_VARS_4M.fd").unwrap();
    // Behind the headers of the volume and of the store, and behind what is there already.
    let mut at = 0x48 + 28;
    let field = |store: &[u8], at: usize| {
        usize::try_from(u32::from_le_bytes(store[at..at + 4].try_into().unwrap())).unwrap()
    };
    while store[at..at + 2] == [0xaa, 0x55] {
        at = (at + 60 + field(&store, at + 36) + field(&store, at + 40)).next_multiple_of(4);
    }
    for (name, data) in [("Boot0007", option), ("BootOrder", vec![7, 0])] {
        let name = words(name);
        let mut variable = vec![0xaa, 0x55, 0x3f, 0, 7, 0, 0, 0];
        variable.extend([0; 28]);
        variable.extend(u32::try_from(name.len()).unwrap().to_le_bytes());
        variable.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        let global = guestdisk::Guid::parse("8be4df61-93ca-11d2-aa0d-00e098032b8c").unwrap();
        variable.extend(global.mixed_endian().as_bytes());
        variable.extend(name);
        variable.extend(data);
        store[at..at + variable.len()].copy_from_slice(&variable);
        at = (at + variable.len()).next_multiple_of(4);
    }
    store
}

/// A guest that says nothing on the serial port: on a BIOS its screen tells, and what it reads. Whether it boots can be
/// known only where it says so.
#[test]
fn a_guest_without_a_serial_console() {
    let place = or_skip!(place());
    let check = place.boots("silent", "--firmware bios");
    assert_eq!(check["level"]["evidence"], "screen", "{check:#}");
}

/// On UEFI there is no screen either. In the overlay, and only there, its kernel can be made to speak.
#[test]
fn a_console_is_added_in_the_overlay() {
    let place = or_skip!(place());
    let image = std::fs::read(place.loaders.join("silent.raw")).unwrap();
    let check = place.boots("silent", "--firmware uefi --add-console");
    assert_eq!(check["level"]["evidence"], "console", "{check:#}");
    let changes = check["boot"]["changes"].to_string();
    assert!(
        changes.contains(
            "disk 1 partition 3:/grub/grub.cfg: console=ttyS0,115200 added to 1 kernel command line"
        ),
        "{changes}"
    );
    assert!(std::fs::read(place.loaders.join("silent.raw")).unwrap() == image, "the image is as it was");
}

/// Nothing at all is said: minutes have to pass.
fn a_guest_without_a_word(place: &Place) {
    let check = place.fails(
        "silent",
        "--firmware uefi --timeout 150",
        "silent",
        "kernel",
        "--add-console makes a kernel speak on the serial port",
    );
    assert_eq!(check["level"]["evidence"], "processor", "{check:#}");
    assert!(
        check["detail"].as_str().unwrap().contains("the kernel (disk 1 partition 3:/vmlinuz"),
        "{check:#}"
    );
}

/// All guests that come up, with their own firmware as `auto` finds it; and the one that finds no root.
#[test]
fn the_matrix() {
    if std::env::var_os("VIMG_BOOT_MATRIX").is_none() {
        return;
    }
    let place = or_skip!(place());
    for (guest, firmware) in [
        ("mbr-grub", "bios"),
        ("gpt-grub", "bios"),
        ("extlinux", "bios"),
        ("esp-grub", "uefi"),
        ("sd-boot", "uefi"),
        ("uki", "uefi"),
        ("debian", "uefi"),
    ] {
        if !place.has(guest) {
            note(&format!("no {guest} here"));
            continue;
        }
        let check = place.boots(guest, "--firmware auto");
        assert_eq!(check["boot"]["firmware"], firmware, "{check:#}");
    }
    let check = place.fails("mbr-grub.bad-root", "--firmware auto", "root-not-found", "initramfs", "");
    assert!(check["failures"][0]["line"].as_str().unwrap().contains("00000000-dead"), "{check:#}");
    a_guest_without_a_word(&place);
}

#[test]
fn what_makes_no_sense_with_a_firmware() {
    let dir = Dir::new();
    dir.sparse("empty.raw", 1 << 20);
    let no = |words: &str, said: &str| {
        dir.vimg(&format!("bootcheck -f raw empty.raw {words}")).expect_code(2).expect_stderr(said);
    };
    no("--firmware efi", "--firmware expects 'bios', 'uefi', 'auto' or 'both' not 'efi'");
    no("--firmware-code x", "--firmware-code needs --firmware");
    no("--add-console", "--add-console needs --firmware");
    no("--firmware bios --kernel x", "--firmware and --kernel exclude each other");
    no("--firmware bios --transport mmio", "--firmware and --transport mmio exclude each other");
    no("--firmware both --vars-out x", "--vars-out is for one image and one firmware only");
    requires!(tool("qemu-system-x86_64"));
    dir.write("code", &[0; 4096]);
    no("--engine qemu --firmware uefi --firmware-code code", "this firmware is none of UEFI");
    no("--engine qemu --firmware bios --firmware-code missing", "could not read 'missing'");
    // A disk without anything is one for nobody, and is run all the same: a BIOS says so.
    requires!(firmwares());
    let ran = dir
        .vimg_cmd("bootcheck --engine qemu --memory 256M --firmware auto --output json -f raw empty.raw")
        .timeout(300)
        .run()
        .expect_code(1);
    let check = ran.json()["checks"][0].clone();
    assert_eq!(check["reason"], "no-boot-loader", "{check:#}");
    assert!(
        check["detail"].as_str().unwrap().contains("a disk without partitions with no boot sector"),
        "{check:#}"
    );
}
