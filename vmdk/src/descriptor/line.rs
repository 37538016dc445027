//! A line of a descriptor: a key with its value, or an extent.

use block::{Error, Result};

use crate::SECTOR;

/// The longest name of a file in bytes, as in qemu.
const MAX_NAME: usize = 511;
/// The most sectors of an extent: what fits into a signed number of bytes.
const MAX_SECTORS: u64 = i64::MAX.cast_unsigned() / SECTOR;

/// What may be done with an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading and writing.
    ReadWrite,
    /// Reading.
    ReadOnly,
    /// Nothing: the extent only takes its place.
    None,
}

/// How an extent is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The bytes as they are, from `offset` of the file on.
    Flat,
    /// A hosted sparse extent.
    Sparse,
    /// Zeros, without a file.
    Zero,
    /// The bytes as they are, on ESXi.
    Vmfs,
    /// A sparse extent of ESXi (COWD).
    VmfsSparse,
    /// A raw device, by a mapping file.
    VmfsRdm,
    /// A raw device.
    VmfsRaw,
    /// A space-efficient sparse extent of ESXi.
    SeSparse,
}

impl Kind {
    /// Every kind, with its word in the descriptor.
    const WORDS: [(&'static str, Self); 8] = [
        ("FLAT", Self::Flat),
        ("SPARSE", Self::Sparse),
        ("ZERO", Self::Zero),
        ("VMFS", Self::Vmfs),
        ("VMFSSPARSE", Self::VmfsSparse),
        ("VMFSRDM", Self::VmfsRdm),
        ("VMFSRAW", Self::VmfsRaw),
        ("SESPARSE", Self::SeSparse),
    ];

    /// Its word in the descriptor.
    pub fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, kind)| *kind == self).map_or("", |(word, _)| word)
    }

    fn from_word(word: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(known, _)| *known == word).map(|(_, kind)| *kind)
    }

    /// Whether the bytes lie in the file as they are.
    pub fn is_flat(self) -> bool {
        matches!(self, Self::Flat | Self::Vmfs)
    }
}

/// A line such as `RW 4192256 SPARSE "disk-s001.vmdk"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: Access,
    /// Its part of the disk, in sectors. (qemu-img makes disks of 0 sectors.)
    pub sectors: u64,
    /// How it is stored.
    pub kind: Kind,
    /// Its file, from the descriptor's folder, or absolute. Zeros have none.
    pub file: Option<String>,
    /// Where in the file it begins, in sectors; not 0 for flat ones only.
    pub offset: u64,
}

impl ExtentLine {
    /// Reads a line. `None`: it is not about an extent.
    pub(super) fn parse(line: &[u8]) -> Result<Option<Self>> {
        let line = line.trim_ascii();
        let (word, rest) = next_word(line);
        let access = match word {
            b"RW" => Access::ReadWrite,
            b"RDONLY" => Access::ReadOnly,
            b"NOACCESS" => Access::None,
            _ => return Ok(None),
        };
        let bad = |what: &str| {
            let line = String::from_utf8_lossy(line).into_owned();
            Error::invalid(format!("Invalid extent line: {line}")).hint(what)
        };
        let (sectors, rest) = next_word(rest);
        let sectors = number(sectors).filter(|sectors| *sectors <= MAX_SECTORS);
        let sectors = sectors.ok_or_else(|| bad("its number of sectors makes no sense"))?;
        let (kind, rest) = next_word(rest);
        let kind = std::str::from_utf8(kind).ok().and_then(Kind::from_word);
        let kind = kind.ok_or_else(|| bad("this kind of extent is not known"))?;
        if kind == Kind::Zero && rest.is_empty() {
            return Ok(Some(Self { access, sectors, kind, file: None, offset: 0 }));
        }
        let (name, rest) = quoted(rest).ok_or_else(|| bad("it does not name a file"))?;
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(bad("the name of the file is empty, or longer than 511 bytes"));
        }
        let (offset, _) = next_word(rest);
        let given = number(offset).filter(|offset| *offset <= MAX_SECTORS);
        let offset = match (kind, offset) {
            (Kind::Flat | Kind::Vmfs, []) | (Kind::Zero, _) => 0,
            (Kind::Flat | Kind::Vmfs, _) => given.ok_or_else(|| bad("the offset makes no sense"))?,
            _ if given.unwrap_or(0) != 0 => return Err(bad("such an extent begins with its file")),
            _ => 0,
        };
        if kind == Kind::Flat && rest.is_empty() {
            return Err(bad("a flat extent says where in its file it begins"));
        }
        Ok(Some(Self { access, sectors, kind, file: Some(decode_text(name)), offset }))
    }

    /// What it takes of its file: the name, and first and last sector (exclusive).
    pub(crate) fn file_range(&self) -> Option<(&str, u64, u64)> {
        let name = self.file.as_deref().filter(|_| self.kind != Kind::Zero && self.access != Access::None)?;
        let name = name.trim_start_matches("./");
        match self.kind.is_flat() {
            true => Some((name, self.offset, self.offset.saturating_add(self.sectors))),
            false => Some((name, 0, u64::MAX)),
        }
    }
}

fn next_word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = text.trim_ascii_start();
    let end = text.iter().position(u8::is_ascii_whitespace).unwrap_or(text.len());
    (&text[..end], &text[end..])
}

/// What stands between the first two quotation marks, and what follows.
fn quoted(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = text.trim_ascii_start().strip_prefix(b"\"")?;
    let end = text.iter().position(|byte| *byte == b'"')?;
    Some((&text[..end], &text[end + 1..]))
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The parts of a line `key = "value"`; comments and extents have none.
pub(super) fn key_value(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let line = line.trim_ascii();
    let equals = line.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (line[..equals].trim_ascii(), line[equals + 1..].trim_ascii());
    let is_name = !key.is_empty() && !key.iter().any(|byte| b"#\" \t".contains(byte));
    is_name.then(|| (key, quoted(value).map_or(value, |(text, _)| text)))
}

/// Puts another value behind the `=` of a line, which keeps its spaces and its end.
pub(super) fn replace_value(line: &mut Vec<u8>, value: &str) {
    let Some(equals) = line.iter().position(|byte| *byte == b'=') else { return };
    let spaces = line[equals + 1..].iter().take_while(|byte| **byte == b' ').count();
    let end = if line.ends_with(b"\r") { "\r" } else { "" };
    line.truncate(equals + 1 + spaces);
    line.extend_from_slice(value.as_bytes());
    line.extend_from_slice(end.as_bytes());
}

/// The bytes 0x80 to 0x9f in windows-1252; the rest of it is Unicode's first page.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}',
    '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// UTF-8 if it can be, else windows-1252.
pub(super) fn decode_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|byte| decode_byte(*byte)).collect(),
    }
}

fn decode_byte(byte: u8) -> char {
    match byte {
        0x80..=0x9f => WINDOWS_1252[usize::from(byte - 0x80)],
        _ => char::from(byte),
    }
}
