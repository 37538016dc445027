//! What devices ask of the virtual machine: interrupt lines, messages, and notifications without an exit.
//!
//! KVM does these things in the machine that runs; a fake that writes everything down does them in tests.

use std::fmt::Debug;
use std::sync::Arc;

use block::Result;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt: what to write, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msi {
    /// The address, with the destination processor in it.
    pub address: u64,
    /// The data, with the vector in it.
    pub data: u32,
}

/// The machine as its devices see it.
pub trait Vm: Debug + Send + Sync {
    /// Drives an interrupt line of the PICs and the IOAPIC.
    fn set_line(&self, gsi: u32, high: bool);

    /// From now on an event on `fd` (attached to `gsi`, 24 and up, if it is not yet) sends this message.
    ///
    /// # Errors
    /// KVM refuses.
    fn route(&self, gsi: u32, message: Msi, fd: &EventFd) -> Result<()>;

    /// A write of the guest to `address` becomes an event on `fd`; `value`: only a 32-bit write of this value does.
    ///
    /// # Errors
    /// KVM refuses; the writes then arrive at the device as they are.
    fn attach_doorbell(&self, address: u64, value: Option<u32>, fd: &EventFd) -> Result<()>;

    /// Undoes [`attach_doorbell`](Self::attach_doorbell).
    fn detach_doorbell(&self, address: u64, value: Option<u32>, fd: &EventFd);

    /// Whether writes of `len` bytes to `port` may wait, in their order, until the guest exits for something else.
    fn coalesce(&self, port: u16, len: u8, on: bool) {
        let _ = (port, len, on);
    }

    /// Puts the flash of variables into the guest's address space, or takes it out, so that reads arrive at the device.
    fn show_flash(&self, shown: bool) {
        let _ = shown;
    }
}

/// Interrupt pins of the IOAPIC.
pub(crate) const PINS: usize = 24;

/// The interrupt lines, each of which several devices may pull.
#[derive(Debug)]
pub struct Lines {
    vm: Arc<dyn Vm>,
    /// For each pin, which devices pull it.
    pulled: Mutex<[u64; PINS]>,
}

impl Lines {
    /// All lines low.
    pub fn new(vm: Arc<dyn Vm>) -> Arc<Self> {
        Arc::new(Self { vm, pulled: Mutex::new([0; PINS]) })
    }

    /// The end of line `gsi` (below 24) at device number `source` (below 64).
    pub fn line(self: &Arc<Self>, gsi: u32, source: u8) -> Line {
        Line { lines: Arc::clone(self), gsi, bit: 1 << (source % 64) }
    }

    fn set(&self, gsi: u32, bit: u64, high: bool) {
        let mut pulled = self.pulled.lock();
        let Some(mask) = pulled.get_mut(gsi as usize) else { return };
        let before = *mask;
        *mask = if high { before | bit } else { before & !bit };
        if (before != 0) != (*mask != 0) {
            self.vm.set_line(gsi, *mask != 0);
        }
    }
}

/// A device's end of an interrupt line.
#[derive(Debug, Clone)]
pub struct Line {
    lines: Arc<Lines>,
    gsi: u32,
    bit: u64,
}

impl Line {
    /// Pulls it or lets it go.
    pub fn set(&self, high: bool) {
        self.lines.set(self.gsi, self.bit, high);
    }

    /// Its pin.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }
}

/// A machine for tests, which writes down what is asked of it.
#[derive(Debug, Default)]
pub struct FakeVm {
    /// Lines that are high.
    pub high: Mutex<std::collections::BTreeSet<u32>>,
    /// The messages by their number.
    pub routes: Mutex<std::collections::BTreeMap<u32, Msi>>,
    /// The doorbells.
    pub doorbells: Mutex<std::collections::BTreeSet<(u64, Option<u32>)>>,
    /// Whether the flash is out of the guest's address space.
    pub flash_hidden: Mutex<bool>,
}

impl Vm for FakeVm {
    fn set_line(&self, gsi: u32, high: bool) {
        let mut lines = self.high.lock();
        if high {
            lines.insert(gsi);
        } else {
            lines.remove(&gsi);
        }
    }

    fn route(&self, gsi: u32, message: Msi, _fd: &EventFd) -> Result<()> {
        self.routes.lock().insert(gsi, message);
        Ok(())
    }

    fn attach_doorbell(&self, address: u64, value: Option<u32>, _fd: &EventFd) -> Result<()> {
        self.doorbells.lock().insert((address, value));
        Ok(())
    }

    fn detach_doorbell(&self, address: u64, value: Option<u32>, _fd: &EventFd) {
        self.doorbells.lock().remove(&(address, value));
    }

    fn show_flash(&self, shown: bool) {
        *self.flash_hidden.lock() = !shown;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_line_stays_high_until_the_last_lets_go() {
        let vm = Arc::new(FakeVm::default());
        let lines = Lines::new(vm.clone());
        let (a, b) = (lines.line(16, 1), lines.line(16, 2));
        a.set(true);
        b.set(true);
        a.set(false);
        assert!(vm.high.lock().contains(&16));
        b.set(false);
        assert!(vm.high.lock().is_empty());
    }
}
