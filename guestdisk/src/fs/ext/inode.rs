//! Inodes (kernel documentation, "Index Nodes").

use block::{Error, Result};

use super::super::node::{FileKind, Metadata};
use super::has;
use crate::bytes::{byte, le16, le32, part};

const FLAG_ENCRYPT: u32 = 0x800;
const FLAG_COMPRESSED: u32 = 0x4;
const FLAG_EXTENTS: u32 = 0x8_0000;
const FLAG_INLINE_DATA: u32 = 0x1000_0000;

/// The 60 bytes that say where the data lies, or are the data.
const BLOCK_FIELD: std::ops::Range<usize> = 0x28..0x64;

/// An inode as it lies on the disk.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) number: u64,
    bytes: Vec<u8>,
    flags: u32,
}

/// How an inode's bytes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Extents,
    Indirect,
    Inline,
}

impl Inode {
    /// `bytes` is at least 128 long.
    pub(super) fn parse(number: u64, bytes: Vec<u8>) -> Result<Self> {
        let flags = le32(&bytes, 0x20);
        Ok(Self { number, bytes, flags })
    }

    pub(super) fn size(&self) -> u64 {
        u64::from(le32(&self.bytes, 0x6c)) << 32 | u64::from(le32(&self.bytes, 4))
    }

    pub(super) fn kind(&self) -> FileKind {
        FileKind::of_mode(le16(&self.bytes, 0).into())
    }

    pub(super) fn metadata(&self) -> Metadata {
        let raw = &self.bytes;
        let wide = |low, high| u32::from(le16(raw, high)) << 16 | u32::from(le16(raw, low));
        Metadata {
            kind: self.kind(),
            mode: u32::from(le16(raw, 0)) & 0o7777,
            uid: wide(2, 0x78),
            gid: wide(0x18, 0x7a),
            size: self.size(),
            mtime: self.mtime(),
            links: le16(raw, 0x1a).into(),
        }
    }

    /// The extra field has two more bits for the seconds ("Inode Timestamps").
    fn mtime(&self) -> i64 {
        let seconds = i64::from(le32(&self.bytes, 0x10).cast_signed());
        let has_extra = self.bytes.len() > 128 && le16(&self.bytes, 0x80) >= 12;
        seconds + if has_extra { i64::from(le32(&self.bytes, 0x88) & 3) << 32 } else { 0 }
    }

    pub(super) fn block_field(&self) -> &[u8] {
        &self.bytes[BLOCK_FIELD]
    }

    /// How to find the data.
    pub(super) fn layout(&self) -> Result<Layout> {
        if has(self.flags, FLAG_ENCRYPT) {
            return Err(Error::unsupported("the file is encrypted"));
        }
        if has(self.flags, FLAG_COMPRESSED) {
            return Err(Error::unsupported("the file is compressed by a patch of ext2"));
        }
        Ok(if has(self.flags, FLAG_INLINE_DATA) {
            Layout::Inline
        } else if has(self.flags, FLAG_EXTENTS) {
            Layout::Extents
        } else {
            Layout::Indirect
        })
    }

    /// Whether a symbolic link's target stands where others keep their blocks.
    pub(super) fn is_fast_link(&self) -> bool {
        self.kind() == FileKind::Symlink
            && self.size() < 60
            && !has(self.flags, FLAG_INLINE_DATA)
            && !has(self.flags, FLAG_EXTENTS)
            && !has(self.flags, FLAG_ENCRYPT)
    }

    /// The bytes of a file that is kept in its inode: first those in place of the blocks, then the value of the
    /// attribute `system.data` behind the fixed fields ("Inline Data", "Extended Attributes").
    pub(super) fn inline(&self) -> (&[u8], &[u8]) {
        (self.block_field(), self.attribute(7, b"data").unwrap_or_default())
    }

    /// The value of an attribute that is kept in the inode.
    fn attribute(&self, index: u8, name: &[u8]) -> Option<&[u8]> {
        let start = 128 + usize::from(le16(&self.bytes, 0x80));
        if self.bytes.len() <= 128 || le32(&self.bytes, start) != 0xea02_0000 {
            return None;
        }
        let entries = part(&self.bytes, start + 4, self.bytes.len());
        let mut at = 0;
        while le32(entries, at) != 0 {
            let name_len = usize::from(byte(entries, at));
            if byte(entries, at + 1) == index && part(entries, at + 16, name_len) == name {
                let (offset, size) = (le16(entries, at + 2), le32(entries, at + 8));
                return Some(part(entries, offset.into(), size as usize));
            }
            at += (16 + name_len).next_multiple_of(4);
        }
        None
    }
}
