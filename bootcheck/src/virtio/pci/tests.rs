use std::collections::BTreeMap;

use super::*;
use crate::virtio::common::{STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET};
use crate::virtio::driver::{AVAILABLE, DESCRIPTORS, Driver, USED};
use crate::virtio::rng::Rng;
use crate::vm::{FakeVm, Lines, Msi};

const ADDRESS: u32 = 0xc000_8000;

struct Bench {
    vm: Arc<FakeVm>,
    ram: GuestRam,
    pci: VirtioPci,
}

fn bench() -> Bench {
    let vm = Arc::new(FakeVm::default());
    let ram = GuestRam::new(1 << 20).unwrap();
    let place = PciPlace { address: ADDRESS, line: Lines::new(vm.clone()).line(17, 1), first_gsi: 24 };
    Bench { pci: VirtioPci::new(Arc::new(Rng), ram.clone(), vm.clone(), place).unwrap(), vm, ram }
}

impl Bench {
    fn config(&self, offset: u8) -> u32 {
        let mut data = [0; 4];
        self.pci.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn get(&self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.pci.memory_read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    fn put(&self, offset: u64, len: usize, value: u32) {
        self.pci.memory_write(offset, &value.to_le_bytes()[..len]);
    }

    /// The capabilities: id (for the vendor's: 0x100 and its type) and offset.
    fn capabilities(&self) -> BTreeMap<u32, u8> {
        let mut found = BTreeMap::new();
        let mut at = self.config(0x34).to_le_bytes()[0];
        while at != 0 {
            let [id, next, _, kind] = self.config(at).to_le_bytes();
            let id = if id == CAP_VENDOR { 0x100 | u32::from(kind) } else { u32::from(id) };
            assert_eq!(found.insert(id, at), None);
            at = next;
        }
        found
    }

    /// The driver's side of section 3.1.1, up to the end.
    fn start(&self) {
        self.put(20, 1, 1);
        self.put(20, 1, 3);
        for word in 0..2 {
            self.put(0, 4, word);
            let features = self.get(4, 4);
            self.put(8, 4, word);
            self.put(12, 4, features);
        }
        self.put(20, 1, 11);
        assert_eq!(self.get(20, 1), 11);
        self.put(22, 2, 0);
        assert_eq!(self.get(24, 2), 64);
        self.put(24, 2, 16);
        for (at, address) in [(32, DESCRIPTORS), (40, AVAILABLE), (48, USED)] {
            self.put(at, 4, u32::try_from(address).unwrap());
            self.put(at + 4, 4, 0);
        }
        self.put(28, 2, 1);
        self.put(20, 1, 15);
    }

    fn serve(&self) {
        self.pci.common.serve_queue(0, &mut vec![]);
    }
}

#[test]
fn the_structures_are_found_by_their_capabilities() {
    let b = bench();
    assert_eq!(b.config(0), 0x1044_1af4);
    assert_eq!(b.config(8) & 0xff, 1, "modern");
    assert_eq!(b.config(0x10), ADDRESS);
    let capabilities = b.capabilities();
    assert_eq!(capabilities.keys().copied().collect::<Vec<_>>(), [0x11, 0x101, 0x102, 0x103, 0x104, 0x105]);
    for (kind, offset) in [(0x101, COMMON), (0x103, ISR), (0x104, DEVICE), (0x102, NOTIFY)] {
        let at = capabilities[&kind];
        assert_eq!(u64::from(b.config(at + 8)), offset);
        assert_eq!(b.config(at + 4) & 0xff, 0, "BAR 0");
    }
    assert_eq!(b.config(capabilities[&0x102] + 16), NOTIFY_STEP);
    assert_eq!(b.config(capabilities[&0x11]) >> 16, 1, "two vectors");
}

#[test]
fn a_driver_that_does_it_right_gets_randomness_and_an_interrupt_on_the_line() {
    let b = bench();
    b.start();
    assert_eq!(b.vm.doorbells.lock().iter().next(), Some(&(u64::from(ADDRESS) + NOTIFY, None)));
    let mut driver = Driver::new(b.ram.clone(), 16);
    driver.chain(&[(0x9000, 32, true)]);
    b.serve();
    assert_eq!(driver.returned(), [(0, 32)]);
    assert_ne!(driver.get(0x9000, 32), [0; 32]);
    assert!(b.vm.high.lock().contains(&17));
    assert_eq!(b.config(4) >> 16 & u32::from(STATUS_INTERRUPT), u32::from(STATUS_INTERRUPT));
    assert_eq!(b.get(ISR, 1), 1);
    assert!(b.vm.high.lock().is_empty(), "acknowledged");
    assert_eq!(b.get(ISR, 1), 0);
}

#[test]
fn a_disabled_line_is_not_pulled() {
    let b = bench();
    b.pci.config_write(4, &(COMMAND_MEMORY | COMMAND_INTX_DISABLE).to_le_bytes());
    b.pci.interrupt.queue(0);
    assert!(b.vm.high.lock().is_empty());
    b.pci.config_write(4, &COMMAND_MEMORY.to_le_bytes());
    assert!(b.vm.high.lock().contains(&17));
}

#[test]
fn messages_take_the_place_of_the_line() {
    let b = bench();
    let msix = b.capabilities()[&0x11];
    b.pci.config_write(msix + 2, &0x8000u16.to_le_bytes());
    for vector in 0..2u32 {
        let entry = TABLE + 16 * u64::from(vector);
        b.put(entry, 4, 0xfee0_1000);
        b.put(entry + 8, 4, 0x50 + vector);
        b.put(entry + 12, 4, 0);
    }
    b.put(16, 2, 0);
    b.put(26, 2, 1);
    assert_eq!((b.get(16, 2), b.get(26, 2)), (0, 1));
    assert_eq!(b.vm.routes.lock()[&25], Msi { address: 0xfee0_1000, data: 0x51 });
    b.pci.interrupt.queue(0);
    assert!(b.vm.high.lock().is_empty());
    assert_eq!(b.get(ISR, 1), 0);
    b.put(26, 2, 2);
    assert_eq!(b.get(26, 2), u32::from(NO_VECTOR), "a vector that does not exist");
}

#[test]
fn the_window_moves_and_the_doorbells_with_it() {
    let b = bench();
    b.start();
    b.pci.config_write(4, &0u16.to_le_bytes());
    assert_eq!(b.pci.window(), None);
    assert!(b.vm.doorbells.lock().is_empty());
    b.pci.config_write(0x10, &[0xff; 4]);
    assert_eq!(b.config(0x10), !(BAR_LEN - 1));
    b.pci.config_write(0x10, &0xd000_0000u32.to_le_bytes());
    b.pci.config_write(4, &COMMAND_MEMORY.to_le_bytes());
    assert_eq!(b.pci.window(), Some((0xd000_0000, u64::from(BAR_LEN))));
    assert!(b.vm.doorbells.lock().contains(&(0xd000_0000 + NOTIFY, None)));
}

#[test]
fn configuration_space_is_a_way_into_the_window() {
    let b = bench();
    let at = b.capabilities()[&0x105];
    let access = |offset: u32, len: u32| {
        b.pci.config_write(at + 8, &offset.to_le_bytes());
        b.pci.config_write(at + 12, &len.to_le_bytes());
    };
    access(20, 1);
    b.pci.config_write(at + 16, &[1]);
    assert_eq!(b.get(20, 1), 1);
    assert_eq!(b.config(at + 16) & 0xff, 1);
    access(18, 2);
    assert_eq!(b.config(at + 16) & 0xffff, 1, "one queue");
    for (offset, len) in [(BAR_LEN, 1), (u32::MAX, 4), (0, 3), (1, 4), (0, 0)] {
        access(offset, len);
        b.pci.config_write(at + 16, &[0; 4]);
    }
    assert_eq!(b.get(20, 1), 1, "nothing happened");
}

#[test]
fn a_reset_forgets_everything() {
    let b = bench();
    b.start();
    b.pci.interrupt.queue(0);
    b.put(16, 2, 1);
    b.put(20, 1, 0);
    assert_eq!(
        (b.get(20, 1), b.get(16, 2), b.get(26, 2), b.get(28, 2), b.get(24, 2)),
        (0, 0xffff, 0xffff, 0, 64)
    );
    assert!(b.vm.high.lock().is_empty());
    b.start();
}

#[test]
fn a_queue_that_does_not_exist_has_no_size() {
    let b = bench();
    b.put(22, 2, 7);
    assert_eq!((b.get(22, 2), b.get(24, 2), b.get(28, 2)), (7, 0, 0));
    b.put(24, 2, 4);
    b.put(28, 2, 1);
    b.put(26, 2, 0);
    b.pci.memory_write(NOTIFY + 28, &[7, 0]);
}

#[test]
fn rings_outside_memory_need_a_reset() {
    let b = bench();
    b.start();
    b.put(44, 4, 0xffff_ffff);
    b.serve();
    let wanted = STATUS_NEEDS_RESET | STATUS_DRIVER_OK | STATUS_FEATURES_OK | 3;
    assert_eq!(b.get(20, 1), u32::from(wanted));
    assert_eq!(b.get(21, 1), 1, "generation");
    assert_eq!(b.get(ISR, 1), 2);
}
