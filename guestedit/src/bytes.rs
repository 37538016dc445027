//! Fields of records at fixed places: reading outside gives zero, writing outside does nothing, so that no byte of a
//! disk can make them panic. Whoever needs to know the difference checks the record's length first.

use block::{Error, ErrorKind};

macro_rules! fields {
    ($($get:ident $put:ident $type:ty, $from:ident, $to:ident, $doc:literal;)*) => {$(
        #[doc = $doc]
        #[allow(dead_code, reason = "a whole family of accessors, of which not every one has its user yet")]
        pub(crate) fn $get(bytes: &[u8], at: usize) -> $type {
            let field = at.checked_add(size_of::<$type>()).and_then(|end| bytes.get(at..end));
            field.and_then(|field| field.try_into().ok()).map_or(0, <$type>::$from)
        }

        #[doc = $doc]
        #[allow(dead_code, reason = "a whole family of accessors, of which not every one has its user yet")]
        pub(crate) fn $put(bytes: &mut [u8], at: usize, value: $type) {
            let end = at.saturating_add(size_of::<$type>());
            if let Some(field) = bytes.get_mut(at..end) {
                field.copy_from_slice(&value.$to());
            }
        }
    )*};
}

fields! {
    le16 put_le16 u16, from_le_bytes, to_le_bytes, "Two bytes, least significant first.";
    le32 put_le32 u32, from_le_bytes, to_le_bytes, "Four bytes, least significant first.";
    le64 put_le64 u64, from_le_bytes, to_le_bytes, "Eight bytes, least significant first.";
    be16 put_be16 u16, from_be_bytes, to_be_bytes, "Two bytes, most significant first.";
    be32 put_be32 u32, from_be_bytes, to_be_bytes, "Four bytes, most significant first.";
    be64 put_be64 u64, from_be_bytes, to_be_bytes, "Eight bytes, most significant first.";
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

/// Copies `source` to a place as far as there is room.
pub(crate) fn copy_to(bytes: &mut [u8], at: usize, source: &[u8]) {
    let end = at.saturating_add(source.len()).min(bytes.len());
    let target = &mut bytes[at.min(end)..end];
    let len = target.len();
    target.copy_from_slice(&source[..len]);
}

/// The low 16 bits.
pub(crate) const fn low16(value: u32) -> u16 {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// Bits 16 to 31.
pub(crate) const fn high16(value: u32) -> u16 {
    let [.., a, b] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// The low 32 bits.
pub(crate) const fn low32(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Bits 32 to 63.
pub(crate) const fn high32(value: u64) -> u32 {
    let [.., a, b, c, d] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// An error about what lies on the disk: it contradicts itself.
pub(crate) fn corrupt(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_outside_are_zero_and_stay_unwritten() {
        let mut bytes = [1, 2, 3, 4, 5];
        put_le32(&mut bytes, 2, 7);
        put_be16(&mut bytes, usize::MAX, 7);
        assert_eq!(bytes, [1, 2, 3, 4, 5]);
        put_be32(&mut bytes, 1, 0x0a0b_0c0d);
        assert_eq!((bytes, le16(&bytes, 1), be64(&bytes, 0)), ([1, 10, 11, 12, 13], 0x0b0a, 0));
    }

    #[test]
    fn halves() {
        assert_eq!((low16(0x1234_5678), high16(0x1234_5678)), (0x5678, 0x1234));
        assert_eq!((low32(0x1_2345_6789), high32(0x1_2345_6789)), (0x2345_6789, 1));
    }
}
