//! The screen of a guest in qemu, as far as it is text: what the memory of a VGA in text mode holds, looked at from time
//! to time.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use super::qmp::Qmp;

/// The text's memory: pairs of character and colours (IBM's VGA, mode 3).
const TEXT_START: u64 = 0xb_8000;
const TEXT_LEN: usize = 0x8000;
/// Characters of a row, and rows that are shown.
const COLUMNS: usize = 80;
const ROWS: usize = 25;
/// How often it is looked at.
pub(super) const INTERVAL: Duration = Duration::from_millis(300);
/// qemu has to answer within this time.
const ANSWER: Duration = Duration::from_secs(5);

/// A screen that is looked at.
#[derive(Debug)]
pub(super) struct Screen {
    /// Where qemu writes what the memory holds.
    file: PathBuf,
    rows: Vec<String>,
}

impl Screen {
    pub(super) fn new(file: PathBuf) -> Self {
        Self { file, rows: vec![] }
    }

    /// The rows, if they have changed. Nothing if qemu does not tell.
    pub(super) fn look(&mut self, qmp: &mut Qmp<'_>) -> Option<&[String]> {
        let arguments = json!({ "val": TEXT_START, "size": TEXT_LEN, "filename": self.file });
        qmp.run("pmemsave", arguments, ANSWER).ok()?;
        let rows = text(&std::fs::read(&self.file).ok()?)?;
        if rows == self.rows {
            return None;
        }
        self.rows = rows;
        Some(&self.rows)
    }

    /// The last rows, as many as fit on a screen.
    pub(super) fn last(&self) -> Vec<String> {
        self.rows[self.rows.len().saturating_sub(ROWS)..].to_vec()
    }
}

/// The rows of text; `None` if this is no text. Which of them are visible only the registers know (Linux scrolls by moving
/// the start), so that all are given but for the empty ones.
fn text(memory: &[u8]) -> Option<Vec<String>> {
    let codes: Vec<u8> = memory.chunks_exact(2).map(|cell| cell[0]).collect();
    let printable = codes.iter().filter(|code| matches!(code, 0 | 0x20..0x7f | 0xb0..0xe0)).count();
    // What is in the memory in graphics mode is anything.
    if printable * 10 < codes.len() * 9 {
        return None;
    }
    let row =
        |codes: &[u8]| codes.iter().map(|code| character(*code)).collect::<String>().trim_end().to_owned();
    Some(codes.chunks_exact(COLUMNS).map(row).filter(|row| !row.is_empty()).collect())
}

/// ASCII as it is; of the rest, the frames of menus.
fn character(code: u8) -> char {
    match code {
        0 => ' ',
        0x20..0x7f => char::from(code),
        0xb3 | 0xba => '|',
        0xc4 | 0xcd => '-',
        0xb0..0xe0 => '+',
        _ => '?',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_text_wherever_the_screen_begins() {
        let mut memory = [b' ', 7].repeat(TEXT_LEN / 2);
        for (row, shown) in [(0, "GRUB loading."), (30, "vm login: \u{b3}")] {
            for (column, code) in shown.chars().enumerate() {
                memory[2 * (row * COLUMNS + column)] = u8::try_from(u32::from(code)).unwrap();
            }
        }
        assert_eq!(text(&memory).unwrap(), ["GRUB loading.", "vm login: |"]);
        assert_eq!(text(&vec![0; TEXT_LEN]).unwrap(), Vec::<String>::new());
        let pixels: Vec<u8> = (0..TEXT_LEN).map(|at| u8::try_from(at / 7 % 256).unwrap()).collect();
        assert_eq!(text(&pixels), None);
        assert_eq!(text(&[]).unwrap(), Vec::<String>::new());
    }
}
