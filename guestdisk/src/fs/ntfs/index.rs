//! Directories: entries of the index `$I30`.

use block::Result;

use super::super::node::{Entry, FileKind, Node};
use crate::bytes::{byte, corrupt, le16, le32, le64, part};

/// The record number of a reference; the rest is a sequence number.
const NUMBER: u64 = 0xffff_ffff_ffff;
/// Of the flags of a name: a directory.
const DIRECTORY: u32 = 0x1000_0000;
/// Of the flags of a name: a reparse point.
const REPARSE: u32 = 0x400;
/// The name space of names that DOS programs are given besides the real one.
const DOS: u8 = 2;

/// Calls `visit` with the entries of a node, whose index header begins `bytes`. `false` if it has seen enough.
pub(super) fn entries(bytes: &[u8], visit: &mut dyn FnMut(Entry) -> Result<bool>) -> Result<bool> {
    let used = part(bytes, 0, le32(bytes, 4) as usize);
    let mut at = le32(bytes, 0) as usize;
    while at + 16 <= used.len() {
        let len = usize::from(le16(used, at + 8));
        let whole = part(used, at, len);
        if len < 16 || whole.len() != len {
            return Err(corrupt(format!("an entry of {len} bytes in a directory")));
        }
        if le16(whole, 12) & 2 != 0 {
            return Ok(true);
        }
        if let Some(entry) = entry(whole)
            && !visit(entry)?
        {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

fn entry(whole: &[u8]) -> Option<Entry> {
    let key = part(whole, 16, usize::from(le16(whole, 10)));
    let name = part(key, 66, usize::from(byte(key, 64)) * 2);
    let units = name.chunks_exact(2).map(|unit| le16(unit, 0));
    let name: String = char::decode_utf16(units).map(|unit| unit.unwrap_or('\u{fffd}')).collect();
    let (flags, number) = (le32(key, 56), le64(whole, 0) & NUMBER);
    if byte(key, 65) == DOS || name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return None;
    }
    let kind = if flags & REPARSE != 0 {
        FileKind::Unknown
    } else if flags & DIRECTORY != 0 {
        FileKind::Directory
    } else {
        FileKind::File
    };
    Some(Entry { name: name.into_bytes(), node: Node::new(number), kind })
}
