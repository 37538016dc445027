//! One entry of the log (section 2.3.1).

use block::codec::{Reader, Writer};
use block::num::{is_aligned, low_u32, to_usize};
use block::{Error, Result};

use super::{Ring, SECTOR, SECTOR_LEN};
use crate::{Guid, checksum};

const SIGNATURE: &[u8; 4] = b"loge";
const ZERO: &[u8; 4] = b"zero";
const DATA: &[u8; 4] = b"desc";
const DATA_SECTOR: &[u8; 4] = b"data";
const CHECKSUM_AT: usize = 4;
/// Bytes of an entry's header, before the first descriptor.
const HEADER: u64 = 64;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 32;
/// Bytes of a change that its descriptor carries: where the data sector has its signature and sequence number.
const LEADING: usize = 8;
const TRAILING: usize = 4;

/// The header of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    checksum: u32,
    /// Bytes of the whole entry, a multiple of 4 KiB, at most the length of the log.
    pub length: u64,
    /// Position of the oldest entry that counts if this one is the last.
    pub tail: u64,
    /// One greater than that of the entry before it.
    pub sequence: u64,
    descriptors: u32,
    /// Length that the file had on stable storage when the entry was written.
    pub flushed_file_offset: u64,
    /// Length that the file has to have so that everything that is allocated lies inside.
    pub last_file_offset: u64,
}

impl Head {
    /// Reads a header from the first bytes of `sector`. `None`: it is not one that could belong to a log of `ring_length`
    /// bytes with this GUID.
    pub fn parse(sector: &[u8], guid: Guid, ring_length: u64) -> Option<Self> {
        let mut reader = Reader::new(sector);
        if reader.take(4)? != SIGNATURE {
            return None;
        }
        let checksum = reader.le_u32()?;
        let (length, tail) = (u64::from(reader.le_u32()?), u64::from(reader.le_u32()?));
        let (sequence, descriptors) = (reader.le_u64()?, reader.le_u32()?);
        reader.skip(4)?;
        let found = Guid(reader.take(16)?.try_into().ok()?);
        let (flushed_file_offset, last_file_offset) = (reader.le_u64()?, reader.le_u64()?);
        let head =
            Self { checksum, length, tail, sequence, descriptors, flushed_file_offset, last_file_offset };
        let whole = is_aligned(length, SECTOR) && is_aligned(tail, SECTOR);
        let fits = (SECTOR..=ring_length).contains(&length) && tail < ring_length;
        (found == guid && whole && fits && sequence > 0 && head.descriptor_bytes() <= length).then_some(head)
    }

    /// Bytes of the sectors with header and descriptors.
    fn descriptor_bytes(&self) -> u64 {
        (HEADER + DESCRIPTOR * u64::from(self.descriptors)).next_multiple_of(SECTOR)
    }
}

/// A change that an entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// `len` bytes at `offset` become zeros; both are multiples of 4 KiB.
    Zero {
        /// First byte in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// 4 KiB at `offset` become what is kept at `position` of the ring.
    Data {
        /// First byte in the file, a multiple of 4 KiB.
        offset: u64,
        /// The data sector.
        kept: Kept,
    },
}

/// 4 KiB that are kept in the log: the middle of them in a data sector, the ends in the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    position: u64,
    leading: [u8; LEADING],
    trailing: [u8; TRAILING],
}

impl Kept {
    /// The 4 KiB.
    ///
    /// # Errors
    /// The host failed.
    pub fn read(&self, ring: &Ring) -> Result<[u8; SECTOR_LEN]> {
        let mut sector = [0; SECTOR_LEN];
        ring.read(&mut sector, self.position)?;
        sector[..LEADING].copy_from_slice(&self.leading);
        sector[SECTOR_LEN - TRAILING..].copy_from_slice(&self.trailing);
        Ok(sector)
    }
}

/// Reads all of the entry at `position`. `None`: it is no whole and valid entry.
///
/// # Errors
/// The host failed.
pub fn read(ring: &Ring, position: u64, head: &Head) -> Result<Option<Vec<Change>>> {
    let mut bytes = vec![0; to_usize(head.length)];
    ring.read(&mut bytes, position)?;
    if checksum(&bytes, CHECKSUM_AT) != head.checksum {
        return Ok(None);
    }
    Ok(changes(ring, position, head, &bytes))
}

/// The changes of an entry whose checksum is right; `None` if it breaks the rules.
fn changes(ring: &Ring, position: u64, head: &Head, bytes: &[u8]) -> Option<Vec<Change>> {
    let mut reader = Reader::new(bytes);
    reader.skip(to_usize(HEADER))?;
    let mut changes = vec![];
    let mut data_at = head.descriptor_bytes();
    for _ in 0..head.descriptors {
        let signature = reader.take(4)?;
        let trailing: [u8; TRAILING] = reader.take(TRAILING)?.try_into().ok()?;
        let leading: [u8; LEADING] = reader.take(LEADING)?.try_into().ok()?;
        let (offset, sequence) = (reader.le_u64()?, reader.le_u64()?);
        if !is_aligned(offset, SECTOR) || sequence != head.sequence {
            return None;
        }
        if signature == ZERO {
            let len = u64::from_le_bytes(leading);
            if !is_aligned(len, SECTOR) || offset.checked_add(len).is_none() {
                return None;
            }
            changes.push(Change::Zero { offset, len });
        } else if signature == DATA {
            let sector = bytes.get(to_usize(data_at)..to_usize(data_at + SECTOR))?;
            if !is_data_sector(sector, sequence) || offset.checked_add(SECTOR).is_none() {
                return None;
            }
            let kept = Kept { position: ring.advance(position, data_at), leading, trailing };
            changes.push(Change::Data { offset, kept });
            data_at += SECTOR;
        } else {
            return None;
        }
    }
    Some(changes)
}

/// Whether a data sector belongs to the entry of this number.
fn is_data_sector(sector: &[u8], sequence: u64) -> bool {
    let mut reader = Reader::new(sector);
    let signature = reader.take(4) == Some(DATA_SECTOR);
    let high = reader.le_u32().map(u64::from);
    reader.skip(SECTOR_LEN - 12);
    let low = reader.le_u32().map(u64::from);
    signature && high.zip(low).is_some_and(|(high, low)| high << 32 | low == sequence)
}

/// What the header of a new entry says.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// Of the log.
    pub guid: Guid,
    /// Number of the entry.
    pub sequence: u64,
    /// Position of the oldest entry that counts.
    pub tail: u64,
    /// Length of the file in bytes, which is durable.
    pub file_len: u64,
}

/// How many bytes an entry takes that changes `sectors` sectors.
pub fn length_of(sectors: u64) -> u64 {
    (HEADER + DESCRIPTOR * sectors).next_multiple_of(SECTOR) + sectors * SECTOR
}

/// How many sectors an entry of at most `bytes` bytes can change.
pub fn capacity(bytes: u64) -> u64 {
    let mut sectors = bytes / SECTOR;
    while sectors > 0 && length_of(sectors) > bytes {
        sectors -= 1;
    }
    sectors
}

/// Builds an entry that puts each of `sectors` at its offset in the file (a multiple of 4 KiB).
///
/// # Errors
/// The entry would be longer than the format allows (4 GiB).
pub fn build(frame: &Frame, sectors: &[(u64, Box<[u8; SECTOR_LEN]>)]) -> Result<Vec<u8>> {
    let count = sectors.len() as u64;
    let length = length_of(count);
    if u32::try_from(length).is_err() || frame.tail > u64::from(u32::MAX) {
        return Err(Error::unsupported("an entry of the VHDX log would be too long"));
    }
    let mut writer = Writer::new();
    writer.bytes(SIGNATURE).le_u32(0).le_u32(low_u32(length)).le_u32(low_u32(frame.tail));
    writer.le_u64(frame.sequence).le_u32(low_u32(count)).le_u32(0).bytes(&frame.guid.0);
    writer.le_u64(frame.file_len).le_u64(frame.file_len);
    for (offset, sector) in sectors {
        let (leading, trailing) = (&sector[..LEADING], &sector[SECTOR_LEN - TRAILING..]);
        writer.bytes(DATA).bytes(trailing).bytes(leading).le_u64(*offset).le_u64(frame.sequence);
    }
    writer.pad_to(SECTOR_LEN);
    for (_, sector) in sectors {
        writer.bytes(DATA_SECTOR).le_u32(low_u32(frame.sequence >> 32));
        writer.bytes(&sector[LEADING..SECTOR_LEN - TRAILING]).le_u32(low_u32(frame.sequence & 0xffff_ffff));
    }
    let mut bytes = writer.into_bytes();
    let sum = checksum(&bytes, CHECKSUM_AT);
    bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use block::mem::MemStorage;

    use super::*;

    pub(crate) const GUID: Guid = Guid([0x17; 16]);

    pub(crate) fn ring() -> Ring {
        Ring::new(Arc::new(MemStorage::from_bytes(vec![0; 4 << 20])), 1 << 20, 1 << 20)
    }

    pub(crate) fn frame(sequence: u64, tail: u64) -> Frame {
        Frame { guid: GUID, sequence, tail, file_len: 4 << 20 }
    }

    /// A sector full of `byte`, but for its first and last one.
    pub(crate) fn sector(offset: u64, byte: u8) -> (u64, Box<[u8; SECTOR_LEN]>) {
        let mut bytes = [byte; SECTOR_LEN];
        (bytes[0], bytes[SECTOR_LEN - 1]) = (1, 2);
        (offset, Box::new(bytes))
    }

    fn read_at(ring: &Ring, position: u64) -> Option<Vec<Change>> {
        let mut first = [0; SECTOR_LEN];
        ring.read(&mut first, position).unwrap();
        let head = Head::parse(&first, GUID, ring.length())?;
        read(ring, position, &head).unwrap()
    }

    #[test]
    fn what_is_built_is_read_around_the_end_of_the_ring_too() {
        for position in [0, 5 * SECTOR, (1 << 20) - SECTOR, (1 << 20) - 2 * SECTOR] {
            let ring = ring();
            let sectors: Vec<_> = (0..130).map(|n| sector(u64::from(n) << 20, n)).collect();
            let bytes = build(&frame(0x1_2345_6789, position), &sectors).unwrap();
            assert_eq!(bytes.len() as u64, length_of(130));
            ring.write(&bytes, position).unwrap();
            let changes = read_at(&ring, position).unwrap();
            assert_eq!(changes.len(), 130);
            for (change, (offset, bytes)) in changes.iter().zip(&sectors) {
                let Change::Data { offset: at, kept } = change else { panic!("{change:?}") };
                assert_eq!((at, kept.read(&ring).unwrap()), (offset, **bytes));
            }
        }
    }

    #[test]
    fn the_capacity_is_the_most_that_fits() {
        for bytes in [SECTOR, 2 * SECTOR, 512 << 10, 1 << 20, 64 << 20] {
            let sectors = capacity(bytes);
            assert!(length_of(sectors) <= bytes && length_of(sectors + 1) > bytes, "{bytes}: {sectors}");
        }
        assert_eq!(capacity(512 << 10), 126);
    }

    #[test]
    fn any_changed_byte_makes_an_entry_invalid() {
        let good = build(&frame(7, 0), &[sector(1 << 20, 3), sector(2 << 20, 4)]).unwrap();
        for at in (0..good.len()).step_by(97) {
            let ring = ring();
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            ring.write(&bad, 0).unwrap();
            assert_eq!(read_at(&ring, 0), None, "byte {at}");
        }
    }

    /// With a new checksum, so that it is the rule that is looked at.
    #[test]
    fn entries_that_break_the_rules_are_not_taken() {
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let ring = ring();
            let mut bytes = build(&frame(7, 0), &[sector(1 << 20, 3)]).unwrap();
            change(&mut bytes);
            let sum = checksum(&bytes, CHECKSUM_AT);
            bytes[4..8].copy_from_slice(&sum.to_le_bytes());
            ring.write(&bytes, 0).unwrap();
            read_at(&ring, 0).is_none()
        };
        assert!(!refused(&|_| {}));
        assert!(refused(&|b| b[8..12].copy_from_slice(&(2u32 << 20).to_le_bytes())), "longer than the log");
        assert!(refused(&|b| b[12..16].copy_from_slice(&(1u32 << 20).to_le_bytes())), "tail outside");
        assert!(refused(&|b| b[16..24].fill(0)), "number 0");
        assert!(refused(&|b| b[24..28].fill(0xff)), "more descriptors than bytes");
        assert!(refused(&|b| b[24] = 2), "a descriptor without signature");
        assert!(refused(&|b| b[80] = 1), "not a multiple of 4 KiB");
        assert!(refused(&|b| b[88] = 8), "a descriptor of another entry");
        assert!(refused(&|b| b[4096 + 4095] = 1), "a data sector of another entry");
        assert!(refused(&|b| b[80..88].copy_from_slice(&(u64::MAX - 4095).to_le_bytes())), "past all ends");
    }
}
