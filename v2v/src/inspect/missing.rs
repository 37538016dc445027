//! What a guest waits for when it starts, and none of its disks has.
//!
//! A system that starts by itself and misses something here does not come up; what can be done without, or may lie where
//! nobody can look, is told and holds nobody up.

use std::path::Path;

use block::ErrorKind;
use guestdisk::boot::Entry;
use guestdisk::detect::Kind;
use guestdisk::fs::FileKind;
use guestdisk::{Disks, Volume};

use super::{Init, Kernel, Mount, Obstacle, System, kernels};
use crate::names::links::hardware_link;
use crate::names::{DiskNames, is_by_place};
use crate::view::GuestView;

/// How much of something unknown is looked at to know whether there is anything.
const HEAD: usize = 64 << 10;
/// Partitions that hold the code of boot loaders, and nothing that is mounted.
const LOADERS: [&str; 4] = ["BIOS boot", "PowerPC PReP boot", "PPC PReP boot", "Microsoft reserved"];
/// Options of fstab that let a start go on without the device (systemd.mount(5), mount(8)); what needs the network is not
/// waited for either.
const DISPENSABLE: [&str; 7] = [
    "noauto",
    "nofail",
    "_netdev",
    "x-systemd.automount",
    "comment=systemd.automount",
    "bootwait=no",
    "nobootwait",
];

/// Everything that is missing. `starts`: this system is the one that starts by itself.
pub(super) fn find(
    disks: &Disks,
    names: &DiskNames,
    view: &GuestView,
    system: &System,
    starts: bool,
) -> Vec<Obstacle> {
    let hidden = hidden(disks);
    let mut found = vec![];
    if let Some(entry) = system.entries.iter().find(|entry| entry.default) {
        found.extend(root(disks, names, entry, hidden.as_deref()));
        found.extend(volumes_of_dracut(disks, names, system, entry, hidden.as_deref()));
    }
    found.extend(
        system.kernels.iter().filter(|kernel| kernel.default).filter_map(|kernel| files(view, kernel)),
    );
    let in_vain = system.mounts.iter().filter(|mount| mount.volume.is_none() && is_waited_for(mount));
    found.extend(in_vain.map(|mount| {
        let place = (!is_by_place(&mount.spec)).then(|| lies_unread(disks, &mount.spec, hidden.as_deref()));
        let fatal = starts && place.as_ref().is_none_or(Option::is_none) && stops(system, mount);
        in_vain_of(mount, place.flatten(), fatal)
    }));
    // A root that is nowhere has been told.
    let is_told = found.iter().any(|obstacle| obstacle.code == "root-missing");
    found.extend(system.mounts.iter().filter(|mount| mount.path == Path::new("/")).filter_map(|mount| {
        let is_tag = is_on_a_disk(&mount.spec) && !mount.spec.starts_with("/dev/");
        let lost = is_tag
            && !is_told
            && names.find(disks, &mount.spec).is_none()
            && lies_unread(disks, &mount.spec, hidden.as_deref()).is_none();
        lost.then(|| in_vain_of(mount, None, false))
    }));
    found
}

/// Names of hardware that fit no disk: it may be missing, or not known well enough.
fn is_link(name: &str) -> bool {
    name.strip_prefix("/dev/").is_some_and(|device| hardware_link(device).is_some())
}

/// What is to be done about them.
const LINK_HINT: &str =
    "give all disks, with the machine's description rather than alone; or have the guest say UUID= there";

fn in_vain_of(mount: &Mount, place: Option<String>, fatal: bool) -> Obstacle {
    let (line, spec, path) = (mount.line, &mount.spec, mount.path.display());
    let hint = match (&place, fatal) {
        (Some(_), _) => "nothing is to be done if it lies there",
        (None, true) if is_link(spec) => LINK_HINT,
        (None, true) => {
            "give the disk that has it, too (in the guest's order), or add nofail to that line in the guest: it waits for it \
             when it starts, and stops"
        }
        (None, false) => "give all disks of the guest, or expect it to wait for this one when it starts",
    };
    let message = match place {
        Some(place) => format!("fstab line {line}: '{spec}' for {path} was not found; it may lie in {place}"),
        None if is_link(spec) => {
            format!("fstab line {line}: which disk '{spec}' for {path} means cannot be told")
        }
        None => format!("fstab line {line}: '{spec}' for {path} is on none of the disks"),
    };
    Obstacle { code: "mount-missing", message, hint: hint.into(), fatal }
}

/// Whether a start waits for it: swap, too, which a start goes on without after a while.
pub(crate) fn is_waited_for(mount: &Mount) -> bool {
    let needed = !mount.options.split(',').any(|option| DISPENSABLE.contains(&option));
    needed && is_on_a_disk(&mount.spec) && !is_network(&mount.kind)
}

/// Whether nothing on the disks fits a line that is meant for a disk and used at each start, with or without a wait.
pub(crate) fn is_missed(mount: &Mount) -> bool {
    let is_optional = mount.options.split(',').any(|option| matches!(option, "noauto" | "_netdev"));
    mount.volume.is_none() && !is_optional && is_on_a_disk(&mount.spec) && !is_network(&mount.kind)
}

/// Whether a start stops where something that it waits for is missing. systemd does, and so does mountall of Upstart
/// (Ubuntu's). OpenRC goes on; so do the scripts of System V after a mount that fails, but not after a check that does.
pub(crate) fn stops(system: &System, mount: &Mount) -> bool {
    let goes_on = match system.init {
        Init::Systemd => false,
        Init::OpenRc => true,
        Init::SysV => mount.pass == 0,
        Init::Unknown => mount.pass == 0 && system.distribution != "ubuntu",
    };
    let early = [Path::new("/"), Path::new("/usr")].contains(&mount.path.as_path());
    mount.kind != "swap" && mount.path.is_absolute() && (early || !goes_on)
}

/// Names of what lies on hard disks; optical drives, memory and the disks of networks come and go.
fn is_on_a_disk(spec: &str) -> bool {
    const OTHERS: [&str; 18] = [
        "sr", "cdrom", "dvd", "fd", "scd", "loop", "ram", "zram", "shm", "pts", "nbd", "rbd", "drbd", "zvol",
        "zd", "pmem", "nfs", "dm-",
    ];
    let Some(device) = spec.strip_prefix("/dev/") else {
        return ["UUID=", "LABEL=", "PARTUUID=", "PARTLABEL="].iter().any(|tag| spec.starts_with(tag));
    };
    !OTHERS.iter().any(|other| {
        let rest = device.strip_prefix(other);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(|c: char| c.is_ascii_digit() || c == '/'))
    })
}

fn is_network(kind: &str) -> bool {
    matches!(kind, "nfs" | "nfs4" | "cifs" | "smb3" | "glusterfs" | "ceph" | "9p" | "virtiofs" | "vboxsf")
}

/// The root that the entry asks for which starts by itself.
fn root(disks: &Disks, names: &DiskNames, entry: &Entry, hidden: Option<&str>) -> Option<Obstacle> {
    let root = kernels::word(&entry.cmdline, "root=")?;
    if !is_on_a_disk(root) || names.find(disks, root).is_some() {
        return None;
    }
    let place = (!is_by_place(root)).then(|| lies_unread(disks, root, hidden)).flatten();
    let fatal = place.is_none();
    let message = match place {
        Some(place) => format!("the root '{root}' of the boot entry '{}' may lie in {place}", entry.title),
        None if is_link(root) => {
            format!("which disk the root '{root}' of the boot entry '{}' means cannot be told", entry.title)
        }
        None => format!(
            "the root '{root}' of the boot entry '{}', which starts by itself, is on none of the disks",
            entry.title
        ),
    };
    let hint = match fatal {
        true if is_link(root) => LINK_HINT,
        true => "give the disk that has it, too, and all of them in the guest's order",
        false => "nothing is to be done if it lies there",
    };
    Some(Obstacle { code: "root-missing", message, hint: hint.into(), fatal })
}

/// Logical volumes that dracut waits for whatever they hold, and without which it gives up (dracut.cmdline(7), `rd.lvm.lv=`).
fn volumes_of_dracut(
    disks: &Disks,
    names: &DiskNames,
    system: &System,
    entry: &Entry,
    hidden: Option<&str>,
) -> Vec<Obstacle> {
    let by_dracut = |kernel: &Kernel| {
        kernel.default && kernel.initramfs.as_ref().is_some_and(|initramfs| initramfs.generator == "dracut")
    };
    if !system.kernels.iter().any(by_dracut) {
        return vec![];
    }
    let volumes = entry.cmdline.split_whitespace().filter_map(|word| word.strip_prefix("rd.lvm.lv="));
    let missing = volumes.filter(|volume| {
        let name = format!("/dev/{volume}");
        names.find(disks, &name).is_none() && lies_unread(disks, &name, hidden).is_none()
    });
    missing
        .map(|volume| Obstacle {
            code: "volume-missing",
            message: format!(
                "the volume '{volume}' that the boot entry '{}' waits for (rd.lvm.lv) is on none of the disks",
                entry.title
            ),
            hint: "give the disk that has it, too, or take the word from the command line in the guest".into(),
            fatal: true,
        })
        .collect()
}

/// The files that the boot loader loads by itself.
fn files(view: &GuestView, kernel: &Kernel) -> Option<Obstacle> {
    let seen = |file| {
        let kind = view
            .place_of(file)
            .and_then(|place| Ok(view.file_system(&place)?.symlink_metadata(&place.path)?.kind));
        Some((file, absence(kind, view.notes(file.volume))?))
    };
    let found: Vec<_> = kernel.image.iter().chain(&kernel.initrds).filter_map(seen).collect();
    // What is certain comes first.
    let (missing, absence) = found.iter().find(|(_, absence)| absence.is_none()).or_else(|| found.first())?;
    let missing = *missing;
    let (code, what) = match kernel.image.as_ref() == Some(missing) {
        true => ("kernel-missing", "the kernel"),
        false => ("initramfs-missing", "the initramfs"),
    };
    let file = format!("{what} {} that the boot loader starts by itself", missing.path.display());
    Some(match absence {
        None => Obstacle {
            code,
            message: format!("{file} is not there"),
            hint: "give the disk that has it (/boot), too, or repair the boot loader's configuration in the guest"
                .into(),
            fatal: true,
        },
        Some(why) => Obstacle {
            code,
            message: format!("{file} was not found, which says little: {why}"),
            hint: "shut the guest down cleanly, or check that file system in the guest".into(),
            fatal: false,
        },
    })
}

/// Whether something is no file that can be loaded: `Some(None)` if that is certain, `Some` with the reason if not. `notes`:
/// what is to be known of the state of its file system.
fn absence(kind: block::Result<FileKind>, notes: &[String]) -> Option<Option<String>> {
    match kind {
        Ok(FileKind::File) => None,
        Ok(_) => Some(None),
        Err(error) if error.kind() == ErrorKind::NotFound => Some(notes.first().cloned()),
        Err(error) => Some(Some(error.to_string())),
    }
}

/// Where a name that goes by contents may be found although it was not: in what cannot be read.
fn lies_unread(disks: &Disks, name: &str, hidden: Option<&str>) -> Option<String> {
    let device = name.strip_prefix("/dev/").unwrap_or_default();
    let logical = disks.volume_groups().iter().flat_map(|group| {
        group.volumes.iter().map(move |logical| (format!("{}/{}", group.name, logical.name), group, logical))
    });
    let unread: Vec<_> = logical
        .filter(|(_, _, logical)| {
            logical.visible && logical.device().is_err_and(|error| error.kind() == ErrorKind::Unsupported)
        })
        .collect();
    let named = unread.iter().find(|(path, group, logical)| {
        let mapper = guestdisk::lvm::mapper_name(&group.name, &logical.name);
        device == path.as_str() || device.strip_prefix("mapper/") == Some(mapper.as_str())
    });
    if let Some((path, ..)) = named {
        return Some(format!("/dev/{path}, which is not read"));
    }
    hidden.map(str::to_owned).or_else(|| {
        let by_content = !device.contains('/') || device.starts_with("disk/");
        unread.first().filter(|_| by_content).map(|(path, ..)| format!("/dev/{path}, which is not read"))
    })
}

/// The first volume in which other volumes may lie that were not looked at, in words.
fn hidden(disks: &Disks) -> Option<String> {
    disks.volumes().iter().find_map(|volume| {
        let what = match volume.content.as_ref().map(|content| content.kind) {
            Some(Kind::Luks | Kind::BitLocker) => "which is encrypted",
            Some(Kind::LinuxRaid) if !is_in_array(disks, volume) => {
                "a member of a software RAID that is not read"
            }
            None if holds_something(volume) => "of which is not known what it holds",
            _ => return None,
        };
        Some(format!("{}, {what}", volume.location))
    })
}

/// Whether a member of a RAID belongs to an array that can be read: what lies there is looked at as the array.
fn is_in_array(disks: &Disks, member: &Volume) -> bool {
    disks.arrays().iter().any(|array| {
        array.device().is_ok() && array.members.iter().any(|own| own.location == member.location)
    })
}

/// Whether there are bytes in a volume that nobody knows, and that is not where boot loaders have their code.
fn holds_something(volume: &Volume) -> bool {
    let kind = volume.partition.as_ref().and_then(|partition| partition.kind.name());
    if kind.is_some_and(|kind| LOADERS.contains(&kind)) {
        return false;
    }
    let len = usize::try_from(volume.device.size()).unwrap_or(HEAD).min(HEAD);
    let mut head = vec![0; len];
    volume.device.read_at(&mut head, 0).is_ok() && head.iter().any(|byte| *byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(spec: &str, path: &str, kind: &str, options: &str) -> Mount {
        Mount {
            spec: spec.into(),
            path: path.into(),
            kind: kind.into(),
            options: options.into(),
            ..Mount::default()
        }
    }

    #[test]
    fn what_a_start_waits_for() {
        for (spec, kind, options, waits) in [
            ("/dev/sdb1", "ext4", "defaults", true),
            ("UUID=1", "xfs", "rw,relatime", true),
            ("/dev/mapper/vg-data", "auto", "defaults", true),
            ("/dev/disk/by-id/ata-X-part1", "ext4", "acl", true),
            ("/dev/sdb1", "ext4", "rw,nofail", false),
            ("/dev/sdb1", "ext4", "noauto,user", false),
            ("/dev/sdb1", "ext4", "_netdev", false),
            ("/dev/sdb1", "ext4", "x-systemd.automount", false),
            ("/dev/sr0", "iso9660", "ro", false),
            ("/dev/fd0", "auto", "rw", false),
            ("/dev/loop0", "ext4", "rw", false),
            ("/srv/a", "none", "bind", false),
            ("server:/export", "nfs", "rw", false),
            ("tmpfs", "tmpfs", "rw", false),
        ] {
            assert_eq!(is_waited_for(&mount(spec, "/data", kind, options)), waits, "{spec} {options}");
        }
    }

    #[test]
    fn what_stops_a_start() {
        let systemd = System { init: Init::Systemd, ..System::default() };
        assert!(stops(&systemd, &mount("UUID=1", "/data", "ext4", "rw")));
        assert!(!stops(&systemd, &mount("UUID=1", "none", "swap", "sw")));
        let openrc = System { init: Init::OpenRc, ..System::default() };
        assert!(!stops(&openrc, &mount("UUID=1", "/data", "ext4", "rw")));
        assert!(stops(&openrc, &mount("UUID=1", "/usr", "ext4", "rw")));
    }

    #[test]
    fn scripts_of_system_v_go_on_after_a_mount_and_not_after_a_check() {
        let backup = |pass| Mount { pass, ..mount("/dev/sdb1", "/backup", "ext3", "defaults") };
        for init in [Init::SysV, Init::Unknown] {
            let system = System { init, ..System::default() };
            assert!(!stops(&system, &backup(0)), "{init:?}");
            assert!(stops(&system, &backup(2)), "{init:?}");
            assert!(stops(&system, &mount("/dev/sdb1", "/usr", "ext3", "defaults")), "{init:?}");
            assert!(stops(&system, &mount("/dev/sdb1", "/", "ext3", "defaults")), "{init:?}");
        }
        let upstart = System { distribution: "ubuntu".into(), ..System::default() };
        assert!(stops(&upstart, &backup(0)));
        assert!(!is_waited_for(&mount("/dev/sdb1", "/backup", "ext3", "nobootwait")));
    }

    #[test]
    fn what_cannot_be_read_is_not_missing() {
        use block::Error;
        let missing = || Err(Error::new(ErrorKind::NotFound, "no such file"));
        assert_eq!(absence(Ok(FileKind::File), &[]), None);
        assert_eq!(absence(Ok(FileKind::Directory), &[]), Some(None));
        assert_eq!(absence(missing(), &[]), Some(None));
        let note = "the log was not finished".to_owned();
        assert_eq!(absence(missing(), std::slice::from_ref(&note)), Some(Some(note)));
        let damaged = absence(Err(Error::invalid("a damaged directory")), &[]);
        assert!(damaged.flatten().is_some_and(|why| why.contains("a damaged directory")));
    }
}
