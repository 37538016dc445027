//! From the bytes on a serial line to lines of text.
//!
//! What a guest prints is meant for a terminal: colours, cursor movements, lines that overwrite themselves, in
//! whatever encoding, cut anywhere by whoever passes it on. Here it becomes plain lines, and the line that is being
//! printed can be looked at before it ends, for a prompt never does.

use std::borrow::Cow;

/// A longer line is cut here, so that a guest cannot fill our memory.
pub const MAX_LINE: usize = 4096;
/// Parameters of a control sequence that are remembered; longer ones are not obeyed.
const MAX_PARAMETERS: u32 = 64;
/// Rows of a screen: at the last one, the next line scrolls it.
const ROWS: u32 = 25;
/// A terminal string (a title, say) that has not ended after so many bytes was none.
const MAX_STRING: u32 = 4096;

/// Where in an escape sequence (ECMA-48) the next byte falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Escape {
    #[default]
    None,
    /// After ESC.
    Begun,
    /// After ESC and an intermediate byte: one more.
    OneMore,
    /// In a control sequence; so many bytes of it.
    Control(u32),
    /// In a string that BEL or ESC \ ends; so many bytes of it.
    String(u32),
    /// After ESC in a string.
    StringEnd,
}

/// Splits a stream into lines without control characters.
#[derive(Debug, Default)]
pub struct Lines {
    escape: Escape,
    line: Vec<u8>,
    /// The last character was a carriage return: what comes next decides what it was.
    returned: bool,
    /// Numbers of the control sequence that is being read.
    numbers: Numbers,
    /// The row of the cursor, as far as it is known; 1 is the first.
    row: Option<u32>,
    /// The column, from 1 on, to which the cursor was moved within this line.
    column: Option<usize>,
}

/// The first two numbers of a control sequence; the default of each is 1.
#[derive(Debug, Clone, Copy, Default)]
struct Numbers {
    values: [u32; 2],
    index: usize,
}

impl Numbers {
    fn take(&mut self, byte: u8) {
        match byte {
            b';' => self.index += 1,
            b'0'..=b'9' => {
                if let Some(value) = self.values.get_mut(self.index) {
                    *value = value.saturating_mul(10).saturating_add(u32::from(byte - b'0'));
                }
            }
            _ => {}
        }
    }

    fn get(self, index: usize) -> u32 {
        self.values[index].max(1)
    }
}

impl Lines {
    /// Nothing printed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes, and hands over each line that they end, without its end.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(&str)) {
        for &byte in bytes {
            if self.overwrites(byte) {
                self.end(&mut each);
            }
            if self.take(byte) {
                self.end(&mut each);
            }
        }
    }

    fn end(&mut self, each: &mut impl FnMut(&str)) {
        each(&String::from_utf8_lossy(&self.line));
        self.line.clear();
        self.column = None;
    }

    /// The line that has not ended yet.
    pub fn partial(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.line)
    }

    /// Takes a byte; `true`: the line is complete.
    fn take(&mut self, byte: u8) -> bool {
        match self.escape {
            Escape::None => self.plain(byte),
            Escape::Begun => self.begun(byte),
            Escape::OneMore => {
                self.escape = Escape::None;
                false
            }
            Escape::Control(count) => self.control(byte, count),
            Escape::String(count) => {
                self.escape = match byte {
                    0x07 => Escape::None,
                    0x1b => Escape::StringEnd,
                    _ if count < MAX_STRING => Escape::String(count + 1),
                    _ => Escape::None,
                };
                false
            }
            Escape::StringEnd => {
                self.escape = Escape::None;
                byte != b'\\' && self.begun(byte)
            }
        }
    }

    fn begun(&mut self, byte: u8) -> bool {
        self.numbers = Numbers::default();
        self.row = match byte {
            b'c' => Some(1),
            b'E' | b'D' => None,
            _ => self.row,
        };
        self.escape = match byte {
            b'[' => Escape::Control(0),
            b']' | b'P' | b'X' | b'^' | b'_' => Escape::String(0),
            0x20..=0x2f => Escape::OneMore,
            0x1b => Escape::Begun,
            _ => Escape::None,
        };
        // Reset, next line, index: the terminal goes elsewhere.
        matches!(byte, b'c' | b'E' | b'D') && !self.line.is_empty()
    }

    /// Within a control sequence: its last byte (0x40 to 0x7e) says what it does.
    fn control(&mut self, byte: u8, count: u32) -> bool {
        match byte {
            0x40..=0x7e => {
                self.escape = Escape::None;
                match byte {
                    b'H' | b'f' => self.moved(),
                    // Other movements and clearing of the screen: what follows is another line.
                    b'A' | b'B' | b'E'..=b'G' | b'd' => {
                        self.row = None;
                        !self.line.is_empty()
                    }
                    b'J' => !self.line.is_empty(),
                    b'C' => self.append(b' '),
                    _ => false,
                }
            }
            0x20..=0x3f if count < MAX_PARAMETERS => {
                self.numbers.take(byte);
                self.escape = Escape::Control(count + 1);
                false
            }
            0x1b => {
                self.escape = Escape::Begun;
                false
            }
            // It was none.
            _ => {
                self.escape = Escape::None;
                self.plain(byte)
            }
        }
    }

    /// The cursor is moved. SeaBIOS, which puts its screen on the serial line, does so in the middle of a line, to the place
    /// at which the cursor is or one before it; `true`: elsewhere, what follows is another line.
    fn moved(&mut self) -> bool {
        let (row, column) = (self.numbers.get(0), self.numbers.get(1) as usize);
        let end = self.end_column();
        if self.row.replace(row) == Some(row) && (column == end || column + 1 == end) {
            self.returned = false;
            self.column = Some(column);
            return false;
        }
        !self.line.is_empty()
    }

    /// The column behind the line's last character, from 1 on.
    fn end_column(&self) -> usize {
        1 + self.line.iter().filter(|byte| **byte & 0xc0 != 0x80).count()
    }

    /// Whether this byte is printed over a line that a carriage return, or a movement, left.
    fn overwrites(&self, byte: u8) -> bool {
        let within = || self.column.is_some_and(|column| column != self.end_column());
        self.escape == Escape::None
            && !self.line.is_empty()
            && is_printed(byte)
            && (self.returned || within())
    }

    fn plain(&mut self, byte: u8) -> bool {
        match byte {
            b'\n' => {
                self.returned = false;
                self.row = self.row.map(|row| (row + 1).min(ROWS));
            }
            b'\r' => self.returned = true,
            0x1b => self.escape = Escape::Begun,
            0x08 => self.erase(),
            _ if is_printed(byte) => {
                self.returned = false;
                return self.append(byte);
            }
            _ => {}
        }
        byte == b'\n'
    }

    fn append(&mut self, byte: u8) -> bool {
        self.column = None;
        self.line.push(byte);
        self.line.len() >= MAX_LINE
    }

    /// Takes back the last character.
    fn erase(&mut self) {
        while self.line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
    }
}

/// Whether a terminal shows the byte (or a character that it is part of).
fn is_printed(byte: u8) -> bool {
    byte == b'\t' || (byte >= 0x20 && byte != 0x7f)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> (Vec<String>, String) {
        let mut lines = Lines::new();
        let mut all = vec![];
        lines.push(bytes, |line| all.push(line.to_owned()));
        (all, lines.partial().into_owned())
    }

    #[track_caller]
    fn expect(bytes: &[u8], complete: &[&str], partial: &str) {
        let (found, rest) = lines(bytes);
        assert_eq!(
            (found.iter().map(String::as_str).collect::<Vec<_>>().as_slice(), &*rest),
            (complete, partial)
        );
        // However the stream is cut.
        let mut one = Lines::new();
        let mut all = vec![];
        for byte in bytes {
            one.push(&[*byte], |line| all.push(line.to_owned()));
        }
        assert_eq!((all, one.partial().into_owned()), (found, rest));
    }

    #[test]
    fn lines_end_with_either_end_and_prompts_do_not() {
        expect(b"a\r\nb\nc", &["a", "b"], "c");
        expect(b"\r\r\n\nhost login: ", &["", ""], "host login: ");
        expect(b"a\r\r\n", &["a"], "");
    }

    #[test]
    fn colours_go_and_text_stays() {
        expect(
            b"[\x1b[0;32m  OK  \x1b[0m] Reached target \x1b[0;1;39mmulti-user.target\x1b[0m.\r\n",
            &["[  OK  ] Reached target multi-user.target."],
            "",
        );
        expect(b"\x1b(B\x1b)0x\x1b]0;title\x07y\x1b]2;t\x1b\\z", &[], "xyz");
        expect(b"\x1b[?25l\x1b[2Ka", &[], "a");
    }

    #[test]
    fn what_is_overwritten_was_a_line() {
        expect(b"10%\r20%\r30%\n", &["10%", "20%", "30%"], "");
        expect(b"[***   ] Job\r\x1b[K[ ***  ] Job\r\x1b[K", &["[***   ] Job"], "[ ***  ] Job");
        expect(b"ab\x08\x08cd", &[], "cd");
    }

    #[test]
    fn the_cursor_goes_to_another_line() {
        expect(b"\x1b[2J\x1b[1;1HGNU GRUB\x1b[4;2HUse the keys\x1b[5;2H", &["GNU GRUB", "Use the keys"], "");
    }

    /// As SeaBIOS puts its screen on a serial line when a tick of its timer comes in between.
    #[test]
    fn the_cursor_stays_in_its_line() {
        for cut in [
            "L\r\x1b[3;02Hoading /v failed",
            "Load\x1b[3;04H\x1b[3;05Hing /v failed",
            "Loading /v\x1b[3;11H failed",
        ] {
            let text = format!("\x1bc\x1b[?7l\x1b[2Jone\r\n\r\n{cut}\r\nboot: ");
            expect(text.as_bytes(), &["one", "", "Loading /v failed"], "boot: ");
        }
        // Another row, a row that nobody knows, and a place in the line that is printed over.
        expect(b"\x1bcone\x1b[2;4Htwo\n", &["one", "two"], "");
        expect(b"one\x1b[1;4Htwo\n", &["one", "two"], "");
        expect(b"\x1bcone\x1b[1;3Htwo\n", &["one", "two"], "");
        // The last row scrolls.
        let mut text = b"\x1bc".to_vec();
        text.extend(b"\n".repeat(30));
        text.extend(b"on\x1b[25;3He");
        assert_eq!(lines(&text).1, "one");
    }

    #[test]
    fn invalid_text_is_shown_as_such() {
        expect(b"a\xff\xc3\xa4b\n", &["a\u{fffd}\u{e4}b"], "");
        expect(b"\x00\x01\x02ok\x7f\n", &["ok"], "");
    }

    #[test]
    fn nothing_grows_without_bound() {
        let (all, rest) = lines(&vec![b'x'; 3 * MAX_LINE + 5]);
        assert_eq!((all.len(), rest.len()), (3, 5));
        // A sequence that never ends swallows only so much.
        let mut endless = b"\x1b]".to_vec();
        endless.resize(MAX_LINE * 2, b'y');
        endless.extend(b"\nseen\n");
        assert_eq!(lines(&endless).0.last().unwrap(), "seen");
        let mut numbers = b"\x1b[".to_vec();
        numbers.resize(200, b'1');
        numbers.extend(b"\n");
        assert_eq!(lines(&numbers).0.len(), 1);
    }
}
