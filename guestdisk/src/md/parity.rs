//! The arithmetic of RAID 5 and 6: sums without carry, and the field of 256 elements whose generator is 2 (polynomial 0x11d;
//! H. P. Anvin, "The mathematics of RAID-6").

/// Powers of the generator, twice in a row so that the sum of two logarithms needs no division.
static POWERS: [u8; 510] = powers();
/// The logarithm of every element but 0.
static LOGARITHMS: [u8; 256] = logarithms();

#[expect(clippy::cast_possible_truncation, reason = "reduced below 256 by the polynomial")]
const fn powers() -> [u8; 510] {
    let (mut table, mut value, mut index) = ([0; 510], 1_u16, 0);
    while index < 510 {
        table[index] = value as u8;
        value = if value & 0x80 == 0 { value << 1 } else { value << 1 ^ 0x11d };
        index += 1;
    }
    table
}

#[expect(clippy::cast_possible_truncation, reason = "the index is below 255")]
const fn logarithms() -> [u8; 256] {
    let (table, mut logarithms, mut index) = (powers(), [0; 256], 0);
    while index < 255 {
        logarithms[table[index] as usize] = index as u8;
        index += 1;
    }
    logarithms
}

/// The generator to some power: what a data block of that index is multiplied with.
pub(super) fn power(exponent: u64) -> u8 {
    POWERS[block::num::to_usize(exponent % 255)]
}

pub(super) fn product(one: u8, other: u8) -> u8 {
    match (one, other) {
        (0, _) | (_, 0) => 0,
        _ => POWERS[usize::from(LOGARITHMS[usize::from(one)]) + usize::from(LOGARITHMS[usize::from(other)])],
    }
}

/// `1 / value`; 0 has none, and gives 0.
pub(super) fn inverse(value: u8) -> u8 {
    match value {
        0 => 0,
        _ => POWERS[255 - usize::from(LOGARITHMS[usize::from(value)])],
    }
}

/// `sum += bytes * factor`.
pub(super) fn add(sum: &mut [u8], bytes: &[u8], factor: u8) {
    if factor == 1 {
        sum.iter_mut().zip(bytes).for_each(|(sum, byte)| *sum ^= byte);
        return;
    }
    let mut products = [0; 256];
    for (product_of, byte) in products.iter_mut().zip(0..=255) {
        *product_of = product(byte, factor);
    }
    sum.iter_mut().zip(bytes).for_each(|(sum, byte)| *sum ^= products[usize::from(*byte)]);
}

/// `bytes *= factor`.
pub(super) fn scale(bytes: &mut [u8], factor: u8) {
    bytes.iter_mut().for_each(|byte| *byte = product(*byte, factor));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_is_one() {
        assert_eq!((power(0), power(1), power(8), power(255)), (1, 2, 0x1d, 1));
        for value in 1..=255 {
            assert_eq!(product(value, inverse(value)), 1, "{value}");
            assert_eq!(product(value, 1), value);
            // Distributes over addition.
            assert_eq!(product(value, 3 ^ 0x80), product(value, 3) ^ product(value, 0x80));
        }
        assert_eq!((product(0, 7), product(7, 0), inverse(0)), (0, 0, 0));
    }

    #[test]
    fn sums_and_scales() {
        let mut sum = [1, 2, 3];
        add(&mut sum, &[1, 1, 1], 1);
        add(&mut sum, &[0x80, 0, 1], 2);
        assert_eq!(sum, [0x1d, 3, 0]);
        scale(&mut sum, 2);
        assert_eq!(sum, [0x3a, 6, 0]);
    }
}
