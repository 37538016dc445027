//! The clock and its battery-backed bytes (Motorola MC146818, as the PC has it at ports 0x70 and 0x71).
//!
//! The time is the host's, in UTC, and cannot be set. There is no alarm and no periodic interrupt: guests have
//! better clocks.

use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::bus::Registers;
use crate::memory::{GuestRam, HIGH_START};

/// Status register B: 24-hour mode; BCD as long as bit 2 is clear.
const STATUS_B: u8 = 0x02;
const BINARY: u8 = 0x04;
/// Status register D: the battery is good.
const STATUS_D: u8 = 0x80;
/// 16 MiB: the memory above this counts in 64 KiB units, the rest in KiB.
const SIXTEEN_MIB: u64 = 16 << 20;

/// The clock.
#[derive(Debug)]
pub struct Cmos {
    state: Mutex<State>,
    now: fn() -> SystemTime,
}

#[derive(Debug)]
struct State {
    index: u8,
    bytes: [u8; 128],
}

impl Cmos {
    /// A clock whose other bytes say how much memory there is, where firmware looks for it.
    pub fn new(ram: &GuestRam, cpus: u8) -> Self {
        let mut bytes = [0; 128];
        let low = ram.low_end();
        let put = |bytes: &mut [u8; 128], at: usize, value: u64| {
            let value = value.to_le_bytes();
            bytes[at] = value[0];
            bytes[at + 1] = value[1];
        };
        put(&mut bytes, 0x15, 640);
        let extended = (low.saturating_sub(1 << 20) >> 10).min(0xffff);
        put(&mut bytes, 0x17, extended);
        put(&mut bytes, 0x30, extended);
        put(&mut bytes, 0x34, (low.saturating_sub(SIXTEEN_MIB) >> 16).min(0xffff));
        let high = (ram.high_len() >> 16).to_le_bytes();
        bytes[0x5b..0x5e].copy_from_slice(&high[..3]);
        bytes[0x5f] = cpus.saturating_sub(1);
        bytes[0x0a] = 0x26;
        bytes[0x0b] = STATUS_B;
        bytes[0x0d] = STATUS_D;
        debug_assert!(ram.high_len() == 0 || low < HIGH_START);
        Self { state: Mutex::new(State { index: 0, bytes }), now: SystemTime::now }
    }

    fn value(&self, state: &State) -> u8 {
        let binary = state.bytes[0x0b] & BINARY != 0;
        let encode = |n: u64| {
            let n = u8::try_from(n).unwrap_or(0);
            if binary { n } else { ((n / 10) << 4) | (n % 10) }
        };
        let seconds = (self.now)().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let date = Date::of(seconds / 86400);
        match state.index {
            0 => encode(seconds % 60),
            2 => encode(seconds / 60 % 60),
            4 => encode(seconds / 3600 % 24),
            6 => encode((seconds / 86400 + 4) % 7 + 1),
            7 => encode(date.day),
            8 => encode(date.month),
            9 => encode(date.year % 100),
            0x32 => encode(date.year / 100),
            // No interrupt has ever been pending.
            0x0c => 0,
            index => state.bytes.get(usize::from(index)).copied().unwrap_or(0xff),
        }
    }
}

/// A day of the proleptic Gregorian calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Date {
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    /// The date `days` after 1970-01-01, counted in years that begin in March, so that the leap day comes last.
    fn of(days: u64) -> Self {
        let days = days + 719_468;
        let era_day = days % 146_097;
        let era_year = (era_day - era_day / 1460 + era_day / 36_524 - era_day / 146_096) / 365;
        let year_day = era_day - (365 * era_year + era_year / 4 - era_year / 100);
        let shifted_month = (5 * year_day + 2) / 153;
        let day = year_day - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = era_year + days / 146_097 * 400 + u64::from(month <= 2);
        Self { year, month, day }
    }
}

impl Registers for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        data.fill(0xff);
        if let [first, ..] = data {
            *first = if offset == 0 { state.index } else { self.value(&state) };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        for (i, &byte) in (0..).zip(data) {
            match offset + i {
                // Bit 7 masks the NMI; there is none.
                0 => state.index = byte & 0x7f,
                1 => {
                    let index = usize::from(state.index);
                    // The clock is the host's; status C and D cannot be written.
                    if !matches!(index, 0..=9 | 0x0c | 0x0d | 0x32)
                        && let Some(slot) = state.bytes.get_mut(index)
                    {
                        *slot = if index == 0x0a { byte & 0x7f } else { byte };
                    }
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn clock(seconds: fn() -> SystemTime) -> Cmos {
        Cmos { now: seconds, ..Cmos::new(&GuestRam::new(64 << 20).unwrap(), 2) }
    }

    fn get(cmos: &Cmos, index: u8) -> u8 {
        let mut data = [0];
        cmos.write(0, &[index]);
        cmos.read(1, &mut data);
        data[0]
    }

    #[test]
    fn the_time_is_the_hosts_in_bcd() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let cmos = clock(|| UNIX_EPOCH + Duration::from_secs(1_709_251_198));
        let time = [0, 2, 4, 6, 7, 8, 9, 0x32].map(|i| get(&cmos, i));
        assert_eq!(time, [0x58, 0x59, 0x23, 5, 0x29, 0x02, 0x24, 0x20]);
    }

    #[test]
    fn firmware_finds_the_memory() {
        let cmos = clock(|| UNIX_EPOCH);
        assert_eq!([get(&cmos, 0x34), get(&cmos, 0x35)], 768u16.to_le_bytes());
        assert_eq!(get(&cmos, 0x5f), 1);
    }

    #[test]
    fn dates_follow_the_calendar() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (59, (1970, 3, 1)),
            (11_016, (2000, 2, 29)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            let d = Date::of(days);
            assert_eq!((d.year, d.month, d.day), date);
        }
    }
}
