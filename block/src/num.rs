//! Arithmetic that every crate needs, with the conversions in one place.

const _: () = assert!(usize::BITS == 64, "vimg needs a 64-bit host: disks are addressed with usize");

/// `u64` to `usize`, lossless because of the assertion above.
#[expect(clippy::cast_possible_truncation, reason = "usize is 64 bits wide, asserted above")]
#[inline]
pub const fn to_usize(value: u64) -> usize {
    value as usize
}

/// The length of a slice as `u64`.
#[inline]
pub const fn len_of<T>(slice: &[T]) -> u64 {
    slice.len() as u64
}

/// Rounds down to a multiple of `align` (a power of two).
#[inline]
pub const fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// Rounds up to a multiple of `align` (a power of two); `None` if that does not fit.
#[inline]
pub const fn align_up(value: u64, align: u64) -> Option<u64> {
    debug_assert!(align.is_power_of_two());
    match value.checked_add(align - 1) {
        Some(sum) => Some(sum & !(align - 1)),
        None => None,
    }
}

/// Whether `value` is a multiple of `align` (a power of two).
#[inline]
pub const fn is_aligned(value: u64, align: u64) -> bool {
    debug_assert!(align.is_power_of_two());
    value & (align - 1) == 0
}

/// The low 32 bits, for values whose range has been checked.
#[expect(clippy::cast_possible_truncation, reason = "the caller has checked the range")]
#[inline]
pub const fn low_u32(value: u64) -> u32 {
    debug_assert!(value <= u32::MAX as u64);
    value as u32
}
