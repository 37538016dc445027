//! What is mounted (`proc(5)`, `/proc/PID/mountinfo`), and what a rescue system runs from.

use std::path::PathBuf;

use super::disks::{disk_of, leaves};
use super::tree::Tree;

/// A mount of something that lies on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// The kernel's name of the device.
    pub(super) device: String,
    pub(super) path: PathBuf,
    pub(super) kind: String,
    /// The file system can be written to, wherever it is mounted.
    pub(super) writable: bool,
}

/// The rescue system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Live {
    /// What runs is a rescue system, and not the machine's own.
    pub(super) is_rescue: bool,
    /// Disks that it runs from.
    pub(super) disks: Vec<String>,
}

/// What the root of rescue systems lies on: memory, or layers over something that cannot be written.
const RESCUE_ROOTS: [&str; 8] = ["overlay", "aufs", "tmpfs", "ramfs", "rootfs", "squashfs", "iso9660", "nfs"];
/// Where rescue systems mount what they run from.
const MEDIA: [&str; 7] = [
    "/run/live/medium",
    "/lib/live/mount/medium",
    "/cdrom",
    "/run/initramfs/live",
    "/run/archiso/bootmnt",
    "/livemnt/boot",
    "/mnt/cdrom",
];

/// All mounts of devices.
pub(super) fn all(tree: &Tree<'_>) -> Vec<Mount> {
    let text = tree.text("proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(|line| mount(tree, line)).collect()
}

fn mount(tree: &Tree<'_>, line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(2);
    let (numbers, path) = (front.next()?, front.nth(1)?);
    let mut back = back.split(' ');
    let (kind, source, options) = (back.next()?, back.next()?, back.next().unwrap_or_default());
    let device = by_numbers(tree, numbers).or_else(|| by_source(tree, &unescape(source)))?;
    Some(Mount {
        device,
        path: PathBuf::from(unescape(path)),
        kind: kind.to_owned(),
        writable: options.split(',').next() == Some("rw"),
    })
}

/// Spaces and the like are octal: `\040`.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                plain.push(char::from(code));
                plain.push_str(&part[3..]);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

/// The device of these numbers, `8:1`.
fn by_numbers(tree: &Tree<'_>, numbers: &str) -> Option<String> {
    if numbers.starts_with("0:") {
        return None;
    }
    for disk in tree.names("sys/block") {
        if tree.text(&format!("sys/block/{disk}/dev")).as_deref() == Some(numbers) {
            return Some(disk);
        }
        let is_own =
            |part: &String| tree.text(&format!("sys/block/{disk}/{part}/dev")).as_deref() == Some(numbers);
        if let Some(part) = tree
            .names(&format!("sys/block/{disk}"))
            .into_iter()
            .filter(|part| part.starts_with(&disk))
            .find(is_own)
        {
            return Some(part);
        }
    }
    None
}

/// The device of this name: btrfs has numbers of its own.
fn by_source(tree: &Tree<'_>, source: &str) -> Option<String> {
    let name = source.strip_prefix("/dev/")?;
    if let Some(mapper) = name.strip_prefix("mapper/") {
        let is_own =
            |disk: &String| tree.text(&format!("sys/block/{disk}/dm/name")).as_deref() == Some(mapper);
        return tree.names("sys/block").into_iter().find(is_own);
    }
    let name = name.replace('/', "!");
    disk_of(tree, &name).map(|_| name)
}

/// Whether a rescue system is running, and from which disks.
pub(super) fn live_medium(tree: &Tree<'_>, mounts: &[Mount]) -> Live {
    let text = tree.text("proc/self/mountinfo").unwrap_or_default();
    let root = text.lines().rev().find_map(|line| {
        let (front, back) = line.split_once(" - ")?;
        (front.split(' ').nth(4) == Some("/")).then(|| back.split(' ').next().map(str::to_owned))?
    });
    if !root.is_some_and(|kind| RESCUE_ROOTS.contains(&kind.as_str())) {
        return Live::default();
    }
    let is_medium = |mount: &&Mount| {
        matches!(mount.kind.as_str(), "iso9660" | "udf" | "squashfs")
            || MEDIA.iter().any(|path| mount.path.as_os_str() == *path)
    };
    let devices = mounts.iter().filter(is_medium).flat_map(|mount| leaves(tree, &mount.device, 0));
    let mut disks: Vec<String> = devices.filter_map(|device| disk_of(tree, &device)).collect();
    disks.sort();
    disks.dedup();
    Live { is_rescue: true, disks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_octal() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"\x\9"), r"\x\9");
    }
}
