//! PCI (PCI Local Bus Specification 3.0): one bus, its configuration space by ports and by memory, and the
//! memory of its devices.

mod bridge;
mod config;
pub(crate) mod fuzz;

use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::Mutex;

pub(crate) use bridge::LPC_SLOT;
pub use bridge::{Chip, HostBridge, LpcBridge};
pub use config::ConfigSpace;
pub(crate) use config::{
    CAP_MSIX, CAP_VENDOR, COMMAND_INTX_DISABLE, COMMAND_MEMORY, Identity, OFFSET_BAR0, OFFSET_COMMAND,
    OFFSET_INTERRUPT_LINE, STATUS_INTERRUPT,
};

use crate::bus::{Registers, answer, number};

/// Devices on the bus.
pub(crate) const SLOTS: usize = 32;
/// Ports of configuration mechanism 1: address at 0, data at 4.
pub(crate) const CONFIG_PORT: u16 = 0xcf8;
/// How many ports there are of it.
pub(crate) const CONFIG_PORTS: u16 = 8;

/// Where UEFI firmware of before 2023 puts the memory-mapped configuration space, which has 256 buses there.
pub(crate) const MOVED_ECAM_START: u64 = 0xb000_0000;
/// Its length.
pub(crate) const MOVED_ECAM_LEN: u64 = 0x1000_0000;

/// A device with one function.
pub trait Function: Debug + Send + Sync {
    /// Reads configuration space; `offset + data.len()` is at most 256.
    fn config_read(&self, offset: u8, data: &mut [u8]);
    /// Writes configuration space; `offset + data.len()` is at most 256.
    fn config_write(&self, offset: u8, data: &[u8]);
    /// Where the device's memory lies now (start, length), if it is decoded.
    fn window(&self) -> Option<(u64, u64)>;
    /// Reads the device's memory.
    fn memory_read(&self, offset: u64, data: &mut [u8]);
    /// Writes the device's memory.
    fn memory_write(&self, offset: u64, data: &[u8]);
}

/// The bus.
#[derive(Debug, Default)]
pub struct PciBus {
    slots: Vec<Option<Arc<dyn Function>>>,
    /// What was written to port 0xcf8.
    address: Mutex<u32>,
}

impl PciBus {
    /// A bus with these functions in the slots of their numbers; what does not fit is left out.
    pub fn new(functions: Vec<Option<Arc<dyn Function>>>) -> Self {
        let mut slots = functions;
        slots.truncate(SLOTS);
        Self { slots, address: Mutex::new(0) }
    }

    /// The function at a bus, device and function number.
    fn function(&self, bus: u8, device: u8, function: u8) -> Option<&Arc<dyn Function>> {
        let present = bus == 0 && function == 0;
        self.slots.get(usize::from(device)).and_then(Option::as_ref).filter(|_| present)
    }

    /// Reads the configuration space of `bdf` (bus, device, function) from `offset`.
    pub fn config_read(&self, bdf: (u8, u8, u8), offset: u16, data: &mut [u8]) {
        let Some(function) = self.function(bdf.0, bdf.1, bdf.2) else {
            data.fill(0xff);
            return;
        };
        // There are no extended capabilities: zeros.
        data.fill(0);
        if let Some((offset, len)) = inside(offset, data.len()) {
            function.config_read(offset, &mut data[..len]);
        }
    }

    /// Writes the configuration space of `bdf` from `offset`.
    pub fn config_write(&self, bdf: (u8, u8, u8), offset: u16, data: &[u8]) {
        if let (Some(function), Some((offset, len))) =
            (self.function(bdf.0, bdf.1, bdf.2), inside(offset, data.len()))
        {
            function.config_write(offset, &data[..len]);
        }
    }

    /// The device whose memory is decoded at `address`, and the offset in it.
    fn decode(&self, address: u64) -> Option<(&Arc<dyn Function>, u64)> {
        self.slots.iter().flatten().find_map(|function| {
            let (start, len) = function.window()?;
            let offset = address.checked_sub(start)?;
            (offset < len).then_some((function, offset))
        })
    }

    /// Reads the memory of a device; ones where none answers.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match self.decode(address) {
            Some((function, offset)) => function.memory_read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes the memory of a device.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if let Some((function, offset)) = self.decode(address) {
            function.memory_write(offset, data);
        }
    }
}

/// The part of an access that lies in the 256 bytes of conventional configuration space.
fn inside(offset: u16, len: usize) -> Option<(u8, usize)> {
    let offset = u8::try_from(offset).ok()?;
    Some((offset, len.min(256 - usize::from(offset))))
}

/// The bus at ports 0xcf8 to 0xcff (section 3.2.2.3.2).
#[derive(Debug)]
pub struct ConfigPorts(pub Arc<PciBus>);

impl ConfigPorts {
    /// The function and the register that the address register names, if it is enabled.
    fn target(&self) -> Option<((u8, u8, u8), u16)> {
        let address = *self.0.address.lock();
        let [register, low, bus, high] = address.to_le_bytes();
        (high & 0x80 != 0).then_some(((bus, low >> 3, low & 7), u16::from(register & 0xfc)))
    }
}

impl Registers for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match offset {
            0 if data.len() == 4 => answer(data, *self.0.address.lock()),
            4..8 => match self.target() {
                Some((bdf, register)) => self.0.config_read(bdf, register + lane(offset), data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match offset {
            0 if data.len() == 4 => *self.0.address.lock() = number(data) & 0x80ff_fffc,
            4..8 => {
                if let Some((bdf, register)) = self.target() {
                    self.0.config_write(bdf, register + lane(offset), data);
                }
            }
            _ => {}
        }
    }
}

/// Which byte of the data register an access begins with.
fn lane(offset: u64) -> u16 {
    u16::try_from(offset & 3).unwrap_or(0)
}

/// The bus in memory (PCI Express Base Specification, section 7.2.2).
#[derive(Debug)]
pub struct Ecam(pub Arc<PciBus>);

fn ecam_target(offset: u64) -> ((u8, u8, u8), u16) {
    let byte = |shift: u32, mask: u64| u8::try_from(offset >> shift & mask).unwrap_or(0);
    ((byte(20, 0xff), byte(15, 0x1f), byte(12, 7)), u16::try_from(offset & 0xfff).unwrap_or(0))
}

impl Registers for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bdf, register) = ecam_target(offset);
        self.0.config_read(bdf, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bdf, register) = ecam_target(offset);
        self.0.config_write(bdf, register, data);
    }
}

/// The bus in memory where the host bridge has been told to have it, within the addresses from `start`.
#[derive(Debug)]
pub struct MovedEcam {
    /// The bus.
    pub bus: Arc<PciBus>,
    /// Who knows where it is.
    pub bridge: Arc<HostBridge>,
    /// Where the range begins.
    pub start: u64,
}

impl MovedEcam {
    fn target(&self, offset: u64) -> Option<((u8, u8, u8), u16)> {
        let offset = self.start.checked_add(offset)?.checked_sub(self.bridge.ecam()?)?;
        (offset < MOVED_ECAM_LEN).then(|| ecam_target(offset))
    }
}

impl Registers for MovedEcam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((bdf, register)) => self.bus.config_read(bdf, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((bdf, register)) = self.target(offset) {
            self.bus.config_write(bdf, register, data);
        }
    }
}

/// The addresses of the devices' memory.
#[derive(Debug)]
pub struct PciMemory {
    /// The bus.
    pub bus: Arc<PciBus>,
    /// Where the range begins.
    pub start: u64,
}

impl Registers for PciMemory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.bus.memory_read(self.start.saturating_add(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.bus.memory_write(self.start.saturating_add(offset), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus() -> Arc<PciBus> {
        Arc::new(PciBus::new(vec![Some(Arc::new(HostBridge::default()))]))
    }

    #[test]
    fn both_ways_into_configuration_space_show_the_same() {
        let bus = bus();
        let (ports, ecam) = (ConfigPorts(bus.clone()), Ecam(bus));
        for register in (0..256u32).step_by(4) {
            ports.write(0, &(0x8000_0000 | register).to_le_bytes());
            let (mut a, mut b) = ([0; 4], [0; 4]);
            ports.read(4, &mut a);
            ecam.read(u64::from(register), &mut b);
            assert_eq!(a, b);
            let mut lanes = [0; 4];
            for (lane, byte) in (4..).zip(lanes.chunks_mut(1)) {
                ports.read(lane, byte);
            }
            assert_eq!(lanes, a);
        }
    }

    #[test]
    fn firmware_moves_the_memory() {
        let bridge = Arc::new(HostBridge::default());
        let bus = Arc::new(PciBus::new(vec![Some(Arc::clone(&bridge) as _)]));
        let moved = MovedEcam { bus, bridge: Arc::clone(&bridge), start: MOVED_ECAM_START };
        let read = |offset: u64| {
            let mut data = [0; 4];
            moved.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(0), u32::MAX, "not there yet");
        bridge.config_write(0x60, &0xb000_0001_u32.to_le_bytes());
        assert_eq!((read(0), read(0x8000), read(1 << 20)), (0x29c0_8086, u32::MAX, u32::MAX));
        moved.write(0x60, &0x4000_0001_u32.to_le_bytes());
        assert_eq!((bridge.ecam(), read(0)), (Some(0x4000_0000), u32::MAX), "moved away");
    }

    #[test]
    fn nobody_lives_elsewhere() {
        let bus = bus();
        for bdf in [(0, 1, 0), (0, 0, 1), (1, 0, 0), (255, 31, 7)] {
            let mut data = [0; 4];
            bus.config_read(bdf, 0, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
        let mut data = [1; 4];
        bus.config_read((0, 0, 0), 0x100, &mut data);
        assert_eq!(data, [0; 4], "no extended capability");
    }

    #[test]
    fn a_disabled_address_register_reads_ones() {
        let ports = ConfigPorts(bus());
        ports.write(0, &0u32.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
