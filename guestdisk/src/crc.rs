//! The CRC-32 of IEEE 802.3 (polynomial 0x04c11db7, bits reflected), which GPT and LVM guard their structures with.

/// The remainders of all bytes.
static TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0_u32;
    while byte < 256 {
        let (mut value, mut bit) = (byte, 0);
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ 0xedb8_8320 } else { value >> 1 };
            bit += 1;
        }
        table[byte as usize] = value;
        byte += 1;
    }
    table
}

/// The register after `bytes`, with `start` before them: no inversion at either end (as LVM uses it).
pub(crate) fn update(start: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(start, |crc, byte| crc >> 8 ^ TABLE[usize::from((crc & 0xff) as u8 ^ byte)])
}

/// The usual CRC-32 of `bytes` (as GPT uses it).
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !update(!0, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_catalogue() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
