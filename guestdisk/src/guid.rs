//! Identifiers of 16 bytes, in both orders in which disks write them.

use std::fmt;

/// 16 bytes that name something: a partition, its type, a file system.
///
/// The bytes are kept as they lie on the disk. File systems and LVM write them in the order of the text
/// ([`Display`](fmt::Display) shows that, as `blkid` does); GPT writes the first three fields least significant byte first
/// ([`mixed_endian`](Self::mixed_endian) turns one into the other; UEFI specification 2.10, appendix A).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Guid([u8; 16]);

impl Guid {
    /// The bytes in the order of the text.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes in the order of the text.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Whether all bytes are zero, which means that there is no identifier.
    pub fn is_nil(&self) -> bool {
        self.0 == [0; 16]
    }

    /// The same identifier with the first three fields the other way round.
    #[must_use]
    pub const fn mixed_endian(self) -> Self {
        let b = self.0;
        Self([
            b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13], b[14],
            b[15],
        ])
    }

    /// Reads the text form, in any case, with or without hyphens.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 16];
        let mut digits = text.chars().filter(|c| *c != '-').map(|c| c.to_digit(16));
        for byte in &mut bytes {
            *byte = u8::try_from(digits.next()?? << 4 | digits.next()??).ok()?;
        }
        digits.next().is_none().then_some(Self(bytes))
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes() {
        let esp = Guid::parse("C12A7328-F81F-11D2-BA4B-00A0C93EC93B").unwrap();
        assert_eq!(esp.to_string(), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
        assert_eq!(esp.mixed_endian().as_bytes()[..8], [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11]);
        assert_eq!(esp.mixed_endian().mixed_endian(), esp);
        for bad in
            ["", "c12a7328", "c12a7328-f81f-11d2-ba4b-00a0c93ec93bb", "g12a7328-f81f-11d2-ba4b-00a0c93ec93b"]
        {
            assert_eq!(Guid::parse(bad), None, "{bad}");
        }
    }
}
