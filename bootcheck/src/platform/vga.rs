//! The screen of firmware boots: a VGA in text mode 3, as far as programs meet it that write to the memory at 0xb8000
//! and set the cursor (IBM's VGA; the registers are described in the data sheets of its successors, ports 0x3c0 to 0x3df).
//!
//! The memory is the guest's own, below 1 MiB; only the registers are here. They remember what is written; of all of
//! them only the start address of the shown text and the switch to graphics mean anything.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::bus::Registers;
use crate::memory::GuestRam;

/// The first port.
pub(crate) const VGA_PORT: u16 = 0x3c0;
/// How many ports there are.
pub(crate) const VGA_PORTS: u16 = 0x20;

/// The text's memory.
const TEXT_START: u64 = 0xb_8000;
const TEXT_LEN: usize = 0x8000;
const COLUMNS: usize = 80;
const ROWS: usize = 25;

// Registers of the CRT controller, and of the graphics controller.
const START_HIGH: usize = 0x0c;
const START_LOW: usize = 0x0d;
const GRAPHICS_MISC: usize = 6;
/// Horizontal and vertical timing of mode 3.
const CRTC_MODE_3: [u8; 25] = [
    0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0x00, 0x4f, 0x0d, 0x0e, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f,
    0x28, 0x1f, 0x96, 0xb9, 0xa3, 0xff,
];
/// Colour, at 0x3d4.
const MISC_MODE_3: u8 = 0x67;
/// Display disabled and vertical retrace: what programs wait for, both ways.
const RETRACE: u8 = 9;

/// The registers.
#[derive(Debug)]
pub struct Vga {
    state: Mutex<State>,
}

/// A group of registers behind an index.
#[derive(Debug, Clone, Copy)]
struct Indexed<const N: usize> {
    index: u8,
    values: [u8; N],
}

impl<const N: usize> Indexed<N> {
    fn new(values: [u8; N]) -> Self {
        Self { index: 0, values }
    }

    fn get(&self) -> u8 {
        self.values.get(usize::from(self.index)).copied().unwrap_or(0xff)
    }

    fn set(&mut self, value: u8) {
        if let Some(slot) = self.values.get_mut(usize::from(self.index)) {
            *slot = value;
        }
    }
}

#[derive(Debug)]
struct State {
    misc: u8,
    attribute: Indexed<32>,
    /// The next write to the attribute controller is a value, not an index.
    attribute_data: bool,
    sequencer: Indexed<8>,
    graphics: Indexed<16>,
    crtc: Indexed<32>,
    dac_mask: u8,
    dac_at: usize,
    dac: [u8; 768],
    retrace: u8,
}

impl Default for Vga {
    fn default() -> Self {
        let mut crtc = [0; 32];
        crtc[..CRTC_MODE_3.len()].copy_from_slice(&CRTC_MODE_3);
        let mut attributes = [0; 32];
        for (value, slot) in (0..16).zip(&mut attributes) {
            *slot = value;
        }
        let mut graphics = [0; 16];
        // Text, memory at 0xb8000.
        graphics[GRAPHICS_MISC] = 0x0e;
        Self {
            state: Mutex::new(State {
                misc: MISC_MODE_3,
                attribute: Indexed::new(attributes),
                attribute_data: false,
                sequencer: Indexed::new([3, 0, 3, 0, 2, 0, 0, 0]),
                graphics: Indexed::new(graphics),
                crtc: Indexed::new(crtc),
                dac_mask: 0xff,
                dac_at: 0,
                dac: [0; 768],
                retrace: 0,
            }),
        }
    }
}

impl State {
    fn read(&mut self, port: u64) -> u8 {
        match port {
            0x0 => self.attribute.index,
            0x1 => self.attribute.get(),
            0x4 => self.sequencer.index,
            0x5 => self.sequencer.get(),
            0x6 => self.dac_mask,
            0x8 => u8::try_from(self.dac_at / 3).unwrap_or(0),
            0x9 => self.dac_step().map_or(0xff, |slot| *slot),
            0xc => self.misc,
            0xe => self.graphics.index,
            0xf => self.graphics.get(),
            0x14 => self.crtc.index,
            0x15 => self.crtc.get(),
            0x1a => {
                self.attribute_data = false;
                self.retrace ^= RETRACE;
                self.retrace
            }
            _ => 0xff,
        }
    }

    fn write(&mut self, port: u64, value: u8) {
        match port {
            0x0 => {
                if self.attribute_data {
                    self.attribute.set(value);
                } else {
                    self.attribute.index = value & 0x1f;
                }
                self.attribute_data = !self.attribute_data;
            }
            0x2 => self.misc = value,
            0x4 => self.sequencer.index = value & 7,
            0x5 => self.sequencer.set(value),
            0x6 => self.dac_mask = value,
            0x7 | 0x8 => self.dac_at = usize::from(value) * 3,
            0x9 => {
                if let Some(slot) = self.dac_step() {
                    *slot = value & 0x3f;
                }
            }
            0xe => self.graphics.index = value & 0xf,
            0xf => self.graphics.set(value),
            0x14 => self.crtc.index = value & 0x1f,
            0x15 => self.crtc.set(value),
            _ => {}
        }
    }

    /// The next colour component.
    fn dac_step(&mut self) -> Option<&mut u8> {
        let at = self.dac_at % self.dac.len();
        self.dac_at = at + 1;
        self.dac.get_mut(at)
    }
}

impl Vga {
    /// Where the shown text begins, from the start of its memory, in bytes; none in graphics.
    fn start(&self) -> Option<usize> {
        let state = self.state.lock();
        let register = |index: usize| usize::from(state.crtc.values[index]);
        (state.graphics.values[GRAPHICS_MISC] & 1 == 0)
            .then(|| (register(START_HIGH) << 8 | register(START_LOW)) * 2 % TEXT_LEN)
    }
}

impl Registers for Vga {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock();
        for (port, byte) in (offset..).zip(data) {
            *byte = state.read(port);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock();
        for (port, byte) in (offset..).zip(data) {
            state.write(port, *byte);
        }
    }
}

/// What is on the screen.
#[derive(Debug)]
pub(crate) struct Screen {
    ram: GuestRam,
    vga: Arc<Vga>,
    rows: Mutex<Vec<String>>,
}

impl Screen {
    /// The text in `ram`, which `vga` says where to find.
    pub(crate) fn new(ram: GuestRam, vga: Arc<Vga>) -> Self {
        Self { ram, vga, rows: Mutex::default() }
    }

    /// The rows, if they have changed since somebody last looked.
    pub(crate) fn look(&self) -> Option<Vec<String>> {
        let start = self.vga.start()?;
        let mut memory = vec![0; TEXT_LEN];
        self.ram.read(TEXT_START, &mut memory).ok()?;
        let rows = text(&memory, start);
        let mut before = self.rows.lock();
        if *before == rows {
            return None;
        }
        before.clone_from(&rows);
        Some(rows)
    }

    /// The rows as somebody last saw them.
    pub(crate) fn rows(&self) -> Vec<String> {
        self.rows.lock().clone()
    }
}

/// The rows of characters from `start` (which wraps), each followed by its colours.
fn text(memory: &[u8], start: usize) -> Vec<String> {
    let at = |cell: usize| memory.get((start + 2 * cell) % TEXT_LEN).copied().unwrap_or(0);
    let mut rows: Vec<String> = (0..ROWS)
        .map(|row| (row * COLUMNS..(row + 1) * COLUMNS).map(|cell| character(at(cell))).collect::<String>())
        .map(|row| row.trim_end().to_owned())
        .collect();
    while rows.last().is_some_and(String::is_empty) {
        rows.pop();
    }
    rows
}

/// The characters of code page 437 that are not those of ASCII: 0x01 to 0x1f, and from 0x7f.
const LOW: &str = "☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼";
const HIGH: &str = "⌂ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■ ";

fn character(code: u8) -> char {
    match code {
        0 => ' ',
        0x20..0x7f => char::from(code),
        1..0x20 => LOW.chars().nth(usize::from(code) - 1).unwrap_or(' '),
        _ => HIGH.chars().nth(usize::from(code) - 0x7f).unwrap_or(' '),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen() -> (GuestRam, Arc<Vga>, Screen) {
        let (ram, vga) = (GuestRam::new(1 << 20).unwrap(), Arc::new(Vga::default()));
        (ram.clone(), Arc::clone(&vga), Screen::new(ram, vga))
    }

    fn print(ram: &GuestRam, offset: u64, text: &[u8]) {
        let cells: Vec<u8> = text.iter().flat_map(|byte| [*byte, 0x07]).collect();
        ram.write(TEXT_START + offset, &cells).unwrap();
    }

    #[test]
    fn text_is_shown_when_it_has_changed() {
        let (ram, _, screen) = screen();
        assert_eq!(screen.look(), None, "empty as before");
        print(&ram, 0, b"GRUB loading.  ");
        print(&ram, 160, b"error: no such device: \xdb\x01\x7f\xfe");
        let rows = ["GRUB loading.", "error: no such device: █☺⌂■"];
        assert_eq!(screen.look().unwrap(), rows);
        assert_eq!(screen.look(), None);
        assert_eq!(screen.rows(), rows);
        ram.write(TEXT_START + 1, &[0x70]).unwrap();
        assert_eq!(screen.look(), None, "a colour is no text");
        print(&ram, 24 * 160, b"x");
        assert_eq!(screen.look().unwrap().len(), 25);
        print(&ram, 25 * 160, b"below");
        assert_eq!(screen.look(), None);
    }

    #[test]
    fn the_start_address_scrolls_and_wraps() {
        let (ram, vga, screen) = screen();
        print(&ram, 0, b"first");
        print(&ram, 160, b"second");
        // Index and value in one access of two bytes.
        vga.write(0x14, &[0x0d, 80]);
        assert_eq!(screen.look().unwrap(), ["second"]);
        // The last row before the end of the memory (0x3fff words).
        for (register, value) in [(0x0c, 0x3f), (0x0d, 0xb0)] {
            vga.write(0x14, &[register]);
            vga.write(0x15, &[value]);
        }
        assert_eq!(screen.look().unwrap(), ["", "first", "second"]);
        vga.write(0x14, &[0x0c, 0xff]);
        assert_eq!(screen.look(), None, "twice around");
        vga.write(0xe, &[6, 5]);
        print(&ram, 0, b"pixels");
        assert_eq!(screen.look(), None, "graphics");
    }

    #[test]
    fn registers_remember_and_the_retrace_comes_and_goes() {
        let vga = Vga::default();
        let read = |port: u64| {
            let mut byte = [0];
            vga.read(port, &mut byte);
            byte[0]
        };
        vga.write(0x14, &[0x0e]);
        vga.write(0x15, &[0x12]);
        assert_eq!([read(0x14), read(0x15)], [0x0e, 0x12]);
        assert_eq!(read(0x1a) ^ read(0x1a), RETRACE);
        vga.write(0, &[0x05]);
        vga.write(0, &[0x2a]);
        assert_eq!([read(0), read(1)], [0x05, 0x2a]);
        vga.write(0, &[0x06]);
        read(0x1a);
        vga.write(0, &[0x07]);
        assert_eq!(read(0), 0x07, "the status makes the next write an index");
        vga.write(8, &[2]);
        vga.write(9, &[0x3f]);
        vga.write(7, &[2]);
        assert_eq!(read(9), 0x3f);
        assert_eq!(read(0xc), 0x67);
    }

    #[test]
    fn no_access_panics() {
        let vga = Vga::default();
        for port in 0..u64::from(VGA_PORTS) {
            for value in 0..=255 {
                vga.write(port, &[value; 8]);
                vga.read(port, &mut [0; 8]);
            }
        }
        assert!(vga.start().is_none_or(|start| start < TEXT_LEN));
    }

    #[test]
    fn every_code_is_one_character() {
        assert_eq!((LOW.chars().count(), HIGH.chars().count()), (31, 129));
        assert_eq!([0x41, 0xb3, 0xc4, 0xe1, 0xff].map(character), ['A', '│', '─', 'ß', ' ']);
    }
}
