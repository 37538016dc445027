//! A physical machine as a source: what it is made of, what of its disks is in use, and copying them.
//!
//! ```text
//!   /sys /proc /dev (or a tree that looks like them)
//!        |  describe                     disks, processors, memory, firmware, network cards, clock
//!        v
//!      Found  -- Guest ------------->    machine.json, which `vimg v2v` takes as a source
//!        |
//!        v  copy                         in segments with digests, so that it can be interrupted and go on
//!   images, exports of `vimg serve`
//! ```
//!
//! Nothing here is changed on the machine, and nothing needs root but reading the disks.

pub mod copy;
mod disks;
pub mod gate;
mod hardware;
pub mod lvm;
pub mod moment;
mod mounts;
mod network;
pub mod offer;
pub mod patched;
pub mod receive;
pub mod snapshot;
pub mod state;
pub mod store;
#[cfg(test)]
mod tests;
mod tree;

use std::path::{Path, PathBuf};

use guestdisk::{Location, Volume};
use serde_json::{Value, json};

use crate::guest::{Bus, Disk, DiskImage, Guest, Removable, RemovableKind, document};
use tree::Tree;

/// What was found of a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The machine. Its disks are those of [`disks`](Self::disks), in that order.
    pub guest: Guest,
    /// Its disks.
    pub disks: Vec<PhysicalDisk>,
    /// Block devices that are none of its disks: the name, and why.
    pub left_out: Vec<(String, String)>,
}

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhysicalDisk {
    /// The kernel's name (`sda`, `nvme0n1`).
    pub name: String,
    /// Its device file.
    pub device: PathBuf,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Maker and model.
    pub model: String,
    /// Its serial number.
    pub serial: Option<String>,
    /// Its names under `/dev/disk/by-id`, sorted.
    pub by_id: Vec<String>,
    /// Its links in `/dev/disk/by-path`.
    pub by_path: Vec<String>,
    /// What it is attached to.
    pub bus: Option<Bus>,
    /// It has platters.
    pub rotational: bool,
    /// File systems on it that are mounted.
    pub mounts: Vec<Mounted>,
}

/// A file system that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// The device that is mounted, by the kernel's name (`sda1`, `dm-0`).
    pub device: String,
    /// The name of a device-mapper's device (`vg-root`).
    pub mapper: Option<String>,
    /// The UUID, without hyphens, of the logical volume that it is, or that is all of what it is made of.
    pub logical: Option<String>,
    /// Numbers of the partitions of the disk that it lies on; empty: the disk as a whole.
    pub partitions: Vec<u32>,
    /// Where.
    pub path: PathBuf,
    /// The file system's type.
    pub kind: String,
    /// It can be written to.
    pub writable: bool,
}

/// Looks at the machine whose `/` is `root`: the one that we run on, or a tree that looks like one. What cannot be found
/// out is left out.
pub fn describe(root: &Path) -> Found {
    let tree = Tree::new(root);
    let mounts = mounts::all(&tree);
    let live = mounts::live_medium(&tree, &mounts);
    let (disks, left_out) = disks::all(&tree, &mounts, &live);
    let mut guest = Guest {
        disks: disks
            .iter()
            .map(|disk| described(disk, &disk.device.to_string_lossy(), Some("raw")))
            .collect(),
        removables: drives(&tree),
        ..hardware::machine(&tree, live.is_rescue)
    };
    guest.nics = network::cards(&tree, &mut guest.notes);
    Found { guest, disks, left_out }
}

/// A disk in the description, whose bytes are in `name`.
fn described(disk: &PhysicalDisk, name: &str, format: Option<&str>) -> Disk {
    Disk {
        bus: disk.bus,
        guest_name: Some(disk.name.clone()),
        serial: disk.serial.clone(),
        identities: disk.by_id.iter().chain(&disk.by_path).cloned().collect(),
        capacity_bytes: Some(disk.size_bytes),
        ..Disk::new(
            format!("/dev/{}", disk.name.replace('!', "/")),
            DiskImage::Name { name: name.to_owned(), format: format.map(str::to_owned) },
        )
    }
}

fn drives(tree: &Tree<'_>) -> Vec<Removable> {
    let names = tree.names("sys/block");
    let of = |prefix: &str| names.iter().filter(|name| numbered(name, prefix)).count();
    let drive = |kind, bus| Removable { kind, bus, medium: None };
    let cdroms = std::iter::repeat_n(drive(RemovableKind::Cdrom, Some(Bus::Sata)), of("sr"));
    let floppies = std::iter::repeat_n(drive(RemovableKind::Floppy, Some(Bus::Floppy)), of("fd"));
    cdroms.chain(floppies).collect()
}

/// `PREFIX` and a number.
fn numbered(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix)
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Found {
    /// The disks that the user wants: by name, by device file, or all if none is named.
    ///
    /// # Errors
    /// `NotFound`: there is no such disk, or it was left out, with the reason.
    pub fn select(&self, wanted: &[String]) -> block::Result<Vec<&PhysicalDisk>> {
        if wanted.is_empty() {
            return Ok(self.disks.iter().collect());
        }
        let find = |name: &String| {
            let short = name.strip_prefix("/dev/").unwrap_or(name);
            let known = |disk: &&PhysicalDisk| {
                disk.name == short
                    || disk.name.replace('!', "/") == short
                    || short
                        .strip_prefix("disk/by-id/")
                        .is_some_and(|id| disk.by_id.iter().any(|own| own == id))
            };
            self.disks.iter().find(known).ok_or_else(|| self.missing(short))
        };
        let mut found: Vec<&PhysicalDisk> = vec![];
        for name in wanted {
            let disk = find(name)?;
            if found.iter().any(|other| other.name == disk.name) {
                return Err(block::Error::usage(format!("the disk '{}' is given twice", disk.name)));
            }
            found.push(disk);
        }
        Ok(found)
    }

    fn missing(&self, name: &str) -> block::Error {
        let message = match self.left_out.iter().find(|(other, _)| other == name) {
            Some((_, reason)) => format!("'{name}' is no disk of the machine: {reason}"),
            None => format!("the machine has no disk '{name}'"),
        };
        let error = block::Error::new(block::ErrorKind::NotFound, message);
        let names: Vec<&str> = self.disks.iter().map(|disk| disk.name.as_str()).collect();
        if names.is_empty() { error } else { error.hint(format!("Its disks: {}.", names.join(", "))) }
    }

    /// The description for the receiving end: the machine with these disks, each with the name and format of its image.
    pub fn machine(&self, disks: &[(&PhysicalDisk, String, &str)]) -> Guest {
        let disks = disks.iter().map(|(disk, name, format)| described(disk, name, Some(format)));
        Guest { disks: disks.collect(), ..self.guest.clone() }
    }

    /// Everything as JSON.
    pub fn document(&self) -> Value {
        let disks: Vec<Value> = self.disks.iter().map(PhysicalDisk::document).collect();
        let left_out: Vec<Value> =
            self.left_out.iter().map(|(name, reason)| json!({"name": name, "reason": reason})).collect();
        json!({"machine": document(&self.guest), "disks": disks, "left-out": left_out})
    }
}

impl PhysicalDisk {
    /// Its name without anything that has a meaning in names of files.
    pub fn plain_name(&self) -> String {
        self.name.replace('!', "_")
    }

    fn document(&self) -> Value {
        let mounts: Vec<Value> = self
            .mounts
            .iter()
            .map(|mounted| {
                json!({
                    "device": mounted.device,
                    "path": mounted.path.to_string_lossy(),
                    "type": mounted.kind,
                    "writable": mounted.writable,
                })
            })
            .collect();
        json!({
            "name": self.name,
            "device": self.device.to_string_lossy(),
            "size-bytes": self.size_bytes,
            "model": self.model,
            "serial": self.serial,
            "by-id": self.by_id,
            "bus": self.bus.map(Bus::name),
            "rotational": self.rotational,
            "mounts": mounts,
        })
    }

    /// File systems on it that can be written to while it is copied.
    pub fn written(&self) -> impl Iterator<Item = &Mounted> {
        self.mounts.iter().filter(|mounted| mounted.writable)
    }
}

/// How much has been written to a device (`sda1`) since the machine was started: sectors written and discarded, and requests
/// for that (kernel documentation, "block/stat"). `None` if the kernel does not tell.
pub fn written(root: &Path, device: &str) -> Option<u64> {
    let tree = Tree::new(root);
    let parts = |disk: String| format!("sys/block/{disk}/{device}/stat");
    let places = [format!("sys/class/block/{device}/stat"), format!("sys/block/{device}/stat")];
    let places = places.into_iter().chain(tree.names("sys/block").into_iter().map(parts));
    let text = places.into_iter().find_map(|place| tree.text(&place))?;
    let fields: Vec<u64> = text.split_ascii_whitespace().filter_map(|field| field.parse().ok()).collect();
    // Newer kernels count discards behind the first eleven.
    [4, 6].into_iter().map(|at| fields.get(at).copied()).sum::<Option<u64>>().map(|sum| {
        [11, 13].into_iter().filter_map(|at| fields.get(at)).fold(sum, |sum, more| sum.wrapping_add(*more))
    })
}

/// Whether nobody writes to a volume of some disks, `disks[N]` being the disk N of `volume`. File systems mounted at `frozen`
/// are at rest.
pub fn is_at_rest(volume: &Volume, disks: &[&PhysicalDisk], frozen: &[PathBuf]) -> bool {
    let written = |(index, disk): (usize, &&PhysicalDisk)| {
        let concerns = |mounted: &Mounted| concerns(&volume.location, index, mounted);
        disk.written().any(|mounted| concerns(mounted) && !frozen.contains(&mounted.path))
    };
    !disks.iter().enumerate().any(written)
}

/// Whether what is mounted lies on a volume.
fn concerns(location: &Location, disk: usize, mounted: &Mounted) -> bool {
    match location {
        Location::Whole { disk: own } => *own == disk,
        Location::Partition { disk: own, number } => {
            *own == disk && (mounted.partitions.is_empty() || mounted.partitions.contains(number))
        }
        // Which array by which number cannot be told for certain: none is written to while any is.
        Location::Array { .. } => mounted.mapper.is_some() || mounted.device.starts_with("md"),
        Location::Logical { group, name } => {
            let mapper = guestdisk::lvm::mapper_name(group, name);
            // What is mounted is somebody else's, unless it is a volume of LVM.
            mounted.mapper.as_ref().is_some_and(|own| *own == mapper)
        }
        Location::Decrypted { outer } => concerns(outer, disk, mounted),
    }
}
