//! Hashes of names, by which large directories are ordered (kernel documentation, "Hash Tree Directories").

use crate::bytes::byte;

/// The largest hash, kept for the end of a directory.
const END: u32 = 0xffff_fffe;

/// How names are hashed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hasher {
    /// 0: legacy, 1: half MD4, 2: TEA.
    pub(super) version: u8,
    /// Characters count as unsigned.
    pub(super) unsigned: bool,
    /// All zeros: the usual one.
    pub(super) seed: [u32; 4],
}

impl Hasher {
    /// By the version that a directory names, of which 3 to 5 are 0 to 2 with unsigned characters. `None`: not known
    /// here.
    pub(super) fn new(version: u8, unsigned: bool, seed: [u32; 4]) -> Option<Self> {
        match version {
            0..=2 => Some(Self { version, unsigned, seed }),
            3..=5 => Some(Self { version: version - 3, unsigned: true, seed }),
            _ => None,
        }
    }

    /// The hash of a name. Its lowest bit is always clear.
    pub(super) fn hash(&self, name: &[u8]) -> u32 {
        let mut state = match self.seed {
            [0, 0, 0, 0] => [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476],
            seed => seed,
        };
        let hash = match self.version {
            0 => self.legacy(name),
            1 => {
                for from in (0..name.len()).step_by(32) {
                    half_md4(&mut state, &self.words::<8>(&name[from..]));
                }
                state[1]
            }
            _ => {
                for from in (0..name.len()).step_by(16) {
                    tea(&mut state, &self.words::<4>(&name[from..]));
                }
                state[0]
            }
        };
        let hash = hash & !1;
        if hash == END { END - 2 } else { hash }
    }

    fn character(&self, character: u8) -> u32 {
        if self.unsigned { character.into() } else { i32::from(character.cast_signed()).cast_unsigned() }
    }

    /// The next characters of a name as numbers, filled up with its remaining length.
    fn words<const N: usize>(&self, rest: &[u8]) -> [u32; N] {
        let len = u32::try_from(rest.len()).unwrap_or(u32::MAX);
        let pad = (len | len << 8) | (len | len << 8) << 16;
        let mut words = [pad; N];
        let used = rest.len().min(4 * N);
        for (index, word) in words.iter_mut().enumerate() {
            for at in 4 * index..used.min(4 * index + 4) {
                *word = self.character(byte(rest, at)).wrapping_add(*word << 8);
            }
        }
        words
    }

    fn legacy(&self, name: &[u8]) -> u32 {
        let (mut now, mut before) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
        for character in name {
            let mixed = now ^ self.character(*character).wrapping_mul(7_152_373);
            let mut next = before.wrapping_add(mixed);
            if next & 0x8000_0000 != 0 {
                next = next.wrapping_sub(0x7fff_ffff);
            }
            (before, now) = (now, next);
        }
        now << 1
    }
}

/// Three rounds of MD4 on half of its input.
fn half_md4(state: &mut [u32; 4], words: &[u32; 8]) {
    const ORDERS: [[usize; 8]; 3] =
        [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7, 0, 2, 4, 6], [3, 7, 2, 6, 1, 5, 0, 4]];
    const SHIFTS: [[u32; 4]; 3] = [[3, 7, 11, 19], [3, 5, 9, 13], [3, 9, 11, 15]];
    const ADDED: [u32; 3] = [0, 0x5a82_7999, 0x6ed9_eba1];
    let [mut a, mut b, mut c, mut d] = *state;
    for round in 0..3 {
        for (step, index) in ORDERS[round].into_iter().enumerate() {
            let mixed = match round {
                0 => d ^ (b & (c ^ d)),
                1 => (b & c).wrapping_add((b ^ c) & d),
                _ => b ^ c ^ d,
            };
            let sum = a.wrapping_add(mixed).wrapping_add(words[index]).wrapping_add(ADDED[round]);
            (a, d, c, b) = (d, c, b, sum.rotate_left(SHIFTS[round][step % 4]));
        }
    }
    for (own, new) in state.iter_mut().zip([a, b, c, d]) {
        *own = own.wrapping_add(new);
    }
}

/// Sixteen rounds of the Tiny Encryption Algorithm, the words as its key.
fn tea(state: &mut [u32; 4], key: &[u32; 4]) {
    let (mut sum, mut one, mut other) = (0_u32, state[0], state[1]);
    let mixed = |value: u32, sum: u32, first: u32, second: u32| {
        (value << 4).wrapping_add(first) ^ value.wrapping_add(sum) ^ (value >> 5).wrapping_add(second)
    };
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        one = one.wrapping_add(mixed(other, sum, key[0], key[1]));
        other = other.wrapping_add(mixed(one, sum, key[2], key[3]));
    }
    state[0] = state[0].wrapping_add(one);
    state[1] = state[1].wrapping_add(other);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&[u8]; 3] =
        [b"hello", b"a rather long name of a file number 17, longer than 32 bytes", "grün".as_bytes()];

    /// As debugfs has them (`dx_hash -h half_md4 hello`).
    #[test]
    fn hashes_of_debugfs() {
        for (version, hashes) in [
            (0, [0x3225_2546, 0x25d5_9156, 0xc202_f150]),
            (1, [0x1746_da32, 0xbc23_bbb4, 0x095d_9284]),
            (2, [0x6f5b_b1a8, 0x276f_3bb0, 0xa7ae_33b6]),
        ] {
            let hasher = Hasher::new(version, false, [0; 4]).unwrap();
            assert_eq!(NAMES.map(|name| hasher.hash(name)), hashes, "{version}");
        }
        // 01234567-89ab-cdef-0123-456789abcdef
        let seed = [0x6745_2301, 0xefcd_ab89, 0x6745_2301, 0xefcd_ab89];
        assert_eq!(Hasher::new(1, false, seed).unwrap().hash(b"hello"), 0xa26e_4a80);
    }

    #[test]
    fn signs_matter_beyond_ascii_only() {
        for version in 0..3 {
            let signed = Hasher::new(version, false, [0; 4]).unwrap();
            let unsigned = Hasher::new(version + 3, false, [0; 4]).unwrap();
            assert_eq!(signed.hash(NAMES[1]), unsigned.hash(NAMES[1]));
            assert_ne!(signed.hash(NAMES[2]), unsigned.hash(NAMES[2]));
        }
        assert!(Hasher::new(6, false, [0; 4]).is_none());
    }
}
