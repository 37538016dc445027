//! Fuzz bodies: a hostile driver in front of queues and registers. None may panic, hang or allocate without bound.

use std::sync::Arc;

use block::mem::MemStorage;
use block::raw::{Raw, RawOptions};

use super::blk::Blk;
use super::{Common, Device, Interrupt, PciPlace, VirtioMmio, VirtioPci};
use crate::bus::Registers as _;
use crate::engine::Disk;
use crate::memory::{GuestRam, PCI_START};
use crate::pci::Function;
use crate::vm::{FakeVm, Lines};

#[derive(Debug)]
struct Deaf;

impl Interrupt for Deaf {
    fn queue(&self, _index: u16) {}
    fn config(&self) {}
}

fn disk() -> Option<Disk> {
    let storage = Arc::new(MemStorage::from_bytes(vec![0; 64 << 10]));
    let device = Arc::new(Raw::open(storage, RawOptions::default()).ok()?);
    Some(Disk { device, read_only: false, serial: "fuzz".to_owned() })
}

/// The input is guest memory from address 0, after 26 bytes that say where the rings are, their size and which
/// features are accepted: a block device serves what it finds.
pub fn fuzz_virtio_queue(data: &[u8]) {
    let Some((setup, memory)) = data.split_first_chunk::<26>() else { return };
    let (Ok(ram), Some(disk)) = (GuestRam::new(1 << 20), disk()) else { return };
    if ram.write(0, memory.get(..1 << 20).unwrap_or(memory)).is_err() {
        return;
    }
    let Ok(common) = Common::new(Arc::new(Blk::new(disk, 1)), ram, Arc::new(Deaf)) else { return };
    let [a, b, c, size, flags] = [&setup[..8], &setup[8..16], &setup[16..24], &setup[24..25], &setup[25..26]]
        .map(|b| b.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b)));
    common.select_driver_features(0);
    let mut accepted = common.features() & 0xffff_ffff;
    if flags & 1 != 0 {
        accepted &= !super::F_EVENT_IDX;
    }
    common.set_driver_features(block::num::low_u32(accepted));
    common.select_driver_features(1);
    common.set_driver_features(1);
    common.set_status(11);
    if let Some(mut queue) = common.selected_queue() {
        // Anywhere, but mostly where there is memory.
        let place = |address: u64| if flags & 2 == 0 { address & 0xf_ffff } else { address };
        (queue.descriptors, queue.driver, queue.device) = (place(a), place(b), place(c));
        queue.set_size(1 << (size & 7));
        queue.enabled = true;
    }
    common.set_status(15);
    let mut buffer = vec![];
    common.serve_queue(0, &mut buffer);
    common.set_status(0);
    common.serve_queue(0, &mut buffer);
}

/// The input is a list of accesses, 12 bytes each: what and how wide, where, and a value; to a block device on PCI
/// (its configuration space and its memory) and to one behind registers.
pub fn fuzz_virtio_registers(data: &[u8]) {
    let vm = Arc::new(FakeVm::default());
    let lines = Lines::new(Arc::clone(&vm) as _);
    let (Ok(ram), Some(first), Some(second)) = (GuestRam::new(1 << 20), disk(), disk()) else { return };
    let _ = ram.write(0, data.get(..1 << 16).unwrap_or(data));
    let place =
        PciPlace { address: u32::try_from(PCI_START).unwrap_or(0), line: lines.line(16, 1), first_gsi: 24 };
    let device = |disk| Arc::new(Blk::new(disk, 2)) as Arc<dyn Device>;
    let pci = VirtioPci::new(device(first), ram.clone(), Arc::clone(&vm) as _, place);
    let mmio = VirtioMmio::new(device(second), ram, vm, 0xfeb0_0000, lines.line(17, 2));
    let (Ok(pci), Ok(mmio)) = (pci, mmio) else { return };
    let mut buffer = vec![];
    for access in data.as_chunks::<12>().0.iter().take(512) {
        let [what, wide, o0, o1, value @ ..] = *access;
        let offset = u64::from(u16::from_le_bytes([o0, o1]));
        let len = 1usize << (wide & 3);
        let (mut read, register) = ([0; 8], o0.min(u8::try_from(256 - len).unwrap_or(u8::MAX)));
        match what % 8 {
            0 => pci.config_read(register, &mut read[..len]),
            1 => pci.config_write(register, &value[..len]),
            2 => pci.memory_read(offset % 0x8000, &mut read[..len]),
            3 => pci.memory_write(offset % 0x8000, &value[..len]),
            4 => mmio.read(offset % 0x1000, &mut read[..len]),
            5 => mmio.write(offset % 0x1000, &value[..len]),
            6 => pci.common().serve_queue(usize::from(wide & 1), &mut buffer),
            _ => mmio.common().serve_queue(usize::from(wide & 1), &mut buffer),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn any_guest_memory(data in proptest::collection::vec(any::<u8>(), 0..4096)) {
            fuzz_virtio_queue(&data);
        }

        #[test]
        fn any_accesses(data in proptest::collection::vec(any::<u8>(), 0..4096)) {
            fuzz_virtio_registers(&data);
        }
    }

    /// Found by hand: a status of "ready" without the features settled, queues that were never set up.
    #[test]
    fn a_driver_that_skips_all_steps() {
        let mut data = vec![];
        data.extend([3, 0, 20, 0, 15, 0, 0, 0, 0, 0, 0, 0]);
        data.extend([3, 1, 28, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        data.extend([6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        fuzz_virtio_registers(&data);
    }
}
