//! The flash that holds UEFI's variables: a chip with the Intel command set (JEDEC JESD68.01, algorithm 0x0001), eight
//! bits wide, in blocks of 4 KiB.
//!
//! The guest reads the array without an exit: KVM has it as memory that cannot be written. What it writes are commands
//! and arrives here. In the modes in which reads answer something else (status, identity, query), the memory is taken
//! out of the guest's address space, and the reads arrive here, too. While single bytes are programmed the array stays
//! in place, although a real chip would answer its status: the firmware's driver (EDK II, `QemuFlashFvbServices`) does
//! not ask in between, and taking memory away costs far more than programming.

use std::sync::Arc;

use block::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bus::{Registers, number};
use crate::memory::HIGH_START;
use crate::vm::Vm;

/// Bytes of a block, the unit of erasing.
const BLOCK: u64 = BLOCK_LEN as u64;
const BLOCK_LEN: usize = 4096;
/// Largest variable store, in bytes.
const MAX_LEN: usize = 8 << 20;
/// Bytes of the write buffer.
const BUFFER: usize = 2048;

// Commands.
const PROGRAM: u8 = 0x10;
const PROGRAM_TOO: u8 = 0x40;
const ERASE: u8 = 0x20;
const CLEAR_STATUS: u8 = 0x50;
const LOCK: u8 = 0x60;
const READ_STATUS: u8 = 0x70;
const READ_ID: u8 = 0x90;
const QUERY: u8 = 0x98;
const CONFIRM: u8 = 0xd0;
const PROGRAM_BUFFER: u8 = 0xe8;
const READ_ARRAY: u8 = 0xff;

// Status bits.
const READY: u8 = 0x80;
const ERASE_ERROR: u8 = 0x20;
const PROGRAM_ERROR: u8 = 0x10;

/// Intel, and its 64-Mbit chip.
const IDENTITY: [u8; 2] = [0x89, 0x18];

/// The bytes of the flash, at their place in the guest's address space.
#[derive(Debug, Clone)]
pub(crate) struct FlashMemory {
    map: GuestMemoryMmap<()>,
    start: u64,
    len: u64,
}

impl FlashMemory {
    /// A private copy of `bytes` that ends where firmware of `code_len` bytes begins.
    ///
    /// # Errors
    /// A length that is not a multiple of 4 KiB up to 8 MiB, or no memory.
    pub(crate) fn new(bytes: &[u8], code_len: usize) -> Result<Self> {
        let len = bytes.len();
        if len == 0 || len > MAX_LEN || !(len as u64).is_multiple_of(BLOCK) {
            return Err(Error::invalid(format!(
                "a variable store of {len} bytes is not a multiple of 4 KiB up to 8 MiB"
            ))
            .hint("give a copy of the file that belongs to the firmware's code, like OVMF_VARS_4M.fd"));
        }
        let start = HIGH_START.saturating_sub(code_len as u64).saturating_sub(len as u64);
        let fail = |e: String| Error::new(ErrorKind::NoSpace, format!("no memory for the flash: {e}"));
        let map =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(start), len)]).map_err(|e| fail(e.to_string()))?;
        map.write_slice(bytes, GuestAddress(start)).map_err(|e| fail(e.to_string()))?;
        Ok(Self { map, start, len: len as u64 })
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// How long it is.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The mapping, for KVM.
    pub(crate) fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    /// All bytes as they are now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; block::num::to_usize(self.len)];
        self.read(0, &mut bytes);
        bytes
    }

    /// Reads from an offset; ones past the end.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(data) = data.get_mut(..self.inside(offset, data.len())) {
            // Within the mapping, as has just been made sure.
            let _ = self.map.read_slice(data, GuestAddress(self.start + offset));
        }
    }

    /// Writes at an offset; what lies past the end is lost.
    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(data) = data.get(..self.inside(offset, data.len())) {
            let _ = self.map.write_slice(data, GuestAddress(self.start + offset));
        }
    }

    /// How many of `len` bytes from `offset` there are.
    fn inside(&self, offset: u64, len: usize) -> usize {
        block::num::to_usize(self.len.saturating_sub(offset)).min(len)
    }
}

/// What the chip makes of the next access.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Mode {
    /// Reads answer the array.
    Array,
    /// Reads answer the status.
    Status,
    Id,
    Query,
    /// The next write is programmed.
    Program,
    /// The next write confirms that the block is erased.
    Erase,
    /// The next write says how many bytes follow, less one.
    BufferCount,
    /// Bytes for the buffer: so many are missing.
    Buffer {
        missing: usize,
        bytes: Vec<(u64, u8)>,
    },
    /// The next write confirms that the buffer is programmed.
    BufferConfirm {
        bytes: Vec<(u64, u8)>,
    },
    /// The next write locks or unlocks a block, which has no effect.
    Lock,
}

/// The chip.
#[derive(Debug)]
pub(crate) struct Flash {
    memory: FlashMemory,
    vm: Arc<dyn Vm>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    status: u8,
    /// The array is in the guest's address space.
    shown: bool,
}

impl Flash {
    /// A chip that shows the array, which `vm` has as memory already.
    pub(crate) fn new(memory: FlashMemory, vm: Arc<dyn Vm>) -> Self {
        Self { memory, vm, state: Mutex::new(State { mode: Mode::Array, status: READY, shown: true }) }
    }

    /// Shows the array or hides it, as the mode wants.
    fn settle(&self, state: &mut State) {
        let shown = match state.mode {
            Mode::Array => true,
            Mode::Status | Mode::Id | Mode::Query | Mode::Erase => false,
            _ => state.shown,
        };
        if shown != state.shown {
            state.shown = shown;
            self.vm.show_flash(shown);
        }
    }

    /// The mode after a write at `offset` in `mode`.
    fn next(&self, state: &mut State, mode: Mode, offset: u64, data: &[u8]) -> Mode {
        let command = data.first().copied().unwrap_or(READ_ARRAY);
        match mode {
            Mode::Array | Mode::Status | Mode::Id | Mode::Query => first_cycle(state, command),
            Mode::Program => {
                self.memory.write(offset, data);
                state.done(Mode::Array)
            }
            Mode::Erase if command == CONFIRM => {
                self.memory.write(offset - offset % BLOCK, &[0xff; BLOCK_LEN]);
                state.done(Mode::Status)
            }
            Mode::Erase => state.failed(ERASE_ERROR | PROGRAM_ERROR),
            Mode::BufferCount => match block::num::to_usize(u64::from(number(data))) {
                less @ ..BUFFER => Mode::Buffer { missing: less + 1, bytes: vec![] },
                _ => state.failed(PROGRAM_ERROR),
            },
            Mode::Buffer { missing, bytes } => gather(missing, bytes, offset, data),
            Mode::BufferConfirm { bytes } if command == CONFIRM => {
                bytes.iter().for_each(|(offset, byte)| self.memory.write(*offset, &[*byte]));
                state.done(Mode::Array)
            }
            Mode::BufferConfirm { .. } => state.failed(PROGRAM_ERROR),
            Mode::Lock => state.done(Mode::Status),
        }
    }
}

/// A command is written.
fn first_cycle(state: &mut State, command: u8) -> Mode {
    match command {
        PROGRAM | PROGRAM_TOO => Mode::Program,
        PROGRAM_BUFFER => Mode::BufferCount,
        ERASE => Mode::Erase,
        LOCK => Mode::Lock,
        READ_STATUS => Mode::Status,
        READ_ID => Mode::Id,
        QUERY => Mode::Query,
        CLEAR_STATUS => {
            // All bits, as the firmware's driver expects of the flash that it knows (`CLEARED_ARRAY_STATUS`).
            state.status = 0;
            Mode::Array
        }
        _ => Mode::Array,
    }
}

/// Bytes arrive in the buffer.
fn gather(missing: usize, mut bytes: Vec<(u64, u8)>, offset: u64, data: &[u8]) -> Mode {
    bytes.extend((offset..).zip(data.iter().copied()).take(missing));
    match missing.saturating_sub(data.len()) {
        0 => Mode::BufferConfirm { bytes },
        missing => Mode::Buffer { missing, bytes },
    }
}

impl State {
    fn done(&mut self, shows: Mode) -> Mode {
        self.status |= READY;
        // Where reads arrive here they are for the status, until the array is asked for.
        if self.shown { shows } else { Mode::Status }
    }

    fn failed(&mut self, why: u8) -> Mode {
        self.status |= READY | why;
        Mode::Status
    }
}

/// The query table (JESD68.01, section 2.3), from offset 0x10.
fn query(len: u64) -> Vec<u8> {
    let blocks = u16::try_from((len / BLOCK).saturating_sub(1)).unwrap_or(u16::MAX).to_le_bytes();
    let block_pages = u16::try_from(BLOCK / 256).unwrap_or(0).to_le_bytes();
    let mut table = b"QRY".to_vec();
    // Primary command set 1, its extended table at 0x31; no alternative.
    table.extend([1, 0, 0x31, 0, 0, 0, 0, 0]);
    // Supply voltages, typical and greatest times as powers of two (1 ms erases; nothing takes longer here).
    table.extend([0x45, 0x55, 0, 0, 7, 7, 10, 0, 4, 4, 4, 0]);
    // Size as a power of two; 8 bits wide; the buffer's size as a power of two.
    let size = u8::try_from(len.next_power_of_two().trailing_zeros()).unwrap_or(0);
    let buffer = u8::try_from(BUFFER.trailing_zeros()).unwrap_or(0);
    table.extend([size, 0, 0, buffer, 0]);
    // One region of blocks: how many, less one; how long in units of 256 bytes.
    table.push(1);
    table.extend([blocks, block_pages].concat());
    // The extended table, version 1.0: nothing of it.
    table.extend(b"PRI10");
    table
}

impl Registers for Flash {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        match state.mode {
            Mode::Array => self.memory.read(offset, data),
            Mode::Id => fill(offset, data, |at| IDENTITY.get(at).copied()),
            Mode::Query => {
                let table = query(self.memory.len);
                fill(offset, data, |at| table.get(at.checked_sub(0x10)?).copied());
            }
            _ => data.fill(state.status),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        let mode = std::mem::replace(&mut state.mode, Mode::Array);
        state.mode = self.next(&mut state, mode, offset, data);
        self.settle(&mut state);
    }
}

/// Answers from a table by offset (which repeats every 256 bytes); zeros where it has nothing.
fn fill(offset: u64, data: &mut [u8], table: impl Fn(usize) -> Option<u8>) {
    for (offset, byte) in (offset..).zip(data) {
        *byte = table(block::num::to_usize(offset & 0xff)).unwrap_or(0);
    }
}

#[cfg(test)]
mod tests;
