//! Names of keys and values: one byte per character or two, compared without regard to case.

use crate::cells::le16;

/// A name, of Latin-1 if it is `packed`, else of UTF-16.
pub(crate) fn decode(bytes: &[u8], packed: bool) -> String {
    if packed {
        return bytes.iter().map(|byte| char::from(*byte)).collect();
    }
    utf16(bytes)
}

/// UTF-16, least significant byte first.
pub(crate) fn utf16(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|unit| le16(unit, 0));
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}

/// A name as it is kept, and whether it is packed.
pub(crate) fn encode(name: &str) -> (Vec<u8>, bool) {
    if name.is_ascii() {
        return (name.as_bytes().to_vec(), true);
    }
    (name.encode_utf16().flat_map(u16::to_le_bytes).collect(), false)
}

/// What names are compared and sorted by.
pub(crate) fn folded(name: &str) -> Vec<u16> {
    let upper = |c: char| {
        let mut upper = c.to_uppercase();
        match (upper.next(), upper.next()) {
            (Some(one), None) => one,
            _ => c,
        }
    };
    let (mut units, mut pair) = (vec![], [0; 2]);
    name.chars().for_each(|c| units.extend_from_slice(upper(c).encode_utf16(&mut pair)));
    units
}

/// The hash of a name in a list of the kind `lh`.
pub(crate) fn hash(name: &str) -> u32 {
    folded(name).into_iter().fold(0_u32, |hash, unit| hash.wrapping_mul(37).wrapping_add(unit.into()))
}
