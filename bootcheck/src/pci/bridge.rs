//! The host bridge at 00:00.0: an Intel chip as far as firmware knows it.

use parking_lot::Mutex;

use super::{ConfigSpace, Function, Identity};
use crate::memory::ECAM_START;

/// `PCIEXBAR` of the Q35: where the memory-mapped configuration space lies.
const OFFSET_PCIEXBAR: usize = 0x60;
/// Programmable attribute map: whether the segments below 1 MiB are memory or ROM. They are memory; firmware
/// finds the registers and may write them.
const OFFSET_PAM0: usize = 0x90;

/// The same of the i440FX.
const OFFSET_PAM0_I440FX: usize = 0x59;

/// Which chip the bridge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Chip {
    /// Intel Q35: PCI Express.
    #[default]
    Q35,
    /// Intel 440FX, which BIOSes know best: they leave the memory-mapped configuration space where it is.
    I440fx,
}

/// The bridge.
#[derive(Debug)]
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// A bridge.
    pub fn new(chip: Chip) -> Self {
        let (device, pam) = match chip {
            Chip::Q35 => (0x29c0, OFFSET_PAM0),
            Chip::I440fx => (0x1237, OFFSET_PAM0_I440FX),
        };
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device,
            revision: 2,
            class: (6, 0, 0),
            subsystem: (0x1af4, 0x1100),
            interrupt: false,
        });
        if chip == Chip::Q35 {
            // Enabled, 64 MiB decoded: the shortest that the register can say.
            config.put(OFFSET_PCIEXBAR, &(ECAM_START | 2 << 1 | 1).to_le_bytes());
        }
        config.allow(pam, &[0xff; 7]);
        Self { config: Mutex::new(config) }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new(Chip::default())
    }
}

impl Function for HostBridge {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        self.config.lock().read(offset, data);
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        self.config.lock().write(offset, data);
    }

    fn window(&self) -> Option<(u64, u64)> {
        None
    }

    fn memory_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn memory_write(&self, _offset: u64, _data: &[u8]) {}
}
