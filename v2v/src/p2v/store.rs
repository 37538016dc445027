//! What has changed since a snapshot was taken: the store into which the device mapper saves old contents first.
//!
//! ```text
//!   chunk 0    header: "SnAp", valid, version, sectors per chunk (4 bytes each)
//!   chunk 1    area of exceptions, 16 bytes each: chunk of the origin, chunk of the store; the first without a place in the
//!   chunk 2..  the chunks of that area                                                                   store ends the list
//!   chunk n    the next area, and so on
//! ```
//!
//! All numbers are little-endian. An exception is in the store before the write that made it necessary is carried out, so
//! that while nobody writes the list is complete. Known from the behaviour of the kernel's target `snapshot` with persistent
//! stores (`P`), which LVM uses.

use block::{BlockDevice, Error, ErrorKind, Result};

/// `SnAp` as a number.
const MAGIC: u32 = 0x7041_6e53;
const VERSION: u32 = 1;
const SECTOR: u64 = 512;
/// The largest chunk that LVM makes, in bytes.
const MOST_CHUNK: u64 = 512 << 10;
/// Bytes of an exception.
const EXCEPTION: u64 = 16;

/// What a store knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    /// Bytes per chunk.
    pub chunk_bytes: u64,
    /// Chunks of the origin that have been written to, in order.
    pub chunks: Vec<u64>,
}

struct Header {
    valid: bool,
    chunk_bytes: u64,
}

fn header(store: &dyn BlockDevice) -> Result<Header> {
    let mut bytes = [0; 512];
    store.read_at(&mut bytes, 0)?;
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if number(0) != MAGIC || number(8) != VERSION {
        return Err(Error::invalid("not the store of a snapshot, or one of another version"));
    }
    let chunk_bytes = u64::from(number(12)) * SECTOR;
    if !chunk_bytes.is_power_of_two() || chunk_bytes > MOST_CHUNK {
        return Err(Error::invalid(format!("the store of a snapshot with chunks of {chunk_bytes} bytes")));
    }
    Ok(Header { valid: number(4) == 1, chunk_bytes })
}

/// Whether the snapshot has been given up by the kernel, most often because its store is full.
///
/// # Errors
/// It is no store; reading failed.
pub fn overflowed(store: &dyn BlockDevice) -> Result<bool> {
    header(store).map(|header| !header.valid)
}

/// The chunks of the origin that have been written to since the snapshot was taken. Complete only while nobody writes.
///
/// # Errors
/// `NoSpace`: the snapshot has been given up; `Invalid`: it is no store; reading failed.
pub fn changed(store: &dyn BlockDevice) -> Result<Changed> {
    let Header { valid, chunk_bytes } = header(store)?;
    if !valid {
        return Err(Error::new(ErrorKind::NoSpace, "it overflowed: more was written than it has room for")
            .hint("Give it more room (--snapshot-size), or copy when less is written."));
    }
    let in_area = chunk_bytes / EXCEPTION;
    let mut chunks = vec![];
    let mut area = vec![0; block::num::to_usize(chunk_bytes)];
    // The areas that the store has room for.
    let total = store.size() / chunk_bytes;
    let mut place = 1;
    'areas: while place < total {
        store.read_at(&mut area, place * chunk_bytes)?;
        for exception in area.chunks_exact(16) {
            let number = |at: usize| {
                let mut eight = [0; 8];
                eight.copy_from_slice(&exception[at..at + 8]);
                u64::from_le_bytes(eight)
            };
            if number(8) == 0 {
                break 'areas;
            }
            chunks.push(number(0));
        }
        place += in_area + 1;
    }
    chunks.sort_unstable();
    chunks.dedup();
    Ok(Changed { chunk_bytes, chunks })
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::*;
    use block::mem::MemStorage;
    use block::raw::{Raw, RawOptions};

    /// A store with these exceptions.
    pub(in crate::p2v) fn store(valid: bool, chunk_sectors: u32, chunks: &[u64]) -> Vec<u8> {
        let chunk = chunk_sectors as usize * 512;
        let in_area = chunk / 16;
        let mut bytes = vec![0; chunk * (chunks.len() + chunks.len() / in_area + 3)];
        for (at, number) in [(0, MAGIC), (4, valid.into()), (8, 1), (12, chunk_sectors)] {
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        for (index, old) in chunks.iter().enumerate() {
            let area = 1 + index / in_area * (in_area + 1);
            let at = area * chunk + index % in_area * 16;
            let new = (area + 1 + index % in_area) as u64;
            bytes[at..at + 8].copy_from_slice(&old.to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&new.to_le_bytes());
        }
        bytes
    }

    pub(in crate::p2v) fn device(bytes: Vec<u8>) -> Arc<dyn BlockDevice> {
        Arc::new(Raw::open(Arc::new(MemStorage::from_bytes(bytes)), RawOptions::default()).unwrap())
    }

    #[test]
    fn changes_are_listed_over_several_areas() {
        let chunks: Vec<u64> = (0..700).map(|index| index * 3 + 1).rev().collect();
        let mut sorted = chunks.clone();
        sorted.reverse();
        let found = changed(&*device(store(true, 8, &chunks))).unwrap();
        assert_eq!(found, Changed { chunk_bytes: 4096, chunks: sorted });
        assert_eq!(changed(&*device(store(true, 32, &[]))).unwrap().chunks, [0; 0]);
        // A list that fills its area and the store.
        let full: Vec<u64> = (0..256).collect();
        assert_eq!(changed(&*device(store(true, 8, &full))).unwrap().chunks, full);
    }

    #[test]
    fn a_full_store_and_what_is_none_are_told() {
        let full = device(store(false, 8, &[1]));
        assert!(overflowed(&*full).unwrap());
        assert_eq!(changed(&*full).unwrap_err().kind(), ErrorKind::NoSpace);
        assert!(!overflowed(&*device(store(true, 8, &[1]))).unwrap());
        for (at, number) in [(0, 0), (8, 2), (12, 0), (12, 9), (12, 1 << 20), (12, u32::MAX)] {
            let mut bad = store(true, 8, &[1]);
            bad[at..at + 4].copy_from_slice(&number.to_le_bytes());
            assert_eq!(changed(&*device(bad)).unwrap_err().kind(), ErrorKind::Invalid, "{number} at {at}");
        }
    }
}
