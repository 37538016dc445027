//! Which volume a guest means by a name of a device.
//!
//! Names that come from what lies on the disks (`UUID=`, `/dev/vg/lv`) are looked up there. Names that the kernel gave in
//! the order in which it found disks (`/dev/sda1`, `/dev/xvda2`, `/dev/cciss/c0d0p1`) mean a position: that of the disk
//! among those of its kind, or what the source's description calls the disk.

pub mod links;

use guestdisk::{Disks, Location};

use crate::guest::Guest;
use links::{DiskFacts, hardware_link};

/// Device names of kernels for whole disks, with what they say about the number of the disk.
const FAMILIES: [&str; 6] = ["sd", "hd", "vd", "xvd", "ubd", "dasd"];

/// Names of disks as a guest knows them, and the volumes on them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskNames {
    /// What the source calls the disks in the guest, without `/dev/` (`sda`, `xvda2`, `nvme0n1`), in the order of
    /// [`Disks::disks`]; `None` or missing where it does not say.
    pub names: Vec<Option<String>>,
    /// What the guest's `mdadm.conf` calls arrays: a device without `/dev/` (`md0`), and the array's name on the disks
    /// ([`guestdisk::md::Array::name`]).
    pub arrays: Vec<(String, String)>,
    /// What else it says of them; may be empty.
    pub facts: Vec<DiskFacts>,
}

/// A guest has not more arrays than this.
const MOST_ARRAYS: usize = 1024;

impl DiskNames {
    /// The same, and what a guest's `mdadm.conf` calls its arrays (mdadm.conf(5)).
    #[must_use]
    pub fn with_arrays(&self, disks: &Disks, conf: &str) -> Self {
        let mut lines: Vec<String> = vec![];
        for line in conf.lines() {
            let line = line.split('#').next().unwrap_or_default();
            match lines.last_mut() {
                // What begins with white space goes on with the line before.
                Some(last) if line.starts_with([' ', '\t']) => last.push_str(line),
                _ => lines.push(line.to_owned()),
            }
        }
        let named = |line: &String| {
            let mut words = line.split_whitespace();
            let device = words.next().filter(|word| word.eq_ignore_ascii_case("ARRAY")).and(words.next())?;
            let device = device.strip_prefix("/dev/").unwrap_or(device);
            let (mut uuid, mut name) = (None, None);
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                match key.to_ascii_lowercase().as_str() {
                    "uuid" => uuid = Some(value),
                    "name" => name = Some(value),
                    _ => {}
                }
            }
            let is_it = |array: &&guestdisk::md::Array| match (uuid, name) {
                (Some(uuid), _) => array.has_uuid(uuid),
                (None, name) => name.is_some_and(|name| name == array.full_name),
            };
            Some((plain_array(device), disks.arrays().iter().find(is_it)?.name.clone()))
        };
        let arrays = lines.iter().filter_map(named).take(MOST_ARRAYS).collect();
        Self { arrays, ..self.clone() }
    }

    /// The array, or the partition of one, that the guest's own configuration calls so.
    fn by_array(&self, device: &str) -> Option<Location> {
        let device = plain_array(device);
        let location = |(alias, name): &(String, String)| {
            let rest = device.strip_prefix(alias.as_str())?;
            let number = rest.strip_prefix('p').unwrap_or(rest);
            let partition = if rest.is_empty() { None } else { Some(number.parse().ok()?) };
            // `md12` is not partition 2 of `md1`.
            let is_split =
                rest.is_empty() || rest.starts_with('p') || !alias.ends_with(|c: char| c.is_ascii_digit());
            is_split.then(|| Location::Array { name: name.clone(), partition })
        };
        self.arrays.iter().find_map(location)
    }

    /// Those of a machine.
    pub fn of(guest: &Guest) -> Self {
        let names = guest.disks.iter().map(|disk| disk.guest_name.clone()).collect();
        Self { names, facts: DiskFacts::of(guest), ..Self::default() }
    }

    /// The index of the volume that a guest means by `name`, as it stands in fstab, on a kernel's command line or in a
    /// boot loader's configuration. `None` if there is no such volume, or if the name does not tell.
    pub fn find(&self, disks: &Disks, name: &str) -> Option<usize> {
        let name = &unescape(name.trim().trim_matches('"'));
        if let Some(location) = name.strip_prefix("/dev/").and_then(|device| self.by_array(device)) {
            return index_at(disks, &location);
        }
        if let Some(device) = name.strip_prefix("/dev/")
            && let Some(location) = self.by_source(device)
        {
            return index_at(disks, &location);
        }
        if let Some(location) = name.strip_prefix("/dev/").and_then(|device| self.among_unnamed(device)) {
            return location.and_then(|location| index_at(disks, &location));
        }
        if let Ok(volume) = disks.find(name) {
            return index_of(disks, volume);
        }
        let device = name.strip_prefix("/dev/")?;
        if let Some(link) = device.strip_prefix("disk/by-id/").filter(|link| links::is_of_contents(link)) {
            return by_contents(disks, link);
        }
        let location = position(device).or_else(|| self.by_link(disks, device))?;
        index_at(disks, &location)
    }

    /// Links that name a disk by its serial number or its place in the machine, neither of which is on the disk.
    fn by_link(&self, disks: &Disks, device: &str) -> Option<Location> {
        let link = hardware_link(device)?;
        let nothing = vec![DiskFacts::default(); disks.disks().len()];
        let facts = if self.facts.is_empty() { &nothing } else { &self.facts };
        let (disk, number) = links::find(facts, link)?;
        Some(number.map_or(Location::Whole { disk }, |number| Location::Partition { disk, number }))
    }

    /// Where the source says some names, those of another family count the disks that have none. `None`: this name does not
    /// count disks, or the source says none or all of them; `Some(None)`: there is no such disk.
    fn among_unnamed(&self, device: &str) -> Option<Option<Location>> {
        let is_named = |name: &Option<String>| name.as_deref().is_some_and(|name| !name.is_empty());
        if !self.names.iter().any(is_named) || self.names.iter().all(is_named) {
            return None;
        }
        let rest = ["xvd", "sd", "vd", "hd"].iter().find_map(|family| device.strip_prefix(family))?;
        let number = rest.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let letters = &rest[..rest.len() - number.len()];
        if letters.is_empty() || letters.len() > 3 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let index = letters.bytes().fold(0, |sum, letter| sum * 26 + usize::from(letter - b'a') + 1) - 1;
        let mut unnamed = (0..self.names.len()).filter(|disk| !is_named(&self.names[*disk]));
        Some(unnamed.nth(index).and_then(|disk| place(disk, number)))
    }

    /// By what the source calls its disks. The longest name counts: `xvda1` may be a disk beside `xvda`.
    fn by_source(&self, device: &str) -> Option<Location> {
        let known = self.names.iter().enumerate().filter_map(|(disk, name)| Some((disk, name.as_deref()?)));
        let fitting = known.filter(|(_, name)| !name.is_empty() && device.starts_with(name));
        let (disk, name) = fitting.max_by_key(|(_, name)| name.len())?;
        let rest = &device[name.len()..];
        if rest.is_empty() {
            return Some(Location::Whole { disk });
        }
        let digit = name.ends_with(|last: char| last.is_ascii_digit());
        let number = if digit { rest.strip_prefix('p')? } else { rest };
        Some(Location::Partition { disk, number: number.parse().ok()? })
    }
}

/// `md0` for `md/0`: the link has the number of the device.
fn plain_array(device: &str) -> String {
    let number =
        device.strip_prefix("md/").filter(|name| name.starts_with(|first: char| first.is_ascii_digit()));
    number.map_or_else(|| device.to_owned(), |number| format!("md{number}"))
}

/// udev writes what is not plain in the names of its links as `\\x20`: labels with spaces.
fn unescape(name: &str) -> String {
    if !name.starts_with("/dev/disk/by-") || !name.contains("\\x") {
        return name.to_owned();
    }
    without_escapes(name, |byte| byte)
}

/// A text in which `\\x` and two hexadecimal digits are a byte; what else there is goes through `plain`.
pub(crate) fn without_escapes(text: &str, plain: impl Fn(u8) -> u8) -> String {
    let (mut out, mut rest) = (vec![], text.as_bytes());
    while let [first, after @ ..] = rest {
        let digits = rest.strip_prefix(b"\\x").and_then(|digits| digits.get(..2));
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        out.push(byte.unwrap_or_else(|| plain(*first)));
        rest = if byte.is_some() { &rest[4..] } else { after };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The index of a volume of [`Disks::volumes`].
fn index_of(disks: &Disks, wanted: &guestdisk::Volume) -> Option<usize> {
    disks.volumes().iter().position(|volume| std::ptr::eq(volume, wanted))
}

/// The index of what lies at this place.
pub fn index_at(disks: &Disks, location: &Location) -> Option<usize> {
    disks.volumes().iter().position(|volume| volume.location == *location)
}

/// Names that count disks in ways [`Disks::find`] does not know: RAID controllers of old servers.
fn position(device: &str) -> Option<Location> {
    for family in ["cciss/c", "ida/c", "cciss!c", "ida!c"] {
        if let Some(rest) = device.strip_prefix(family) {
            let (_, rest) = rest.split_once('d')?;
            let (disk, number) = rest.split_once('p').unwrap_or((rest, ""));
            return place(disk.parse().ok()?, number);
        }
    }
    None
}

/// Links in `by-id` that go by what is on the disks: of LVM, by names and UUIDs.
fn by_contents(disks: &Disks, link: &str) -> Option<usize> {
    let plain = |uuid: &str| uuid.replace('-', "");
    if let Some(name) = link.strip_prefix("dm-name-") {
        return index_of(disks, disks.find(&format!("/dev/mapper/{name}")).ok()?);
    }
    if let Some(uuid) = link.strip_prefix("lvm-pv-uuid-") {
        return disks.volumes().iter().position(|volume| plain(volume.uuid()) == plain(uuid));
    }
    // The UUIDs of group and volume without hyphens, 32 letters each.
    let uuid = link.strip_prefix("dm-uuid-LVM-")?.get(32..)?;
    let group = disks.volume_groups().iter().find_map(|group| {
        let own = group.volumes.iter().find(|logical| plain(&logical.uuid) == uuid)?;
        Some(Location::Logical { group: group.name.clone(), name: own.name.clone() })
    })?;
    index_at(disks, &group)
}

fn place(disk: usize, number: &str) -> Option<Location> {
    match number {
        "" => Some(Location::Whole { disk }),
        _ => Some(Location::Partition { disk, number: number.parse().ok()? }),
    }
}

/// Whether a path below `/dev` is a name that kernels give in the order in which they find disks, so that another
/// controller gives another name.
pub fn is_unstable(name: &str) -> bool {
    let Some(device) = name.strip_prefix("/dev/") else { return false };
    if hardware_link(device).is_some() {
        return true;
    }
    if ["nvme", "mmcblk", "cciss/", "cciss!", "ida/", "ida!"].iter().any(|family| device.starts_with(family))
    {
        return true;
    }
    let Some(rest) = FAMILIES.iter().find_map(|family| device.strip_prefix(family)) else { return false };
    let digits = rest.trim_start_matches(|c: char| c.is_ascii_lowercase());
    let letters = rest.len() - digits.len();
    (1..=3).contains(&letters) && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether a name says a place (which disk, which partition) and not what lies there: where the disk is missing, so is
/// what is named, whatever else is on the others.
pub fn is_by_place(name: &str) -> bool {
    let tags = ["PARTUUID=", "PARTLABEL=", "/dev/disk/by-partuuid/", "/dev/disk/by-partlabel/"];
    is_unstable(name) || tags.iter().any(|tag| name.starts_with(tag))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> DiskNames {
        DiskNames {
            names: names.iter().map(|name| Some((*name).to_owned())).collect(),
            ..DiskNames::default()
        }
    }

    #[test]
    fn what_the_source_calls_disks_comes_first() {
        let names = names(&["sda", "nvme0n1", "xvda2"]);
        let partition = |disk, number| Some(Location::Partition { disk, number });
        assert_eq!(names.by_source("sda3"), partition(0, 3));
        assert_eq!(names.by_source("nvme0n1p12"), partition(1, 12));
        assert_eq!(names.by_source("nvme0n1"), Some(Location::Whole { disk: 1 }));
        assert_eq!(names.by_source("xvda2"), Some(Location::Whole { disk: 2 }));
        assert_eq!(names.by_source("xvda1"), None);
        assert_eq!(names.by_source("sdab"), None);
        assert_eq!(names.by_source("nvme0n12"), None);
    }

    #[test]
    fn disks_without_a_name_are_counted_among_themselves() {
        let some = DiskNames { names: vec![Some("nvme0n1".to_owned()), None, None], ..DiskNames::default() };
        let partition = |disk, number| Some(Some(Location::Partition { disk, number }));
        assert_eq!(some.among_unnamed("sda1"), partition(1, 1));
        assert_eq!(some.among_unnamed("sdb2"), partition(2, 2));
        assert_eq!(some.among_unnamed("sdc1"), Some(None));
        assert_eq!(some.among_unnamed("nvme0n1p1"), None);
        assert_eq!(DiskNames::default().among_unnamed("sda1"), None);
        assert_eq!(names(&["sda", "sdb"]).among_unnamed("sda1"), None);
    }

    #[test]
    fn arrays_that_are_configured() {
        let known = [("md0", "md/root"), ("md/data", "md127")];
        let known = known.map(|(alias, name)| (alias.to_owned(), name.to_owned()));
        let names = DiskNames { arrays: known.to_vec(), ..DiskNames::default() };
        let array = |name: &str, partition| Some(Location::Array { name: name.to_owned(), partition });
        assert_eq!(names.by_array("md0"), array("md/root", None));
        assert_eq!(names.by_array("md/0"), array("md/root", None));
        assert_eq!(names.by_array("md0p3"), array("md/root", Some(3)));
        assert_eq!(names.by_array("md/data2"), array("md127", Some(2)));
        assert_eq!(names.by_array("md01"), None);
        assert_eq!(names.by_array("sda1"), None);
    }

    #[test]
    fn labels_are_written_by_udev_without_spaces() {
        assert_eq!(unescape(r"/dev/disk/by-label/my\x20d\xc3\xa4ta"), "/dev/disk/by-label/my däta");
        assert_eq!(unescape(r"/dev/disk/by-label/a\xzz\x"), r"/dev/disk/by-label/a\xzz\x");
        assert_eq!(unescape(r"LABEL=a\x20"), r"LABEL=a\x20");
    }

    #[test]
    fn controllers_of_old_servers() {
        assert_eq!(position("cciss/c0d1p2"), Some(Location::Partition { disk: 1, number: 2 }));
        assert_eq!(position("cciss!c0d0"), Some(Location::Whole { disk: 0 }));
        assert_eq!(position("cciss/c0"), None);
    }

    #[test]
    fn names_that_change() {
        for name in [
            "/dev/sda",
            "/dev/sdaa12",
            "/dev/hdc1",
            "/dev/xvda",
            "/dev/nvme0n1p1",
            "/dev/cciss/c0d0p1",
            "/dev/vda3",
            "/dev/disk/by-path/pci-0000:00:10.0-scsi-0:0:0:0-part1",
        ] {
            assert!(is_unstable(name), "{name}");
        }
        for name in [
            "/dev/mapper/vg-root",
            "/dev/vg/root",
            "UUID=1",
            "/dev/disk/by-uuid/1",
            "/dev/sdX",
            "/dev/sr0",
            "sda1",
        ] {
            assert!(!is_unstable(name), "{name}");
        }
    }
}
