//! Directory entries (chapters 6 and 7 of the specification), and the long names in front of them.

use super::super::node::{FileKind, Metadata};
use crate::bytes::{byte, le16, le32, part};

const READ_ONLY: u8 = 1;
const LABEL: u8 = 8;
const DIRECTORY: u8 = 0x10;
const LONG_NAME: u8 = 0xf;

/// Characters 0x80 to 0xff of code page 437, which short names are written in.
pub const CODE_PAGE: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀\
                         αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// The entry of a file or directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    raw: [u8; 32],
    /// FAT32: the first cluster has 32 bits.
    wide: bool,
}

/// What a file is called.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) long: Option<String>,
    pub(super) short: String,
}

impl Names {
    /// The long one if there is one.
    pub(super) fn best(&self) -> &str {
        self.long.as_deref().unwrap_or(&self.short)
    }
}

impl Entry {
    pub(super) fn new(raw: [u8; 32], wide: bool) -> Self {
        Self { raw, wide }
    }

    pub(super) fn is_directory(&self) -> bool {
        self.raw[11] & DIRECTORY != 0
    }

    /// Its first cluster.
    pub(super) fn cluster(&self) -> u32 {
        let high = if self.wide { u32::from(le16(&self.raw, 20)) << 16 } else { 0 };
        high | u32::from(le16(&self.raw, 26))
    }

    pub(super) fn metadata(&self) -> Metadata {
        let (kind, mode) = match (self.is_directory(), self.raw[11] & READ_ONLY) {
            (true, _) => (FileKind::Directory, 0o755),
            (false, 0) => (FileKind::File, 0o644),
            (false, _) => (FileKind::File, 0o444),
        };
        let size = if self.is_directory() { 0 } else { le32(&self.raw, 28).into() };
        let mtime = seconds(le16(&self.raw, 24).into(), le16(&self.raw, 22).into());
        Metadata { kind, mode, uid: 0, gid: 0, size, mtime, links: 1 }
    }

    /// The short name. Two bits say that a part of it is to be shown in lower case, as Windows NT has it.
    fn short(&self) -> String {
        let piece = |range: std::ops::Range<usize>, lower: bool| {
            let text: String = self.raw[range].iter().map(|byte| character(*byte)).collect();
            let text = text.trim_end_matches(' ');
            if lower { text.to_lowercase() } else { text.to_owned() }
        };
        let mut name = piece(0..8, self.raw[12] & 8 != 0);
        if self.raw[0] == 5 {
            name.replace_range(0..1, "σ");
        }
        let extension = piece(8..11, self.raw[12] & 0x10 != 0);
        if !extension.is_empty() {
            name.push('.');
            name.push_str(&extension);
        }
        name
    }

    /// What the records of its long name carry ("Checksum").
    fn checksum(&self) -> u8 {
        self.raw[..11].iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
    }
}

fn character(byte: u8) -> char {
    match byte {
        0..0x20 => '_',
        0x20..0x80 => byte.into(),
        _ => CODE_PAGE.chars().nth(usize::from(byte) - 0x80).unwrap_or('_'),
    }
}

/// Whether this record is the volume's label.
pub(super) fn is_label(record: &[u8]) -> bool {
    byte(record, 0) != 0xe5
        && byte(record, 11) & 0x3f & (LABEL | DIRECTORY) == LABEL
        && byte(record, 11) & 0xf != LONG_NAME
}

/// A label without its padding; `NO NAME` is none.
pub(super) fn label(bytes: &[u8]) -> String {
    let text: String = bytes.iter().take_while(|byte| **byte != 0).map(|byte| character(*byte)).collect();
    let text = text.trim_end_matches(' ');
    if text == "NO NAME" { String::new() } else { text.to_owned() }
}

/// The parts of a long name as they come: the last one first.
#[derive(Debug, Default)]
pub(super) struct LongName {
    units: Vec<u16>,
    /// Number of the part that came last.
    at: u8,
    checksum: u8,
}

impl LongName {
    /// Takes a record. `None` if it is not a file's own.
    pub(super) fn record(&mut self, record: &[u8], wide: bool) -> Option<Entry> {
        let (first, attributes) = (byte(record, 0), byte(record, 11));
        if first == 0xe5 {
            *self = Self::default();
            return None;
        }
        if attributes & 0x3f == LONG_NAME {
            self.part(record);
            return None;
        }
        if attributes & LABEL != 0 {
            *self = Self::default();
            return None;
        }
        Some(Entry::new(record.try_into().ok()?, wide))
    }

    fn part(&mut self, record: &[u8]) {
        let (number, checksum) = (byte(record, 0) & 0x3f, byte(record, 13));
        if byte(record, 0) & 0x40 != 0 {
            *self = Self { units: vec![], at: number, checksum };
        } else if self.at != number.saturating_add(1) || checksum != self.checksum {
            *self = Self::default();
            return;
        }
        self.at = number;
        let units = [part(record, 1, 10), part(record, 14, 12), part(record, 28, 4)].concat();
        let units = units.chunks_exact(2).map(|pair| le16(pair, 0));
        self.units.splice(0..0, units);
    }

    /// The names of the file whose record has just been taken.
    pub(super) fn names(&mut self, entry: &Entry) -> Names {
        let parts = std::mem::take(self);
        let belongs = parts.at == 1 && parts.checksum == entry.checksum();
        let units = parts.units.iter().copied().take_while(|unit| *unit != 0);
        let long: String =
            char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
        Names { long: (belongs && !long.is_empty()).then_some(long), short: entry.short() }
    }
}

/// Seconds since 1970 of a date and time of DOS, taken as UTC ("Date and Time Formats").
fn seconds(date: i64, time: i64) -> i64 {
    let (year, month, day) = (1980 + (date >> 9), (date >> 5 & 15).clamp(1, 12), (date & 31).max(1));
    // Days from the civil calendar, the year beginning in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    days * 86_400 + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_page_is_whole() {
        assert_eq!(CODE_PAGE.chars().count(), 128);
        assert_eq!((character(0x80), character(0xe5), character(0xff)), ('Ç', 'σ', '\u{a0}'));
    }

    #[test]
    fn dates_of_dos() {
        assert_eq!(seconds(0x21, 0), 315_532_800);
        // 2024-02-29 23:59:58
        assert_eq!(seconds((44 << 9) | (2 << 5) | 29, (23 << 11) | (59 << 5) | 29), 1_709_251_198);
    }
}
