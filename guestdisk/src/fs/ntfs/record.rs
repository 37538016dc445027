//! Records of the master file table: update sequences, attributes, lists of runs.

use block::Result;

use crate::bytes::{byte, corrupt, le16, le32, le64, part};

/// The most runs of one attribute.
const MOST_RUNS: usize = 1 << 20;
/// What update sequences protect: the last two bytes of so many.
const STRIDE: usize = 512;

/// `$STANDARD_INFORMATION`.
pub(super) const STANDARD: u32 = 0x10;
/// `$ATTRIBUTE_LIST`.
pub(super) const LIST: u32 = 0x20;
/// `$VOLUME_INFORMATION`.
pub(super) const VOLUME_INFORMATION: u32 = 0x70;
/// `$DATA`.
pub(super) const DATA: u32 = 0x80;
/// `$INDEX_ROOT`.
pub(super) const INDEX_ROOT: u32 = 0x90;
/// `$INDEX_ALLOCATION`.
pub(super) const INDEX_ALLOCATION: u32 = 0xa0;
/// `$BITMAP`.
pub(super) const BITMAP: u32 = 0xb0;
/// `$REPARSE_POINT`.
pub(super) const REPARSE: u32 = 0xc0;
/// The end of a record's attributes.
const END: u32 = u32::MAX;

/// Clusters that lie together; `lcn` is `None` for a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First cluster in the attribute.
    pub(super) vcn: u64,
    /// How many clusters.
    pub(super) len: u64,
    /// First cluster on the volume.
    pub(super) lcn: Option<u64>,
}

/// What an attribute holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    /// Bytes in the record.
    Resident(Vec<u8>),
    /// Clusters of the volume.
    Runs {
        /// In the order of the attribute.
        runs: Vec<Run>,
        /// Length in bytes.
        size: u64,
        /// Bytes that have been written; what follows reads as zeros.
        initialized: u64,
        /// Clusters that are compressed together, as a power of two; 0 for none.
        unit: u8,
    },
}

/// An attribute, or the part of one that a record has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attribute {
    pub(super) kind: u32,
    /// UTF-16.
    pub(super) name: Vec<u16>,
    /// 1 compressed, 0x4000 encrypted, 0x8000 sparse.
    pub(super) flags: u16,
    /// The first cluster (of the whole attribute) that this part speaks of.
    pub(super) first: u64,
    pub(super) body: Body,
}

/// A record of the master file table.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// 1 in use, 2 a directory.
    pub(super) flags: u16,
    pub(super) links: u16,
    /// The record that this one extends; 0 if it stands for itself.
    pub(super) base: u64,
    pub(super) attributes: Vec<Attribute>,
}

/// Puts the bytes back that the update sequence holds.
pub(super) fn fix_up(block: &mut [u8], signature: &[u8; 4]) -> Result<()> {
    if part(block, 0, 4) != signature {
        let found = String::from_utf8_lossy(part(block, 0, 4)).into_owned();
        let wanted = String::from_utf8_lossy(signature).into_owned();
        return Err(corrupt(format!("a structure begins with {found:?} instead of {wanted:?}")));
    }
    let (at, count) = (usize::from(le16(block, 4)), usize::from(le16(block, 6)));
    let sequence = part(block, at, count * 2).to_vec();
    if count < 2 || sequence.len() != count * 2 || (count - 1) * STRIDE != block.len() {
        return Err(corrupt("an update sequence that does not fit its structure"));
    }
    let (number, values) = sequence.split_at(2);
    for (sector, value) in block.chunks_exact_mut(STRIDE).zip(values.chunks_exact(2)) {
        let Some(last) = sector.last_chunk_mut::<2>() else { continue };
        if *last != number {
            return Err(corrupt("a structure that was written only in part (its update sequence differs)"));
        }
        last.copy_from_slice(value);
    }
    Ok(())
}

/// Reads a record that has been fixed up. `clusters`: how many the volume has.
pub(super) fn parse(block: &[u8], clusters: u64) -> Result<Record> {
    let used = block.len().min(usize::try_from(le32(block, 24)).unwrap_or(usize::MAX));
    let used = part(block, 0, used);
    let mut record = Record {
        flags: le16(used, 22),
        links: le16(used, 18),
        base: le64(used, 32) & 0xffff_ffff_ffff,
        attributes: vec![],
    };
    let mut at = usize::from(le16(used, 20));
    loop {
        let kind = le32(used, at);
        if kind == END || at + 8 > used.len() {
            return Ok(record);
        }
        let len = le32(used, at + 4) as usize;
        let whole = part(used, at, len);
        if len < 24 || whole.len() != len || !len.is_multiple_of(8) {
            return Err(corrupt(format!("an attribute of {len} bytes at {at:#x} of a record")));
        }
        record.attributes.push(attribute(whole, kind, clusters)?);
        at += len;
    }
}

fn attribute(whole: &[u8], kind: u32, clusters: u64) -> Result<Attribute> {
    let name = part(whole, usize::from(le16(whole, 10)), usize::from(byte(whole, 9)) * 2);
    let name = name.chunks_exact(2).map(|unit| le16(unit, 0)).collect();
    let flags = le16(whole, 12);
    if byte(whole, 8) == 0 {
        let (len, at) = (le32(whole, 16) as usize, usize::from(le16(whole, 20)));
        let value = part(whole, at, len);
        if value.len() != len {
            return Err(corrupt(format!("a value of {len} bytes that does not fit its attribute")));
        }
        return Ok(Attribute { kind, name, flags, first: 0, body: Body::Resident(value.to_vec()) });
    }
    let first = le64(whole, 16);
    let at = usize::from(le16(whole, 32));
    let runs = runs(whole.get(at..).unwrap_or_default(), first, clusters)?;
    let body =
        Body::Runs { runs, size: le64(whole, 48), initialized: le64(whole, 56), unit: byte(whole, 34) };
    Ok(Attribute { kind, name, flags, first, body })
}

/// A list of runs: pairs of a length and a distance from the last one, each of as many bytes as the byte before says.
pub(super) fn runs(mut packed: &[u8], first: u64, clusters: u64) -> Result<Vec<Run>> {
    let wrong = |what: &str| corrupt(format!("a list of runs {what}"));
    let (mut runs, mut vcn, mut lcn) = (vec![], first, 0_i64);
    while let [head, rest @ ..] = packed {
        if *head == 0 {
            return Ok(runs);
        }
        let (len_bytes, distance_bytes) = (usize::from(head & 15), usize::from(head >> 4));
        if len_bytes == 0 || len_bytes > 8 || distance_bytes > 8 || rest.len() < len_bytes + distance_bytes {
            return Err(wrong("that ends in the middle"));
        }
        let len = signed(&rest[..len_bytes]);
        let len = u64::try_from(len).ok().filter(|len| *len > 0).ok_or_else(|| wrong("of no length"))?;
        let place = if distance_bytes == 0 {
            None
        } else {
            let distance = signed(&rest[len_bytes..len_bytes + distance_bytes]);
            lcn = lcn.checked_add(distance).ok_or_else(|| wrong("that leads nowhere"))?;
            let place = u64::try_from(lcn).ok();
            let inside = |place: &u64| place.checked_add(len).is_some_and(|end| end <= clusters);
            Some(place.filter(inside).ok_or_else(|| wrong("that leads out of the volume"))?)
        };
        if runs.len() >= MOST_RUNS {
            return Err(wrong("without an end"));
        }
        runs.push(Run { vcn, len, lcn: place });
        vcn = vcn.checked_add(len).filter(|end| *end < 1 << 48).ok_or_else(|| wrong("that is too long"))?;
        packed = &rest[len_bytes + distance_bytes..];
    }
    Ok(runs)
}

/// A number of one to eight bytes, least significant first, with its sign.
fn signed(bytes: &[u8]) -> i64 {
    let mut raw = match bytes.last() {
        Some(last) if last & 0x80 != 0 => [0xff; 8],
        _ => [0; 8],
    };
    raw[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
    i64::from_le_bytes(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_count_from_each_other() {
        let packed = [0x21, 0x18, 0x34, 0x56, 0x01, 0x04, 0x11, 0x08, 0xf0, 0x00];
        let found = runs(&packed, 0, 0x10000).unwrap();
        assert_eq!(
            found,
            [
                Run { vcn: 0, len: 0x18, lcn: Some(0x5634) },
                Run { vcn: 0x18, len: 4, lcn: None },
                Run { vcn: 0x1c, len: 8, lcn: Some(0x5624) },
            ]
        );
        runs(&packed, 0, 0x5000).unwrap_err();
        runs(&[0x11, 0x08], 0, 100).unwrap_err();
        runs(&[0x11, 0x00, 0x01, 0], 0, 100).unwrap_err();
        runs(&[0x11, 0x02, 0x80, 0], 0, 100).unwrap_err();
    }

    #[test]
    fn a_torn_structure_is_told() {
        let mut block = vec![0; 1024];
        block[..4].copy_from_slice(b"FILE");
        block[4..8].copy_from_slice(&[48, 0, 3, 0]);
        block[48..54].copy_from_slice(&[7, 0, 1, 2, 3, 4]);
        for end in [510, 1022] {
            block[end] = 7;
        }
        let mut fixed = block.clone();
        fix_up(&mut fixed, b"FILE").unwrap();
        assert_eq!((&fixed[510..512], &fixed[1022..]), (&[1, 2][..], &[3, 4][..]));
        fix_up(&mut block.clone(), b"INDX").unwrap_err();
        block[1022] = 8;
        fix_up(&mut block, b"FILE").unwrap_err();
    }
}
