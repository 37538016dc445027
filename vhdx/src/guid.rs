//! GUIDs as Microsoft stores them: three little-endian numbers and eight bytes.

use std::fmt;

use block::{Error, ErrorKind, Result};

/// A GUID in the order of its bytes in the file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// No GUID: an empty log, for one.
    pub const ZERO: Self = Self([0; 16]);

    /// The GUID that is written `a-b-c-d` with `d` as sixteen digits, for constants.
    pub const fn new(a: u32, b: u16, c: u16, d: u64) -> Self {
        let ([a0, a1, a2, a3], [b0, b1], [c0, c1]) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
        let [d0, d1, d2, d3, d4, d5, d6, d7] = d.to_be_bytes();
        Self([a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, d2, d3, d4, d5, d6, d7])
    }

    /// A random one (RFC 9562, version 4).
    ///
    /// # Errors
    /// The system has no randomness to give.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)
            .map_err(|error| Error::new(ErrorKind::Io, format!("Unable to read random bytes: {error}")))?;
        bytes[7] = bytes[7] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }

    /// Whether it is all zeros.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// Reads `{xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx}`, braces or not, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let inner = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or(text);
        let groups: Vec<&str> = inner.split('-').collect();
        let [a, b, c, d, e] = groups[..] else { return None };
        let lens = [a.len(), b.len(), c.len(), d.len(), e.len()];
        let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if lens != [8, 4, 4, 4, 12] || !groups.iter().all(|group| hex(group)) {
            return None;
        }
        let word = |text| u16::from_str_radix(text, 16).ok();
        let tail = u64::from_str_radix(&format!("{d}{e}"), 16).ok()?;
        Some(Self::new(u32::from_str_radix(a, 16).ok()?, word(b)?, word(c)?, tail))
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, rest @ ..] = self.0;
        let (a, b, c) = (
            u32::from_le_bytes([a0, a1, a2, a3]),
            u16::from_le_bytes([b0, b1]),
            u16::from_le_bytes([c0, c1]),
        );
        write!(f, "{a:08x}-{b:04x}-{c:04x}-{d0:02x}{d1:02x}-")?;
        rest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes() {
        let text = "2dc27766-f623-4200-9d64-115e9bfd4a08";
        let guid = Guid::parse(text).unwrap();
        assert_eq!(guid.0[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]);
        assert_eq!(guid, Guid::new(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08));
        assert_eq!(guid.to_string(), text);
        assert_eq!(Guid::parse("{2DC27766-F623-4200-9D64-115E9BFD4A08}"), Some(guid));
        for bad in [
            "",
            "{}",
            "2dc27766",
            "2dc27766-f623-4200-9d64-115e9bfd4a0g",
            "+dc27766-f623-4200-9d64-115e9bfd4a08",
        ] {
            assert_eq!(Guid::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn random_ones_differ() {
        let (a, b) = (Guid::random().unwrap(), Guid::random().unwrap());
        assert!(a != b && !a.is_zero());
        assert_eq!(&a.to_string()[14..15], "4");
    }
}
