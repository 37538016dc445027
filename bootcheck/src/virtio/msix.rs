//! MSI-X (PCI Local Bus Specification 3.0, section 6.8.2): a table of messages in the device's memory, each of which
//! KVM sends when its event descriptor is written to.

use std::sync::Arc;

use block::{Result, ResultExt as _};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{answer, number};
use crate::vm::{Msi, Vm};

const ENTRY_LEN: u64 = 16;
/// The guest wants no message of this vector.
const ENTRY_MASKED: u32 = 1;
/// Of the message control register: the capability is enabled; all vectors are masked.
pub(crate) const CONTROL_ENABLE: u16 = 0x8000;
const CONTROL_MASK: u16 = 0x4000;
/// Bits of the message control register that the guest writes.
pub(crate) const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_MASK;

#[derive(Debug)]
struct Entry {
    message: Msi,
    masked: bool,
    pending: bool,
    /// The message that KVM knows.
    routed: Option<Msi>,
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Msix {
    vm: Arc<dyn Vm>,
    /// The first of KVM's numbers for our vectors.
    first_gsi: u32,
    state: Mutex<State>,
}

impl Msix {
    /// A table of `vectors` whose messages have the numbers from `first_gsi`.
    pub(crate) fn new(vm: Arc<dyn Vm>, first_gsi: u32, vectors: u16) -> Result<Self> {
        let entry = |_| -> Result<Entry> {
            let event = EventFd::new(0).context(|| "cannot make an event descriptor".into())?;
            Ok(Entry { message: Msi::default(), masked: true, pending: false, routed: None, event })
        };
        let entries = (0..vectors).map(entry).collect::<Result<_>>()?;
        Ok(Self { vm, first_gsi, state: Mutex::new(State { entries, ..State::default() }) })
    }

    /// The guest has written the message control register.
    pub(crate) fn control(&self, control: u16) {
        let mut state = self.state.lock();
        state.enabled = control & CONTROL_ENABLE != 0;
        state.masked = control & CONTROL_MASK != 0;
        for index in 0..state.entries.len() {
            self.settle(&mut state, index);
        }
    }

    /// Whether messages take the place of the interrupt line.
    pub(crate) fn enabled(&self) -> bool {
        self.state.lock().enabled
    }

    /// Sends the message of a vector, now or when it is unmasked.
    pub(crate) fn fire(&self, vector: u16) {
        let mut state = self.state.lock();
        let index = usize::from(vector);
        if let Some(entry) = state.entries.get_mut(index) {
            entry.pending = true;
            self.settle(&mut state, index);
        }
    }

    /// Makes KVM know the message of a vector that may be sent, and sends what is pending.
    fn settle(&self, state: &mut State, index: usize) {
        let open = state.enabled && !state.masked;
        let Some(entry) = state.entries.get_mut(index).filter(|e| open && !e.masked) else { return };
        if entry.routed != Some(entry.message) {
            let gsi = self.first_gsi.saturating_add(u32::try_from(index).unwrap_or(0));
            // A message that KVM cannot send (an address that is no interrupt) is lost, as on a real bus.
            if self.vm.route(gsi, entry.message, &entry.event).is_ok() {
                entry.routed = Some(entry.message);
            }
        }
        if std::mem::take(&mut entry.pending) && entry.routed == Some(entry.message) {
            let _ = entry.event.write(1);
        }
    }

    /// Reads the table.
    pub(crate) fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let bytes = usize::try_from(offset / ENTRY_LEN).ok().and_then(|i| state.entries.get(i)).map(render);
        let at = block::num::to_usize(offset % ENTRY_LEN);
        for (i, slot) in data.iter_mut().enumerate() {
            *slot = bytes.and_then(|b| b.get(at + i).copied()).unwrap_or(0);
        }
    }

    /// Writes the table: 4 or 8 aligned bytes.
    pub(crate) fn table_write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let Ok(index) = usize::try_from(at / ENTRY_LEN) else { return };
            let Some(entry) = state.entries.get_mut(index) else { return };
            let (value, address) = (number(word), entry.message.address);
            match at % ENTRY_LEN {
                0 => entry.message.address = address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.message.address = address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.message.data = value,
                12 => entry.masked = value & ENTRY_MASKED != 0,
                _ => {}
            }
            self.settle(&mut state, index);
        }
    }

    /// Reads the pending bits.
    pub(crate) fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let bits = state.entries.iter().take(32).rev().fold(0, |bits, e| bits << 1 | u32::from(e.pending));
        answer(data, if offset == 0 { bits } else { 0 });
    }
}

fn render(entry: &Entry) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&entry.message.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
    bytes[12] = u8::from(entry.masked);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::FakeVm;

    fn program(msix: &Msix, vector: u64, masked: u32) {
        let base = vector * ENTRY_LEN;
        msix.table_write(base, &0xfee0_0000_u64.to_le_bytes());
        msix.table_write(base + 8, &0x41u32.to_le_bytes());
        msix.table_write(base + 12, &masked.to_le_bytes());
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let vm = Arc::new(FakeVm::default());
        let msix = Msix::new(vm.clone(), 24, 2).unwrap();
        msix.control(CONTROL_ENABLE);
        program(&msix, 1, 1);
        msix.fire(1);
        assert!(vm.routes.lock().is_empty());
        let mut bits = [0; 4];
        msix.pending_read(0, &mut bits);
        assert_eq!(bits, [2, 0, 0, 0]);
        program(&msix, 1, 0);
        assert_eq!(vm.routes.lock()[&25], Msi { address: 0xfee0_0000, data: 0x41 });
        assert_eq!(msix.state.lock().entries[1].event.read().unwrap(), 1);
        msix.pending_read(0, &mut bits);
        assert_eq!(bits, [0; 4]);
    }

    #[test]
    fn the_table_reads_back_and_ends() {
        let msix = Msix::new(Arc::new(FakeVm::default()), 24, 1).unwrap();
        program(&msix, 0, 0);
        program(&msix, 7, 0);
        let mut data = [0; 8];
        msix.table_read(8, &mut data);
        assert_eq!(data, [0x41, 0, 0, 0, 0, 0, 0, 0]);
        msix.table_read(16, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
