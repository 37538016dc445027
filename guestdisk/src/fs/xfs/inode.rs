//! Inodes (chapter "On-disk Inode").

use block::{Error, Result};

use super::super::node::{FileKind, Metadata};
use crate::bytes::{be16, be32, be64, byte, corrupt, part};

const FLAG_REALTIME: u16 = 1;
const FLAG2_REFLINK: u64 = 2;
const FLAG2_BIGTIME: u64 = 8;
const FLAG2_LARGE_COUNTS: u64 = 16;

/// What the fork of an inode holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// A device number, or nothing at all.
    Other,
    /// The bytes.
    Local,
    /// A list of extents.
    Extents,
    /// The root of a tree of extents.
    Tree,
}

/// An inode as it lies on the disk.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) number: u64,
    pub(super) format: Format,
    bytes: Vec<u8>,
    flags2: u64,
}

impl Inode {
    /// `bytes` is at least 256 long.
    pub(super) fn parse(number: u64, bytes: Vec<u8>) -> Result<Self> {
        if be16(&bytes, 0) != 0x494e || !(1..=3).contains(&byte(&bytes, 4)) {
            return Err(corrupt(format!("no inode: it begins with {:#x}", be16(&bytes, 0))));
        }
        let format = match byte(&bytes, 5) {
            1 => Format::Local,
            2 => Format::Extents,
            3 => Format::Tree,
            _ => Format::Other,
        };
        let flags2 = if byte(&bytes, 4) == 3 { be64(&bytes, 120) } else { 0 };
        Ok(Self { number, format, bytes, flags2 })
    }

    pub(super) fn size(&self) -> u64 {
        be64(&self.bytes, 56)
    }

    pub(super) fn metadata(&self) -> Metadata {
        let raw = &self.bytes;
        let mode = u32::from(be16(raw, 2));
        Metadata {
            kind: FileKind::of_mode(mode),
            mode: mode & 0o7777,
            uid: be32(raw, 8),
            gid: be32(raw, 12),
            size: self.size(),
            mtime: self.mtime(),
            links: if byte(raw, 4) == 1 { be16(raw, 6).into() } else { be32(raw, 16) },
        }
    }

    /// Seconds, or with big timestamps nanoseconds since the earliest of them.
    fn mtime(&self) -> i64 {
        if self.flags2 & FLAG2_BIGTIME != 0 {
            let seconds = i64::try_from(be64(&self.bytes, 40) / 1_000_000_000).unwrap_or(i64::MAX);
            return seconds.saturating_sub(1 << 31);
        }
        be32(&self.bytes, 40).cast_signed().into()
    }

    /// Refuses files whose data lies on another device.
    pub(super) fn check_data(&self) -> Result<()> {
        if be16(&self.bytes, 90) & FLAG_REALTIME != 0 {
            return Err(Error::unsupported("the file lies on the realtime device"));
        }
        Ok(())
    }

    /// Whether other files may have some of its blocks.
    pub(super) fn may_share(&self) -> bool {
        self.flags2 & FLAG2_REFLINK != 0
    }

    /// The data fork: up to the attribute fork, if there is one.
    pub(super) fn fork(&self) -> &[u8] {
        let start = if byte(&self.bytes, 4) == 3 { 176 } else { 100 };
        let len = match usize::from(byte(&self.bytes, 82)) {
            0 => self.bytes.len(),
            eighths => eighths * 8,
        };
        part(&self.bytes, start, len)
    }

    /// How many extents the fork's list has.
    pub(super) fn extents(&self) -> u64 {
        if self.flags2 & FLAG2_LARGE_COUNTS != 0 {
            be64(&self.bytes, 24)
        } else {
            be32(&self.bytes, 76).into()
        }
    }
}
