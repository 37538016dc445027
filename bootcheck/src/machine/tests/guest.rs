//! A tiny assembler for guests that live in a ROM and run in real mode.

/// Code that begins at the bottom of the ROM's segment `f000`, with the far jump to it at the reset vector.
#[derive(Debug, Clone, Default)]
pub(super) struct Rom {
    code: Vec<u8>,
}

const SEGMENT_LEN: usize = 0x1_0000;
const RESET: usize = 0xfff0;

impl Rom {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Appends machine code.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend(bytes);
        self
    }

    /// Where the next instruction will lie in the segment.
    pub(super) fn here(&self) -> u16 {
        u16::try_from(self.code.len()).unwrap()
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
        // jmp f000:0000
        image[RESET..RESET + 5].copy_from_slice(&[0xea, 0, 0, 0, 0xf0]);
        image
    }
}
