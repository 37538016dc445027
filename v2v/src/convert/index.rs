//! libkmod's indexes: what modprobe and udev read instead of the texts of depmod.
//!
//! ```text
//!   b0 07 f4 57   00 02 00 01   root           magic, version 2.1, position of the root
//!   node:  [prefix, NUL]  [first, last, positions of children]  [count, (priority, value, NUL)...]
//! ```
//!
//! All numbers are big-endian. A position's upper four bits say which parts its node has: 0x8 a prefix, 0x4 values, 0x2
//! children. (As seen in files that depmod writes.) An index is written here only where an initramfs has its modules in
//! other places than the root file system has them.

use std::collections::BTreeMap;

const MAGIC: u32 = 0xb007_f457;
const VERSION: u32 = 0x0002_0001;
const PREFIX: u32 = 0x8000_0000;
const VALUES: u32 = 0x4000_0000;
const CHILDREN: u32 = 0x2000_0000;

/// Keys with their priorities and values.
pub(crate) type Entries = BTreeMap<Vec<u8>, (u32, Vec<u8>)>;

/// A key with its priority and value.
type Entry<'a> = (&'a [u8], &'a (u32, Vec<u8>));

/// The bytes of an index.
pub(crate) fn build(entries: &Entries) -> Vec<u8> {
    let mut out = vec![];
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&VERSION.to_be_bytes());
    out.extend_from_slice(&[0; 4]);
    let keys: Vec<Entry<'_>> = entries.iter().map(|(key, value)| (key.as_slice(), value)).collect();
    let root = node(&mut out, &keys, 0);
    out[8..12].copy_from_slice(&root.to_be_bytes());
    out
}

/// Writes the node of keys that have their first `depth` bytes in common, those below it first. Gives its position.
fn node(out: &mut Vec<u8>, keys: &[Entry<'_>], depth: usize) -> u32 {
    let (Some((first, _)), Some((last, _))) = (keys.first(), keys.last()) else { return 0 };
    // Sorted: what the first and the last share, all share.
    let common = first.iter().zip(*last).skip(depth).take_while(|(one, other)| one == other).count();
    let end = depth + common;
    let (own, below): (Vec<_>, Vec<_>) = keys.iter().copied().partition(|(key, _)| key.len() == end);
    let mut children: Vec<(u8, u32)> = vec![];
    for group in below.chunk_by(|(one, _), (other, _)| one[end] == other[end]) {
        children.push((group[0].0[end], node(out, group, end + 1)));
    }
    let mut position = u32::try_from(out.len()).unwrap_or(u32::MAX) & !(PREFIX | VALUES | CHILDREN);
    if common > 0 {
        position |= PREFIX;
        out.extend_from_slice(&first[depth..end]);
        out.push(0);
    }
    if let (Some((low, _)), Some((high, _))) = (children.first(), children.last()) {
        position |= CHILDREN;
        out.extend_from_slice(&[*low, *high]);
        for byte in *low..=*high {
            let child = children.iter().find(|(own, _)| *own == byte).map_or(0, |(_, position)| *position);
            out.extend_from_slice(&child.to_be_bytes());
        }
    }
    if !own.is_empty() {
        position |= VALUES;
        out.extend_from_slice(&u32::try_from(own.len()).unwrap_or(0).to_be_bytes());
        for (_, (priority, value)) in &own {
            out.extend_from_slice(&priority.to_be_bytes());
            out.extend_from_slice(value);
            out.push(0);
        }
    }
    position
}

/// The value of a key, as libkmod looks for it.
#[cfg(test)]
pub(crate) fn find(index: &[u8], key: &[u8]) -> Option<Vec<u8>> {
    let number = |at: usize| Some(u32::from_be_bytes(index.get(at..at + 4)?.try_into().ok()?));
    let (mut position, mut key) = (number(8)?, key);
    loop {
        let mut at = (position & !(PREFIX | VALUES | CHILDREN | 0x1000_0000)) as usize;
        if position & PREFIX != 0 {
            let len = index[at..].iter().position(|byte| *byte == 0)?;
            key = key.strip_prefix(&index[at..at + len])?;
            at += len + 1;
        }
        let mut child = None;
        if position & CHILDREN != 0 {
            let (first, last) = (index[at], index[at + 1]);
            if let Some(byte) = key.first().filter(|byte| (first..=last).contains(byte)) {
                child = number(at + 2 + 4 * usize::from(byte - first));
            }
            at += 2 + 4 * (usize::from(last - first) + 1);
        }
        if key.is_empty() {
            let value = index.get(at + 8..).filter(|_| position & VALUES != 0 && number(at) == Some(1))?;
            let len = value.iter().position(|byte| *byte == 0)?;
            return Some(value[..len].to_vec());
        }
        position = child.filter(|child| *child != 0)?;
        key = &key[1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_found_and_no_other() {
        let keys = ["a", "ab", "abc", "b", "virtio", "virtio_blk", "virtio_ring", "x86_64", "zzz"];
        let entries: Entries = (0..)
            .zip(keys)
            .map(|(n, key)| (key.as_bytes().to_vec(), (n, format!("{key}: v").into_bytes())))
            .collect();
        let index = build(&entries);
        for key in keys {
            assert_eq!(find(&index, key.as_bytes()), Some(format!("{key}: v").into_bytes()));
        }
        for none in ["", "v", "virt", "virtio_", "abcd", "zz"] {
            assert_eq!(find(&index, none.as_bytes()), None, "{none}");
        }
        assert_eq!(find(&build(&Entries::new()), b"a"), None);
    }
}
