//! `/etc/fstab` (fstab(5)), and what systemd mounts without it.

use std::path::{Path, PathBuf};

use guestdisk::Disks;
use guestdisk::detect::Kind;

use super::{Mount, System};
use crate::names::DiskNames;
use crate::view::GuestView;

/// The most lines that are looked at.
const MOST_LINES: usize = 4096;
/// What a partition is called that systemd mounts at `/boot` (UAPI.2, "Extended Boot Loader Partition").
const XBOOTLDR: &str = "Linux extended boot";

/// Reads the lines of fstab. Which volumes they mean is not known yet.
pub fn parse(text: &str) -> Vec<Mount> {
    let line = |(index, line): (usize, &str)| {
        let mut fields = line.split_whitespace();
        let spec = fields.next().filter(|spec| !spec.starts_with('#'))?;
        let path = fields.next()?;
        Some(Mount {
            spec: unescape(spec),
            path: PathBuf::from(unescape(path)),
            kind: fields.next().unwrap_or("auto").to_owned(),
            options: fields.next().unwrap_or("defaults").to_owned(),
            pass: fields.nth(1).and_then(|pass| pass.parse().ok()).unwrap_or(0),
            volume: None,
            line: index + 1,
        })
    };
    text.lines().take(MOST_LINES).enumerate().filter_map(line).collect()
}

/// `\040` is a space: three octal digits.
pub(crate) fn unescape(field: &str) -> String {
    let mut bytes = vec![];
    let mut rest = field.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match digits {
            Some([high, middle, low]) if *first == b'\\' && *high <= b'3' => {
                bytes.push((high - b'0') << 6 | (middle - b'0') << 3 | (low - b'0'));
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a system mounts, the root included.
pub(super) fn mounts(disks: &Disks, names: &DiskNames, system: &System) -> Vec<Mount> {
    let root = GuestView::with_names(disks, system, names);
    let mut mounts = parse(&root.text("/etc/fstab").unwrap_or_default());
    for mount in &mut mounts {
        mount.volume = names.find(disks, &mount.spec);
    }
    match mounts.iter_mut().find(|mount| mount.path == Path::new("/")) {
        // What was found to be the root is it, whatever the line says.
        Some(line) => line.volume = Some(system.root),
        None => mounts.insert(0, implied("", "/", system.root)),
    }
    add_boot_partitions(disks, &root, &mut mounts);
    mounts
}

fn implied(spec: &str, path: &str, volume: usize) -> Mount {
    Mount {
        spec: spec.to_owned(),
        path: PathBuf::from(path),
        kind: "auto".to_owned(),
        options: "defaults".to_owned(),
        pass: 0,
        volume: Some(volume),
        line: 0,
    }
}

/// Partitions that systemd-gpt-auto-generator mounts by their type, where fstab is silent and the folder is there.
fn add_boot_partitions(disks: &Disks, root: &GuestView, mounts: &mut Vec<Mount>) {
    let of_type = |wanted: &dyn Fn(&guestdisk::partition::Partition) -> bool| {
        disks.volumes().iter().position(|volume| volume.partition.as_ref().is_some_and(wanted))
    };
    let extended = of_type(&|partition| partition.kind.name() == Some(XBOOTLDR));
    let esp = of_type(&|partition| partition.is_efi_system());
    let esp = esp.filter(|esp| {
        disks.volumes()[*esp].content.as_ref().is_some_and(|content| content.kind == Kind::Vfat)
    });
    for (volume, paths) in [(extended, &["/boot"][..]), (esp, &["/efi", "/boot", "/boot/efi"][..])] {
        let Some(volume) = volume else { continue };
        if mounts.iter().any(|mount| mount.volume == Some(volume)) {
            continue;
        }
        let is_free = |path: &&&str| {
            let taken = mounts.iter().any(|mount| mount.path == Path::new(path));
            !taken && root.read_dir(path).is_ok_and(|entries| entries.is_empty())
        };
        if let Some(path) = paths.iter().find(is_free) {
            mounts.push(implied("", path, volume));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_everything_that_may_be_in_them() {
        let text = "# comment\n\n UUID=1\t/  ext4 rw,relatime 0 1\n/dev/sda2 none swap sw\n/dev/sdb1 /mnt/a\\040b\\134\nonly\n\
            LABEL=x /y # no type\n";
        let mounts = parse(text);
        let seen: Vec<_> = mounts
            .iter()
            .map(|mount| (mount.line, mount.spec.as_str(), mount.path.to_str().unwrap()))
            .collect();
        assert_eq!(
            seen,
            [
                (3, "UUID=1", "/"),
                (4, "/dev/sda2", "none"),
                (5, "/dev/sdb1", "/mnt/a b\\"),
                (7, "LABEL=x", "/y")
            ]
        );
        assert_eq!((mounts[0].options.as_str(), mounts[2].kind.as_str()), ("rw,relatime", "auto"));
        assert_eq!(mounts.iter().map(|mount| mount.pass).collect::<Vec<_>>(), [1, 0, 0, 0]);
    }

    #[test]
    fn escapes_that_are_none() {
        assert_eq!(unescape("a\\04"), "a\\04");
        assert_eq!(unescape("\\400\\040"), "\\400 ");
        assert_eq!(unescape("\\"), "\\");
    }
}
