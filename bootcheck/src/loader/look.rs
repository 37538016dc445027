//! What a disk has for firmwares, and where on it lies what tells how far a boot has come.
//!
//! Where a file lies is found out by reading it through a device that notes every read: that holds for every file system
//! and for LVM, and asks nothing of them.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use block::{BlockDevice, Result};
use guestdisk::boot::firmware::{self, Facts, Firmware};
use guestdisk::boot::{self, Boot, BootFile, Entry, Loader};
use guestdisk::partition::{PartitionType, Scheme, Table};
use guestdisk::{Disks, Keys, Location};

use crate::counted::Counted;
use crate::engine::{Observer, ReadWatch};
use crate::trace::{Landmark, Part};

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// A kernel, or an initramfs image, is not larger than this.
const MAX_FILE: u64 = 256 << 20;
/// A read of at least so many sectors is one of data, and not of what describes where they lie.
const DATA_SECTORS: u64 = 64;
/// The gap behind a boot sector ends here at the latest: at 1 MiB, where partitions begin.
const GAP_END: u64 = 2048;

/// What has been found on the disks of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looked {
    /// What there is for firmwares.
    pub facts: Facts,
    /// Places that tell something under either firmware.
    common: Vec<Landmark>,
    /// Places that only a BIOS's loader reads.
    bios: Vec<Landmark>,
    /// Places that only UEFI reads before a kernel runs.
    uefi: Vec<Landmark>,
}

impl Looked {
    /// The landmarks for a boot through this firmware.
    pub fn landmarks(&self, firmware: Firmware) -> Vec<Landmark> {
        let own = match firmware {
            Firmware::Bios => &self.bios,
            Firmware::Uefi => &self.uefi,
        };
        own.iter().chain(&self.common).cloned().collect()
    }
}

/// Looks at the disks of a guest.
///
/// # Errors
/// A device failed; what [`Disks::open_with`] says of keys.
pub fn look(devices: &[Arc<dyn BlockDevice>], keys: &Keys) -> Result<Looked> {
    let notes = Arc::new(Notes::default());
    let noted = |(index, device): (usize, &Arc<dyn BlockDevice>)| {
        let reads = ReadWatch::new(Arc::clone(&notes) as _, index);
        Arc::new(Counted::new(Arc::clone(device)).watched_by(reads)) as Arc<dyn BlockDevice>
    };
    let disks = Disks::open_with(devices.iter().enumerate().map(noted).collect(), keys)?;
    let mut looked = Looked { facts: firmware::facts(&disks)?, common: vec![], bios: vec![], uefi: vec![] };
    looked.boot_sectors(&disks);
    let boot = boot::entries(&disks);
    if let Ok(entry) = boot.default_entry() {
        looked.common.extend(kernel_and_root(&disks, &boot, entry, &notes));
    }
    Ok(looked)
}

impl Looked {
    fn boot_sectors(&mut self, disks: &Disks) {
        let Some(disk) = disks.disks().first() else { return };
        self.common.push(mark(Part::BootSector, "sector 0", 0, vec![(0, 1)]));
        if let Some(table) = &disk.table {
            self.bios = second_stages(table, &self.facts);
            self.uefi.extend(self.facts.efi.iter().filter_map(|partition| {
                let place = ranges(table, &partition.location)?;
                Some(mark(Part::EfiPartition, &partition.location.to_string(), 0, vec![place]))
            }));
        }
    }
}

fn mark(part: Part, name: &str, disk: usize, sectors: Vec<(u64, u64)>) -> Landmark {
    Landmark { part, name: name.to_owned(), disk, sectors, by_firmware: false }
}

/// Where a partition lies, in sectors.
fn ranges(table: &Table, location: &Location) -> Option<(u64, u64)> {
    let Location::Partition { number, .. } = location else { return None };
    let partition = table.partition(*number).ok()?;
    Some((partition.offset / SECTOR, partition.len / SECTOR))
}

/// What the code in sector 0 goes on with.
fn second_stages(table: &Table, facts: &Facts) -> Vec<Landmark> {
    let mut marks = vec![];
    if table.scheme == Scheme::Mbr {
        let first = table.partitions.iter().map(|partition| partition.offset / SECTOR).min();
        let end = first.unwrap_or(GAP_END).min(GAP_END);
        if end > 1 {
            marks.push(mark(Part::SecondStage, "the gap behind sector 0", 0, vec![(1, end - 1)]));
        }
    }
    let partition = |number: u32| table.partitions.iter().find(|partition| partition.number == number);
    if let Some(found) = facts.bios_boot.and_then(partition) {
        let place = (found.offset / SECTOR, found.len / SECTOR);
        marks.push(mark(Part::SecondStage, &format!("BIOS boot partition {}", found.number), 0, vec![place]));
    }
    if let Some(found) = facts.active.and_then(|(number, _)| partition(number))
        && facts.boot_code.is_code()
    {
        let name = format!("active partition {}", found.number);
        marks.push(mark(Part::SecondStage, &name, 0, vec![(found.offset / SECTOR, 1)]));
    }
    marks
}

/// Where the entry's files lie that would be started without anybody's doing, and its root file system.
fn kernel_and_root(disks: &Disks, boot: &Boot, entry: &Entry, notes: &Notes) -> Vec<Landmark> {
    let mut marks = file(Part::Kernel, boot, &entry.kernel, notes);
    for initrd in &entry.initrds {
        marks.extend(file(Part::Initrd, boot, initrd, notes));
    }
    // A unified kernel image may be started by the firmware itself, which reads it then.
    let by_firmware = entry.loader == Loader::UnifiedKernel;
    marks.iter_mut().for_each(|mark| mark.by_firmware = by_firmware);
    marks.extend(root(disks, &entry.cmdline));
    marks
}

/// A file, by reading it. What cannot be read is no landmark.
fn file(part: Part, boot: &Boot, file: &BootFile, notes: &Notes) -> Vec<Landmark> {
    notes.0.lock().clear();
    let Ok(bytes) = boot.read(file, MAX_FILE) else { return vec![] };
    let reads = std::mem::take(&mut *notes.0.lock());
    let data: Vec<_> = reads.iter().filter(|(_, _, sectors)| *sectors >= DATA_SECTORS).copied().collect();
    let len = data.iter().map(|(_, _, sectors)| sectors * SECTOR).sum::<u64>();
    // Small or scattered files are read like everything else.
    let reads = if len >= bytes.len() as u64 / 2 { data } else { reads };
    let disks = reads.iter().map(|(disk, ..)| *disk).max().map_or(0, |last| last + 1);
    (0..disks)
        .map(|disk| {
            let of = reads.iter().filter(|(of, ..)| *of == disk);
            mark(part, &file.to_string(), disk, of.map(|(_, sector, sectors)| (*sector, *sectors)).collect())
        })
        .filter(|mark| !mark.sectors.is_empty())
        .collect()
}

/// The volume that a command line names as root; of LVM, all physical volumes, of an array, all members.
fn root(disks: &Disks, cmdline: &str) -> Vec<Landmark> {
    let Some(name) = cmdline.split_whitespace().find_map(|word| word.strip_prefix("root=")) else {
        return vec![];
    };
    let Ok(volume) = disks.find(name) else { return vec![] };
    let of_disk = |(disk, found): (usize, &guestdisk::Disk)| {
        let table = found.table.as_ref()?;
        let places: Vec<_> = match &volume.location {
            Location::Partition { disk: of, .. } if *of == disk => {
                ranges(table, &volume.location).into_iter().collect()
            }
            Location::Logical { .. } | Location::Array { .. } => table
                .partitions
                .iter()
                .filter(|partition| is_shared(partition.kind))
                .map(|partition| (partition.offset / SECTOR, partition.len / SECTOR))
                .collect(),
            _ => vec![],
        };
        (!places.is_empty()).then(|| mark(Part::Root, &volume.location.to_string(), disk, places))
    };
    disks.disks().iter().enumerate().filter_map(of_disk).collect()
}

/// Whether what lies on such a partition may be part of something larger.
fn is_shared(kind: PartitionType) -> bool {
    matches!(kind.name(), Some("Linux LVM" | "Linux RAID" | "Linux RAID autodetect"))
}

/// Notes what is read: disk, sector, sectors.
#[derive(Default)]
struct Notes(Mutex<Vec<(usize, u64, u64)>>);

impl Observer for Notes {
    fn console(&self, _bytes: &[u8], _at: Instant) {}

    fn disk_read(&self, disk: usize, sector: u64, sectors: u64, _at: Instant) {
        self.0.lock().push((disk, sector, sectors));
    }
}
