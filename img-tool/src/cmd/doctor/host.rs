//! What the kernel and the installed programs offer.

use std::path::Path;
use std::process::{Command, Stdio};

use guestdisk::boot::firmware::Firmware;
use landlock::{ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::Finding;
use crate::cmd::bootcheck::choose::QEMU;
use crate::cmd::bootcheck::firmware;
use crate::programs::find;

/// Open files that long chains and many NBD clients may need.
const ENOUGH_FILES: u64 = 4096;
/// Memory that a guest and what is around it need.
const ENOUGH_MEMORY_KIB: u64 = 1536 << 10;

pub(super) fn findings() -> Vec<Finding> {
    let mut findings =
        vec![processor(), memory(), open_files(), locked_memory(), landlock(), seccomp(), nbd(), loops()];
    findings.push(program("qemu", QEMU, "qemu-system-x86", "to boot guests without KVM"));
    for name in ["qemu-img", "qemu-nbd"] {
        findings.push(program(name, name, "qemu-utils", "for comparison only; vimg does not need it"));
    }
    findings.push(about_firmware("SeaBIOS", Firmware::Bios));
    findings.push(about_firmware("OVMF", Firmware::Uefi));
    findings
}

fn processor() -> Finding {
    let name = "processor";
    let text = read("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    match (has("vmx"), has("svm")) {
        (true, _) => Finding::ok(name, "has VMX"),
        (_, true) => Finding::ok(name, "has SVM"),
        _ => Finding::gap(
            name,
            "has neither VMX nor SVM",
            "enable virtualisation in the firmware of the machine, or nested virtualisation in its hypervisor",
        ),
    }
}

fn memory() -> Finding {
    let name = "memory";
    let text = read("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    match line.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()) {
        Some(kib) if kib >= ENOUGH_MEMORY_KIB => Finding::ok(name, format!("{} MiB available", kib >> 10)),
        Some(kib) => Finding::gap(
            name,
            format!("{} MiB available", kib >> 10),
            "give guests less: vimg bootcheck --memory 512M",
        ),
        None => Finding::gap(name, "how much there is cannot be found out", "mount /proc"),
    }
}

fn open_files() -> Finding {
    let name = "open files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= ENOUGH_FILES => Finding::ok(name, format!("up to {}", limit(hard))),
        Ok((_, hard)) => Finding::gap(
            name,
            format!("up to {hard}"),
            "raise the limit: ulimit -Hn 65536, or LimitNOFILE= of the unit",
        ),
        Err(error) => Finding::gap(name, error.to_string(), "mount /proc"),
    }
}

fn locked_memory() -> Finding {
    let name = "locked memory";
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        // Nothing here locks memory; what is shown may explain what other programs do.
        Ok((soft, _)) => Finding::ok(name, format!("up to {}", limit(soft))),
        Err(error) => Finding::gap(name, error.to_string(), "mount /proc"),
    }
}

fn limit(value: u64) -> String {
    if value == RLIM_INFINITY { "any number".to_owned() } else { value.to_string() }
}

/// Asks the kernel for a set of rules, which binds nobody.
fn landlock() -> Finding {
    let name = "Landlock";
    let newest = [ABI::V5, ABI::V4, ABI::V3, ABI::V2, ABI::V1].into_iter().find(|&abi| {
        let rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        rules.handle_access(AccessFs::from_all(abi)).and_then(Ruleset::create).is_ok()
    });
    match newest {
        Some(abi) => Finding::ok(name, format!("version {} or newer", abi as i32)),
        None => Finding::gap(
            name,
            "not in this kernel, or not enabled",
            "Linux 5.13 or newer, with 'landlock' in the kernel's option lsm=",
        ),
    }
}

fn seccomp() -> Finding {
    let name = "seccomp";
    match read("/proc/sys/kernel/seccomp/actions_avail") {
        Some(actions) if actions.split_whitespace().any(|action| action == "errno") => {
            Finding::ok(name, "filters of system calls")
        }
        _ => Finding::gap(name, "no filters of system calls", "a kernel with CONFIG_SECCOMP_FILTER"),
    }
}

fn nbd() -> Finding {
    let name = "nbd";
    if !Path::new("/sys/module/nbd").exists() && !Path::new("/sys/block/nbd0").exists() {
        return Finding::gap(name, "the module is not loaded", "as root: modprobe nbd (for vimg nbd attach)");
    }
    let devices = std::fs::read_dir("/sys/block").map_or(0, |entries| {
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("nbd")).count()
    });
    Finding::ok(name, format!("{devices} devices"))
}

fn loops() -> Finding {
    let name = "loop";
    if Path::new("/dev/loop-control").exists() {
        Finding::ok(name, "/dev/loop-control")
    } else {
        Finding::gap(
            name,
            "there is no /dev/loop-control",
            "as root: modprobe loop (for losetup; vimg does not need it)",
        )
    }
}

/// A program and what it says about its version.
fn program(name: &'static str, file: &str, package: &str, purpose: &str) -> Finding {
    let Some(path) = find(file) else {
        return Finding::gap(name, format!("no {file}"), format!("install it (Debian: {package}) {purpose}"));
    };
    let said = Command::new(&path).arg("--version").stdin(Stdio::null()).output();
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let version = said.lines().next().unwrap_or("its version is not known");
    Finding::ok(name, format!("{}: {version}", path.display()))
}

/// What `bootcheck --firmware` would take.
fn about_firmware(name: &'static str, kind: Firmware) -> Finding {
    match firmware::installed(kind) {
        Some((code, Some(vars))) => Finding::ok(name, format!("{}, {}", code.display(), vars.display())),
        Some((code, None)) => Finding::ok(name, code.display().to_string()),
        None => Finding::gap(
            name,
            "not found",
            format!("{}; for bootcheck --firmware {}", firmware::remedy(kind), kind.name()),
        ),
    }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}
