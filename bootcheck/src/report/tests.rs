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
