//! Who answers at which port and at which address.

use std::fmt::Debug;
use std::sync::Arc;

/// A device with registers. Accesses are 1, 2, 4 or 8 bytes long.
pub trait Registers: Debug + Send + Sync {
    /// Fills `data` from the register at `offset` from the device's base.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the register at `offset` from the device's base.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Devices by range, for ports or for memory.
#[derive(Debug, Default)]
pub struct Bus {
    /// First address, length, device; sorted. A range may lie within another.
    ranges: Vec<(u64, u64, Arc<dyn Registers>)>,
}

impl Bus {
    /// Puts `device` at `len` addresses from `start`, in front of ranges around it.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn Registers>) {
        let at = self.ranges.partition_point(|r| r.0 <= start);
        self.ranges.insert(at, (start, len, device));
    }

    /// The device at an address: the one whose range begins last, where ranges lie within each other.
    fn find(&self, address: u64) -> Option<(u64, &Arc<dyn Registers>)> {
        let at = self.ranges.partition_point(|r| r.0 <= address);
        self.ranges.get(..at)?.iter().rev().find_map(|(start, len, device)| {
            let offset = address - start;
            (offset < *len).then_some((offset, device))
        })
    }

    /// A read of the guest; ones where nobody answers.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A write of the guest; lost where nobody listens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }
}

/// The number in the first (at most four) bytes of an access.
pub(crate) fn number(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |n, &b| n << 8 | u32::from(b))
}

/// Fills an access from a number; bytes past the fourth are zero.
pub(crate) fn answer(data: &mut [u8], value: u32) {
    let bytes = value.to_le_bytes();
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(i).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Echo(u8);

    impl Registers for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn the_device_of_the_range_answers_and_nobody_elsewhere() {
        let mut bus = Bus::default();
        bus.insert(0x70, 2, Arc::new(Echo(0x10)));
        bus.insert(0x3f8, 8, Arc::new(Echo(0x20)));
        bus.insert(0xcf8, 8, Arc::new(Echo(0x30)));
        bus.insert(0xcf9, 1, Arc::new(Echo(0x40)));
        let read = |at| {
            let mut data = [0];
            bus.read(at, &mut data);
            data[0]
        };
        assert_eq!([read(0x6f), read(0x70), read(0x71), read(0x72)], [0xff, 0x10, 0x11, 0xff]);
        assert_eq!([read(0x3ff), read(0x400), read(0)], [0x27, 0xff, 0xff]);
        assert_eq!([read(0xcf8), read(0xcf9), read(0xcfc)], [0x30, 0x40, 0x34], "one within another");
    }

    #[test]
    fn numbers_are_little_endian() {
        assert_eq!(number(&[1, 2]), 0x0201);
        let mut data = [9; 8];
        answer(&mut data, 0x0403_0201);
        assert_eq!(data, [1, 2, 3, 4, 0, 0, 0, 0]);
    }
}
