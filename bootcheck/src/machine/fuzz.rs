//! The body of a fuzz target: a hostile guest in front of everything that a machine with UEFI has, as it is put together
//! for a boot: firmware configuration, flash, clock, power management, screen, serial port, PCI, virtio.

use std::sync::Arc;
use std::time::Instant;

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};

use super::devices::Plan;
use crate::engine::{Boot, Disk, MachineSpec, Observer, Transport};
use crate::firmware::{self, FlashMemory};
use crate::memory::{ECAM_START, GuestRam, PCI_START};
use crate::pci::{CONFIG_PORT, MOVED_ECAM_START};
use crate::platform::{PM_BASE, PORT_92, RESET_PORT, VGA_PORT};
use crate::power::Power;
use crate::serial::COM1;
use crate::vm::FakeVm;

/// Bytes of the guest's memory.
const MEMORY: u64 = 2 << 20;
/// Bytes of its flash.
const FLASH: usize = 16 << 10;
/// Most accesses of one input.
const MOST: usize = 256;

/// Where ports are that somebody answers at.
const PORTS: [u16; 11] = [
    COM1,
    0x60,
    0x70,
    PM_BASE,
    VGA_PORT,
    PORT_92,
    RESET_PORT,
    CONFIG_PORT,
    firmware::PORT,
    firmware::DMA_PORT,
    firmware::LOG_PORT,
];

/// Hears nothing.
#[derive(Debug)]
struct Deaf;

impl Observer for Deaf {
    fn console(&self, _bytes: &[u8], _at: Instant) {}
}

fn spec() -> Option<MachineSpec> {
    let mut code = vec![0; 4096];
    code.get_mut(0x28..0x2c)?.copy_from_slice(b"_FVH");
    let storage = Arc::new(MemStorage::from_bytes(vec![0; 64 << 10]));
    let device = Arc::new(Raw::open(storage, RawOptions::default()).ok()?);
    Some(MachineSpec {
        cpus: 1,
        memory_bytes: MEMORY,
        disks: vec![Disk { device, read_only: false, serial: "fuzz".to_owned() }],
        transport: Transport::Pci,
        boot: Boot::Firmware { code: code.into(), vars: None },
    })
}

/// The input is a list of accesses, 14 bytes each: to what and which way, how wide, where, and a value.
pub fn fuzz_platform(data: &[u8]) {
    let Some(spec) = spec() else { return };
    let Ok(ram) = GuestRam::below(MEMORY, MOVED_ECAM_START) else { return };
    let Ok(flash) = FlashMemory::new(&[0xff; FLASH], 4096) else { return };
    let power = Arc::new(Power::default());
    let vm = Arc::new(FakeVm::default());
    let plan = Plan { spec: &spec, ram: &ram, vm, power: &power, flash: Some(flash.clone()) };
    let Ok(devices) = plan.build(Arc::new(Deaf)) else { return };
    let places = [flash.start(), PCI_START, ECAM_START, MOVED_ECAM_START];
    let mut buffer = vec![];
    for access in data.as_chunks::<14>().0.iter().take(MOST) {
        let [what, wide, a0, a1, a2, a3, value @ ..] = *access;
        let len = 1usize << (wide & 3);
        let offset = u64::from(u32::from_le_bytes([a0, a1, a2, a3]));
        let (is_read, index) = (what & 1 == 0, usize::from(what >> 3));
        let mut read = [0; 8];
        match what >> 1 & 3 {
            0 => {
                let port = PORTS.get(index % (PORTS.len() + 1)).map_or(0, |port| u64::from(*port));
                let port = (port + offset) & 0xffff;
                if is_read {
                    devices.buses.ports.read(port, &mut read[..len]);
                } else {
                    devices.buses.ports.write(port, &value[..len]);
                }
            }
            1 => {
                let start = places.get(index % places.len()).map_or(0, |place| *place);
                let address = start + (offset & 0xff_ffff);
                if is_read {
                    devices.buses.memory.read(address, &mut read[..len]);
                } else {
                    devices.buses.memory.write(address, &value[..len]);
                }
            }
            // Past its end nothing is written.
            2 => drop(ram.write(offset & 0x1f_ffff, &value)),
            _ => devices.virtio.iter().for_each(|common| common.serve_queue(index % 3, &mut buffer)),
        }
    }
    devices.serial.flush();
    if let Some(firmware) = &devices.firmware {
        firmware.log.flush();
        let rows = firmware.screen.look().unwrap_or_default();
        assert!(rows.len() <= 25 && rows.iter().all(|row| row.chars().count() <= 80));
    }
    assert_eq!(flash.bytes().len(), FLASH);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_accesses(data in proptest::collection::vec(any::<u8>(), 0..14 * 64)) {
            fuzz_platform(&data);
        }
    }

    /// What the target is for: the flash is programmed, and a file is read into memory.
    #[test]
    fn the_devices_are_reached() {
        let access = |what: u8, wide: u8, at: u32, value: u64| {
            [&[what, wide][..], &at.to_le_bytes(), &value.to_le_bytes()].concat()
        };
        let config = 8 << 3;
        let input = [access(1 << 1 | 1, 0, 5, 0x10), access(config | 1, 1, 0, 0x19), access(config, 0, 1, 0)];
        fuzz_platform(&input.concat());
        assert_eq!(PORTS[8], firmware::PORT);
    }
}
