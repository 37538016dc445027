//! Reports about a guest that boots, one that does not, and one that could not be run.

use super::*;
use crate::check::Origin;
use crate::engine::{CpuState, DiskActivity};
use crate::pattern::Milestone;
use crate::verdict::Reason;
use crate::watch::{Evidence, Failure, Match, Station};

fn booted() -> Report {
    Report {
        verdict: Verdict::Booted,
        engine: Some("kvm"),
        source: Some(Source {
            origin: Origin::Disk,
            entry: Some(("0".to_owned(), "Debian".to_owned())),
            kernel: "/boot/vmlinuz".to_owned(),
            initrd: vec!["/boot/initrd.img".to_owned()],
            cmdline: "root=/dev/vda1 console=ttyS0".to_owned(),
        }),
        watched: Watched {
            bytes: 70,
            last_output: Some(Duration::from_millis(2350)),
            success: Some(seen("login prompt", "vm login:")),
            stations: vec![Station {
                milestone: Milestone::Login,
                at: Duration::from_millis(2350),
                line: "vm login:".to_owned(),
                by: Evidence::Console,
            }],
            tail: vec!["vm login:".to_owned()],
            ..Watched::default()
        },
        outcome: Some(Outcome {
            ending: Ending::Stopped,
            cpus: vec![CpuState {
                index: 0,
                rip: 0xffff_ffff_8100_0000,
                mode: "long mode, halted".to_owned(),
                code: vec![0xf4, 0xc3],
            }],
            disks: vec![DiskActivity {
                reads: 10,
                read_bytes: 40_960,
                sectors_read: Some((0, 99)),
                ..DiskActivity::default()
            }],
            startup: Duration::from_millis(12),
            screen: vec![],
            vars: None,
        }),
        elapsed: Duration::from_millis(2400),
        ..Report::new("a.qcow2")
    }
}

fn seen(pattern: &str, line: &str) -> Match {
    Match { pattern: pattern.to_owned(), line: line.to_owned(), at: Duration::from_millis(2350) }
}

fn failed() -> Report {
    let mut report = booted();
    report.image = "b<&>\".raw".to_owned();
    report.verdict = Verdict::NotBooted { reason: Reason::KernelPanic, detail: None };
    report.watched.success = None;
    let seen = seen("kernel panic", "Kernel panic - not syncing: \u{1}<x>");
    report.watched.tail = vec![seen.line.clone()];
    report.watched.failures = vec![Failure { reason: Reason::KernelPanic, seen }];
    report
}

fn not_checked() -> Report {
    let error = block::Error::unsupported("no KVM here").hint("load the module kvm");
    Report::not_checked("c.vmdk", &error)
}

#[test]
fn people_are_told_in_lines() {
    let text = booted().to_text(true);
    assert_eq!(text.lines().next(), Some("a.qcow2: booted in 2.40 s (kvm)"));
    for line in [
        "  entry     Debian [0]",
        "  kernel    /boot/vmlinuz (from the disk)",
        "  2.35 s    login prompt: vm login:",
        "  ending    stopped",
        "  cpu 0     at 0xffffffff81000000, long mode, halted, code f4 c3",
        "  disk 0    10 reads (40 KiB, sectors 0 to 99), 0 writes (0 KiB), 0 flushes",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(!text.contains("    | "), "the console of what boots is not shown");
    assert_eq!(booted().to_text(false), "a.qcow2: booted in 2.40 s (kvm)\n");
    let text = failed().to_text(true);
    assert!(text.starts_with("b<&>\".raw: did not boot: kernel panic [kernel-panic]\n"), "{text}");
    assert!(text.ends_with("    | Kernel panic - not syncing: \u{1}<x>\n"), "{text}");
    assert_eq!(
        not_checked().to_text(true),
        "c.vmdk: could not be checked: no KVM here\n  hint      load the module kvm\n"
    );
}

#[test]
fn programs_get_every_fact() {
    let value = document(&[booted(), failed(), not_checked()]);
    assert_eq!(
        (&value["booted"], &value["not-booted"], &value["not-checked"]),
        (&1.into(), &1.into(), &1.into())
    );
    let first = &value["checks"][0];
    assert_eq!(first["verdict"], "booted");
    assert_eq!(first["boot"]["entry"]["title"], "Debian");
    assert_eq!(first["seconds"], 2.4);
    assert_eq!(first["startup-seconds"], 0.012);
    assert_eq!(first["time-line"][0]["station"], "login");
    assert_eq!(first["success"]["pattern"], "login prompt");
    assert_eq!(first["cpus"][0]["rip"], "0xffffffff81000000");
    assert_eq!(first["cpus"][0]["code"], "f4c3");
    assert_eq!(first["disks"][0]["sectors-read"], serde_json::json!([0, 99]));
    assert_eq!(value["checks"][1]["reason"], "kernel-panic");
    assert_eq!(value["checks"][1]["failures"][0]["reason"], "kernel-panic");
    assert_eq!(value["checks"][2]["hints"][0], "load the module kvm");
}

#[test]
fn build_servers_get_xml_whatever_a_guest_prints() {
    let xml = junit(&[booted(), failed(), not_checked()]);
    assert!(xml.contains("tests=\"3\" failures=\"1\" errors=\"1\""), "{xml}");
    assert!(xml.contains("name=\"b&lt;&amp;&gt;&quot;.raw\""), "{xml}");
    assert!(xml.contains("not syncing: \u{fffd}&lt;x&gt;"), "{xml}");
    assert!(
        xml.contains("<error type=\"not-checked\" message=\"could not be checked: no KVM here\">"),
        "{xml}"
    );
    assert!(!xml.contains('\u{1}'), "{xml}");
}

#[test]
fn the_worst_decides_the_exit_code() {
    assert_eq!(exit_code(&[booted(), booted()]), 0);
    assert_eq!(exit_code(&[booted(), failed()]), 1);
    assert_eq!(exit_code(&[booted(), not_checked(), failed()]), 2);
    assert_eq!(exit_code(&[]), 2);
}

/// The same guest, started by a firmware.
fn through_bios() -> Report {
    use guestdisk::boot::firmware::{BootCode, Facts, Firmware};
    let mut report = booted();
    report.source = None;
    report.firmware = Some(FirmwareUse {
        firmware: Firmware::Bios,
        code: "/usr/share/bios.bin".to_owned(),
        vars: None,
        reason: "MBR with GRUB's boot code; no EFI system partition".to_owned(),
        both: true,
        facts: Facts { boot_code: BootCode::Grub, ..Facts::default() },
        nvram: vec![],
        landmarks: vec![],
        stall_limit: Duration::from_secs(60),
        changes: vec!["disk 1 partition 1:/grub.cfg: console added".to_owned()],
    });
    report.watched.readings = vec![crate::trace::Reading {
        part: crate::trace::Part::Kernel,
        name: "/vmlinuz".to_owned(),
        first: Duration::from_millis(1500),
        bytes: 4096,
        len: 4096,
    }];
    report.watched.stations[0].by = Evidence::Screen;
    report
}

#[test]
fn a_boot_through_a_firmware_is_explained() {
    let report = through_bios();
    let text = report.to_text(true);
    assert_eq!(text.lines().next(), Some("a.qcow2: booted in 2.40 s (kvm, BIOS)"));
    for line in [
        "  firmware  BIOS (/usr/share/bios.bin)",
        "  because   MBR with GRUB's boot code; no EFI system partition",
        "  or        UEFI would start this disk, too (--firmware both checks both)",
        "  changed   disk 1 partition 1:/grub.cfg: console added",
        "  1.50 s    read: the kernel (/vmlinuz), 4 KiB in all",
        "  2.35 s    login prompt (screen): vm login:",
        "  level     login prompt, at 2.35 s (screen: vm login:)",
    ] {
        assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
    }
    let document = document(&[report]);
    let check = &document["checks"][0];
    assert_eq!((&check["boot"]["from"], &check["boot"]["firmware"]), (&"firmware".into(), &"bios".into()));
    assert_eq!(check["boot"]["disk"]["boot-sector"], "GRUB's boot code");
    assert_eq!(
        (&check["level"]["station"], &check["level"]["evidence"]),
        (&"login".into(), &"screen".into())
    );
    assert_eq!(check["readings"][0]["part"], "kernel");
    assert!(junit(&[through_bios()]).contains("name=\"a.qcow2 [bios]\""));
}
