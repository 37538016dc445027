//! What a PC firmware (SeaBIOS) asks of its machine: the configuration device, the ACPI tables through it, and a
//! port for its log.

mod fwcfg;
mod loader;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

pub(crate) use fwcfg::{DMA_PORT, DMA_PORTS, FwCfg, FwCfgDma, PORT, PORTS};

use crate::acpi;
use crate::boot::layout::memory_map;
use crate::bus::Registers;
use crate::engine::Observer;
use crate::memory::GuestRam;
use crate::serial::COM1;

/// The port that firmware logs to.
pub(crate) const LOG_PORT: u16 = 0x402;
/// What reading it answers where there is a log.
const LOG_PRESENT: u8 = 0xe9;

/// The numbered items and files for a machine.
pub(crate) fn configuration(ram: &GuestRam, machine: &acpi::Machine) -> FwCfg {
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
    // The screen is the serial port: boot loaders that know no other console write to it.
    config.file("etc/sercon-port", &COM1.to_le_bytes());
    config
}

/// The log of the firmware, handed on as it comes.
pub(crate) struct Log(pub(crate) Arc<dyn Observer>);

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

impl Registers for Log {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(LOG_PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.0.firmware_log(data, Instant::now());
    }
}
