//! A driver for tests: builds rings in guest memory, as a guest would, honestly or not.

use crate::memory::GuestRam;

pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x3000;
pub(crate) const USED: u64 = 0x5000;
/// Free for buffers from here.
pub(crate) const BUFFERS: u64 = 0x1_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A descriptor.
pub(crate) type Descriptor = (u64, u32, u16, u16);

/// The driver's side of one queue.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) size: u16,
    available: u16,
    used: u16,
    free: u16,
}

impl Driver {
    pub(crate) fn new(ram: GuestRam, size: u16) -> Self {
        Self { ram, size, available: 0, used: 0, free: 0 }
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write(address, bytes).unwrap();
    }

    pub(crate) fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(address, &mut bytes).unwrap();
        bytes
    }

    /// Writes a descriptor into a table.
    pub(crate) fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): Descriptor) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + 16 * u64::from(index), &bytes);
    }

    /// Makes a chain available that begins at `head`.
    pub(crate) fn publish(&mut self, head: u16) {
        let place = u64::from(self.available % self.size);
        self.put(AVAILABLE + 4 + 2 * place, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    /// Chains buffers (address, length, writable) and makes them available; returns the head.
    pub(crate) fn chain(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.free % self.size;
        for (i, &(address, len, writable)) in buffers.iter().enumerate() {
            let index = self.free % self.size;
            self.free = self.free.wrapping_add(1);
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = more | if writable { WRITE } else { 0 };
            self.descriptor(DESCRIPTORS, index, (address, len, flags, self.free % self.size));
        }
        self.publish(head);
        head
    }

    /// The same in an indirect table at `table`.
    pub(crate) fn indirect(&mut self, table: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        for (i, &(address, len, writable)) in (0u16..).zip(buffers) {
            let more = if usize::from(i) + 1 < buffers.len() { NEXT } else { 0 };
            self.descriptor(table, i, (address, len, more | if writable { WRITE } else { 0 }, i + 1));
        }
        let head = self.free % self.size;
        self.free = self.free.wrapping_add(1);
        let len = u32::try_from(16 * buffers.len()).unwrap();
        self.descriptor(DESCRIPTORS, head, (table, len, INDIRECT, 0));
        self.publish(head);
        head
    }

    /// What has been returned: heads and lengths.
    pub(crate) fn returned(&mut self) -> Vec<(u32, u32)> {
        let now = u16::from_le_bytes(self.get(USED + 2, 2).try_into().unwrap());
        let mut returned = vec![];
        while self.used != now {
            let bytes = self.get(USED + 4 + 8 * u64::from(self.used % self.size), 8);
            let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            returned.push((number(0), number(4)));
            self.used = self.used.wrapping_add(1);
        }
        returned
    }
}
