//! Descriptor chains (section 2.7.5): what the guest wants to be read and where it wants answers written.

use std::fmt;

use crate::memory::{GuestRam, OutsideMemory};

/// Descriptors that one chain may have, in the ring's table or in an indirect one.
pub(crate) const MAX_DESCRIPTORS: u32 = 1024;
const DESCRIPTOR_LEN: u32 = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

/// The result of looking at a ring.
pub type RingResult<T> = Result<T, RingError>;

/// Why a ring cannot be trusted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingError {
    /// Something lies outside the guest's memory.
    Outside(OutsideMemory),
    /// More buffers are said to be available than the ring has places.
    Available {
        /// The difference of the indices.
        count: u16,
        /// The size of the ring.
        size: u16,
    },
    /// A descriptor that the table does not have.
    Descriptor {
        /// Its index.
        index: u16,
        /// The size of the table.
        size: u32,
    },
    /// A chain that loops, or is longer than any may be.
    TooLong,
    /// All buffers of a chain together exceed 4 GiB.
    TooLarge,
    /// An indirect table of this length.
    IndirectLength(u32),
    /// An indirect table in an indirect table, or one that is not the only descriptor left.
    IndirectPlace,
    /// A buffer to be read after one to be written.
    Order,
    /// The chain has no room for the answer.
    NoAnswer,
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside(outside) => outside.fmt(f),
            Self::Available { count, size } => write!(f, "{count} buffers available in a ring of {size}"),
            Self::Descriptor { index, size } => write!(f, "descriptor {index} in a table of {size}"),
            Self::TooLong => write!(f, "a descriptor chain loops or is too long"),
            Self::TooLarge => write!(f, "a descriptor chain of more than 4 GiB"),
            Self::IndirectLength(len) => write!(f, "an indirect descriptor table of {len} bytes"),
            Self::IndirectPlace => write!(f, "an indirect descriptor table where there may be none"),
            Self::Order => write!(f, "a readable descriptor after a writable one"),
            Self::NoAnswer => write!(f, "a descriptor chain without room for the answer"),
        }
    }
}

impl std::error::Error for RingError {}

impl From<OutsideMemory> for RingError {
    fn from(outside: OutsideMemory) -> Self {
        Self::Outside(outside)
    }
}

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(b: [u8; 16]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = b;
        Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }
}

/// A table of descriptors.
#[derive(Debug, Clone, Copy)]
struct Table {
    address: u64,
    size: u32,
}

impl Table {
    fn get(self, ram: &GuestRam, index: u16) -> Result<Descriptor, RingError> {
        if u32::from(index) >= self.size {
            return Err(RingError::Descriptor { index, size: self.size });
        }
        let mut bytes = [0; 16];
        ram.read(self.address.saturating_add(u64::from(index) * u64::from(DESCRIPTOR_LEN)), &mut bytes)?;
        Ok(Descriptor::parse(bytes))
    }
}

/// A piece of guest memory; not known to be memory before it is accessed.
pub(crate) type Segment = (u64, u32);

/// The buffers of one request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// The first descriptor's index, by which the request is returned.
    pub head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_len: u64,
    writable_len: u64,
}

impl Chain {
    /// Follows the chain that begins at `head` in the table of `size` descriptors at `table`.
    ///
    /// # Errors
    /// The chain breaks a rule of section 2.7.5.
    pub fn parse(
        ram: &GuestRam,
        table: u64,
        size: u16,
        head: u16,
        indirect: bool,
    ) -> Result<Self, RingError> {
        let mut chain = Self { head, ..Self::default() };
        let ring = Table { address: table, size: u32::from(size) };
        if let Some(inner) = chain.walk(ram, ring, head, indirect)? {
            chain.walk(ram, inner, 0, false)?;
        }
        Ok(chain)
    }

    /// Takes up the descriptors of one table; returns the indirect table at its end, if there is one.
    fn walk(
        &mut self,
        ram: &GuestRam,
        table: Table,
        head: u16,
        indirect: bool,
    ) -> Result<Option<Table>, RingError> {
        let mut index = head;
        for _ in 0..table.size.min(MAX_DESCRIPTORS) {
            let descriptor = table.get(ram, index)?;
            if descriptor.flags & FLAG_INDIRECT != 0 {
                return inner_table(descriptor, indirect).map(Some);
            }
            self.add(descriptor)?;
            if descriptor.flags & FLAG_NEXT == 0 {
                return Ok(None);
            }
            index = descriptor.next;
        }
        Err(RingError::TooLong)
    }

    fn add(&mut self, descriptor: Descriptor) -> Result<(), RingError> {
        let segment = (descriptor.address, descriptor.len);
        if descriptor.flags & FLAG_WRITE != 0 {
            self.writable.push(segment);
            self.writable_len += u64::from(descriptor.len);
        } else if self.writable.is_empty() {
            self.readable.push(segment);
            self.readable_len += u64::from(descriptor.len);
        } else {
            return Err(RingError::Order);
        }
        if self.readable_len + self.writable_len > u64::from(u32::MAX) {
            return Err(RingError::TooLarge);
        }
        Ok(())
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// A cursor at the beginning of what may be read.
    pub fn reader(&self) -> Cursor<'_> {
        Cursor { segments: &self.readable, at: 0 }
    }

    /// A cursor at the beginning of what may be written.
    pub fn writer(&self) -> Cursor<'_> {
        Cursor { segments: &self.writable, at: 0 }
    }

    /// The address of the last byte that may be written.
    pub fn last_writable(&self) -> Option<u64> {
        let (address, len) = self.writable.iter().rev().find(|s| s.1 > 0)?;
        address.checked_add(u64::from(*len) - 1)
    }
}

/// An indirect table takes the place of the rest of its chain, may not be nested, and holds whole descriptors.
fn inner_table(descriptor: Descriptor, allowed: bool) -> Result<Table, RingError> {
    if !allowed || descriptor.flags & FLAG_NEXT != 0 {
        return Err(RingError::IndirectPlace);
    }
    let size = descriptor.len / DESCRIPTOR_LEN;
    if size == 0 || size > MAX_DESCRIPTORS || !descriptor.len.is_multiple_of(DESCRIPTOR_LEN) {
        return Err(RingError::IndirectLength(descriptor.len));
    }
    Ok(Table { address: descriptor.address, size })
}

/// A place in one half of a chain: buffers are split as the driver pleases, so nothing is known about where a
/// header ends and data begins (section 2.7.4).
#[derive(Debug, Clone)]
pub struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are done.
    at: u32,
}

impl Cursor<'_> {
    /// The next contiguous piece of at most `len` bytes.
    fn piece(&mut self, len: usize) -> Option<(u64, usize)> {
        loop {
            let [(address, segment_len), rest @ ..] = self.segments else { return None };
            let left = segment_len - self.at;
            if left == 0 {
                self.segments = rest;
                self.at = 0;
                continue;
            }
            let taken = left.min(u32::try_from(len).unwrap_or(u32::MAX));
            // An address that overflows cannot be memory.
            let address = address.saturating_add(u64::from(self.at));
            self.at += taken;
            return Some((address, taken as usize));
        }
    }

    /// Passes over bytes.
    pub fn skip(&mut self, mut len: u64) {
        while len > 0 {
            let step = usize::try_from(len).unwrap_or(usize::MAX);
            let Some((_, taken)) = self.piece(step) else { return };
            len -= taken as u64;
        }
    }

    /// Fills `buf` from guest memory.
    ///
    /// # Errors
    /// The chain is shorter, or not memory.
    pub fn read(&mut self, ram: &GuestRam, buf: &mut [u8]) -> Result<(), RingError> {
        let mut done = 0;
        while done < buf.len() {
            let (address, taken) = self.piece(buf.len() - done).ok_or(RingError::NoAnswer)?;
            ram.read(address, &mut buf[done..done + taken])?;
            done += taken;
        }
        Ok(())
    }

    /// Copies `bytes` to guest memory.
    ///
    /// # Errors
    /// The chain is shorter, or not memory.
    pub fn write(&mut self, ram: &GuestRam, bytes: &[u8]) -> Result<(), RingError> {
        let mut done = 0;
        while done < bytes.len() {
            let (address, taken) = self.piece(bytes.len() - done).ok_or(RingError::NoAnswer)?;
            ram.write(address, &bytes[done..done + taken])?;
            done += taken;
        }
        Ok(())
    }
}
