//! fstab, crypttab and what else names devices outside of boot loaders.

use std::path::Path;

use super::draft::{Draft, Why};
use super::lvm;
use super::names::{Names, Reader, Verdict};
use super::text::{each_line, map_devices};
use crate::inspect::{Init, System, fstab as lines, is_missed, is_waited_for, stops};
use crate::plan::Stop;

/// File systems that only the tools of another hypervisor can mount.
const FOREIGN_FOLDERS: [&str; 6] = ["vmhgfs", "fuse.vmhgfs-fuse", "vboxsf", "prl_fs", "fuse.vmhgfs", "xenfs"];
/// What is mounted by such tools, whatever the type says (`fuse`).
const FOREIGN_SOURCES: [&str; 3] = [".host:", "vmhgfs-fuse", "prl_fsd"];

/// Keys of encrypted swap.
const RANDOM: [&str; 3] = ["/dev/urandom", "/dev/random", "/dev/hwrng"];

fn why(reason: &str) -> Why {
    Why::new("device-name", reason, "put the lines of the diff that begin with '-' back")
}

/// Everything in this file's care.
pub(crate) fn convert(draft: &mut Draft<'_>, names: &Names, system: &System) {
    let mut unknown = vec![];
    draft.edit("/etc/fstab", why("file systems are mounted by names that exist on KVM"), |text| {
        fstab_of(text, names, Some(system.root), &mut unknown)
    });
    let mut told = vec![];
    for (spec, path) in unknown {
        ambiguous(draft, system, &spec, &path);
        told.push(lines::unescape(&spec));
    }
    let (mut unknown, mut mapped) = (vec![], vec![]);
    draft.edit("/etc/crypttab", why("encrypted volumes are found by names that exist on KVM"), |text| {
        let first = text.lines().filter_map(|line| line.split_whitespace().next());
        mapped.extend(first.map(|name| format!("/dev/mapper/{name}")));
        crypttab(text, names, &mut unknown)
    });
    // What crypttab makes is told with crypttab.
    told.extend(mapped);
    missed(draft, names, system, &told);
    for name in unknown {
        draft.ask(format!(
            "/etc/crypttab: {name} is on none of the given disks: give that disk too, or add nofail to its line or remove it, since systemd waits for it."
        ));
    }
    let resume = why("the swap space to resume from is found by a name that exists on KVM");
    draft.edit("/etc/initramfs-tools/conf.d/resume", resume.clone(), |text| {
        devices(text, names, Reader::Tags)
    });
    for path in ["/etc/uswsusp.conf", "/etc/suspend.conf"] {
        draft.edit(path, resume.clone(), |text| devices(text, names, Reader::Path));
    }
    for path in ["/boot/grub/device.map", "/boot/grub2/device.map"] {
        let reason = why("GRUB's own tools find the disks by their names on KVM");
        draft.edit(path, reason, |text| devices(text, names, Reader::Plain));
    }
    for path in ["/etc/mdadm.conf", "/etc/mdadm/mdadm.conf"] {
        let reason = why("the members of arrays are looked for under their names on KVM");
        draft.edit(path, reason, |text| devices(text, names, Reader::Plain));
    }
    let lvm = why("LVM's filter accepts the disks by their names on KVM");
    for path in ["/etc/lvm/lvm.conf", "/etc/lvm/lvmlocal.conf"] {
        draft.edit(path, lvm.clone(), |text| lvm::conf(text, names));
    }
}

/// A line of fstab without a name on KVM. Inspection has told of what is on none of the disks.
fn ambiguous(draft: &mut Draft<'_>, system: &System, spec: &str, path: &str) {
    let (of_line, at) = (lines::unescape(spec), lines::unescape(path));
    let mount = system.mounts.iter().find(|mount| mount.spec == of_line && mount.path == Path::new(&at));
    if mount.is_some_and(|mount| mount.volume.is_none()) {
        if !system
            .obstacles
            .iter()
            .any(|found| found.fatal && found.message.contains(&format!("'{of_line}'")))
        {
            let waits = mount.is_some_and(is_waited_for) && system.init == Init::Systemd;
            let why = if waits { "systemd waits for it" } else { "it cannot be mounted" };
            draft.ask(format!(
                "/etc/fstab: {spec} is on none of the given disks: give that disk too, or add nofail to its line or remove it, since {why}."
            ));
        }
        return;
    }
    let stop = Stop {
        message: format!("/etc/fstab: which disk is meant by {spec} for {path} cannot be told"),
        hint: "give the machine's description rather than its disks alone, or have the line say UUID= in the guest".to_owned(),
    };
    let stops = match mount {
        Some(mount) => is_waited_for(mount) && stops(system, mount),
        None => !matches!(path, "none" | "swap"),
    };
    if stops { draft.stop(stop.message, stop.hint) } else { draft.ask(stop.sentence()) }
}

/// Lines of fstab that the guest starts without, and that nothing on the disks fits. `told`: names of which something has
/// been said.
fn missed(draft: &mut Draft<'_>, names: &Names, system: &System, told: &[String]) {
    for mount in &system.mounts {
        let spec = &mount.spec;
        let quoted = format!("'{spec}'");
        let about = |found: &&crate::inspect::Obstacle| found.message.contains(&quoted);
        if mount.path == Path::new("/") {
            let is_lost = |found: &crate::inspect::Obstacle| found.code == "mount-missing" && about(&found);
            if system.obstacles.iter().any(is_lost) {
                draft.ask(format!(
                    "/etc/fstab: {spec} for / is on none of the given disks; the root is another: correct that line in the guest."
                ));
            }
            continue;
        }
        let is_told = told.contains(spec)
            || system
                .obstacles
                .iter()
                .filter(about)
                .any(|found| found.fatal || found.message.contains("may lie in"));
        // Names that get another one are found by it.
        if !is_missed(mount) || is_told || matches!(names.judge(spec, Reader::Tags), Verdict::Becomes(_)) {
            continue;
        }
        draft.ask(format!(
            "/etc/fstab: {spec} for {} was not found on the given disks: give that disk too, or remove the line; the guest starts without it.",
            mount.path.display()
        ));
    }
}

/// LVM's devices file, where it cannot be taken away: entries by the names on KVM, which LVM compares with the UUIDs of the
/// physical volumes (lvmdevices(8)).
pub(crate) fn lvm_devices(text: &str, names: &Names) -> String {
    each_line(text, |_, line| {
        let field = |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key));
        let (name, volume) = (field("DEVNAME=")?, field("PVID=")?);
        let new = becomes(names, name, Reader::Plain)?;
        let part = field("PART=").map(|part| format!(" PART={part}")).unwrap_or_default();
        Some(format!("IDTYPE=devname IDNAME={new} DEVNAME={new} PVID={volume}{part}"))
    })
}

/// Names of devices in every line that is no comment.
pub(crate) fn devices(text: &str, names: &Names, reader: Reader) -> String {
    each_line(text, |_, line| {
        let is_comment = line.trim_start().starts_with('#');
        (!is_comment).then(|| map_devices(line, |name| becomes(names, name, reader)))
    })
}

fn becomes(names: &Names, name: &str, reader: Reader) -> Option<String> {
    match names.judge(name, reader) {
        Verdict::Becomes(new) => Some(new),
        Verdict::Stays | Verdict::Unknown => None,
    }
}

/// The first field of every line; the columns stay where they are as far as there is room.
/// Lines without a name on KVM go to `unknown`, by their first two fields.
pub(crate) fn fstab(text: &str, names: &Names, unknown: &mut Vec<(String, String)>) -> String {
    fstab_of(text, names, None, unknown)
}

/// The same for a system whose root is known: what is mounted at `/` is that volume, whatever the name means.
fn fstab_of(text: &str, names: &Names, root: Option<usize>, unknown: &mut Vec<(String, String)>) -> String {
    // Which names mean which: two disks of different kinds, counted each from the first, are not one.
    let of_root = root.and_then(|root| names.of_volume(root, Reader::Tags));
    let mut taken: Vec<(String, String)> = vec![];
    for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let mut words = line.split_whitespace();
        let Some(spec) = words.next() else { continue };
        match (&of_root, words.next()) {
            (Some(new), Some("/")) => taken.push((spec.to_owned(), new.clone())),
            _ => taken.push((spec.to_owned(), spec.to_owned())),
        }
    }
    each_line(text, |_, line| {
        let fields = fields(line)?;
        let field = |index: usize| fields.get(index).map_or("", |(at, len)| &line[*at..*at + *len]);
        let is_foreign = FOREIGN_SOURCES.iter().any(|source| field(0).starts_with(source));
        if is_foreign || FOREIGN_FOLDERS.contains(&field(2)) {
            return nofail(line, *fields.get(3)?);
        }
        // A log or a journal may lie on another device. The last field goes first: places in front of it stay right.
        let options = map_devices(field(3), |name| becomes(names, name, Reader::Path));
        let changed = (options != field(3)).then(|| replace_field(line, fields[3], &options));
        let mut verdict = names.judge(field(0), Reader::Tags);
        if let (Some(new), "/", true) = (&of_root, field(1), verdict != Verdict::Stays) {
            verdict = Verdict::Becomes(new.clone());
        }
        if let Verdict::Becomes(new) = &verdict {
            let is_other = |(old, known): &(String, String)| plain(known) == plain(new) && old != field(0);
            // Subvolumes, and what is mounted in two places, are.
            let may_be_same = field(2) == "btrfs"
                || field(0).starts_with("/dev/disk/") && !names.is_guess(field(0))
                || field(3).split(',').any(|option| option == "bind");
            if taken.iter().any(is_other) && !may_be_same {
                verdict = Verdict::Unknown;
            } else {
                taken.push((field(0).to_owned(), new.clone()));
            }
        }
        match verdict {
            Verdict::Stays => changed,
            Verdict::Becomes(new) => Some(replace_field(changed.as_deref().unwrap_or(line), fields[0], &new)),
            Verdict::Unknown => {
                let may_lack = field(3).split(',').any(|option| matches!(option, "noauto" | "nofail"));
                if !may_lack {
                    unknown.push((field(0).to_owned(), field(1).to_owned()));
                }
                changed
            }
        }
    })
}

/// A tag and the link that udev makes of it are one.
fn plain(name: &str) -> &str {
    let tags = ["UUID=", "/dev/disk/by-uuid/", "PARTUUID=", "/dev/disk/by-partuuid/"];
    tags.iter().find_map(|tag| name.strip_prefix(tag)).unwrap_or(name)
}

/// A shared folder that is not there any more holds nobody up.
fn nofail(line: &str, options: (usize, usize)) -> Option<String> {
    let (at, len) = options;
    let old = &line[at..at + len];
    if old.split(',').any(|option| matches!(option, "noauto" | "nofail")) {
        return None;
    }
    Some(replace_field(line, options, &format!("{old},nofail")))
}

/// The second field of every line.
pub(crate) fn crypttab(text: &str, names: &Names, unknown: &mut Vec<String>) -> String {
    each_line(text, |_, line| {
        let fields = fields(line)?;
        let (at, len) = *fields.get(1)?;
        let name = &line[at..at + len];
        // A key that is new at every start: what is on the device now is written over, and its UUID with it.
        let is_random = fields.get(2).is_some_and(|(at, len)| RANDOM.contains(&&line[*at..*at + *len]));
        match names.judge(name, if is_random { Reader::Kernel } else { Reader::Tags }) {
            Verdict::Stays => None,
            Verdict::Becomes(new) => Some(replace_field(line, (at, len), &new)),
            Verdict::Unknown => {
                unknown.push(name.to_owned());
                None
            }
        }
    })
}

/// Where the fields of a line are; `None` for comments and empty lines.
fn fields(line: &str) -> Option<Vec<(usize, usize)>> {
    let (mut out, mut at) = (vec![], 0);
    loop {
        at += line[at..].find(|c: char| !c.is_whitespace()).unwrap_or(line.len() - at);
        if at >= line.len() || line[at..].starts_with('#') && out.is_empty() {
            break;
        }
        let len = line[at..].find(char::is_whitespace).unwrap_or(line.len() - at);
        out.push((at, len));
        at += len;
    }
    (!out.is_empty()).then_some(out)
}

/// Another text for a field; spaces behind it give way or come, so that the next field stays in its column.
fn replace_field(line: &str, (at, len): (usize, usize), new: &str) -> String {
    let rest = &line[at + len..];
    let spaces = rest.bytes().take_while(|byte| *byte == b' ').count();
    let room = len + spaces;
    // One space, a tab or the end of the line: there is no column to keep.
    let padding = match spaces {
        0 | 1 => spaces,
        _ => room.saturating_sub(new.len()).max(1),
    };
    format!("{}{new}{}{}", &line[..at], " ".repeat(padding), &rest[spaces..])
}

#[cfg(test)]
mod tests {
    use super::super::names::VolumeFacts;
    use super::super::names::tests::{ROOT, SWAP, names};
    use super::*;
    use crate::names::links::DiskFacts;
    use crate::plan::TargetBus;

    fn vmware() -> Names {
        names(["sda", "sdb"], TargetBus::VirtioBlk)
    }

    #[test]
    fn fstab_of_debian() {
        let text = "\
# /etc/fstab: static file system information.
#
# <file system> <mount point>   <type>  <options>       <dump>  <pass>
# / was on /dev/sda1 during installation
/dev/sda1       /               ext4    errors=remount-ro 0       1
/dev/sda2\tnone\tswap\tsw\t0\t0
/dev/sr0        /media/cdrom0   udf,iso9660 user,noauto     0       0
/dev/sdc1 /data xfs defaults 0 0
/dev/sdd1 /more xfs nofail 0 0
.host:/ /mnt/hgfs fuse.vmhgfs-fuse allow_other 0 0
tmpfs /tmp tmpfs defaults 0 0";
        let mut unknown = vec![];
        let new = fstab(text, &vmware(), &mut unknown);
        let expected = text
            .replace("\n/dev/sda1       /", &format!("\nUUID={ROOT} /"))
            .replace("/dev/sda2\tnone", &format!("UUID={SWAP}\tnone"))
            .replace("allow_other", "allow_other,nofail");
        assert_eq!(new, expected);
        assert_eq!(unknown, [("/dev/sdc1".to_owned(), "/data".to_owned())]);
        assert_eq!(fstab(&new, &vmware(), &mut vec![]), new, "edited twice");
    }

    #[test]
    fn columns_stay_where_there_is_room() {
        assert_eq!(replace_field("/dev/sda1   / ext4", (0, 9), "/dev/vda1"), "/dev/vda1   / ext4");
        assert_eq!(replace_field("/dev/sda1   / ext4", (0, 9), "/dev/v1"), "/dev/v1     / ext4");
        assert_eq!(replace_field("/dev/sda1  / ext4", (0, 9), "UUID=1234-5678"), "UUID=1234-5678 / ext4");
        assert_eq!(replace_field("/dev/sda1\t/", (0, 9), "UUID=x"), "UUID=x\t/");
    }

    /// The only disk is meant by a name of hardware, unless the same thing has another name already: then a disk is missing.
    #[test]
    fn a_disk_is_not_guessed_twice() {
        let one = Names::of(
            vec![DiskFacts::default()],
            vec![VolumeFacts {
                location: guestdisk::Location::Partition { disk: 0, number: 1 },
                uuid: ROOT.to_owned(),
                partuuid: String::new(),
                kind: Some(guestdisk::detect::Kind::Ext4),
            }],
            TargetBus::VirtioBlk,
        );
        let by_id = "/dev/disk/by-id/scsi-36000c29a-part1";
        let text = format!("UUID={ROOT} / ext4 defaults 0 1\n{by_id} /data ext4 defaults 0 2\n");
        let mut unknown = vec![];
        assert_eq!(fstab(&text, &one, &mut unknown), text);
        assert_eq!(unknown, [(by_id.to_owned(), "/data".to_owned())]);
        let alone = format!("{by_id} / ext4 defaults 0 1\n");
        let mut unknown = vec![];
        assert_eq!(
            fstab(&alone, &one, &mut unknown),
            format!("/dev/disk/by-uuid/{ROOT} / ext4 defaults 0 1\n")
        );
        assert!(unknown.is_empty());
    }

    #[test]
    fn fstab_of_suse_by_id() {
        let text = "/dev/disk/by-id/scsi-36000c29abc-part1 / ext3 acl,user_xattr 1 1\n";
        let new = fstab(text, &vmware(), &mut vec![]);
        assert_eq!(new, "/dev/disk/by-partuuid/76696d67-11 / ext3 acl,user_xattr 1 1\n");
    }

    #[test]
    fn crypttab_of_anyone() {
        let text = "# name source key\nroot  /dev/sda1   none luks\nswap UUID=x /dev/urandom swap\n";
        let new = crypttab(text, &vmware(), &mut vec![]);
        assert_eq!(new, text.replace("/dev/sda1   none", &format!("UUID={ROOT} none")));
    }

    #[test]
    fn small_files() {
        let map = "(fd0)\t/dev/fd0\n(hd0)\t/dev/sda\n";
        assert_eq!(devices(map, &vmware(), Reader::Plain), map.replace("sda", "vda"));
        assert_eq!(devices("RESUME=/dev/sda2\n", &vmware(), Reader::Tags), format!("RESUME=UUID={SWAP}\n"));
        assert_eq!(devices("# /dev/sda2", &vmware(), Reader::Tags), "# /dev/sda2");
    }

    #[test]
    fn the_devices_file_of_lvm_in_an_initramfs() {
        let text = "VERSION=1.1.2\nIDTYPE=sys_wwid IDNAME=naa.6000c2 DEVNAME=/dev/sda3 PVID=abc PART=3\n";
        let new = lvm_devices(text, &vmware());
        let expected = "VERSION=1.1.2\nIDTYPE=devname IDNAME=/dev/vda3 DEVNAME=/dev/vda3 PVID=abc PART=3\n";
        assert_eq!(new, expected);
        assert_eq!(lvm_devices(&new, &vmware()), new);
    }

    #[test]
    fn shared_folders_of_any_type() {
        let edit = |line: &str| fstab(line, &vmware(), &mut vec![]);
        for line in [
            "vmhgfs-fuse /mnt/hgfs fuse defaults",
            ".host:/ /mnt fuse defaults",
            "xenfs /proc/xen xenfs defaults",
        ] {
            assert_eq!(edit(&format!("{line} 0 0")), format!("{line},nofail 0 0"));
        }
        // Another device of the same file system.
        let line = "/dev/sdb1 /data xfs logdev=/dev/sda3,x-systemd.requires=/dev/sda1 0 0";
        let expected =
            format!("/dev/disk/by-partuuid/76696d67-03,x-systemd.requires=/dev/disk/by-uuid/{ROOT} 0 0");
        let new = edit(line);
        assert!(new.ends_with(&expected) && !new.contains("sdb1"), "{new}");
    }

    #[test]
    fn two_names_are_not_one_volume_and_the_root_is_known() {
        let names = names(["", ""], TargetBus::VirtioBlk);
        let mut unknown = vec![];
        let text = "/dev/sda1 / ext4 defaults\n/dev/nvme0n1p1 /data ext4 defaults\n/dev/sda2 none swap sw\n";
        let new = fstab_of(text, &names, Some(0), &mut unknown);
        let expected =
            text.replace("/dev/sda1", &format!("UUID={ROOT}")).replace("/dev/sda2", &format!("UUID={SWAP}"));
        assert_eq!(new, expected);
        assert_eq!(unknown.len(), 1);
        assert_eq!(unknown[0].0, "/dev/nvme0n1p1");
        assert_eq!(fstab_of(&new, &names, Some(0), &mut vec![]), new, "edited twice");
        let subvolumes = format!("UUID={ROOT} / btrfs subvol=@\n/dev/sda1 /home btrfs subvol=@home\n");
        let new = fstab_of(&subvolumes, &names, Some(0), &mut vec![]);
        assert_eq!(new, subvolumes.replace("/dev/sda1", &format!("UUID={ROOT}")));
        let upside_down = "/dev/nvme0n1p1 /data ext4 defaults\n/dev/sda1 / ext4 defaults\n";
        let new = fstab_of(upside_down, &names, Some(0), &mut vec![]);
        assert_eq!(new, upside_down.replace("/dev/sda1", &format!("UUID={ROOT}")));
        // The disks came in another order than the guest's.
        let new = fstab_of("/dev/sdb2 / ext4 defaults\n", &names, Some(0), &mut vec![]);
        assert_eq!(new, format!("UUID={ROOT} / ext4 defaults\n"));
    }

    /// What is not known stops a conversion where its absence would stop the start.
    #[test]
    fn one_rule_for_what_stops() {
        use super::super::tree::memory::Memory;
        use crate::inspect::parsers;
        let stops = |init, line: &str| {
            let mut mounts = parsers::fstab(line);
            mounts.iter_mut().for_each(|mount| mount.volume = Some(0));
            let system = System { init, mounts, ..System::default() };
            let tree = Memory::default();
            let mut draft = Draft::new(&tree);
            let mut fields = line.split(' ');
            ambiguous(&mut draft, &system, fields.next().unwrap(), fields.next().unwrap());
            let plan = draft.finish().unwrap();
            assert_eq!(plan.stops.len() + plan.to_do.len(), 1, "{line}");
            !plan.stops.is_empty()
        };
        let backup = "/dev/sdb1 /my\\040backup ext3 defaults 0 0";
        assert!(stops(Init::Systemd, backup));
        assert!(!stops(Init::SysV, backup));
        assert!(!stops(Init::OpenRc, backup));
        assert!(stops(Init::SysV, "/dev/sdb1 /backup ext3 defaults 0 2"));
        assert!(!stops(Init::Systemd, "/dev/sdb1 /backup ext3 _netdev 0 2"));
        assert!(!stops(Init::Systemd, "/dev/sdb1 /backup ext3 rw,x-systemd.automount 0 2"));
        assert!(!stops(Init::Systemd, "/dev/sdb1 none swap sw 0 0"));
    }

    /// Swap and lines with nofail hold nobody up, but somebody should know.
    #[test]
    fn what_is_missed_is_to_do() {
        use super::super::tree::memory::Memory;
        use crate::inspect::parsers;
        let to_do = |line: &str| {
            let system = System { mounts: parsers::fstab(line), ..System::default() };
            let tree = Memory::default();
            let mut draft = Draft::new(&tree);
            missed(&mut draft, &vmware(), &system, &["/dev/mapper/swap".to_owned()]);
            draft.finish().unwrap().to_do
        };
        for line in [
            "UUID=12 none swap sw 0 0",
            "UUID=12 /x ext4 nofail 0 0",
            "/dev/foo9 /opt/x xfs nofail 0 2",
            "/dev/sdc1 /x ext4 nofail 0 0",
        ] {
            let (found, spec) = (to_do(line), line.split(' ').next().unwrap());
            assert!(matches!(found.as_slice(), [only] if only.contains(spec)), "{line}: {found:?}");
        }
        for line in [
            "UUID=12 /x ext4 noauto 0 0",
            "UUID=12 /x ext4 _netdev 0 0",
            "/dev/mapper/swap none swap sw 0 0",
            "/dev/sr0 /media iso9660 nofail 0 0",
            "tmpfs /tmp tmpfs defaults 0 0",
            "server:/x /x nfs nofail 0 0",
        ] {
            assert_eq!(to_do(line), [""; 0], "{line}");
        }
    }

    #[test]
    fn encrypted_swap_loses_its_uuid() {
        let text = "swap /dev/sda2 /dev/urandom swap\n";
        assert_eq!(crypttab(text, &vmware(), &mut vec![]), text.replace("/dev/sda2", "PARTUUID=76696d67-02"));
    }
}
