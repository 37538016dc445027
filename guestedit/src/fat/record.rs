//! Directory records of 32 bytes (Microsoft, "FAT: General Overview of On-Disk Format", chapters 6 and 7): a file's own,
//! and those in front of it that hold its long name.

use block::{Error, Result};
use guestdisk::fs::{CODE_PAGE, FileKind};

use crate::bytes::{byte, high16, le16, le32, low16, low32, part, put_le16, put_le32};
use crate::types::Stat;

/// Bytes of a record.
pub(super) const RECORD: usize = 32;
/// The first byte of a record that is not in use.
pub(super) const FREE: u8 = 0xe5;

const READ_ONLY: u8 = 1;
const LABEL: u8 = 8;
const DIRECTORY: u8 = 0x10;
const ARCHIVE: u8 = 0x20;
const LONG_NAME: u8 = 0xf;
/// UTF-16 units in a record of a long name.
const UNITS: usize = 13;
/// The longest name in UTF-16 units.
const MOST_UNITS: usize = 255;

/// The record of a file or directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    raw: [u8; RECORD],
}

impl Record {
    pub(super) fn parse(raw: &[u8]) -> Self {
        let mut own = [0; RECORD];
        let found = part(raw, 0, RECORD);
        own[..found.len()].copy_from_slice(found);
        Self { raw: own }
    }

    /// A new one. `name` are the eleven bytes of its short name.
    pub(super) fn create(name: [u8; 11], directory: bool, writable: bool, time: i64) -> Self {
        let mut raw = [0; RECORD];
        raw[..11].copy_from_slice(&name);
        raw[11] = match (directory, writable) {
            (true, _) => DIRECTORY,
            (false, true) => ARCHIVE,
            (false, false) => ARCHIVE | READ_ONLY,
        };
        let (date, clock) = of_seconds(time);
        put_le16(&mut raw, 14, clock);
        put_le16(&mut raw, 16, date);
        let mut record = Self { raw };
        record.touch(time);
        record
    }

    pub(super) fn raw(&self) -> &[u8] {
        &self.raw
    }

    pub(super) fn is_directory(&self) -> bool {
        self.raw[11] & DIRECTORY != 0
    }

    /// Its first cluster; 0: none. `wide`: FAT32.
    pub(super) fn cluster(&self, wide: bool) -> u32 {
        let high = if wide { u32::from(le16(&self.raw, 20)) << 16 } else { 0 };
        high | u32::from(le16(&self.raw, 26))
    }

    pub(super) fn set_cluster(&mut self, cluster: u32) {
        put_le16(&mut self.raw, 20, high16(cluster));
        put_le16(&mut self.raw, 26, low16(cluster));
    }

    pub(super) fn size(&self) -> u64 {
        if self.is_directory() { 0 } else { le32(&self.raw, 28).into() }
    }

    pub(super) fn set_size(&mut self, size: u32) {
        put_le32(&mut self.raw, 28, size);
    }

    /// The contents have been changed.
    pub(super) fn touch(&mut self, time: i64) {
        let (date, clock) = of_seconds(time);
        put_le16(&mut self.raw, 18, date);
        put_le16(&mut self.raw, 22, clock);
        put_le16(&mut self.raw, 24, date);
    }

    pub(super) fn stat(&self, node: u64) -> Stat {
        let (kind, mode) = match (self.is_directory(), self.raw[11] & READ_ONLY) {
            (true, _) => (FileKind::Directory, 0o755),
            (false, 0) => (FileKind::File, 0o644),
            (false, _) => (FileKind::File, 0o444),
        };
        let mtime = seconds(le16(&self.raw, 24).into(), le16(&self.raw, 22).into());
        Stat { kind, mode, uid: 0, gid: 0, size: self.size(), mtime, links: 1, node }
    }

    /// The short name. Two bits say that a part of it is to be shown in lower case, as Windows NT has it.
    pub(super) fn short(&self) -> String {
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
        if extension.is_empty() { name } else { format!("{name}.{extension}") }
    }

    pub(super) fn name(&self) -> [u8; 11] {
        let mut name = [0; 11];
        name.copy_from_slice(&self.raw[..11]);
        name
    }
}

fn character(byte: u8) -> char {
    match byte {
        0..0x20 => '_',
        0x20..0x80 => byte.into(),
        _ => CODE_PAGE.chars().nth(usize::from(byte) - 0x80).unwrap_or('_'),
    }
}

/// What the records of a long name carry ("Checksum").
fn checksum(name: &[u8; 11]) -> u8 {
    name.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// A file in a directory.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Index of its first record in the directory: of its long name, if it has one.
    pub(super) first: usize,
    /// Index of its own record.
    pub(super) last: usize,
    pub(super) record: Record,
    long: Option<String>,
}

impl Entry {
    /// The long name if there is one.
    pub(super) fn name(&self) -> String {
        self.long.clone().unwrap_or_else(|| self.record.short())
    }

    /// Whether it goes by this name, without regard to case.
    pub(super) fn is(&self, name: &str) -> bool {
        let same = |own: &str| own.eq_ignore_ascii_case(name) || own.to_lowercase() == name.to_lowercase();
        self.long.as_deref().is_some_and(same) || same(&self.record.short())
    }
}

/// The parts of a long name as they come: the last one first.
#[derive(Default)]
struct Parts {
    units: Vec<u16>,
    at: u8,
    checksum: u8,
    first: usize,
}

/// The files in the records of a directory; not `.`, `..` and the label. Ends at the first record that was never used,
/// whose index is the other result.
pub(super) fn entries(directory: &[u8]) -> (Vec<Entry>, usize) {
    let (mut found, mut parts) = (vec![], Parts::default());
    let mut index = 0;
    for raw in directory.chunks_exact(RECORD) {
        match (raw[0], raw[11]) {
            (0, _) => break,
            (FREE, _) => parts = Parts::default(),
            (_, attributes) if attributes & 0x3f == LONG_NAME => add_part(&mut parts, raw, index),
            (_, attributes) if attributes & (LABEL | DIRECTORY) == LABEL => parts = Parts::default(),
            _ => {
                let record = Record::parse(raw);
                let parts = std::mem::take(&mut parts);
                let belongs = parts.at == 1 && parts.checksum == checksum(&record.name());
                let units = parts.units.into_iter().take_while(|unit| *unit != 0);
                let long: String = char::decode_utf16(units)
                    .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
                    .collect();
                let long = (belongs && !long.is_empty()).then_some(long);
                let first = if long.is_some() { parts.first } else { index };
                if !matches!(raw[..2], [b'.', b'.' | b' ']) {
                    found.push(Entry { first, last: index, record, long });
                }
            }
        }
        index += 1;
    }
    (found, index)
}

fn add_part(parts: &mut Parts, raw: &[u8], index: usize) {
    let number = raw[0] & 0x3f;
    if raw[0] & 0x40 != 0 {
        *parts = Parts { first: index, checksum: raw[13], ..Parts::default() };
    } else if number == 0 || number != parts.at.wrapping_sub(1) || raw[13] != parts.checksum {
        *parts = Parts::default();
        return;
    }
    parts.at = number;
    let units = [part(raw, 1, 10), part(raw, 14, 12), part(raw, 28, 4)].concat();
    parts.units.splice(0..0, units.chunks_exact(2).map(|pair| le16(pair, 0)));
}

/// Refuses what cannot be a name ("Long File Names").
pub(super) fn check_name(name: &str) -> Result<()> {
    let bad = |character: char| character < ' ' || "\"*/:<>?\\|\u{7f}".contains(character);
    let units = name.encode_utf16().count();
    let fine = (1..=MOST_UNITS).contains(&units) && !name.contains(bad) && !name.ends_with(['.', ' ']);
    if fine { Ok(()) } else { Err(Error::usage(format!("{name:?} cannot be a name on FAT"))) }
}

/// The records of a new file: its long name, if it needs one, and its own. `taken`: the short names that are there.
pub(super) fn records(
    name: &str,
    taken: &[[u8; 11]],
    record: impl FnOnce([u8; 11]) -> Record,
) -> Result<Vec<u8>> {
    let (basis, lossy) = short_name(name);
    let plain = !lossy && !taken.contains(&basis);
    let short = if plain { Some(basis) } else { numbered(basis, taken) };
    let short = short.ok_or_else(|| Error::usage("a directory in which no short name is free"))?;
    let record = record(short);
    let mut bytes = vec![];
    if !plain || record.short() != name {
        bytes.extend(long_name(name, checksum(&short)));
    }
    bytes.extend_from_slice(record.raw());
    Ok(bytes)
}

fn long_name(name: &str, checksum: u8) -> Vec<u8> {
    let mut units: Vec<_> = name.encode_utf16().collect();
    if units.len() % UNITS != 0 {
        units.push(0);
        units.resize(units.len().next_multiple_of(UNITS), 0xffff);
    }
    let count = units.len() / UNITS;
    let mut bytes = vec![];
    for (index, units) in units.chunks(UNITS).enumerate().rev() {
        let mut raw = [0; RECORD];
        let last = if index + 1 == count { 0x40 } else { 0 };
        raw[0] = u8::try_from(index + 1).unwrap_or(0) | last;
        raw[11] = LONG_NAME;
        raw[13] = checksum;
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain([28, 30]);
        places.zip(units).for_each(|(at, unit)| put_le16(&mut raw, at, *unit));
        bytes.extend(raw);
    }
    bytes
}

/// The eleven bytes that stand for a name, and whether that has lost more than upper and lower case ("The Basis-Name
/// Generation Algorithm").
fn short_name(name: &str) -> ([u8; 11], bool) {
    let mut lossy = name.starts_with('.');
    let trimmed = name.trim_start_matches('.');
    let (stem, extension) = trimmed.rsplit_once('.').unwrap_or((trimmed, ""));
    let mut short = [b' '; 11];
    for (text, range) in [(stem, 0..8), (extension, 8..11)] {
        let mut room = short[range].iter_mut();
        for letter in text.chars() {
            let upper = letter.to_ascii_uppercase();
            let byte = match upper {
                ' ' | '.' => None,
                'A'..='Z' | '0'..='9' => Some(upper),
                _ if "$%'-_@~`!(){}^#&".contains(upper) => Some(upper),
                _ => Some('_'),
            };
            lossy |= byte != Some(upper);
            let Some(byte) = byte.and_then(|byte| u8::try_from(byte).ok()) else { continue };
            match room.next() {
                Some(place) => *place = byte,
                None => lossy = true,
            }
        }
    }
    if short[0] == b' ' {
        (short[0], lossy) = (b'_', true);
    }
    (short, lossy)
}

/// The first name of `STEM~1.EXT`, `STEM~2.EXT`.. that is not taken ("The Numeric-Tail Generation Algorithm").
fn numbered(basis: [u8; 11], taken: &[[u8; 11]]) -> Option<[u8; 11]> {
    let stem = basis[..8].iter().position(|byte| *byte == b' ').unwrap_or(8);
    (1..1_000_000_u32).find_map(|number| {
        let tail = format!("~{number}");
        let from = stem.min(8 - tail.len());
        let mut name = basis;
        name[from..8].fill(b' ');
        name[from..from + tail.len()].copy_from_slice(tail.as_bytes());
        (!taken.contains(&name)).then_some(name)
    })
}

/// Seconds since 1970 of a date and time of DOS, taken as UTC ("Date and Time Formats").
fn seconds(date: i64, time: i64) -> i64 {
    let (year, month, day) = (1980 + (date >> 9), (date >> 5 & 15).clamp(1, 12), (date & 31).max(1));
    // Days from the civil calendar, the year beginning in March.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    days * 86_400 + (time >> 11) * 3600 + (time >> 5 & 63) * 60 + (time & 31) * 2
}

/// The date and time of DOS, from 1980 to 2107, in steps of two seconds.
fn of_seconds(seconds: i64) -> (u16, u16) {
    const FIRST: i64 = 315_532_800;
    const LAST: i64 = 4_354_819_198;
    let seconds = seconds.clamp(FIRST, LAST);
    let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Days since the first of March of the year 0.
    let days = days + 719_468;
    let century = days / 146_097;
    let of_era = days % 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = 400 * century + year + i64::from(month <= 2);
    let small = |value: i64| low16(low32(value.cast_unsigned()));
    let date = (year - 1980) << 9 | month << 5 | day;
    let clock = (time / 3600) << 11 | (time / 60 % 60) << 5 | (time % 60 / 2);
    (small(date), small(clock))
}

/// Whether a record was never used.
pub(super) fn is_end(raw: &[u8]) -> bool {
    byte(raw, 0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names() {
        let short = |name| {
            let (short, lossy) = short_name(name);
            (String::from_utf8(short.to_vec()).unwrap(), lossy)
        };
        assert_eq!(short("BOOTX64.EFI"), ("BOOTX64 EFI".into(), false));
        assert_eq!(short("grub.cfg"), ("GRUB    CFG".into(), false));
        assert_eq!(short("a long name.conf"), ("ALONGNAMCON".into(), true));
        assert_eq!(short("grün"), ("GR_N       ".into(), true));
        assert_eq!(short(".x"), ("X          ".into(), true));
        let (basis, _) = short_name("a long name.conf");
        let first = numbered(basis, &[]).unwrap();
        assert_eq!(&first, b"ALONGN~1CON");
        assert_eq!(&numbered(basis, &[first]).unwrap(), b"ALONGN~2CON");
    }

    #[test]
    fn what_is_written_is_read() {
        let mut directory = vec![];
        let names =
            ["BOOTX64.EFI", "grub.cfg", "a long name of 13", "exactly13char", "日本 \u{1f427}.txt", "x"];
        let mut taken = vec![];
        for name in names {
            let bytes =
                records(name, &taken, |short| Record::create(short, false, true, 1_700_000_000)).unwrap();
            taken.push(Record::parse(&bytes[bytes.len() - RECORD..]).name());
            directory.extend(bytes);
        }
        directory.extend([0; RECORD]);
        let (found, end) = entries(&directory);
        assert_eq!(found.iter().map(Entry::name).collect::<Vec<_>>(), names);
        assert_eq!((end + 1) * RECORD, directory.len());
        assert!(
            found[2].is("A Long Name of 13")
                && found[0].first == found[0].last
                && found[0].record.stat(0).mtime == 1_700_000_000
        );
    }

    #[test]
    fn dates_there_and_back() {
        for time in [315_532_800, 951_782_400, 1_709_251_198, 1_700_000_000, 4_102_444_800, 4_354_819_198] {
            let (date, clock) = of_seconds(time);
            assert_eq!(seconds(date.into(), clock.into()), time);
        }
        assert_eq!(of_seconds(0), (0x21, 0));
    }

    #[test]
    fn names_that_cannot_be() {
        for bad in ["", "a/b", "x.", "x ", "a:b", &"x".repeat(256)] {
            check_name(bad).unwrap_err();
        }
        check_name("grün 日本.txt").unwrap();
    }
}
