//! An entry of the block allocation table (section 2.5.1): a state in three bits and a place in MiB.

use crate::MIB;

/// What an entry says of a payload block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Not in the file: the parent answers; without one the contents are undefined, and read as zeros here.
    NotPresent,
    /// Undefined contents, which read as zeros here.
    Undefined,
    /// Zeros.
    Zero,
    /// Discarded by the guest; reads as zeros here.
    Unmapped,
    /// All of it is in the file.
    FullyPresent,
    /// The sector bitmap says which sectors are in the file; the parent answers for the others.
    PartiallyPresent,
    /// A value that the specification reserves.
    Reserved,
}

/// An entry as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(pub u64);

/// Reserved bits between state and place.
const RESERVED: u64 = 0x000f_fff8;

impl Entry {
    /// Zeros, nowhere.
    pub const ZERO: Self = Self(2);

    /// All of a block is in the file at `offset`, a multiple of 1 MiB.
    pub const fn present(offset: u64) -> Self {
        debug_assert!(offset.is_multiple_of(MIB));
        Self(offset | 6)
    }

    /// The state of a payload block. Value 5 is what version 0.95 of the specification wrote for `Unmapped`.
    pub const fn state(self) -> State {
        match self.0 & 7 {
            0 => State::NotPresent,
            1 => State::Undefined,
            2 => State::Zero,
            3 | 5 => State::Unmapped,
            6 => State::FullyPresent,
            7 => State::PartiallyPresent,
            _ => State::Reserved,
        }
    }

    /// Whether a sector bitmap is in the file; `None` for reserved values.
    pub const fn bitmap_present(self) -> Option<bool> {
        match self.0 & 7 {
            0 => Some(false),
            6 => Some(true),
            _ => None,
        }
    }

    /// The place in bytes: always a multiple of 1 MiB.
    pub const fn offset(self) -> u64 {
        self.0 & !(MIB - 1)
    }

    /// Whether bits are set that have to be zero.
    pub const fn has_reserved_bits(self) -> bool {
        self.0 & RESERVED != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_a_state_and_a_place() {
        let entry = Entry::present(0x12300000);
        assert_eq!(
            (entry.state(), entry.offset(), entry.has_reserved_bits()),
            (State::FullyPresent, 0x12300000, false)
        );
        assert_eq!((Entry::ZERO.state(), Entry::ZERO.offset()), (State::Zero, 0));
        assert_eq!(Entry(4).state(), State::Reserved);
        assert_eq!(Entry(5).state(), State::Unmapped);
        assert!(Entry(8).has_reserved_bits());
        assert_eq!(Entry(u64::MAX).offset(), u64::MAX - (MIB - 1));
    }
}
