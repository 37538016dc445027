//! Numbers out of records of a stranger's disk.
//!
//! File systems keep their fields at fixed offsets of records whose length has been checked once. These functions read
//! such a field and give zero for one that lies outside, so that no byte of a disk can make them panic; whoever needs
//! to know the difference checks the record's length first.

use block::{BlockDevice, Error, ErrorKind, Result};

use crate::guid::Guid;

macro_rules! fields {
    ($($name:ident $type:ty, $from:ident, $doc:literal;)*) => {$(
        #[doc = $doc]
        pub(crate) fn $name(bytes: &[u8], at: usize) -> $type {
            let field = at.checked_add(size_of::<$type>()).and_then(|end| bytes.get(at..end));
            field.and_then(|field| field.try_into().ok()).map_or(0, <$type>::$from)
        }
    )*};
}

fields! {
    le16 u16, from_le_bytes, "Two bytes, least significant first.";
    le32 u32, from_le_bytes, "Four bytes, least significant first.";
    le64 u64, from_le_bytes, "Eight bytes, least significant first.";
    be16 u16, from_be_bytes, "Two bytes, most significant first.";
    be32 u32, from_be_bytes, "Four bytes, most significant first.";
    be64 u64, from_be_bytes, "Eight bytes, most significant first.";
}

/// One byte.
pub(crate) fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

/// Bytes `at..at + len` as far as they exist.
pub(crate) fn part(bytes: &[u8], at: usize, len: usize) -> &[u8] {
    let end = at.saturating_add(len).min(bytes.len());
    &bytes[at.min(end)..end]
}

/// The 16 bytes of a GUID as they are.
pub(crate) fn guid(bytes: &[u8], at: usize) -> Guid {
    let mut raw = [0; 16];
    let field = part(bytes, at, 16);
    raw[..field.len()].copy_from_slice(field);
    Guid::from_bytes(raw)
}

/// Text up to the first zero byte.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// UTF-16, least significant byte first, up to the first zero unit.
pub(crate) fn utf16(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|pair| le16(pair, 0)).take_while(|unit| *unit != 0);
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// `len` bytes of a device. What is asked for has been checked against a limit by the caller: it is allocated at once.
pub(crate) fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> Result<Vec<u8>> {
    block::device::check_range(offset, len as u64, device.size())?;
    let mut bytes = vec![0; len];
    device.read_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// Up to `len` bytes of a device: fewer at its end.
pub(crate) fn read_some(device: &dyn BlockDevice, offset: u64, len: usize) -> Result<Vec<u8>> {
    let left = device.size().saturating_sub(offset).min(len as u64);
    read(device, offset.min(device.size()), block::num::to_usize(left))
}

/// An error about what lies on the disk: it contradicts itself.
pub(crate) fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_outside_are_zero() {
        let bytes = [1, 2, 3, 4, 5];
        assert_eq!((le16(&bytes, 0), be16(&bytes, 3), le32(&bytes, 1)), (0x0201, 0x0405, 0x0504_0302));
        assert_eq!((le32(&bytes, 2), le64(&bytes, 0), be16(&bytes, usize::MAX)), (0, 0, 0));
        assert_eq!((part(&bytes, 3, 9), part(&bytes, 9, usize::MAX)), (&[4u8, 5][..], &[][..]));
    }

    #[test]
    fn text_ends_at_the_first_zero() {
        assert_eq!(text(b"abc\0def"), "abc");
        assert_eq!(utf16(&[0x61, 0, 0xe9, 0, 0, 0, 0x62, 0]), "a\u{e9}");
        assert_eq!(utf16(&[0x00, 0xd8, 0x61, 0]), "\u{fffd}a");
    }
}
