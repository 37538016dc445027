//! Which firmware a guest's first disk can be started by, and which one it was most likely meant for.
//!
//! ```text
//!   BIOS   sector 0 holds code, and what that code starts is there:     UEFI   a FAT file system, on a partition that
//!          GRUB      the gap behind the MBR, or a BIOS boot partition          holds \EFI\BOOT\BOOTX64.EFI (tried
//!          others    the active partition, whose first sector is code          without being told), or other loaders
//!                                                                              (which entries in NVRAM name)
//! ```
//!
//! [`facts`] collects what is on the disk, [`Facts::choose`] decides as a careful person would, and says why. What the
//! source machine's description says goes before what the disk looks like.

mod code;
mod loaders;
mod words;

use std::fmt;

use block::Result;

use crate::bytes;
use crate::disks::{Disks, Location};
use crate::partition::{PartitionType, Scheme, Table};

pub use code::BootCode;

/// Bytes of a sector, which BIOS counts in.
const SECTOR: u64 = 512;
/// The loader that a firmware starts without being told (UEFI 2.10, 3.5.1.1), as people write it.
pub const FALLBACK: &str = r"\EFI\BOOT\BOOTX64.EFI";

/// The two kinds of firmware of a PC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Firmware {
    /// The old one, which starts the first sector of a disk.
    Bios,
    /// UEFI, which starts a program from a FAT file system.
    Uefi,
}

impl Firmware {
    /// Its name in options and documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bios => "bios",
            Self::Uefi => "uefi",
        }
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Bios => Self::Uefi,
            Self::Uefi => Self::Bios,
        }
    }
}

/// `BIOS`, `UEFI`.
impl fmt::Display for Firmware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bios => "BIOS",
            Self::Uefi => "UEFI",
        })
    }
}

/// A partition with the loaders of UEFI on it, or which is said to be for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EfiPartition {
    /// Where it lies.
    pub location: Location,
    /// Index of its volume in [`Disks::volumes`].
    pub volume: usize,
    /// The table calls it an EFI system partition. (Firmware looks at every FAT file system.)
    pub typed: bool,
    /// Why nothing on it can be read; `None`: it can.
    pub unreadable: Option<String>,
    /// The programs on it that look like loaders, as paths with backslashes, the fallback not among them.
    pub loaders: Vec<String>,
    /// The fallback loader, [`FALLBACK`], as it is written on the disk.
    pub fallback: Option<String>,
}

/// What is on a guest's first disk that a firmware could start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The kind of its partition table.
    pub scheme: Option<Scheme>,
    /// Whose code is in sector 0.
    pub boot_code: BootCode,
    /// The number of the active partition (GPT: of the one with the legacy BIOS bootable attribute), and whose code is in
    /// its first sector.
    pub active: Option<(u32, BootCode)>,
    /// The number of the BIOS boot partition, in which GRUB keeps its second stage on a GPT disk.
    pub bios_boot: Option<u32>,
    /// Partitions for UEFI, in their order.
    pub efi: Vec<EfiPartition>,
}

/// A firmware that has been chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The one that was chosen.
    pub firmware: Firmware,
    /// What is on the disk would be started by the other one, too.
    pub both: bool,
    /// Whether there is anything on the disk that it would start.
    pub startable: bool,
    /// Why it was chosen, in one sentence without a full stop: `GPT with an EFI system partition and ..`.
    pub reason: String,
}

/// Looks at the first disk of a guest.
///
/// # Errors
/// The device failed.
pub fn facts(disks: &Disks) -> Result<Facts> {
    let Some(disk) = disks.disks().first() else { return Ok(Facts::default()) };
    let mut facts = Facts {
        scheme: disk.table.as_ref().map(|table| table.scheme),
        boot_code: BootCode::of(&bytes::read_some(&*disk.device, 0, bytes_of_sector())?),
        ..Facts::default()
    };
    if let Some(table) = &disk.table {
        facts.bios_boot = bios_boot(table);
        if let Some(active) = table.partitions.iter().find(|partition| partition.bootable()) {
            let first = bytes::read_some(&*disk.device, active.offset, bytes_of_sector())?;
            facts.active = Some((active.number, BootCode::of(&first)));
        }
    }
    facts.efi = loaders::partitions(disks);
    Ok(facts)
}

fn bytes_of_sector() -> usize {
    block::num::to_usize(SECTOR)
}

fn bios_boot(table: &Table) -> Option<u32> {
    let of_grub = |kind: PartitionType| kind.name() == Some("BIOS boot");
    table.partitions.iter().find(|partition| of_grub(partition.kind)).map(|partition| partition.number)
}

impl Facts {
    /// Whether a BIOS would start a boot loader from the disk.
    pub fn has_bios_loader(&self) -> bool {
        match (self.boot_code, self.scheme) {
            (BootCode::Missing | BootCode::Empty, _) => false,
            // Its second stage lies behind the MBR, or, where a GPT is in the way, in a partition of its own.
            (BootCode::Grub, Some(Scheme::Gpt)) => self.bios_boot.is_some(),
            (BootCode::Grub, _) => true,
            // A disk without partitions: the code is that of its file system.
            (code, None) => code != BootCode::Placeholder,
            // Everybody else's code in sector 0 starts the active partition.
            (code, Some(_)) if code.starts_active() => self.active.is_some_and(|(_, code)| code.is_code()),
            (code, Some(_)) => code.is_code(),
        }
    }

    /// The first partition with something that UEFI would start, with an entry in NVRAM or without.
    pub fn efi_loader(&self) -> Option<&EfiPartition> {
        let has_fallback = |partition: &&EfiPartition| partition.fallback.is_some();
        let has_loader = |partition: &&EfiPartition| !partition.loaders.is_empty();
        self.efi.iter().find(has_fallback).or_else(|| self.efi.iter().find(has_loader))
    }

    /// Whether UEFI would start a loader without an entry in NVRAM.
    pub fn has_fallback(&self) -> bool {
        self.efi.iter().any(|partition| partition.fallback.is_some())
    }

    /// Decides. `described`: what the description of the source machine says, if there is one.
    pub fn choose(&self, described: Option<Firmware>) -> Choice {
        let (bios, uefi) = (self.has_bios_loader(), self.efi_loader().is_some());
        let firmware = described.unwrap_or_else(|| self.preferred(bios, uefi));
        let startable = match firmware {
            Firmware::Bios => bios,
            Firmware::Uefi => uefi,
        };
        let source = if described.is_some() { "the source machine had it; " } else { "" };
        let reason = format!("{source}{}", self.describe(firmware));
        Choice { firmware, both: bios && uefi, startable, reason }
    }

    fn preferred(&self, bios: bool, uefi: bool) -> Firmware {
        match (bios, uefi) {
            (true, false) => Firmware::Bios,
            (false, true) => Firmware::Uefi,
            // What needs no entry in an NVRAM that is not there.
            (true, true) if self.has_fallback() => Firmware::Uefi,
            (true, true) => Firmware::Bios,
            // Nothing is there; what the disk was meant for, all the same.
            (false, false) if self.scheme == Some(Scheme::Gpt) && self.bios_boot.is_none() => Firmware::Uefi,
            (false, false) if self.efi.iter().any(|partition| partition.typed) => Firmware::Uefi,
            (false, false) => Firmware::Bios,
        }
    }
}

#[cfg(test)]
mod tests;
