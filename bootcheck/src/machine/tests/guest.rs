//! A tiny assembler for guests that live in a ROM and run in real mode.

/// Code that begins at the bottom of the ROM's segment `f000`, with the far jump to it at the reset vector.
#[derive(Debug, Clone, Default)]
pub(super) struct Rom {
    code: Vec<u8>,
    data: Vec<(u16, Vec<u8>)>,
}

const SEGMENT_LEN: usize = 0x1_0000;
const RESET: usize = 0xfff0;
/// Where virtio devices have the capability by which configuration space reaches their window.
const ACCESS: u8 = 0x84;

impl Rom {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Appends machine code.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend(bytes);
        self
    }

    /// Puts data at an offset of the segment (which the guest may also write: it is the copy below 1 MiB).
    pub(super) fn data(&mut self, offset: u16, bytes: &[u8]) -> &mut Self {
        self.data.push((offset, bytes.to_vec()));
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`.
    pub(super) fn out8(&mut self, port: u16, value: u8) -> &mut Self {
        self.mov_dx(port).raw(&[0xb0, value, 0xee])
    }

    /// `mov dx, port; mov ax, value; out dx, ax`.
    pub(super) fn out16(&mut self, port: u16, value: u16) -> &mut Self {
        self.mov_dx(port).raw(&[0xb8]).raw(&value.to_le_bytes()).raw(&[0xef])
    }

    /// `mov dx, port; mov eax, value; out dx, eax`.
    pub(super) fn out32(&mut self, port: u16, value: u32) -> &mut Self {
        self.mov_dx(port).raw(&[0x66, 0xb8]).raw(&value.to_le_bytes()).raw(&[0x66, 0xef])
    }

    /// `mov dx, port`.
    pub(super) fn mov_dx(&mut self, port: u16) -> &mut Self {
        self.raw(&[0xba]).raw(&port.to_le_bytes())
    }

    /// Writes text to the serial port.
    pub(super) fn print(&mut self, text: &str) -> &mut Self {
        for byte in text.bytes() {
            self.out8(0x3f8, byte);
        }
        self
    }

    /// Writes al to the serial port.
    pub(super) fn print_al(&mut self) -> &mut Self {
        self.mov_dx(0x3f8).raw(&[0xee])
    }

    /// Writes a register of the configuration space of a slot.
    pub(super) fn config(&mut self, slot: u32, register: u8, len: u8, value: u32) -> &mut Self {
        self.select(slot, register).out(0xcfc + u16::from(register & 3), len, value)
    }

    fn select(&mut self, slot: u32, register: u8) -> &mut Self {
        self.out32(0xcf8, 0x8000_0000 | slot << 11 | u32::from(register & 0xfc))
    }

    fn out(&mut self, port: u16, len: u8, value: u32) -> &mut Self {
        let [b0, b1, ..] = value.to_le_bytes();
        match len {
            1 => self.out8(port, b0),
            2 => self.out16(port, u16::from_le_bytes([b0, b1])),
            _ => self.out32(port, value),
        }
    }

    /// Names a part of a virtio device's window in the capability that reaches it from configuration space.
    fn window(&mut self, slot: u32, offset: u32, len: u8) -> &mut Self {
        self.config(slot, ACCESS + 8, 4, offset).config(slot, ACCESS + 12, 4, u32::from(len))
    }

    /// Writes a register in the window of a virtio device.
    pub(super) fn virtio_write(&mut self, slot: u32, offset: u32, len: u8, value: u32) -> &mut Self {
        self.window(slot, offset, len).config(slot, ACCESS + 16, len, value)
    }

    /// Reads a byte in the window of a virtio device to al.
    pub(super) fn virtio_read(&mut self, slot: u32, offset: u32) -> &mut Self {
        self.window(slot, offset, 1).select(slot, ACCESS + 16).mov_dx(0xcfc).raw(&[0xec])
    }

    /// Sets up queue 0 of a virtio device with these rings, all features accepted but the rings' own.
    pub(super) fn virtio_start(&mut self, slot: u32, rings: [u32; 3]) -> &mut Self {
        self.virtio_write(slot, 20, 1, 0).virtio_write(slot, 20, 1, 3);
        self.virtio_write(slot, 8, 4, 1).virtio_write(slot, 12, 4, 1).virtio_write(slot, 20, 1, 11);
        self.virtio_write(slot, 22, 2, 0).virtio_write(slot, 24, 2, 16);
        for (register, address) in (32..).step_by(8).zip(rings) {
            self.virtio_write(slot, register, 4, address);
        }
        // Vector 1, should messages be used.
        self.virtio_write(slot, 26, 2, 1).virtio_write(slot, 28, 2, 1).virtio_write(slot, 20, 1, 15)
    }

    /// Sets the real-mode interrupt vector to an offset of this segment, and a stack.
    pub(super) fn vector(&mut self, vector: u8, handler: u16) -> &mut Self {
        // xor ax, ax; mov ds, ax; mov ss, ax; mov sp, 0x7c00
        self.raw(&[0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c]);
        let at = u16::from(vector) * 4;
        // mov word [at], handler; mov word [at + 2], 0xf000
        self.raw(&[0xc7, 0x06]).raw(&at.to_le_bytes()).raw(&handler.to_le_bytes());
        self.raw(&[0xc7, 0x06]).raw(&(at + 2).to_le_bytes()).raw(&[0x00, 0xf0])
    }

    /// `mov ecx, msr; mov eax, value; xor edx, edx; wrmsr`.
    pub(super) fn wrmsr(&mut self, msr: u32, value: u32) -> &mut Self {
        self.raw(&[0x66, 0xb9]).raw(&msr.to_le_bytes()).raw(&[0x66, 0xb8]).raw(&value.to_le_bytes());
        self.raw(&[0x66, 0x31, 0xd2, 0x0f, 0x30])
    }

    /// Waits until the word at an offset of this segment has a value.
    pub(super) fn await_word(&mut self, offset: u16, value: u16) -> &mut Self {
        // again: mov ax, cs:[offset]; cmp ax, value; jne again
        self.raw(&[0x2e, 0xa1])
            .raw(&offset.to_le_bytes())
            .raw(&[0x3d])
            .raw(&value.to_le_bytes())
            .raw(&[0x75, 0xf7])
    }

    /// Writes the byte at an offset of this segment to the serial port.
    pub(super) fn print_byte(&mut self, offset: u16) -> &mut Self {
        self.raw(&[0x2e, 0xa0]).raw(&offset.to_le_bytes()).print_al()
    }

    /// The machine code.
    pub(super) fn code(&self) -> Vec<u8> {
        self.code.clone()
    }

    /// Sleep state 5, then a halt.
    pub(super) fn power_off(&mut self) -> &mut Self {
        self.out16(0x604, 0x2000 | 5 << 10).halt()
    }

    /// `cli; again: hlt; jmp again`.
    pub(super) fn halt(&mut self) -> &mut Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// The whole ROM, 64 KiB.
    pub(super) fn image(&self) -> Vec<u8> {
        let mut image = vec![0xf4; SEGMENT_LEN];
        image[..self.code.len()].copy_from_slice(&self.code);
        for (offset, bytes) in &self.data {
            image[usize::from(*offset)..][..bytes.len()].copy_from_slice(bytes);
        }
        // jmp f000:0000
        image[RESET..RESET + 5].copy_from_slice(&[0xea, 0, 0, 0, 0xf0]);
        image
    }
}

/// Where the code of [`elf`] is loaded.
pub(super) const ELF_CODE: u32 = 0x10_0000;

/// A kernel of one segment of code, perhaps with PVH's note.
pub(crate) fn elf(code: &[u8], pvh_entry: Option<u32>) -> Vec<u8> {
    let header = |kind: u32, offset: u64, address: u64, len: usize| {
        let len = len as u64;
        let mut header = [kind.to_le_bytes(), 7u32.to_le_bytes()].concat();
        header.extend([offset, address, address, len, len, 4096].map(u64::to_le_bytes).concat());
        header
    };
    let note: Vec<u8> = match pvh_entry {
        None => vec![],
        Some(entry) => [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry].map(u32::to_le_bytes).concat(),
    };
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16.to_le_bytes(), 62u16.to_le_bytes()].concat());
    file.extend(1u32.to_le_bytes());
    file.extend([u64::from(ELF_CODE), 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    file.extend([64, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    file.extend(header(4, 176, 0, note.len()));
    file.extend(header(1, 256, u64::from(ELF_CODE), code.len()));
    file.extend(&note);
    file.resize(256, 0);
    file.extend(code);
    file
}
