//! Links below `/dev/disk/by-id` and `/dev/disk/by-path`: which disk they mean, by what the source says of its disks.
//!
//! udev makes these names of what a disk says of itself (serial number, WWN) and of the way to it (`60-persistent-storage.rules`
//! of systemd). A description says both as far as it knows them: the machine of `vimg p2v` all links themselves, libvirt serial
//! numbers and PCI addresses, VMX, OVF and .vbox controllers and units. What fits no disk, or several, is not guessed.

use crate::guest::{Bus, Guest, Origin};

/// Identities shorter than this say nothing.
const SHORTEST: usize = 4;
/// Links that go by what is on the disks, by the beginning of their names.
const OF_CONTENTS: [&str; 3] = ["dm-", "md-", "lvm-"];

/// What is known of a disk of the source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskFacts {
    /// Its name in the guest, without `/dev/`.
    pub name: Option<String>,
    /// What it is attached to.
    pub bus: Option<Bus>,
    /// Controller among those of its bus, and number there, from 0.
    pub slot: Option<(u32, u32)>,
    /// Serial number, WWN, whole links.
    pub identities: Vec<String>,
    /// By-id links of other identities are those of other disks.
    pub complete: bool,
}

impl DiskFacts {
    /// Of all disks of a machine.
    pub fn of(guest: &Guest) -> Vec<Self> {
        let fact = |disk: &crate::guest::Disk| Self {
            name: disk.guest_name.clone(),
            bus: disk.bus,
            slot: disk.slot,
            identities: disk.serial.iter().chain(&disk.identities).cloned().collect(),
            complete: guest.origin == Origin::Physical && !disk.identities.is_empty(),
        };
        guest.disks.iter().map(fact).collect()
    }

    /// Whether a link is made of one of its identities.
    fn has(&self, link: &str) -> Option<bool> {
        Some(self.identities.iter().any(|own| is_in(link, own)))
    }
}

/// Whether a link goes by what is on the disks.
pub fn is_of_contents(link: &str) -> bool {
    OF_CONTENTS.iter().any(|start| link.starts_with(start))
}

/// The link of a name below `/dev`, if it is one that goes by hardware.
pub fn hardware_link(device: &str) -> Option<&str> {
    let link = ["disk/by-id/", "disk/by-path/"].into_iter().find_map(|folder| device.strip_prefix(folder));
    link.filter(|link| !is_of_contents(link))
}

/// The disk and the partition that a link (without its folder) means; `None` if that cannot be told.
pub fn find(disks: &[DiskFacts], link: &str) -> Option<(usize, Option<u32>)> {
    if is_of_contents(link) {
        return None;
    }
    let (disk, number) = match link.rsplit_once("-part") {
        Some((disk, number)) => (disk, Some(number.parse().ok()?)),
        None => (link, None),
    };
    let way = Way::parse(disk);
    let by_identity = one(disks, |facts| facts.has(disk));
    let by_way = || one(disks, |facts| way.as_ref()?.fits(facts));
    by_identity.or_else(by_way).or_else(|| only(disks, disk, way.as_ref())).map(|disk| (disk, number))
}

/// Whether a link means a disk only because there is no other.
pub fn is_guess(disks: &[DiskFacts], link: &str) -> bool {
    let disk = link.rsplit_once("-part").map_or(link, |(disk, _)| disk);
    let known = |facts: &DiskFacts| {
        facts.has(disk) == Some(true) || Way::parse(disk).is_some_and(|way| way.fits(facts) == Some(true))
    };
    find(disks, link).is_some() && !disks.iter().any(known)
}

/// A machine of one disk has no other, unless that is known to be called otherwise, or to be elsewhere.
fn only(disks: &[DiskFacts], link: &str, way: Option<&Way>) -> Option<usize> {
    let [facts] = disks else { return None };
    let elsewhere = way.is_some_and(|way| way.fits(facts) == Some(false));
    let otherwise = facts.complete && way.is_none() && !link.contains(':');
    (!elsewhere && !otherwise && !link.contains("usb-")).then_some(0)
}

/// The only disk of which this is known to hold.
fn one(disks: &[DiskFacts], fits: impl Fn(&DiskFacts) -> Option<bool>) -> Option<usize> {
    let fitting = disks.iter().enumerate().filter(|(_, facts)| fits(facts) == Some(true));
    let mut fitting = fitting.map(|(index, _)| index);
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

/// Whether a link is made of an identity: spaces become `_`, and virtio shows 20 letters of a serial number (virtio 1.2,
/// 5.2.6.1).
fn is_in(link: &str, identity: &str) -> bool {
    let identity: String = identity
        .trim()
        .chars()
        .map(|c| if c.is_whitespace() { '_' } else { c.to_ascii_lowercase() })
        .collect();
    let link = link.to_ascii_lowercase();
    let virtio =
        || link.strip_prefix("virtio-").is_some_and(|own| own.len() == 20 && identity.starts_with(own));
    // A number that goes on, on either side, is another one.
    let whole = |at: usize| {
        let (before, after) = (&link[..at], &link[at + identity.len()..]);
        is_boundary(before) && !after.starts_with(|c: char| c.is_ascii_alphanumeric())
    };
    identity.len() >= SHORTEST && (link.match_indices(&identity).any(|(at, _)| whole(at)) || virtio())
}

/// Whether an identity may begin after this part of a link. `0x` is before a WWN; in the links of SCSI it is a digit: how the
/// identity is made (1 by the vendor, 2 an EUI-64, 3 a WWN, 8 a name; `scsi_id`).
fn is_boundary(before: &str) -> bool {
    let before = before.strip_suffix("0x").unwrap_or(before);
    before.strip_prefix("scsi-").is_some_and(|kind| matches!(kind, "1" | "2" | "3" | "8"))
        || !before.ends_with(|c: char| c.is_ascii_alphanumeric())
}

/// The last part of a link in `by-path`: where on its controller a disk is.
#[derive(Debug)]
enum Way {
    /// By its name, as Xen numbers it.
    Xen(String),
    Scsi(u32),
    /// Port, or channel and device.
    Ata(u32, u32),
    /// Name space.
    Nvme(u32),
}

impl Way {
    fn parse(link: &str) -> Option<Self> {
        if let Some((_, number)) = link.rsplit_once("vbd-") {
            return xen_name(number.parse().ok()?).map(Self::Xen);
        }
        if let Some((_, address)) = link.rsplit_once("-scsi-").filter(|_| !link.contains("usb-")) {
            return scsi_unit(address).map(Self::Scsi);
        }
        if let Some((_, address)) = link.rsplit_once("-ata-") {
            let (port, device) = address.split_once('.').unwrap_or((address, "0"));
            return Some(Self::Ata(port.parse::<u32>().ok()?.checked_sub(1)?, device.parse().ok()?));
        }
        let (_, space) = link.rsplit_once("-nvme-")?;
        space.parse::<u32>().ok()?.checked_sub(1).map(Self::Nvme)
    }

    /// Whether it leads to this disk; `None` if nothing is known of where that is, or it is on another kind of controller.
    fn fits(&self, facts: &DiskFacts) -> Option<bool> {
        if let Self::Xen(name) = self {
            return facts.name.as_ref().map(|own| own == name);
        }
        let (controller, unit) = facts.slot?;
        match (self, facts.bus?) {
            (Self::Scsi(wanted), Bus::Scsi | Bus::VirtioScsi) | (Self::Nvme(wanted), Bus::Nvme) => {
                Some(*wanted == unit)
            }
            // A channel of IDE is what descriptions call a controller.
            (Self::Ata(port, device), Bus::Ide) => Some((*port, *device) == (controller, unit)),
            (Self::Ata(port, device), Bus::Sata) => Some(*port == unit && *device == 0),
            _ => None,
        }
    }
}

/// `HOST:CHANNEL:TARGET:LUN`: controllers have either targets or units, the other number is 0.
fn scsi_unit(address: &str) -> Option<u32> {
    let numbers: Vec<u32> = address.split(':').map(|number| number.parse().ok()).collect::<Option<_>>()?;
    match numbers[..] {
        [_, 0, target, 0] => Some(target),
        [_, 0, 0, unit] => Some(unit),
        _ => None,
    }
}

/// Xen numbers its disks like devices of Linux: major 202 with 16 minors each, or 2^28 with 256 (xen-vbd-interface(7)).
fn xen_name(number: u32) -> Option<String> {
    let disk = match number >> 8 {
        202 if number.is_multiple_of(16) => (number & 0xff) >> 4,
        _ if number & 0xf000_00ff == 1 << 28 => (number >> 8) & 0xf_ffff,
        _ => return None,
    };
    Some(format!("xvd{}", crate::source::letters(usize::try_from(disk).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bus: Bus, slot: (u32, u32), identity: &str) -> DiskFacts {
        DiskFacts {
            bus: Some(bus),
            slot: Some(slot),
            identities: vec![identity.to_owned()],
            ..DiskFacts::default()
        }
    }

    #[test]
    fn identities_are_found_in_links() {
        let disks = [
            disk(Bus::Scsi, (0, 0), "6000c29abc0001"),
            disk(Bus::Scsi, (0, 1), "6000c29abc0002"),
            disk(Bus::Virtio, (0, 2), "a-serial-number-of-more-than-20"),
            disk(Bus::Sata, (0, 3), "ata-Samsung_1"),
            disk(Bus::Sata, (0, 4), "WD 12"),
        ];
        for (link, found) in [
            ("scsi-36000c29abc0002-part3", Some((1, Some(3)))),
            ("wwn-0x6000c29abc0001", Some((0, None))),
            ("virtio-a-serial-number-of-m-part1", Some((2, Some(1)))),
            ("ata-Samsung_1-part2", Some((3, Some(2)))),
            // Another number that begins alike.
            ("ata-Samsung_12", None),
            ("ata-X_WD_12", Some((4, None))),
            ("scsi-36000c29abc0009", None),
            ("dm-name-vg-root", None),
            ("lvm-pv-uuid-6000c29abc0001", None),
        ] {
            assert_eq!(find(&disks, link), found, "{link}");
        }
        // A serial number within the WWN of another disk.
        let short = [disk(Bus::Scsi, (0, 0), "1234"), disk(Bus::Scsi, (0, 1), "")];
        assert_eq!(find(&short, "wwn-0x50014ee0001234-part1"), None);
        assert_eq!(find(&short, "scsi-350014ee0001234"), None);
        assert_eq!(find(&short, "scsi-0QEMU_QEMU_HARDDISK_1234-part1"), Some((0, Some(1))));
        assert_eq!(find(&short, "wwn-0x1234"), Some((0, None)));
        // Of several that fit none is meant.
        let twice = [disk(Bus::Scsi, (0, 0), "6000c29a"), disk(Bus::Scsi, (0, 1), "6000c29a")];
        assert_eq!(find(&twice, "wwn-0x6000c29a"), None);
    }

    #[test]
    fn the_only_disk_is_meant_unless_it_is_known_not_to_be() {
        let unknown = [DiskFacts::default()];
        assert_eq!(find(&unknown, "wwn-0x1-part2"), Some((0, Some(2))));
        assert_eq!(find(&unknown, "pci-0000:00:10.0-scsi-0:0:0:0"), Some((0, None)));
        assert_eq!(find(&unknown, "usb-Stick_1-0:0-part1"), None);
        assert!(is_guess(&unknown, "wwn-0x1-part2") && !is_guess(&unknown, "usb-Stick_1-0:0-part1"));
        assert!(!is_guess(&[disk(Bus::Scsi, (0, 0), "6000c29a")], "wwn-0x6000c29a-part2"));
        let second = [disk(Bus::Scsi, (0, 1), "")];
        assert_eq!(find(&second, "pci-0000:00:10.0-scsi-0:0:0:0"), None);
        // Kernels of old showed SATA as SCSI.
        let sata = [disk(Bus::Sata, (0, 0), "")];
        assert_eq!(find(&sata, "pci-0000:00:1f.2-scsi-0:0:0:0"), Some((0, None)));
        let physical = [DiskFacts { complete: true, ..disk(Bus::Sata, (0, 0), "ata-WD_1") }];
        assert_eq!(find(&physical, "ata-WD_1-part1"), Some((0, Some(1))));
        assert_eq!(find(&physical, "ata-WD_2-part1"), None);
    }

    #[test]
    fn ways_lead_to_units() {
        let disks = [
            disk(Bus::Scsi, (0, 0), ""),
            disk(Bus::Scsi, (0, 1), ""),
            disk(Bus::Scsi, (1, 2), ""),
            disk(Bus::Sata, (0, 1), ""),
            disk(Bus::Ide, (0, 0), ""),
            disk(Bus::Nvme, (0, 1), ""),
        ];
        for (link, found) in [
            ("pci-0000:03:00.0-scsi-0:0:1:0-part1", Some((1, Some(1)))),
            ("pci-0000:00:10.0-scsi-0:0:2:0", Some((2, None))),
            ("pci-0000:00:10.0-scsi-0:0:9:0", None),
            ("pci-0000:00:10.0-scsi-0:1:1:0", None),
            ("pci-0000:02:05.0-ata-2", Some((3, None))),
            ("pci-0000:02:05.0-ata-2.0-part5", Some((3, Some(5)))),
            ("pci-0000:00:07.1-ata-1", Some((4, None))),
            ("pci-0000:00:07.1-ata-1.1", None),
            ("pci-0000:0b:00.0-nvme-2", Some((5, None))),
            ("pci-0000:0b:00.0-usb-0:1:1.0-scsi-x", None),
        ] {
            assert_eq!(find(&disks, link), found, "{link}");
        }
        // The first disk of two controllers: the address on the PCI bus is not in the description.
        let two = [disk(Bus::Scsi, (0, 0), ""), disk(Bus::Scsi, (1, 0), "")];
        assert_eq!(find(&two, "pci-0000:03:00.0-scsi-0:0:0:0"), None);
        let lun = [disk(Bus::VirtioScsi, (0, 0), ""), disk(Bus::VirtioScsi, (0, 3), "")];
        assert_eq!(find(&lun, "pci-0000:00:05.0-scsi-0:0:0:3"), Some((1, None)));
    }

    #[test]
    fn numbers_of_xen() {
        let names = ["xvda", "xvdb", "xvdq"]
            .map(|name| DiskFacts { name: Some(name.to_owned()), ..DiskFacts::default() });
        assert_eq!(find(&names, "xen-vbd-51712-part1"), Some((0, Some(1))));
        assert_eq!(find(&names, "xen-vbd-51728"), Some((1, None)));
        assert_eq!(find(&names, "xen-vbd-268439552"), Some((2, None)));
        assert_eq!(find(&names, "xen-vbd-768"), None);
    }
}
