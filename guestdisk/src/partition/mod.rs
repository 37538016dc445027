//! Partition tables: MBR with its extended partitions, and GPT.
//!
//! ```text
//!   sector 0          1            2 ..  33        34 ..                        -33 ..  -2        -1
//!   +-----+      +---------+   +-----------+   +----------------- .. ---+   +-----------+   +---------+
//!   | MBR |      | primary |   | partition |   | partitions             |   | copy of   |   | backup  |
//!   |     |      | header  |   | entries   |   |                        |   | entries   |   | header  |
//!   +-----+      +---------+   +-----------+   +----------------- .. ---+   +-----------+   +---------+
//! ```
//!
//! What counts is what Linux would show, under the numbers it would use: an MBR with a partition of type 0xee says that
//! there is a GPT (also where it has others besides, a hybrid), and logical partitions are numbered from 5 in the order
//! of their chain. A partition that reaches past the end of the disk is cut off there, one that lies past it is left
//! out; [`Table::problems`] tells of both, and of a damaged GPT whose backup was used.

mod gpt;
mod mbr;
mod types;

use std::sync::Arc;

use block::slice::Slice;
use block::{BlockDevice, Error, ErrorKind, Result};

use crate::bytes;

pub use types::PartitionType;

/// How a disk is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Four entries in the first sector, and chains of further ones.
    Mbr,
    /// The GUID Partition Table of UEFI.
    Gpt,
}

impl Scheme {
    /// The word that `sfdisk` and `blkid` have for it: `dos` or `gpt`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mbr => "dos",
            Self::Gpt => "gpt",
        }
    }
}

/// What a partition is in its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// One of the table's own.
    Primary,
    /// A container of logical partitions; holds no data itself.
    Extended,
    /// One of a chain inside an extended partition.
    Logical,
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// The number that Linux gives it.
    pub number: u32,
    /// Where it begins on the disk, in bytes.
    pub offset: u64,
    /// Its length in bytes, cut off at the end of the disk.
    pub len: u64,
    /// What it is said to be for.
    pub kind: PartitionType,
    /// Its name; empty in an MBR.
    pub name: String,
    /// GPT: the attributes (UEFI 2.10, 5.3.3). MBR: the status byte, 0x80 for the active one.
    pub flags: u64,
    /// Its PARTUUID as Linux knows it: the GUID, or disk signature and number for an MBR. Empty if the disk has no
    /// signature.
    pub uuid: String,
    /// Primary, extended or logical.
    pub role: Role,
}

impl Partition {
    /// Whether a BIOS would boot from it (MBR: active; GPT: legacy BIOS bootable).
    pub fn bootable(&self) -> bool {
        match self.kind {
            PartitionType::Mbr(_) => self.flags & 0x80 != 0,
            PartitionType::Gpt(_) => self.flags & 4 != 0,
        }
    }

    /// Whether it is the EFI System Partition.
    pub fn is_efi_system(&self) -> bool {
        match self.kind {
            PartitionType::Mbr(kind) => kind == 0xef,
            PartitionType::Gpt(guid) => guid == types::EFI_SYSTEM,
        }
    }

    /// The partition as a disk of its own. `device` is the disk that the table was read from.
    ///
    /// # Errors
    /// `OutOfRange` if the device is another one, and smaller.
    pub fn slice(&self, device: Arc<dyn BlockDevice>) -> Result<Slice> {
        Slice::new(device, self.offset, self.len)
    }
}

/// The partition table of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Which kind of table it is.
    pub scheme: Scheme,
    /// Bytes per sector that the table counts in: 512 or 4096.
    pub sector_bytes: u32,
    /// The disk's own identifier (`blkid` calls it PTUUID): a GUID, or the eight digits of the MBR's signature.
    pub uuid: String,
    /// Bytes of the disk that it was made for, at least: up to the later header of a GPT, or the last end in an MBR. May be more than the
    /// disk has.
    pub extent: u64,
    /// The partitions in the order of their numbers.
    pub partitions: Vec<Partition>,
    /// What is wrong with the table, in sentences for people.
    pub problems: Vec<String>,
}

impl Table {
    /// The partition of this number.
    ///
    /// # Errors
    /// `NotFound`, with the numbers there are.
    pub fn partition(&self, number: u32) -> Result<&Partition> {
        self.partitions.iter().find(|partition| partition.number == number).ok_or_else(|| {
            let error = Error::new(ErrorKind::NotFound, format!("the disk has no partition {number}"));
            let numbers: Vec<_> = self.partitions.iter().map(|found| found.number.to_string()).collect();
            match numbers.len() {
                0 => error.hint("Its partition table is empty."),
                _ => error.hint(format!("Partitions of this disk: {}.", numbers.join(", "))),
            }
        })
    }
}

/// Reads the partition table of a disk; `None` if there is none.
///
/// # Errors
/// `Corrupt` if the MBR announces a GPT of which neither copy can be trusted; the device failed.
pub fn read(device: &dyn BlockDevice) -> Result<Option<Table>> {
    let sector = bytes::read_some(device, 0, 512)?;
    let Some(mbr) = mbr::Mbr::parse(&sector) else { return Ok(None) };
    if mbr.announces_gpt() {
        return gpt::read(device).map(Some);
    }
    if !mbr.is_plausible(device.size()) {
        return Ok(None);
    }
    mbr::read(device, &mbr).map(Some)
}

/// Partition `number` of a disk as a disk of its own.
///
/// # Errors
/// `NotFound` if there is no table or no such partition; as [`read`].
pub fn slice(device: Arc<dyn BlockDevice>, number: u32) -> Result<Slice> {
    let table = read(&*device)?.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "the disk has no partition table")
            .hint("Leave the partition number away to use the disk as a whole.")
    })?;
    table.partition(number)?.slice(device)
}

/// Cuts a partition off at the end of the disk. `None`: it lies past it.
fn clip(number: u32, offset: u64, len: u64, disk: u64, problems: &mut Vec<String>) -> Option<u64> {
    if offset >= disk {
        problems
            .push(format!("partition {number} begins at {offset:#x}, past the end of the disk ({disk:#x})"));
        return None;
    }
    let left = disk - offset;
    if len > left {
        problems.push(format!(
            "partition {number} at {offset:#x} has {len} bytes, of which the disk holds only {left}"
        ));
    }
    Some(len.min(left))
}

#[cfg(test)]
mod tests;
