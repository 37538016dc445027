//! Names of disks and partitions: what they mean on the source, and by which name a guest finds the same thing on KVM.
//!
//! A guest counts its disks, so a name like `/dev/sda1` says which disk and which partition. What the source knows of
//! the names ([`Disk::guest_name`](crate::guest::Disk::guest_name)) comes first; where it knows none of that family, the position
//! counts.

use guestdisk::detect::Kind;
use guestdisk::{Disks, Location};

use crate::guest::Guest;
use crate::names::links::{self, DiskFacts};
use crate::plan::TargetBus;

/// What names go by of a volume.
#[derive(Debug, Clone)]
pub(crate) struct VolumeFacts {
    pub(crate) location: Location,
    pub(crate) uuid: String,
    pub(crate) partuuid: String,
    pub(crate) kind: Option<Kind>,
}

/// How a name is going to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// By something that knows `UUID=` (mount, udev, an initramfs).
    Tags,
    /// By something that opens a path.
    Path,
    /// By the kernel itself, without an initramfs.
    Kernel,
    /// By something that knows only the kernel's own names.
    Plain,
}

/// What a name turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is as good on KVM.
    Stays,
    /// It is to be replaced by this.
    Becomes(String),
    /// It names something that is on none of the disks.
    Unknown,
}

/// All names of a guest.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    disks: Vec<DiskFacts>,
    volumes: Vec<VolumeFacts>,
    bus: TargetBus,
    /// Kernels that look for their root themselves find it by `PARTUUID=` on any partition table (Linux 3.8).
    partuuid: bool,
}

/// A kernel's name for a disk or a partition of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KernelName<'a> {
    /// `sda`, `nvme0n1`, `cciss/c0d0`.
    disk: &'a str,
    /// What it begins with: `sd`, `nvme`, `cciss/`.
    family: &'static str,
    /// Which disk of that family, from 0.
    index: usize,
    partition: Option<u32>,
}

impl<'a> KernelName<'a> {
    /// A name without `/dev/`.
    fn parse(name: &'a str) -> Option<Self> {
        for family in ["xvd", "sd", "vd", "hd"] {
            if let Some(rest) = name.strip_prefix(family) {
                let letters = rest.bytes().take_while(u8::is_ascii_lowercase).count();
                let index = index_of_letters(&rest[..letters])?;
                let (disk, number) = name.split_at(family.len() + letters);
                return Some(Self { disk, family, index, partition: partition(number)? });
            }
        }
        let (family, separators): (&str, &[char]) =
            [("nvme", &['n'][..]), ("mmcblk", &[]), ("cciss/c", &['d']), ("ida/c", &['d']), ("rd/c", &['d'])]
                .into_iter()
                .find(|(family, _)| name.starts_with(family))?;
        let rest = &name[family.len()..];
        let mut at = digits(rest)?;
        let mut index: usize = rest[..at].parse().ok()?;
        for separator in separators {
            let after = rest[at..].strip_prefix(*separator)?;
            let len = digits(after)?;
            // `cciss/c0d1` is the second disk of the first controller; `nvme1n1` the first of the second.
            let number: usize = after[..len].parse().ok()?;
            if *separator == 'd' {
                index = index.checked_mul(16)?.checked_add(number)?;
            } else {
                // Several disks at one controller of VMware are its namespaces.
                index = index.checked_add(number.checked_sub(1)?)?;
            }
            at += 1 + len;
        }
        let (disk, number) = name.split_at(family.len() + at);
        let number =
            if number.is_empty() { "" } else { number.strip_prefix('p').filter(|n| !n.is_empty())? };
        Some(Self { disk, family, index, partition: partition(number)? })
    }
}

fn digits(text: &str) -> Option<usize> {
    Some(text.bytes().take_while(u8::is_ascii_digit).count()).filter(|len| *len > 0)
}

fn partition(number: &str) -> Option<Option<u32>> {
    match number {
        "" => Some(None),
        _ if number.bytes().all(|byte| byte.is_ascii_digit()) => Some(Some(number.parse().ok()?)),
        _ => None,
    }
}

/// `a` is 0, `z` 25, `aa` 26.
fn index_of_letters(letters: &str) -> Option<usize> {
    if letters.is_empty() || letters.len() > 3 {
        return None;
    }
    Some(letters.bytes().fold(0, |sum, letter| sum * 26 + usize::from(letter - b'a') + 1) - 1)
}

fn letters_of_index(index: usize) -> String {
    let (mut out, mut rest) = (vec![], index + 1);
    while rest > 0 {
        rest -= 1;
        out.push(b'a' + u8::try_from(rest % 26).unwrap_or(0));
        rest /= 26;
    }
    out.iter().rev().map(|byte| char::from(*byte)).collect()
}

impl Names {
    pub(crate) fn new(disks: &Disks, guest: &Guest, bus: TargetBus) -> Self {
        let facts = disks.volumes().iter().map(|volume| VolumeFacts {
            location: volume.location.clone(),
            uuid: volume.uuid().to_owned(),
            partuuid: volume.partuuid().to_owned(),
            kind: volume.content.as_ref().map(|content| content.kind),
        });
        let mut known = DiskFacts::of(guest);
        known.resize(disks.disks().len(), DiskFacts::default());
        Self { disks: known, volumes: facts.collect(), bus, partuuid: true }
    }

    #[cfg(test)]
    pub(crate) fn of(disks: Vec<DiskFacts>, volumes: Vec<VolumeFacts>, bus: TargetBus) -> Self {
        Self { disks, volumes, bus, partuuid: true }
    }

    /// The same for a guest whose kernels without an initramfs do not know `PARTUUID=`.
    pub(crate) fn without_partuuid(mut self) -> Self {
        self.partuuid = false;
        self
    }

    /// How names of disks begin on KVM, without `/dev/`.
    pub(crate) fn prefix(&self) -> &'static str {
        self.bus.prefix()
    }

    /// The name of a disk on KVM, without `/dev/`.
    fn disk_name(&self, disk: usize) -> String {
        format!("{}{}", self.bus.prefix(), letters_of_index(disk))
    }

    fn plain(&self, disk: usize, partition: Option<u32>) -> String {
        let number = partition.map(|number| number.to_string()).unwrap_or_default();
        format!("/dev/{}{number}", self.disk_name(disk))
    }

    /// The disk and partition that a name means on the source.
    fn meaning(&self, name: &str) -> Option<(usize, Option<u32>)> {
        let device = name.strip_prefix("/dev/")?;
        for link in ["disk/by-id/", "disk/by-path/"] {
            if let Some(link) = device.strip_prefix(link) {
                return links::find(&self.disks, link);
            }
        }
        // Xen can show a file system as `xvda1`, without any `xvda`.
        if let Some(disk) = self.disks.iter().position(|disk| disk.name.as_deref() == Some(device)) {
            return Some((disk, None));
        }
        let parsed = KernelName::parse(device)?;
        let exact = self.disks.iter().position(|disk| disk.name.as_deref() == Some(parsed.disk));
        let family_is_known = self
            .disks
            .iter()
            .filter_map(|disk| disk.name.as_deref())
            .any(|name| KernelName::parse(name).is_some_and(|known| known.family == parsed.family));
        let disk = match exact {
            Some(disk) => disk,
            None if family_is_known => return None,
            None => self.position(parsed.index)?,
        };
        Some((disk, parsed.partition))
    }

    /// The disk that has this number among those of which the source says no name (of all, if it says all).
    fn position(&self, index: usize) -> Option<usize> {
        let unnamed = (0..self.disks.len()).filter(|disk| self.disks[*disk].name.is_none());
        match self.disks.iter().all(|disk| disk.name.is_some()) {
            true => Some(index).filter(|index| *index < self.disks.len()),
            false => unnamed.into_iter().nth(index),
        }
    }

    /// Whether a name means a disk only because there is no other.
    pub(crate) fn is_guess(&self, name: &str) -> bool {
        let link = name.strip_prefix("/dev/").and_then(links::hardware_link);
        link.is_some_and(|link| links::is_guess(&self.disks, link))
    }

    /// The volume (index) that a name means on the source.
    pub(crate) fn volume(&self, name: &str) -> Option<usize> {
        let (disk, partition) = self.meaning(name)?;
        let wanted = match partition {
            Some(number) => Location::Partition { disk, number },
            None => Location::Whole { disk },
        };
        self.volumes.iter().position(|volume| volume.location == wanted)
    }

    /// The best name of a volume for `reader`.
    pub(crate) fn of_volume(&self, volume: usize, reader: Reader) -> Option<String> {
        self.best(self.volumes.get(volume)?, reader, false)
    }

    /// What becomes of a name that begins with `/dev/`.
    pub(crate) fn judge(&self, name: &str, reader: Reader) -> Verdict {
        let Some(device) = name.strip_prefix("/dev/") else { return Verdict::Stays };
        let is_link = device.starts_with("disk/by-id/") || device.starts_with("disk/by-path/");
        if !is_link && KernelName::parse(device).is_none() {
            return Verdict::Stays;
        }
        if device.strip_prefix("disk/by-id/").is_some_and(links::is_of_contents) {
            return Verdict::Stays;
        }
        let Some((disk, partition)) = self.meaning(name) else { return Verdict::Unknown };
        let plain = self.plain(disk, partition);
        let Some(volume) = self.volume(name) else {
            // A whole disk with a table on it, or a partition that is not there.
            return match partition {
                None if plain == name => Verdict::Stays,
                None => Verdict::Becomes(plain),
                Some(_) => Verdict::Unknown,
            };
        };
        if plain == name {
            return Verdict::Stays;
        }
        Verdict::Becomes(self.best(&self.volumes[volume], reader, is_link).unwrap_or(plain))
    }

    /// The best name that does not depend on the order of disks.
    fn best(&self, volume: &VolumeFacts, reader: Reader, is_link: bool) -> Option<String> {
        let unique = |of: fn(&VolumeFacts) -> &String| {
            let own = of(volume);
            let same = self.volumes.iter().filter(|other| of(other).eq_ignore_ascii_case(own)).count();
            Some(own).filter(|own| !own.is_empty() && same == 1)
        };
        // A physical volume or a member of an array is found by what is on it, not by a name.
        let has_uuid = !matches!(volume.kind, None | Some(Kind::LinuxRaid | Kind::Lvm2));
        let uuid = unique(|volume| &volume.uuid).filter(|_| has_uuid);
        let partuuid = unique(|volume| &volume.partuuid);
        match reader {
            Reader::Tags if !is_link => uuid
                .map(|uuid| format!("UUID={uuid}"))
                .or_else(|| partuuid.map(|uuid| format!("PARTUUID={uuid}"))),
            Reader::Tags | Reader::Path => uuid
                .map(|uuid| format!("/dev/disk/by-uuid/{uuid}"))
                .or_else(|| partuuid.map(|uuid| format!("/dev/disk/by-partuuid/{uuid}"))),
            Reader::Kernel => partuuid.filter(|_| self.partuuid).map(|uuid| format!("PARTUUID={uuid}")),
            Reader::Plain => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const ROOT: &str = "5b1c9f3e-8a70-4d0c-9a55-0d3b6c2f7a11";
    pub(crate) const SWAP: &str = "9d3e0c52-41f7-4c36-8e1d-7b5f0e64c2a8";

    fn volume(disk: usize, number: u32, uuid: &str, kind: Kind) -> VolumeFacts {
        VolumeFacts {
            location: Location::Partition { disk, number },
            uuid: uuid.to_owned(),
            partuuid: format!("76696d67-{disk}{number}"),
            kind: Some(kind),
        }
    }

    /// Two disks: root, swap and a physical volume; data whose UUID is there twice.
    pub(crate) fn names(source: [&str; 2], bus: TargetBus) -> Names {
        let disks = source.map(|name| DiskFacts {
            name: (!name.is_empty()).then(|| name.to_owned()),
            identities: (name == source[1]).then(|| "6000c29abc".to_owned()).into_iter().collect(),
            ..DiskFacts::default()
        });
        let volumes = vec![
            volume(0, 1, ROOT, Kind::Ext4),
            volume(0, 2, SWAP, Kind::Swap),
            volume(0, 3, "pv-pv", Kind::Lvm2),
            volume(1, 1, "same", Kind::Xfs),
            volume(1, 2, "same", Kind::Xfs),
        ];
        Names::of(disks.to_vec(), volumes, bus)
    }

    fn becomes(name: &str) -> Verdict {
        Verdict::Becomes(name.to_owned())
    }

    #[test]
    fn names_of_kernels() {
        let parse = |name| KernelName::parse(name).map(|found| (found.disk, found.index, found.partition));
        assert_eq!(parse("sda1"), Some(("sda", 0, Some(1))));
        assert_eq!(parse("xvdaa"), Some(("xvdaa", 26, None)));
        assert_eq!(parse("nvme1n1p3"), Some(("nvme1n1", 1, Some(3))));
        assert_eq!(parse("cciss/c0d1p2"), Some(("cciss/c0d1", 1, Some(2))));
        assert_eq!(parse("mmcblk0p1"), Some(("mmcblk0", 0, Some(1))));
        for none in [
            "", "sd", "sda1x", "nvme0", "nvme0n1p", "cciss/c0", "root", "vg/lv", "mapper/a", "sr0", "hdaaaa1",
        ] {
            assert_eq!(parse(none), None, "{none}");
        }
        for (index, letters) in [(0, "a"), (25, "z"), (26, "aa"), (701, "zz"), (702, "aaa")] {
            assert_eq!(letters_of_index(index), letters);
            assert_eq!(index_of_letters(letters), Some(index));
        }
    }

    #[test]
    fn uuids_are_preferred_where_they_are_understood() {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        assert_eq!(names.judge("/dev/sda1", Reader::Tags), becomes(&format!("UUID={ROOT}")));
        assert_eq!(names.judge("/dev/sda1", Reader::Path), becomes(&format!("/dev/disk/by-uuid/{ROOT}")));
        assert_eq!(names.judge("/dev/sda1", Reader::Kernel), becomes("PARTUUID=76696d67-01"));
        let old = names.clone().without_partuuid();
        assert_eq!(old.judge("/dev/sda1", Reader::Kernel), becomes("/dev/vda1"));
        assert_eq!(names.judge("/dev/sda1", Reader::Plain), becomes("/dev/vda1"));
        assert_eq!(names.judge("/dev/sda", Reader::Tags), becomes("/dev/vda"));
        // A UUID that two volumes have names neither.
        assert_eq!(names.judge("/dev/sdb2", Reader::Tags), becomes("PARTUUID=76696d67-12"));
        // A physical volume has no UUID that mount knows.
        assert_eq!(names.judge("/dev/sda3", Reader::Tags), becomes("PARTUUID=76696d67-03"));
    }

    #[test]
    fn what_stays_and_what_nobody_knows() {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        for stays in [
            "/dev/mapper/vg-root",
            "/dev/vg/root",
            "/dev/sr0",
            "/dev/cdrom",
            "/dev/disk/by-uuid/x",
            "/dev/fd0",
            "/dev/disk/by-id/dm-name-vg-root",
            "/dev/md0",
            "tmpfs",
        ] {
            assert_eq!(names.judge(stays, Reader::Tags), Verdict::Stays, "{stays}");
        }
        for unknown in ["/dev/sdc1", "/dev/sda9", "/dev/disk/by-id/scsi-1234-part1"] {
            assert_eq!(names.judge(unknown, Reader::Tags), Verdict::Unknown, "{unknown}");
        }
        let sata = self::names(["sda", "sdb"], TargetBus::Sata);
        assert_eq!(sata.judge("/dev/sda1", Reader::Tags), Verdict::Stays);
    }

    #[test]
    fn the_source_knows_better_than_the_alphabet() {
        let swapped = names(["sdb", "sda"], TargetBus::VirtioBlk);
        assert_eq!(swapped.judge("/dev/sdb1", Reader::Plain), becomes("/dev/vda1"));
        // Of a family that the source does not use, the position counts.
        assert_eq!(swapped.judge("/dev/hda1", Reader::Plain), becomes("/dev/vda1"));
        let unknown = names(["", ""], TargetBus::VirtioScsi);
        assert_eq!(unknown.judge("/dev/xvdb1", Reader::Plain), becomes("/dev/sdb1"));
        // xvda1 is a disk of its own.
        let whole = names(["xvda1", "xvda2"], TargetBus::VirtioBlk);
        assert_eq!(whole.judge("/dev/xvda2", Reader::Plain), becomes("/dev/vdb"));
    }

    #[test]
    fn disks_without_a_name_are_counted_among_themselves() {
        let mut names = names(["nvme0n1", ""], TargetBus::VirtioBlk);
        assert_eq!(names.judge("/dev/sda1", Reader::Plain), becomes("/dev/vdb1"));
        assert_eq!(names.judge("/dev/nvme0n1p2", Reader::Plain), becomes("/dev/vda2"));
        // Two namespaces of a controller.
        names.disks.iter_mut().for_each(|disk| disk.name = None);
        assert_eq!(names.judge("/dev/nvme0n1p1", Reader::Plain), becomes("/dev/vda1"));
        assert_eq!(names.judge("/dev/nvme0n2p1", Reader::Plain), becomes("/dev/vdb1"));
        assert_eq!(names.judge("/dev/nvme1n1p1", Reader::Plain), becomes("/dev/vdb1"));
    }

    #[test]
    fn links_by_id_are_followed_by_serial_numbers() {
        let names = names(["sda", "sdb"], TargetBus::VirtioBlk);
        let link = "/dev/disk/by-id/scsi-36000c29abc-part1";
        assert_eq!(names.judge(link, Reader::Tags), becomes("/dev/disk/by-partuuid/76696d67-11"));
        let one =
            Names::of(vec![DiskFacts::default()], vec![volume(0, 1, ROOT, Kind::Ext3)], TargetBus::VirtioBlk);
        let by_path = "/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:0:0-part1";
        assert_eq!(one.judge(by_path, Reader::Tags), becomes(&format!("/dev/disk/by-uuid/{ROOT}")));
    }
}
