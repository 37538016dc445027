//! The host bridge at 00:00.0 and the bridge to the old devices at 00:1f.0: Intel chips as far as firmware knows them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::{ConfigSpace, Function, Identity};
use crate::engine::Ending;
use crate::memory::ECAM_START;
use crate::platform::PM_BASE;
use crate::power::Power;

/// `PCIEXBAR` of the Q35: where the memory-mapped configuration space lies.
const OFFSET_PCIEXBAR: usize = 0x60;
/// The size of the memory of system management mode as QEMU's Q35 tells it, to those who write 0xffff.
const OFFSET_EXT_TSEG: usize = 0x50;
const NO_MANAGEMENT_MODE: &str = "this firmware is built for system management mode (Secure Boot), which this machine \
    does not have; one without it, like OVMF_CODE_4M.fd, can use the same variables";
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
    /// Where firmware wants the memory-mapped configuration space; 0: nowhere.
    ecam: AtomicU64,
    /// Whom to tell of firmware that cannot go on here.
    power: Option<Arc<Power>>,
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
            config.allow(OFFSET_PCIEXBAR, &0xf_f000_0007_u64.to_le_bytes());
        }
        config.allow(pam, &[0xff; 7]);
        Self { config: Mutex::new(config), ecam: AtomicU64::new(0), power: None }
    }

    /// The same, which ends the machine when its firmware cannot go on.
    #[must_use]
    pub(crate) fn with_power(self, power: Arc<Power>) -> Self {
        Self { power: Some(power), ..self }
    }

    /// A firmware that is built for system management mode begins by asking how much memory that has; it would wait
    /// for ever for what is not there.
    fn refuse_management_mode(&self) {
        if let Some(power) = &self.power {
            power.end(Ending::Stuck { reason: NO_MANAGEMENT_MODE.to_owned() });
        }
    }

    /// Where the firmware has put the memory-mapped configuration space, if it has.
    pub(crate) fn ecam(&self) -> Option<u64> {
        Some(self.ecam.load(Ordering::Acquire)).filter(|address| *address != 0)
    }

    /// Takes up `PCIEXBAR`: enabled by bit 0, in steps of 256 MiB (a shorter one may lie between).
    fn place_ecam(&self, config: &ConfigSpace) {
        let mut register = [0; 8];
        config.read(OFFSET_PCIEXBAR.to_le_bytes()[0], &mut register);
        let register = u64::from_le_bytes(register);
        let address = if register & 1 != 0 { register & 0xf_f000_0000 } else { 0 };
        self.ecam.store(address, Ordering::Release);
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
        let mut config = self.config.lock();
        config.write(offset, data);
        if usize::from(offset) < OFFSET_PCIEXBAR + 8 && usize::from(offset) + data.len() > OFFSET_PCIEXBAR {
            self.place_ecam(&config);
        }
        if usize::from(offset) == OFFSET_EXT_TSEG && data == [0xff; 2] {
            self.refuse_management_mode();
        }
    }

    fn window(&self) -> Option<(u64, u64)> {
        None
    }

    fn memory_read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn memory_write(&self, _offset: u64, _data: &[u8]) {}
}

/// The slot in which UEFI firmware looks for the bridge to the old devices.
pub(crate) const LPC_SLOT: usize = 31;

/// Registers of the bridge (Intel ICH9 data sheet, section 13.1): where power management is, whether it is on,
/// the interrupts of PCI's lines at the PICs, and where the chip's own memory is (there is none).
const OFFSET_PMBASE: usize = 0x40;
const OFFSET_ACPI_CNTL: usize = 0x44;
const OFFSETS_PIRQ: [usize; 2] = [0x60, 0x68];
const OFFSET_RCBA: usize = 0xf0;
const PMBASE_IO: u32 = 1;
const ACPI_ENABLE: u8 = 0x80;
const PIRQ_OFF: u8 = 0x80;

/// The ICH9's bridge to what was the ISA bus: how UEFI firmware finds timer and serial port.
#[derive(Debug)]
pub struct LpcBridge {
    config: Mutex<ConfigSpace>,
}

impl Default for LpcBridge {
    fn default() -> Self {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: (6, 1, 0),
            subsystem: (0x1af4, 0x1100),
            interrupt: false,
        });
        // Both are as they will stay: firmware that finds them set up leaves them so.
        config.put(OFFSET_PMBASE, &(u32::from(PM_BASE) | PMBASE_IO).to_le_bytes());
        config.put(OFFSET_ACPI_CNTL, &[ACPI_ENABLE]);
        for pirq in OFFSETS_PIRQ {
            config.put(pirq, &[PIRQ_OFF; 4]);
            config.allow(pirq, &[0x8f; 4]);
        }
        config.allow(OFFSET_RCBA, &0xffff_c001_u32.to_le_bytes());
        Self { config: Mutex::new(config) }
    }
}

impl Function for LpcBridge {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn register(function: &dyn Function, offset: u8) -> u32 {
        let mut data = [0; 4];
        function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn power_management_is_where_firmware_is_told_and_stays_there() {
        let bridge = LpcBridge::default();
        assert_eq!(register(&bridge, 0), 0x2918_8086);
        assert_eq!(register(&bridge, 8) >> 16, 0x0601);
        bridge.config_write(0x40, &0xb001_u32.to_le_bytes());
        bridge.config_write(0x44, &[0]);
        assert_eq!((register(&bridge, 0x40), register(&bridge, 0x44) & 0xff), (0x601, 0x80));
        bridge.config_write(0x60, &[0x0a]);
        assert_eq!(register(&bridge, 0x60), 0x8080_800a);
    }

    #[test]
    fn firmware_for_system_management_mode_is_told_apart() {
        let power = Arc::new(Power::default());
        let bridge = HostBridge::new(Chip::Q35).with_power(Arc::clone(&power));
        for (offset, data) in [(0x50, &[0xff; 1][..]), (0x50, &[0, 0]), (0x52, &[0xff, 0xff])] {
            bridge.config_write(offset, data);
        }
        assert!(!power.is_off());
        bridge.config_write(0x50, &[0xff, 0xff]);
        assert!(matches!(power.ending(), Some(Ending::Stuck { reason }) if reason.contains("Secure Boot")));
    }

    #[test]
    fn configuration_memory_is_where_the_q35_says() {
        let bridge = HostBridge::new(Chip::Q35);
        assert_eq!(u64::from(register(&bridge, 0x60)), ECAM_START | 5);
        assert_eq!(bridge.ecam(), None, "nobody has put it anywhere else");
        bridge.config_write(0x64, &[0; 4]);
        bridge.config_write(0x60, &0xb000_0001_u32.to_le_bytes());
        assert_eq!(bridge.ecam(), Some(0xb000_0000));
        bridge.config_write(0x60, &[0]);
        assert_eq!(bridge.ecam(), None);
        assert_eq!(register(&HostBridge::new(Chip::I440fx), 0), 0x1237_8086);
    }
}
