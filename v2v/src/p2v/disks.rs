//! The disks of the machine (kernel documentation, "sysfs-block").

use super::mounts::{Live, Mount};
use super::tree::Tree;
use super::{Mounted, PhysicalDisk};
use crate::guest::Bus;

/// The kernel counts in sectors of 512 bytes, whatever the disk's own are.
const SECTOR: u64 = 512;

/// What is no disk of the machine, by the beginning of its name.
const NO_DISKS: [(&str, &str); 13] = [
    ("loop", "a file shown as a disk"),
    ("ram", "memory"),
    ("zram", "compressed memory"),
    ("dm-", "made of other devices by the device mapper"),
    ("md", "made of other devices by software RAID"),
    ("sr", "a CD-ROM drive"),
    ("fd", "a floppy drive"),
    ("nbd", "a disk of another machine"),
    ("rbd", "a disk of another machine"),
    ("drbd", "made of other devices by DRBD"),
    ("bcache", "made of other devices by bcache"),
    ("zd", "made of other devices by ZFS"),
    ("mtdblock", "flash memory of the board"),
];
/// What is one.
const DISKS: [(&str, Option<Bus>); 8] = [
    ("sd", None),
    ("hd", Some(Bus::Ide)),
    ("vd", Some(Bus::Virtio)),
    ("xvd", Some(Bus::Xen)),
    ("nvme", Some(Bus::Nvme)),
    ("mmcblk", None),
    ("cciss!", Some(Bus::Scsi)),
    ("ida!", Some(Bus::Scsi)),
];

type LeftOut = Vec<(String, String)>;

/// All disks, and what was left out for which reason.
pub(super) fn all(tree: &Tree<'_>, mounts: &[Mount], live: &Live) -> (Vec<PhysicalDisk>, LeftOut) {
    let (mut disks, mut left_out) = (vec![], vec![]);
    for name in tree.names("sys/block") {
        match disk(tree, &name, mounts, live) {
            Ok(disk) => disks.push(disk),
            Err(reason) => left_out.push((name, reason)),
        }
    }
    (disks, left_out)
}

fn disk(tree: &Tree<'_>, name: &str, mounts: &[Mount], live: &Live) -> Result<PhysicalDisk, String> {
    if let Some((_, reason)) = NO_DISKS.iter().find(|(prefix, _)| is_of(name, prefix)) {
        return Err((*reason).to_owned());
    }
    let known = DISKS.iter().find(|(prefix, _)| name.starts_with(prefix));
    let Some((_, bus)) = known else { return Err("not a kind of disk that is known".to_owned()) };
    let file = |file: &str| format!("sys/block/{name}/{file}");
    if tree.number(&file("hidden")) == Some(1) {
        return Err("one of several paths to a disk".to_owned());
    }
    if name.starts_with("mmcblk") && (name.contains("boot") || name.contains("rpmb")) {
        return Err("a part of a flash card that is none of its contents".to_owned());
    }
    let size_bytes = tree.number(&file("size")).and_then(|sectors| sectors.checked_mul(SECTOR));
    let Some(size_bytes) = size_bytes.filter(|bytes| *bytes > 0) else {
        return Err("there is no medium in it".to_owned());
    };
    if live.disks.iter().any(|own| own == name) {
        return Err("the rescue system that is running was started from it".to_owned());
    }
    let text = |path: &str| tree.text(&file(path));
    let model = [text("device/vendor").filter(|vendor| vendor != "ATA"), text("device/model")];
    Ok(PhysicalDisk {
        name: name.to_owned(),
        device: tree.path("dev").join(name.replace('!', "/")),
        size_bytes,
        model: model.into_iter().flatten().collect::<Vec<_>>().join(" "),
        serial: serial(tree, name),
        by_id: links(tree, name, "by-id"),
        by_path: links(tree, name, "by-path"),
        bus: bus.or_else(|| by_place(&tree.link(&format!("sys/block/{name}")))),
        rotational: tree.number(&file("queue/rotational")) == Some(1),
        mounts: mounts.iter().filter_map(|mount| mounted(tree, name, mount)).collect(),
    })
}

/// Whether a name is the prefix with a number (`md0`), or in parts (`md127`, `md_d0`); `fd` is not `fd-something`.
fn is_of(name: &str, prefix: &str) -> bool {
    let rest = name.strip_prefix(prefix);
    rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit() || c == '_'))
}

/// The bus, by where the disk is in the tree of devices.
fn by_place(place: &str) -> Option<Bus> {
    let has = |word: &str| place.contains(word);
    match () {
        () if has("/usb") => Some(Bus::Usb),
        () if has("/virtio") => Some(Bus::VirtioScsi),
        () if has("/ata") => Some(Bus::Sata),
        () if has("/host") => Some(Bus::Scsi),
        () => None,
    }
}

fn serial(tree: &Tree<'_>, name: &str) -> Option<String> {
    let plain = ["device/serial", "serial"]
        .into_iter()
        .find_map(|file| tree.text(&format!("sys/block/{name}/{file}")));
    // SCSI's page of vital product data 0x80: four bytes, then the number (SPC-4, 7.8.15).
    let page = || {
        let bytes = tree.bytes(&format!("sys/block/{name}/device/vpd_pg80"))?;
        let text = String::from_utf8_lossy(bytes.get(4..)?)
            .trim_matches(|c: char| c.is_whitespace() || c == '\0')
            .to_owned();
        (!text.is_empty()).then_some(text)
    };
    plain.or_else(page)
}

/// The links of udev that lead to a disk itself.
fn links(tree: &Tree<'_>, name: &str, folder: &str) -> Vec<String> {
    let folder = format!("dev/disk/{folder}");
    let is_own = |id: &String| tree.link_name(&format!("{folder}/{id}")).is_some_and(|target| target == name);
    tree.names(&folder).into_iter().filter(is_own).collect()
}

/// What of a disk is mounted there.
fn mounted(tree: &Tree<'_>, disk: &str, mount: &Mount) -> Option<Mounted> {
    let mine: Vec<Option<u32>> = leaves(tree, &mount.device, 0)
        .into_iter()
        .filter_map(|leaf| match leaf {
            leaf if leaf == disk => Some(None),
            leaf => tree
                .number(&format!("sys/block/{disk}/{leaf}/partition"))
                .and_then(|n| u32::try_from(n).ok())
                .map(Some),
        })
        .collect();
    if mine.is_empty() {
        return None;
    }
    Some(Mounted {
        device: mount.device.clone(),
        mapper: tree.text(&format!("sys/block/{}/dm/name", mount.device)),
        logical: logical(tree, &mount.device),
        // The disk as a whole, if that is among them.
        partitions: mine.into_iter().collect::<Option<Vec<u32>>>().unwrap_or_default(),
        path: mount.path.clone(),
        kind: mount.kind.clone(),
        writable: mount.writable,
    })
}

/// The UUID of the logical volume that a device is, or the one device that it lies on is (encryption over LVM). The device
/// mapper's UUIDs of LVM's volumes are `LVM-` with the group's and the volume's, 32 characters each; those of parts that LVM
/// keeps for itself are longer.
fn logical(tree: &Tree<'_>, device: &str) -> Option<String> {
    /// Deeper than anybody stacks devices.
    const MOST: usize = 16;
    let mut device = device.to_owned();
    for _ in 0..MOST {
        let uuid = tree.text(&format!("sys/block/{device}/dm/uuid")).unwrap_or_default();
        if let Some(both) = uuid.strip_prefix("LVM-") {
            return both.get(32..).filter(|own| both.len() == 64 && own.is_ascii()).map(str::to_owned);
        }
        let [below]: [String; 1] = tree.names(&format!("sys/block/{device}/slaves")).try_into().ok()?;
        device = below;
    }
    None
}

/// The disks and partitions that a device is made of.
pub(super) fn leaves(tree: &Tree<'_>, device: &str, depth: usize) -> Vec<String> {
    /// Deeper than anybody stacks devices.
    const MOST: usize = 16;
    let slaves = tree.names(&format!("sys/block/{device}/slaves"));
    if slaves.is_empty() || depth > MOST {
        return vec![device.to_owned()];
    }
    slaves.iter().flat_map(|slave| leaves(tree, slave, depth + 1)).collect()
}

/// The disk that a device lies on: itself, or the one that it is a partition of.
pub(super) fn disk_of(tree: &Tree<'_>, device: &str) -> Option<String> {
    tree.names("sys/block")
        .into_iter()
        .find(|disk| disk == device || tree.exists(&format!("sys/block/{disk}/{device}/partition")))
}
