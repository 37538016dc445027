//! Configuration space: 256 bytes, each bit of which the guest can write or not.

use crate::bus::answer;

pub(crate) const OFFSET_COMMAND: u8 = 0x04;
const OFFSET_STATUS: usize = 0x06;
pub(crate) const OFFSET_BAR0: u8 = 0x10;
const OFFSET_CAPABILITIES: usize = 0x34;
pub(crate) const OFFSET_INTERRUPT_LINE: u8 = 0x3c;
const OFFSET_INTERRUPT_PIN: usize = 0x3d;
/// Where capabilities begin.
const FIRST_CAPABILITY: usize = 0x40;

/// The device answers at its memory addresses.
pub(crate) const COMMAND_MEMORY: u16 = 2;
/// The device does not pull its interrupt line.
pub(crate) const COMMAND_INTX_DISABLE: u16 = 0x400;
/// I/O, memory, bus master, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// The interrupt line is pulled.
pub(crate) const STATUS_INTERRUPT: u16 = 8;
const STATUS_CAPABILITIES: u16 = 0x10;

/// Capability of MSI-X.
pub(crate) const CAP_MSIX: u8 = 0x11;
/// Capability of the vendor's own.
pub(crate) const CAP_VENDOR: u8 = 9;

/// What a device is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    /// Class, subclass, programming interface.
    pub(crate) class: (u8, u8, u8),
    pub(crate) subsystem: (u16, u16),
    /// Has interrupt pin A.
    pub(crate) interrupt: bool,
}

/// The configuration space of a function with a type 0 header.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    last_capability: usize,
    end: usize,
}

impl ConfigSpace {
    /// A header without base addresses and without capabilities.
    pub(crate) fn new(id: Identity) -> Self {
        let mut space =
            Self { bytes: [0; 256], writable: [0; 256], last_capability: 0, end: FIRST_CAPABILITY };
        space.put(0, &id.vendor.to_le_bytes());
        space.put(2, &id.device.to_le_bytes());
        space.put(8, &[id.revision, id.class.2, id.class.1, id.class.0]);
        space.put(0x2c, &id.subsystem.0.to_le_bytes());
        space.put(0x2e, &id.subsystem.1.to_le_bytes());
        space.bytes[OFFSET_INTERRUPT_PIN] = u8::from(id.interrupt);
        space.allow(usize::from(OFFSET_COMMAND), &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size, latency timer, interrupt line: memories without a meaning here.
        space.allow(0x0c, &[0xff, 0xff]);
        space.allow(usize::from(OFFSET_INTERRUPT_LINE), &[0xff]);
        space
    }

    /// Sets bytes, whether the guest may write them or not.
    pub(crate) fn put(&mut self, offset: usize, bytes: &[u8]) {
        if let Some(slot) = self.bytes.get_mut(offset..offset + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    }

    /// Lets the guest write these bits.
    pub(crate) fn allow(&mut self, offset: usize, mask: &[u8]) {
        if let Some(slot) = self.writable.get_mut(offset..offset + mask.len()) {
            slot.copy_from_slice(mask);
        }
    }

    /// Makes base address 0 a 32-bit memory window of `len` bytes (a power of two, at least 16) at `address`.
    /// A guest that writes ones finds the length (section 6.2.5.1), because the bits below it stay zero.
    pub(crate) fn memory_bar(&mut self, address: u32, len: u32) {
        self.put(usize::from(OFFSET_BAR0), &address.to_le_bytes());
        self.allow(usize::from(OFFSET_BAR0), &(!(len - 1)).to_le_bytes());
    }

    /// Appends a capability (`body` follows id and link) and returns its offset; capabilities that do not fit any
    /// more are left out.
    pub(crate) fn capability(&mut self, id: u8, body: &[u8]) -> Option<u8> {
        let at = self.end;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        let offset = u8::try_from(at).ok().filter(|_| end <= 256)?;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        let link = if self.last_capability == 0 { OFFSET_CAPABILITIES } else { self.last_capability + 1 };
        self.put(link, &[offset]);
        self.last_capability = at;
        self.end = end;
        self.set_status(STATUS_CAPABILITIES, true);
        Some(offset)
    }

    /// Sets or clears bits of the status register.
    pub(crate) fn set_status(&mut self, bits: u16, on: bool) {
        let status = self.word(OFFSET_STATUS);
        let status = if on { status | bits } else { status & !bits };
        self.put(OFFSET_STATUS, &status.to_le_bytes());
    }

    fn word(&self, offset: usize) -> u16 {
        self.bytes.get(offset..offset + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
    }

    /// The command register.
    pub(crate) fn command(&self) -> u16 {
        self.word(usize::from(OFFSET_COMMAND))
    }

    /// The address in base address 0.
    pub(crate) fn bar(&self) -> u32 {
        let at = usize::from(OFFSET_BAR0);
        u32::from(self.word(at)) & !0xf | u32::from(self.word(at + 2)) << 16
    }

    /// A 16-bit register.
    pub(crate) fn register(&self, offset: u8) -> u16 {
        self.word(usize::from(offset))
    }

    /// Reads; zeros past the end.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        answer(data, 0);
        for (slot, byte) in data.iter_mut().zip(self.bytes.iter().skip(usize::from(offset))) {
            *slot = *byte;
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let at = usize::from(offset);
        let targets = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((slot, mask), byte) in targets.zip(data) {
            *slot = *slot & !mask | byte & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: (1, 0x80, 0),
            subsystem: (0x1af4, 0x1100),
            interrupt: true,
        })
    }

    fn dword(space: &ConfigSpace, offset: u8) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_tells_its_size() {
        let mut s = space();
        s.memory_bar(0xc000_0000, 0x8000);
        assert_eq!(dword(&s, 0x10), 0xc000_0000);
        s.write(0x10, &[0xff; 4]);
        assert_eq!(dword(&s, 0x10), 0xffff_8000);
        s.write(0x10, &0xd000_4321u32.to_le_bytes());
        assert_eq!(s.bar(), 0xd000_0000);
        s.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&s, 0x14), 0, "no further window");
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut s = space();
        s.memory_bar(0xc000_0000, 0x8000);
        let before = dword(&s, 0);
        for offset in (0..=0xfc).step_by(4) {
            s.write(offset, &[0xff; 4]);
        }
        assert_eq!(dword(&s, 0), before);
        assert_eq!(s.command(), COMMAND_WRITABLE);
        assert_eq!(dword(&s, 8), 0x0180_0001);
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let mut s = space();
        for id in 1..=5 {
            s.capability(id, &[0; 14]);
        }
        assert!(s.capability(9, &[0; 200]).is_none(), "does not fit");
        let (mut at, mut seen) = (dword(&s, 0x34).to_le_bytes()[0], vec![]);
        while at != 0 {
            let [id, next, ..] = dword(&s, at).to_le_bytes();
            seen.push(id);
            at = next;
        }
        assert_eq!(seen, [1, 2, 3, 4, 5]);
        assert_eq!(dword(&s, 4) >> 16 & 0x10, 0x10);
    }
}
