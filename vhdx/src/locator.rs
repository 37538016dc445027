//! The parent locator (section 2.6.2.6): where the parent of a differencing disk is, and how it is recognised.

use block::codec::Reader;
use block::{Error, Result};

use crate::Guid;

/// The only type of locator that the specification defines.
const VHDX_TYPE: Guid = Guid::new(0xb04a_efb7, 0xd19e, 0x4a81, 0xb789_25b8_e944_5913);
/// Keys that a reader could ever look at; the table says up to 65535.
const MAX_ENTRIES: u16 = 256;

/// Characters of a GUID in braces.
const LINKAGE_CHARS: usize = 38;

/// What the locator says of the parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locator {
    /// `parent_linkage` and, if it is there, `parent_linkage2`: the parent's `DataWriteGuid` has to be one of these.
    pub linkage: Vec<Guid>,
    /// Where the text of `parent_linkage` lies in bytes, if another GUID has room there: in the locator, or, once it has
    /// been read from a file, in the file.
    pub linkage_at: Option<u64>,
    /// `relative_path`: from the folder of the image, with backslashes.
    pub relative_path: Option<String>,
    /// `volume_path`: from the root of a volume that is named by its GUID.
    pub volume_path: Option<String>,
    /// `absolute_win32_path`: from a drive.
    pub absolute_win32_path: Option<String>,
}

impl Locator {
    /// Reads a locator.
    ///
    /// # Errors
    /// It is of another type, breaks the rules, or names neither a path nor the identity of the parent.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let short = || Error::invalid("the VHDX parent locator is too short");
        let mut reader = Reader::new(bytes);
        let kind = reader.take(16).and_then(|guid| guid.try_into().ok()).map(Guid).ok_or_else(short)?;
        if kind != VHDX_TYPE {
            return Err(Error::unsupported(format!(
                "the parent of the VHDX file is located by {kind}, which is not a type that is known here"
            )));
        }
        reader.skip(2).ok_or_else(short)?;
        let count = reader.le_u16().ok_or_else(short)?;
        if count > MAX_ENTRIES {
            return Err(Error::invalid(format!("the VHDX parent locator has {count} entries")));
        }
        let mut locator = Self {
            linkage: vec![],
            linkage_at: None,
            relative_path: None,
            volume_path: None,
            absolute_win32_path: None,
        };
        for _ in 0..count {
            let (key, value, value_at) = entry(bytes, &mut reader).ok_or_else(short)?;
            if key == "parent_linkage" && value.len() == LINKAGE_CHARS {
                locator.linkage_at = Some(value_at.into());
            }
            locator.add(&key, value)?;
        }
        locator.checked()
    }

    fn add(&mut self, key: &str, value: String) -> Result<()> {
        match key {
            "parent_linkage" | "parent_linkage2" => {
                let guid = Guid::parse(&value).ok_or_else(|| {
                    Error::invalid(format!("{key} of the VHDX parent locator is no GUID: '{value}'"))
                })?;
                self.linkage.push(guid);
            }
            "relative_path" => self.relative_path = Some(value),
            "volume_path" => self.volume_path = Some(value),
            "absolute_win32_path" => self.absolute_win32_path = Some(value),
            _ => {}
        }
        Ok(())
    }

    fn checked(self) -> Result<Self> {
        let missing = |what| Err(Error::invalid(format!("the VHDX parent locator has no {what}")));
        if self.linkage.is_empty() {
            return missing("parent_linkage");
        }
        if self.paths().next().is_none() {
            return missing("path");
        }
        Ok(self)
    }

    /// The bytes of the text that names a parent, of one length always.
    pub(crate) fn linkage_text(parent: Guid) -> Vec<u8> {
        format!("{{{parent}}}").encode_utf16().flat_map(u16::to_le_bytes).collect()
    }

    /// The paths as they are stored, in the order in which they are to be tried.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        let all = [&self.relative_path, &self.volume_path, &self.absolute_win32_path];
        all.into_iter().flatten().map(String::as_str).filter(|path| !path.is_empty())
    }

    /// The paths as this system can follow them, best first: the relative one, then, because drives and volumes of
    /// Windows are not there, the bare names of the others beside the image.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = vec![];
        let relative = self.relative_path.iter().map(|path| unix_path(path));
        let bare = self.paths().filter_map(|path| path.rsplit(['\\', '/']).next()).map(str::to_owned);
        for name in relative.chain(bare) {
            if !name.is_empty() && !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// A relative path with slashes, and without a dot in front.
fn unix_path(path: &str) -> String {
    let path = path.replace('\\', "/");
    path.strip_prefix("./").unwrap_or(&path).to_owned()
}

/// The next key, its value and where that lies; `None` if they do not lie inside the locator.
fn entry(bytes: &[u8], reader: &mut Reader<'_>) -> Option<(String, String, u32)> {
    let (key_offset, value_offset) = (reader.le_u32()?, reader.le_u32()?);
    let (key_length, value_length) = (reader.le_u16()?, reader.le_u16()?);
    let text = |offset: u32, length: u16| {
        let start = offset as usize;
        let units = bytes.get(start..start.checked_add(length.into())?)?.chunks_exact(2);
        let units: Vec<u16> = units.map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        Some(String::from_utf16_lossy(&units))
    };
    Some((text(key_offset, key_length)?, text(value_offset, value_length)?, value_offset))
}

#[cfg(test)]
pub(crate) mod tests {
    use block::ErrorKind;
    use block::codec::Writer;

    use super::*;

    /// The bytes of a locator.
    pub(crate) fn encode(pairs: &[(&str, &str)]) -> Vec<u8> {
        let (mut head, mut strings) = (Writer::new(), Writer::new());
        head.bytes(&VHDX_TYPE.0).le_u16(0).le_u16(u16::try_from(pairs.len()).unwrap());
        let base = 20 + pairs.len() * 12;
        for (key, value) in pairs {
            let mut add = |text: &str| {
                let at = base + strings.len();
                for unit in text.encode_utf16() {
                    strings.le_u16(unit);
                }
                (u32::try_from(at).unwrap(), u16::try_from(text.len() * 2).unwrap())
            };
            let ((key_at, key_len), (value_at, value_len)) = (add(key), add(value));
            head.le_u32(key_at).le_u32(value_at).le_u16(key_len).le_u16(value_len);
        }
        [head.into_bytes(), strings.into_bytes()].concat()
    }

    const LINKAGE: (&str, &str) = ("parent_linkage", "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}");

    #[test]
    fn paths_are_tried_in_the_order_of_the_specification() {
        let bytes = encode(&[
            ("absolute_win32_path", r"\\?\d:\path2\sub3\parent.vhdx"),
            LINKAGE,
            ("volume_path", r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\path2\sub3\other.vhdx"),
            ("relative_path", r"..\..\path2\sub3\parent.vhdx"),
            ("something else", "entirely"),
        ]);
        let locator = Locator::parse(&bytes).unwrap();
        assert_eq!(locator.names(), ["../../path2/sub3/parent.vhdx", "parent.vhdx", "other.vhdx"]);
        assert_eq!(locator.linkage, [Guid::parse("83ed0ec3-24c8-49a6-a959-5e4bf1288bfb").unwrap()]);
        let here = Locator::parse(&encode(&[LINKAGE, ("relative_path", r".\parent.vhdx")])).unwrap();
        assert_eq!(here.names(), ["parent.vhdx"]);
    }

    #[test]
    fn locators_that_break_the_rules_are_refused() {
        let kind = |bytes: &[u8]| Locator::parse(bytes).unwrap_err().kind();
        assert_eq!(kind(&encode(&[LINKAGE])), ErrorKind::Invalid);
        assert_eq!(kind(&encode(&[("relative_path", "x")])), ErrorKind::Invalid);
        assert_eq!(kind(&encode(&[("parent_linkage", "x"), ("relative_path", "x")])), ErrorKind::Invalid);
        let good = encode(&[LINKAGE, ("relative_path", "x")]);
        for len in 0..good.len() {
            assert_eq!(kind(&good[..len]), ErrorKind::Invalid, "cut at {len}");
        }
        let mut other = good;
        other[0] ^= 1;
        assert_eq!(kind(&other), ErrorKind::Unsupported);
    }
}
