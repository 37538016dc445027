//! The differentiated system description table: the devices that nobody finds by looking.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    PackageBuilder, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;

use super::{Machine, OEM, REVISION, TABLE, bytes_of};
use crate::memory::{ECAM_LEN, ECAM_START, MMIO_STEP, PCI_END, PCI_HIGH_END, PCI_HIGH_START, PCI_START};
use crate::pci::{CONFIG_PORT, CONFIG_PORTS};
use crate::platform::{PM_BASE, PM_LEN, PM_SLEEP_OFF};
use crate::serial::{COM1, COM1_IRQ};

/// A virtio-mmio device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MmioDevice {
    pub(crate) address: u64,
    pub(crate) gsi: u32,
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

fn id(name: &str) -> Vec<u8> {
    bytes_of(&Name::new("_HID".into(), &EISAName::new(name)))
}

/// Bytes that are already in AML.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// The table.
pub(super) fn build(machine: &Machine) -> Vec<u8> {
    let devices: Vec<Raw> = [pci(machine), resources(), serial(), clock()]
        .into_iter()
        .chain((0..).zip(&machine.mmio).map(|(i, device)| virtio_mmio(i, device)))
        .map(Raw)
        .collect();
    let children = devices.iter().map(|d| d as &dyn Aml).collect();
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&bytes_of(&Scope::new("\\_SB_".into(), children)));
    // What to write to the control register to power off.
    let off = Package::new(vec![&PM_SLEEP_OFF, &PM_SLEEP_OFF, &0u8, &0u8]);
    dsdt.append_slice(&bytes_of(&Name::new("\\_S5_".into(), &off)));
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

/// The PCI host bridge with its windows, and which interrupt pin of which slot reaches which pin of the IOAPIC.
fn pci(machine: &Machine) -> Vec<u8> {
    let not = AddressSpaceCacheable::NotCacheable;
    let window = bytes_of(&ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0u16, 0u16),
        &IO::new(CONFIG_PORT, CONFIG_PORT, 1, CONFIG_PORTS.to_le_bytes()[0]),
        &AddressSpace::new_io(0u16, CONFIG_PORT - 1, None),
        &AddressSpace::new_io(CONFIG_PORT + CONFIG_PORTS, 0xffff, None),
        &AddressSpace::new_memory(not, true, low(PCI_START), low(PCI_END - 1), None),
        &AddressSpace::new_memory(not, true, low(PCI_HIGH_START), low(PCI_HIGH_END - 1), None),
    ]));
    let mut routes = PackageBuilder::new();
    for (slot, gsi) in (0u32..).zip(&machine.pci_pins) {
        let address = slot << 16 | 0xffff;
        routes.add_element(&Package::new(vec![&address, &0u8, &0u8, gsi]));
    }
    bytes_of(&Device::new(
        "PCI0".into(),
        vec![
            &Raw(id("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &Raw(window)),
            &Name::new("_PRT".into(), &routes),
        ],
    ))
}

/// Addresses and ports that are taken, so that nobody puts a device there.
fn resources() -> Vec<u8> {
    let taken = bytes_of(&ResourceTemplate::new(vec![
        &Memory32Fixed::new(true, low(ECAM_START), low(ECAM_LEN)),
        &IO::new(PM_BASE, PM_BASE, 1, PM_LEN.to_le_bytes()[0]),
    ]));
    bytes_of(&Device::new(
        "MBRD".into(),
        vec![&Raw(id("PNP0C02")), &Name::new("_UID".into(), &1u8), &Name::new("_CRS".into(), &Raw(taken))],
    ))
}

fn serial() -> Vec<u8> {
    let used = bytes_of(&ResourceTemplate::new(vec![
        &IO::new(COM1, COM1, 1, 8),
        &Interrupt::new(true, true, false, false, COM1_IRQ),
    ]));
    bytes_of(&Device::new(
        "COM1".into(),
        vec![&Raw(id("PNP0501")), &Name::new("_UID".into(), &0u8), &Name::new("_CRS".into(), &Raw(used))],
    ))
}

/// The clock, without its interrupt: there is no alarm.
fn clock() -> Vec<u8> {
    let used = bytes_of(&ResourceTemplate::new(vec![&IO::new(0x70, 0x70, 1, 2)]));
    bytes_of(&Device::new("RTC_".into(), vec![&Raw(id("PNP0B00")), &Name::new("_CRS".into(), &Raw(used))]))
}

/// A virtio-mmio device as Linux knows it.
fn virtio_mmio(index: u32, device: &MmioDevice) -> Vec<u8> {
    let used = bytes_of(&ResourceTemplate::new(vec![
        &Memory32Fixed::new(true, low(device.address), low(MMIO_STEP)),
        &Interrupt::new(true, false, false, false, device.gsi),
    ]));
    let name = format!("VR{index:02}");
    bytes_of(&Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &1u8),
            &Name::new("_CRS".into(), &Raw(used)),
        ],
    ))
}
