//! The dictionary that a VMX file is.
//!
//! Lines of `key = "value"`; keys do not care about case; `|XX` in a value is the byte of that number; the first of two lines
//! with the same key wins.

use std::collections::BTreeMap;
use std::str::FromStr;

use block::{Error, Result};

use crate::source::{text, words};

/// The most lines that are complained about.
const MOST_COMPLAINTS: usize = 5;

/// Keys, in lower case, and their values.
#[derive(Debug, Clone, Default)]
pub(super) struct Dict {
    values: BTreeMap<String, String>,
    notes: Vec<String>,
}

impl Dict {
    /// Parses a file.
    ///
    /// # Errors
    /// `Invalid`: there is no entry in it, or it is a virtual disk; `Unsupported`: its characters cannot be read.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        refuse_disk(bytes)?;
        let charset = charset(bytes);
        let text = text::decode(bytes, charset.as_deref())?;
        let mut dict = Self::default();
        let mut complaints = 0;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match entry(line, charset.as_deref()) {
                Some((key, value)) => {
                    dict.values.entry(key).or_insert(value);
                }
                None if complaints < MOST_COMPLAINTS => {
                    complaints += 1;
                    dict.notes
                        .push(format!("Line {} of the VMX file is no entry and was left out.", number + 1));
                }
                None => {}
            }
        }
        if dict.values.is_empty() {
            return Err(Error::invalid("this is no VMX file: it has no line of the form key = \"value\""));
        }
        Ok(dict)
    }

    /// The keys, in lower case, sorted.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// A value that is not empty.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// A value that is a number.
    pub(super) fn number<T: FromStr>(&self, key: &str) -> Option<T> {
        self.text(key)?.parse().ok()
    }

    /// Whether a switch is on.
    pub(super) fn is_on(&self, key: &str) -> bool {
        self.text(key).and_then(words::switch) == Some(true)
    }

    /// Whether a switch is off; one that is not there is not.
    pub(super) fn is_off(&self, key: &str) -> bool {
        self.text(key).and_then(words::switch) == Some(false)
    }

    /// How many devices of a kind (`serial0`, `serial1`...) are present.
    pub(super) fn count(&self, kind: &str) -> u32 {
        let present = |number: &u32| self.is_on(&format!("{kind}{number}.present"));
        u32::try_from((0..32).filter(present).count()).unwrap_or_default()
    }

    /// The numbers of a kind of device that has any key.
    pub(super) fn numbers(&self, kind: &str) -> Vec<u32> {
        let number = |key: &str| key.strip_prefix(kind)?.split_once('.')?.0.parse().ok();
        let mut numbers: Vec<u32> = self.keys().filter_map(number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// What was wrong with the file.
    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }
}

fn refuse_disk(bytes: &[u8]) -> Result<()> {
    if bytes.starts_with(b"KDMV") || bytes.starts_with(b"# Disk DescriptorFile") {
        return Err(Error::invalid("this is a virtual disk (VMDK), not the description of a machine (VMX)"));
    }
    Ok(())
}

/// The character set that the file names.
fn charset(bytes: &[u8]) -> Option<String> {
    let lines = bytes.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    let mut named = lines.filter_map(|line| entry(line.trim(), None)).filter(|(key, _)| key == ".encoding");
    named.next().map(|(_, value)| value)
}

/// The key and value of a line.
fn entry(line: &str, charset: Option<&str>) -> Option<(String, String)> {
    let (key, value) = line.split_once('=')?;
    let (key, value) = (key.trim(), value.trim());
    let sound = !key.is_empty() && !key.contains(|c: char| c.is_whitespace() || c == '"');
    let value = match value.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next().unwrap_or_default(),
        None => value,
    };
    sound.then(|| (key.to_ascii_lowercase(), unescape(value, charset)))
}

/// Takes `|XX` for the byte of that number. Bytes that follow each other are decoded together.
fn unescape(value: &str, charset: Option<&str>) -> String {
    if !value.contains('|') {
        return value.to_owned();
    }
    let (mut out, mut bytes) = (String::with_capacity(value.len()), vec![]);
    let mut rest = value;
    while let Some(first) = rest.chars().next() {
        match escaped(rest) {
            Some(byte) => {
                bytes.push(byte);
                rest = rest.get(3..).unwrap_or_default();
            }
            None => {
                flush(&mut out, &mut bytes, charset);
                out.push(first);
                rest = rest.get(first.len_utf8()..).unwrap_or_default();
            }
        }
    }
    flush(&mut out, &mut bytes, charset);
    out
}

fn escaped(rest: &str) -> Option<u8> {
    let digits = rest.strip_prefix('|')?.get(..2)?;
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u8::from_str_radix(digits, 16).ok())?
}

fn flush(out: &mut String, bytes: &mut Vec<u8>, charset: Option<&str>) {
    if bytes.is_empty() {
        return;
    }
    match text::decode(bytes, charset) {
        Ok(text) => out.push_str(&text),
        Err(_) => out.push_str(&String::from_utf8_lossy(bytes)),
    }
    bytes.clear();
}
