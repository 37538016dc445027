//! What a firmware (SeaBIOS, OVMF) asks of its machine: the configuration device, the ACPI and SMBIOS tables and the
//! boot order through it, flash for UEFI's variables, and a port for its log.

mod flash;
mod fwcfg;
mod loader;
mod log;
mod smbios;

use std::fmt::Write as _;

pub(crate) use flash::{Flash, FlashMemory};
pub(crate) use fwcfg::{DMA_PORT, DMA_PORTS, FwCfg, FwCfgDma, PORT, PORTS};
pub(crate) use log::{LOG_PORT, Log};

use crate::acpi;
use crate::boot::layout::memory_map;
use crate::memory::GuestRam;
use crate::serial::COM1;

/// Where a UEFI firmware volume has its signature (UEFI PI 1.7, volume 3, section 3.2.1).
const VOLUME_SIGNATURE: std::ops::Range<usize> = 0x28..0x2c;

/// Which family a firmware is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A PC BIOS.
    Bios,
    /// UEFI.
    Uefi,
}

impl Kind {
    /// By its bytes: UEFI's consist of firmware volumes.
    pub(crate) fn of(code: &[u8]) -> Self {
        if code.get(VOLUME_SIGNATURE) == Some(b"_FVH") { Self::Uefi } else { Self::Bios }
    }
}

/// The numbered items and files for a machine whose disks are in the first so many slots of the PCI bus from 1.
pub(crate) fn configuration(ram: &GuestRam, machine: &acpi::Machine, disks: usize) -> FwCfg {
    let mut config = FwCfg::new();
    let cpus = u16::from(machine.cpus).to_le_bytes();
    config.item(fwcfg::KEY_CPUS, &cpus);
    config.item(fwcfg::KEY_MAX_CPUS, &cpus);
    let mut map = vec![];
    for range in memory_map(ram) {
        map.extend([range.start, range.len].map(u64::to_le_bytes).concat());
        map.extend(range.kind.to_le_bytes());
    }
    config.file("etc/e820", &map);
    let tables = acpi::relocatable(machine);
    config.file(loader::RSDP_FILE, &tables.rsdp);
    config.file(loader::TABLES_FILE, &tables.bytes);
    config.file("etc/table-loader", &loader::script(&tables));
    let smbios = smbios::build(ram, machine.cpus);
    config.file(smbios::ANCHOR_FILE, &smbios.anchor);
    config.file(smbios::TABLES_FILE, &smbios.tables);
    config.file("bootorder", boot_order(disks).as_bytes());
    // The screen is the serial port: boot loaders that know no other console write to it.
    config.file("etc/sercon-port", &COM1.to_le_bytes());
    config
}

/// The disks in their order, by the paths of Open Firmware that SeaBIOS and OVMF know, ended by a zero.
fn boot_order(disks: usize) -> String {
    let mut order = String::new();
    for slot in 1..=disks {
        // Writing to a string does not fail.
        let _ = writeln!(order, "/pci@i0cf8/scsi@{slot:x}/disk@0,0");
    }
    order.push('\0');
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_boot_in_their_order() {
        let order = boot_order(11);
        let lines: Vec<_> = order.strip_suffix("\n\0").unwrap().lines().collect();
        assert_eq!((lines.len(), lines[0]), (11, "/pci@i0cf8/scsi@1/disk@0,0"));
        assert_eq!(lines[10], "/pci@i0cf8/scsi@b/disk@0,0");
        assert_eq!(boot_order(0), "\0");
    }

    #[test]
    fn uefi_is_known_by_its_volumes() {
        let mut code = vec![0; 4096];
        assert_eq!((Kind::of(&code), Kind::of(&[])), (Kind::Bios, Kind::Bios));
        code[0x28..0x2c].copy_from_slice(b"_FVH");
        assert_eq!(Kind::of(&code), Kind::Uefi);
    }
}
