//! The records of a directory's block (kernel documentation, "Linear (Classic) Directories").

use block::Result;

use crate::bytes::{byte, copy_to, corrupt, le16, le32, part, put_le16, put_le32};

/// Bytes of a record without its name.
const HEAD: usize = 8;
/// Bytes of the record that holds a checksum at the end of a block.
pub(super) const TAIL: usize = 12;
const TAIL_KIND: u8 = 0xde;

/// A record, in use or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    /// Where it begins in its block.
    pub(super) at: usize,
    /// Its length in bytes.
    pub(super) len: usize,
    /// 0: not in use.
    pub(super) inode: u32,
    pub(super) name_len: usize,
    pub(super) kind: u8,
}

impl Record {
    pub(super) fn name(self, block: &[u8]) -> &[u8] {
        part(block, self.at + HEAD, self.name_len)
    }

    /// Bytes that it needs.
    fn used(self) -> usize {
        if self.inode == 0 { 0 } else { needed(self.name_len) }
    }
}

/// Bytes that a record with a name of this length needs.
pub(super) fn needed(name_len: usize) -> usize {
    (HEAD + name_len).next_multiple_of(4)
}

/// 65536 does not fit into 16 bits.
fn read_len(block: &[u8], at: usize) -> usize {
    match le16(block, at + 4) {
        0 | 0xffff if block.len() == 65536 => 65536,
        len => len.into(),
    }
}

pub(super) fn write_len(block: &mut [u8], at: usize, len: usize) {
    put_le16(block, at + 4, u16::try_from(len).unwrap_or(u16::MAX));
}

/// The records of a block up to `end`, checked.
pub(super) fn records(block: &[u8], end: usize) -> Result<Vec<Record>> {
    let (mut records, mut at) = (vec![], 0);
    while at + HEAD <= end {
        let record = Record {
            at,
            len: read_len(block, at),
            inode: le32(block, at),
            name_len: byte(block, at + 6).into(),
            kind: byte(block, at + 7),
        };
        if record.len < HEAD
            || !record.len.is_multiple_of(4)
            || at + record.len > end
            || record.used() > record.len
        {
            return Err(corrupt(format!(
                "a directory record of {} bytes at {at:#x} of its block",
                record.len
            )));
        }
        at += record.len;
        records.push(record);
    }
    if at == end {
        Ok(records)
    } else {
        Err(corrupt(format!("directory records end at {at:#x} of {end:#x}")))
    }
}

/// Writes a record, and its name.
pub(super) fn write(block: &mut [u8], at: usize, len: usize, inode: u32, kind: u8, name: &[u8]) {
    put_le32(block, at, inode);
    write_len(block, at, len);
    copy_to(block, at + 6, &[u8::try_from(name.len()).unwrap_or(u8::MAX), kind]);
    copy_to(block, at + HEAD, name);
}

/// Puts a name into a block if there is room before `end`.
pub(super) fn insert(block: &mut [u8], end: usize, inode: u32, kind: u8, name: &[u8]) -> Result<bool> {
    let needed = needed(name.len());
    let Some(found) = records(block, end)?.into_iter().find(|found| found.len - found.used() >= needed)
    else {
        return Ok(false);
    };
    let used = found.used();
    if used > 0 {
        write_len(block, found.at, used);
    }
    write(block, found.at + used, found.len - used, inode, kind, name);
    Ok(true)
}

/// Takes the name at a place out of a block: the record before it grows, or it is marked as not in use.
pub(super) fn remove(block: &mut [u8], end: usize, at: usize) -> Result<()> {
    let all = records(block, end)?;
    let index = all.iter().position(|found| found.at == at);
    let index = index.ok_or_else(|| corrupt(format!("no directory record at {at:#x} of its block")))?;
    match index.checked_sub(1).and_then(|before| all.get(before)) {
        Some(before) => write_len(block, before.at, before.len + all[index].len),
        None => put_le32(block, at, 0),
    }
    Ok(())
}

/// A name with what it is the name of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) inode: u32,
    pub(super) kind: u8,
    pub(super) name: Vec<u8>,
}

/// A block with these names, the last record reaching to `end`. `None`: they do not fit.
pub(super) fn fill(len: usize, end: usize, names: &[Named]) -> Option<Vec<u8>> {
    let (mut block, mut at) = (vec![0; len], 0);
    for (index, named) in names.iter().enumerate() {
        let needed = needed(named.name.len());
        let size = if index + 1 == names.len() { end.checked_sub(at)? } else { needed };
        if size < needed || at + size > end {
            return None;
        }
        write(&mut block, at, size, named.inode, named.kind, &named.name);
        at += size;
    }
    if names.is_empty() {
        write_len(&mut block, 0, end);
    }
    Some(block)
}

/// Whether the block ends with the record for a checksum.
pub(super) fn has_tail(block: &[u8]) -> bool {
    let at = block.len().saturating_sub(TAIL);
    le32(block, at) == 0 && le16(block, at + 4) == 12 && part(block, at + 6, 2) == [0, TAIL_KIND]
}

/// Writes the record for a checksum, without it.
pub(super) fn write_tail(block: &mut [u8]) {
    let at = block.len().saturating_sub(TAIL);
    write(block, at, TAIL, 0, TAIL_KIND, &[]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(block: &[u8]) -> Vec<String> {
        let used = records(block, block.len()).unwrap().into_iter().filter(|found| found.inode != 0);
        used.map(|found| String::from_utf8_lossy(found.name(block)).into_owned()).collect()
    }

    #[test]
    fn names_come_and_go() {
        let mut block = fill(64, 64, &[]).unwrap();
        for (inode, name) in [(1, "one"), (2, "two"), (3, "three")] {
            assert!(insert(&mut block, 64, inode, 1, name.as_bytes()).unwrap());
        }
        assert!(!insert(&mut block, 64, 4, 1, b"this does not fit").unwrap());
        let at = records(&block, 64).unwrap()[1].at;
        remove(&mut block, 64, at).unwrap();
        assert_eq!(names(&block), ["one", "three"]);
        assert!(insert(&mut block, 64, 4, 1, b"four").unwrap());
        remove(&mut block, 64, 0).unwrap();
        assert_eq!(names(&block), ["four", "three"]);
        assert!(remove(&mut block, 64, 1).is_err());
    }

    #[test]
    fn damaged_records_are_errors() {
        for bad in [0, 4, 7, 13, 68] {
            let mut block = fill(64, 64, &[]).unwrap();
            write_len(&mut block, 0, bad);
            assert!(records(&block, 64).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_largest_blocks() {
        let mut block = fill(65536, 65536, &[]).unwrap();
        assert_eq!(records(&block, 65536).unwrap()[0].len, 65536);
        write_tail(&mut block);
        assert!(has_tail(&block));
    }
}
