//! The firmware configuration device (QEMU documentation, "QEMU Firmware Configuration (fw_cfg) Device"): items by
//! number, some of them files with a name, read byte by byte or by DMA.

use parking_lot::Mutex;

use crate::bus::{Registers, number};
use crate::memory::GuestRam;

/// Selector (16 bits) and data (8 bits).
pub(crate) const PORT: u16 = 0x510;
/// How many ports these are.
pub(crate) const PORTS: u16 = 2;
/// The address of a DMA request, big-endian, upper half first.
pub(crate) const DMA_PORT: u16 = 0x514;
/// How many ports it takes.
pub(crate) const DMA_PORTS: u16 = 8;

const KEY_SIGNATURE: u16 = 0x00;
const KEY_ID: u16 = 0x01;
pub(super) const KEY_CPUS: u16 = 0x05;
pub(super) const KEY_MAX_CPUS: u16 = 0x0f;
const KEY_DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Both ways of reading are there.
const ID: u32 = 3;

const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 2;
const DMA_SKIP: u32 = 4;
const DMA_SELECT: u32 = 8;
const DMA_WRITE: u32 = 16;
/// Most bytes that one DMA request moves.
const DMA_MAX: u64 = 16 << 20;
/// Bytes that it moves at once.
const DMA_PIECE: u64 = 64 << 10;

/// The device.
#[derive(Debug)]
pub(crate) struct FwCfg {
    items: std::collections::BTreeMap<u16, Vec<u8>>,
    files: Vec<(String, u16)>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    selected: u16,
    offset: usize,
    dma_high: u32,
}

impl FwCfg {
    pub(super) fn new() -> Self {
        let mut this = Self { items: [].into(), files: vec![], state: Mutex::default() };
        this.item(KEY_SIGNATURE, b"QEMU");
        this.item(KEY_ID, &ID.to_le_bytes());
        this.write_directory();
        this
    }

    pub(super) fn item(&mut self, key: u16, bytes: &[u8]) {
        self.items.insert(key, bytes.to_vec());
    }

    /// Adds a file; names have at most 55 bytes.
    pub(super) fn file(&mut self, name: &str, bytes: &[u8]) {
        let key = FIRST_FILE + u16::try_from(self.files.len()).unwrap_or(0);
        self.item(key, bytes);
        self.files.push((name.to_owned(), key));
        self.files.sort();
        self.write_directory();
    }

    fn write_directory(&mut self) {
        let mut directory = u32::try_from(self.files.len()).unwrap_or(0).to_be_bytes().to_vec();
        for (name, key) in &self.files {
            let len = self.items.get(key).map_or(0, Vec::len);
            directory.extend(u32::try_from(len).unwrap_or(0).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = [0; 56];
            for (slot, byte) in field.iter_mut().zip(name.bytes().take(55)) {
                *slot = byte;
            }
            directory.extend(field);
        }
        self.item(KEY_DIRECTORY, &directory);
    }

    fn select(state: &mut State, key: u16) {
        // Bits 14 and 15 are for writing and for items of the architecture, of which there are none.
        (state.selected, state.offset) = (key, 0);
    }

    /// The next bytes of the selected item; zeros past its end.
    fn take(&self, state: &mut State, buf: &mut [u8]) {
        let item = self.items.get(&state.selected).map_or(&[][..], Vec::as_slice);
        let rest = item.get(state.offset..).unwrap_or(&[]);
        let (there, past) = buf.split_at_mut(rest.len().min(buf.len()));
        there.copy_from_slice(&rest[..there.len()]);
        past.fill(0);
        state.offset = state.offset.saturating_add(buf.len());
    }

    /// Serves the DMA request at `address`: control, length, address, all big-endian. The control field becomes 0,
    /// or says that there was an error.
    fn dma(&self, ram: &GuestRam, address: u64) {
        let mut request = [0; 16];
        if ram.read(address, &mut request).is_err() {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, a @ ..] = request;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        let ok = self.transfer(ram, control, u64::from(len), u64::from_be_bytes(a));
        // The request was readable a moment ago.
        let _ = ram.write(address, &if ok { 0 } else { DMA_ERROR }.to_be_bytes());
    }

    fn transfer(&self, ram: &GuestRam, control: u32, len: u64, target: u64) -> bool {
        let mut state = self.state.lock();
        if control & DMA_SELECT != 0 {
            Self::select(&mut state, u16::try_from(control >> 16).unwrap_or(0));
        }
        if control & DMA_WRITE != 0 || len > DMA_MAX {
            return false;
        }
        if control & DMA_READ != 0 {
            return self.copy_out(&mut state, ram, len, target);
        }
        if control & DMA_SKIP != 0 {
            state.offset = state.offset.saturating_add(block::num::to_usize(len));
        }
        true
    }
}

impl FwCfg {
    /// Writes the next `len` bytes of the selected item to memory, piece by piece.
    fn copy_out(&self, state: &mut State, ram: &GuestRam, len: u64, target: u64) -> bool {
        let mut buf = vec![0; block::num::to_usize(len.min(DMA_PIECE))];
        (0..len).step_by(buf.len().max(1)).all(|at| {
            let piece = block::num::to_usize((len - at).min(DMA_PIECE));
            self.take(state, &mut buf[..piece]);
            target.checked_add(at).is_some_and(|target| ram.write(target, &buf[..piece]).is_ok())
        })
    }
}

impl Registers for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == 1 {
            self.take(&mut self.state.lock(), data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 {
            Self::select(&mut self.state.lock(), u16::try_from(number(data) & 0xffff).unwrap_or(0));
        }
    }
}

/// The ports for DMA.
#[derive(Debug)]
pub(crate) struct FwCfgDma {
    pub(crate) config: std::sync::Arc<FwCfg>,
    pub(crate) ram: GuestRam,
}

impl Registers for FwCfgDma {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let signature = b"QEMU CFG";
        for (slot, byte) in data.iter_mut().zip(signature.iter().skip(block::num::to_usize(offset))) {
            *slot = *byte;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let value = number(data).swap_bytes();
        match (offset, data.len()) {
            (0, 4) => self.config.state.lock().dma_high = value,
            (4, 4) => {
                let high = std::mem::take(&mut self.config.state.lock().dma_high);
                self.config.dma(&self.ram, u64::from(high) << 32 | u64::from(value));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn read(config: &FwCfg, key: u16, len: usize) -> Vec<u8> {
        config.write(0, &key.to_le_bytes());
        (0..len)
            .map(|_| {
                let mut byte = [0];
                config.read(1, &mut byte);
                byte[0]
            })
            .collect()
    }

    #[test]
    fn files_are_found_in_the_directory() {
        let mut config = FwCfg::new();
        config.file("etc/b", b"second");
        config.file("etc/a", b"first");
        assert_eq!(read(&config, KEY_SIGNATURE, 4), b"QEMU");
        let directory = read(&config, KEY_DIRECTORY, 4 + 64);
        assert_eq!(directory[..8], [0, 0, 0, 2, 0, 0, 0, 5]);
        assert_eq!(directory[12..18], *b"etc/a\0");
        let key = u16::from_be_bytes([directory[8], directory[9]]);
        assert_eq!(read(&config, key, 7), b"first\0\0"[..]);
        assert_eq!(read(&config, 0x7777, 2), [0, 0]);
    }

    #[test]
    fn dma_reads_and_refuses() {
        let mut config = FwCfg::new();
        config.file("etc/a", b"contents");
        let ram = GuestRam::new(1 << 20).unwrap();
        let dma = FwCfgDma { config: Arc::new(config), ram: ram.clone() };
        let request = |control: u32, len: u32, address: u64| {
            let mut bytes = [control.to_be_bytes(), len.to_be_bytes()].concat();
            bytes.extend(address.to_be_bytes());
            ram.write(0x1000, &bytes).unwrap();
            dma.write(4, &0x1000u32.to_be_bytes());
            let mut control = [0; 4];
            ram.read(0x1000, &mut control).unwrap();
            u32::from_be_bytes(control)
        };
        let select = u32::from(FIRST_FILE) << 16 | DMA_SELECT;
        assert_eq!(request(select | DMA_SKIP, 3, 0), 0);
        assert_eq!(request(DMA_READ, 5, 0x2000), 0);
        let mut bytes = [0; 5];
        ram.read(0x2000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"tents");
        assert_eq!(request(DMA_READ, 5, u64::MAX - 1), DMA_ERROR);
        assert_eq!(request(DMA_WRITE, 5, 0x2000), DMA_ERROR);
        assert_eq!(request(DMA_READ, u32::MAX, 0x2000), DMA_ERROR);
        dma.write(4, &u32::MAX.to_be_bytes());
        // Longer than a piece and than the item: zeros follow, and not a byte more than was asked for.
        ram.write(0x1_0000, &[0xaa; 0x2_0000]).unwrap();
        assert_eq!(request(u32::from(FIRST_FILE) << 16 | DMA_SELECT | DMA_READ, 0x1_8001, 0x1_0000), 0);
        let mut bytes = vec![0; 0x2_0000];
        ram.read(0x1_0000, &mut bytes).unwrap();
        assert_eq!(&bytes[..8], b"contents");
        assert!(bytes[8..0x1_8001].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[0x1_8001], 0xaa);
        assert_eq!(request(DMA_READ, 0, 0x2000), 0, "nothing");
    }
}
