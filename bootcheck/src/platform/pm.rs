//! Power management registers (ACPI 6.5, section 4.8.3) and the reset port of PCI chipsets (0xcf9).

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::bus::{Registers, answer, number};
use crate::engine::Ending;
use crate::power::Power;

/// Where the registers lie.
pub(crate) const PM_BASE: u16 = 0x600;
/// How many ports they take.
pub(crate) const PM_LEN: u16 = 0x10;
/// The control block, from the base: 2 bytes.
pub(crate) const PM_CONTROL: u16 = 4;
/// The timer, from the base: 4 bytes.
pub(crate) const PM_TIMER: u16 = 8;
/// Our reset register, from the base: a byte that resets when it is 1.
pub(crate) const PM_RESET: u16 = 12;
/// `SLP_TYP` of `_S5`.
pub(crate) const PM_SLEEP_OFF: u8 = 5;
/// The same for firmware, which does not read the tables: SeaBIOS and OVMF know that of the machine that they are made
/// for.
const FIRMWARE_SLEEP_OFF: u8 = 0;
/// The interrupt of ACPI events.
pub(crate) const SCI: u16 = 9;
/// The reset control register of PCI chipsets.
pub(crate) const RESET_PORT: u16 = 0xcf9;

const TIMER_HZ: u128 = 3_579_545;
/// PM1 control: we are in ACPI mode; enter the sleep state.
const SCI_ENABLE: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;

/// The PM1 event and control registers, the timer, and the reset register.
#[derive(Debug)]
pub struct PowerManagement {
    power: Arc<Power>,
    start: Instant,
    enabled: Mutex<u16>,
}

impl PowerManagement {
    /// Registers that can end the machine.
    pub fn new(power: Arc<Power>) -> Self {
        Self { power, start: Instant::now(), enabled: Mutex::new(0) }
    }

    fn timer(&self) -> u32 {
        let ticks = self.start.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
        u32::try_from(ticks & 0xffff_ffff).unwrap_or(0)
    }

    fn control(&self, value: u16) {
        let kind = (value >> SLEEP_TYPE_SHIFT) & 7;
        let off = [PM_SLEEP_OFF, FIRMWARE_SLEEP_OFF].map(u16::from).contains(&kind);
        if value & SLEEP_ENABLE != 0 && off {
            self.power.end(Ending::PowerOff);
        }
    }
}

impl Registers for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            // Status: no event has ever happened.
            0..2 => 0,
            2 => u32::from(*self.enabled.lock()),
            4 => u32::from(SCI_ENABLE),
            8 => self.timer(),
            _ => 0,
        };
        answer(data, value);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let value = number(data);
        let low = u16::try_from(value & 0xffff).unwrap_or(0);
        match (offset, data.len()) {
            (2, 2) => *self.enabled.lock() = low,
            (4, 2 | 4) => self.control(low),
            // A write of the upper byte alone.
            (5, 1) => self.control(low << 8),
            (12, _) if low & 0xff == 1 => self.power.end(Ending::Reset { how: "ACPI" }),
            _ => {}
        }
    }
}

/// Port 0xcf9: bit 2 going up resets the processors.
#[derive(Debug)]
pub struct ResetPort {
    power: Arc<Power>,
}

impl ResetPort {
    /// A port that can reset the machine.
    pub fn new(power: Arc<Power>) -> Self {
        Self { power }
    }
}

impl Registers for ResetPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if number(data) & 4 != 0 {
            self.power.end(Ending::Reset { how: "port 0xcf9" });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_state_5_powers_off_and_no_other() {
        let power = Arc::new(Power::default());
        let pm = PowerManagement::new(power.clone());
        pm.write(4, &(SLEEP_ENABLE | 1 << 10).to_le_bytes());
        pm.write(4, &(5u16 << 10).to_le_bytes());
        assert!(!power.is_off());
        pm.write(4, &(SLEEP_ENABLE | 5 << 10).to_le_bytes());
        assert_eq!(power.ending(), Some(Ending::PowerOff));
    }

    #[test]
    fn firmware_powers_off_by_state_0() {
        let power = Arc::new(Power::default());
        let pm = PowerManagement::new(power.clone());
        let mut control = [0; 2];
        pm.read(4, &mut control);
        pm.write(4, &control);
        assert!(!power.is_off());
        pm.write(4, &(u16::from_le_bytes(control) | SLEEP_ENABLE).to_le_bytes());
        assert_eq!(power.ending(), Some(Ending::PowerOff));
    }

    #[test]
    fn resets_say_by_which_means() {
        let power = Arc::new(Power::default());
        ResetPort::new(power.clone()).write(0, &[2]);
        assert!(!power.is_off());
        PowerManagement::new(power.clone()).write(12, &[1]);
        assert_eq!(power.ending(), Some(Ending::Reset { how: "ACPI" }));
        let power = Arc::new(Power::default());
        ResetPort::new(power.clone()).write(0, &[6]);
        assert_eq!(power.ending(), Some(Ending::Reset { how: "port 0xcf9" }));
    }

    #[test]
    fn the_timer_runs() {
        let pm = PowerManagement::new(Arc::default());
        let read = || {
            let mut d = [0; 4];
            pm.read(8, &mut d);
            u32::from_le_bytes(d)
        };
        let before = read();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(read() - before > 7000);
    }
}
