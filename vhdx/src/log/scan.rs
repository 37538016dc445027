//! Finding the active sequence (section 2.3.2) without trusting the log to be short or honest.
//!
//! The specification walks the ring from every possible start. The same sequence is found here by looking at every
//! sector once: each entry has at most one successor, so that following them leads every entry to one *last* entry;
//! a last entry whose tail leads back to itself ends a valid sequence, and the greatest of those is the active one.

use std::collections::HashMap;

use block::num::to_usize;
use block::{Error, ErrorKind, Result};

use super::entry::{Head, read};
use super::{Ring, SECTOR};
use crate::{Guid, MIB};

/// Bytes of entries whose checksums are computed in all: entries that overlap each other must not make this work
/// endless.
const MAX_CHECKED: u64 = 512 << 20;
/// The longest entry that is read, in bytes. The whole logs that are met have 1 MiB.
const MAX_ENTRY: u64 = 64 << 20;

/// An entry of the active sequence and where it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Located {
    /// In the ring.
    pub position: u64,
    /// Its header.
    pub head: Head,
}

/// The active sequence of the log with this GUID, oldest entry first. Empty if there is no entry at all: a writer that
/// named the log in the header and stopped before its first entry was complete has changed nothing yet.
///
/// # Errors
/// There are entries and none of them ends a sequence; there is too much to look at; the host failed.
pub fn active_sequence(ring: &Ring, guid: Guid) -> Result<Vec<Located>> {
    let entries = valid_entries(ring, guid)?;
    if entries.is_empty() {
        return Ok(vec![]);
    }
    let last_of = last_entries(ring, &entries);
    let ends = entries.iter().filter(|(position, head)| last_of.get(&head.tail) == Some(*position));
    let Some((_, last)) = ends.max_by_key(|(_, head)| head.sequence) else {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("the VHDX log has {} entries, and the first of their sequence is damaged", entries.len()),
        ));
    };
    Ok(walk(ring, &entries, last))
}

/// Every entry that is valid on its own, by position.
fn valid_entries(ring: &Ring, guid: Guid) -> Result<HashMap<u64, Head>> {
    let mut entries = HashMap::new();
    let mut budget = MAX_CHECKED;
    let mut chunk = vec![0; to_usize(MIB)];
    for start in (0..ring.length()).step_by(to_usize(MIB)) {
        if ring.is_hole(start, MIB)? {
            continue;
        }
        ring.read(&mut chunk, start)?;
        for (sector, position) in
            chunk.chunks_exact(to_usize(SECTOR)).zip((start..).step_by(to_usize(SECTOR)))
        {
            let Some(head) = Head::parse(sector, guid, ring.length()) else { continue };
            budget = match budget.checked_sub(head.length) {
                Some(left) if head.length <= MAX_ENTRY => left,
                _ => return Err(super::replay::too_large()),
            };
            if read(ring, position, &head)?.is_some() {
                entries.insert(position, head);
            }
        }
    }
    Ok(entries)
}

/// The entry that follows another in its sequence.
fn successor(ring: &Ring, entries: &HashMap<u64, Head>, position: u64, head: &Head) -> Option<u64> {
    let next = ring.advance(position, head.length);
    entries.get(&next).filter(|after| Some(after.sequence) == head.sequence.checked_add(1)).map(|_| next)
}

/// For each entry the last one of its sequence. Numbers only grow along a sequence, so that going through them from
/// the greatest down finds the answer of each successor ready.
fn last_entries(ring: &Ring, entries: &HashMap<u64, Head>) -> HashMap<u64, u64> {
    let mut order: Vec<(&u64, &Head)> = entries.iter().collect();
    order.sort_by_key(|(_, head)| std::cmp::Reverse(head.sequence));
    let mut last_of = HashMap::new();
    for (&position, head) in order {
        let last = successor(ring, entries, position, head).and_then(|next| last_of.get(&next).copied());
        last_of.insert(position, last.unwrap_or(position));
    }
    last_of
}

/// The entries from the tail of `last` to itself.
fn walk(ring: &Ring, entries: &HashMap<u64, Head>, last: &Head) -> Vec<Located> {
    let mut sequence = vec![];
    let mut next = Some(last.tail);
    while let Some((position, head)) = next.and_then(|position| Some((position, *entries.get(&position)?))) {
        sequence.push(Located { position, head });
        next = successor(ring, entries, position, &head);
    }
    sequence
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::entry::build;
    use crate::log::entry::tests::{GUID, frame, ring, sector};

    /// Puts an entry of three sectors at the n-th place for such.
    fn put(ring: &Ring, place: u64, sequence: u64, tail_place: u64) {
        let sectors = [sector(1 << 20, 1), sector(2 << 20, 2)];
        let bytes = build(&frame(sequence, tail_place * 3 * SECTOR), &sectors).unwrap();
        ring.write(&bytes, place * 3 * SECTOR).unwrap();
    }

    fn found(ring: &Ring) -> Vec<u64> {
        active_sequence(ring, GUID).unwrap().iter().map(|entry| entry.head.sequence).collect()
    }

    fn damage(ring: &Ring, place: u64) {
        ring.write(&[0xff], place * 3 * SECTOR + 5000).unwrap();
    }

    #[test]
    fn it_ends_with_the_greatest_number_and_begins_with_its_tail() {
        let ring = ring();
        assert_eq!(found(&ring), [0; 0]);
        (0..5).for_each(|n| put(&ring, n, n + 10, 0));
        assert_eq!(found(&ring), [10, 11, 12, 13, 14]);
        put(&ring, 5, 15, 3);
        assert_eq!(found(&ring), [13, 14, 15]);
        // A number is missing: the older sequence counts for nothing.
        put(&ring, 6, 17, 6);
        assert_eq!(found(&ring), [17]);
        assert_eq!(active_sequence(&ring, Guid([1; 16])).unwrap(), []);
    }

    #[test]
    fn a_torn_end_is_left_out() {
        let ring = ring();
        (0..5).for_each(|n| put(&ring, n, n + 1, 1.min(n)));
        damage(&ring, 4);
        assert_eq!(found(&ring), [2, 3, 4]);
        damage(&ring, 2);
        assert_eq!(found(&ring), [1, 2][1..], "the sequence ends before the damage");
        damage(&ring, 1);
        assert_eq!(found(&ring), [1]);
        damage(&ring, 0);
        damage(&ring, 3);
        assert_eq!(found(&ring), [0; 0]);
    }

    #[test]
    fn a_sequence_without_its_beginning_is_no_log_at_all() {
        let ring = ring();
        (0..3).for_each(|n| put(&ring, n, n + 1, 0));
        damage(&ring, 0);
        assert_eq!(active_sequence(&ring, GUID).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn it_goes_on_at_the_start_of_the_ring() {
        let ring = ring();
        // 256 sectors have room for 85 entries of 3; the 86th lies across the end.
        (83..86).for_each(|n| put(&ring, n, n, 83));
        let next = ring.advance(85 * 3 * SECTOR, 3 * SECTOR);
        assert_eq!(next, 2 * SECTOR);
        let bytes = build(&frame(86, 83 * 3 * SECTOR), &[sector(1 << 20, 1)]).unwrap();
        ring.write(&bytes, next).unwrap();
        assert_eq!(found(&ring), [83, 84, 85, 86]);
    }

    /// Each sector the beginning of an entry as long as the log.
    #[test]
    fn entries_inside_entries_cost_bounded_work() {
        let storage = std::sync::Arc::new(block::mem::MemStorage::from_bytes(vec![0; 64 << 20]));
        let ring = Ring::new(storage, 0, 64 << 20);
        let sectors: Vec<_> = (0..16).map(|n| sector(n << 20, 1)).collect();
        let mut bytes = build(&frame(7, 0), &sectors).unwrap();
        bytes[8..12].copy_from_slice(&(64u32 << 20).to_le_bytes());
        for position in (0..64 << 20).step_by(4096) {
            ring.write(&bytes[..4096], position).unwrap();
        }
        assert_eq!(active_sequence(&ring, GUID).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
