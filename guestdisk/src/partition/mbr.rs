//! The master boot record and the chains of extended partitions.
//!
//! There is no specification but UEFI 2.10, section 5.2.1, for the first sector; the chains are as DOS left them. Each
//! sector of a chain is again a table: one entry is a partition, counted from that sector, another the next sector of
//! the chain, counted from the start of the outermost extended partition.

use std::collections::HashSet;

use block::{BlockDevice, Result};

use super::{Partition, PartitionType, Role, Scheme, Table, clip};
use crate::bytes::{self, byte, le16, le32};

/// MBRs count in these, whatever the disk's own sectors are: images have no other.
const SECTOR: u64 = 512;
/// As many partitions as Linux knows on one disk.
const MOST_PARTITIONS: usize = 256;

/// One of the four entries.
#[derive(Debug, Clone, Copy)]
struct Entry {
    status: u8,
    kind: u8,
    start_sectors: u64,
    len_sectors: u64,
}

impl Entry {
    fn parse(sector: &[u8], index: usize) -> Self {
        let at = 446 + 16 * index;
        Self {
            status: byte(sector, at),
            kind: byte(sector, at + 4),
            start_sectors: le32(sector, at + 8).into(),
            len_sectors: le32(sector, at + 12).into(),
        }
    }

    fn is_used(&self) -> bool {
        self.kind != 0 && self.len_sectors != 0
    }

    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// A sector that ends with the signature of a boot record.
#[derive(Debug)]
pub(super) struct Mbr {
    signature: u32,
    entries: [Entry; 4],
    /// The sector begins as a FAT or NTFS does, so that its "entries" may be code.
    has_parameter_block: bool,
}

impl Mbr {
    /// `None` if the signature is missing.
    pub(super) fn parse(sector: &[u8]) -> Option<Self> {
        (sector.len() == 512 && le16(sector, 510) == 0xaa55).then(|| Self {
            signature: le32(sector, 440),
            entries: std::array::from_fn(|index| Entry::parse(sector, index)),
            has_parameter_block: begins_as_file_system(sector),
        })
    }

    /// Whether one of the entries stands for a GPT.
    pub(super) fn announces_gpt(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind == 0xee && entry.start_sectors != 0)
            && self.entries.iter().all(|entry| entry.status & 0x7f == 0)
    }

    /// Whether this is a table and not the boot sector of a file system: Linux looks at the status bytes, and so do we.
    pub(super) fn is_plausible(&self, disk: u64) -> bool {
        let used = || self.entries.iter().filter(|entry| entry.is_used());
        self.entries.iter().all(|entry| entry.status & 0x7f == 0)
            && (!self.has_parameter_block
                || used().count() > 0
                    && used().all(|entry| entry.start_sectors != 0 && entry.start_sectors * SECTOR < disk))
    }
}

/// A jump, and a sector size where FAT and NTFS have it.
fn begins_as_file_system(sector: &[u8]) -> bool {
    matches!(byte(sector, 0), 0xeb | 0xe9)
        && matches!(le16(sector, 11), 512 | 1024 | 2048 | 4096)
        && byte(sector, 13).is_power_of_two()
        && (byte(sector, 21) >= 0xf8 || byte(sector, 21) == 0xf0)
}

/// Reads the table that begins with `mbr`.
pub(super) fn read(device: &dyn BlockDevice, mbr: &Mbr) -> Result<Table> {
    let uuid = if mbr.signature == 0 { String::new() } else { format!("{:08x}", mbr.signature) };
    let table = Table {
        scheme: Scheme::Mbr,
        sector_bytes: 512,
        uuid,
        extent: 0,
        partitions: vec![],
        problems: vec![],
    };
    let mut reader = Reader { device, table };
    for (number, entry) in (1..).zip(&mbr.entries).filter(|(_, entry)| entry.is_used()) {
        let role = if entry.is_extended() { Role::Extended } else { Role::Primary };
        reader.add(number, entry, entry.start_sectors, role);
    }
    let mut number = 5;
    for entry in mbr.entries.iter().filter(|entry| entry.is_used() && entry.is_extended()) {
        number = reader.chain(entry, number)?;
    }
    Ok(reader.table)
}

struct Reader<'a> {
    device: &'a dyn BlockDevice,
    table: Table,
}

impl Reader<'_> {
    /// Adds a partition that begins at `start` of the disk, in sectors.
    fn add(&mut self, number: u32, entry: &Entry, start: u64, role: Role) {
        let (offset, len) = (start * SECTOR, entry.len_sectors * SECTOR);
        self.table.extent = self.table.extent.max(offset + len);
        let Some(len) = clip(number, offset, len, self.device.size(), &mut self.table.problems) else {
            return;
        };
        let disk = &self.table.uuid;
        self.table.partitions.push(Partition {
            number,
            offset,
            len,
            kind: PartitionType::Mbr(entry.kind),
            name: String::new(),
            flags: entry.status.into(),
            uuid: if disk.is_empty() { String::new() } else { format!("{disk}-{number:02x}") },
            role,
        });
    }

    /// Adds the logical partitions of an extended one, the first with this number. Returns the next number.
    fn chain(&mut self, extended: &Entry, mut number: u32) -> Result<u32> {
        let first = extended.start_sectors;
        let (mut here, mut seen) = (first, HashSet::new());
        while self.table.partitions.len() < MOST_PARTITIONS {
            if !seen.insert(here) || seen.len() > MOST_PARTITIONS {
                self.problem(format!("the chain of logical partitions runs in a circle at sector {here}"));
                break;
            }
            let sector = bytes::read_some(self.device, here * SECTOR, 512)?;
            let Some(ebr) = Mbr::parse(&sector) else {
                self.problem(format!("the chain of logical partitions is broken at sector {here}"));
                break;
            };
            for entry in ebr.logical(here, extended) {
                self.add(number, entry, here + entry.start_sectors, Role::Logical);
                number += 1;
            }
            let Some(next) = ebr.entries.iter().find(|entry| entry.is_used() && entry.is_extended()) else {
                break;
            };
            here = first + next.start_sectors;
        }
        Ok(number)
    }

    fn problem(&mut self, problem: String) {
        self.table.problems.push(problem);
    }
}

impl Mbr {
    /// The entries of a chain's sector that are partitions. The last two count only where they lie inside the extended
    /// partition, as Linux has it: some tools have left rubbish there.
    fn logical(&self, here: u64, extended: &Entry) -> impl Iterator<Item = &Entry> {
        let (first, end) = (extended.start_sectors, extended.start_sectors + extended.len_sectors);
        let used =
            self.entries.iter().enumerate().filter(|(_, entry)| entry.is_used() && !entry.is_extended());
        let inside = move |entry: &Entry| {
            let start = here + entry.start_sectors;
            start >= first && start + entry.len_sectors <= end
        };
        used.filter(move |(index, entry)| *index < 2 || inside(entry)).map(|(_, entry)| entry)
    }
}
