//! The two headers (section 2.2.2): which of them counts, and how they are replaced.
//!
//! The valid header with the greater sequence number is the current one. A change is written over the other with the
//! next number and synced, so that a torn write leaves the old one in force; then the old one is replaced by the same
//! contents, so that the loss of one header at any later time changes nothing.

use block::codec::{Reader, Writer};
use block::num::is_aligned;
use block::{Error, ErrorKind, Result, Storage};

use crate::{Guid, MIB, checksum};

/// Where the two headers lie in the file.
pub const OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// Bytes of a header that its checksum covers.
pub const LEN: usize = 4096;
const SIGNATURE: &[u8; 4] = b"head";
/// Where the checksum lies in it.
const CHECKSUM_AT: usize = 4;

/// What a header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The greater number of two valid headers wins.
    pub sequence_number: u64,
    /// Identifies the contents of the file: changes before the first change of any byte after it has been opened.
    pub file_write_guid: Guid,
    /// Identifies what the user sees: changes before the first change of guest data. A differencing disk knows its
    /// parent by this.
    pub data_write_guid: Guid,
    /// Of the entries of the log that count; zero: there are none.
    pub log_guid: Guid,
    /// Length of the log in bytes, a multiple of 1 MiB. May be 0 in files that have never been written.
    pub log_length: u32,
    /// Where the log lies in the file in bytes, a multiple of 1 MiB.
    pub log_offset: u64,
}

impl Header {
    /// Reads a header from its 4 KiB. `None`: there is none (signature or checksum are wrong).
    pub fn parse(bytes: &[u8; LEN]) -> Result<Option<Self>> {
        match Self::fields(bytes) {
            Some((header, versions)) if checksum(bytes, CHECKSUM_AT) == stored_checksum(bytes) => {
                header.validated(versions).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The fields, and the versions of log and format.
    fn fields(bytes: &[u8]) -> Option<(Self, (u16, u16))> {
        let mut reader = Reader::new(bytes);
        if reader.take(4)? != SIGNATURE {
            return None;
        }
        reader.skip(4)?;
        let sequence_number = reader.le_u64()?;
        let mut guid = || Some(Guid(reader.take(16)?.try_into().ok()?));
        let (file_write_guid, data_write_guid, log_guid) = (guid()?, guid()?, guid()?);
        let versions = (reader.le_u16()?, reader.le_u16()?);
        let (log_length, log_offset) = (reader.le_u32()?, reader.le_u64()?);
        let header =
            Self { sequence_number, file_write_guid, data_write_guid, log_guid, log_length, log_offset };
        Some((header, versions))
    }

    fn validated(self, (log_version, version): (u16, u16)) -> Result<Self> {
        if version != 1 {
            return Err(Error::unsupported(format!("VHDX version {version} is not supported")));
        }
        if log_version != 0 && !self.log_guid.is_zero() {
            return Err(Error::unsupported(format!("VHDX log version {log_version} is not supported")));
        }
        let (offset, length) = (self.log_offset, u64::from(self.log_length));
        let whole = is_aligned(offset, MIB) && is_aligned(length, MIB);
        if !whole || (length > 0 && offset < MIB) || offset.checked_add(length).is_none() {
            return Err(Error::invalid(format!(
                "VHDX log at {offset:#x} with {length:#x} bytes: both have to be multiples of 1 MiB, behind the header"
            )));
        }
        Ok(self)
    }

    /// The 4 KiB of the header, checksum included.
    pub fn encode(&self) -> [u8; LEN] {
        let mut writer = Writer::new();
        writer.bytes(SIGNATURE).le_u32(0).le_u64(self.sequence_number);
        writer.bytes(&self.file_write_guid.0).bytes(&self.data_write_guid.0).bytes(&self.log_guid.0);
        writer.le_u16(0).le_u16(1).le_u32(self.log_length).le_u64(self.log_offset);
        let mut bytes = [0; LEN];
        bytes[..writer.len()].copy_from_slice(&writer.into_bytes());
        let sum = checksum(&bytes, CHECKSUM_AT);
        bytes[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }
}

fn stored_checksum(bytes: &[u8; LEN]) -> u32 {
    u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])
}

/// The current header and where it is.
#[derive(Debug, Clone)]
pub struct Headers {
    /// What it says.
    pub current: Header,
    /// Which of the two it is.
    slot: usize,
    /// The other one is no valid header.
    pub other_damaged: bool,
}

impl Headers {
    /// Reads both headers and decides which one counts. Two that are the same in every byte are accepted, because
    /// Microsoft's Disk2VHD writes such files.
    ///
    /// # Errors
    /// Neither is valid; they contradict each other under the same number; they need what we do not have; the host
    /// failed.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let mut bytes = [[0; LEN]; 2];
        for (bytes, offset) in bytes.iter_mut().zip(OFFSETS) {
            storage.read_at(bytes, offset)?;
        }
        let both = [Header::parse(&bytes[0]), Header::parse(&bytes[1])];
        let (slot, other_damaged) = match &both {
            [Ok(Some(a)), Ok(Some(b))] if a.sequence_number != b.sequence_number => {
                (usize::from(b.sequence_number > a.sequence_number), false)
            }
            [Ok(Some(a)), Ok(Some(b))] if a == b => (0, false),
            [Ok(Some(_)), Ok(Some(_))] => {
                return Err(corrupt("the two VHDX headers have the same sequence number and differ"));
            }
            [Ok(Some(_)), Ok(None)] => (0, true),
            [Ok(None), Ok(Some(_))] => (1, true),
            [Ok(None), Ok(None)] => {
                return Err(corrupt("neither of the two VHDX headers (at 0x10000 and 0x20000) is valid"));
            }
            // A header whose checksum is right was meant: its error counts, whichever it is.
            [Err(_), _] => (0, true),
            [_, Err(_)] => (1, true),
        };
        let [first, second] = both;
        let current = if slot == 0 { first } else { second };
        let current = current?.ok_or_else(|| corrupt("no valid VHDX header"))?;
        Ok(Self { current, slot, other_damaged })
    }

    /// Puts the header that `change` makes of the current one in its place, in both slots. Durable on return; after a
    /// failure one of the two is in force.
    ///
    /// # Errors
    /// The host failed.
    pub fn replace(&mut self, storage: &dyn Storage, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut next = self.current.clone();
        change(&mut next);
        for _ in 0..2 {
            next.sequence_number = self.next_number()?;
            self.write_other(storage, &next)?;
        }
        self.other_damaged = false;
        Ok(())
    }

    fn next_number(&self) -> Result<u64> {
        let next = self.current.sequence_number.checked_add(1);
        next.ok_or_else(|| corrupt("the sequence number of the VHDX header has no successor"))
    }

    fn write_other(&mut self, storage: &dyn Storage, header: &Header) -> Result<()> {
        let other = 1 - self.slot;
        storage.write_at(&header.encode(), OFFSETS[other])?;
        storage.sync()?;
        (self.slot, self.current) = (other, header.clone());
        Ok(())
    }
}

fn corrupt(message: &str) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

#[cfg(test)]
mod tests {
    use block::mem::MemStorage;

    use super::*;

    fn header(sequence_number: u64) -> Header {
        Header {
            sequence_number,
            file_write_guid: Guid([1; 16]),
            data_write_guid: Guid([2; 16]),
            log_guid: Guid::ZERO,
            log_length: 1 << 20,
            log_offset: 1 << 20,
        }
    }

    fn stored(first: &Header, second: &Header) -> MemStorage {
        let storage = MemStorage::new();
        storage.write_at(&first.encode(), OFFSETS[0]).unwrap();
        storage.write_at(&second.encode(), OFFSETS[1]).unwrap();
        storage
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Header::parse(&header(7).encode()).unwrap(), Some(header(7)));
        let mut damaged = header(7).encode();
        damaged[100] ^= 1;
        assert_eq!(Header::parse(&damaged).unwrap(), None);
    }

    #[test]
    fn the_greater_number_wins_and_a_damaged_header_does_not_count() {
        let current = |storage: &MemStorage| Headers::read(storage).unwrap().current.sequence_number;
        assert_eq!(current(&stored(&header(7), &header(8))), 8);
        assert_eq!(current(&stored(&header(9), &header(8))), 9);
        assert_eq!(current(&stored(&header(8), &header(8))), 8, "as Disk2VHD writes them");
        let storage = stored(&header(7), &header(8));
        storage.write_at(&[1], OFFSETS[1] + 4000).unwrap();
        assert_eq!(current(&storage), 7);
        assert!(Headers::read(&storage).unwrap().other_damaged);
        storage.write_at(&[1], OFFSETS[0] + 4000).unwrap();
        assert_eq!(Headers::read(&storage).unwrap_err().kind(), ErrorKind::Corrupt);
        let other = Header { log_guid: Guid([9; 16]), ..header(8) };
        assert_eq!(Headers::read(&stored(&header(8), &other)).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_change_reaches_both_headers() {
        let storage = stored(&header(7), &header(8));
        let mut headers = Headers::read(&storage).unwrap();
        headers.replace(&storage, |header| header.log_guid = Guid([5; 16])).unwrap();
        storage.write_at(&[0; LEN], OFFSETS[0]).unwrap();
        assert_eq!(Headers::read(&storage).unwrap().current.log_guid, Guid([5; 16]));
        assert_eq!(headers.current.sequence_number, 10);
    }

    #[test]
    fn what_is_out_of_bounds_is_refused() {
        let refused = |header: Header| Header::parse(&header.encode()).unwrap_err().kind();
        assert_eq!(refused(Header { log_offset: 4096, ..header(1) }), ErrorKind::Invalid);
        assert_eq!(refused(Header { log_offset: 0, ..header(1) }), ErrorKind::Invalid);
        assert_eq!(refused(Header { log_length: 4096, ..header(1) }), ErrorKind::Invalid);
        let last = u64::MAX - (MIB - 1);
        assert_eq!(
            refused(Header { log_offset: last, log_length: 1 << 20, ..header(1) }),
            ErrorKind::Invalid
        );
    }
}
