//! Names of devices in configuration files that another hypervisor's disks had, and KVM's will not.

use std::path::{Path, PathBuf};

use guestdisk::Disks;

use super::{DeviceName, System};
use crate::names::{DiskNames, is_unstable};
use crate::view::GuestView;

/// Files that name devices, besides those of boot loaders; folders end with a slash.
const FILES: [&str; 18] = [
    "/etc/fstab",
    "/etc/crypttab",
    "/etc/initramfs-tools/conf.d/",
    "/etc/initramfs-tools/initramfs.conf",
    "/etc/dracut.conf",
    "/etc/dracut.conf.d/",
    "/etc/mkinitcpio.conf",
    "/etc/mdadm.conf",
    "/etc/mdadm/mdadm.conf",
    "/etc/lvm/lvm.conf",
    "/etc/lvm/devices/",
    "/etc/lilo.conf",
    "/etc/suspend.conf",
    "/etc/uswsusp.conf",
    "/etc/smartd.conf",
    "/etc/hdparm.conf",
    "/etc/rc.local",
    "/etc/sysconfig/rawdevices",
];
/// The most names of a system, and the most files of a folder.
const MOST_NAMES: usize = 4096;
const MOST_FILES: usize = 256;

/// Finds the names.
pub(super) fn fill(disks: &Disks, names: &DiskNames, view: &GuestView, system: &mut System) {
    let mut paths: Vec<PathBuf> = FILES.iter().flat_map(|file| expand(view, file)).collect();
    let loaders = system.loaders.iter().map(|config| {
        let file = &config.file;
        view.guest_path(file.volume, &file.path).unwrap_or_else(|| file.path.clone())
    });
    paths.extend(loaders);
    let mut found: Vec<DeviceName> = vec![];
    for path in paths {
        let Ok(place) = view.locate(&path) else { continue };
        if found.iter().any(|known| known.file == place.guest_path) {
            continue;
        }
        let text = view.text(&place.guest_path).unwrap_or_default();
        found.extend(of_text(disks, names, &text, &place.guest_path, ""));
    }
    for kernel in &system.kernels {
        let (Some(initramfs), Some(file)) = (&kernel.initramfs, kernel.initrds.last()) else { continue };
        let path = view.guest_path(file.volume, &file.path).unwrap_or_else(|| file.path.clone());
        if found.iter().any(|known| known.file == path) {
            continue;
        }
        for member in &initramfs.files {
            let text = String::from_utf8_lossy(&member.bytes);
            found.extend(of_text(disks, names, &text, &path, &member.path));
        }
    }
    found.truncate(MOST_NAMES);
    system.device_names = found;
}

fn expand(view: &GuestView, file: &str) -> Vec<PathBuf> {
    if !file.ends_with('/') {
        return vec![PathBuf::from(file)];
    }
    view.names_in(file).into_iter().take(MOST_FILES).map(|name| Path::new(file).join(name)).collect()
}

fn of_text(disks: &Disks, names: &DiskNames, text: &str, file: &Path, member: &str) -> Vec<DeviceName> {
    let found = names_in_text(text).into_iter().map(|(line, name)| DeviceName {
        file: file.to_owned(),
        member: member.to_owned(),
        line,
        volume: names.find(disks, &name),
        name,
    });
    found.collect()
}

/// The names below `/dev` that depend on the hardware, with their lines (from 1), each once a line. Comments do not count,
/// but for those that Debian's tool for GRUB legacy reads.
pub fn names_in_text(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = vec![];
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim_start();
        if line.starts_with('#') && !line.starts_with("# kopt=") {
            continue;
        }
        for name in tokens(line) {
            if found.len() >= MOST_NAMES {
                return found;
            }
            let is_new =
                !found.iter().rev().take_while(|(known, _)| *known == number).any(|(_, known)| known == name);
            if is_new && is_unstable(name) {
                found.push((number, name.to_owned()));
            }
        }
    }
    found
}

/// Everything that begins with `/dev/`.
fn tokens(line: &str) -> impl Iterator<Item = &str> {
    let allowed =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '-' | '.' | ':' | '!' | '+' | '@');
    line.match_indices("/dev/").map(move |(at, _)| {
        let rest = &line[at..];
        let end = rest.find(|c| !allowed(c)).unwrap_or(rest.len());
        // A sentence ends, or a pattern of LVM goes on.
        rest[..end].trim_end_matches(['.', ':', ','])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_will_not_exist() {
        let text = "# /dev/sda1 old\n/dev/sda1 / ext4\nUUID=1 /x\nlinux /vmlinuz root=/dev/xvda2 resume=/dev/xvda3 a=/dev/xvda2\n\
            filter = [ \"a|/dev/sdb.*|\" ]\n# kopt=root=/dev/hda1 ro\n/dev/mapper/a-b /dev/vg/lv /dev/disk/by-uuid/1\n\
            GRUB=\"root=/dev/nvme0n1p2\"\n(hd0) /dev/sda\nswap /dev/disk/by-id/ata-X-part2\nswap /dev/disk/by-id/dm-uuid-LVM-x\n";
        let names = names_in_text(text);
        let seen: Vec<_> = names.iter().map(|(line, name)| (*line, name.as_str())).collect();
        assert_eq!(
            seen,
            [
                (2, "/dev/sda1"),
                (4, "/dev/xvda2"),
                (4, "/dev/xvda3"),
                (5, "/dev/sdb"),
                (6, "/dev/hda1"),
                (8, "/dev/nvme0n1p2"),
                (9, "/dev/sda"),
                (10, "/dev/disk/by-id/ata-X-part2"),
            ]
        );
        assert!(names_in_text("/dev/").is_empty());
    }
}
