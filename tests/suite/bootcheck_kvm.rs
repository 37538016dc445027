//! `bootcheck` with our own machine, in the lab, where KVM is real: the same guests as with qemu, from the formats of
//! the issue, good and bad. One start of the lab for all of it; the verdicts are judged here.

use tests::guests::{firmwares, guests, loaders};
use tests::lab::lab;
use tests::skip::qemu;
use tests::{Cmd, Dir, lab, or_skip};

use serde_json::Value;

/// A check in the lab: the name of its report, the words of the command, and what is to come of it.
struct Case {
    name: &'static str,
    words: String,
    verdict: &'static str,
    reason: Option<&'static str>,
}

fn good(name: &'static str, words: &str) -> Case {
    Case { name, words: words.to_owned(), verdict: "booted", reason: None }
}

fn bad(name: &'static str, reason: &'static str, words: &str) -> Case {
    Case { name, words: words.to_owned(), verdict: "not-booted", reason: Some(reason) }
}

/// Images of the small guest in several formats, and an overlay that has lost the superblock of its root.
struct Images {
    dir: Dir,
    small: String,
    nodisk: String,
    cut: String,
}

fn images() -> Result<Images, String> {
    lab()?;
    qemu()?;
    let guests = guests()?;
    let file = |name: &str| guests.join(name).display().to_string();
    let (small, nodisk, cut) = (file("small.raw"), file("initrd.nodisk"), file("small-cut.raw"));
    let dir = Dir::new();
    dir.vimg_ok(&format!("create -f qcow2 -b {small} -F raw base.qcow2"));
    dir.vimg_ok("create -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    dir.vimg_ok(&format!("convert -f raw -O qcow2 -c {small} small.qcow2"));
    dir.vimg_ok(&format!("convert -f raw -O vmdk {small} small.vmdk"));
    dir.vimg_ok(&format!("create -f qcow2 -b {small} -F raw bad.qcow2"));
    // The second partition begins at 49 MiB, its superblock 1 KiB behind that.
    Cmd::new("qemu-io").words("-f qcow2 bad.qcow2 -c").arg("write -z 49M 64k").dir(dir.path()).ok();
    Ok(Images { dir, small, nodisk, cut })
}

/// Makes all checks in one lab, and judges the verdicts here.
#[track_caller]
fn judge(dir: &Dir, cases: &[Case]) {
    let mut script =
        String::from("check() { name=$1; shift; rc=0; \"$VIMG\" bootcheck --engine kvm --memory 256M ");
    script.push_str("--timeout 300 --output json \"$@\" >\"$name.json\" 2>\"$name.err\" || rc=$?; echo $rc >\"$name.rc\"; }\n");
    for case in cases {
        script.push_str(&format!("check {} {}\n", case.name, case.words));
    }
    lab::run(dir.path(), &script);
    for case in cases {
        let read = |ending: &str| {
            std::fs::read_to_string(dir.file(&format!("{}.{ending}", case.name))).unwrap_or_default()
        };
        let said: Value = serde_json::from_str(&read("json")).unwrap_or_default();
        let check = &said["checks"][0];
        let story = format!("{}: {check:#}\n{}", case.name, read("err"));
        assert_eq!(check["verdict"], case.verdict, "{story}");
        assert_eq!(check["reason"].as_str(), case.reason, "{story}");
        assert_eq!(read("rc").trim(), if case.reason.is_none() { "0" } else { "1" }, "{story}");
        assert_eq!(check["engine"], "kvm", "{story}");
        for disk in check["disks"].as_array().into_iter().flatten() {
            assert_eq!(disk["errors"], 0, "{story}");
        }
    }
}

#[test]
fn guests_boot_in_our_own_machine_from_every_format() {
    let images = or_skip!(images());
    let small = &images.small;
    judge(
        &images.dir,
        &[
            good("raw", &format!("-f raw {small}")),
            good("chain", "top.qcow2"),
            good("compressed", "small.qcow2"),
            good("vmdk", "small.vmdk --cpus 2"),
            bad("cut", "kernel-damaged", &format!("-f raw {}", images.cut)),
        ],
    );
}

#[test]
fn guests_fail_in_our_own_machine_for_the_right_reason() {
    let images = or_skip!(images());
    let (small, nodisk) = (&images.small, &images.nodisk);
    judge(
        &images.dir,
        &[
            bad("nodisk", "no-disk-driver", &format!("small.qcow2 --initrd {nodisk}")),
            bad("wrongroot", "root-not-found", "small.vmdk --cmdline root=/dev/vda9\\ quiet"),
            bad("superblock", "root-not-mounted", "bad.qcow2 --cmdline root=/dev/vda2\\ quiet"),
            bad("panic", "init-died", &format!("-f raw {small} --append init=/bin/busybox")),
            bad(
                "loop",
                "timeout",
                &format!("-f raw {small} --append init=/loop --expect login: --timeout 60"),
            ),
        ],
    );
}

/// The guests' own boot loaders, through both firmwares.
#[test]
fn boot_loaders_start_guests_in_our_own_machine() {
    let need = || {
        lab()?;
        firmwares()?;
        loaders()
    };
    let loaders = match need() {
        Ok(loaders) => loaders,
        Err(reason) => {
            tests::skip::note(&reason);
            return;
        }
    };
    let words =
        |guest: &str, rest: &str| format!("-f raw {} {rest}", loaders.join(format!("{guest}.raw")).display());
    let mut cases = vec![
        good("mbr-grub", &words("mbr-grub", "--firmware auto")),
        good("uki", &words("uki", "--firmware auto")),
        bad("modules", "boot-loader", &words("mbr-grub.bad-modules", "--firmware auto")),
        bad("bios", "no-boot-loader", &words("sd-boot", "--firmware bios")),
    ];
    if std::env::var_os("VIMG_BOOT_MATRIX").is_some() {
        for guest in ["gpt-grub", "extlinux", "esp-grub", "sd-boot", "silent"] {
            if loaders.join(format!("{guest}.raw")).exists() {
                // The screen tells of the one that is silent on the serial port.
                let firmware = if guest == "silent" { "bios" } else { "auto" };
                cases.push(good(guest, &words(guest, &format!("--firmware {firmware}"))));
            }
        }
        cases.push(bad("core", "boot-loader", &words("mbr-grub.bad-core", "--firmware auto --timeout 60")));
        cases.push(bad("uefi", "no-boot-loader", &words("mbr-grub", "--firmware uefi")));
        cases.push(bad("root", "root-not-found", &words("mbr-grub.bad-root", "--firmware auto")));
    }
    // The lab has its time limit.
    for some in cases.chunks(4) {
        judge(&Dir::new(), some);
    }
}
