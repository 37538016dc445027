//! Fuzz bodies: any accesses to the bus, by ports, by memory, and to the devices' memory.

use std::sync::Arc;

use super::{ConfigPorts, Ecam, Function, HostBridge, PciBus, PciMemory};
use crate::bus::Registers;
use crate::memory::{GuestRam, PCI_START};
use crate::virtio::rng::Rng;
use crate::virtio::{PciPlace, VirtioPci};
use crate::vm::{FakeVm, Lines};

/// The input is a list of accesses, 14 bytes each: which way and how wide, where, and a value. A bus with a bridge
/// and a device; no answer may panic.
pub fn fuzz_pci(data: &[u8]) {
    let vm = Arc::new(FakeVm::default());
    let lines = Lines::new(Arc::clone(&vm) as _);
    let Ok(ram) = GuestRam::new(1 << 20) else { return };
    let place = PciPlace { address: 0, line: lines.line(17, 1), first_gsi: 24 };
    let Ok(rng) = VirtioPci::new(Arc::new(Rng), ram, vm, place) else { return };
    let functions: [Arc<dyn Function>; 2] = [Arc::new(HostBridge::default()), Arc::new(rng)];
    let bus = Arc::new(PciBus::new(functions.into_iter().map(Some).collect()));
    let ways: [(&dyn Registers, u64); 3] = [
        (&ConfigPorts(Arc::clone(&bus)), 0x7),
        (&Ecam(Arc::clone(&bus)), 0xf_ffff),
        (&PciMemory { bus, start: PCI_START }, 0x1fff_ffff),
    ];
    for access in data.as_chunks::<14>().0.iter().take(1024) {
        let [what, wide, a0, a1, a2, a3, value @ ..] = *access;
        let Some((way, mask)) = ways.get(usize::from(what >> 1) % 3) else { return };
        let offset = u64::from(u32::from_le_bytes([a0, a1, a2, a3])) & mask;
        let len = 1usize << (wide & 3);
        if what & 1 == 0 {
            way.read(offset, &mut [0; 8][..len]);
        } else {
            way.write(offset, &value[..len]);
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
        fn any_accesses(data in proptest::collection::vec(any::<u8>(), 0..8192)) {
            fuzz_pci(&data);
        }
    }
}
