//! Units of systemd and other files of services that name devices.

use std::path::Path;

use super::draft::{Draft, Why};
use super::names::{Names, Reader, Verdict};
use super::tables::devices;
use super::text::{each_line, map_devices};
use crate::names::without_escapes;

const UNITS: &str = "/etc/systemd/system";

/// Everything in this file's care.
pub(crate) fn convert(draft: &mut Draft<'_>, names: &Names) {
    let undo = "put the lines of the diff that begin with '-' back";
    let why = Why::new("device-name", "file systems are mounted by names that exist on KVM", undo);
    for (name, _) in draft.tree().list(Path::new(UNITS)) {
        let path = Path::new(UNITS).join(&name);
        if name.ends_with(".mount") {
            draft.edit(&path, why.clone(), |text| mount(text, names));
        } else if [".service", ".swap", ".automount", ".target"].iter().any(|end| name.ends_with(end)) {
            let text = draft.text(&path).unwrap_or_default();
            ask(draft, &path, named(&text, names));
        }
    }
    // Maps of autofs, and where a crash dump is written to.
    let maps = draft.tree().list(Path::new("/etc")).into_iter().map(|(name, _)| name);
    let maps: Vec<_> = maps.filter(|name| name.starts_with("auto.") || name == "kdump.conf").collect();
    for name in maps {
        draft.edit(Path::new("/etc").join(name), why.clone(), |text| devices(text, names, Reader::Path));
    }
    let rules = Path::new("/etc/udev/rules.d");
    for (name, _) in draft.tree().list(rules).into_iter().filter(|(name, _)| name.ends_with(".rules")) {
        let path = rules.join(name);
        let text = draft.text(&path).unwrap_or_default();
        ask(draft, &path, disks_of_rules(&text));
    }
    for path in ["/etc/rc.local", "/etc/rc.d/rc.local", "/etc/sysconfig/rawdevices"] {
        let text = draft.text(path).unwrap_or_default();
        ask(draft, Path::new(path), named(&text, names));
    }
}

fn ask(draft: &mut Draft<'_>, path: &Path, found: Option<String>) {
    if let Some(found) = found {
        draft.ask(format!(
            "{} goes by {found}, which is called otherwise on KVM: change that in the guest.",
            path.display()
        ));
    }
}

/// What a mount unit mounts. (A swap unit has to be called after its device, so it is not changed.)
fn mount(text: &str, names: &Names) -> String {
    each_line(text, |_, line| {
        let is_source =
            line.trim_start().strip_prefix("What").is_some_and(|rest| rest.trim_start().starts_with('='));
        is_source.then(|| {
            map_devices(line, |name| match names.judge(name, Reader::Path) {
                Verdict::Becomes(new) => Some(new),
                Verdict::Stays | Verdict::Unknown => None,
            })
        })
    })
}

/// The first device in a text that has another name on KVM: as a path, or as a unit (`dev-sdb1.device`).
fn named(text: &str, names: &Names) -> Option<String> {
    let mut found = None;
    for line in text.lines().filter(|line| !line.trim_start().starts_with(['#', ';'])) {
        map_devices(line, |name| {
            if found.is_none() && matches!(names.judge(name, Reader::Plain), Verdict::Becomes(_)) {
                found = Some(name.to_owned());
            }
            None
        });
        for word in line.split(['=', ' ', '\t']) {
            let device = word.strip_prefix("dev-").and_then(|word| word.strip_suffix(".device"));
            let changes = device.is_some_and(|device| {
                matches!(names.judge(&format!("/dev/{device}"), Reader::Plain), Verdict::Becomes(_))
            });
            if changes && found.is_none() {
                found = Some(word.to_owned());
            }
        }
    }
    found
}

/// How long systemd waits for a device in an initramfs of dracut, where that is called otherwise on KVM:
/// `initrd.target.wants` has the unit, whose name cannot be changed, and the wait has no end. By its new name the device is
/// waited for elsewhere. `unit`: the path of `NAME.device`, beside which the file lies.
pub(super) fn timeout(unit: &str, text: &str, names: &Names) -> String {
    let name = unit.rsplit('/').next().and_then(|unit| unit.strip_suffix(".device")).unwrap_or_default();
    if names.judge(&format!("/{}", unescaped(name)), Reader::Plain) == Verdict::Stays {
        return text.to_owned();
    }
    each_line(text, |_, line| {
        let (key, _) = line.split_once('=')?;
        matches!(key.trim(), "JobTimeoutSec" | "JobRunningTimeoutSec").then(|| format!("{key}=1"))
    })
}

/// The path, without its first slash, that a unit is called after (systemd.unit(5): `-` is a slash, `\x2d` a byte).
fn unescaped(name: &str) -> String {
    without_escapes(name, |byte| if byte == b'-' { b'/' } else { byte })
}

/// What in a rule of udev means disks of the source: their names, and the identities that SCSI disks have.
fn disks_of_rules(text: &str) -> Option<String> {
    const DISKS: [&str; 5] =
        ["KERNEL==\"sd", "KERNEL==\"xvd", "KERNEL==\"hd", "scsi_id ", "ENV{ID_SERIAL}==\""];
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let line = lines.into_iter().find(|line| DISKS.iter().any(|disk| line.contains(disk)))?;
    Some(format!("'{}'", line.trim().chars().take(120).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::super::names::tests::{ROOT, names};
    use super::super::tree::memory::Memory;
    use super::*;
    use crate::plan::TargetBus;

    #[test]
    fn an_initramfs_does_not_wait_for_what_is_gone() {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let text = "[Unit]\nJobTimeoutSec=infinity\nJobRunningTimeoutSec=0\n";
        let told = "[Unit]\nJobTimeoutSec=1\nJobRunningTimeoutSec=1\n";
        let of = |unit: &str| timeout(&format!("etc/systemd/system/{unit}.device"), text, &names);
        assert_eq!(of("dev-sda1"), told);
        assert_eq!(of("dev-disk-by\\x2did-scsi\\x2d36000c29f\\x2dpart1"), told);
        assert_eq!(of("dev-disk-by\\x2duuid-4d2a\\x2d1f0c"), text);
        assert_eq!(of("dev-mapper-vg0\\x2droot"), text);
        assert_eq!(unescaped("a\\x2db-c\\x2\\xzz"), "a-b/c\\x2\\xzz");
    }

    #[test]
    fn units_and_maps() {
        let tree = Memory::default()
            .file("/etc/systemd/system/data.mount", "[Mount]\nWhat=/dev/sda1\nWhere=/data\n")
            .file("/etc/systemd/system/dev-sda2.swap", "[Swap]\nWhat=/dev/sda2\n")
            .file("/etc/systemd/system/a.service", "[Unit]\nBindsTo=dev-sda1.device\n")
            .file("/etc/systemd/system/b.service", "[Service]\n#/dev/sda1\nExecStart=/bin/x /dev/null\n")
            .file("/etc/auto.misc", "d -fstype=ext4 :/dev/sda1\n")
            .file("/etc/udev/rules.d/99-asm.rules", "KERNEL==\"sd?1\", PROGRAM==\"x\"\n")
            .file("/etc/udev/rules.d/70-persistent-net.rules", "SUBSYSTEM==\"net\", KERNEL==\"eth*\"\n")
            .file("/etc/rc.local", "hdparm -W0 /dev/sda\n");
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let mut draft = Draft::new(&tree);
        convert(&mut draft, &names);
        let plan = draft.finish().unwrap();
        let diffs: Vec<_> = plan.changes.iter().map(|change| change.diff[1].clone()).collect();
        let by_uuid = format!("/dev/disk/by-uuid/{ROOT}");
        assert_eq!(diffs, [format!("+What={by_uuid}"), format!("+d -fstype=ext4 :{by_uuid}")]);
        let said: Vec<_> = plan.to_do.iter().map(|to_do| to_do.split(',').next().unwrap()).collect();
        assert_eq!(
            said,
            [
                "/etc/systemd/system/a.service goes by dev-sda1.device",
                "/etc/systemd/system/dev-sda2.swap goes by /dev/sda2",
                "/etc/udev/rules.d/99-asm.rules goes by 'KERNEL==\"sd?1\"",
                "/etc/rc.local goes by /dev/sda"
            ]
        );
    }
}
