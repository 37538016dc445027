//! The devices of a machine and where they are.

use std::sync::Arc;
use std::time::Instant;

use block::{Error, Result};

use crate::acpi::{self, MmioDevice};
use crate::bus::{Bus, Registers};
use crate::engine::{Boot, Disk, MachineSpec, Observer, ReadWatch, Transport};
use crate::firmware::{self, Flash, FlashMemory, FwCfgDma, Kind, Log};
use crate::memory::{
    ECAM_LEN, ECAM_START, GuestRam, MMIO_START, MMIO_STEP, PCI_END, PCI_HIGH_END, PCI_HIGH_START, PCI_START,
};
use crate::pci::{
    CONFIG_PORT, CONFIG_PORTS, Chip, ConfigPorts, Ecam, Function, HostBridge, LPC_SLOT, LpcBridge,
    MOVED_ECAM_LEN, MOVED_ECAM_START, MovedEcam, PciBus, PciMemory, SLOTS,
};
use crate::platform::{
    Cmos, I8042, PM_BASE, PM_LEN, PORT_92, Port92, PowerManagement, RESET_PORT, ResetPort, Screen, VGA_PORT,
    VGA_PORTS, Vga,
};
use crate::power::Power;
use crate::serial::{COM1, COM1_IRQ, Serial, Sink};
use crate::vcpu::Buses;
use crate::virtio::blk::Blk;
use crate::virtio::rng::Rng;
use crate::virtio::{BAR_LEN, Common, Device, PciPlace, VirtioMmio, VirtioPci};
use crate::vm::{Lines, Vm};

/// The IOAPIC's pins for PCI devices: 16 to 23, in turn.
const FIRST_PCI_PIN: u32 = 16;
const PCI_PINS: u32 = 8;
/// Messages have KVM's numbers from here.
const FIRST_MESSAGE: u32 = 24;
/// Most virtio-mmio devices.
const MAX_MMIO: usize = 64;
/// More queues than this help nobody in a boot check.
const MAX_QUEUES: u8 = 4;

/// What devices are to be built of.
pub(super) struct Plan<'a> {
    pub(super) spec: &'a MachineSpec,
    pub(super) ram: &'a GuestRam,
    pub(super) vm: Arc<dyn Vm>,
    pub(super) power: &'a Arc<Power>,
    /// The variable store of UEFI.
    pub(super) flash: Option<FlashMemory>,
}

/// What has been built.
pub(super) struct Devices {
    pub(super) buses: Arc<Buses>,
    pub(super) serial: Arc<Serial>,
    pub(super) virtio: Vec<Arc<Common>>,
    pub(super) blks: Vec<Arc<Blk>>,
    pub(super) tables: acpi::Machine,
    /// Of a machine with firmware.
    pub(super) firmware: Option<FirmwareDevices>,
}

/// What only firmware boots have.
pub(super) struct FirmwareDevices {
    pub(super) kind: Kind,
    pub(super) log: Arc<Log>,
    pub(super) screen: Screen,
}

/// The IOAPIC's pin of a slot (the `_PRT` says so).
fn pin_of_slot(slot: usize) -> u32 {
    FIRST_PCI_PIN + u32::try_from(slot).unwrap_or(0) % PCI_PINS
}

impl Plan<'_> {
    /// Builds all devices.
    ///
    /// # Errors
    /// More disks than there are places for, or the host has no descriptors left.
    pub(super) fn build(&self, observer: Arc<dyn Observer>) -> Result<Devices> {
        let lines = Lines::new(Arc::clone(&self.vm));
        let serial = Arc::new(self.serial(&lines, Arc::clone(&observer)));
        let mut buses = Buses::default();
        self.platform(&mut buses.ports, &serial);
        let queues = u16::from(self.spec.cpus.min(MAX_QUEUES));
        let blk = |(number, disk): (usize, &Disk)| {
            let reads = ReadWatch::new(Arc::clone(&observer), number);
            Arc::new(Blk::new(disk.clone(), queues).watched_by(reads))
        };
        let blks: Vec<_> = self.spec.disks.iter().enumerate().map(blk).collect();
        let mut devices: Vec<Arc<dyn Device>> = blks.iter().map(|b| Arc::clone(b) as _).collect();
        devices.push(Arc::new(Rng));
        let mut built = Devices {
            buses: Arc::default(),
            serial,
            virtio: vec![],
            blks,
            tables: acpi::Machine {
                cpus: self.spec.cpus,
                pci_pins: (0..SLOTS).map(pin_of_slot).collect(),
                mmio: vec![],
                vga: self.has_firmware(),
            },
            firmware: None,
        };
        let functions = match self.spec.transport {
            Transport::Pci => self.pci(devices, &lines, &mut built)?,
            Transport::Mmio => {
                self.mmio(devices, &lines, &mut buses.memory, &mut built)?;
                vec![]
            }
        };
        self.bus(functions, &mut buses);
        if let Boot::Firmware { code, .. } = &self.spec.boot {
            built.firmware = Some(self.firmware(code, &mut buses, &built.tables, observer));
        }
        built.buses = Arc::new(buses);
        Ok(built)
    }

    fn has_firmware(&self) -> bool {
        matches!(self.spec.boot, Boot::Firmware { .. })
    }

    /// The host bridge that the firmware, if there is one, knows best, and whether that is UEFI.
    fn chip(&self) -> (Chip, bool) {
        match &self.spec.boot {
            Boot::Firmware { code, .. } if Kind::of(code) == Kind::Bios => (Chip::I440fx, false),
            Boot::Firmware { .. } => (Chip::Q35, true),
            Boot::Linux { .. } => (Chip::Q35, false),
        }
    }

    /// What firmware needs besides, and what its loaders do.
    fn firmware(
        &self,
        code: &[u8],
        buses: &mut Buses,
        tables: &acpi::Machine,
        observer: Arc<dyn Observer>,
    ) -> FirmwareDevices {
        let disks = if self.spec.transport == Transport::Pci { self.spec.disks.len() } else { 0 };
        let config = Arc::new(firmware::configuration(self.ram, tables, disks));
        let log = Arc::new(Log::new(observer));
        let vga = Arc::new(Vga::default());
        let mut add = |start: u16, len: u16, device: Arc<dyn Registers>| {
            buses.ports.insert(u64::from(start), u64::from(len), device);
        };
        add(firmware::PORT, firmware::PORTS, Arc::clone(&config) as _);
        add(firmware::DMA_PORT, firmware::DMA_PORTS, Arc::new(FwCfgDma { config, ram: self.ram.clone() }));
        add(firmware::LOG_PORT, 1, Arc::clone(&log) as _);
        add(VGA_PORT, VGA_PORTS, Arc::clone(&vga) as _);
        add(PORT_92, 1, Arc::new(Port92::new(Arc::clone(self.power))));
        self.vm.coalesce(firmware::LOG_PORT, 1, true);
        if let Some(memory) = &self.flash {
            let flash = Flash::new(memory.clone(), Arc::clone(&self.vm));
            buses.memory.insert(memory.start(), memory.len(), Arc::new(flash));
        }
        FirmwareDevices { kind: Kind::of(code), log, screen: Screen::new(self.ram.clone(), vga) }
    }

    fn serial(&self, lines: &Arc<Lines>, observer: Arc<dyn Observer>) -> Serial {
        let sink: Sink = Box::new(move |bytes| observer.console(bytes, Instant::now()));
        let power = Arc::clone(self.power);
        let vm = Arc::clone(&self.vm);
        Serial::new(lines.line(COM1_IRQ, 0), sink, Box::new(move || power.call_attention()))
            .coalescing(Box::new(move |on| vm.coalesce(COM1, 1, on)))
    }

    fn platform(&self, ports: &mut Bus, serial: &Arc<Serial>) {
        let mut add = |start: u16, len: u16, device: Arc<dyn Registers>| {
            ports.insert(u64::from(start), u64::from(len), device);
        };
        let power = || Arc::clone(self.power);
        let keyboard = if self.has_firmware() { I8042::silent(power()) } else { I8042::new(power()) };
        let keyboard: Arc<dyn Registers> = Arc::new(keyboard);
        add(COM1, 8, Arc::clone(serial) as _);
        add(0x60, 1, Arc::clone(&keyboard));
        add(0x64, 1, Arc::new(Shifted(keyboard, 4)));
        add(0x70, 2, Arc::new(Cmos::new(self.ram, self.spec.cpus)));
        add(PM_BASE, PM_LEN, Arc::new(PowerManagement::new(power())));
        // An index that is written is of no consequence until the data is accessed. (The reset port lies within the
        // PCI configuration address: that reset is seen when the processor next leaves KVM, which it is made to do.)
        self.vm.coalesce(0x70, 1, true);
        self.vm.coalesce(CONFIG_PORT, 4, true);
        // It lies within the ports of the PCI configuration, and goes before them.
        add(RESET_PORT, 1, Arc::new(ResetPort::new(power())));
    }

    /// Devices on the PCI bus, from slot 1. Without firmware we are who gives them addresses.
    fn pci(
        &self,
        devices: Vec<Arc<dyn Device>>,
        lines: &Arc<Lines>,
        built: &mut Devices,
    ) -> Result<Vec<Arc<dyn Function>>> {
        if devices.len() >= LPC_SLOT {
            return Err(too_many(devices.len(), LPC_SLOT - 1));
        }
        let assigned = !self.has_firmware();
        let (mut first_gsi, mut functions) = (FIRST_MESSAGE, vec![]);
        for (slot, device) in (1u8..).zip(devices) {
            let address = PCI_START + u64::from(slot) * u64::from(BAR_LEN);
            let place = PciPlace {
                address: if assigned { u32::try_from(address).unwrap_or(0) } else { 0 },
                line: lines.line(pin_of_slot(usize::from(slot)), slot),
                first_gsi,
            };
            first_gsi += u32::try_from(device.queue_sizes().len() + 1).unwrap_or(1);
            let function = Arc::new(VirtioPci::new(device, self.ram.clone(), Arc::clone(&self.vm), place)?);
            built.virtio.push(Arc::clone(function.common()));
            functions.push(function as Arc<dyn Function>);
        }
        Ok(functions)
    }

    fn mmio(
        &self,
        devices: Vec<Arc<dyn Device>>,
        lines: &Arc<Lines>,
        memory: &mut Bus,
        built: &mut Devices,
    ) -> Result<()> {
        if devices.len() > MAX_MMIO {
            return Err(too_many(devices.len(), MAX_MMIO));
        }
        for (index, device) in (0u8..).zip(devices) {
            let address = MMIO_START + u64::from(index) * MMIO_STEP;
            let gsi = pin_of_slot(usize::from(index));
            let line = lines.line(gsi, index + 1);
            let device = VirtioMmio::new(device, self.ram.clone(), Arc::clone(&self.vm), address, line)?;
            built.virtio.push(Arc::clone(device.common()));
            built.tables.mmio.push(MmioDevice { address, gsi });
            memory.insert(address, MMIO_STEP, Arc::new(device));
        }
        Ok(())
    }

    /// The PCI bus with its host bridge, by ports, by memory, and the memory of its devices.
    fn bus(&self, functions: Vec<Arc<dyn Function>>, buses: &mut Buses) {
        let (chip, uefi) = self.chip();
        let bridge = HostBridge::new(chip);
        let bridge = if uefi { bridge.with_power(Arc::clone(self.power)) } else { bridge };
        let bridge = Arc::new(bridge);
        let mut slots: Vec<_> =
            std::iter::once(Arc::clone(&bridge) as _).chain(functions).map(Some).collect();
        if uefi {
            slots.resize_with(LPC_SLOT, || None);
            slots.push(Some(Arc::new(LpcBridge::default())));
        }
        let bus = Arc::new(PciBus::new(slots));
        if uefi {
            let moved = MovedEcam { bus: Arc::clone(&bus), bridge, start: MOVED_ECAM_START };
            buses.memory.insert(MOVED_ECAM_START, MOVED_ECAM_LEN, Arc::new(moved));
        }
        buses.ports.insert(
            u64::from(CONFIG_PORT),
            u64::from(CONFIG_PORTS),
            Arc::new(ConfigPorts(Arc::clone(&bus))),
        );
        buses.memory.insert(ECAM_START, ECAM_LEN, Arc::new(Ecam(Arc::clone(&bus))));
        for (start, end) in [(PCI_START, PCI_END), (PCI_HIGH_START, PCI_HIGH_END)] {
            let memory = PciMemory { bus: Arc::clone(&bus), start };
            buses.memory.insert(start, end - start, Arc::new(memory));
        }
    }
}

fn too_many(count: usize, places: usize) -> Error {
    Error::usage(format!("{count} devices on a bus with {places} places")).hint("check fewer disks at once")
}

/// A device some of whose registers begin at an offset.
#[derive(Debug)]
struct Shifted(Arc<dyn Registers>, u64);

impl Registers for Shifted {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset + self.1, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset + self.1, data);
    }
}
