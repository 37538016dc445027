//! The ACPI tables (ACPI 6.5, section 5.2): as few as guests need to find processors, interrupts, PCI and the power
//! switch.

mod dsdt;

use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, mcfg::MCFG, rsdp::Rsdp, xsdt::XSDT};
use block::Result;

use crate::memory::{ECAM_START, GuestRam, IOAPIC_ADDRESS, LAPIC_ADDRESS};
use crate::platform::{PM_BASE, PM_CONTROL, PM_RESET, PM_TIMER, SCI};

pub(crate) use dsdt::MmioDevice;

const OEM: [u8; 6] = *b"VIMG  ";
const TABLE: [u8; 8] = *b"BOOTCHK ";
const REVISION: u32 = 1;

/// What the tables describe.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Processors.
    pub(crate) cpus: u8,
    /// Slots of the PCI bus and the IOAPIC pin of each.
    pub(crate) pci_pins: Vec<u32>,
    /// The virtio-mmio devices.
    pub(crate) mmio: Vec<MmioDevice>,
    /// There is a screen.
    pub(crate) vga: bool,
}

/// Tables laid out in memory one after the other.
struct Layout {
    start: u64,
    bytes: Vec<u8>,
}

impl Layout {
    /// Appends a table and returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let at = self.bytes.len().next_multiple_of(64);
        self.bytes.resize(at, 0);
        self.bytes.extend(table);
        self.start + at as u64
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = vec![];
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Tables that somebody else puts into memory: addresses in them are offsets yet, and the sums that contain addresses
/// are not right.
#[derive(Debug)]
pub(crate) struct Relocatable {
    /// The root pointer.
    pub(crate) rsdp: Vec<u8>,
    /// The tables.
    pub(crate) bytes: Vec<u8>,
    /// Offset and length of each address in them.
    pub(crate) pointers: Vec<(u32, u8)>,
    /// Offset and length of the tables that contain addresses.
    pub(crate) tables: Vec<(u32, u32)>,
}

/// The tables for firmware.
pub(crate) fn relocatable(machine: &Machine) -> Relocatable {
    let mut bytes = build(0, machine);
    let rsdp = bytes[..36].to_vec();
    let number = |bytes: &[u8], at: usize| bytes.get(at..at + 4).map_or(0, crate::bus::number);
    let xsdt = number(&rsdp, 24);
    let at = usize::try_from(xsdt).unwrap_or(0);
    let xsdt_len = number(&bytes, at + 4);
    let fadt = number(&bytes, at + 36);
    let entries = (36..xsdt_len).step_by(8).map(|entry| (xsdt + entry, 8));
    // FACS, DSDT by 32 and by 64 bits.
    let pointers = [(fadt + 36, 4), (fadt + 40, 4), (fadt + 140, 8)].into_iter().chain(entries).collect();
    let tables = vec![(fadt, 276), (xsdt, xsdt_len)];
    // Sums are made by adding up with a zero in their place.
    for (start, _) in &tables {
        if let Some(sum) = bytes.get_mut(usize::try_from(*start).unwrap_or(0) + 9) {
            *sum = 0;
        }
    }
    let mut rsdp = rsdp;
    (rsdp[8], rsdp[32]) = (0, 0);
    Relocatable { rsdp, bytes, pointers, tables }
}

/// Writes the tables to memory from `start`, the RSDP first.
///
/// # Errors
/// They do not fit.
pub(crate) fn write(ram: &GuestRam, start: u64, machine: &Machine) -> Result<()> {
    ram.write(start, &build(start, machine))?;
    Ok(())
}

/// The tables as they lie in memory from `start`.
fn build(start: u64, machine: &Machine) -> Vec<u8> {
    let mut layout = Layout { start, bytes: vec![0; 64] };
    let facs = layout.add(&facs());
    let dsdt = layout.add(&dsdt::build(machine));
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(layout.add(&fadt(facs, dsdt, machine.vga)));
    xsdt.add_entry(layout.add(&madt(machine.cpus)));
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
    xsdt.add_entry(layout.add(&bytes_of(&mcfg)));
    let xsdt = layout.add(&bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM, xsdt));
    layout.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    layout.bytes
}

/// Firmware ACPI control structure (section 5.2.10): nothing but a place for a lock and a waking vector.
fn facs() -> [u8; 64] {
    let mut facs = [0; 64];
    facs[..4].copy_from_slice(b"FACS");
    facs[4..8].copy_from_slice(&64u32.to_le_bytes());
    facs[32] = 2;
    facs
}

/// Fixed ACPI description table (section 5.2.9).
fn fadt(facs: u64, dsdt: u64, vga: bool) -> Vec<u8> {
    /// WBINVD works, the timer has 32 bits, there is a reset register; no power and sleep buttons.
    const FLAGS: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 10;
    /// Legacy devices. (No keyboard controller is announced: there is no keyboard.)
    const LEGACY_DEVICES: u16 = 1;
    const NO_VGA: u16 = 1 << 2;
    let port = |offset: u16| PM_BASE + offset;
    let address = |port: u16, bits: u8, access: u8| {
        let mut gas = [0; 12];
        gas[..4].copy_from_slice(&[1, bits, 0, access]);
        gas[4..6].copy_from_slice(&port.to_le_bytes());
        gas
    };
    let mut fadt = Sdt::new(*b"FACP", 276, 6, OEM, TABLE, REVISION);
    let low = |address: u64| u32::try_from(address).unwrap_or(0);
    fadt.write_u32(36, low(facs));
    fadt.write_u32(40, low(dsdt));
    fadt.write_u16(46, SCI);
    fadt.write_u32(56, u32::from(port(0)));
    fadt.write_u32(64, u32::from(port(PM_CONTROL)));
    fadt.write_u32(76, u32::from(port(PM_TIMER)));
    fadt.write_bytes(88, &[4, 2, 0, 4]);
    // Longer than any processor sleeps: C2 and C3 are not supported.
    fadt.write_u16(96, 0xfff);
    fadt.write_u16(98, 0xfff);
    fadt.write_u8(108, 0x32);
    fadt.write_u16(109, LEGACY_DEVICES | if vga { 0 } else { NO_VGA });
    fadt.write_u32(112, FLAGS);
    fadt.write_bytes(116, &address(port(PM_RESET), 8, 1));
    fadt.write_u8(128, 1);
    fadt.write_u8(131, 5);
    fadt.write_u64(140, dsdt);
    fadt.write_bytes(148, &address(port(0), 32, 2));
    fadt.write_bytes(172, &address(port(PM_CONTROL), 16, 2));
    fadt.write_bytes(208, &address(port(PM_TIMER), 32, 3));
    fadt.update_checksum();
    fadt.as_slice().to_vec()
}

/// Multiple APIC description table (section 5.2.12).
fn madt(cpus: u8) -> Vec<u8> {
    /// There are PICs too.
    const PCAT_COMPAT: u32 = 1;
    const ACTIVE_HIGH_LEVEL: u8 = 0xd;
    let low = |address: u64| u32::try_from(address).unwrap_or(0).to_le_bytes();
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, TABLE, REVISION);
    madt.write_bytes(36, &low(LAPIC_ADDRESS));
    madt.write_u32(40, PCAT_COMPAT);
    for cpu in 0..cpus {
        madt.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    let mut ioapic = vec![1, 12, cpus, 0];
    ioapic.extend(low(IOAPIC_ADDRESS));
    ioapic.extend([0; 4]);
    madt.append_slice(&ioapic);
    // The timer's interrupt 0 comes in at pin 2; the ACPI interrupt is level-triggered.
    madt.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    madt.append_slice(&[2, 10, 0, SCI.to_le_bytes()[0], SCI.to_le_bytes()[0], 0, 0, 0, ACTIVE_HIGH_LEVEL, 0]);
    // LINT1 of every processor is the NMI.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.update_checksum();
    madt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> Vec<u8> {
        let mmio = vec![MmioDevice { address: 0xfeb0_0000, gsi: 5 }];
        build(0xe_0000, &Machine { cpus: 3, pci_pins: vec![16, 17], mmio, vga: false })
    }

    fn u64_at(bytes: &[u8], at: usize) -> usize {
        usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
    }

    fn table(bytes: &[u8], address: usize) -> &[u8] {
        let at = address - 0xe_0000;
        let len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        &bytes[at..at + len]
    }

    #[test]
    fn tables_for_firmware_become_the_same_tables() {
        let machine = Machine { cpus: 2, pci_pins: vec![16], mmio: vec![], vga: true };
        let (direct, mut moved) = (build(0xe_0000, &machine), relocatable(&machine));
        let patch = |bytes: &mut [u8], at: usize, len: usize| {
            let mut number = [0; 8];
            number[..len].copy_from_slice(&bytes[at..at + len]);
            let number = u64::from_le_bytes(number) + 0xe_0000;
            bytes[at..at + len].copy_from_slice(&number.to_le_bytes()[..len]);
        };
        for (at, len) in &moved.pointers {
            patch(&mut moved.bytes, *at as usize, usize::from(*len));
        }
        for (start, len) in &moved.tables {
            let table = &mut moved.bytes[*start as usize..][..*len as usize];
            table[9] = sum(table).wrapping_neg();
        }
        assert_eq!(moved.bytes[64..], direct[64..]);
        patch(&mut moved.rsdp, 24, 8);
        moved.rsdp[8] = sum(&moved.rsdp[..20]).wrapping_neg();
        moved.rsdp[32] = sum(&moved.rsdp).wrapping_neg();
        assert_eq!(moved.rsdp, direct[..36]);
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_adds_up() {
        let bytes = tables();
        assert_eq!((&bytes[..8], sum(&bytes[..20]), sum(&bytes[..36])), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&bytes, u64_at(&bytes, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let found: Vec<_> = (36..xsdt.len()).step_by(8).map(|at| table(&bytes, u64_at(xsdt, at))).collect();
        assert!(found.iter().all(|t| sum(t) == 0));
        assert_eq!(found.iter().map(|t| &t[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC", b"MCFG"]);
        let dsdt = table(&bytes, u64_at(found[0], 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        assert!(bytes.len() < 0x1_0000);
    }
}
